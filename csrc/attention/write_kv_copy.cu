// Scatter of new keys and values into a paged cache of their own dtype. Bits are copied, so the kernel knows
// the width of what it moves and nothing of its dtype.
#include <vector_types.h>

#include <algorithm>

#include "attention/write_kv.h"
#include "device/dependent_launch.cuh"
#include "device/trap.cuh"
#include "device/vector.cuh"
#include "runtime/launch.h"

namespace qsun {
namespace {

constexpr int kThreads = 256;

// Sizes and strides count units: pieces of one head that a thread moves at once.
struct ScatterArguments {
  const void* sources[2];  // k, v
  void* targets[2];        // k_cache, v_cache
  int64_t strides[2];      // between tokens of each source
  const int64_t* slot_mapping;
  int64_t num_tokens;
  int64_t num_heads;
  int64_t head_units;
  int64_t num_blocks;
  int64_t block_size;
  bool settled;
};

template <typename Unit>
__global__ void __launch_bounds__(kThreads) write_kv_cache_kernel(ScatterArguments a) {
  const int64_t token_units = a.num_heads * a.head_units;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  if (!a.settled) wait_for_producers();
  launch_dependents();  // see write_kv.h
  if (a.settled) wait_for_producers();
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       at < a.num_tokens * token_units; at += step) {
    const int64_t token = at / token_units;
    const int64_t head = at % token_units / a.head_units;
    const int64_t unit = at % a.head_units;
    const int64_t slot = a.slot_mapping[token];
    if (slot < 0) continue;
    const int64_t block = slot / a.block_size;
    trap_unless(block < a.num_blocks);
    const int64_t target =
        ((block * a.num_heads + head) * a.block_size + slot % a.block_size) * a.head_units + unit;
    const int64_t source = head * a.head_units + unit;
    const Unit from_k = (static_cast<const Unit*>(a.sources[0]) + token * a.strides[0])[source];
    const Unit from_v = (static_cast<const Unit*>(a.sources[1]) + token * a.strides[1])[source];
    static_cast<Unit*>(a.targets[0])[target] = from_k;
    static_cast<Unit*>(a.targets[1])[target] = from_v;
  }
}

template <typename Unit>
cudaError_t launch_units(const WriteKvCacheParams& p, const WriteKvCacheConfig& config) {
  const int64_t elements = static_cast<int64_t>(sizeof(Unit)) / size_of(p.dtype);  // in a unit
  ScatterArguments a{};
  a.sources[0] = p.k;
  a.sources[1] = p.v;
  a.targets[0] = p.k_cache;
  a.targets[1] = p.v_cache;
  a.strides[0] = p.k_stride / elements;
  a.strides[1] = p.v_stride / elements;
  a.slot_mapping = p.slot_mapping;
  a.num_tokens = p.num_tokens;
  a.num_heads = p.num_kv_heads;
  a.head_units = p.head_dim / elements;
  a.num_blocks = p.num_blocks;
  a.block_size = p.block_size;
  a.settled = p.settled;
  const int64_t num_units = a.num_tokens * a.num_heads * a.head_units;
  LaunchOptions options;
  options.overlaps_producer = config.overlaps_producer;
  return launch_with(options, write_kv_cache_kernel<Unit>,
                     dim3(std::min(ceil_div(num_units, kThreads), kMaxGridX)), dim3(kThreads), p.device,
                     p.stream, a);
}

}  // namespace

cudaError_t launch_write_kv_copy(const WriteKvCacheParams& p, const WriteKvCacheConfig& config) {
  if (config.is_wide) return launch_units<uint4>(p, config);
  return size_of(p.dtype) == 4 ? launch_units<uint32_t>(p, config) : launch_units<uint16_t>(p, config);
}

}  // namespace qsun
