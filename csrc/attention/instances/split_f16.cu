#include "attention/split.cuh"

namespace qsun {

template <>
cudaError_t launch_paged_attention_split<__half>(const PagedAttentionDecodeParams& params,
                                                 const PagedAttentionSplitConfig& config) {
  return launch_split<__half>(params, config);
}

}  // namespace qsun
