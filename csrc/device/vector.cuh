// Vectors of elements in registers, moved by the widest loads and stores that their alignment allows.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device/dtype.cuh"

namespace qsun {

constexpr int kLoadBytes = 16;  // the widest load of one thread

// Elements of T in a 16-byte load.
template <typename T>
constexpr int kWidth = kLoadBytes / static_cast<int>(sizeof(T));

// kSize consecutive elements. Their size in bytes is that of one element, or a multiple of 16.
template <typename T, int kSize>
struct Vector {
  static constexpr int kBytes = kSize * static_cast<int>(sizeof(T));
  static_assert(kSize == 1 || kBytes % kLoadBytes == 0);
  T data[kSize];
};

// Reads a vector at `source`, aligned to 16 bytes, or to one element when kSize is 1.
template <int kSize, typename T>
__device__ __forceinline__ Vector<T, kSize> load(const T* source) {
  Vector<T, kSize> result;
  if constexpr (kSize == 1) {
    result.data[0] = *source;
  } else {
    uint4 words[Vector<T, kSize>::kBytes / kLoadBytes];
#pragma unroll
    for (int i = 0; i < Vector<T, kSize>::kBytes / kLoadBytes; ++i) {
      words[i] = reinterpret_cast<const uint4*>(source)[i];
    }
    memcpy(result.data, words, sizeof(words));
  }
  return result;
}

// One element through the read-only path: nothing may write the memory while the kernel runs.
//
// Kernels use this and never __ldg itself. For the 16-bit floats cuda_fp16.h and cuda_bf16.h write __ldg as
// inline assembly without `volatile`, which the compiler takes for arithmetic: it moves the load in front of
// the bounds check that guards it (seen with nvcc 13.0). The integer intrinsic stays where it is put.
template <typename T>
__device__ __forceinline__ T load_element(const T* source) {
  if constexpr (std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>) {
    const unsigned short bits = __ldg(reinterpret_cast<const unsigned short*>(source));
    T value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  } else {
    return __ldg(source);
  }
}

// A vector through the read-only path, aligned as for load.
template <int kSize, typename T>
__device__ __forceinline__ Vector<T, kSize> load_readonly(const T* source) {
  Vector<T, kSize> result;
  if constexpr (kSize == 1) {
    result.data[0] = load_element(source);
  } else {
    uint4 words[Vector<T, kSize>::kBytes / kLoadBytes];
#pragma unroll
    for (int i = 0; i < Vector<T, kSize>::kBytes / kLoadBytes; ++i) {
      words[i] = __ldg(reinterpret_cast<const uint4*>(source) + i);
    }
    memcpy(result.data, words, sizeof(words));
  }
  return result;
}

// One element past the L1, which does not see what other blocks write while the kernel runs.
template <typename T>
__device__ __forceinline__ T load_past_l1(const T* source) {
  return __ldcg(source);
}

// Writes a vector at `target`, aligned as for load.
template <typename T, int kSize>
__device__ __forceinline__ void store(T* target, const Vector<T, kSize>& value) {
  if constexpr (kSize == 1) {
    *target = value.data[0];
  } else {
    uint4 words[Vector<T, kSize>::kBytes / kLoadBytes];
    memcpy(words, value.data, sizeof(words));
#pragma unroll
    for (int i = 0; i < Vector<T, kSize>::kBytes / kLoadBytes; ++i) {
      reinterpret_cast<uint4*>(target)[i] = words[i];
    }
  }
}

}  // namespace qsun
