#pragma once

#include <cstdint>
#include <string>

#include "qsun/export.h"
#include "qsun/status.h"
#include "qsun/types.h"

namespace qsun {

// out[m, c] = x[m, perm[c]], zero where perm[c] is -1: x with its columns in the order in which an act-order
// weight stores them.
struct GatherColumnsParams {
  const void* x = nullptr;        // (M, K) dtype, rows x_stride elements apart
  const int32_t* perm = nullptr;  // (columns,), each from -1 to K - 1; aligned to 16 bytes
  void* out = nullptr;            // (M, columns) dtype, contiguous, aligned to 16 bytes
  int64_t M = 0;                  // 0: nothing is launched
  int64_t K = 0;
  int64_t columns = 0;  // a multiple of 8
  int64_t x_stride = 0;
  // perm is read before the kernels that this launch depends on have ended, as a weight is. Set to false
  // where one of them writes it.
  bool prefetch_perm = true;
  DType dtype = DType::kBFloat16;  // kFloat16 or kBFloat16
  int device = 0;
  Stream stream = nullptr;
};
QSUN_API std::string to_string(const GatherColumnsParams& params);

QSUN_API Status gather_columns(const GatherColumnsParams& params);

}  // namespace qsun
