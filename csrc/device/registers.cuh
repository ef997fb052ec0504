// Values that are to stay in registers.
#pragma once

#include <cstdint>

namespace qsun {

// Makes the compiler forget where a value comes from: left to itself it computes an address anew in every
// turn of a loop, from the thread's index on, rather than keep it.
__device__ __forceinline__ void keep(int32_t& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void keep(int64_t& value) { asm volatile("" : "+l"(value)); }
template <typename T>
__device__ __forceinline__ void keep(T*& value) {
  asm volatile("" : "+l"(value));
}

// The value, by a way that neither compiler sees through: what it is made of is not made anew at every use.
// For whole warps.
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
  return __shfl_sync(0xffffffffu, threadIdx.x % 32 == 0 ? value : 0, 0);
}

}  // namespace qsun
