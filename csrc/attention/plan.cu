// Cuts the work of a batch into parts (the plan of plan.h): one block adds up the requests' units, then finds
// for every part the request in which it begins. Where prefixes are shared, prefixes.cu has found them
// before, and a second block cuts their line in the same way.
#include "attention/plan.cuh"

#include <algorithm>

#include "attention/prefixes.h"
#include "device/dependent_launch.cuh"
#include "device/shared.cuh"
#include "device/trap.cuh"
#include "runtime/launch.h"

namespace qsun {
namespace {

struct PlanArguments {
  const int32_t* seq_lens;  // (batch,)
  PlanPointers plan;
  PrefixPointers prefixes;  // null where none are shared
  int batch;
  int num_kv_heads;
  int reach;
  int parts;
  int min_part_units;
  int prefix_parts;
  int whole_slack;
};

// The largest value of the block's threads, in every thread; values are not negative.
__device__ __forceinline__ int block_max(int value) {
  __shared__ int smem_warp_maxima[kMaxPlanThreads / kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  if (lane == 0) smem_warp_maxima[warp] = value;
  __syncthreads();
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) value = max(value, smem_warp_maxima[w]);
  __syncthreads();  // smem_warp_maxima may be written again from here on
  return value;
}

__global__ void __launch_bounds__(kMaxPlanThreads) paged_attention_plan_kernel(PlanArguments a) {
  launch_dependents();
  wait_for_producers();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int* smem_starts = reinterpret_cast<int*>(dynamic_shared());  // (items,) first units of the items
  const bool is_prefixes = blockIdx.x != 0;
  const PlanPointers plan = is_prefixes ? a.prefixes.line : a.plan;
  const int items = is_prefixes ? a.prefixes.line.header->items : a.batch;
  const int parts = is_prefixes ? a.prefix_parts : a.parts;

  // Units of one head
  int64_t head_units = 0;
  int longest = 0;  // of this thread's items
  for (int base = 0; base < items; base += threads) {
    const int item = base + thread;
    int units = 0;
    if (item < items) {
      PlanItem what;
      if (is_prefixes) {
        what = plan.items[item];
      } else {
        const int length = max(a.seq_lens[item], 0);
        what = {max(length - a.reach, 0), length, item, 0};
        if (a.prefixes.of_request != nullptr) {
          what.first = max(what.first, a.prefixes.of_request[item].tokens);
        }
        plan.items[item] = what;
      }
      units = 1 + tiles_of(what.first, what.length);
      longest = max(longest, units);
    }
    int64_t total = 0;
    const int64_t start = head_units + inclusive_sum(units, &total) - units;
    head_units += total;
    trap_unless(head_units * a.num_kv_heads <= kMaxUnits);
    if (item < items) smem_starts[item] = static_cast<int>(start);
  }
  if (!is_prefixes) {
    for (int i = thread; i < a.batch * a.num_kv_heads; i += threads) plan.counters[i] = 0;
  }
  __syncthreads();

  // Parts
  const int total = static_cast<int>(head_units) * a.num_kv_heads;
  const int equal_share = (total + parts - 1) / parts;
  const int64_t all_items = static_cast<int64_t>(items) * a.num_kv_heads;
  if (!is_prefixes && a.whole_slack >= 0 && all_items <= parts) {
    longest = block_max(longest);
    if (longest - 2 * equal_share <= a.whole_slack && longest * all_items <= kMaxUnits) {
      const int used = static_cast<int>(all_items);
      if (thread == 0) *plan.header = {used * longest, longest, used, items};
      for (int part = thread; part < used; part += threads) {
        const int item = part % items, start = part * longest;
        const PlanItem what = plan.items[item];
        const int end = start + 1 + tiles_of(what.first, what.length);
        plan.parts[part] = {item, part / items, start, end, what};
      }
      return;
    }
  }
  const int share = max(equal_share, a.min_part_units);
  const int used = (total + share - 1) / share;
  if (thread == 0) *plan.header = {total, share, used, items};
  for (int part = thread; part < used; part += threads) {
    const int begin = part * share;
    const int head = begin / static_cast<int>(head_units);
    const int unit = begin - head * static_cast<int>(head_units);
    int item = 0;
    for (int end = items; end - item > 1;) {
      const int middle = (item + end) / 2;
      if (smem_starts[middle] <= unit) {
        item = middle;
      } else {
        end = middle;
      }
    }
    const int start = begin - unit + smem_starts[item];
    plan.parts[part] = {item, head, start, min(begin + share, total), plan.items[item]};
  }
}

}  // namespace

cudaError_t launch_plan_paged_attention(const PagedAttentionDecodeParams& p,
                                        const PagedAttentionDecodeConfig& config) {
  if (p.prefixes != nullptr) {
    const cudaError_t error = launch_find_prefixes(p, config);
    if (error != cudaSuccess) return error;
  }
  PlanArguments a{};
  a.seq_lens = p.seq_lens;
  a.plan = plan_pointers(p, config);
  a.prefixes = prefix_pointers(p, config);
  a.batch = static_cast<int>(p.batch);
  a.num_kv_heads = static_cast<int>(p.num_kv_heads);
  a.reach = reach(p);
  a.parts = config.parts;
  a.min_part_units = config.min_part_units;
  a.prefix_parts = config.prefix_parts;
  a.whole_slack = config.whole_slack;
  LaunchOptions options;
  options.shared_bytes = planning_shared_bytes(p);
  options.overlaps_producer = config.overlaps_producer;
  // Threads for the requests and for the search of the parts
  const int64_t wanted = std::max<int64_t>(p.batch, std::max(config.parts, config.prefix_parts));
  const int64_t threads = std::min<int64_t>(ceil_div(wanted, kWarp) * kWarp, kMaxPlanThreads);
  return launch_with(options, paged_attention_plan_kernel, dim3(p.prefixes == nullptr ? 1 : 2), dim3(threads),
                     p.device, p.stream, a);
}

}  // namespace qsun
