#pragma once

#include <cstdint>
#include <string>

#include "qsun/device.h"
#include "qsun/status.h"
#include "qsun/types.h"

namespace qsun {

// Rotary position embedding, half-split: with h = head_dim / 2, c and s the row of cos_sin at a token's
// position,
//   out[i] = in[i] * c[i] - in[i + h] * s[i],   out[i + h] = in[i + h] * c[i] + in[i] * s[i],   0 <= i < h
// in float32, one rounding at the end (Su et al. 2021, "RoFormer", eq. 34, its pairs taken h apart).
// A position outside [0, max_positions) traps: the stream's next synchronisation reports a launch failure.
struct ApplyRopeParams {
  const void* q = nullptr;  // (num_tokens, num_q_heads, head_dim) dtype, tokens q_stride elements apart
  const void* k = nullptr;  // (num_tokens, num_kv_heads, head_dim) dtype, tokens k_stride elements apart
  const int64_t* positions = nullptr;  // (num_tokens,)
  const float* cos_sin = nullptr;      // (max_positions, head_dim): [cos | sin], head_dim / 2 of each
  void* q_out = nullptr;               // (num_tokens, num_q_heads, head_dim) dtype, contiguous
  void* k_out = nullptr;               // (num_tokens, num_kv_heads, head_dim) dtype, contiguous
  int64_t num_tokens = 0;              // 0: nothing is launched
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;  // even
  int64_t q_stride = 0;
  int64_t k_stride = 0;
  int64_t max_positions = 0;
  DType dtype = DType::kFloat32;
  int device = 0;
  Stream stream = nullptr;
};
QSUN_API std::string to_string(const ApplyRopeParams& params);

struct ApplyRopeConfig {
  int width = 1;   // elements a load: 16 bytes' worth, or 1 where a base or a stride is not 16-byte aligned
  int blocks = 1;  // a thread a pair of vectors, up to the largest grid
  bool overlaps_producer = false;  // begins while the kernel before it still runs; needs sm_90
};
QSUN_API std::string to_string(const ApplyRopeConfig& config);

// Pure: looks at the alignment of the pointers, never at what they point to.
QSUN_API ApplyRopeConfig choose(const ApplyRopeParams& params, const DeviceProps& props);

QSUN_API Status apply_rope(const ApplyRopeParams& params);

}  // namespace qsun
