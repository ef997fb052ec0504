// Where the codes of 32 tokens lie in a warp's slice of shared memory, and which of them a lane (4 g + t)
// makes operands of.
//
// Rows lie as they do in the cache, one after another without padding; only their pieces of 16 bytes change
// places inside a row, so that the loads below meet 32 different banks:
//
//   pieces a row   2              4                    8, 16
//   piece p of     p              p ^ (token & 2)      p ^ 2 (token & 3)
//   a token is at
//
// Keys are operand A: its rows are tokens, and the lanes t = 0..3 of a row share the elements of head_dim out
// by loads of 16 bytes (8, where a row is 32): any order serves that q follows. Values are operand A, too,
// transposed: its rows are elements of head_dim, 8, 16 or 32 consecutive ones a lane, and a pair holds two
// tokens. So every lane reads whole words of single tokens, and head_dim comes out in its own order.
//
// The tokens of a pair are t and 4 + (t ^ 3), of 16 tokens those and the same plus 8: neighbours in a pair
// differ in their lowest bits, as the table needs for keys, and so do the four lanes t, as it needs for
// values. Rows of the scores follow: row 2t + j is token j of pair t.
#pragma once

#include "attention/codes.h"
#include "device/code_pairs.cuh"
#include "device/shared.cuh"

namespace qsun {
namespace {

template <DType kCodes, int kHeadDim>
struct CodesLayout {
  static constexpr int kRow = codes_row_bytes(kCodes, kHeadDim);
  static constexpr int kPieces = kRow / 16;
  static constexpr int kValues = kSliceTokens * kRow;      // offset of the values in a slice
  static constexpr int kScales = 2 * kSliceTokens * kRow;  // of the scales: keys', then values'
  static constexpr int kSlice = codes_slice_bytes(kCodes, kHeadDim);
  static constexpr int kWordElements = kCodesPerWord<kCodes>;
  static_assert(kPieces == 2 || kPieces == 4 || kPieces == 8 || kPieces == 16);
  static_assert(kSlice % 128 == 0);

  // A lane's loads of a token's keys: kKeyLoads of kKeyBytes; load j begins at element (4 j + t) times those
  // of a load.
  static constexpr int kKeyBytes = kRow / 4 < 16 ? kRow / 4 : 16;
  static constexpr int kKeyLoads = kRow / 4 / kKeyBytes;
  static constexpr int kKeyWords = kKeyBytes / 4;
  // And of its values; load j begins at element (8 j + g) times those of a load.
  static constexpr int kValueBytes = kRow / 8 < 16 ? kRow / 8 : 16;
  static constexpr int kValueLoads = kRow / 8 / kValueBytes;
  static constexpr int kValueWords = kValueBytes / 4;
  static constexpr int kValueElements = kValueWords * kWordElements;

  // What a piece's number is changed by.
  static __device__ __forceinline__ int swizzle(int token) {
    return kPieces == 2 ? 0 : kPieces == 4 ? token & 2 : (token & 3) * 2;
  }

  static __device__ __forceinline__ int first_token_of_pair(int t) { return t; }
  static __device__ __forceinline__ int second_token_of_pair(int t) { return 4 + (t ^ 3); }
  static __device__ __forceinline__ int token_of_row(int g) {
    return g % 2 == 0 ? first_token_of_pair(g / 2) : second_token_of_pair(g / 2);
  }

  // This lane's part of a token's keys, of its load 0; see key_load().
  static __device__ __forceinline__ uint32_t key_offset(int token, int t) {
    if constexpr (kKeyBytes < 16) {
      return token * kRow + t * kKeyBytes;
    } else {
      return token * kRow + (t ^ swizzle(token)) * 16;
    }
  }
  // The address of load j: pieces are t + 4 j, and of their numbers only bit 2 is swizzled beside t.
  static __device__ __forceinline__ uint32_t key_load(uint32_t address, int j) {
    return (address ^ (j % 2 * 64)) + j / 2 * 128;
  }
  static __device__ __forceinline__ uint32_t value_offset(int token, int g) {
    if constexpr (kPieces == 2) {
      return token * kRow + g * 4;
    } else if constexpr (kPieces == 4) {
      return token * kRow + (g / 2 ^ swizzle(token)) * 16 + g % 2 * 8;
    } else {
      return token * kRow + (g ^ swizzle(token)) * 16;
    }
  }
  static constexpr int kValueLoad = 128;  // from one load of a token's values to the next
};

// kWords words from shared memory, aligned to their size.
template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&words)[kWords], uint32_t address) {
  if constexpr (kWords == 1) {
    words[0] = load_shared_u32(address);
  } else if constexpr (kWords == 2) {
    const uint2 loaded = load_shared_u64(address);
    words[0] = loaded.x, words[1] = loaded.y;
  } else {
    static_assert(kWords == 4);
    const uint4 loaded = load_shared_u128(address);
    words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
  }
}

}  // namespace
}  // namespace qsun
