#pragma once

#include <cstdint>
#include <string>

#include "qsun/device.h"
#include "qsun/status.h"
#include "qsun/types.h"

namespace qsun {

// Attention of one query token a request over its keys and values in a paged cache:
//   out = softmax(softmax_scale * q k.T) v over positions [max(0, seq_len - window), seq_len), lse = log sum
//   exp of the same scores (natural logarithm), both summed in float32. seq_len <= 0: out 0, lse -infinity.
// Nothing past a request's length is read, neither in the block table nor in the cache. A length that its row
// of the block table cannot hold, or a block outside the cache, traps: the stream's next synchronisation
// reports it.
struct PagedAttentionDecodeParams {
  const void* q = nullptr;        // (batch, num_q_heads, head_dim) dtype, requests q_stride elements apart
  const void* k_cache = nullptr;  // (num_blocks, num_kv_heads, block_size, head_dim) dtype, 16-byte aligned
  const void* v_cache = nullptr;  // the same
  const int32_t* block_table = nullptr;  // (batch, max_blocks), rows block_table_stride apart
  const int32_t* seq_lens = nullptr;     // (batch,) positions to attend to, the new token's included
  void* out = nullptr;                   // (batch, num_q_heads, head_dim) dtype, contiguous
  float* lse = nullptr;                  // (batch, num_q_heads)
  void* scratch = nullptr;  // paged_attention_decode_scratch_bytes(), 16-byte aligned; used by this call
  int64_t scratch_bytes = 0;
  int64_t batch = 0;  // 0: nothing is launched
  int64_t num_q_heads =
      0;  // a multiple of num_kv_heads: query head h reads key head h / (num_q_heads / num_kv_heads)
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;  // a multiple of 8, at most 256
  int64_t num_blocks = 0;
  int64_t block_size = 0;  // a power of two, at least 8
  int64_t max_blocks = 0;  // a row of the block table
  int64_t q_stride = 0;
  int64_t block_table_stride = 0;
  int64_t window = -1;  // last positions attended to, or -1: all
  float softmax_scale = 1.0f;
  DType dtype = DType::kFloat32;
  int device = 0;
  Stream stream = nullptr;
};
QSUN_API std::string to_string(const PagedAttentionDecodeParams& params);

struct PagedAttentionDecodeConfig {
  int head_tile = 1;   // query heads a block handles, of the group that shares a key head: 1, 4 or 8
  int head_tiles = 1;  // tiles in a group
  int lanes = 8;       // that share a position, 8 elements of head_dim each: 8, 16 or 32
  int num_parts = 1;   // pieces that every request's positions are cut into
  int64_t grid = 0;    // blocks
};
QSUN_API std::string to_string(const PagedAttentionDecodeConfig& config);

// Pure: depends on the sizes alone, so that one captured graph serves every length.
QSUN_API PagedAttentionDecodeConfig choose(const PagedAttentionDecodeParams& params,
                                           const DeviceProps& props);

// Bytes of scratch that a call with these sizes needs; 0 when the positions are not cut.
QSUN_API int64_t paged_attention_decode_scratch_bytes(const PagedAttentionDecodeParams& params,
                                                      const DeviceProps& props);

// The precondition of `choose` and of the scratch size: sizes that a kernel exists for.
QSUN_API Status paged_attention_decode_sizes(const PagedAttentionDecodeParams& params);

QSUN_API Status paged_attention_decode(const PagedAttentionDecodeParams& params);

}  // namespace qsun
