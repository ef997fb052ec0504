// Copies from global to shared memory that run while the thread goes on (cp.async). Copies are put into
// groups; groups finish in order.
#pragma once

#include <cstdint>

#include "device/shared.cuh"

namespace qsun {

// A cache policy for bytes that a launch reads once, such as weights and the KV: they leave the L2 first and
// do not push out what is read again.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  return policy;
}

// Copies 16 bytes, both addresses (shared: see shared_address) aligned to 16, past the L1. Streams are read
// on: the L2 is asked for 256 bytes at once, which brings them from memory in longer bursts.
__device__ __forceinline__ void copy_async_streamed(uint32_t shared, const void* global, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2;" ::"r"(shared),
               "l"(global), "l"(policy)
               : "memory");
}

// The same for the first `bytes` (0 to 16); fills the rest with zeros and reads nothing past `bytes`.
__device__ __forceinline__ void copy_async_streamed_or_zero(uint32_t shared, const void* global, int bytes,
                                                            uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2, %3;" ::"r"(shared),
               "l"(global), "r"(bytes), "l"(policy)
               : "memory");
}

// Brings the 32 bytes around an address to the L2, for a load that comes later; nobody waits for it.
constexpr int kSectorBytes = 32;
__device__ __forceinline__ void prefetch_to_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Copies 16 bytes, likewise aligned, past the L1.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// Copies the first `bytes` (0 to 16) of 16 bytes and fills the rest with zeros; reads nothing past `bytes`.
__device__ __forceinline__ void copy_async_or_zero(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

// Closes the group of this thread's copies since the last call.
__device__ __forceinline__ void commit_async_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wait_async_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace qsun
