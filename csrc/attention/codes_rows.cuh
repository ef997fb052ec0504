// Eight or sixteen query rows of a warp, and what they make of 32 tokens of codes.
//
//   scores (tokens x rows) = keys (16 tokens x 16 elements) * q (16 elements x 8 rows)
//   out.T (elements x rows) += values.T (16 elements x 16 tokens) * weights (16 tokens x 8 rows)
//
// Codes are operand A in both: a group of up to eight query heads fills the 8 columns of operand B, where as
// the 16 rows of operand A it would leave half of every product, and of the registers for the result, empty.
// Weights go from the accumulator to operand B by a transposition of 8 x 8 in registers.
//
// All products are of float16 (see device/code_pairs.cuh), sums are float32. Nothing is rounded for that
// which would not be in q's own dtype:
//
//   q        times a power of two that brings the warp's largest to 2^14 .. 2^15: exact down to 2^-28 of
//            that, and bfloat16 elements below 2^-38 of it are lost. The power comes back with the scale of
//            scores.
//   weights  exp2(score - reference) * (scale of the value): a number far from 1 where scales are. So the
//            reference is the running maximum of score + log2(scale) without the lift of float16 weights
//            (rows.cuh), which makes it at most 2^15, about. The sum of exp2(score - reference) without the
//            scale is float32; as it and the result belong to the same reference, whatever merges them later
//            need not know.
#pragma once

#include "attention/codes_copies.cuh"
#include "attention/rows.cuh"
#include "device/exponent.cuh"

namespace qsun {
namespace {

// Below, a scale no longer moves the reference: exponentials stay within float32 where values are zero.
constexpr float kLeastLogScale = kLift - 100.0f;

template <int kHeadDim, int kTiles>  // of kHeadTile rows
struct CodesRows {                   // lane = 4 g + t
  uint32_t q[kTiles][kHeadDim / 16][2];
  float out[kTiles][kHeadDim / 16][4];  // element 2i of rows 2t, 2t+1, then 2i + 1 of both
  float maximum[kTiles][2];             // of row 2t + j; the reference, see above
  float sum[kTiles][2];                 // this lane's share
  int last[kTiles][2];                  // position that the row attends to
  float score_scale;                    // of a product, with that of q and of all keys
};

__device__ __forceinline__ float low_float(uint32_t pair, bool is_bfloat16) {
  return is_bfloat16 ? __uint_as_float(pair << 16) : to_float(as_pair<__half>(pair).x);
}
__device__ __forceinline__ float high_float(uint32_t pair, bool is_bfloat16) {
  return is_bfloat16 ? __uint_as_float(pair & 0xffff0000u) : to_float(as_pair<__half>(pair).y);
}

// Rows past the last repeat it: nobody stores them.
template <DType kCodes, int kHeadDim, int kTiles>
__device__ __forceinline__ void begin_rows(CodesRows<kHeadDim, kTiles>& rows, const TilesArguments& a,
                                           const Share& share, uint32_t places, int first_row, int lane) {
  using Layout = CodesLayout<kCodes, kHeadDim>;
  constexpr int kPairs = Layout::kWordElements / 2;  // of a word
  const bool is_bfloat16 = a.p.dtype == DType::kBFloat16;

  // Load, as neighbours lie
  float largest = 0.0f;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const RowPlace place = load_row_place(places, min(first_row + n * kHeadTile + lane / 4, a.rows - 1));
    const auto* source = static_cast<const uint16_t*>(a.p.q) +
                         (share.request * a.p.q_len + place.token) * a.p.q_stride +
                         (share.head * a.group + place.head) * kHeadDim;
#pragma unroll
    for (int word = 0; word < kHeadDim / 4 / Layout::kWordElements; ++word) {
      const int load = word / Layout::kKeyWords * 4 + lane % 4;
      const int element = (load * Layout::kKeyWords + word % Layout::kKeyWords) * Layout::kWordElements;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const uint32_t pair = *reinterpret_cast<const uint32_t*>(source + element + i * 2);
        rows.q[n][(word * kPairs + i) / 2][i % 2] = pair;
        const float low = fabsf(low_float(pair, is_bfloat16)), high = fabsf(high_float(pair, is_bfloat16));
        largest = fmaxf(largest, fmaxf(low < INFINITY ? low : 0.0f, high < INFINITY ? high : 0.0f));
      }
    }
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }

