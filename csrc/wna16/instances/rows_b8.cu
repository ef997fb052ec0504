#include "wna16/rows.cuh"

namespace qsun {

template <>
cudaError_t launch_wna16_rows<8>(const Wna16LinearParams& params, const Wna16LinearConfig& config) {
  return launch_rows<8>(params, config);
}

}  // namespace qsun
