// The measured ways of choices_table.h, and which of them a problem gets: that of the most similar one.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "qsun/wna16_panels.h"
#include "wna16/choices_table.h"

namespace qsun {

constexpr int64_t kMostMeasuredTokens = 256;  // of the kernel for many tokens

// How far two sizes are apart: powers of two.
inline double distance(int64_t a, int64_t b) {
  return std::abs(std::log2(static_cast<double>(a) / static_cast<double>(b)));
}

// The entry of the matrix that is most like this one, at the next number of tokens; null when there is none.
template <typename Measured, size_t kSize>
const Measured* most_similar(const std::array<Measured, kSize>& table, const Wna16PanelsParams& p) {
  const Measured* best = nullptr;
  double best_distance = 0;
  for (const Measured& one : table) {
    if (one.M < p.M) continue;
    // Tokens count for little, but decide between entries of one matrix.
    const double far = distance(one.K, p.K) + distance(one.N, p.N) + 1e-3 * distance(one.M, p.M);
    if (best == nullptr || far < best_distance) best = &one, best_distance = far;
  }
  return best;
}

}  // namespace qsun
