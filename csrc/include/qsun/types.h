#pragma once

#include <cstdint>
#include <string>

#include "qsun/export.h"

// The driver's name for what cudaStream_t points to: this face needs no CUDA header.
struct CUstream_st;

namespace qsun {

using Stream = CUstream_st*;

// Element types of activations, weights' scales and caches; those of caches alone are codes, value = code *
// scale. int4 is two codes a byte, element 2i in the low nibble; a nibble is code + 8. The numbers are part
// of the Python binding.
enum class DType : int {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kFloat8E4M3 = 3,
  kInt8 = 4,
  kInt4 = 5,
};

// The scales beside a cache of codes: none (a cache of values), one for all of it, or one for each head of
// each token.
enum class KvScales : int { kNone = 0, kTensor = 1, kToken = 2 };

QSUN_API const char* to_string(DType dtype);      // "float32", ..., "int4"; "unknown" for any other number
QSUN_API const char* to_string(KvScales scales);  // "none", "tensor", "token"; "unknown" likewise
QSUN_API int64_t size_of(DType dtype);            // bytes a value; 0 for codes and for an unknown number

}  // namespace qsun
