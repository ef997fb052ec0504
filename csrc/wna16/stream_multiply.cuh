// One block of 128 columns of a panel weight times x, both in a stage of a warp's ring (stream.cuh).
#pragma once

#include "device/dtype.cuh"
#include "device/mma.cuh"
#include "device/panel_codes.cuh"
#include "wna16/stream_copies.cuh"

namespace qsun {
namespace {

// How codes enter a product (panel_codes.cuh).
enum class Products {
  kBare,     // with their base: what is too much is taken off the float32 sum of a group, which its scale
             // follows
  kExact,    // as code - zero; the scale of a group follows its float32 sum
  kRounded,  // as (code - zero) * scale, rounded to 16 bits
};

template <typename T, int kBits>
__host__ __device__ constexpr Products products_of(int token_tiles) {
  if (token_tiles > kExactTokenTiles) return Products::kRounded;
  return kHasBareCodes<T, kBits> ? Products::kBare : Products::kExact;
}

// What a sum of products of rows g (kHalf 0) or g + 8 is multiplied with at the end.
template <typename T, int kBits, int kHalf>
__host__ __device__ constexpr float sum_factor(int token_tiles) {
  const Products products = products_of<T, kBits>(token_tiles);
  const int shift = products == Products::kBare    ? kBareShift<T, kBits, kHalf>
                    : products == Products::kExact ? kExactShift<T>
                                                   : 0;
  return static_cast<float>(1u << shift);
}

// Where a lane finds its part of a row tile in shared memory, and what follows.
template <int kBits>
struct LaneAddresses {
  uint32_t pieces, half_pieces, scales, zeros;

  __device__ __forceinline__ LaneAddresses(uint32_t tile, uint32_t lane, int groups)
      : pieces(tile + lane * kPieceBytes),
        half_pieces(tile + tile_piece_bytes(kBits) + lane * (kPieceBytes / 2)),
        scales(tile + tile_code_bytes(kBits) + lane / 4u * groups * 4),
        zeros(tile + tile_code_bytes(kBits) + tile_scale_bytes(groups) + lane / 4u * groups * 2) {}

  // The words of half a block (`turn` 0 or 1), or with kQuarters 1 of a quarter (0 to 3), at the place of the
  // first steps.
  template <int kQuarters>
  __device__ __forceinline__ void load_words(uint32_t tile_offset, uint32_t turn,
                                             uint32_t (&words)[kHalfWords<kBits>]) const {
    constexpr uint32_t kPieces = kWarpLanes * kPieceBytes;  // bytes of all lanes'
    const uint32_t own = pieces + tile_offset;
    if constexpr (kBits == 8) {
#pragma unroll
      for (int i = 0; i < kQuarters; ++i) load_piece(own + (turn * kQuarters + i) * kPieces, words, 4 * i);
    } else if constexpr (kBits == 4 && kQuarters == 2) {
      load_piece(own + turn * kPieces, words, 0);
    } else if constexpr (kBits == 2 && kQuarters == 1) {
      words[0] = load_shared_u32(own + turn * 4);
    } else {
      static_assert(kBits < 4 || kQuarters == 1);
      const uint2 loaded = load_shared_u64(own + (kBits == 4 ? turn / 2 * kPieces + turn % 2 * 8 : turn * 8));
      words[0] = loaded.x, words[1] = loaded.y;
      if constexpr (kBits == 3) words[2] = load_shared_u32(half_pieces + tile_offset + turn * 4);
    }
  }

