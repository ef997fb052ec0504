// 1 / sqrt(value) to more than float32, for norms whose results are rounded only once.
#pragma once

namespace qsun {

// 1 / sqrt(value) as a sum of two floats. In one float it would be off by up to half a unit in its last
// place, the same way for the whole row, and float32 results with it.
struct InverseRoot {
  float high;
  float low;

  __device__ __forceinline__ explicit InverseRoot(float value) : high(1.0f / sqrtf(value)) {
    // A Newton step on what is left: 1 - value * high^2, with the rounding of the square put back.
    const float square = high * high;
    const float left = fmaf(-value, square, 1.0f) - value * fmaf(high, high, -square);
    low = isfinite(left) ? 0.5f * high * left : 0.0f;
  }

  // a / sqrt(value) * b, rounded about once. In this order, because a * b can overflow where the result does
  // not.
  __device__ __forceinline__ float times(float a, float b) const {
    const float normed = a * high;
    const float lost = fmaf(a, high, -normed) + a * low;
    return fmaf(normed, b, lost * b);
  }
};

}  // namespace qsun
