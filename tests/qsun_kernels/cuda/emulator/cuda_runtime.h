// Stands in for the CUDA runtime so that the sources in csrc, unchanged, compile with a C++ compiler and
// their kernels run on the CPU: one cluster of blocks after another, every CUDA thread a fiber that runs
// until it must wait for others. Headers of csrc/device that hold PTX have a stand-in of the same name in
// device/, which comes first on the include path.
//
// What it shows that a GPU would: wrong indices, missing barriers (the order of fibers is a setting), lanes
// that miss a shuffle or a tensor-core instruction, shared memory read before it is written (it is filled
// with NaN before every block) or past its end, asynchronous and bulk copies read before they were waited for
// (they happen as late as they may), barriers whose arrivals or bytes do not match, a block that ends while
// others of its cluster read its memory. What it cannot show: races between warps inside one stretch without
// barriers, a missing fence between ordinary writes and a bulk copy to the same place, the tensor core's
// rounding of sums (here: once), anything about speed.
#pragma once

// The toolkit's own types, before its keywords lose their meaning. No function of it is called: what csrc
// uses is defined in this folder.
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
#undef __grid_constant__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("qsun_shared")))
#define __grid_constant__
#define __noinline__

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- what kernels call, by the names of the machine

namespace emulator {

// Ends the launch with an error. The others are called by all lanes of a warp, or it is an error.
[[noreturn]] void fail(const char* message);
void barrier();          // waits for every thread of the block
void cluster_barrier();  // waits for every thread of the cluster
void warp_barrier(unsigned mask);
void exchange(const void* mine, void* theirs, unsigned size, unsigned mask, int partner);  // a shuffle

unsigned char* dynamic_shared();
uint32_t shared_address(const void* shared);
// What lies at an address of the block's shared memory: `bytes`, by which the address must be divisible.
unsigned char* at_address(uint32_t address, int bytes);
// The same place in block `rank` of the cluster.
const unsigned char* in_block(uint32_t address, int bytes, int rank);
unsigned char* in_block_to_write(uint32_t address, int bytes, int rank);

// Asynchronous copies of the thread: 16 bytes, of which the last 16 - bytes become zero.
void copy_async(uint32_t shared, const void* global, int bytes);
void commit_async_copies();
void wait_async_copies(int pending);

// Barriers in shared memory, by address, and copies that count their bytes on one.
void init_barrier(uint32_t barrier, int arrivals);
void publish_barriers();
void arrive(uint32_t barrier, int bytes);
void wait_for_phase(uint32_t barrier, uint32_t parity);
void copy_bulk(uint32_t shared, const void* global, int bytes, uint32_t barrier);

enum class Format { kFloat16, kBFloat16 };
void load_matrices(uint32_t (&r)[4], uint32_t row_address);
void load_matrices_transposed(uint32_t (&r)[4], uint32_t row_address);
void multiply(Format format, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

void launch_dependents();
void wait_for_producers();

}  // namespace emulator

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_barrier(mask); }
[[noreturn]] inline void __trap() { emulator::fail("trap"); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  T other;
  emulator::exchange(&value, &other, sizeof(T), mask, lane & 31);
  return other;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ lane_mask);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane < distance ? lane : lane - distance);
}

// Fibers change places only where they wait: an ordinary addition is atomic.
inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address = before + value;
  return before;
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address = before + value;
  return before;
}
inline unsigned atomicMax(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address = before < value ? value : before;
  return before;
}
inline void __threadfence() {}

template <typename T>
T __ldcg(const T* address) {
  return *address;
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

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// A nibble of the selector: which of the 8 bytes, low's first; with its bit 3, that byte's sign eight times.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i) & 15u;
    const unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7u))) & 0xffu;
    result |= (nibble & 8u ? (byte & 0x80u ? 0xffu : 0u) : byte) << (8 * i);
  }
  return result;
}

// Fast division gives up on large divisors (CUDA C++ Programming Guide, "Intrinsic functions").
inline float __fdividef(float x, float y) {
  const bool large = std::fabs(y) > 0x1p126f && std::isfinite(y);
  return large ? x * 0.0f : x / y;
}
// Never fused with a neighbour; the compiler here has no fused instruction to use.
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }

using std::isfinite;
using std::isinf;
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

// ---- what the host calls

namespace emulator {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& call);

}  // namespace emulator

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return emulator::launch(*config, reinterpret_cast<const void*>(kernel),
                          [&] { kernel(static_cast<Parameters>(arguments)...); });
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
