#include "attention/split.cuh"

namespace qsun {

template <>
cudaError_t launch_paged_attention_split<float>(const PagedAttentionDecodeParams& params,
                                                const PagedAttentionSplitConfig& config) {
  return launch_split<float>(params, config);
}

}  // namespace qsun