 private:
  static __device__ __forceinline__ void load_piece(uint32_t address, uint32_t (&words)[kHalfWords<kBits>],
                                                    int first) {
    const uint4 loaded = load_shared_u128(address);
    words[first] = loaded.x, words[first + 1] = loaded.y;
    words[first + 2] = loaded.z, words[first + 3] = loaded.w;
  }
};

// (base + zero), what the sums of x are multiplied with. zeros: bytes, of rows g (kHalf 0) and g + 8. The
// bits of 2^23 + zero as a float32 need no conversion.
template <typename T, int kBits, int kHalf>
__device__ __forceinline__ float bare_zero(uint32_t zeros) {
  constexpr uint32_t kTwoTo23 = 0x4b000000u;
  const float zero = __uint_as_float(permute_bytes(zeros, kTwoTo23, kHalf == 0 ? 0x7540 : 0x7541));
  return zero - static_cast<float>((1 << 23) - kBareBase<T, kBits, kHalf>);
}

// Multiplies one block of columns, two steps ("a quarter") at a time. kOneGroup: the block is one group; else
// each quarter is taken as one.
//
// kBare, kExact: `parts` holds the sums of the group under way, which its scale then takes into `sums`; else
// weights are rounded with their scale and summed at once.
template <typename T, int kBits, int kTokenTiles, int kRowTiles, bool kOneGroup, bool kHasZeros>
__device__ __forceinline__ void multiply_block(const StreamArguments& a, uint32_t stage,
                                               const uint32_t (&x_addresses)[kTokenTiles], uint32_t lane,
                                               float (&sums)[kRowTiles][kTokenTiles][4]) {
  constexpr Products kProducts = products_of<T, kBits>(kTokenTiles);
  constexpr bool kIsBare = kProducts == Products::kBare, kIsRounded = kProducts == Products::kRounded;
  constexpr int kShift = kProducts == Products::kExact ? kExactShift<T> : 0;
  // Quarters whose codes are loaded at once, and how often that is unrolled. Where sixteen warps share the
  // registers, as little as may be; three-bit codes take half a block.
  constexpr bool kIsNarrow = kTokenTiles * kRowTiles < 4;
  constexpr int kQuarters = kIsNarrow && kBits != 3 ? 1 : 2;
  constexpr int kTurns = kMaxGroups / kQuarters;
  constexpr int kTurnsAtOnce = !kOneGroup ? 1 : (kIsNarrow ? 2 / kQuarters : kTurns);
  // Products on one sum wait for each other: with few sums, those of even and of odd steps are kept apart.
  constexpr int kChains = kOneGroup && kProducts == Products::kExact && kTokenTiles * kRowTiles < 4 ? 2 : 1;
  // The sums of a small group begin with what is to be taken off them: its products are few, and it costs
  // nothing where no zeros are stored. Those of a large one do not wait for it.
  constexpr bool kBeginsWithOff = kIsBare && !kOneGroup;
  constexpr uint32_t kSymmetric = 1u << (kBits - 1);  // the zero point where none is stored
  const LaneAddresses<kBits> addresses(stage, lane, kOneGroup ? 1 : a.p.groups_per_block);

  // Of the group under way. scale: of row g in the low half, of row g + 8 in the high. zero: bytes likewise.
  // off: kBare: what is to be taken off the sums, in every row; but for its factor where zeros are stored.
  uint32_t scale[kRowTiles], zero[kRowTiles];
  float parts[kIsRounded ? 1 : kChains][kIsRounded ? 1 : kRowTiles][kTokenTiles][4];
  float off[kIsBare ? kTokenTiles : 1][4];

  // own: from the first scale
  const auto begin_group = [&](uint32_t own) {
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
      scale[rt] = load_shared_u32(addresses.scales + own + rt * a.tile_bytes);
      zero[rt] = kSymmetric * 0x101u;
      if constexpr (kHasZeros) zero[rt] = load_shared_u16(addresses.zeros + own / 2 + rt * a.tile_bytes);
    }
    if constexpr (kIsBare) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) off[j][0] = off[j][1] = off[j][2] = off[j][3] = 0.0f;
    }
  };

  const auto too_much = [&](int rt, int c) {
    return c < 2 ? bare_zero<T, kBits, 0>(zero[rt]) : bare_zero<T, kBits, 1>(zero[rt]);
  };

  const auto begin_parts = [&](int rt) {
    if constexpr (!kIsRounded) {
#pragma unroll
      for (int chain = 0; chain < kChains; ++chain) {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            parts[chain][rt][j][c] = 0.0f;
            if constexpr (kBeginsWithOff) {
              parts[chain][rt][j][c] = kHasZeros ? too_much(rt, c) * off[j][c] : off[j][c];
            }
          }
        }
      }
    }
  };

  const auto end_group = [&] {
    if constexpr (!kIsRounded) {
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
        const Pair<T> both = as_pair<T>(scale[rt]);
        const float factor[2] = {to_float(both.x), to_float(both.y)};
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float part = parts[0][rt][j][c];
            if constexpr (kChains == 2) part += parts[1][rt][j][c];
            if constexpr (kIsBare && !kBeginsWithOff) {
              part = kHasZeros ? fmaf(too_much(rt, c), off[j][c], part) : part + off[j][c];
            }
            sums[rt][j][c] = fmaf(part, factor[c / 2], sums[rt][j][c]);
          }
        }
      }
    }
  };

  if constexpr (kOneGroup) {
    begin_group(0);
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) begin_parts(rt);
  }
