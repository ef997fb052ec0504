// Finds the prefixes that requests share (prefixes.h), in three launches:
//
//   order    one block sorts the requests by a few blocks of theirs, at 1, 2, 4, 8 and 16 times the smallest
//            prefix: those with the same beginning come to stand side by side. The order decides what can be
//            found, and nothing else: what is shared is what compares equal.
//   compare  a warp a request compares its row of the block table with that of its neighbour
//   group    one block makes groups of runs of neighbours, and items of groups
#include <algorithm>

#include "attention/plan.cuh"
#include "attention/prefixes.h"
#include "device/dependent_launch.cuh"
#include "device/shared.cuh"
#include "device/trap.cuh"
#include "runtime/launch.h"

namespace qsun {
namespace {

constexpr int kCompareWarps = 4;    // of a block: a request each
constexpr int kCompareAtOnce = 4;   // entries of a lane that are on their way together
constexpr int kIndexBits = 16;      // of a sorting key, the lowest: the request
constexpr uint64_t kNoKey = ~0ull;  // of places past the last request
constexpr unsigned kMaxTiles = 1u << 30;
static_assert(kMaxSharingBatch <= 1 << kIndexBits);

struct PrefixArguments {
  const int32_t* seq_lens;     // (batch,)
  const int32_t* block_table;  // (batch, max_blocks), rows table_stride apart
  PrefixPointers prefixes;
  int64_t table_stride;
  int64_t max_blocks;
  int block_log2;
  int batch;
  int q_len;
  int num_kv_heads;
  int requests_an_item;
  int min_tiles;
  int min_saved;
};

// Full tiles that all query tokens of a request see whole. What is left holds at least the last one itself.
__device__ __forceinline__ int whole_tiles(const PrefixArguments& a, int request) {
  const int length = a.seq_lens[request];
  trap_unless(length <= a.max_blocks << a.block_log2);
  return max(length - a.q_len, 0) / kTileTokens;
}

// `bits` of a number that differ between blocks.
__device__ __forceinline__ uint64_t mixed(int block, int bits) {
  return static_cast<uint32_t>(block) * 0x9e3779b1u >> (32 - bits);
}

// Requests too short to share come last.
__device__ __forceinline__ uint64_t sorting_key(const PrefixArguments& a, int request) {
  const int tiles = whole_tiles(a, request);
  const int32_t* row = a.block_table + request * a.table_stride;
  const auto at = [&](int64_t depth) { return row[(depth * kTileTokens - 1) >> a.block_log2]; };
  uint64_t key = (1ull << (64 - kIndexBits)) - 1;
  if (tiles >= a.min_tiles) {
    key = mixed(at(a.min_tiles), 16);
    for (int doubling = 1; doubling <= 4; ++doubling) {
      const int64_t depth = static_cast<int64_t>(a.min_tiles) << doubling;
      key = key << 8 | (tiles >= depth ? mixed(at(depth), 8) : 0);
    }
  }
  return key << kIndexBits | static_cast<uint64_t>(request);
}

// size: a power of two, at least the batch.
__global__ void __launch_bounds__(kMaxPlanThreads, 1)
    paged_attention_order_kernel(const __grid_constant__ PrefixArguments a, int size) {
  launch_dependents();
  wait_for_producers();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  uint64_t* smem_keys = reinterpret_cast<uint64_t*>(dynamic_shared());
  for (int i = thread; i < size; i += threads) smem_keys[i] = i < a.batch ? sorting_key(a, i) : kNoKey;
  __syncthreads();

  // Bitonic sort
  for (int run = 2; run <= size; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      for (int i = thread; i < size / 2; i += threads) {
        const int low = i / distance * 2 * distance + i % distance, high = low + distance;
        const uint64_t first = smem_keys[low], second = smem_keys[high];
        const bool is_rising = (low & run) == 0;
        if (first > second == is_rising) {
          smem_keys[low] = second;
          smem_keys[high] = first;
        }
      }
      __syncthreads();
    }
  }
  for (int i = thread; i < a.batch; i += threads) {
    a.prefixes.order[i] = static_cast<int>(smem_keys[i] & ((1 << kIndexBits) - 1));
  }
}

__global__ void __launch_bounds__(kCompareWarps* kWarp)
    paged_attention_compare_kernel(const __grid_constant__ PrefixArguments a) {
  launch_dependents();
  wait_for_producers();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int i = static_cast<int>(blockIdx.x) * kCompareWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (i >= a.batch) return;
  int common = 0;
  if (i > 0) {
    const int request = a.prefixes.order[i], other = a.prefixes.order[i - 1];
    const int tiles = min(whole_tiles(a, request), whole_tiles(a, other));
    if (tiles >= a.min_tiles) {
      const int32_t* row = a.block_table + request * a.table_stride;
      const int32_t* other_row = a.block_table + other * a.table_stride;
      const int entries = (tiles * kTileTokens - 1 >> a.block_log2) + 1;
      int differs = entries;  // the first entry that does
      for (int base = 0; base < entries && differs == entries; base += kCompareAtOnce * kWarp) {
#pragma unroll
        for (int n = kCompareAtOnce - 1; n >= 0; --n) {
          const int entry = base + n * kWarp + lane;
          if (entry < entries && row[entry] != other_row[entry]) differs = entry;
        }
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
          differs = min(differs, __shfl_xor_sync(kAllLanes, differs, distance));
        }
      }
      const int64_t tokens = static_cast<int64_t>(differs) << a.block_log2;
      common = static_cast<int>(min(tokens / kTileTokens, static_cast<int64_t>(tiles)));
    }
  }
  if (lane == 0) a.prefixes.common[i] = common;
}

