// The measured ways of choices_table.h, and which of them a problem gets: that of the most similar one.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "qsun/wna16_panels.h"
#include "wna16/choices_table.h"

namespace qsun {

constexpr int64_t kMostMeasuredTokens = 256;  // of the kernel for many tokens
constexpr int kMainBits = 4;                  // the width whose entries cover every matrix

// How far two sizes are apart: powers of two.
inline double distance(int64_t a, int64_t b) {
  return std::abs(std::log2(static_cast<double>(a) / static_cast<double>(b)));
}

// The entry of the weight that is most like this one, at the next number of tokens; null when there is none.
// Entries of the weight's own width count, and W4's, which are of more matrices: another width is as far as a
// factor of two in a size.
template <typename Measured, size_t kSize>
const Measured* most_similar(const std::array<Measured, kSize>& table, const Wna16PanelsParams& p) {
  const Measured* best = nullptr;
  double best_distance = 0;
  for (const Measured& one : table) {
    if (one.M < p.M || (one.bits != p.bits && one.bits != kMainBits)) continue;
    // Tokens count for little, but decide between entries of one matrix.
    const double far = distance(one.K, p.K) + distance(one.N, p.N) + 1e-3 * distance(one.M, p.M) +
                       (one.bits == p.bits ? 0 : 1);
    if (best == nullptr || far < best_distance) best = &one, best_distance = far;
  }
  return best;
}

// What use(entries of the streaming kernel, entries of the one for many tokens) makes of those that count for
// a call: measured in layers where it is one of a layer's, and with more tokens in any case.
template <typename Use>
auto with_measured(const Wna16PanelsParams& p, Use&& use) {
  if (p.in_layer || p.M > kMaxPendingRows) return use(kStreamInLayers, kGemmInLayers);
  return use(kStreamMeasured, kGemmMeasured);
}

// Whether the kernel for many tokens takes less than the streaming one, by the times of one weight: where the
// entries that a problem gets are of two, because only one of the kernels was measured with its own width, by
// those of W4. More tokens than were streamed anywhere are many.
template <typename Streams, typename Gemms>
bool gemm_is_faster(const Streams& streams, const Gemms& gemms, Wna16PanelsParams p) {
  const auto* stream = most_similar(streams, p);
  const auto* gemm = most_similar(gemms, p);
  if (stream != nullptr && (stream->bits != gemm->bits || stream->K != gemm->K || stream->N != gemm->N)) {
    p.bits = kMainBits;
    stream = most_similar(streams, p), gemm = most_similar(gemms, p);
  }
  return stream == nullptr || gemm->us < stream->us;
}

}  // namespace qsun
