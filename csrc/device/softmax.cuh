// Softmax over scores that arrive in pieces (Milakov and Gimelshein 2018, "Online normalizer calculation for
// softmax"): a running maximum, the sum of exponentials relative to it, and factors that move sums from one
// maximum to another.
#pragma once

namespace qsun {

// The reference point for exponentials when the maximum is `maximum`: minus infinity (no score yet) would
// make
// (-inf) - (-inf), not a number, of what should be exp(-inf) = 0.
__device__ __forceinline__ float reference_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// log(sum of exp(score)) from a maximum and the sum relative to it; minus infinity for no score.
__device__ __forceinline__ float log_sum(float maximum, float sum) {
  return maximum == -INFINITY && sum == 0.0f ? -INFINITY : maximum + logf(sum);
}

}  // namespace qsun
