// Codes of a low-bit KV cache as pairs of float16, the tensor core's operands: exact, NaN included, and
// without an integer conversion, for which there is a slow pipe only.
//
//   int4         a nibble in the mantissa of 1024 (steps of one) or, four bits further up, of 1024 in steps
//                of 16; one addition or one fused multiply-add takes the base off again
//   int8         byte ^ 0x80 in the mantissa of 1024, and 1024 + 128 off again
//   float8_e4m3  the hardware's conversion of two (sm_89 and newer); before, their bits in place, times 2^8
//
// float16 for both dtypes of q: it holds every code of 8 bits (bfloat16 has 8 bits of significand, but none
// to spare for the base), and a pair of e4m3 numbers is one instruction.
#pragma once

#include <cstdint>

#include "device/packed_math.cuh"
#include "qsun/types.h"

namespace qsun {

template <DType kCodes>
constexpr int kCodesPerWord = kCodes == DType::kInt4 ? 8 : 4;

// Of which element of its word each half of pair `r` of pairs_of_word() is.
template <DType kCodes>
__host__ __device__ constexpr int element_of_pair(int r, int half) {
  return kCodes == DType::kInt4 ? r + 4 * half : kCodes == DType::kInt8 ? r + 2 * half : 2 * r + half;
}

// The nibbles at bits 4r of both halves, less 8.
__device__ __forceinline__ void nibble_pairs(uint32_t word, uint32_t* pairs) {
  constexpr uint32_t kMagic = 0x64006400;      // 1024
  constexpr uint32_t kBase = 0xe408e408;       // -1024 - 8
  constexpr uint32_t kSixteenth = 0x2c002c00;  // 1 / 16
  constexpr uint32_t kHighBase = 0xd480d480;   // -1024 / 16 - 8
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t shifted = word >> (8 * i);
    pairs[2 * i] = add_pairs<__half>(mask_or<0x000f000fu, kMagic>(shifted), kBase);
    pairs[2 * i + 1] = fma_pairs<__half>(mask_or<0x00f000f0u, kMagic>(shifted), kSixteenth, kHighBase);
  }
}

// The bytes at bits 8r of both halves, which are signed.
__device__ __forceinline__ void byte_pairs(uint32_t word, uint32_t* pairs) {
  constexpr uint32_t kMagic = 0x64806480;  // 1024, and the byte's sign bit turned over
  constexpr uint32_t kBase = 0xe480e480;   // -1024 - 128
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pairs[i] = add_pairs<__half>(mask_xor<0x00ff00ffu, kMagic>(word >> (8 * i)), kBase);
  }
}

// The four e4m3 numbers in `word`.
__device__ __forceinline__ void e4m3_pairs(uint32_t word, uint32_t* pairs) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("{\n\t"
      ".reg .b16 low, high;\n\t"
      "mov.b32 {low, high}, %2;\n\t"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n\t"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n\t"
      "}"
      : "=r"(pairs[0]), "=r"(pairs[1])
      : "r"(word));
#else
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    // A number in the upper byte of each half
    const uint32_t spread = permute_bytes(word, 0, i == 0 ? 0x1404 : 0x3424);
    const uint32_t magnitude = (spread & 0x7f007f00u) >> 1;  // bits in place; the exponent is 8 too small
    // Of all codes NaN alone, seven ones, carries into bit 14: with it the exponent is all ones, too.
    const uint32_t nan = (magnitude + 0x00800080u) & 0x40004000u;
    pairs[i] = mul_pairs<__half>((spread & 0x80008000u) | magnitude | nan, 0x5c005c00u);
  }
#endif
}

// The codes of one word: pair r holds elements element_of_pair(r, 0) and (r, 1).
template <DType kCodes>
__device__ __forceinline__ void pairs_of_word(uint32_t word, uint32_t (&pairs)[kCodesPerWord<kCodes> / 2]) {
  if constexpr (kCodes == DType::kInt4) {
    nibble_pairs(word, pairs);
  } else if constexpr (kCodes == DType::kInt8) {
    byte_pairs(word, pairs);
  } else {
    static_assert(kCodes == DType::kFloat8E4M3);
    e4m3_pairs(word, pairs);
  }
}

// The codes of two words: pair n holds element n of both, that of `first` low.
template <DType kCodes>
__device__ __forceinline__ void pairs_of_words(uint32_t first, uint32_t second,
                                               uint32_t (&pairs)[kCodesPerWord<kCodes>]) {
  if constexpr (kCodes == DType::kFloat8E4M3) {
    e4m3_pairs(permute_bytes(first, second, 0x5140), pairs);
    e4m3_pairs(permute_bytes(first, second, 0x7362), pairs + 2);
  } else {
    const uint32_t low = permute_bytes(first, second, 0x5410);
    const uint32_t high = permute_bytes(first, second, 0x7632);
    if constexpr (kCodes == DType::kInt4) {
      nibble_pairs(low, pairs);
      nibble_pairs(high, pairs + 4);
    } else {
      byte_pairs(low, pairs);
      byte_pairs(high, pairs + 2);
    }
  }
}

}  // namespace qsun
