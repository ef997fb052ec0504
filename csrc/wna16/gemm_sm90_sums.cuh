// What becomes of the sums of the kernel in gemm_sm90.cuh: out, or parts that a second kernel adds.
#pragma once

#include "device/cluster.cuh"
#include "wna16/gemm_sm90_place.cuh"
#include "wna16/outputs.cuh"

namespace qsun {
namespace {

#if QSUN_HAS_WGMMA

// Whether the kernel has the code that adds sums in a cluster: what it saves is less for fewer tokens.
template <int kTokens>
constexpr bool kAddsInCluster = kTokens >= kFewestClusterTokens;

// The sums as [token][weight row], of warp groups one after another.
template <int kTokens>
__device__ __forceinline__ void stage_sums(const float (&sums)[kTokens / 2], float* staged, int warp,
                                           int lane) {
  float* target = staged + (warp / kGroupWarps * kTokens + lane % 4 * 2) * kStagedRow +
                  warp % kGroupWarps * kTileRows + lane / 4;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    target[0] = sums[4 * j];
    target[kStagedRow] = sums[4 * j + 1];
    target[8] = sums[4 * j + 2];
    target[kStagedRow + 8] = sums[4 * j + 3];
    target += 8 * kStagedRow;
  }
}

// Leaves the sums to the kernel that adds those of all splits.
template <int kTokens>
__device__ __forceinline__ void leave_sums(const GemmArguments& a, const Place& place,
                                           const float (&sums)[kTokens / 2], int warp, int lane) {
  const int row_block = place.row_block + warp / kGroupWarps;
  if (row_block >= a.row_blocks) return;
  const int64_t row =
      static_cast<int64_t>(row_block) * kBlockRows + warp % kGroupWarps * kTileRows + lane / 4;
  float* target = static_cast<float*>(a.p.scratch) +
                  (place.split * a.p.M + place.token + lane % 4 * 2) * a.parts_row + row;
  int tokens = static_cast<int>(min(a.p.M - place.token, static_cast<int64_t>(kTokens))) - lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j, tokens -= 8, target += 8 * a.parts_row) {
    if (tokens > 0) target[0] = sums[4 * j], target[8] = sums[4 * j + 2];
    if (tokens > 1) target[a.parts_row] = sums[4 * j + 1], target[a.parts_row + 8] = sums[4 * j + 3];
  }
}

// Eight neighbouring sums: this block's own, or those of the cluster added in the order of the splits.
constexpr int kAtOnce = 4;  // on their way: one takes as long as four
template <int kTokens>
__device__ __forceinline__ void collect_sums(int cluster, const float* staged, float (&values)[kUnit]) {
  if (!kAddsInCluster<kTokens> || cluster == 1) {
    read_sums(staged, values);
    return;
  }
  const uint32_t own = shared_address(staged);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) values[i] = 0.0f;
#pragma unroll 1
  for (int first = 0; first < cluster; first += kAtOnce) {
    float4 low[kAtOnce], high[kAtOnce];
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      if (first + s < cluster) {
        low[s] = load_floats_from_block(own, first + s);
        high[s] = load_floats_from_block(own + 16, first + s);
      }
    }
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      if (first + s >= cluster) break;
      values[0] += low[s].x, values[1] += low[s].y, values[2] += low[s].z, values[3] += low[s].w;
      values[4] += high[s].x, values[5] += high[s].y, values[6] += high[s].z, values[7] += high[s].w;
    }
  }
}

// Writes this block's tile of out, or its share of the cluster's tile.
template <typename T, int kTokens, int kWarpGroups>
__device__ __forceinline__ void store_tile(const GemmArguments& a, const Place& place, const float* staged,
                                           int thread) {
  // A unit of out takes the sums of 8 weight rows, or of 16 for gate_up.
  const int group_units_log2 = a.p.gate_up ? 2 : 3;
  const int64_t columns = a.p.gate_up ? a.p.N / 2 : a.p.N;
  const int64_t first_row = static_cast<int64_t>(place.row_block) * kBlockRows;
  const int64_t first_column = (static_cast<int64_t>(place.row_block) << group_units_log2) * kUnit;
  const int tokens = static_cast<int>(min(a.p.M - place.token, static_cast<int64_t>(kTokens)));
  constexpr int kThreads = kWarpGroups * kGroupThreads;

  const int first = a.cluster > 1 ? place.split * kThreads + thread : thread;
  for (int u = first; u < (tokens * kWarpGroups) << group_units_log2; u += a.cluster * kThreads) {
    const int group = u >> group_units_log2, token = group / kWarpGroups;
    const int unit = u - ((token * kWarpGroups) << group_units_log2);
    const int64_t n = first_column + unit * kUnit;
    const int count = static_cast<int>(min(columns - n, static_cast<int64_t>(kUnit)));
    if (count <= 0) continue;
    write_unit<T>(a.p, a.wide, static_cast<int64_t>(place.token) + token, n, count,
                  [&](int64_t row, float (&values)[kUnit]) {
                    const int own = static_cast<int>(row - first_row);
                    const int line = own / kBlockRows * kTokens + token;
                    collect_sums<kTokens>(a.cluster, staged + line * kStagedRow + own % kBlockRows, values);
                  });
  }
}

#endif  // QSUN_HAS_WGMMA

}  // namespace
}  // namespace qsun
