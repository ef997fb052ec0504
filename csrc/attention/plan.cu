// Cuts the work of a batch into equal parts (the plan of plan.h), in one block: adds up the requests' units,
// then finds for every part the request in which it begins.
#include "attention/plan.cuh"

#include <algorithm>

#include "device/dependent_launch.cuh"
#include "device/reduce.cuh"
#include "device/shared.cuh"
#include "device/trap.cuh"
#include "runtime/launch.h"

namespace qsun {
namespace {

constexpr int kMaxThreads = 1024;

struct PlanArguments {
  const int32_t* seq_lens;  // (batch,)
  PlanPointers plan;
  int batch;
  int num_kv_heads;
  int reach;
  int parts;
  int min_part_units;
};

// The sum over the threads up to this one; *total is that over the block. Counts in 64 bits: a length may be
// anything.
__device__ __forceinline__ int64_t inclusive_sum(int64_t value, int64_t* total) {
  __shared__ int64_t smem_warp_sums[kMaxThreads / kWarp];
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

__global__ void __launch_bounds__(kMaxThreads) paged_attention_plan_kernel(PlanArguments a) {
  launch_dependents();
  wait_for_producers();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int* smem_starts = reinterpret_cast<int*>(dynamic_shared());  // (batch,) first units of the requests

  // Units of one head
  int64_t head_units = 0;
  for (int base = 0; base < a.batch; base += threads) {
    const int request = base + thread;
    int units = 0;
    if (request < a.batch) {
      const int length = max(a.seq_lens[request], 0);
      a.plan.lengths[request] = length;
      units = 1 + tiles_of(length, a.reach);
    }
    int64_t total = 0;
    const int64_t start = head_units + inclusive_sum(units, &total) - units;
    head_units += total;
    trap_unless(head_units * a.num_kv_heads <= kMaxUnits);
    if (request < a.batch) smem_starts[request] = static_cast<int>(start);
  }
  for (int i = thread; i < a.batch * a.num_kv_heads; i += threads) a.plan.counters[i] = 0;
  __syncthreads();

  // Parts
  const int total = static_cast<int>(head_units) * a.num_kv_heads;
  const int share = max((total + a.parts - 1) / a.parts, a.min_part_units);
  const int used = (total + share - 1) / share;
  if (thread == 0) *a.plan.header = {total, share, used, 0};
  for (int part = thread; part < used; part += threads) {
    const int begin = part * share;
    const int head = begin / static_cast<int>(head_units);
    const int unit = begin - head * static_cast<int>(head_units);
    int request = 0;
    for (int end = a.batch; end - request > 1;) {
      const int middle = (request + end) / 2;
      if (smem_starts[middle] <= unit) {
        request = middle;
      } else {
        end = middle;
      }
    }
    const int start = begin - unit + smem_starts[request];
    a.plan.parts[part] = {request, head, start, max(a.seq_lens[request], 0)};
  }
}

}  // namespace

cudaError_t launch_plan_paged_attention(const PagedAttentionDecodeParams& p,
                                        const PagedAttentionDecodeConfig& config) {
  PlanArguments a{};
  a.seq_lens = p.seq_lens;
  a.plan = plan_pointers(p, config);
  a.batch = static_cast<int>(p.batch);
  a.num_kv_heads = static_cast<int>(p.num_kv_heads);
  a.reach = reach(p);
  a.parts = config.parts;
  a.min_part_units = config.min_part_units;
  LaunchOptions options;
  options.shared_bytes = planning_shared_bytes(p);
  options.overlaps_producer = config.overlaps_producer;
  // Threads for the requests and for the search of the parts
  const int64_t wanted = std::max<int64_t>(p.batch, config.parts);
  const int64_t threads = std::min<int64_t>(ceil_div(wanted, kWarp) * kWarp, kMaxThreads);
  return launch_with(options, paged_attention_plan_kernel, dim3(1), dim3(threads), p.device, p.stream, a);
}

}  // namespace qsun
