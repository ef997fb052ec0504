// The operator's side of the kernel in rows.cuh: one entry a bit width, each compiled in its own file.
#pragma once

#include <cuda_runtime_api.h>

#include "qsun/wna16_linear.h"

namespace qsun {

constexpr int kRowsPerWarp = 2;  // rows of the weight that a warp multiplies at once

template <int kBits>
cudaError_t launch_wna16_rows(const Wna16LinearParams& params, const Wna16LinearConfig& config);
template <>
cudaError_t launch_wna16_rows<2>(const Wna16LinearParams& params, const Wna16LinearConfig& config);
template <>
cudaError_t launch_wna16_rows<3>(const Wna16LinearParams& params, const Wna16LinearConfig& config);
template <>
cudaError_t launch_wna16_rows<4>(const Wna16LinearParams& params, const Wna16LinearConfig& config);
template <>
cudaError_t launch_wna16_rows<8>(const Wna16LinearParams& params, const Wna16LinearConfig& config);

}  // namespace qsun
