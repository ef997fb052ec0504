// The copies of a warp's slices of codes and scales, ahead of the multiplication.
#pragma once

#include "attention/codes_layout.cuh"
#include "attention/walk.cuh"

namespace qsun {
namespace {

// Quarters (16 tokens, in one block of the cache) of a slice, and of a step of all warps.
constexpr int kSliceQuarters = kSliceTokens / kQuarterTokens;
constexpr int kStepQuarters = kSliceQuarters * kSlices;

template <DType kCodes, int kHeadDim, bool kCutFirst>
struct CodesCopies {
  using Layout = CodesLayout<kCodes, kHeadDim>;
  static constexpr int kSteps = kWarp / kSliceQuarters;  // whose blocks one load fetches

  Walk<Line::kWholeRequests, kCutFirst> walk;
  int warp, lane;
  uint64_t policy;
  int step;   // of the share, that are copied
  int block;  // lane i: the block of quarter i % 2 of the slice at step (step / 16 * 16 + i / 2)

  __device__ __forceinline__ void fetch_blocks() {
    const Share& s = walk.share;
    const TilesArguments& a = walk.a;
    const int quarter = s.begin + (step + lane / kSliceQuarters) * kStepQuarters + warp * kSliceQuarters +
                        lane % kSliceQuarters;
    block = 0;
    if (quarter >= s.end) return;
    block = load_settled(a.p.block_table + s.request * a.p.block_table_stride +
                         (quarter * kQuarterTokens >> a.block_log2));
    trap_unless(block >= 0 && block < a.p.num_blocks);
  }

  // Goes on to the share that holds the next step.
  __device__ __forceinline__ void seek() {
    while (!walk.is_done() && walk.share.begin + step * kStepQuarters >= walk.share.end) {
      walk.template advance<true>();
      step = 0;
    }
  }

  // Whether next() may be called before wait_for_producers().
  __device__ __forceinline__ bool next_is_settled() {
    seek();
    const int quarter = walk.share.begin + step * kStepQuarters + warp * kSliceQuarters;
    return walk.is_done() || quarter >= walk.share.end ||
           quarter * kQuarterTokens + kSliceTokens <= walk.settled_end();
  }

  // Copies the next slice to `target`: keys, values, scales.
  __device__ __forceinline__ void next(uint32_t target) {
    seek();
    if (walk.is_done()) return;
    const Share& s = walk.share;
    const TilesArguments& a = walk.a;
    if (step % kSteps == 0) fetch_blocks();
    const int quarter = s.begin + step * kStepQuarters + warp * kSliceQuarters;
    const int64_t blocks[kSliceQuarters] = {
        __shfl_sync(kAllLanes, block, step % kSteps * kSliceQuarters),
        __shfl_sync(kAllLanes, block, step % kSteps * kSliceQuarters + 1)};
    ++step;
    if (quarter >= s.end) return;
    const int token = quarter * kQuarterTokens;
    const int end = min(s.length, s.end * kQuarterTokens);
    const bool is_inside = token >= s.first && token + kSliceTokens <= end;
    int64_t rows[kSliceQuarters];
#pragma unroll
    for (int h = 0; h < kSliceQuarters; ++h) {
      const int in_block = token + h * kQuarterTokens & ((1 << a.block_log2) - 1);
      rows[h] = ((blocks[h] * a.p.num_kv_heads + s.head) << a.block_log2) + in_block;
      const auto* k = static_cast<const unsigned char*>(a.p.k_cache) + rows[h] * Layout::kRow + lane * 16;
      const auto* v = static_cast<const unsigned char*>(a.p.v_cache) + rows[h] * Layout::kRow + lane * 16;
      const uint32_t place = target + h * kQuarterTokens * Layout::kRow;
      constexpr int kCopies = kQuarterTokens * Layout::kPieces / kWarp;
      if (is_inside) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          copy_async_streamed(place + offset_of(i), k + i * kWarp * 16, policy);
        }
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          copy_async_streamed(place + Layout::kValues + offset_of(i), v + i * kWarp * 16, policy);
        }
      } else {
        // Zeros for tokens that are not attended to: what lies there may be anything.
#pragma unroll 1
        for (int i = 0; i < kCopies; ++i) {
          const int position = token + h * kQuarterTokens + (i * kWarp + lane) / Layout::kPieces;
          const int bytes = position >= s.first && position < end ? 16 : 0;
          copy_async_streamed_or_zero(place + offset_of(i), k + i * kWarp * 16, bytes, policy);
          copy_async_streamed_or_zero(place + Layout::kValues + offset_of(i), v + i * kWarp * 16, bytes,
                                      policy);
        }
      }
    }
    if (a.p.kv_scales == KvScales::kToken) copy_scales(target, token, rows[0], rows[1], end);
  }

  // Four lanes a quarter for the scales of keys, four for those of values, four scales each. Of four scales
  // of which some are attended to all come, and the others are not looked at.
  __device__ __forceinline__ void copy_scales(uint32_t target, int token, int64_t first, int64_t second,
                                              int end) const {
    if (lane >= 8 * kSliceQuarters) return;
    const int piece = lane % 4, h = lane / 8;
    const bool is_value = lane / 4 % 2 != 0;
    const float* source =
        (is_value ? walk.a.p.v_scale : walk.a.p.k_scale) + (h == 0 ? first : second) + piece * 4;
    const int position = token + h * kQuarterTokens + piece * 4;
    const int bytes = position + 4 > walk.share.first && position < end ? 16 : 0;
    const uint32_t place = target + Layout::kScales + (is_value ? kSliceTokens * 4 : 0) + h * 64 + piece * 16;
    copy_async_streamed_or_zero(place, source, bytes, policy);
  }

  // Where this lane's i-th piece of a quarter goes.
  __device__ __forceinline__ uint32_t offset_of(int i) const {
    constexpr int kTokens = kWarp / Layout::kPieces;  // of a copy
    const int token = lane / Layout::kPieces;
    uint32_t place = token * Layout::kRow + (lane % Layout::kPieces ^ Layout::swizzle(token)) * 16;
    if constexpr (kTokens % 4 != 0) {  // the next copy's tokens are swizzled in another way
      static_assert(kTokens == 2);
      place ^= i % 2 * 64;
    }
    return place + i * kTokens * Layout::kRow;
  }
};

}  // namespace
}  // namespace qsun
