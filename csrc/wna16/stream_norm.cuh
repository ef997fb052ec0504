// A norm between two products without a launch of its own (stream.cuh): the product in front multiplies its
// outputs by the norm's weight and adds up their squares, the product behind divides its sums by the root.
//
//   product in front   out = r, norm_out = r * weight, squares = sums of 16 neighbouring r^2
//   product behind     x = norm_out, out = (x @ w.T) / sqrt(sum of squares / K + eps)
//
// So the loop of neither knows of it. A block of the product behind needs a factor a token, and only when its
// sums are done: it asks for the squares while x is on its way. Blocks of the product in front need not know
// of each other.
//
// The loop must stay as it is without them. So what a warp does together it does in loops whose turns are the
// same for all of its lanes: behind others the compiler no longer takes the warp for one.
#pragma once

#include <cstring>
#include <type_traits>

#include "device/async_copy.cuh"
#include "device/dtype.cuh"
#include "device/reduce.cuh"
#include "device/rms_norm.cuh"
#include "device/shared.cuh"
#include "wna16/stream_copies.cuh"
#include "wna16/stream_outputs.cuh"

namespace qsun {
namespace {

// A row before its norm is of any size: float16 might not hold it.
template <typename T>
constexpr bool kNormMayPend = std::is_same_v<T, __nv_bfloat16>;

template <typename T>
__device__ __forceinline__ bool leaves_norm(const Wna16PanelsParams& p) {
  return kNormMayPend<T> && p.squares != nullptr;
}

template <typename T>
__device__ __forceinline__ bool takes_norm(const Wna16PanelsParams& p) {
  return kNormMayPend<T> && p.x_squares != nullptr;
}

// ---- the product in front

// Brings the norm's weights for a block's first group of row tiles to the L2; before the wait.
template <typename T, int kRowTiles>
__device__ __forceinline__ void ask_for_norm_weights(const Wna16PanelsParams& p, int first_tile) {
  constexpr int kColumns = kSectorBytes / static_cast<int>(sizeof(T));
  const int64_t n = int64_t{first_tile} * kTileRows + threadIdx.x * kColumns;
  if (threadIdx.x < kRowTiles * kTileRows / kColumns && n < p.N) {
    prefetch_to_l2(static_cast<const T*>(p.norm_weight) + n);
  }
}

// Puts those weights into shared memory, where all threads find them behind a __syncthreads().
template <typename T, int kRowTiles>
__device__ __forceinline__ void keep_norm_weights(const Wna16PanelsParams& p, int first_tile,
                                                  uint32_t weights) {
#pragma unroll 1
  for (int column = static_cast<int>(threadIdx.x); column < kRowTiles * kTileRows;
       column += static_cast<int>(blockDim.x)) {
    const int64_t n = int64_t{first_tile} * kTileRows + column;
    if (n < p.N) store_shared_u16(weights + column * 2, bits_of(static_cast<const T*>(p.norm_weight)[n]));
  }
}

// What is left of the norm of a group of row tiles, token m0 the first of them. A thread has the outputs that
// it has stored, and finds them, as they were rounded, at `values`, in rows of part_row_floats(). weights: of
// these columns in shared memory; 0: they are not there.
template <typename T, int kRowTiles>
__device__ __forceinline__ void leave_norm(const Wna16PanelsParams& p,
                                           const TileOutputs<kRowTiles * kTileRows>& outputs, int m0,
                                           int warp, int warps, uint32_t lane, uint32_t values,
                                           uint32_t weights) {
  // Sixteen lanes have sixteen neighbouring columns of one token; all of them add, those past the last, too.
#pragma unroll 1
  for (int first = warp * kWarpLanes; first < outputs.count; first += warps * kWarpLanes) {
    const int i = first + lane, token = outputs.token(i), column = outputs.column(i);
    const bool is_inside = column < outputs.columns;
    const int64_t m = m0 + token, n = outputs.n0 + column;
    float value = 0.0f;
    if (is_inside) {
      value = load_shared_f32(values + (token * part_row_floats(kRowTiles) + column) * 4);
      T weight;
      if (weights != 0) {
        const auto bits = static_cast<uint16_t>(load_shared_u16(weights + column * 2));
        memcpy(&weight, &bits, sizeof(weight));
      } else {
        weight = static_cast<const T*>(p.norm_weight)[n];
      }
      static_cast<T*>(p.norm_out)[m * p.N + n] = from_float<T>(value * to_float(weight));
    }
    float squares = value * value;
#pragma unroll
    for (int distance = kSquaredColumns / 2; distance > 0; distance /= 2) {
      squares += __shfl_xor_sync(kAllLanes, squares, distance);
    }
    if (is_inside && column % kSquaredColumns == 0) {
      p.squares[m * sums_of_squares(p.N) + n / kSquaredColumns] = squares;
    }
  }
}

// ---- the product behind

// Puts 1 / sqrt(mean of squares + eps) of the block's tokens, from m0 on, to `roots` in shared memory, a
// float32 each, where all threads find them behind a __syncthreads(). After the wait. The last warps begin:
// they have the fewest columns.
__device__ __forceinline__ void find_roots(const Wna16PanelsParams& p, int m0, int x_rows, int warp,
                                           int warps, uint32_t lane, uint32_t roots) {
  constexpr int kAtOnce = 2, kStep = kAtOnce * static_cast<int>(kWarpLanes);
  const int vectors = static_cast<int>(p.K) / (4 * kSquaredColumns);
#pragma unroll 1
  for (int token = warps - 1 - warp; token < x_rows; token += warps) {
    const auto* row = reinterpret_cast<const float4*>(p.x_squares) + int64_t{m0 + token} * vectors;
    float sum = 0.0f;
#pragma unroll 1
    for (int first = 0; first < vectors; first += kStep) {
      float4 loaded[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * static_cast<int>(kWarpLanes) + static_cast<int>(lane);
        loaded[i] = at < vectors ? row[at] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
#pragma unroll
      for (const float4& four : loaded) sum += (four.x + four.y) + (four.z + four.w);
    }
    // The root's low part is less than what is lost when bfloat16 outputs are rounded.
    const InverseRoot root = norm_scale(warp_sum(sum), p.K, p.x_eps);
    if (lane == 0) store_shared_f32(roots + token * 4, root.high);
  }
}

}  // namespace
}  // namespace qsun