// Requests of a group that each of its items gets: as many items as it takes, of about the same size.
__device__ __forceinline__ int requests_of_item(int count, int most) {
  const int items = (count + most - 1) / most;
  return (count + items - 1) / items;
}

// A group ends where too little is common, and where it is less than half of what is common on either side:
// a short prefix of many must not keep a few of them from sharing a long one.
__device__ __forceinline__ bool begins_group(const int* smem_common, int i, int batch, int min_tiles) {
  const int own = smem_common[i];
  if (own < min_tiles) return true;
  const int around = max(smem_common[i - 1], i + 1 < batch ? smem_common[i + 1] : 0);
  return own < (around + 1) / 2;
}

inline int grouping_shared_bytes(int64_t batch) {
  return static_cast<int>(3 * (batch + 1) * static_cast<int64_t>(sizeof(int32_t)));
}

__global__ void __launch_bounds__(kMaxPlanThreads, 1)
    paged_attention_group_kernel(const __grid_constant__ PrefixArguments a) {
  launch_dependents();
  wait_for_producers();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int rounded = (a.batch + threads - 1) / threads * threads;  // all threads take part in sums
  int* smem_common = reinterpret_cast<int*>(dynamic_shared());      // (batch,)
  int* smem_begins = smem_common + a.batch;                         // (groups + 1,)
  unsigned* smem_lost =
      reinterpret_cast<unsigned*>(smem_begins + a.batch + 1);  // (groups,) kMaxTiles - tiles
  for (int i = thread; i < a.batch; i += threads) {
    smem_common[i] = a.prefixes.common[i];
    smem_lost[i] = 0;
  }
  __syncthreads();

  // Groups
  int64_t groups = 0;
  for (int i = thread; i < rounded; i += threads) {
    const bool begins = i < a.batch && begins_group(smem_common, i, a.batch, a.min_tiles);
    int64_t total = 0;
    const int group = static_cast<int>(groups + inclusive_sum(begins ? 1 : 0, &total)) - 1;
    groups += total;
    if (i >= a.batch) continue;
    if (begins) {
      smem_begins[group] = i;
    } else {
      atomicMax(smem_lost + group, kMaxTiles - static_cast<unsigned>(smem_common[i]));
    }
  }
  if (thread == 0) smem_begins[groups] = a.batch;
  __syncthreads();

  // What sharing saves, in tiles: all but one reading an item
  int64_t saved = 0;
  for (int base = 0; base < groups; base += threads) {
    const int group = base + thread;
    int64_t of_group = 0;
    if (group < groups) {
      const int count = smem_begins[group + 1] - smem_begins[group];
      const int items = (count + a.requests_an_item - 1) / a.requests_an_item;
      if (count > items) of_group = static_cast<int64_t>(kMaxTiles - smem_lost[group]) * (count - items);
    }
    int64_t total = 0;
    inclusive_sum(of_group, &total);
    saved += total;
  }
  const bool is_worth_it = saved * a.num_kv_heads >= a.min_saved && saved > 0;

  // Items
  int64_t groups_before = 0, items = 0, units = 0;
  for (int i = thread; i < rounded; i += threads) {
    const bool begins = i < a.batch && begins_group(smem_common, i, a.batch, a.min_tiles);
    int64_t total = 0;
    const int group = static_cast<int>(groups_before + inclusive_sum(begins ? 1 : 0, &total)) - 1;
    groups_before += total;
    const int first = i < a.batch ? smem_begins[group] : 0;
    const int end = i < a.batch ? smem_begins[group + 1] : 0;
    const bool shares = i < a.batch && is_worth_it && end - first > 1;
    const int size = shares ? requests_of_item(end - first, a.requests_an_item) : 1;
    const bool is_item = shares && (i - first) % size == 0;
    const int tiles = shares ? static_cast<int>(kMaxTiles - smem_lost[group]) : 0;
    const int item = static_cast<int>(items + inclusive_sum(is_item ? 1 : 0, &total)) - 1;
    items += total;
    const int64_t start = units + inclusive_sum(is_item ? 1 + tiles : 0, &total) - (1 + tiles);
    units += total;
    if (i >= a.batch) continue;
    const int request = a.prefixes.order[i];
    if (is_item) {
      const int members = i << 8 | min(end - i, size);
      a.prefixes.line.items[item] = {0, tiles * kTileTokens, request, members};
    }
    a.prefixes.of_request[request] = {tiles * kTileTokens, i, shares ? static_cast<int>(start) : 0, 0};
  }
  if (thread == 0) *a.prefixes.line.header = {0, 0, 0, static_cast<int>(items)};
}

}  // namespace

