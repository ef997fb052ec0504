// The copy engine (sm_90 and newer): whole tiles from global to shared memory at one thread's word, which
// count the bytes that have arrived on a barrier in shared memory ("mbarrier").
//
// A barrier has phases. A phase ends when all expected arrivals and all announced bytes have come; waiters
// name the parity (0, 1, 0, ...) of the phase whose end they wait for. Barriers are named by their address in
// shared memory, 8 bytes each.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "device/shared.cuh"

// Whether the code being compiled may use any of this.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define QSUN_HAS_COPY_ENGINE 0
#else
#define QSUN_HAS_COPY_ENGINE 1
#endif

namespace qsun {

// ---- barriers

// Orders this thread's own reads and writes of shared memory before copies of the engine that follow.
__device__ __forceinline__ void order_before_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// A phase takes `arrivals` arrivals.
__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Lets the copy engine see the barriers that this thread initialised.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}

// Arrives, and announces bytes that copies will bring in this phase.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool phase_has_ended(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n.reg .pred ended;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
      "selp.u32 %0, 1, 0, ended;\n}"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ended != 0;
}

__device__ __forceinline__ void wait_for_phase(uint32_t barrier, uint32_t parity) {
  while (!phase_has_ended(barrier, parity)) {
  }
}

// Waits for `threads` threads of the block, whole warps, that call it with the same number (1 to 15).
__device__ __forceinline__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- copies

// `bytes` from `global` to `shared`: both aligned to 16, a multiple of 16.
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

// The same with a cache policy (async_copy.cuh).
__device__ __forceinline__ void copy_bulk_streamed(uint32_t shared, const void* global, int bytes,
                                                   uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box of `map` that begins at (column, row); zeros outside the tensor, counted as bytes like the rest.
__device__ __forceinline__ void copy_box(uint32_t shared, const CUtensorMap* map, int column, int row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

}  // namespace qsun
