// The host side of the kernel in gemm_sm90.cuh: how it is launched, and one entry a (dtype, bit width), each
// compiled in its own file.
#pragma once

#include <cuda_runtime_api.h>

#include "qsun/wna16_panels.h"
#include "wna16/panels.h"

namespace qsun {

constexpr GemmTile kGemmTiles[] = {{16, 1}, {32, 1},  {16, 2},  {32, 2},  {48, 2}, {64, 2},
                                   {96, 2}, {128, 2}, {128, 3}, {128, 4}, {256, 2}};
constexpr int kMaxSplit = 16;
constexpr int kFewestClusterTokens = 64;  // of a token tile whose blocks may add their sums in a cluster
constexpr int kMaxCluster = 8;            // blocks, on any GPU
constexpr int kMaxStages = 8;

// Whether the kernel can run the problem: the copy engine can read x.
bool gemm_can_read(const Wna16PanelsParams& params);

constexpr int kBoxColumns = 64;             // of x that are copied at once: 128 bytes, the swizzle's width
constexpr int kStagedRow = kBlockRows + 4;  // floats of one token's sums in shared memory, padded against
                                            // bank conflicts

// Blocks of a multiprocessor for which registers and stages are planned.
QSUN_HOST_DEVICE constexpr int gemm_blocks_per_sm(int token_tile, int warp_groups) {
  return warp_groups > 2 || token_tile > 96 ? 1
         : warp_groups == 1                 ? (token_tile == 16 ? 6 : 5)
         : token_tile > 32                  ? 2
                                            : 3;
}

constexpr int gemm_stage_bytes(const GemmConfig& config, int block_bytes) {
  return config.token_tile * kBlockColumns * 2 + config.warp_groups * block_bytes;
}

// Where the barriers lie in the dynamic shared memory: after the stages, which the sums take over at the end.
constexpr int gemm_barrier_offset(const GemmConfig& config, int block_bytes) {
  const int stages = config.stages * gemm_stage_bytes(config, block_bytes);
  const int staged = config.warp_groups * config.token_tile * kStagedRow * 4;
  return ((stages > staged ? stages : staged) + 15) / 16 * 16;
}
constexpr int gemm_shared_bytes(const GemmConfig& config, int block_bytes) {
  return gemm_barrier_offset(config, block_bytes) + 2 * kBarrierBytes * config.stages;
}

template <typename T, int kBits>
cudaError_t launch_wna16_gemm(const Wna16PanelsParams& params, const GemmConfig& config);

}  // namespace qsun
