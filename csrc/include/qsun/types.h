#pragma once

#include <cstdint>
#include <string>

#include "qsun/export.h"

// The driver's name for what cudaStream_t points to: this face needs no CUDA header.
struct CUstream_st;

namespace qsun {

using Stream = CUstream_st*;

// Element types of activations, weights' scales and caches. The numbers are part of the Python binding.
enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

QSUN_API const char* to_string(
    DType dtype);                       // "float32", "float16", "bfloat16"; "unknown" for any other number
QSUN_API int64_t size_of(DType dtype);  // bytes an element; 0 for an unknown number

}  // namespace qsun
