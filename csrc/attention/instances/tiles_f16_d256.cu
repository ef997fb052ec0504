#include "attention/tiles.cuh"

namespace qsun {

template <>
cudaError_t launch_paged_attention_tiles<__half, 256>(const PagedAttentionDecodeParams& params,
                                                      const PagedAttentionDecodeConfig& config) {
  return launch_tiles<__half, 256>(params, config);
}

}  // namespace qsun
