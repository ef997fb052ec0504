// Reading the sums that splits left.
#pragma once

#include "wna16/outputs.cuh"

namespace qsun {
namespace {

// values[v] = eight neighbouring sums from `parts + v * distance` on, for v < count, of all splits added in
// their order. kAtOnce parts are on their way at a time: that many take as long as one.
template <int kAtOnce, int kUnits>
__device__ __forceinline__ void add_up(const float* parts, int64_t part_stride, int splits, int64_t distance,
                                       int count, float (&values)[kUnits][kUnit]) {
#pragma unroll
  for (int v = 0; v < kUnits; ++v) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) values[v][i] = 0.0f;
  }
#pragma unroll 1
  for (int first = 0; first < splits; first += kAtOnce, parts += kAtOnce * part_stride) {
    float some[kAtOnce][kUnits][kUnit];
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      if (first + s >= splits) break;
#pragma unroll
      for (int v = 0; v < kUnits; ++v) {
        if (v < count) read_sums(parts + s * part_stride + v * distance, some[s][v]);
      }
    }
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      if (first + s >= splits) break;
#pragma unroll
      for (int v = 0; v < kUnits; ++v) {
        if (v >= count) continue;
#pragma unroll
        for (int i = 0; i < kUnit; ++i) values[v][i] += some[s][v][i];
      }
    }
  }
}

}  // namespace
}  // namespace qsun
