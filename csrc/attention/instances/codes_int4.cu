#include "attention/codes.cuh"

namespace qsun {

template <>
cudaError_t launch_paged_attention_codes<DType::kInt4>(const PagedAttentionDecodeParams& params,
                                                       const PagedAttentionDecodeConfig& config) {
  return launch_codes<DType::kInt4>(params, config);
}

}  // namespace qsun
