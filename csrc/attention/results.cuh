// The end of a part's share of a request: where its rows go, and the merge of several parts.
#pragma once

#include "attention/rows.cuh"
#include "device/vector.cuh"

namespace qsun {
namespace {

constexpr float kLn2 = 0.6931471805599453f;

// What turns sums relative to a maximum into a result.
struct RowTotal {
  float factor;  // of the values
  float lse;     // to the base 2
};

// sink: to the base 2; -infinity for none.
__device__ __forceinline__ RowTotal total_of(float maximum, float sum, float sink) {
  const float higher = fmaxf(maximum, sink);
  const float reference = reference_of(higher);
  const float own = exp2f(maximum - reference);
  sum = sum * own + exp2f(sink - reference);
  const bool is_empty = higher == -INFINITY && sum == 0.0f;
  return {sum == 0.0f ? 0.0f : own / sum, is_empty ? -INFINITY : higher + log2f(sum)};
}

// The first row of a request, by its place in the order, that a part of the line of prefixes leaves in
// scratch (prefix_scratch_rows).
__device__ __forceinline__ int64_t prefix_row(const TilesArguments& a, int part, int head, int member) {
  return static_cast<int64_t>(part) * kPrefixRows + (head * a.p.batch + member) * a.rows;
}

// Where the launch for prefixes left a request's prefix: so many parts, rows kPrefixRows apart.
struct PrefixParts {
  int64_t row;  // the first row of the first part
  int count;
};

// Where a lane's e-th element of a row of head_dim lies while parts are merged: next to each other where a
// load takes several.
template <int kHeadDim>
__device__ __forceinline__ int element_of(int lane, int e) {
  constexpr int kElements = kHeadDim / kWarp;
  constexpr int kLoad = kElements % 4 == 0 ? 4 : kElements % 2 == 0 ? 2 : 1;  // of a load
  return e / kLoad * (kWarp * kLoad) + lane * kLoad + e % kLoad;
}

template <int kHeadDim>
__device__ __forceinline__ void load_part(const float* row, int lane, float (&values)[kHeadDim / kWarp]) {
  constexpr int kElements = kHeadDim / kWarp;
#pragma unroll
  for (int e = 0; e < kElements;) {
    const float* source = row + element_of<kHeadDim>(lane, e);
    if constexpr (kElements % 4 == 0) {
      const float4 four = load_past_l1(reinterpret_cast<const float4*>(source));
      values[e++] = four.x, values[e++] = four.y, values[e++] = four.z, values[e++] = four.w;
    } else if constexpr (kElements % 2 == 0) {
      const float2 two = load_past_l1(reinterpret_cast<const float2*>(source));
      values[e++] = two.x, values[e++] = two.y;
    } else {
      values[e++] = load_past_l1(source);
    }
  }
}

// A row to which parts are added in their order, by one warp. Sums are relative to the maximum so far.
//
// kAhead: parts that are asked for before one is looked at. Each round waits for the L2, which takes longer
// than all else that the merge does.
template <int kHeadDim, int kAhead>
struct MergedRow {
  static constexpr int kElements = kHeadDim / kWarp;  // of a lane

  float maximum = -INFINITY;
  float sum = 0.0f;  // this lane's share
  float values[kElements] = {};

  // row_at(i): the i-th part's row in `from`.
  template <typename RowAt>
  __device__ __forceinline__ void add(int count, const PartialRows& from, int lane, const RowAt& row_at) {
#pragma unroll 1
    for (int base = 0; base < count; base += kAhead) {
      const int some = min(count - base, kAhead);
      float lse = -INFINITY;  // of the lane's part
      if (lane < some) lse = load_past_l1(from.lse + row_at(base + lane));
      float loaded[kAhead][kElements] = {};
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (i < some) load_part<kHeadDim>(from.out + row_at(base + i) * kHeadDim, lane, loaded[i]);
      }
      float highest = fmaxf(maximum, lse);
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, distance));
      }
      const float reference = reference_of(highest);
      const float kept = exp2f(maximum - reference), weight = exp2f(lse - reference);
      maximum = highest;
      sum = sum * kept + weight;
#pragma unroll
      for (int e = 0; e < kElements; ++e) values[e] *= kept;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float of_part = __shfl_sync(kAllLanes, weight, i);  // 0 from part `some` on
#pragma unroll
        for (int e = 0; e < kElements; ++e) values[e] += of_part * loaded[i][e];
      }
    }
  }
};

// Results of one request under one key head. In one part and without a shared prefix they are final; else the
// part's rows go to scratch. kMayShare: whether there are shared prefixes at all.
// kAhead: see MergedRow; as many as registers hold.
template <typename T, int kHeadDim, bool kMayShare = true, int kAhead = (kHeadDim > 128 ? 4 : 16)>
struct Results {
  const TilesArguments& a;
  const Share& share;
  uint32_t places;            // see load_row_place
  int first_part, last_part;  // of those with tiles of the request
  int part;