  // Scale, and pair as codes are
  const int exponent = max(static_cast<int>(__float_as_uint(largest) >> 23), 15);
  const float factor =
      __uint_as_float(static_cast<uint32_t>(268 - exponent) << 23);  // 2^(14 + 127 - exponent)
  const float inverse = __uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
  const bool per_tensor = a.p.kv_scales == KvScales::kTensor;
  rows.score_scale = a.score_scale * inverse * (per_tensor ? *a.p.k_scale : 1.0f);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int word = 0; word < kHeadDim / 4 / Layout::kWordElements; ++word) {
      float values[Layout::kWordElements];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const uint32_t pair = rows.q[n][(word * kPairs + i) / 2][i % 2];
        values[2 * i] = low_float(pair, is_bfloat16) * factor;
        values[2 * i + 1] = high_float(pair, is_bfloat16) * factor;
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        rows.q[n][(word * kPairs + i) / 2][i % 2] =
            round_pair<__half>(values[element_of_pair<kCodes>(i, 0)], values[element_of_pair<kCodes>(i, 1)]);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = first_row + n * kHeadTile + lane % 4 * 2 + j;
      const RowPlace place = load_row_place(places, min(row, a.rows - 1));
      rows.last[n][j] = share.length - static_cast<int>(a.p.q_len) + place.token;
      rows.maximum[n][j] = -INFINITY;
      rows.sum[n][j] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) rows.out[n][i][c] = 0.0f;
    }
  }
}

// Whether some row does not attend to all of the 32 tokens from `token` on, or they are not all of the share.
__device__ __forceinline__ bool is_slice_masked(const TilesArguments& a, const Share& share, int token) {
  return token + kSliceTokens >
             min(share.length - static_cast<int>(a.p.q_len) + 1, share.end * kQuarterTokens) ||
         token < share.length - a.window;
}

// This lane's addresses in a slice.
struct SliceAddresses {
  uint32_t keys;                       // of the row's token
  uint32_t first_value, second_value;  // of the tokens of a pair
  uint32_t scales;                     // of the row's token

  template <typename Layout>
  static __device__ __forceinline__ SliceAddresses of(int lane) {
    const int g = lane / 4, t = lane % 4;
    const int token = Layout::token_of_row(g);
    return {Layout::key_offset(token, t),
            Layout::kValues + Layout::value_offset(Layout::first_token_of_pair(t), g),
            Layout::kValues + Layout::value_offset(Layout::second_token_of_pair(t), g),
            static_cast<uint32_t>(Layout::kScales + token * 4)};
  }
};

// Attends to the 32 tokens from `token` on, which lie at `slice`.
template <DType kCodes, int kHeadDim, int kTiles>
__device__ __forceinline__ void attend(CodesRows<kHeadDim, kTiles>& rows, const TilesArguments& a,
                                       const Share& share, const SliceAddresses& addresses, uint32_t slice,
                                       int token, int lane) {
  using Layout = CodesLayout<kCodes, kHeadDim>;
  constexpr int kWordElements = Layout::kWordElements;
  constexpr int kHalfRows = 8 * Layout::kRow;  // from a token to that of row g + 8

  // Products
  float scores[kSliceQuarters][kTiles][4] = {};
#pragma unroll
  for (int j = 0; j < Layout::kKeyLoads; ++j) {
#pragma unroll
    for (int u = 0; u < kSliceQuarters; ++u) {
      uint32_t words[2][Layout::kKeyWords];
      const uint32_t keys = Layout::key_load(slice + addresses.keys, j) + u * 2 * kHalfRows;
      load_words(words[0], keys);
      load_words(words[1], keys + kHalfRows);
#pragma unroll
      for (int m = 0; m < Layout::kKeyWords; ++m) {
        uint32_t upper[kWordElements / 2], lower[kWordElements / 2];
        pairs_of_word<kCodes>(words[0][m], upper);
        pairs_of_word<kCodes>(words[1][m], lower);
#pragma unroll
        for (int i = 0; i < kWordElements / 4; ++i) {
          const uint32_t k[4] = {upper[2 * i], lower[2 * i], upper[2 * i + 1], lower[2 * i + 1]};
          const int at = (j * Layout::kKeyWords + m) * (kWordElements / 4) + i;
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            mma_m16n8k16<__half>(scores[u][n], k, rows.q[n][at][0], rows.q[n][at][1]);
          }
        }
      }
    }
  }

  // Scales of the lane's four tokens: u, and row g or g + 8
  float key_scales[kSliceQuarters][2], value_scales[kSliceQuarters][2];
#pragma unroll
  for (int u = 0; u < kSliceQuarters; ++u) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      key_scales[u][h] = rows.score_scale;
      value_scales[u][h] = 1.0f;
      if (a.p.kv_scales == KvScales::kToken) {
        const uint32_t place = slice + addresses.scales + (u * kQuarterTokens + h * 8) * 4;
        key_scales[u][h] *= load_shared_f32(place);
        value_scales[u][h] = load_shared_f32(place + kSliceTokens * 4);
      }
    }
  }

  // Scores
  const bool masked = is_slice_masked(a, share, token);
