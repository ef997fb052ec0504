// The Walsh-Hadamard transform of vectors that a few lanes of a warp hold together.
#pragma once

#include "device/reduce.cuh"

namespace qsun {

// The first rounds on kSize neighbours of one lane: pairs (a, b) become (a + b, a - b), neighbours first.
template <int kSize>
__device__ __forceinline__ void butterflies(float (&values)[kSize]) {
#pragma unroll
  for (int distance = 1; distance < kSize; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if ((i & distance) != 0) continue;
      const float a = values[i], b = values[i + distance];
      values[i] = a + b;
      values[i + distance] = a - b;
    }
  }
}

// A round with the lane whose number differs in the bit `distance`: element by element. All 32 lanes take
// part.
template <int kSize>
__device__ __forceinline__ void butterflies_across(float (&values)[kSize], int distance, bool is_second) {
  const float sign = is_second ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    values[i] = fmaf(values[i], sign, __shfl_xor_sync(kAllLanes, values[i], distance));
  }
}

}  // namespace qsun
