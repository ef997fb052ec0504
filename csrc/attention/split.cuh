// Attention of one query token over one part of its positions, for what the planned kernel (tiles.cuh) does
// not take: float32, other head widths, blocks of 8, and whatever else is_planned() refuses.
//
//   grid      (query token, key head, tile of the query heads that share it, part)
//   part      num_parts equal pieces of the token's positions, cut on the device from its length
//   block     kWarps warps; kLanes lanes share a position, each with 8 elements of head_dim in 16-byte loads
//
//             position   t0  |t0+1 |t0+2 |t0+3 |..
//             lanes      0-15|16-31| 0-15|16-31|..     with kLanes = 16
//             warp           0     |     1     |..
//
// Each lane keeps q, and sums of p * v, for its 8 elements and all kHeads query heads; every group of kLanes
// lanes has its own running maximum and sum.
//
// Groups are merged by shuffles inside a warp, warps through shared memory, parts by the kernel in
// combine.cu: always in the same order. Keys and values are read once for the kHeads query heads that share
// them. The block numbers of the next positions are fetched while the current ones are multiplied.
#pragma once

#include "attention/split.h"
#include "device/dtype.cuh"
#include "device/reduce.cuh"
#include "device/softmax.cuh"
#include "device/trap.cuh"
#include "device/vector.cuh"
#include "runtime/alignment.h"
#include "runtime/launch.h"

