// From float32 sums to outputs: what follows a product is the same wherever its sums lie.
#pragma once

#include "device/activation.cuh"
#include "device/dtype.cuh"
#include "device/vector.cuh"
#include "qsun/wna16_panels.h"

namespace qsun {
namespace {

constexpr int kUnit = 8;  // neighbouring elements of out that a thread writes at once

// Adds up to eight elements at `source` to the values.
template <typename T>
__device__ __forceinline__ void add_elements(const T* source, int count, bool wide, float (&values)[kUnit]) {
  if (wide && count == kUnit) {
    const Vector<T, kUnit> loaded = load<kUnit>(source);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) values[i] += to_float(loaded.data[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (i < count) values[i] += to_float(source[i]);
    }
  }
}

// Writes out[m, n .. n + count), count <= 8. sums(row, values): the float32 sums of eight neighbouring rows
// of the weight as it is stored. wide: out, bias and residual can be accessed 16 bytes at a time.
template <typename T, typename Sums>
__device__ __forceinline__ void write_unit(const Wna16PanelsParams& p, bool wide, int64_t m, int64_t n,
                                           int count, Sums&& sums) {
  float values[kUnit];
  if (p.gate_up) {
    float up[kUnit];
    sums(2 * n, values);
    sums(2 * n + kUnit, up);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) values[i] = silu(values[i]) * up[i];
  } else {
    sums(n, values);
  }
  if (p.bias != nullptr) add_elements(static_cast<const T*>(p.bias) + n, count, wide, values);
  if (p.residual != nullptr) {
    add_elements(static_cast<const T*>(p.residual) + m * p.residual_stride + n, count, wide, values);
  }
  T* out = static_cast<T*>(p.out) + m * p.out_stride + n;
  Vector<T, kUnit> rounded;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) rounded.data[i] = from_float<T>(values[i]);
  if (wide && count == kUnit) {
    store(out, rounded);
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (i < count) out[i] = rounded.data[i];
    }
  }
}

// The eight sums at `source`, which is aligned to 16.
__device__ __forceinline__ void read_sums(const float* source, float (&values)[kUnit]) {
  const float4 low = *reinterpret_cast<const float4*>(source);
  const float4 high = *reinterpret_cast<const float4*>(source + 4);
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

}  // namespace
}  // namespace qsun
