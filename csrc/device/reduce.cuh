// Sums over a warp and over a block, always in the same order: results repeat bit for bit.
#pragma once

namespace qsun {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over the warp, in every lane. All 32 lanes take part.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// The sum over the block, in every thread. All threads take part; their number is a multiple of 32.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float smem_warp_sums[kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int num_warps = static_cast<int>(blockDim.x) / kWarp;
  value = warp_sum(value);
  if (num_warps == 1) return value;
  if (lane == 0) smem_warp_sums[warp] = value;
  __syncthreads();
  value = warp_sum(lane < num_warps ? smem_warp_sums[lane] : 0.0f);
  __syncthreads();  // smem_warp_sums may be written again from here on
  return value;
}

}  // namespace qsun
