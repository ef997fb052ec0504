// The operator's side of the kernel in tiles.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/plan.h"
#include "qsun/paged_attention_decode.h"

namespace qsun {

constexpr int kQuarterTokens = 16;  // a warp's share of a tile
constexpr int kQuarters = kTileTokens / kQuarterTokens;
constexpr int kTileRows = 16;       // query rows of the tensor core
constexpr int kMaxQueryRows = 128;  // of a key head: (num_q_heads / num_kv_heads) * q_len

// A row of keys or values in shared memory: 16 bytes more than its data, so that the tensor core's loads of
// eight rows meet eight different groups of banks.
constexpr int tile_row_bytes(int head_dim) { return head_dim * 2 + 16; }
constexpr int quarter_bytes(int head_dim) { return 2 * kQuarterTokens * tile_row_bytes(head_dim); }

// Before the ring: maximum and sum of 16 rows of four warps, a word for each query row, and one more.
constexpr int kStatisticsBytes = kQuarters * kTileRows * 2 * 4;
constexpr int kRowPlacesBytes = kMaxQueryRows * 4;
constexpr int kTilesHeadBytes = kStatisticsBytes + kRowPlacesBytes + 128;

inline int tiles_shared_bytes(int head_dim, int stages) {
  return kTilesHeadBytes + stages * kQuarters * quarter_bytes(head_dim);
}

inline int query_rows(const PagedAttentionDecodeParams& p) {
  return static_cast<int>(p.num_q_heads / p.num_kv_heads * p.q_len);
}

// Where parts leave what they have of a request that other parts share. Part p has at most two such requests:
// slot 2p is for the one that began in a part before, slot 2p + 1 for the one that begins in p.
struct PartialRows {
  float* lse;  // (2 * parts, rows), to the base 2
  float* out;  // (2 * parts, rows, head_dim), normalised
};

inline int64_t partial_lse_floats(const PagedAttentionDecodeParams& p,
                                  const PagedAttentionDecodeConfig& config) {
  return (int64_t{2} * config.parts * query_rows(p) + 3) / 4 * 4;  // what follows stays aligned to 16 bytes
}

inline PartialRows partial_rows(const PagedAttentionDecodeParams& p,
                                const PagedAttentionDecodeConfig& config) {
  auto* scratch = static_cast<float*>(p.scratch);
  return {scratch, scratch + partial_lse_floats(p, config)};
}

inline int64_t partial_floats(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& config) {
  return partial_lse_floats(p, config) + int64_t{2} * config.parts * query_rows(p) * p.head_dim;
}

// One instance a dtype (16 bits) and head_dim (64, 96, 128, 256), each compiled in its own file.
template <typename T, int kHeadDim>
cudaError_t launch_paged_attention_tiles(const PagedAttentionDecodeParams& params,
                                         const PagedAttentionDecodeConfig& config);

}  // namespace qsun
