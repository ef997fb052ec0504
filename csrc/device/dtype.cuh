// Element types on the device: conversion to and from float32, in which all arithmetic is done.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "qsun/types.h"

namespace qsun {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Round to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// The bits of a 16-bit float.
template <typename T>
__device__ __forceinline__ uint16_t bits_of(T value) {
  static_assert(sizeof(T) == sizeof(uint16_t));
  uint16_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls function(TypeTag<T>()) with the device type of a DType that is known to be one of the three.
template <typename Function>
auto with_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat16:
      return function(TypeTag<__half>());
    case DType::kBFloat16:
      return function(TypeTag<__nv_bfloat16>());
    default:
      return function(TypeTag<float>());
  }
}

}  // namespace qsun
