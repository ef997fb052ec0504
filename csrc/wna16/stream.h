// What the host side and the kernel in stream.cuh agree on, and the entries of the kernel: one a (dtype, bit
// width), each compiled in its own file.
#pragma once

#include <cuda_runtime_api.h>

#include "qsun/wna16_panels.h"
#include "wna16/panels.h"

namespace qsun {

constexpr int kTokens = 8;  // of a token tile, the tensor core's N
constexpr int kMaxStreamWarps = 16;
constexpr int kMaxCluster = 8;
constexpr int kXRowBytes = kBlockColumns * 2 + 16;  // of x in shared memory; padded: the 8 rows of a fragment
                                                    // lie in different banks

// Shared memory of a block begins with a row of zeros that stands for tokens past M, and the places of the
// warps' partial sums.
constexpr int kZeroRowBytes = 256;
constexpr int kHeadBytes = kZeroRowBytes + kMaxStreamWarps * 4;

// Warps that a block may have: as many as leave registers for the next kernel's blocks.
QSUN_HOST_DEVICE constexpr int max_stream_warps(int token_tiles, int row_tiles) {
  return token_tiles == 1 && row_tiles <= 2 ? kMaxStreamWarps : kMaxStreamWarps / 2;
}

// Floats of a token's row of partial sums; padded: the eight rows and four token pairs that a warp stores at
// once lie in 32 banks.
QSUN_HOST_DEVICE constexpr int part_row_floats(int row_tiles) {
  return row_tiles * kTileRows + 4;
}

// `total` things dealt to `shares` as evenly as can be, the first ones getting one more.
struct EvenShares {
  int each = 0;
  int extra = 0;

  EvenShares() = default;
  EvenShares(int total, int shares) : each(total / shares), extra(total % shares) {}
  // Where share `index` begins.
  QSUN_HOST_DEVICE int begin(int index) const {
    return index * each + (index < extra ? index : extra);
  }
};

QSUN_HOST_DEVICE constexpr int log2_of(int value) { return value <= 1 ? 0 : 1 + log2_of(value / 2); }

template <typename T, int kBits>
cudaError_t launch_wna16_stream(const Wna16PanelsParams& params, const StreamConfig& config);

}  // namespace qsun
