// A pair of a rotary position embedding, turned. Spelled out as fused multiply-adds, so that every kernel
// that turns pairs gives the same bits.
#pragma once

namespace qsun {

// (a, b) becomes (a * cosine - b * sine, b * cosine + a * sine).
__device__ __forceinline__ void turn_pair(float& a, float& b, float cosine, float sine) {
  const float first = fmaf(a, cosine, -(b * sine));
  b = fmaf(b, cosine, a * sine);
  a = first;
}

}  // namespace qsun
