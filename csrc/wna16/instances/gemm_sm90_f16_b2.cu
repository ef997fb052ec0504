#include "wna16/gemm_sm90.cuh"

namespace qsun {

template <>
cudaError_t launch_wna16_gemm<__half, 2>(const Wna16PanelsParams& params, const GemmConfig& config) {
  return launch_gemm<__half, 2>(params, config);
}

}  // namespace qsun
