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

}  // namespace qsun
