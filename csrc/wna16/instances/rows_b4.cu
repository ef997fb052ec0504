#include "wna16/rows.cuh"

namespace qsun {

template <>
cudaError_t launch_wna16_rows<4>(const Wna16LinearParams& params, const Wna16LinearConfig& config) {
  return launch_rows<4>(params, config);
}

}  // namespace qsun
