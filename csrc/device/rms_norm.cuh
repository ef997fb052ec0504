// Steps of a root-mean-square norm that several kernels share, so that all of them round alike. A row belongs
// to `threads` threads, and thread t to its vectors t, t + threads, ...: squares are added up in the order of
// a thread's vectors, then over the lanes of a warp, then over the warps.
#pragma once

#include "device/dtype.cuh"
#include "device/inverse_root.cuh"
#include "device/vector.cuh"

namespace qsun {

constexpr int kNormVectors = 2;  // of a row that a thread keeps in registers

// `sum` and the squares of a vector.
template <typename T, int kSize>
__device__ __forceinline__ float with_squares(const Vector<T, kSize>& r, float sum) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum = fmaf(to_float(r.data[i]), to_float(r.data[i]), sum);
  return sum;
}

// 1 / sqrt(mean(r^2) + eps) of a row.
__device__ __forceinline__ InverseRoot norm_scale(float squares, int64_t hidden_size, float eps) {
  return InverseRoot(squares / static_cast<float>(hidden_size) + eps);
}

template <typename T, int kSize>
__device__ __forceinline__ void store_scaled(T* out, Vector<T, kSize> r, const Vector<T, kSize>& weight,
                                             const InverseRoot& scale) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    r.data[i] = from_float<T>(scale.times(to_float(r.data[i]), to_float(weight.data[i])));
  }
  store(out, r);
}

}  // namespace qsun
