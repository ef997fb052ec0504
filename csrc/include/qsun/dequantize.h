#pragma once

#include <cstdint>
#include <string>

#include "qsun/status.h"
#include "qsun/types.h"

namespace qsun {

// out[n, k] = (code[n, k] - zero[n, g(k)]) * scale[n, g(k)], computed in float32 and rounded once.
// G = ceil(K / group_size), or 1 when group_size is -1.
struct DequantizeParams {
  const uint32_t* qweight =
      nullptr;                   // (N, ceil(K * bits / 32)): row n is a little-endian stream of its K codes
  const void* scales = nullptr;  // (N, G) scale_dtype
  const uint8_t* qzeros = nullptr;  // (N, G); null: every zero is 2^(bits - 1)
  const int32_t* g_idx = nullptr;   // (K,) values in [0, G); null: g(k) = k / group_size
  void* out = nullptr;              // (N, K) dtype, contiguous
  int64_t N = 0;
  int64_t K = 0;
  int bits = 4;        // 2, 3, 4 or 8
  int group_size = 0;  // 32, 64, 128, or -1: one group a row
  DType scale_dtype = DType::kFloat32;
  DType dtype = DType::kFloat32;
  int device = 0;
  Stream stream = nullptr;
};
QSUN_API std::string to_string(const DequantizeParams& params);

QSUN_API Status dequantize(const DequantizeParams& params);

}  // namespace qsun