  // A request begins after position 0 within a window, or behind a shared prefix: never both.
  __device__ __forceinline__ bool has_prefix() const {
    return kMayShare && a.prefixes.of_request != nullptr && share.first > 0;
  }
  __device__ __forceinline__ bool is_whole() const { return first_part == last_part && !has_prefix(); }

  __device__ __forceinline__ PrefixParts prefix_parts() const {
    if (!has_prefix()) return {0, 0};
    const PlanHeader line = *a.prefixes.line.header;
    const RequestPrefix prefix = a.prefixes.of_request[share.request];
    const int start = share.head * (line.total / static_cast<int>(a.p.num_kv_heads)) + prefix.start;
    const int first = (start + 1) / line.share, last = (start + prefix.tokens / kTileTokens) / line.share;
    return {prefix_row(a, first, share.head, prefix.member), last - first + 1};
  }

  // Row of (batch * q_len, num_q_heads).
  __device__ __forceinline__ int64_t row_of(RowPlace place) const {
    return (share.request * a.p.q_len + place.token) * a.p.num_q_heads + share.head * a.group + place.head;
  }
  __device__ __forceinline__ float sink_of(RowPlace place) const {
    return a.p.sinks == nullptr ? -INFINITY : a.p.sinks[share.head * a.group + place.head] * kLog2E;
  }
  __device__ __forceinline__ int64_t slot_row(int of_part, int row) const {
    return static_cast<int64_t>(2 * of_part + (of_part == first_part ? 1 : 0)) * a.rows + row;
  }

  // What the row's values are to be multiplied by; stores its lse if `stores`.
  __device__ __forceinline__ float end_row(int row, float maximum, float sum, bool stores) const {
    const RowPlace place = load_row_place(places, row);
    const RowTotal total = total_of(maximum, sum, is_whole() ? sink_of(place) : -INFINITY);
    if (stores) {
      if (is_whole()) {
        a.p.lse[row_of(place)] = total.lse * kLn2;
      } else {
        a.partial.lse[slot_row(part, row)] = total.lse;
      }
    }
    return total.factor;
  }

  // Where a row's values go: as T when is_whole().
  __device__ __forceinline__ T* target(int row) const {
    return static_cast<T*>(a.p.out) + row_of(load_row_place(places, row)) * kHeadDim;
  }
  __device__ __forceinline__ float* partial_target(int row) const {
    return a.partial.out + slot_row(part, row) * kHeadDim;
  }

  // Puts the parts' rows together, those of the prefix in front, in the order of the parts. A warp a row; all
  // lanes take part.
  __device__ __forceinline__ void merge(int warp, int warps, int lane) const {
    const PrefixParts prefix = prefix_parts();
#pragma unroll 1
    for (int row = warp; row < a.rows; row += warps) {
      MergedRow<kHeadDim, kAhead> merged;
      if (prefix.count > 0) {
        merged.add(prefix.count, a.prefix_rows, lane,
                   [&](int i) { return prefix.row + static_cast<int64_t>(i) * kPrefixRows + row; });
      }
      merged.add(last_part - first_part + 1, a.partial, lane,
                 [&](int i) { return slot_row(first_part + i, row); });
      const RowPlace place = load_row_place(places, row);
      const RowTotal total = total_of(merged.maximum, warp_sum(merged.sum), sink_of(place));
      T* out = target(row);
#pragma unroll
      for (int e = 0; e < kHeadDim / kWarp; ++e) {
        out[element_of<kHeadDim>(lane, e)] = from_float<T>(merged.values[e] * total.factor);
      }
      if (lane == 0) a.p.lse[row_of(place)] = total.lse * kLn2;
    }
  }
};

// What a part has of a prefix: rows of their own in scratch, which the launch behind this one merges.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_prefix_rows(const TilesArguments& a, const Share& share, int part,
                                                  const QueryRows<kHeadDim>& rows, int first_row, int lane) {
  const int64_t target = prefix_row(a, part, share.head, share.members >> 8);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + half * 8 + lane / 4;
    if (row >= rows_of<true>(a, share)) continue;
    const RowTotal total = total_of(rows.maximum[half], rows.sum[half], -INFINITY);
    if (lane % 4 == 0) a.prefix_rows.lse[target + row] = total.lse;
    float* out = a.prefix_rows.out + (target + row) * kHeadDim + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      *reinterpret_cast<float2*>(out + i * 8) =
          make_float2(rows.out[i][half * 2] * total.factor, rows.out[i][half * 2 + 1] * total.factor);
    }
  }
}

// Nothing to attend to: zeros, and the sink's lse.
template <typename T, int kHeadDim, bool kMayShare, int kAhead>
__device__ __forceinline__ void store_nothing(const Results<T, kHeadDim, kMayShare, kAhead>& results,
                                              int thread, int threads) {
  for (int i = thread; i < results.a.rows * kHeadDim; i += threads) {
    const int row = i / kHeadDim, element = i % kHeadDim;
    results.target(row)[element] = from_float<T>(0.0f);
    if (element == 0) results.end_row(row, -INFINITY, 0.0f, true);
  }
}

}  // namespace
}  // namespace qsun
