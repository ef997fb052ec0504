#pragma once

#include <cstdint>
#include <string>

#include "qsun/device.h"
#include "qsun/status.h"
#include "qsun/types.h"

namespace qsun {

// Takes the heads of new tokens from the projection to the paged cache in one launch. In this order, each
// step where its arguments are given:
//   sums      k, v and q: those that a product left (Wna16PanelsParams::leaves_sums), added up, and rounded
//   to
//             dtype
//   norm      k and q: RMS norm over head_dim, as rms_norm; rounded to dtype
//   rope      k and q: rotary embedding, as apply_rope; rounded to dtype
//   rotate    k and q: times H / sqrt(head_dim), H the Hadamard matrix in Sylvester's order, float32
//   codes     k and v: code * scale stands for the value; scale = max |x| / c of a head of a token with the
//             largest code c (127, 7, 448), or as given for the whole cache
//   append    k and v: to the token's slot = block * block_size + offset of the caches
// q goes to q_out, rounded to dtype. A negative slot is padding: its keys and values are skipped, its q is
// not. A slot past the cache or a position past the table traps: the stream's next synchronisation reports a
// launch failure. Two tokens with one slot leave either in it.
struct WriteKvCacheParams {
  const void* k = nullptr;  // (num_tokens, num_kv_heads, head_dim) dtype, tokens k_stride elements apart
  const void* v = nullptr;  // (num_tokens, num_kv_heads, head_dim) dtype, tokens v_stride elements apart
  const void* q =
      nullptr;  // (num_tokens, num_q_heads, head_dim) dtype, tokens q_stride elements apart; or null
  void* q_out = nullptr;     // (num_tokens, num_q_heads, head_dim) dtype, contiguous; null as q is
  void* k_cache = nullptr;   // (num_blocks, num_kv_heads, block_size, head_dim) kv_dtype, contiguous
  void* v_cache = nullptr;   // as k_cache; int4: head_dim / 2 bytes a token, element 2i in the low nibble
  float* k_scale = nullptr;  // kToken: (num_blocks, num_kv_heads, block_size), written; kTensor: (1,), read
  float* v_scale = nullptr;  // as k_scale
  const int64_t* slot_mapping = nullptr;  // (num_tokens,)
  const int64_t* positions = nullptr;     // (num_tokens,); null without rope
  const float* cos_sin = nullptr;         // (max_positions, head_dim): [cos | sin]; null without rope
  const void* q_norm = nullptr;           // (head_dim,) dtype; null without norm or q
  const void* k_norm = nullptr;           // (head_dim,) dtype; null without norm
  float eps = 0.0f;                       // of the norm
  bool rotate = false;                    // head_dim is a power of two then, at least 16 (8 in float32)
  int64_t num_tokens = 0;                 // 0: nothing is launched
  int64_t num_q_heads = 0;                // 0 without q
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t num_blocks = 0;
  int64_t block_size = 0;
  int64_t max_positions = 0;
  int64_t q_stride = 0;
  int64_t k_stride = 0;
  int64_t v_stride = 0;
  // Above 0: k, v and q are float32 sums, so many of each element, split_stride elements apart, to be added
  // in their order; the other strides count elements of float32 then, too. dtype has 16 bits.
  int splits = 0;
  int64_t split_stride = 0;
  DType kv_dtype = DType::kFloat32;
  KvScales kv_scales = KvScales::kNone;
  // A promise: slot_mapping, positions, cos_sin, q_norm and k_norm, and what a launch behind this one reads
  // before it waits (PagedAttentionDecodeParams::follows_write), were complete when the launch in front of
  // this one began. So is all that was in front of an earlier call without this promise on the stream: that
  // call lets nothing begin before what is in front of it has ended.
  bool settled = false;
  DType dtype = DType::kFloat32;
  int device = 0;
  Stream stream = nullptr;
};
QSUN_API std::string to_string(const WriteKvCacheParams& params);

// How a call runs.
struct WriteKvCacheConfig {
  bool copies = false;             // bits are copied: no step, and caches of the dtype of k and v
  bool is_wide = false;            // 16 bytes at a time; single elements otherwise
  int lanes = 0;                   // that share a head, where it is not a copy
  bool overlaps_producer = false;  // begins while the kernel before it still runs; needs sm_90
};
QSUN_API std::string to_string(const WriteKvCacheConfig& config);
QSUN_API WriteKvCacheConfig choose(const WriteKvCacheParams& params, const DeviceProps& props);

QSUN_API Status write_kv_cache(const WriteKvCacheParams& params);

}  // namespace qsun
