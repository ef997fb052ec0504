// In the place of kernels on wgmma and tensor maps: launches that say so and fail.
#include "machine.h"
#include "wna16/gemm_sm90.h"

namespace qsun {

template <typename T, int kBits>
cudaError_t launch_wna16_gemm(const Wna16PanelsParams&, const GemmConfig&) {
  return emulator::refused(cudaErrorNotSupported, "wna16/gemm_sm90.cuh is not emulated (wgmma)");
}

#define STANDS_IN_FOR(T, bits) \
  template cudaError_t launch_wna16_gemm<T, bits>(const Wna16PanelsParams&, const GemmConfig&)
STANDS_IN_FOR(__half, 2);
STANDS_IN_FOR(__half, 3);
STANDS_IN_FOR(__half, 4);
STANDS_IN_FOR(__half, 8);
STANDS_IN_FOR(__nv_bfloat16, 2);
STANDS_IN_FOR(__nv_bfloat16, 3);
STANDS_IN_FOR(__nv_bfloat16, 4);
STANDS_IN_FOR(__nv_bfloat16, 8);

}  // namespace qsun
