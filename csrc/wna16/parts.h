// Sums of a product whose columns were split over blocks: each block leaves its own, a second kernel adds
// them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/dtype.cuh"
#include "qsun/wna16_panels.h"
#include "wna16/panels.h"

namespace qsun {

// float32 (splits, M, padded_rows(N)): a row of sums has those of all stored rows of the weight, padding
// included.
inline int64_t padded_rows(int64_t N) { return (N + kBlockRows - 1) / kBlockRows * kBlockRows; }
inline int64_t parts_bytes(const Wna16PanelsParams& p, int splits) {
  return splits > 1 ? splits * p.M * padded_rows(p.N) * int64_t{sizeof(float)} : 0;
}

// out = the sums of p.scratch added in the order of the splits, with what follows a product.
template <typename T>
cudaError_t launch_add_parts(const Wna16PanelsParams& p, int splits);
template <>
cudaError_t launch_add_parts<__half>(const Wna16PanelsParams&, int);
template <>
cudaError_t launch_add_parts<__nv_bfloat16>(const Wna16PanelsParams&, int);

}  // namespace qsun
