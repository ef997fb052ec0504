#include "attention/tiles.cuh"

namespace qsun {

template <>
cudaError_t launch_paged_attention_tiles<__nv_bfloat16, 128>(const PagedAttentionDecodeParams& params,
                                                             const PagedAttentionDecodeConfig& config) {
  return launch_tiles<__nv_bfloat16, 128>(params, config);
}

}  // namespace qsun
