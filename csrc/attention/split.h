// The operator's side of the kernels in split.cuh and combine.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "device/dtype.cuh"
#include "qsun/paged_attention_decode.h"

namespace qsun {

// Where the parts leave their results when there is more than one.
struct PartialResults {
  float* lse;  // (batch * q_len, num_q_heads, num_parts); minus infinity for an empty part
  float* out;  // (batch * q_len, num_q_heads, num_parts, head_dim), normalised; undefined for an empty part
};

inline int64_t partial_lse_values(const PagedAttentionDecodeParams& p, const PagedAttentionSplitConfig& c) {
  const int64_t values = p.batch * p.q_len * p.num_q_heads * c.num_parts;
  return (values + 3) / 4 * 4;  // what follows stays aligned to 16 bytes
}

inline PartialResults partial_results(const PagedAttentionDecodeParams& p,
                                      const PagedAttentionSplitConfig& c) {
  auto* scratch = static_cast<float*>(p.scratch);
  return {scratch, scratch + partial_lse_values(p, c)};
}

// One instance a dtype, each compiled in its own file.
template <typename T>
cudaError_t launch_paged_attention_split(const PagedAttentionDecodeParams& params,
                                         const PagedAttentionSplitConfig& config);
template <>
cudaError_t launch_paged_attention_split<float>(const PagedAttentionDecodeParams&,
                                                const PagedAttentionSplitConfig&);
template <>
cudaError_t launch_paged_attention_split<__half>(const PagedAttentionDecodeParams&,
                                                 const PagedAttentionSplitConfig&);
template <>
cudaError_t launch_paged_attention_split<__nv_bfloat16>(const PagedAttentionDecodeParams&,
                                                        const PagedAttentionSplitConfig&);

// Weighs the parts of every (request, head) by their lse. Only for config.num_parts > 1.
cudaError_t launch_paged_attention_combine(const PagedAttentionDecodeParams& params,
                                           const PagedAttentionSplitConfig& config);

}  // namespace qsun
