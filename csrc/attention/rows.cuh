// 16 query rows of a warp, and what they make of 16 positions, or of several times as many.
#pragma once

#include <type_traits>

#include "attention/walk.cuh"
#include "device/dtype.cuh"
#include "device/mma.cuh"
#include "device/packed_math.cuh"
#include "device/softmax.cuh"

namespace qsun {
namespace {

// What a query row is: a token of the request, and a head of the group; of a prefix, a token of one of the
// requests that share it.
struct RowPlace {
  int member;
  int token;
  int head;
};

// Rows' places lie in shared memory, a word each: to find one there is to avoid a division.
template <bool kIsPrefixes>
__device__ __forceinline__ void store_row_places(const TilesArguments& a, uint32_t places, int thread,
                                                 int threads) {
  for (int row = thread; row < (kIsPrefixes ? kPrefixRows : a.rows); row += threads) {
    const int member = kIsPrefixes ? row / a.rows : 0, of_member = row - member * a.rows;
    const int token = of_member / a.group;
    store_shared_u32(places + row * 4,
                     static_cast<uint32_t>(member << 24 | token << 16 | (of_member - token * a.group)));
  }
}
template <bool kIsPrefixes = false>
__device__ __forceinline__ RowPlace load_row_place(uint32_t places, int row) {
  const uint32_t word = load_shared_u32(places + row * 4);
  const int token = static_cast<int>(word >> 16), head = static_cast<int>(word & 0xffffu);
  if constexpr (kIsPrefixes) return {token >> 8, token & 0xff, head};
  return {0, token, head};
}

// Query rows of a share.
template <bool kIsPrefixes>
__device__ __forceinline__ int rows_of(const TilesArguments& a, const Share& share) {
  return kIsPrefixes ? (share.members & 0xff) * a.rows : a.rows;
}

// Operand A, and the running softmax of rows g and g + 8 (lane = 4 g + t): maximum to the base 2, this lane's
// share of the sum.
template <int kHeadDim>
struct QueryRows {
  uint32_t q[kHeadDim / 16][4];
  float out[kHeadDim / 8][4];
  float maximum[2];
  float sum[2];
  int visible[2][2];  // first and last position that the row attends to
};

// Rows past the last repeat it, or are zero where all of g + 8 are: nobody stores them.
template <typename T, bool kIsPrefixes, int kHeadDim>
__device__ __forceinline__ void begin_rows(QueryRows<kHeadDim>& rows, const TilesArguments& a,
                                           const Share& share, uint32_t places, int first_row, int lane) {
  const int num_rows = rows_of<kIsPrefixes>(a, share);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowPlace place =
        load_row_place<kIsPrefixes>(places, min(first_row + half * 8 + lane / 4, num_rows - 1));
    int request = share.request;
    if constexpr (kIsPrefixes) request = a.prefixes.order[(share.members >> 8) + place.member];
    const T* source = static_cast<const T*>(a.p.q) + (request * a.p.q_len + place.token) * a.p.q_stride +
                      (share.head * a.group + place.head) * kHeadDim + lane % 4 * 2;
    const bool is_read = half == 0 || first_row + 8 < num_rows;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      rows.q[i][half] = is_read ? *reinterpret_cast<const uint32_t*>(source + i * 16) : 0u;
      rows.q[i][half + 2] = is_read ? *reinterpret_cast<const uint32_t*>(source + i * 16 + 8) : 0u;
    }
    rows.maximum[half] = -INFINITY;
    rows.sum[half] = 0.0f;
    rows.visible[half][1] = share.length - static_cast<int>(a.p.q_len) + place.token;
    rows.visible[half][0] = rows.visible[half][1] - a.window + 1;
  }
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) rows.out[i][c] = 0.0f;
  }
}

// Whether some row does not attend to all of the 16 positions from `token` on.
__device__ __forceinline__ bool is_masked(const TilesArguments& a, const Share& share, int token) {
  return token + kQuarterTokens > share.length - static_cast<int>(a.p.q_len) + 1 ||
         token < share.length - a.window;
}

