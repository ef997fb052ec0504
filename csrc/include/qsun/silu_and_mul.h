#pragma once

#include <cstdint>
#include <string>

#include "qsun/device.h"
#include "qsun/status.h"
#include "qsun/types.h"

namespace qsun {

// out = gate / (1 + exp(-gate)) * up, in float32 with one rounding at the end: the gated unit of Shazeer
// 2020, "GLU Variants Improve Transformer", eq. 6 (SwiGLU), after its two projections.
struct SiluAndMulParams {
  const void* x = nullptr;  // (num_rows, 2 * size) dtype: [gate | up], rows x_stride elements apart
  void* out = nullptr;      // (num_rows, size) dtype, contiguous
  int64_t num_rows = 0;     // 0: nothing is launched
  int64_t size = 0;
  int64_t x_stride = 0;
  DType dtype = DType::kFloat32;
  int device = 0;
  Stream stream = nullptr;
};
QSUN_API std::string to_string(const SiluAndMulParams& params);

struct SiluAndMulConfig {
  int width = 1;   // elements a load: 16 bytes' worth, or 1 where a base or a stride is not 16-byte aligned
  int blocks = 1;  // a thread a vector of out, up to the largest grid
  bool overlaps_producer = false;  // begins while the kernel before it still runs; needs sm_90
};
QSUN_API std::string to_string(const SiluAndMulConfig& config);

// Pure: looks at the alignment of the pointers, never at what they point to.
QSUN_API SiluAndMulConfig choose(const SiluAndMulParams& params, const DeviceProps& props);

QSUN_API Status silu_and_mul(const SiluAndMulParams& params);

}  // namespace qsun
