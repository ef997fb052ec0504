#include "wna16/tiles_sm80.cuh"

namespace qsun {

template <>
cudaError_t launch_wna16_tiles<__half, 4>(const Wna16PanelsParams& params, const TilesConfig& config) {
  return launch_tiles<__half, 4>(params, config);
}

}  // namespace qsun
