// Stands in for the CUDA runtime so that the sources in csrc, unchanged, compile with a C++ compiler and
// their kernels run on the CPU: one block after another, every CUDA thread a fiber that runs until it must
// wait for others.
//
// What it shows that a GPU would: wrong indices, missing barriers (the order of fibers is a setting), lanes
// that miss a shuffle, shared memory read before it is written (it is filled with NaN before every block).
// What it cannot show: races between warps inside one stretch without barriers, alignment faults, anything
// about speed.
#pragma once

// The toolkit's own types, before its keywords lose their meaning. No function of it is called: what csrc
// uses is defined in emulator.cpp.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

// ---- language

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("qsun_shared")))

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

void barrier();  // waits for every thread of the block
void exchange(const void* mine, void* theirs, unsigned size, unsigned mask,
              int partner);  // between lanes of a warp
[[noreturn]] void trap();
void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel);

}  // namespace emulator

inline void __syncthreads() { emulator::barrier(); }
inline void __trap() { emulator::trap(); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  T other;
  emulator::exchange(&value, &other, sizeof(T), mask, static_cast<int>(threadIdx.x % 32) ^ lane_mask);
  return other;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

using std::isfinite;
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return launch(*config, [&] { kernel(static_cast<Parameters>(arguments)...); });
}
