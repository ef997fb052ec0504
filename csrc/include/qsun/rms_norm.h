#pragma once

#include <cstdint>
#include <string>

#include "qsun/device.h"
#include "qsun/status.h"
#include "qsun/types.h"

namespace qsun {

// out = r / sqrt(mean(r^2) + eps) * weight over the last dimension, where r = x, or x + residual rounded to
// dtype. Sums in float32, one rounding at the end (Zhang and Sennrich 2019, "Root Mean Square Layer
// Normalization", eq. 4).
struct RmsNormParams {
  const void* x = nullptr;         // (num_rows, hidden_size) dtype, rows x_stride elements apart
  const void* residual = nullptr;  // (num_rows, hidden_size) dtype, rows residual_stride apart; null: none
  const void* weight = nullptr;    // (hidden_size,) dtype
  void* out = nullptr;             // (num_rows, hidden_size) dtype, contiguous
  void* residual_out =
      nullptr;           // (num_rows, hidden_size) dtype, contiguous: r; null exactly when residual is
  int64_t num_rows = 0;  // 0: nothing is launched
  int64_t hidden_size = 0;
  int64_t x_stride = 0;
  int64_t residual_stride = 0;
  float eps = 0.0f;
  // A promise: no kernel that this launch depends on writes the weight, which is then read before they have
  // ended.
  bool prefetch_weight = false;
  DType dtype = DType::kFloat32;
  int device = 0;
  Stream stream = nullptr;
};
QSUN_API std::string to_string(const RmsNormParams& params);

struct RmsNormConfig {
  int width = 1;     // elements a load: 16 bytes' worth, or 1 where a base or a stride is not 16-byte aligned
  int threads = 32;  // of the block that handles a row
  bool overlaps_producer = false;  // begins while the kernel before it still runs; needs sm_90
};
QSUN_API std::string to_string(const RmsNormConfig& config);

// Pure: looks at the alignment of the pointers, never at what they point to.
QSUN_API RmsNormConfig choose(const RmsNormParams& params, const DeviceProps& props);

QSUN_API Status rms_norm(const RmsNormParams& params);

}  // namespace qsun
