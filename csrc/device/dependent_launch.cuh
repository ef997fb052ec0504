// Programmatic dependent launch (sm_90 and newer): a kernel may start while the one before it in the stream
// still runs. Below sm_90, and when a kernel was launched without the attribute, both calls do nothing.
#pragma once

namespace qsun {

// Whether launches can overlap where this code runs: what is done before wait_for_producers() is left out of
// kernels where it gains nothing.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kLaunchesOverlap = true;
#else
constexpr bool kLaunchesOverlap = false;
#endif

// Allows the next kernel to start once every block of this grid has called it (or ended).
__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernels that this one depends on have ended and their writes can be seen.
__device__ __forceinline__ void wait_for_producers() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace qsun
