#pragma once

#include <cstdint>
#include <string>

#include "qsun/device.h"
#include "qsun/status.h"
#include "qsun/types.h"

namespace qsun {

// Attention of the last q_len tokens of each request over its keys and values in a paged cache. Query token j
// of a request of seq_len positions sits at position seq_len - q_len + j and attends to the positions up to
// its own, of those to the last `window`:
//   score = softmax_scale * q k.T, with a softcap softcap * tanh(score / softcap)
//   out = exp(score) v / (sum of exp(score) + exp(sink)), lse = log of that denominator (natural logarithm)
// summed in float32. A query token that attends to nothing (seq_len <= 0, or a position below 0): out 0, lse
// the sink, or -infinity without one.
//
// Keys and values may be codes (see DType): value = code * scale, with 16-bit q, head_dim 64, 128 or 256 and
// sizes that is_planned() takes; nothing else serves them.
//
// Nothing outside the positions that a request attends to is looked at, neither in the block table nor in the
// cache. A length that its row of the block table cannot hold, or a block outside the cache, traps: the
// stream's next synchronisation reports it. Among the q_len tokens of one request, a value that is not finite
// at a position that one of them attends to may reach the others.
struct PagedAttentionDecodeParams {
  const void* q = nullptr;  // (batch * q_len, num_q_heads, head_dim) dtype, rows q_stride elements apart
  const void* k_cache =
      nullptr;  // (num_blocks, num_kv_heads, block_size, head_dim) kv_dtype, 16-byte aligned
  const void* v_cache = nullptr;         // the same
  const float* k_scale = nullptr;        // what codes are multiplied by, as kv_scales says: null, (1,), or
  const float* v_scale = nullptr;        // (num_blocks, num_kv_heads, block_size), 16-byte aligned
  const int32_t* block_table = nullptr;  // (batch, max_blocks), rows block_table_stride apart
  const int32_t* seq_lens = nullptr;     // (batch,) positions of a request, the new tokens' included
  const float* sinks = nullptr;          // (num_q_heads,) logits that add to the denominator alone; or null
  void* out = nullptr;                   // (batch * q_len, num_q_heads, head_dim) dtype, contiguous
  float* lse = nullptr;                  // (batch * q_len, num_q_heads)
  void* plan = nullptr;  // paged_attention_plan_bytes(), 16-byte aligned: of plan_paged_attention()
  int64_t plan_bytes = 0;
  // paged_attention_prefixes_bytes(), 16-byte aligned, made by plan_paged_attention() with the block table;
  // null: no prefix is shared
  void* prefixes = nullptr;
  int64_t prefixes_bytes = 0;
  void* scratch = nullptr;  // paged_attention_decode_scratch_bytes(), 16-byte aligned; used by this call
  int64_t scratch_bytes = 0;
  int64_t batch = 0;  // 0: nothing is launched
  int64_t q_len = 1;  // query tokens of a request, 1 to 8
  int64_t num_q_heads =
      0;  // a multiple of num_kv_heads: query head h reads key head h / (num_q_heads / num_kv_heads)
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;  // a multiple of 8, at most 256
  int64_t num_blocks = 0;
  int64_t block_size = 0;  // a power of two, at least 8
  int64_t max_blocks = 0;  // a row of the block table
  int64_t q_stride = 0;
  int64_t block_table_stride = 0;
  int64_t window = -1;  // last positions that a query token attends to, or -1: all
  float softmax_scale = 1.0f;
  float softcap = 0.0f;  // above 0, or 0: none
  // The launch directly in front of this call on the stream is the write_kv_cache() of the q_len newest
  // positions of each request, and writes nothing else of what this call reads, q apart. Of that launch this
  // call then waits for q and those positions only; the rest it reads while that one still runs.
  bool follows_write = false;
  DType dtype = DType::kFloat32;
  DType kv_dtype = DType::kFloat32;      // dtype, or codes
  KvScales kv_scales = KvScales::kNone;  // of codes kToken, of kFloat8E4M3 also kTensor
  int device = 0;
  Stream stream = nullptr;
};
QSUN_API std::string to_string(const PagedAttentionDecodeParams& params);

// Two kernels serve the operator. The planned one (attention/tiles.cuh) takes 16-bit dtypes, head_dim 64, 96,
// 128 or 256, blocks of at least 16, up to 128 query rows a key head and up to 32768 requests, where two
// tiles fit into a block's shared memory (at head_dim 256 that is 134 KiB: sm_80, not sm_86); the other
// (attention/split.cuh) the rest, without a plan. Codes have a planned kernel of their own
// (attention/codes.cuh).
QSUN_API bool is_planned(const PagedAttentionDecodeParams& params, const DeviceProps& props);

// How the planned kernel is launched.
struct PagedAttentionDecodeConfig {
  int warps = 4;   // of a block
  int stages = 3;  // steps of 64 tokens (128 of codes) in a block's ring, that being multiplied included
  int blocks_per_sm = 1;   // at once
  int parts = 1;           // blocks of the grid, of equal shares of the work unless requests stay whole
  int min_part_units = 2;  // smaller parts are not made: fewer blocks get work (units: attention/plan.h)
  // Requests are not cut where there are parts for all of them, under every key head, and the longest takes
  // no more units than two equal shares and this. -1: they are always cut.
  int whole_slack = -1;
  int prefix_parts = 0;  // blocks of the launch that reads shared prefixes (attention/prefixes.h); 0: none
  int min_prefix_tiles = 4;        // shorter prefixes, in tiles of 64 tokens, are not shared
  int min_saved_tiles = 0;         // in all, of all key heads: with fewer no prefix is shared
  bool overlaps_producer = false;  // begins while the kernel before it still runs; needs sm_90
};
QSUN_API std::string to_string(const PagedAttentionDecodeConfig& config);

// How the other kernel is launched.
struct PagedAttentionSplitConfig {
  int head_tile = 1;   // query heads a block handles, of the group that shares a key head: 1, 4 or 8
  int head_tiles = 1;  // tiles in a group
  int lanes = 8;       // that share a position, 8 elements of head_dim each: 8, 16 or 32
  int num_parts = 1;   // pieces that every request's positions are cut into
  int64_t grid = 0;    // blocks
};
QSUN_API std::string to_string(const PagedAttentionSplitConfig& config);

// Pure: depend on the sizes alone, so that one captured graph serves every length.
QSUN_API PagedAttentionDecodeConfig choose(const PagedAttentionDecodeParams& params,
                                           const DeviceProps& props);
QSUN_API PagedAttentionSplitConfig choose_split(const PagedAttentionDecodeParams& params,
                                                const DeviceProps& props);

// Bytes of a plan for these sizes; 0 when the kernel that serves them takes none.
QSUN_API int64_t paged_attention_plan_bytes(const PagedAttentionDecodeParams& params,
                                            const PagedAttentionDecodeConfig& config);
QSUN_API int64_t paged_attention_plan_bytes(const PagedAttentionDecodeParams& params,
                                            const DeviceProps& props);

// Bytes of what a plan says about shared prefixes; 0 where none are shared: codes, windows, more than 32
// query rows a key head, more than 4096 requests, sizes without a plan.
QSUN_API int64_t paged_attention_prefixes_bytes(const PagedAttentionDecodeParams& params,
                                                const PagedAttentionDecodeConfig& config);
QSUN_API int64_t paged_attention_prefixes_bytes(const PagedAttentionDecodeParams& params,
                                                const DeviceProps& props);

// Bytes of scratch that a call with these sizes needs; may be 0. shares_prefixes: whether the call has
// `prefixes`.
QSUN_API int64_t paged_attention_decode_scratch_bytes(const PagedAttentionDecodeParams& params,
                                                      const PagedAttentionDecodeConfig& config,
                                                      bool shares_prefixes = false);
QSUN_API int64_t paged_attention_decode_scratch_bytes(const PagedAttentionDecodeParams& params,
                                                      const DeviceProps& props, bool shares_prefixes = false);

// The precondition of `choose` and of the byte counts: sizes that a kernel exists for.
QSUN_API Status paged_attention_decode_sizes(const PagedAttentionDecodeParams& params);

// Cuts the work of a batch into equal parts, on the device: reads seq_lens, writes plan. Of `params` the
// sizes (num_blocks, max_blocks and strides apart), window, device and stream count; is_planned() must hold.
// The plan keeps the lengths, and serves any number of calls of the same sizes and window one after another,
// on one stream at a time.
//
// With `prefixes` it also reads block_table (max_blocks and block_table_stride count) and finds the requests
// whose rows begin with the same blocks; calls with `prefixes` read these blocks once for all of them. Their
// block table must hold what it held here.
QSUN_API Status plan_paged_attention(const PagedAttentionDecodeParams& params);
QSUN_API Status plan_paged_attention(const PagedAttentionDecodeParams& params,
                                     const PagedAttentionDecodeConfig& config);

// The planned kernel reads q in pairs of elements (an address divisible by 4, an even q_stride) and stores
// out eight bytes at a time. The second form runs as told; a plan must have been made with the same
// configuration.
QSUN_API Status paged_attention_decode(const PagedAttentionDecodeParams& params);
QSUN_API Status paged_attention_decode(const PagedAttentionDecodeParams& params,
                                       const PagedAttentionDecodeConfig& config);

}  // namespace qsun
