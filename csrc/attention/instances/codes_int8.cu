#include "attention/codes.cuh"

namespace qsun {

template <>
cudaError_t launch_paged_attention_codes<DType::kInt8>(const PagedAttentionDecodeParams& params,
                                                       const PagedAttentionDecodeConfig& config) {
  return launch_codes<DType::kInt8>(params, config);
}

}  // namespace qsun
