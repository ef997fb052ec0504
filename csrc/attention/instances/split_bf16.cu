#include "attention/split.cuh"

namespace qsun {

template <>
cudaError_t launch_paged_attention_split<__nv_bfloat16>(const PagedAttentionDecodeParams& params,
                                                        const PagedAttentionSplitConfig& config) {
  return launch_split<__nv_bfloat16>(params, config);
}

}  // namespace qsun
