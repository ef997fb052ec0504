#include "runtime/tensor_map.h"

namespace qsun {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

struct EncodeEntry {
  Encode function = nullptr;
  cudaError_t error = cudaSuccess;
};

// The driver's function, asked of the driver that runs: the library is not linked to it.
EncodeEntry find_encode() {
  EncodeEntry entry;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  entry.error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  entry.error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (entry.error == cudaSuccess && found != cudaDriverEntryPointSuccess) {
    entry.error = cudaErrorInsufficientDriver;
  }
  entry.function = reinterpret_cast<Encode>(function);
  return entry;
}

}  // namespace

cudaError_t describe_matrix(CUtensorMap* map, DType dtype, const void* base, int64_t rows, int64_t columns,
                            int64_t stride, int box_rows) {
  static const EncodeEntry encode = find_encode();
  if (encode.error != cudaSuccess) return encode.error;
  const CUtensorMapDataType type =
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) *
                                 2};  // bytes, of all dimensions but the first
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = encode.function(
      map, type, 2, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace qsun
