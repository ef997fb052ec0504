// out (M, N) = sum over splits of parts (splits, M, padded N), added in their order: a thread makes eight
// neighbouring outputs of one row. All that depends on no memory is known before the wait.
#include "device/dependent_launch.cuh"
#include "runtime/alignment.h"
#include "runtime/launch.h"
#include "wna16/parts.cuh"
#include "wna16/parts.h"

namespace qsun {
namespace {

constexpr int kThreads = 128;
constexpr int kAtOnce = 6;
constexpr int kBlocksPerSm = 5;

// row_blocks: that share a row of out.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    wna16_add_parts_kernel(const __grid_constant__ Wna16PanelsParams p, int splits, int64_t row_stride,
                           unsigned row_blocks, bool wide) {
  launch_dependents();
  const int64_t m = blockIdx.x / row_blocks;
  const int64_t n = (static_cast<int64_t>(blockIdx.x % row_blocks) * kThreads + threadIdx.x) * kUnit;
  const int64_t columns = p.gate_up ? p.N / 2 : p.N;
  const int count = static_cast<int>(min(columns - n, static_cast<int64_t>(kUnit)));
  const float* parts = static_cast<const float*>(p.scratch) + m * row_stride;
  const int64_t part_stride = p.M * row_stride;
  wait_for_producers();
  if (count <= 0) return;
  write_unit<T>(p, wide, m, n, count, [&](int64_t row, float (&values)[kUnit]) {
    float sums[1][kUnit];
    add_up<kAtOnce>(parts + row, part_stride, splits, 0, 1, sums);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) values[i] = sums[0][i];
  });
}

template <typename T>
cudaError_t launch(const Wna16PanelsParams& p, int splits, bool overlaps_producer) {
  if (p.norm_weight != nullptr) {
    DeviceProps props;
    if (!device_props(p.device, &props).ok()) return cudaErrorInvalidDevice;
    const NormPartsConfig config = choose_norm_parts(p, props);
    if (config.row_threads > 0) return launch_norm_parts<T>(p, splits, overlaps_producer, config);
  }
  const int64_t row_blocks = ceil_div(ceil_div(p.gate_up ? p.N / 2 : p.N, kUnit), kThreads);
  LaunchOptions options;
  options.overlaps_producer = overlaps_producer;
  const bool is_wide = wide({p.out, p.bias, p.residual},
                            {p.out_stride * 2, p.residual != nullptr ? p.residual_stride * 2 : 0});
  return launch_with(options, wna16_add_parts_kernel<T>, dim3(p.M * row_blocks), dim3(kThreads), p.device,
                     p.stream, p, splits, padded_rows(p.N), static_cast<unsigned>(row_blocks), is_wide);
}

}  // namespace

template <>
cudaError_t launch_add_parts<__half>(const Wna16PanelsParams& p, int splits, bool overlaps_producer) {
  return launch<__half>(p, splits, overlaps_producer);
}
template <>
cudaError_t launch_add_parts<__nv_bfloat16>(const Wna16PanelsParams& p, int splits, bool overlaps_producer) {
  return launch<__nv_bfloat16>(p, splits, overlaps_producer);
}

}  // namespace qsun
