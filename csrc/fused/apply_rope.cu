// Rotary position embedding of query and key heads in one launch. A thread rotates one vector of pairs: it
// reads the two halves of a head at the same offset and writes both.
#include "qsun/apply_rope.h"

#include <algorithm>

#include "device/dependent_launch.cuh"
#include "device/dtype.cuh"
#include "device/rope.cuh"
#include "device/trap.cuh"
#include "device/vector.cuh"
#include "runtime/alignment.h"
#include "runtime/checks.h"
#include "runtime/launch.h"

namespace qsun {

std::string to_string(const ApplyRopeParams& p) {
  return Fields()
      .add("num_tokens", p.num_tokens)
      .add("num_q_heads", p.num_q_heads)
      .add("num_kv_heads", p.num_kv_heads)
      .add("head_dim", p.head_dim)
      .add("max_positions", p.max_positions)
      .add("dtype", to_string(p.dtype))
      .str();
}

std::string to_string(const ApplyRopeConfig& c) {
  return Fields()
      .add("width", c.width)
      .add("blocks", c.blocks)
      .add("overlaps_producer", c.overlaps_producer)
      .str();
}

namespace {

constexpr int kThreads = 256;

}  // namespace

ApplyRopeConfig choose(const ApplyRopeParams& p, const DeviceProps& props) {
  const int64_t bytes = size_of(p.dtype), half = p.head_dim / 2;
  const bool is_wide =
      wide({p.q, p.k, p.q_out, p.k_out, p.cos_sin}, {half * bytes, p.q_stride * bytes, p.k_stride * bytes});
  ApplyRopeConfig config;
  config.width = is_wide ? static_cast<int>(16 / bytes) : 1;
  const int64_t vectors = p.num_tokens * (p.num_q_heads + p.num_kv_heads) * (half / config.width);
  config.blocks = static_cast<int>(std::min(ceil_div(vectors, kThreads), kMaxGridX));
  config.overlaps_producer = props.compute_major >= 9;
  return config;
}

namespace {

// Everything is read by plain loads: the kernels in front may still write it when this one begins.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) apply_rope_kernel(const __grid_constant__ ApplyRopeParams p) {
  launch_dependents();
  wait_for_producers();
  const int64_t half = p.head_dim / 2;
  const int64_t head_vectors = half / kSize;
  const int64_t num_heads = p.num_q_heads + p.num_kv_heads;
  const int64_t num_vectors = p.num_tokens * num_heads * head_vectors;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < num_vectors; at += step) {
    // Token, head, offset inside the half
    const int64_t i = at % head_vectors * kSize;
    const int64_t head = at / head_vectors % num_heads;
    const int64_t token = at / head_vectors / num_heads;
    const bool is_q = head < p.num_q_heads;
    const int64_t own_head = is_q ? head : head - p.num_q_heads;
    const T* source = is_q ? static_cast<const T*>(p.q) + token * p.q_stride + own_head * p.head_dim + i
                           : static_cast<const T*>(p.k) + token * p.k_stride + own_head * p.head_dim + i;
    T* target = is_q ? static_cast<T*>(p.q_out) + (token * p.num_q_heads + own_head) * p.head_dim + i
                     : static_cast<T*>(p.k_out) + (token * p.num_kv_heads + own_head) * p.head_dim + i;
    const int64_t position = p.positions[token];
    trap_unless(position >= 0 && position < p.max_positions);

    // Rotate
    const Vector<float, kSize> cosine = load<kSize>(p.cos_sin + position * p.head_dim + i);
    const Vector<float, kSize> sine = load<kSize>(p.cos_sin + position * p.head_dim + half + i);
    Vector<T, kSize> low = load<kSize>(source);
    Vector<T, kSize> high = load<kSize>(source + half);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      float a = to_float(low.data[j]);
      float b = to_float(high.data[j]);
      turn_pair(a, b, cosine.data[j], sine.data[j]);
      low.data[j] = from_float<T>(a);
      high.data[j] = from_float<T>(b);
    }
    store(target, low);
    store(target + half, high);
  }
}

Status check(const ApplyRopeParams& p) {
  Checks checks;
  checks.known(p.dtype).at_least("num_tokens", p.num_tokens, 0);
  checks.at_least("num_q_heads", p.num_q_heads, 1).at_least("num_kv_heads", p.num_kv_heads, 1);
  checks.at_least("head_dim", p.head_dim, 2).multiple_of("head_dim", p.head_dim, 2);
  checks.at_least("max_positions", p.max_positions, 1);
  if (p.num_tokens > 0) {
    checks.not_null("q", p.q)
        .not_null("k", p.k)
        .not_null("positions", p.positions)
        .not_null("cos_sin", p.cos_sin);
    checks.not_null("q_out", p.q_out).not_null("k_out", p.k_out);
  }
  return checks.status("apply_rope", p);
}

}  // namespace

Status apply_rope(const ApplyRopeParams& p) {
  if (Status status = check(p); !status.ok()) return status;
  if (p.num_tokens == 0) return {};
  DeviceProps props;
  if (Status status = props_of("apply_rope", p, &props); !status.ok()) return status;
  return run_on_device("apply_rope", p, [&] {
    const ApplyRopeConfig config = choose(p, props);
    LaunchOptions options;
    options.overlaps_producer = config.overlaps_producer;
    return with_type(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      auto* kernel = config.width == 1 ? apply_rope_kernel<T, 1> : apply_rope_kernel<T, kWidth<T>>;
      return launch_with(options, kernel, dim3(config.blocks), dim3(kThreads), p.device, p.stream, p);
    });
  });
}

}  // namespace qsun
