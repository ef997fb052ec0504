// Puts the parts of an attention together: out = sum(weight * part) / sum(weight), weight = exp(lse of the
// part). A sink adds to the denominator alone.
#include "attention/split.h"
#include "device/dtype.cuh"
#include "device/softmax.cuh"
#include "device/vector.cuh"
#include "runtime/launch.h"

namespace qsun {
namespace {

constexpr int kMaxThreads = 256;  // the largest head_dim

// One block a (query token, head), a thread an element. Every thread goes through the parts in the same
// order.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    paged_attention_combine_kernel(PartialResults partial, const float* sinks, T* out, float* lse,
                                   int num_q_heads, int num_parts, int head_dim) {
  const int64_t row = blockIdx.x;
  const int element = static_cast<int>(threadIdx.x);
  const float* part_lse = partial.lse + row * num_parts;
  const float* part_out = partial.out + row * num_parts * head_dim + element;

  const float sink = sinks == nullptr ? -INFINITY : load_element(sinks + row % num_q_heads);
  float maximum = sink;
  for (int part = 0; part < num_parts; ++part) maximum = fmaxf(maximum, part_lse[part]);
  const float reference = reference_of(maximum);
  float sum = expf(sink - reference);
  float value = 0.0f;
  for (int part = 0; part < num_parts; ++part) {
    // An empty part wrote no values: what lies there must not be touched, not even times zero.
    if (part_lse[part] == -INFINITY) continue;
    const float weight = expf(part_lse[part] - reference);
    sum += weight;
    if (element < head_dim) value += weight * part_out[static_cast<int64_t>(part) * head_dim];
  }
  if (element < head_dim) out[row * head_dim + element] = from_float<T>(sum == 0.0f ? 0.0f : value / sum);
  if (element == 0) lse[row] = log_sum(maximum, sum);
}

}  // namespace

cudaError_t launch_paged_attention_combine(const PagedAttentionDecodeParams& p,
                                           const PagedAttentionSplitConfig& config) {
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(paged_attention_combine_kernel<T>, dim3(p.batch * p.q_len * p.num_q_heads),
                  dim3(ceil_div(p.head_dim, 32) * 32), p.stream, partial_results(p, config), p.sinks,
                  static_cast<T*>(p.out), p.lse, static_cast<int>(p.num_q_heads), config.num_parts,
                  static_cast<int>(p.head_dim));
  });
}

}  // namespace qsun
