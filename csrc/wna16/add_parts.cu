// out (M, N) = sum over splits of parts (splits, M, padded N), added in their order: a thread makes eight
// neighbouring outputs. Four parts are on their way at a time: one takes as long as four.
#include "device/dependent_launch.cuh"
#include "runtime/alignment.h"
#include "runtime/launch.h"
#include "wna16/outputs.cuh"
#include "wna16/parts.h"

namespace qsun {
namespace {

constexpr int kThreads = 128;
constexpr int kAtOnce = 4;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    wna16_add_parts_kernel(const __grid_constant__ Wna16PanelsParams p, int splits, int64_t row_stride,
                           int units, bool wide) {
  launch_dependents();
  wait_for_producers();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.M * units) return;
  const int64_t m = index / units, n = index % units * kUnit;
  const int64_t columns = p.gate_up ? p.N / 2 : p.N;
  const int count = static_cast<int>(min(columns - n, static_cast<int64_t>(kUnit)));
  const float* parts = static_cast<const float*>(p.scratch) + m * row_stride;
  const int64_t part_stride = p.M * row_stride;
  write_unit<T>(p, wide, m, n, count, [&](int64_t row, float (&values)[kUnit]) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) values[i] = 0.0f;
#pragma unroll 1
    for (int first = 0; first < splits; first += kAtOnce) {
      float some[kAtOnce][kUnit];
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) {
        if (first + s < splits) read_sums(parts + (first + s) * part_stride + row, some[s]);
      }
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) {
        if (first + s >= splits) break;
#pragma unroll
        for (int i = 0; i < kUnit; ++i) values[i] += some[s][i];
      }
    }
  });
}

template <typename T>
cudaError_t launch(const Wna16PanelsParams& p, int splits) {
  const int64_t units = ceil_div(p.gate_up ? p.N / 2 : p.N, kUnit);
  LaunchOptions options;
  options.overlaps_producer = true;
  const bool is_wide = wide({p.out, p.bias, p.residual},
                            {p.out_stride * 2, p.residual != nullptr ? p.residual_stride * 2 : 0});
  return launch_with(options, wna16_add_parts_kernel<T>, dim3(ceil_div(p.M * units, kThreads)),
                     dim3(kThreads), p.device, p.stream, p, splits, padded_rows(p.N), static_cast<int>(units),
                     is_wide);
}

}  // namespace

template <>
cudaError_t launch_add_parts<__half>(const Wna16PanelsParams& p, int splits) {
  return launch<__half>(p, splits);
}
template <>
cudaError_t launch_add_parts<__nv_bfloat16>(const Wna16PanelsParams& p, int splits) {
  return launch<__nv_bfloat16>(p, splits);
}

}  // namespace qsun
