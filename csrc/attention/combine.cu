// Puts the parts of an attention together: out = sum(weight * part) / sum(weight), weight = exp(lse of the
// part).
#include "attention/split.h"
#include "device/dtype.cuh"
#include "device/softmax.cuh"
#include "runtime/launch.h"

namespace qsun {
namespace {

constexpr int kMaxThreads = 256;  // the largest head_dim

// One block a (request, head), a thread an element. Every thread goes through the parts in the same order.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    paged_attention_combine_kernel(PartialResults partial, T* out, float* lse, int num_parts, int head_dim) {
  const int64_t row = blockIdx.x;
  const int element = static_cast<int>(threadIdx.x);
  const float* part_lse = partial.lse + row * num_parts;
  const float* part_out = partial.out + row * num_parts * head_dim + element;

  float maximum = -INFINITY;
  for (int part = 0; part < num_parts; ++part) maximum = fmaxf(maximum, part_lse[part]);
  const float reference = reference_of(maximum);
  float sum = 0.0f;
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
                                           const PagedAttentionDecodeConfig& config) {
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(paged_attention_combine_kernel<T>, dim3(p.batch * p.num_q_heads),
                  dim3(ceil_div(p.head_dim, 32) * 32), p.stream, partial_results(p, config),
                  static_cast<T*>(p.out), p.lse, config.num_parts, static_cast<int>(p.head_dim));
  });
}

}  // namespace qsun
