// The operator's side of the kernel in codes.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/tiles.h"
#include "qsun/paged_attention_decode.h"

namespace qsun {

constexpr int kSliceTokens = 32;  // what a warp copies and multiplies at once
constexpr int kSlices = 4;        // warps that copy
constexpr int kHeadTile = 8;      // query rows: columns of the tensor core

inline bool is_codes(DType dtype) {
  return dtype == DType::kFloat8E4M3 || dtype == DType::kInt8 || dtype == DType::kInt4;
}

constexpr int codes_row_bytes(DType codes, int head_dim) {
  return codes == DType::kInt4 ? head_dim / 2 : head_dim;
}

// Keys, values, and a float32 scale for each of both.
constexpr int codes_slice_bytes(DType codes, int head_dim) {
  return 2 * kSliceTokens * (codes_row_bytes(codes, head_dim) + 4);
}

inline int codes_shared_bytes(DType codes, int head_dim, int stages) {
  return kTilesHeadBytes + stages * kSlices * codes_slice_bytes(codes, head_dim);
}

// How the query rows of a key head are shared out: `tiles` of 8 rows a warp; four warps hold the same rows
// and different tokens, eight have rows of their own.
struct CodesShape {
  int warps;
  int tiles;
  int blocks_per_sm;  // that the registers are divided among
};
constexpr CodesShape codes_shape(DType codes, int head_dim, int rows) {
  // Rings of three stages for four blocks fit into an H100's shared memory with rows of up to 64 bytes.
  if (rows <= kHeadTile) return {4, 1, codes_row_bytes(codes, head_dim) <= 64 ? 4 : 2};
  if (head_dim > 128) return {8, 1, 1};  // a result of 16 rows fills the registers
  return rows <= 2 * kHeadTile ? CodesShape{4, 2, 2} : CodesShape{8, 2, 1};
}
inline CodesShape codes_shape(const PagedAttentionDecodeParams& p) {
  return codes_shape(p.kv_dtype, static_cast<int>(p.head_dim), query_rows(p));
}
constexpr int max_codes_rows(int head_dim) { return head_dim <= 128 ? kMaxQueryRows : kMaxQueryRows / 2; }

// One instance a kind of codes, for head_dim 64, 128 and 256, each compiled in its own file.
template <DType kCodes>
cudaError_t launch_paged_attention_codes(const PagedAttentionDecodeParams& params,
                                         const PagedAttentionDecodeConfig& config);
template <>
cudaError_t launch_paged_attention_codes<DType::kFloat8E4M3>(const PagedAttentionDecodeParams&,
                                                             const PagedAttentionDecodeConfig&);
template <>
cudaError_t launch_paged_attention_codes<DType::kInt8>(const PagedAttentionDecodeParams&,
                                                       const PagedAttentionDecodeConfig&);
template <>
cudaError_t launch_paged_attention_codes<DType::kInt4>(const PagedAttentionDecodeParams&,
                                                       const PagedAttentionDecodeConfig&);

}  // namespace qsun
