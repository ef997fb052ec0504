#include "attention/tiles.cuh"

namespace qsun {

template <>
cudaError_t launch_paged_attention_tiles<__half, 64>(const PagedAttentionDecodeParams& params,
                                                     const PagedAttentionDecodeConfig& config) {
  return launch_tiles<__half, 64>(params, config);
}

}  // namespace qsun
