#include "wna16/gemm_sm90.cuh"

namespace qsun {

template <>
cudaError_t launch_wna16_gemm<__nv_bfloat16, 3>(const Wna16PanelsParams& params, const GemmConfig& config) {
  return launch_gemm<__nv_bfloat16, 3>(params, config);
}

}  // namespace qsun
