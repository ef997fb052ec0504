#pragma once

#include <cstdint>
#include <string>

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

QSUN_API Status silu_and_mul(const SiluAndMulParams& params);

}  // namespace qsun