namespace qsun {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kPiece = 8;  // elements of head_dim a lane

struct SplitArguments {
  PagedAttentionDecodeParams p;
  PartialResults partial;
  int group;  // query heads a key head
  int head_tiles;
  int num_parts;
  int block_log2;
  bool wide_q;
};

// Positions [first, last) of a part.
struct Range {
  int first;
  int last;
};

// `granularity`: positions that a block handles at once.
__device__ __forceinline__ Range range_of_part(const SplitArguments& a, int length, int part,
                                               int granularity) {
  const int begin = a.p.window >= 0 && length > a.p.window ? length - static_cast<int>(a.p.window) : 0;
  const int share = (length - begin + a.num_parts - 1) / a.num_parts;
  const int64_t size = (share + granularity - 1) / granularity * granularity;
  const int64_t first = begin + part * size;
  return {static_cast<int>(first < length ? first : length),
          static_cast<int>(first + size < length ? first + size : length)};
}

template <int kLanes>
__device__ __forceinline__ float lanes_sum(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Running softmax of one query head over the positions of one group of lanes.
struct Head {
  float maximum;
  float sum;
  float out[kPiece];
};

// Adds the state of the lanes `distance` away.
__device__ __forceinline__ void merge_lanes(Head& head, int distance) {
  const float other_maximum = __shfl_xor_sync(kAllLanes, head.maximum, distance);
  const float other_sum = __shfl_xor_sync(kAllLanes, head.sum, distance);
  const float maximum = fmaxf(head.maximum, other_maximum);
  const float own = expf(head.maximum - reference_of(maximum));
  const float other = expf(other_maximum - reference_of(maximum));
  head.maximum = maximum;
  head.sum = head.sum * own + other_sum * other;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    head.out[i] = head.out[i] * own + __shfl_xor_sync(kAllLanes, head.out[i], distance) * other;
  }
}

template <typename T, int kLanes, int kHeads>
__global__ void __launch_bounds__(kThreads, 1) paged_attention_split_kernel(SplitArguments a) {
  constexpr int kGroups = kThreads / kLanes;  // groups of lanes in the block
  constexpr int kBatch =
      sizeof(T) == 2 ? 4 : 2;  // positions that a group loads at once: 64 bytes of k, 64 of v a lane
  constexpr int kTokens = kGroups * kBatch;
  constexpr int kPaddedDim = kLanes * kPiece;
  __shared__ float smem_maximum[kWarps][kHeads];
  __shared__ float smem_sum[kWarps][kHeads];
  __shared__ float smem_out[kWarps][kHeads][kPaddedDim];
  const PagedAttentionDecodeParams& p = a.p;

  // Block: query token, key head, query heads, part
  const int head_dim = static_cast<int>(p.head_dim);
  const int part = static_cast<int>(blockIdx.x % a.num_parts);
  const int head_tile = static_cast<int>(blockIdx.x / a.num_parts % a.head_tiles);
  const int64_t token_head = blockIdx.x / a.num_parts / a.head_tiles;
  const int64_t kv_head = token_head % p.num_kv_heads;
  const int64_t query = token_head / p.num_kv_heads;
  const int64_t request = query / p.q_len;
  const int64_t first_head = kv_head * a.group + head_tile * kHeads;
  const int num_heads = min(kHeads, a.group - head_tile * kHeads);
  const int seq_len = load_element(p.seq_lens + request);
  trap_unless(seq_len <= p.max_blocks << a.block_log2);
  const int later = static_cast<int>(p.q_len - 1 - query % p.q_len);  // query tokens behind this one
  const int length = max(max(seq_len, 0) - later, 0);  // positions up to this query token's own
  const Range range = range_of_part(a, length, part, kTokens);
  const bool is_whole = a.num_parts == 1;
  if (range.first >= range.last && !is_whole) {
    if (static_cast<int>(threadIdx.x) < num_heads) {
      a.partial.lse[(query * p.num_q_heads + first_head + threadIdx.x) * a.num_parts + part] = -INFINITY;
    }
    return;
  }

  // Thread: group of lanes, elements of head_dim
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int group = static_cast<int>(threadIdx.x) / kLanes;
  const int d = static_cast<int>(threadIdx.x) % kLanes * kPiece;
  const bool has_elements = d < head_dim;  // head_dim may fill only some of the lanes

  // Query
  float q[kHeads][kPiece];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const T* source = static_cast<const T*>(p.q) + query * p.q_stride + (first_head + h) * head_dim + d;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) q[h][i] = 0.0f;
    if (h < num_heads && has_elements) {
      Vector<T, kPiece> values;
      if (a.wide_q) {
        values = load_readonly<kPiece>(source);
      } else {
#pragma unroll
        for (int i = 0; i < kPiece; ++i) values.data[i] = load_element(source + i);
      }
#pragma unroll
      for (int i = 0; i < kPiece; ++i) q[h][i] = to_float(values.data[i]);
    }
  }

  Head heads[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) heads[h] = {-INFINITY, 0.0f, {}};

  const int32_t* block_row = p.block_table + request * p.block_table_stride;
  const int offset_mask = (1 << a.block_log2) - 1;
  int next_blocks[kBatch];
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    const int token = range.first + j * kGroups + group;
    next_blocks[j] = token < range.last ? load_element(block_row + (token >> a.block_log2)) : 0;
  }

  for (int base = range.first; base < range.last; base += kTokens) {
    // Load keys and values; zeros for positions past the part, whose slots are not looked at.
    Vector<T, kPiece> k[kBatch];
    Vector<T, kPiece> v[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int token = base + j * kGroups + group;
      if (token < range.last && has_elements) {
        const int64_t block = next_blocks[j];
        trap_unless(block >= 0 && block < p.num_blocks);
        const int64_t row = ((block * p.num_kv_heads + kv_head) << a.block_log2) + (token & offset_mask);
        k[j] = load_readonly<kPiece>(static_cast<const T*>(p.k_cache) + row * head_dim + d);
        v[j] = load_readonly<kPiece>(static_cast<const T*>(p.v_cache) + row * head_dim + d);
      } else {
#pragma unroll
        for (int i = 0; i < kPiece; ++i) k[j].data[i] = v[j].data[i] = from_float<T>(0.0f);
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t token = static_cast<int64_t>(base) + kTokens + j * kGroups + group;
      next_blocks[j] = token < range.last ? load_element(block_row + (token >> a.block_log2)) : 0;
    }

    // Scores
    float scores[kHeads][kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const bool inside = base + j * kGroups + group < range.last;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < kPiece; ++i) dot = fmaf(q[h][i], to_float(k[j].data[i]), dot);
        dot = lanes_sum<kLanes>(dot) * p.softmax_scale;
        if (p.softcap > 0.0f) dot = p.softcap * tanhf(dot / p.softcap);
        scores[h][j] = inside ? dot : -INFINITY;
      }
    }

    // Softmax; scores become weights.
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float maximum = heads[h].maximum;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) maximum = fmaxf(maximum, scores[h][j]);
      const float reference = reference_of(maximum);
      const float decay = expf(heads[h].maximum - reference);
      heads[h].maximum = maximum;
      heads[h].sum *= decay;
