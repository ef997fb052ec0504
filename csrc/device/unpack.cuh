// Codes out of the canonical bit stream: code k of a row occupies its bits [k * bits, (k + 1) * bits),
// counted from the low bit of the row's first 32-bit word. 32 codes are `bits` whole words; 3-bit codes cross
// words inside that.
#pragma once

#include <cstdint>

namespace qsun {

constexpr int kChunk = 32;  // codes, so that a chunk begins and ends at a word

// Code `index` of a chunk. After unrolling `index` is a constant, so every shift and word number is one too:
// a run-time index would put `words` into local memory.
template <int kBits>
__host__ __device__ __forceinline__ uint32_t code_of_chunk(const uint32_t (&words)[kBits], int index) {
  const int word = index * kBits / 32;
  const int shift = index * kBits % 32;
  uint32_t code = words[word] >> shift;
  if (shift + kBits > 32) code |= words[word + 1] << (32 - shift);
  return code & ((1u << kBits) - 1u);
}

constexpr float kTwoTo23 = 8388608.0f;

// code - zero as a float, exactly. A float32 in [2^23, 2^24) has steps of one, so writing the code into its
// mantissa makes 2^23 + code without a conversion; `offset` is 2^23 + zero.
__device__ __forceinline__ float centred(uint32_t code, float offset) {
  return __uint_as_float(0x4b000000u | code) - offset;
}

}  // namespace qsun