cudaError_t launch_find_prefixes(const PagedAttentionDecodeParams& p,
                                 const PagedAttentionDecodeConfig& config) {
  PrefixArguments a{};
  a.seq_lens = p.seq_lens;
  a.block_table = p.block_table;
  a.prefixes = prefix_pointers(p, config);
  a.table_stride = p.block_table_stride;
  a.max_blocks = p.max_blocks;
  while (int64_t{1} << a.block_log2 < p.block_size) ++a.block_log2;
  a.batch = static_cast<int>(p.batch);
  a.q_len = static_cast<int>(p.q_len);
  a.num_kv_heads = static_cast<int>(p.num_kv_heads);
  a.requests_an_item = kPrefixRows / query_rows(p);
  a.min_tiles = config.min_prefix_tiles;
  a.min_saved = config.min_saved_tiles;
  int size = 2;
  while (size < a.batch) size *= 2;

  LaunchOptions options;
  options.overlaps_producer = config.overlaps_producer;
  const auto threads_for = [](int64_t wanted) {
    return dim3(std::min<int64_t>(ceil_div(wanted, kWarp) * kWarp, kMaxPlanThreads));
  };
  options.shared_bytes = size * static_cast<int>(sizeof(uint64_t));
  cudaError_t error = launch_with(options, paged_attention_order_kernel, dim3(1), threads_for(size), p.device,
                                  p.stream, a, size);
  if (error != cudaSuccess) return error;
  options.shared_bytes = 0;
  error = launch_with(options, paged_attention_compare_kernel, dim3(ceil_div(p.batch, kCompareWarps)),
                      dim3(kCompareWarps * kWarp), p.device, p.stream, a);
  if (error != cudaSuccess) return error;
  options.shared_bytes = grouping_shared_bytes(p.batch);
  return launch_with(options, paged_attention_group_kernel, dim3(1), threads_for(p.batch), p.device, p.stream,
                     a);
}

}  // namespace qsun
