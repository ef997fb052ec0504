#include "wna16/stream.cuh"

namespace qsun {

template <>
cudaError_t launch_wna16_stream<__nv_bfloat16, 3>(const Wna16PanelsParams& params,
                                                  const StreamConfig& config) {
  return launch_stream<__nv_bfloat16, 3>(params, config);
}

}  // namespace qsun
