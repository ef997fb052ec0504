// The two kernels behind write_kv_cache, for the file that chooses between them.
//
// Unlike all others they call launch_dependents() after wait_for_producers(), not before: what follows them
// then starts only when all that is in front of them has ended, and may read it before it waits for what they
// write. Attention does (follows_write). Where the caller says that all this is older still (settled), they
// let the next launch start at once, and read their own indices, angles and weights before they wait.
#pragma once

#include <cuda_runtime_api.h>

#include "qsun/write_kv_cache.h"

namespace qsun {

constexpr int kKvWarps = 4;                // of a block of write_kv_heads_kernel
constexpr int64_t kMaxKvHeadBytes = 1024;  // of one head: 32 lanes with two vectors of 16 bytes

// Lanes of a warp that share a head: a power of two, so that shuffles stay among them.
int lanes_of_head(int64_t head_dim, int64_t element_bytes);

// Tiles of heads of one token, a warp each: those of q, of k and of v have their own.
int64_t head_tiles(int64_t num_heads, int lanes);

cudaError_t launch_write_kv_copy(const WriteKvCacheParams& p, const WriteKvCacheConfig& config);
cudaError_t launch_write_kv_heads(const WriteKvCacheParams& p, const WriteKvCacheConfig& config);

}  // namespace qsun
