// Blocks of one cluster (sm_90 and newer) and their view of one another's shared memory. Below sm_90 a
// cluster is one block.
#pragma once

#include <cstdint>

#include "device/shared.cuh"

namespace qsun {

// Waits for every thread of the cluster; shared memory written before it can be read after it.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Waits for every thread of the cluster, but passes nothing on: ordering writes takes a fence of the whole
// device.
__device__ __forceinline__ void meet_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The word that block `rank` of the cluster has at the shared address `shared` of this one.
__device__ __forceinline__ uint32_t load_from_block(uint32_t shared, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t address;
  uint32_t value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
#else
  return load_shared_u32(shared);
#endif
}

// Writes a word to block `rank`, at the shared address `shared` of that block. A cluster_barrier() before
// says that the block is there, and one after that it can read the word.
__device__ __forceinline__ void store_to_block(uint32_t shared, int rank, uint32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
#else
  store_shared_u32(shared, value);
#endif
}

// Four neighbouring floats, at an address that divides by 16.
__device__ __forceinline__ float4 load_floats_from_block(uint32_t shared, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t address;
  float4 value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
#else
  return make_float4(__uint_as_float(load_shared_u32(shared)), __uint_as_float(load_shared_u32(shared + 4)),
                     __uint_as_float(load_shared_u32(shared + 8)),
                     __uint_as_float(load_shared_u32(shared + 12)));
#endif
}

}  // namespace qsun