#pragma unroll
  for (int u = 0; u < kSliceQuarters; ++u) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) scores[u][n][c] *= key_scales[u][c / 2];
    }
  }
  if (a.softcap != 0.0f) {
#pragma unroll
    for (int u = 0; u < kSliceQuarters; ++u) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) scores[u][n][c] = a.softcap * tanh_of(scores[u][n][c]);
      }
    }
  }
  if (masked) {
    const int end = share.end * kQuarterTokens;
#pragma unroll
    for (int u = 0; u < kSliceQuarters; ++u) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int position = token + u * kQuarterTokens + Layout::token_of_row(lane / 4) + h * 8;
        // Of a token that no row attends to the scale may be anything.
        if (position < share.first || position >= min(share.length, end)) value_scales[u][h] = 0.0f;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int last = rows.last[n][j];
            const bool is_visible = position <= last && position > last - a.window && position < end;
            float& score = scores[u][n][h * 2 + j];
            score = is_visible ? score : -INFINITY;
          }
        }
      }
    }
  }

  // Softmax: scores become weights
  float logs[kSliceQuarters][2];
#pragma unroll
  for (int u = 0; u < kSliceQuarters; ++u) {
#pragma unroll
    for (int h = 0; h < 2; ++h) logs[u][h] = fmaxf(fast_log2(fabsf(value_scales[u][h])), kLeastLogScale);
  }
  uint32_t weights[kSliceQuarters][kTiles][2];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float decay[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float maximum = -INFINITY;
#pragma unroll
      for (int u = 0; u < kSliceQuarters; ++u) {
        maximum = fmaxf(maximum, fmaxf(scores[u][n][j] + logs[u][0], scores[u][n][2 + j] + logs[u][1]));
      }
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2) {
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, distance));
      }
      maximum = fmaxf(maximum, rows.maximum[n][j]);
      const float reference = reference_of(maximum);
      decay[j] = fast_exp2(rows.maximum[n][j] - reference);
      rows.maximum[n][j] = maximum;
      float sum = rows.sum[n][j] * decay[j];
#pragma unroll
      for (int u = 0; u < kSliceQuarters; ++u) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& score = scores[u][n][h * 2 + j];
          score = fast_exp2(score - reference + kLift);
          sum += score;
          score *= value_scales[u][h];
        }
      }
      rows.sum[n][j] = sum;
    }
#pragma unroll
    for (int u = 0; u < kSliceQuarters; ++u) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        weights[u][n][h] = transpose_matrix(round_pair<__half>(scores[u][n][h * 2], scores[u][n][h * 2 + 1]));
      }
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) rows.out[n][i][c] *= decay[c % 2];
    }
  }

  // Values
#pragma unroll
  for (int u = 0; u < kSliceQuarters; ++u) {
#pragma unroll
    for (int j = 0; j < Layout::kValueLoads; ++j) {
      uint32_t words[2][2][Layout::kValueWords];  // tokens of a pair and of that 8 further, first and second
      const uint32_t offset = slice + u * 2 * kHalfRows + j * Layout::kValueLoad;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        load_words(words[h][0], offset + addresses.first_value + h * kHalfRows);
        load_words(words[h][1], offset + addresses.second_value + h * kHalfRows);
      }
#pragma unroll
      for (int m = 0; m < Layout::kValueWords; ++m) {
        uint32_t near[kWordElements], far[kWordElements];
        pairs_of_words<kCodes>(words[0][0][m], words[0][1][m], near);
        pairs_of_words<kCodes>(words[1][0][m], words[1][1][m], far);
#pragma unroll
        for (int i = 0; i < kWordElements / 2; ++i) {
          const uint32_t v[4] = {near[2 * i], near[2 * i + 1], far[2 * i], far[2 * i + 1]};
          const int at = (j * Layout::kValueWords + m) * (kWordElements / 2) + i;
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            mma_m16n8k16<__half>(rows.out[n][at], v, weights[u][n][0], weights[u][n][1]);
          }
        }
      }
    }
  }
}

// Puts the sums of a row together, which lie in eight lanes, without their lift. That of the result stays:
// kUnlift.
template <int kHeadDim, int kTiles>
__device__ __forceinline__ void end_rows(CodesRows<kHeadDim, kTiles>& rows) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2) {
        rows.sum[n][j] += __shfl_xor_sync(kAllLanes, rows.sum[n][j], distance);
      }
      rows.sum[n][j] *= kUnlift;
    }
  }
}

}  // namespace
}  // namespace qsun