// Weights of float16 are lifted by a power of two until the largest is near the end of its range: a small one
// then keeps its digits, for elements of which the large ones have nothing. bfloat16 has the range of
// float32. The lift is added to a score's distance from the reference: beside a score of 2^24 it would be
// lost.
constexpr float kLift = 15.0f;
constexpr float kUnlift = 1.0f / (1 << 15);
template <typename T>
constexpr bool kIsLifted = std::is_same_v<T, __half>;

// tanh from one exponential. Its absolute error is that of a float near 1: what a score needs.
__device__ __forceinline__ float tanh_of(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2f(x * (2.0f * kLog2E)));
}

// Attends to the positions from `token` on, those of kSpan quarters. keys, values: this lane's addresses for
// the loads of the first quarter's operands.
template <typename T, int kSpan, int kHeadDim>
__device__ __forceinline__ void attend(QueryRows<kHeadDim>& rows, const TilesArguments& a, uint32_t keys,
                                       uint32_t values, int token, bool masked, int lane) {
  constexpr int kColumns = 2 * kSpan;  // tiles of 8 positions

  // Products
  float scores[kColumns][4] = {};
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
    for (int s = 0; s < kSpan; ++s) {
      uint32_t b[4];
      load_matrices(b, keys + s * kQuarterBytes<kHeadDim> + i * 32);
      mma_m16n8k16<T>(scores[2 * s], rows.q[i], b[0], b[1]);
      mma_m16n8k16<T>(scores[2 * s + 1], rows.q[i], b[2], b[3]);
    }
  }

  // Scores
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) scores[n][c] *= a.score_scale;
  }
  if (a.softcap != 0.0f) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) scores[n][c] = a.softcap * tanh_of(scores[n][c]);
    }
  }
  if (masked) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int position = token + n * 8 + lane % 4 * 2 + c % 2;
        const bool is_visible = position >= rows.visible[c / 2][0] && position <= rows.visible[c / 2][1];
        scores[n][c] = is_visible ? scores[n][c] : -INFINITY;
      }
    }
  }

  // Softmax: scores become weights
  float decay[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int c = half * 2;
    float maximum = fmaxf(scores[0][c], scores[0][c + 1]);
#pragma unroll
    for (int n = 1; n < kColumns; ++n) maximum = fmaxf(maximum, fmaxf(scores[n][c], scores[n][c + 1]));
    maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2));
    maximum = fmaxf(maximum, rows.maximum[half]);
    const float reference = reference_of(maximum);
    decay[half] = exp2f(rows.maximum[half] - reference);
    rows.maximum[half] = maximum;
    rows.sum[half] *= decay[half];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = c; i < c + 2; ++i) {
        scores[n][i] = exp2f(scores[n][i] - reference + (kIsLifted<T> ? kLift : 0.0f));
        rows.sum[half] += scores[n][i];
      }
    }
  }

  // Values
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) rows.out[i][c] *= decay[c / 2];
  }
#pragma unroll
  for (int s = 0; s < kSpan; ++s) {
    const auto& low = scores[2 * s];
    const auto& high = scores[2 * s + 1];
    const uint32_t weights[4] = {round_pair<T>(low[0], low[1]), round_pair<T>(low[2], low[3]),
                                 round_pair<T>(high[0], high[1]), round_pair<T>(high[2], high[3])};
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      uint32_t b[4];
      load_matrices_transposed(b, values + s * kQuarterBytes<kHeadDim> + i * 32);
      mma_m16n8k16<T>(rows.out[2 * i], weights, b[0], b[1]);
      mma_m16n8k16<T>(rows.out[2 * i + 1], weights, b[2], b[3]);
    }
  }
}

// Puts the sums of a row together, which lie in four lanes, and takes the lift off them and the result.
template <typename T, int kHeadDim>
__device__ __forceinline__ void end_rows(QueryRows<kHeadDim>& rows) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows.sum[half] += __shfl_xor_sync(kAllLanes, rows.sum[half], 1);
    rows.sum[half] += __shfl_xor_sync(kAllLanes, rows.sum[half], 2);
  }
  if constexpr (kIsLifted<T>) {
#pragma unroll
    for (int half = 0; half < 2; ++half) rows.sum[half] *= kUnlift;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) rows.out[i][c] *= kUnlift;
    }
  }
}

}  // namespace
}  // namespace qsun
