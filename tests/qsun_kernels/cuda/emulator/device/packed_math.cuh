// See csrc/device/packed_math.cuh.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "rounding.h"

namespace qsun {

template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename T>
inline Pair<T> as_pair(uint32_t bits) {
  Pair<T> value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename PairType>
inline uint32_t as_bits(PairType value) {
  return emulator::bits_of<uint32_t>(value);
}

template <typename T>
using EmulatedFormat = std::conditional_t<std::is_same_v<T, __half>, emulator::Float16, emulator::BFloat16>;

template <typename T>
inline uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
  using Format = EmulatedFormat<T>;
  const uint32_t low = emulator::fma<Format>(a & 0xffffu, b & 0xffffu, c & 0xffffu);
  return low | static_cast<uint32_t>(emulator::fma<Format>(a >> 16, b >> 16, c >> 16)) << 16;
}

template <typename T>
constexpr uint32_t kOnePair = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;

template <typename T>
inline uint32_t add_pairs(uint32_t a, uint32_t b, uint32_t one = kOnePair<T>) {
  return fma_pairs<T>(a, one, b);
}

template <typename T>
inline uint32_t mul_pairs(uint32_t a, uint32_t b) {
  return fma_pairs<T>(a, b, 0x80008000u);  // minus zero: the sign of a zero product stays
}

template <typename T>
inline uint32_t round_pair(float low, float high) {
  using Format = EmulatedFormat<T>;
  return emulator::rounded<Format>(low) | static_cast<uint32_t>(emulator::rounded<Format>(high)) << 16;
}

template <uint32_t kMask, uint32_t kBits>
inline uint32_t mask_or(uint32_t word) {
  return (word & kMask) | kBits;
}

template <uint32_t kMask, uint32_t kBits>
inline uint32_t mask_xor(uint32_t word) {
  return (word & kMask) ^ kBits;
}

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

}  // namespace qsun
