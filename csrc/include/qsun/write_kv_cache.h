#pragma once

#include <cstdint>
#include <string>

#include "qsun/status.h"
#include "qsun/types.h"

namespace qsun {

// Copies the keys and values of new tokens into their slots of a paged cache; slot = block * block_size +
// offset. A negative slot is padding and is skipped. A slot past the cache traps: the stream's next
// synchronisation reports a launch failure. Two tokens with one slot leave either in it.
struct WriteKvCacheParams {
  const void* k = nullptr;  // (num_tokens, num_kv_heads, head_dim) dtype, tokens k_stride elements apart
  const void* v = nullptr;  // (num_tokens, num_kv_heads, head_dim) dtype, tokens v_stride elements apart
  void* k_cache = nullptr;  // (num_blocks, num_kv_heads, block_size, head_dim) dtype, contiguous
  void* v_cache = nullptr;  // (num_blocks, num_kv_heads, block_size, head_dim) dtype, contiguous
  const int64_t* slot_mapping = nullptr;  // (num_tokens,)
  int64_t num_tokens = 0;                 // 0: nothing is launched
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t num_blocks = 0;
  int64_t block_size = 0;
  int64_t k_stride = 0;
  int64_t v_stride = 0;
  DType dtype = DType::kFloat32;
  int device = 0;
  Stream stream = nullptr;
};
QSUN_API std::string to_string(const WriteKvCacheParams& params);

QSUN_API Status write_kv_cache(const WriteKvCacheParams& params);

}  // namespace qsun
