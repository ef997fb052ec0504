// Scatter of new keys and values into the paged cache. Bits are copied, so the kernel knows the width of what
// it moves and nothing of its dtype.
#include "qsun/write_kv_cache.h"

#include <vector_types.h>

#include <algorithm>

#include "device/trap.cuh"
#include "device/vector.cuh"
#include "runtime/alignment.h"
#include "runtime/checks.h"
#include "runtime/launch.h"

namespace qsun {

std::string to_string(const WriteKvCacheParams& p) {
  return Fields()
      .add("num_tokens", p.num_tokens)
      .add("num_kv_heads", p.num_kv_heads)
      .add("head_dim", p.head_dim)
      .add("num_blocks", p.num_blocks)
      .add("block_size", p.block_size)
      .add("dtype", to_string(p.dtype))
      .str();
}

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
};

template <typename Unit>
__global__ void __launch_bounds__(kThreads) write_kv_cache_kernel(ScatterArguments a) {
  const int64_t token_units = a.num_heads * a.head_units;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       at < a.num_tokens * token_units; at += step) {
    const int64_t token = at / token_units;
    const int64_t head = at % token_units / a.head_units;
    const int64_t unit = at % a.head_units;
    const int64_t slot = load_element(a.slot_mapping + token);
    if (slot < 0) continue;
    const int64_t block = slot / a.block_size;
    trap_unless(block < a.num_blocks);
    const int64_t target =
        ((block * a.num_heads + head) * a.block_size + slot % a.block_size) * a.head_units + unit;
    const int64_t source = head * a.head_units + unit;
    const auto* k = static_cast<const Unit*>(a.sources[0]) + token * a.strides[0];
    const auto* v = static_cast<const Unit*>(a.sources[1]) + token * a.strides[1];
    const Unit from_k = load_element(k + source);
    const Unit from_v = load_element(v + source);
    static_cast<Unit*>(a.targets[0])[target] = from_k;
    static_cast<Unit*>(a.targets[1])[target] = from_v;
  }
}

template <typename Unit>
cudaError_t launch_units(const WriteKvCacheParams& p) {
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
  const int64_t num_units = a.num_tokens * a.num_heads * a.head_units;
  const int64_t grid = std::min(ceil_div(num_units, kThreads), kMaxGridX);
  return launch(write_kv_cache_kernel<Unit>, dim3(grid), dim3(kThreads), p.stream, a);
}

Status check(const WriteKvCacheParams& p) {
  Checks checks;
  checks.known(p.dtype).at_least("num_tokens", p.num_tokens, 0).at_least("num_blocks", p.num_blocks, 0);
  checks.at_least("num_kv_heads", p.num_kv_heads, 1).at_least("head_dim", p.head_dim, 1);
  checks.at_least("block_size", p.block_size, 1);
  if (p.num_tokens > 0) {
    checks.not_null("k", p.k).not_null("v", p.v).not_null("slot_mapping", p.slot_mapping);
    if (p.num_blocks > 0) checks.not_null("k_cache", p.k_cache).not_null("v_cache", p.v_cache);
  }
  return checks.status("write_kv_cache", p);
}

}  // namespace

Status write_kv_cache(const WriteKvCacheParams& p) {
  if (Status status = check(p); !status.ok()) return status;
  if (p.num_tokens == 0) return {};
  return run_on_device("write_kv_cache", p, [&] {
    const int64_t bytes = size_of(p.dtype);
    if (wide({p.k, p.v, p.k_cache, p.v_cache},
             {p.head_dim * bytes, p.k_stride * bytes, p.v_stride * bytes})) {
      return launch_units<uint4>(p);
    }
    return bytes == 4 ? launch_units<uint32_t>(p) : launch_units<uint16_t>(p);
  });
}

}  // namespace qsun
