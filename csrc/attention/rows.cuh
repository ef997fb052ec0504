// 16 query rows of a warp, and what they make of 16 positions.
#pragma once

#include "attention/walk.cuh"
#include "device/dtype.cuh"
#include "device/mma.cuh"
#include "device/packed_math.cuh"
#include "device/softmax.cuh"

namespace qsun {
namespace {

// What a query row is: a token of the request, and a head of the group.
struct RowPlace {
  int token;
  int head;
};

// Rows' places lie in shared memory, a word each: to find one there is to avoid a division.
__device__ __forceinline__ void store_row_places(const TilesArguments& a, uint32_t places, int thread,
                                                 int threads) {
  for (int row = thread; row < a.rows; row += threads) {
    const int token = row / a.group;
    store_shared_u32(places + row * 4, static_cast<uint32_t>(token << 16 | (row - token * a.group)));
  }
}
__device__ __forceinline__ RowPlace load_row_place(uint32_t places, int row) {
  const uint32_t word = load_shared_u32(places + row * 4);
  return {static_cast<int>(word >> 16), static_cast<int>(word & 0xffffu)};
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
template <typename T, int kHeadDim>
__device__ __forceinline__ void begin_rows(QueryRows<kHeadDim>& rows, const TilesArguments& a,
                                           const Share& share, uint32_t places, int first_row, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowPlace place = load_row_place(places, min(first_row + half * 8 + lane / 4, a.rows - 1));
    const T* source = static_cast<const T*>(a.p.q) +
                      (share.request * a.p.q_len + place.token) * a.p.q_stride +
                      (share.head * a.group + place.head) * kHeadDim + lane % 4 * 2;
    const bool is_read = half == 0 || first_row + 8 < a.rows;
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

// tanh from one exponential. Its absolute error is that of a float near 1: what a score needs.
__device__ __forceinline__ float tanh_of(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2f(x * (2.0f * kLog2E)));
}

// Attends to the 16 positions from `token` on. keys, values: this lane's addresses for the loads of operands.
template <typename T, int kHeadDim>
__device__ __forceinline__ void attend(QueryRows<kHeadDim>& rows, const TilesArguments& a, uint32_t keys,
                                       uint32_t values, int token, bool masked, int lane) {
  // Products
  float scores[2][4] = {};
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) {
    uint32_t b[4];
    load_matrices(b, keys + i * 32);
    mma_m16n8k16<T>(scores[0], rows.q[i], b[0], b[1]);
    mma_m16n8k16<T>(scores[1], rows.q[i], b[2], b[3]);
  }

  // Scores
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) scores[n][c] *= a.score_scale;
  }
  if (a.softcap != 0.0f) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) scores[n][c] = a.softcap * tanh_of(scores[n][c]);
    }
  }
  if (masked) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
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
    float maximum = fmaxf(fmaxf(scores[0][c], scores[0][c + 1]), fmaxf(scores[1][c], scores[1][c + 1]));
    maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2));
    maximum = fmaxf(maximum, rows.maximum[half]);
    const float reference = reference_of(maximum);
    decay[half] = exp2f(rows.maximum[half] - reference);
    rows.maximum[half] = maximum;
    rows.sum[half] *= decay[half];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = c; i < c + 2; ++i) {
        scores[n][i] = exp2f(scores[n][i] - reference);
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
  const uint32_t weights[4] = {
      round_pair<T>(scores[0][0], scores[0][1]), round_pair<T>(scores[0][2], scores[0][3]),
      round_pair<T>(scores[1][0], scores[1][1]), round_pair<T>(scores[1][2], scores[1][3])};
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) {
    uint32_t b[4];
    load_matrices_transposed(b, values + i * 32);
    mma_m16n8k16<T>(rows.out[2 * i], weights, b[0], b[1]);
    mma_m16n8k16<T>(rows.out[2 * i + 1], weights, b[2], b[3]);
  }
}

// Puts the sums of a row together, which lie in four lanes.
template <int kHeadDim>
__device__ __forceinline__ void end_rows(QueryRows<kHeadDim>& rows) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows.sum[half] += __shfl_xor_sync(kAllLanes, rows.sum[half], 1);
    rows.sum[half] += __shfl_xor_sync(kAllLanes, rows.sum[half], 2);
  }
}

}  // namespace
}  // namespace qsun
