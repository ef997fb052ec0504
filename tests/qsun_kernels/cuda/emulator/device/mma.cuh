// See csrc/device/mma.cuh.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/shared.cuh"

namespace qsun {

template <typename T>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  emulator::multiply(kHalf ? emulator::Format::kFloat16 : emulator::Format::kBFloat16, c, a, b0, b1);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t row_address) { emulator::load_matrices(r, row_address); }

inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t row_address) {
  emulator::load_matrices_transposed(r, row_address);
}

inline uint32_t transpose_matrix(uint32_t pair) {
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  uint32_t result = 0;
  for (int half = 0; half < 2; ++half) {
    const uint32_t other = __shfl_sync(0xffffffffu, pair, (2 * t + half) * 4 + g / 2);
    result |= (g % 2 == 0 ? other & 0xffffu : other >> 16) << (16 * half);
  }
  return result;
}

}  // namespace qsun
