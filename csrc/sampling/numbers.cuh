// The numbers of sample_tokens, the same bits here as in qsun_kernels/backends/reference: masses, noise, and
// orders in which floats compare as integers.
#pragma once

#include <cstdint>

namespace qsun {
namespace {

// ---- order

// Integers in the order of the floats; -0 is 0. Not for NaN.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (bits == 0x80000000u) return 0x80000000u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t order) {
  return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

constexpr uint32_t kOrderedLowest = 0x00800000u;   // of the finite floats
constexpr uint32_t kOrderedHighest = 0xff7fffffu;  // of the finite floats
constexpr uint32_t kOrderedNaN = 0xffffffffu;      // ours: above everything

// A value and its index: the larger one has the larger value or, among equals, the lower index. 0: none.
using Candidate = uint64_t;

__device__ __forceinline__ Candidate candidate(uint32_t order, uint32_t index) {
  return static_cast<uint64_t>(order) << 32 | (0xffffffffu - index);
}
__device__ __forceinline__ uint32_t order_of(Candidate c) { return static_cast<uint32_t>(c >> 32); }
__device__ __forceinline__ uint32_t index_of(Candidate c) { return 0xffffffffu - static_cast<uint32_t>(c); }

// ---- mass

// About 2^40 exp(-distance), in integers, so that sums are the same in every order: the constants and the
// steps are those of reference/sample_tokens.py, relative_mass.
__device__ __forceinline__ uint64_t relative_mass(float distance) {
  const uint32_t fixed = static_cast<uint32_t>(fminf(distance, 31.0f) * 0x1p27f);
  const uint32_t exponent = __umulhi(fixed, 1549082005u);  // to the base 2, 25 bits of fraction
  const uint32_t fraction = exponent << 7;
  uint32_t power = 2016033u;
  power = 19732393u - __umulhi(power, fraction);
  power = 118712300u - __umulhi(power, fraction);
  power = 515765849u - __umulhi(power, fraction);
  power = 1488511653u - __umulhi(power, fraction);
  power = 2147483487u - __umulhi(power, fraction);
  return static_cast<uint64_t>(power) << 9 >> (exponent >> 25);
}

// ---- noise

// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, fig. 16) at place `index` of the stream that starts at `key`.
__device__ __forceinline__ uint64_t uniform_bits(uint64_t key, uint32_t index) {
  uint64_t bits = key + (static_cast<uint64_t>(index) + 1) * 0x9E3779B97F4A7C15ull;
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
  return bits ^ (bits >> 31);
}

// A Gumbel variable, in float64 and rounded once, as reference/gumbel_noise.py has it.
__device__ __forceinline__ float gumbel(uint64_t bits) {
  const double uniform = (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
  return static_cast<float>(-log(-log(uniform)));
}

// At least gumbel(bits), and little more where that is large, for a tenth of the work: -log(-log(u)) is at
// most -log(1 - u), and the high half of ~bits is 1 - u to 32 bits, rounded down. The last 0.001 covers the
// rounding of this and of a difference to a distance of up to 64.
__device__ __forceinline__ float gumbel_bound(uint64_t bits) {
  return 22.1817f - __logf(static_cast<float>(~static_cast<uint32_t>(bits >> 32)));
}

}  // namespace
}  // namespace qsun
