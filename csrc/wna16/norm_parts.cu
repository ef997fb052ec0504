// out (M, N) = sum over splits of parts (splits, M, padded N), with bias and residual, and the norm of every
// row of out, in one launch: the row stays in registers between the two.
//
//   row of out     | block 0 of the cluster | block 1                | ..
//   parts 0        | v0 v1 v2 ..            |                        |      a thread reads its vectors of all
//   parts 1        | v0 v1 v2 ..            |                        |      parts before it adds the first
//   ..
//   warps' sums of squares  ->  shared memory of every block of the cluster
//
// A row's parts lie in the L2 and are many times its outputs, and few rows would leave most multiprocessors
// idle while each takes its bytes through one of them: so a cluster of blocks has a row, as long as there are
// multiprocessors. Which thread of the row has which vector, and the order of the squares, are those of
// rms_norm.cu whatever the cluster: its bits come out.
//
// Sums of squares are sent, not fetched: the barrier that lets them be read is the last thing the blocks have
// in common, and none has to stay for another. What they are sent to has to be there: hence the first
// barrier, which costs nothing where the blocks wait for the parts anyway.
#include <algorithm>

#include "device/cluster.cuh"
#include "device/dependent_launch.cuh"
#include "device/reduce.cuh"
#include "device/rms_norm.cuh"
#include "runtime/alignment.h"
#include "runtime/launch.h"
#include "runtime/text.h"
#include "wna16/parts.cuh"
#include "wna16/parts.h"

namespace qsun {

std::string to_string(const NormPartsConfig& c) {
  return Fields().add("row_threads", c.row_threads).add("blocks", c.blocks).str();
}

namespace {

constexpr int kMaxThreads = 256;  // of a block: its registers are the parts on their way
constexpr int kMaxBlocks = 4;     // of a cluster
constexpr int kAtOnce = 6;

}  // namespace

NormPartsConfig choose_norm_parts(const Wna16PanelsParams& p, const DeviceProps& props) {
  const RmsNormConfig norm = choose(norm_of(p), props);
  const bool is_wide =
      norm.width == kUnit && wide({p.bias, p.residual}, {p.residual != nullptr ? p.residual_stride * 2 : 0});
  if (!is_wide || p.N > int64_t{kNormVectors} * kUnit * norm.threads) return {};
  const int warps = norm.threads / kWarp;
  const int most_blocks = props.compute_major >= 9 ? kMaxBlocks : 1;  // clusters are of sm_90
  NormPartsConfig config;
  config.row_threads = norm.threads;
  const auto is_too_wide = [&] { return norm.threads / config.blocks > kMaxThreads; };
  while (config.blocks < most_blocks && warps % (2 * config.blocks) == 0 &&
         (is_too_wide() || 2 * config.blocks * p.M <= props.sm_count)) {
    config.blocks *= 2;
  }
  return is_too_wide() ? NormPartsConfig() : config;
}

namespace {

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    wna16_norm_parts_kernel(const __grid_constant__ Wna16PanelsParams p, int splits, int64_t row_stride,
                            int blocks) {
  launch_dependents();

  // Place
  const int rank = static_cast<int>(blockIdx.x) % blocks;
  const int64_t m = static_cast<int>(blockIdx.x) / blocks;
  const int thread = rank * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);  // of the row
  const int row_threads = blocks * static_cast<int>(blockDim.x);
  const int lane = thread % kWarp;
  const uint32_t sums_of_warps = shared_address(dynamic_shared());
  const int64_t first = int64_t{thread} * kUnit, step = int64_t{row_threads} * kUnit;
  int count = 0;  // vectors of this thread
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) count += first + v * step < p.N ? 1 : 0;
  cluster_barrier();
  if (!p.prefetch_weights) wait_for_producers();
  Vector<T, kUnit> weights[kNormVectors], residual[kNormVectors], held[kNormVectors];
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    if (v < count) weights[v] = load<kUnit>(static_cast<const T*>(p.norm_weight) + first + v * step);
  }
  if (p.prefetch_weights) wait_for_producers();

  // The row: as write_unit() makes it
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    if (v >= count || p.residual == nullptr) continue;
    residual[v] = load<kUnit>(static_cast<const T*>(p.residual) + m * p.residual_stride + first + v * step);
  }
  float values[kNormVectors][kUnit];
  add_up<kAtOnce>(static_cast<const float*>(p.scratch) + m * row_stride + first, p.M * row_stride, splits,
                  step, count, values);
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    if (v >= count) continue;
    if (p.bias != nullptr) {
      add_elements(static_cast<const T*>(p.bias) + first + v * step, kUnit, true, values[v]);
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (p.residual != nullptr) values[v][i] += to_float(residual[v].data[i]);
      held[v].data[i] = from_float<T>(values[v][i]);
    }
    store(static_cast<T*>(p.out) + m * p.out_stride + first + v * step, held[v]);
    squares = with_squares(held[v], squares);
  }

  // Squares of the row: as block_sum() adds them
  const int num_warps = row_threads / kWarp;
  squares = warp_sum(squares);
  if (lane < blocks) {
    store_to_block(sums_of_warps + thread / kWarp * 4, lane, __float_as_uint(squares));
  }
  cluster_barrier();
  squares = warp_sum(lane < num_warps ? load_shared_f32(sums_of_warps + lane * 4) : 0.0f);

  // Norm
  const InverseRoot scale = norm_scale(squares, p.N, p.norm_eps);
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    if (v >= count) continue;
    store_scaled(static_cast<T*>(p.norm_out) + m * p.N + first + v * step, held[v], weights[v], scale);
  }
}

template <typename T>
cudaError_t launch(const Wna16PanelsParams& p, int splits, bool overlaps_producer,
                   const NormPartsConfig& config) {
  LaunchOptions options;
  options.shared_bytes = kWarp * static_cast<int>(sizeof(float));
  options.cluster = dim3(config.blocks, 1, 1);
  options.overlaps_producer = overlaps_producer;
  return launch_with(options, wna16_norm_parts_kernel<T>, dim3(p.M * config.blocks),
                     dim3(config.row_threads / config.blocks), p.device, p.stream, p, splits,
                     padded_rows(p.N), config.blocks);
}

}  // namespace

template <>
cudaError_t launch_norm_parts<__half>(const Wna16PanelsParams& p, int splits, bool overlaps_producer,
                                      const NormPartsConfig& config) {
  return launch<__half>(p, splits, overlaps_producer, config);
}
template <>
cudaError_t launch_norm_parts<__nv_bfloat16>(const Wna16PanelsParams& p, int splits, bool overlaps_producer,
                                             const NormPartsConfig& config) {
  return launch<__nv_bfloat16>(p, splits, overlaps_producer, config);
}

}  // namespace qsun
