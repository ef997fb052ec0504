#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "qsun/types.h"

namespace qsun {

// Describes a matrix of 16-bit elements to the copy engine (device/bulk_copy.cuh), to be read in boxes of
// 64 columns x box_rows rows with the 128-byte swizzle. base: aligned to 16 bytes; stride: elements from row
// to row, a multiple of 8. Needs a driver, but neither a context nor its library at link time.
cudaError_t describe_matrix(CUtensorMap* map, DType dtype, const void* base, int64_t rows, int64_t columns,
                            int64_t stride, int box_rows);

}  // namespace qsun
