// The layout in which weights stream to the tensor cores ("panels"), made once by
// qsun_kernels/backends/panels.py.
//
// A block holds 64 rows x 128 columns as four row tiles, each one contiguous piece of memory with all that is
// needed to rebuild its 16 rows:
//
//   block (row block, column block):   [row tile 0] [row tile 1] [row tile 2] [row tile 3]
//   row tile:                          [codes] [scales] [zeros]
//
// Lane 4g + t of a warp finds its tensor-core operand of 8 products of 16 columns in 16-byte pieces, beside
// those of its neighbours:
//
//       columns   2t 2t+1 . . 2t+8 2t+9          register 0: row g      columns 2t, 2t+1
//   row g          r0  r0      r2   r2           register 1: row g + 8  columns 2t, 2t+1
//   row g + 8      r1  r1      r3   r3           register 2: row g      columns 2t + 8, 2t + 9
//                                                register 3: row g + 8  columns 2t + 8, 2t + 9
//
//   8 bits   four pieces; two words a product, a byte a code, in the order of registers
//   4 bits   two pieces of 4 words, a word a product: register r at bits 4r (even column) and 16 + 4r (odd)
//   2 bits   one piece, half a word's bits a product: 8p + 2r and 16 + 8p + 2r, p the product's parity
//   3 bits   a piece and then half a piece (8 bytes a lane); of four products the first two words of the
//            piece's half and one word of the half piece: three products at bits 3r and 16 + 3r of a word
//            each, the twelve bits of the fourth product in the four that each word has left
//
// Below 8 bits each word is then turned left by a few bits, which puts codes where device/panel_codes.cuh
// wants them.
//
// Scales and zeros of (g, group) lie as (row g, row g + 8) pairs, so that a lane reads its own two in one
// load. gate_up: rows g are gate's and rows g + 8 are up's of the same output.
#pragma once

#include <cstdint>

#include "qsun/wna16_panels.h"

#ifdef __CUDACC__
#define QSUN_HOST_DEVICE __host__ __device__
#else
#define QSUN_HOST_DEVICE
#endif

namespace qsun {

constexpr int kTileRows = 16;   // of a row tile, the tensor core's M
constexpr int kBlockTiles = 4;  // row tiles of a block
constexpr int kBlockRows = kTileRows * kBlockTiles;
constexpr int kBlockColumns = 128;
constexpr int kMaxGroups = 4;     // of a block
constexpr int kBarrierBytes = 8;  // of a barrier of the copy engine, in shared memory

// Bytes of one row tile's part of a block.
QSUN_HOST_DEVICE constexpr int tile_code_bytes(int bits) {
  return bits * 256;
}
// Of its codes, what lies in 16-byte pieces.
QSUN_HOST_DEVICE constexpr int tile_piece_bytes(int bits) {
  return bits == 3 ? 512 : bits * 256;
}
QSUN_HOST_DEVICE constexpr int tile_scale_bytes(int groups) { return 32 * groups; }
QSUN_HOST_DEVICE constexpr int tile_zero_bytes(int groups, bool has_zeros) { return has_zeros ? 16 * groups : 0; }

QSUN_HOST_DEVICE constexpr int tile_bytes(int bits, int groups, bool has_zeros) {
  return tile_code_bytes(bits) + tile_scale_bytes(groups) + tile_zero_bytes(groups, has_zeros);
}

QSUN_HOST_DEVICE constexpr int block_bytes(int bits, int groups, bool has_zeros) {
  return kBlockTiles * tile_bytes(bits, groups, has_zeros);
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

}  // namespace qsun
