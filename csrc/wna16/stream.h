// What the host side and the kernel in stream.cuh agree on, and the entries of the kernel: one a (dtype, bit
// width), each compiled in its own file.
#pragma once

#include <cuda_runtime_api.h>

#include "qsun/wna16_panels.h"
#include "runtime/alignment.h"
#include "runtime/launch.h"
#include "wna16/panels.h"

namespace qsun {

constexpr int kTokens = 8;  // of a token tile, the tensor core's N
constexpr int kMaxStreamWarps = 16;
constexpr int kExactTokenTiles = 2;                 // up to which the scale follows the sum of a group
constexpr int kXRowBytes = kBlockColumns * 2 + 16;  // of x in shared memory; padded: the 8 rows of a fragment
                                                    // lie in different banks

// Shared memory of a block: the head, the warps' rings, and the warps' sums. In the head lie the barriers of
// the rings and behind them, mostly where it has room anyway, what a norm between two products takes.
constexpr int kMaxStreamBarriers = 64;                          // of all rings: warps * stages
constexpr int kHeadBytes = kMaxStreamBarriers * kBarrierBytes;  // at least

// Stages of a warp's ring. Narrow codes want more of them, for as many bytes in flight; each costs a
// comparison where lanes copy (stream_copies.cuh), so those have no more than wide codes want.
constexpr int max_stream_stages(bool copy_engine) { return copy_engine ? 8 : 4; }

// Warps that a block may have: as many as leave registers for the next kernel's blocks.
QSUN_HOST_DEVICE constexpr int max_stream_warps(int token_tiles, int row_tiles, int bits) {
  return token_tiles == 1 && row_tiles <= 2 && bits < 8 ? kMaxStreamWarps : kMaxStreamWarps / 2;
}

// Blocks of a multiprocessor that registers must allow: this kernel's and, beside it, the next one's, whose
// weights are already on their way. Where x takes most of the shared memory, there is room for one alone.
constexpr int stream_blocks_per_sm(int token_tiles, int row_tiles) {
  return token_tiles * row_tiles > 4 ? 1 : 2;
}

// Floats of a token's row of partial sums; padded: the eight rows and four token pairs that a warp stores at
// once lie in 32 banks.
QSUN_HOST_DEVICE constexpr int part_row_floats(int row_tiles) {
  return row_tiles * kTileRows + 4;
}

constexpr int kSquaredColumns = 16;  // of a row, whose squares are one sum
// Sums of squares of a row.
QSUN_HOST_DEVICE constexpr int64_t sums_of_squares(int64_t N) {
  return (N + kSquaredColumns - 1) / kSquaredColumns;
}

QSUN_HOST_DEVICE constexpr int log2_of(int value) { return value <= 1 ? 0 : 1 + log2_of(value / 2); }

// Rows of x in a stage of a warp's ring.
inline int stream_x_rows(const Wna16PanelsParams& p, const StreamConfig& c) {
  return static_cast<int>(p.M < c.token_tiles * kTokens ? p.M : c.token_tiles * kTokens);
}

// Where things lie in shared memory.
struct StreamMemory {
  int roots_offset = 0;         // of x whose norm is left to this product: a float32 a token
  int norm_weights_offset = 0;  // of a norm that this one leaves: those of a group of row tiles
  int head_bytes = 0;           // all that is in front of the rings
  int stage_bytes = 0;
  int ring_bytes = 0;   // of a warp
  int part_offset = 0;  // of the first warp's sums
  int part_stride = 0;  // from one warp's to the next's
  int total = 0;

  StreamMemory() = default;
  StreamMemory(const Wna16PanelsParams& p, const StreamConfig& c) {
    const int x_rows = stream_x_rows(p, c);
    const int part_bytes = x_rows * part_row_floats(c.row_tiles) * 4;
    stage_bytes = c.row_tiles * tile_bytes(p.bits, p.groups_per_block, p.has_zeros) + x_rows * kXRowBytes;
    ring_bytes = c.stages * stage_bytes;
    roots_offset = c.warps * c.stages * kBarrierBytes;
    norm_weights_offset = roots_offset + (p.x_squares != nullptr ? x_rows * 4 : 0);
    const int head = norm_weights_offset + (p.squares != nullptr ? c.row_tiles * kTileRows * 2 : 0);
    head_bytes = head <= kHeadBytes ? kHeadBytes : static_cast<int>(ceil_div(head, 16)) * 16;
    const int rings = head_bytes + c.warps * ring_bytes;
    // A block whose row tiles are one group has done with its ring when it has its sums.
    const bool is_one_turn = ceil_div(p.N, kTileRows) <= static_cast<int64_t>(c.row_blocks) * c.row_tiles;
    part_offset = is_one_turn ? head_bytes : rings;
    part_stride = is_one_turn ? ring_bytes : part_bytes;
    total = is_one_turn ? rings : rings + c.warps * part_bytes;
  }
};

template <typename T, int kBits>
cudaError_t launch_wna16_stream(const Wna16PanelsParams& params, const StreamConfig& config);

}  // namespace qsun
