// The two 16-bit floats in the arithmetic of the CPU: widening, and results that were rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

template <typename To, typename From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct Float16 {
  static constexpr int kMantissaBits = 10, kMinExponent = -14, kMaxExponent = 15;

  static float widened(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    const float finite = bits_of<float>(magnitude << 13) * 0x1p112f;
    const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
    return bits_of<float>(bits_of<uint32_t>(finite) | special | sign);
  }
};

struct BFloat16 {
  static constexpr int kMantissaBits = 7, kMinExponent = -126, kMaxExponent = 127;

  static float widened(uint16_t bits) { return bits_of<float>(static_cast<uint32_t>(bits) << 16); }
};

constexpr uint16_t kNotANumber = 0x7fff;  // what a GPU makes, in both formats

// value rounded to the nearest, ties to even.
template <typename Format>
uint16_t rounded(double value) {
  constexpr int kBits = Format::kMantissaBits;
  if (std::isnan(value)) return kNotANumber;
  const uint64_t all = bits_of<uint64_t>(value);
  const auto sign = static_cast<uint16_t>(all >> 48 & 0x8000u);
  const double magnitude = std::fabs(value);
  constexpr uint64_t kBias = Format::kMaxExponent;
  constexpr auto kInfinity = static_cast<uint16_t>((2 * kBias + 1) << kBits);
  int exponent = static_cast<int>(all >> 52 & 0x7ffu) - 1023;
  if (exponent > Format::kMaxExponent) return sign | kInfinity;
  if (exponent < Format::kMinExponent) exponent = Format::kMinExponent;
  // Added and taken off again, a power of two 52 bits above the last bit wanted rounds to that bit.
  const double power = bits_of<double>(static_cast<uint64_t>(exponent - kBits + 52 + 1023) << 52);
  const double result = (magnitude + power) - power;
  if (result < bits_of<double>(static_cast<uint64_t>(Format::kMinExponent + 1023) << 52)) {
    return sign |
           static_cast<uint16_t>(
               result * bits_of<double>(static_cast<uint64_t>(kBits - Format::kMinExponent + 1023) << 52));
  }
  return sign |
         static_cast<uint16_t>((bits_of<uint64_t>(result) >> (52 - kBits)) - ((1023 - kBias) << kBits));
}

// a + b so that a later rounding to a shorter format is the only one: where the sum is not exact, its last
// bit is odd (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using
// rounding to odd").
inline double sum_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double b_part = sum - a;
  const double error = (a - (sum - b_part)) + (b - b_part);
  uint64_t bits = bits_of<uint64_t>(sum);
  if (error != 0.0 && (bits & 1u) == 0) bits += (error > 0.0) == (sum > 0.0) ? 1 : -1;
  return bits_of<double>(bits);
}

// a * b + c of one pair: the product of two 16-bit floats is exact in a double.
template <typename Format>
uint16_t fma(uint16_t a, uint16_t b, uint16_t c) {
  const double product = static_cast<double>(Format::widened(a)) * Format::widened(b);
  return rounded<Format>(sum_to_odd(product, Format::widened(c)));
}

}  // namespace emulator