#pragma unroll(kTurnsAtOnce)
  for (uint32_t turn = 0; turn < kTurns; ++turn) {
    uint32_t words[kRowTiles][kHalfWords<kBits>];
#pragma unroll
    for (int i = 0; i < kQuarters; ++i) {
      const uint32_t quarter = turn * kQuarters + i;
      if constexpr (!kOneGroup) {
        begin_group(quarter * a.p.groups_per_block / kMaxGroups * 4);
      }

      // x, and its sums
      uint32_t b[kTokenTiles][4];
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        load_matrices(b[j], x_addresses[j] + quarter * 64);
      }
      if constexpr (kIsBare) {
        constexpr uint32_t kOff0 =
            minus_bare<T, kBits, 0>(kHasZeros ? 1 : kBareBase<T, kBits, 0> + kSymmetric);
        constexpr uint32_t kOff1 =
            minus_bare<T, kBits, 1>(kHasZeros ? 1 : kBareBase<T, kBits, 1> + kSymmetric);
        const uint32_t factors[4] = {kOff0, kOff1, kOff0, kOff1};
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          mma_m16n8k16<T>(off[j], factors, b[j][0], b[j][1]);
          mma_m16n8k16<T>(off[j], factors, b[j][2], b[j][3]);
        }
      }

      // The weight's part
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
        if (i == 0) addresses.template load_words<kQuarters>(rt * a.tile_bytes, turn, words[rt]);
        if constexpr (!kOneGroup) begin_parts(rt);
        using Offset = ZeroOffset<T, kBits, kShift>;
        const Offset offset[2] = {Offset(zero[rt] & 0xffu, 0), Offset(zero[rt] >> 8, 1)};
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int step = i * 2 + s;
          uint32_t w[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            if constexpr (kIsBare) {
              w[r] = bare_pair<T, kBits>(words[rt], step, r);
            } else if constexpr (!kIsRounded) {
              w[r] = exact_pair<T, kBits, kShift>(words[rt], step, r, offset[r % 2]);
            } else {
              const uint32_t both = permute_bytes(scale[rt], scale[rt], r % 2 == 0 ? 0x1010 : 0x3232);
              w[r] = scaled_pair<T, kBits>(words[rt], step, r, offset[r % 2], both);
            }
          }
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            mma_m16n8k16<T>(kIsRounded ? sums[rt][j] : parts[s % kChains][rt][j], w, b[j][2 * s],
                            b[j][2 * s + 1]);
          }
        }
      }
      if constexpr (!kOneGroup) end_group();
    }
  }
  if constexpr (kOneGroup) end_group();
}

}  // namespace
}  // namespace qsun
