// Sums of a product whose columns were split over blocks: each block leaves its own, a second kernel adds
// them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "device/dtype.cuh"
#include "qsun/device.h"
#include "qsun/rms_norm.h"
#include "qsun/wna16_panels.h"
#include "wna16/panels.h"

namespace qsun {

// float32 (splits, M, padded_rows(N)): a row of sums has those of all stored rows of the weight, padding
// included.
inline int64_t padded_rows(int64_t N) { return (N + kBlockRows - 1) / kBlockRows * kBlockRows; }
inline int64_t parts_bytes(const Wna16PanelsParams& p, int splits) {
  return splits > 1 ? splits * p.M * padded_rows(p.N) * int64_t{sizeof(float)} : 0;
}

// How the kernel that adds parts also norms the rows of out.
struct NormPartsConfig {
  int row_threads = 0;  // of a row; 0: the kernel cannot, and the norm is a launch of its own
  int blocks = 1;       // a cluster of them has a row
};
std::string to_string(const NormPartsConfig& config);

// The norm of p.out as a problem of its own.
inline RmsNormParams norm_of(const Wna16PanelsParams& p) {
  RmsNormParams norm;
  norm.x = p.out, norm.weight = p.norm_weight, norm.out = p.norm_out;
  norm.num_rows = p.M, norm.hidden_size = p.N, norm.x_stride = p.out_stride;
  norm.prefetch_weight = p.prefetch_weights;
  norm.eps = p.norm_eps, norm.dtype = p.dtype, norm.device = p.device, norm.stream = p.stream;
  return norm;
}

// Pure: depends on sizes, alignment and the device alone.
NormPartsConfig choose_norm_parts(const Wna16PanelsParams& p, const DeviceProps& props);

// Whether p.norm_out comes with the sums of `splits` parts.
inline bool norms_parts(const Wna16PanelsParams& p, int splits, const DeviceProps& props) {
  return splits > 1 && p.norm_weight != nullptr && choose_norm_parts(p, props).row_threads > 0;
}

// out = the sums of p.scratch added in the order of the splits, with what follows a product: the norm, too,
// where norms_parts() says so. overlaps_producer: programmatic dependent launch.
template <typename T>
cudaError_t launch_add_parts(const Wna16PanelsParams& p, int splits, bool overlaps_producer);
template <>
cudaError_t launch_add_parts<__half>(const Wna16PanelsParams&, int, bool);
template <>
cudaError_t launch_add_parts<__nv_bfloat16>(const Wna16PanelsParams&, int, bool);

template <typename T>
cudaError_t launch_norm_parts(const Wna16PanelsParams& p, int splits, bool overlaps_producer,
                              const NormPartsConfig& config);
template <>
cudaError_t launch_norm_parts<__half>(const Wna16PanelsParams&, int, bool, const NormPartsConfig&);
template <>
cudaError_t launch_norm_parts<__nv_bfloat16>(const Wna16PanelsParams&, int, bool, const NormPartsConfig&);

}  // namespace qsun
