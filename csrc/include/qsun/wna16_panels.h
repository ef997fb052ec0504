#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "qsun/device.h"
#include "qsun/export.h"
#include "qsun/status.h"
#include "qsun/types.h"

namespace qsun {

constexpr int64_t kMaxPendingRows = 16;  // tokens whose norm one product can leave to the next

// out = x @ w.T (+ bias) (+ residual), or silu(x @ gate.T) * (x @ up.T), with a weight laid out in panels
// (csrc/wna16/panels.h) and x of a 16-bit type. w[n, k] = (code - zero) * scale. With a norm, which ends a
// residual block, also norm_out = out / sqrt(mean(out^2) + norm_eps) * norm_weight over the rows of out as
// they were rounded: the bits are those of the kernel of rms_norm.h.
//
// Up to kMaxPendingRows tokens of bfloat16 the streaming kernel can leave a norm to the product behind it.
// The one in front, with `squares`, gives norm_out = out * norm_weight, rounded once, and sums of squares of
// out. The one behind takes that norm_out as x and the squares as x_squares, and multiplies its sums by
// 1 / sqrt(sum of a row's x_squares / K + x_eps).
//
// A product whose columns are split over blocks (wna16_panels_splits()) can leave its sums to the launch
// behind it, which then adds them: parts (splits, M, N rounded up to 64) float32, whose sum over the splits,
// in their order, is x @ w.T.
struct Wna16PanelsParams {
  const void* x = nullptr;            // (M, K) dtype, rows x_stride elements apart
  const uint8_t* panels = nullptr;    // (ceil(N / 64), column_blocks, block_bytes), aligned to 16 bytes
  const void* bias = nullptr;         // (N,) dtype; null: none
  const void* residual = nullptr;     // (M, N) dtype, rows residual_stride elements apart; null: none
  const void* norm_weight = nullptr;  // (N,) dtype; null: no norm
  void* out = nullptr;       // (M, N) dtype, or (M, N / 2) for gate_up, rows out_stride elements apart
  void* norm_out = nullptr;  // (M, N) dtype, contiguous; null exactly when norm_weight is
  float* squares = nullptr;  // (M, ceil(N / 16)), of 16 neighbouring columns each; null: the norm is not left
  const float* x_squares = nullptr;  // (M, K / 16), aligned to 16, K divisible by 64; null: x is whole
  // wna16_panels_scratch_bytes(), aligned to 16; used by this call alone, or with leaves_sums its result
  void* scratch = nullptr;
  int64_t scratch_bytes = 0;
  int64_t M = 0;              // 0: nothing is launched
  int64_t N = 0;              // rows of the weight; of gate and up together for gate_up
  int64_t K = 0;              // columns of x
  int64_t column_blocks = 0;  // of 128 stored columns
  int64_t x_stride = 0;
  int64_t residual_stride = 0;
  int64_t out_stride = 0;
  float norm_eps = 0.0f;     // unused with squares
  float x_eps = 0.0f;        // of the norm that x_squares belong to
  int bits = 4;              // 2, 3, 4 or 8
  int groups_per_block = 1;  // 4, 2 or 1: groups of 32, 64 or 128 columns
  bool has_zeros = false;    // zero points are stored; else every zero is 2^(bits - 1)
  bool gate_up = false;  // rows are gate and up, interleaved (panels.h); bias, residual and norm must be null
  bool in_layer = false;         // launched as was fastest among the products of a decoder layer, not alone
  bool batch_invariant = false;  // a row of out depends on nothing but its row of x
  // scratch is left with the parts, and out is not written. Where columns are split, without gate_up, bias,
  // residual and norm.
  bool leaves_sums = false;
  // Weights, that of the norm too, are read before the kernels that this launch depends on have ended. Set to
  // false where one of them writes the weight.
  bool prefetch_weights = true;
  DType dtype = DType::kBFloat16;  // kFloat16 or kBFloat16
  int device = 0;
  Stream stream = nullptr;
};
QSUN_API std::string to_string(const Wna16PanelsParams& params);

// How the kernel in csrc/wna16/stream.cuh is launched.
struct StreamConfig {
  int token_tiles = 1;  // of 8 tokens that a block multiplies: 1, 2 or 4
  int row_tiles = 4;    // of 16 weight rows that a block multiplies at most: 2 or 4; 4 for 4 token tiles
  int row_blocks = 1;   // blocks that share the weight's rows: its row tiles are dealt to them evenly
  // Of a block; they take its columns in turn: 1 to 8, to 16 for one token tile, 2 row tiles and fewer than 8
  // bits.
  int warps = 8;
  // Blocks of 128 columns that a warp has in flight or in use: 2 to 8, to 4 without the copy engine; of all
  // warps at most 64.
  int stages = 2;
  bool copy_engine = true;        // copies by the copy engine; false below sm_90
  bool overlaps_producer = true;  // programmatic dependent launch; false below sm_90
};
QSUN_API std::string to_string(const StreamConfig& config);

// How the kernel in csrc/wna16/gemm_sm90.cuh is launched. token_tile and warp_groups are one of gemm_tiles().
struct GemmConfig {
  int token_tile = 64;  // tokens that a block multiplies
  int warp_groups = 2;  // of a block, each with 64 weight rows
  int split_k = 1;      // blocks that share the columns, 1 to 16
  int stages = 4;       // column blocks of the weight and of x in flight or in use, 2 to 8; 1 for one in all
  // What is split is added by the blocks themselves, as a cluster of 2 to 8, for token tiles from 64 on; else
  // params.scratch takes the sums and a second kernel adds them.
  bool adds_in_cluster = false;
};
QSUN_API std::string to_string(const GemmConfig& config);

// How the kernel in csrc/wna16/tiles_sm80.cuh is launched. A block has row_groups * column_groups warps, at
// most 8.
struct TilesConfig {
  int token_tiles = 8;    // of 8 tokens that a block multiplies: 2, 4, 6 or 8
  int row_groups = 2;     // of 64 weight rows that a block multiplies: 1, 2 or 4
  int column_groups = 2;  // of 64 columns, a stage: 2, 4 or 8
  int split_k = 1;        // blocks that share the columns, 1 to 16, whose sums go through params.scratch
  int stages = 4;         // in flight or in use, 2 to 6
  bool overlaps_producer = true;  // programmatic dependent launch; false below sm_90
};
QSUN_API std::string to_string(const TilesConfig& config);

struct GemmTile {
  int token_tile, warp_groups;
};
// What the kernel is compiled for.
QSUN_API std::vector<GemmTile> gemm_tiles();

// What runs a problem: a kernel for many tokens (csrc/wna16/gemm_sm90.cuh, or tiles_sm80.cuh where that one
// cannot run) or the streaming one, and how each is launched. Pure: they depend on the sizes, the alignment
// of the pointers and the device alone. With squares or x_squares it is the streaming one.
QSUN_API bool uses_gemm(const Wna16PanelsParams& params, const DeviceProps& props);
QSUN_API bool uses_tiles(const Wna16PanelsParams& params, const DeviceProps& props);
// Blocks over which a product of these sizes splits its columns, whose sums it can leave; 1: none to leave.
QSUN_API int wna16_panels_splits(const Wna16PanelsParams& params, const DeviceProps& props);
// Whether a product of these sizes may leave the norm of its rows to the product behind, or take one that was
// left, and be what it is without, in_layer: the dtype and the number of tokens allow it, and the streaming
// kernel is the choice in any case.
QSUN_API bool may_pend_norm(const Wna16PanelsParams& params, const DeviceProps& props);
QSUN_API StreamConfig choose_stream(const Wna16PanelsParams& params, const DeviceProps& props);
QSUN_API GemmConfig choose_gemm(const Wna16PanelsParams& params, const DeviceProps& props);
QSUN_API TilesConfig choose_tiles(const Wna16PanelsParams& params, const DeviceProps& props);
// Shared memory of a block, bytes.
QSUN_API int wna16_panels_shared_bytes(const Wna16PanelsParams& params, const StreamConfig& config);
QSUN_API int wna16_panels_shared_bytes(const Wna16PanelsParams& params, const GemmConfig& config);
QSUN_API int wna16_panels_shared_bytes(const Wna16PanelsParams& params, const TilesConfig& config);
// Bytes of scratch that a call with these sizes, dtype and alignment of x needs; 0 for most.
QSUN_API int64_t wna16_panels_scratch_bytes(const Wna16PanelsParams& params, const DeviceProps& props);
QSUN_API int64_t wna16_panels_scratch_bytes(const Wna16PanelsParams& params, const StreamConfig& config);
QSUN_API int64_t wna16_panels_scratch_bytes(const Wna16PanelsParams& params, const GemmConfig& config);
QSUN_API int64_t wna16_panels_scratch_bytes(const Wna16PanelsParams& params, const TilesConfig& config);
// Kernel and launch in one line.
QSUN_API std::string describe(const Wna16PanelsParams& params, const DeviceProps& props);

QSUN_API Status wna16_panels(const Wna16PanelsParams& params);
// By one of the kernels, with a configuration of the caller's, which must be one that it is compiled for.
QSUN_API Status wna16_panels(const Wna16PanelsParams& params, const StreamConfig& config);
QSUN_API Status wna16_panels(const Wna16PanelsParams& params, const GemmConfig& config);
QSUN_API Status wna16_panels(const Wna16PanelsParams& params, const TilesConfig& config);

}  // namespace qsun
