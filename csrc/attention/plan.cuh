// What the planning kernels share, and what they and the planned one must agree on: the units of an item.
#pragma once

#include "attention/plan.h"
#include "device/reduce.cuh"

namespace qsun {
namespace {

constexpr int kMaxPlanThreads = 1024;

// Tiles that hold the positions [first, length); tiles begin at multiples of their size.
__device__ __forceinline__ int tiles_of(int first, int length) {
  if (first >= length) return 0;
  return (length - 1) / kTileTokens - first / kTileTokens + 1;
}

// The sum over the threads up to this one; *total is that over the block. Counts in 64 bits: a length may be
// anything.
__device__ __forceinline__ int64_t inclusive_sum(int64_t value, int64_t* total) {
  __shared__ int64_t smem_warp_sums[kMaxPlanThreads / kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += other;
  }
  if (lane == kWarp - 1) smem_warp_sums[warp] = value;
  __syncthreads();
  int64_t before = 0, sum = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    if (w == warp) before = sum;
    sum += smem_warp_sums[w];
  }
  __syncthreads();  // smem_warp_sums may be written again from here on
  *total = sum;
  return before + value;
}

}  // namespace
}  // namespace qsun
