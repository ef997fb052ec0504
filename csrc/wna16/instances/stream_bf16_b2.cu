#include "wna16/stream.cuh"

namespace qsun {

template <>
cudaError_t launch_wna16_stream<__nv_bfloat16, 2>(const Wna16PanelsParams& params,
                                                  const StreamConfig& config) {
  return launch_stream<__nv_bfloat16, 2>(params, config);
}

}  // namespace qsun
