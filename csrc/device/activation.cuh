// Activations in float32.
#pragma once

namespace qsun {

// value * sigmoid(value), by the fast exponential and division.
__device__ __forceinline__ float silu(float value) { return __fdividef(value, 1.0f + __expf(-value)); }

}  // namespace qsun
