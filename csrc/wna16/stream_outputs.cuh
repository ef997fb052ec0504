// Which outputs a group of row tiles has in the streaming kernel (stream.cuh), and what is added to them.
#pragma once

#include <cstdint>

#include "device/dtype.cuh"
#include "qsun/wna16_panels.h"
#include "wna16/panels.h"
#include "wna16/stream.h"

namespace qsun {
namespace {

// What an output takes besides its product.
template <typename T>
struct Addends {
  T bias, residual;
};

// The outputs of a group of row tiles, kRows rows: number i is column `column(i)`, from n0 on, of token
// `token(i)`.
template <int kRows>
struct TileOutputs {
  int is_pair;  // an output takes a row of gate and one of up
  int64_t n0;
  int columns, columns_log2;
  int count;  // those past the last column included

  __device__ __forceinline__ TileOutputs(const Wna16PanelsParams& p, int tile, int tiles, int tokens)
      : is_pair(p.gate_up ? 1 : 0),
        n0(static_cast<int64_t>(tile) * kTileRows >> is_pair),
        columns(min(tiles * kTileRows >> is_pair, static_cast<int>((p.N >> is_pair) - n0))),
        columns_log2(log2_of(kRows) - is_pair),
        count(tokens << columns_log2) {}

  __device__ __forceinline__ int token(int i) const { return i >> columns_log2; }
  __device__ __forceinline__ int column(int i) const { return i & ((1 << columns_log2) - 1); }

  // m0: the first token.
  template <typename T>
  __device__ __forceinline__ Addends<T> addends(const Wna16PanelsParams& p, int m0, int i) const {
    Addends<T> addends{from_float<T>(0.0f), from_float<T>(0.0f)};
    if (is_pair || i >= count || column(i) >= columns) return addends;
    if (p.bias != nullptr) addends.bias = static_cast<const T*>(p.bias)[n0 + column(i)];
    if (p.residual != nullptr) {
      const int64_t row = (m0 + token(i)) * p.residual_stride;
      addends.residual = static_cast<const T*>(p.residual)[row + n0 + column(i)];
    }
    return addends;
  }
};

}  // namespace
}  // namespace qsun