#pragma unroll
      for (int i = 0; i < kPiece; ++i) heads[h].out[i] *= decay;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        scores[h][j] = expf(scores[h][j] - reference);
        heads[h].sum += scores[h][j];
      }
    }

    // Values
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        const float value = to_float(v[j].data[i]);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) heads[h].out[i] = fmaf(scores[h][j], value, heads[h].out[i]);
      }
    }
  }

  // Merge the groups of a warp, then leave the warp's state in shared memory.
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int distance = kLanes; distance < kWarp; distance *= 2) merge_lanes(heads[h], distance);
    if (lane < kLanes) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) smem_out[warp][h][d + i] = heads[h].out[i];
    }
    if (lane == 0) {
      smem_maximum[warp][h] = heads[h].maximum;
      smem_sum[warp][h] = heads[h].sum;
    }
  }
  __syncthreads();

  // Merge the warps and store.
  for (int at = threadIdx.x; at < num_heads * head_dim; at += kThreads) {
    const int h = at / head_dim;
    const int element = at % head_dim;
    const bool has_sink = is_whole && p.sinks != nullptr;  // with several parts the other kernel adds it
    const float sink = has_sink ? load_element(p.sinks + first_head + h) : -INFINITY;
    float maximum = sink;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, smem_maximum[w][h]);
    float sum = expf(sink - reference_of(maximum));
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = expf(smem_maximum[w][h] - reference_of(maximum));
      sum += smem_sum[w][h] * weight;
      value += smem_out[w][h][element] * weight;
    }
    value = sum == 0.0f ? 0.0f : value / sum;
    const int64_t row = query * p.num_q_heads + first_head + h;
    const float lse = log_sum(maximum, sum);
    if (is_whole) {
      static_cast<T*>(p.out)[row * head_dim + element] = from_float<T>(value);
      if (element == 0) p.lse[row] = lse;
    } else {
      a.partial.out[(row * a.num_parts + part) * head_dim + element] = value;
      if (element == 0) a.partial.lse[row * a.num_parts + part] = lse;
    }
  }
}

template <typename T, int kLanes, int kHeads>
cudaError_t launch_instance(const PagedAttentionDecodeParams& p, const PagedAttentionSplitConfig& config) {
  SplitArguments a{};
  a.p = p;
  a.partial = partial_results(p, config);
  a.group = static_cast<int>(p.num_q_heads / p.num_kv_heads);
  a.head_tiles = config.head_tiles;
  a.num_parts = config.num_parts;
  while (int64_t{1} << a.block_log2 < p.block_size) ++a.block_log2;
  a.wide_q = wide({p.q}, {p.q_stride * static_cast<int64_t>(sizeof(T))});
  return launch(paged_attention_split_kernel<T, kLanes, kHeads>, dim3(config.grid), dim3(kThreads), p.stream,
                a);
}

template <typename T, int kLanes>
cudaError_t launch_lanes(const PagedAttentionDecodeParams& p, const PagedAttentionSplitConfig& config) {
  switch (config.head_tile) {
    case 1:
      return launch_instance<T, kLanes, 1>(p, config);
    case 4:
      return launch_instance<T, kLanes, 4>(p, config);
    default:
      return launch_instance<T, kLanes, 8>(p, config);
  }
}

template <typename T>
cudaError_t launch_split(const PagedAttentionDecodeParams& p, const PagedAttentionSplitConfig& config) {
  switch (config.lanes) {
    case 8:
      return launch_lanes<T, 8>(p, config);
    case 16:
      return launch_lanes<T, 16>(p, config);
    default:
      return launch_lanes<T, 32>(p, config);
  }
}

}  // namespace
}  // namespace qsun
