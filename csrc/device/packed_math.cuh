// Arithmetic on two 16-bit floats in one register, and rounding of float32 pairs to them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace qsun {

template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename T>
__device__ __forceinline__ Pair<T> as_pair(uint32_t bits) {
  Pair<T> value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename PairType>
__device__ __forceinline__ uint32_t as_bits(PairType value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// a * b + c in each half, one rounding.
template <typename T>
__device__ __forceinline__ uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
  return as_bits(__hfma2(as_pair<T>(a), as_pair<T>(b), as_pair<T>(c)));
}

template <typename T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
  return as_bits(__hadd2(as_pair<T>(a), as_pair<T>(b)));
}

template <typename T>
constexpr uint32_t kOnePair = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;

// The same where `one` is kOnePair<T>. Before sm_90 pairs of bfloat16 are added as a * one + b, and ptxas
// builds a constant `one` anew for each, in two instructions: a loop takes it from opaque() (registers.cuh).
template <typename T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b, uint32_t one) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return fma_pairs<T>(a, one, b);
#endif
  return add_pairs<T>(a, b);
}

template <typename T>
__device__ __forceinline__ uint32_t mul_pairs(uint32_t a, uint32_t b) {
  return as_bits(__hmul2(as_pair<T>(a), as_pair<T>(b)));
}

// (low, high) rounded to the nearest pair.
template <typename T>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    return as_bits(__floats2half2_rn(low, high));
  } else {
    return as_bits(__floats2bfloat162_rn(low, high));
  }
}

// (word & kMask) | kBits in one instruction. Left to itself the compiler makes two, each with one constant.
template <uint32_t kMask, uint32_t kBits>
__device__ __forceinline__ uint32_t mask_or(uint32_t word) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "n"(kMask), "r"(kBits));
  return result;
}

// (word & kMask) ^ kBits, in the same way.
template <uint32_t kMask, uint32_t kBits>
__device__ __forceinline__ uint32_t mask_xor(uint32_t word) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(word), "n"(kMask), "r"(kBits));
  return result;
}

// Four bytes of the eight in (low, high), chosen by the four nibbles of `selector` (PRMT).
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

}  // namespace qsun
