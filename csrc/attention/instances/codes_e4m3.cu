#include "attention/codes.cuh"

namespace qsun {

template <>
cudaError_t launch_paged_attention_codes<DType::kFloat8E4M3>(const PagedAttentionDecodeParams& params,
                                                             const PagedAttentionDecodeConfig& config) {
  return launch_codes<DType::kFloat8E4M3>(params, config);
}

}  // namespace qsun
