#include "wna16/tiles_sm80.cuh"

namespace qsun {

template <>
cudaError_t launch_wna16_tiles<__half, 8>(const Wna16PanelsParams& params, const TilesConfig& config) {
  return launch_tiles<__half, 8>(params, config);
}

}  // namespace qsun
