#pragma once

#include <cstdint>
#include <string>

#include "qsun/device.h"
#include "qsun/status.h"
#include "qsun/types.h"

namespace qsun {

// out = x @ w.T (+ bias) (+ residual), with w[n, k] = (code[n, k] - zero[n, g(k)]) * scale[n, g(k)] in
// float32, products summed in float32, one rounding at the end. G = ceil(K / group_size), or 1 when
// group_size is -1.
struct Wna16LinearParams {
  const void* x = nullptr;  // (M, K) dtype, rows x_stride elements apart
  const uint32_t* qweight =
      nullptr;                   // (N, ceil(K * bits / 32)): row n is a little-endian stream of its K codes
  const void* scales = nullptr;  // (N, G) dtype
  const uint8_t* qzeros = nullptr;  // (N, G); null: every zero is 2^(bits - 1)
  const int32_t* g_idx = nullptr;   // (K,) values in [0, G); null: g(k) = k / group_size
  const void* bias = nullptr;       // (N,) dtype; null: none
  const void* residual = nullptr;   // (M, N) dtype, rows residual_stride elements apart; null: none
  void* out = nullptr;              // (M, N) dtype, rows out_stride elements apart
  int64_t M = 0;                    // 0: nothing is launched
  int64_t N = 0;
  int64_t K = 0;
  int64_t x_stride = 0;
  int64_t residual_stride = 0;
  int64_t out_stride = 0;
  int bits = 4;                   // 2, 3, 4 or 8
  int group_size = 0;             // 32, 64, 128, or -1: one group a row
  DType dtype = DType::kFloat32;  // no other: 16-bit activations take panels (wna16_panels.h)
  int device = 0;
  Stream stream = nullptr;
};
QSUN_API std::string to_string(const Wna16LinearParams& params);

struct Wna16LinearConfig {
  int tile_m = 1;  // rows of x a block multiplies at once: 1, 2, 4 or 8
  int warps = 8;   // of a block
  int64_t grid_n = 0;
  int64_t grid_m = 0;
};
QSUN_API std::string to_string(const Wna16LinearConfig& config);

// Pure: depends on the sizes alone.
QSUN_API Wna16LinearConfig choose(const Wna16LinearParams& params, const DeviceProps& props);

QSUN_API Status wna16_linear(const Wna16LinearParams& params);

}  // namespace qsun
