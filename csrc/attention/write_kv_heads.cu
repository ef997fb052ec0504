// Norm, rotary embedding, rotation and quantisation of the heads of new tokens, on their way from the
// projection to the paged cache (keys, values) or to the attention (queries).
//
// A head belongs to a few neighbouring lanes. A lane holds one 16-byte vector of the head's first half and
// the one at the same place of the second half; with 16-bit elements and head_dim 128:
//
//   lane      | 0      | 1      | ... | 7         then the next head: four heads a warp
//   low       | 0..7   | 8..15  | ... | 56..63
//   high      | 64..71 | 72..79 | ... | 120..127
//
// The pairs of the rotary embedding, (i, i + 64), meet in one lane. Of the log2(head_dim) rounds of the
// rotation the first (neighbours) and the last (halves) stay in a lane, and those between are as many as a
// sum over the head takes. Nothing goes through shared memory, every warp is on its own, and a head is read
// and written once.
//
// A warp takes heads of one kind of one token, so all its branches are taken together, and its position,
// slot and row of the table are the same address in all lanes. Blocks are small: a decode step of few tokens
// spreads over the multiprocessors.
//
// Templates are on the dtype, on whether vectors are aligned, and on whether the projection left sums. Which
// steps there are, how many lanes share a head and what the cache holds are decided at run time, at a few
// branches a head.
#include <cmath>
#include <type_traits>

#include "attention/head_parts.cuh"
#include "attention/write_kv.h"
#include "device/dependent_launch.cuh"
#include "device/dtype.cuh"
#include "device/hadamard.cuh"
#include "device/inverse_root.cuh"
#include "device/kv_codes.cuh"
#include "device/reduce.cuh"
#include "device/rope.cuh"
#include "device/trap.cuh"
#include "device/vector.cuh"
#include "runtime/launch.h"

namespace qsun {
namespace {

constexpr int kThreads = kKvWarps * kWarp;

struct HeadsArguments {
  WriteKvCacheParams p;
  int lanes_log2;
  int q_tiles, kv_tiles;   // warps for the heads of one kind of a token
  int half;                // head_dim / 2, rounded up
  int block_log2;          // of block_size; -1 where that is no power of two
  float inverse_head_dim;  // 1 / head_dim
  float rotation_scale;    // 1 / sqrt(head_dim)
};

enum class Kind { kQuery, kKey, kValue };

template <typename T>
__device__ __forceinline__ void normalize(Part<T>& part, const Raw& low_weight, const Raw& high_weight,
                                          const HeadsArguments& a) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < Part<T>::kSize; ++i) squares = fmaf(part.low[i], part.low[i], squares);
#pragma unroll
  for (int i = 0; i < Part<T>::kSize; ++i) squares = fmaf(part.high[i], part.high[i], squares);
#pragma unroll 1
  for (int distance = (1 << a.lanes_log2) / 2; distance > 0; distance /= 2) {
    squares += __shfl_xor_sync(kAllLanes, squares, distance);
  }
  const InverseRoot scale(__fmul_rn(squares, a.inverse_head_dim) + a.p.eps);
  float weight[Part<T>::kSize];
  widen<T>(low_weight, weight);
#pragma unroll
  for (int i = 0; i < Part<T>::kSize; ++i) part.low[i] = scale.times(part.low[i], weight[i]);
  widen<T>(high_weight, weight);
#pragma unroll
  for (int i = 0; i < Part<T>::kSize; ++i) part.high[i] = scale.times(part.high[i], weight[i]);
  round_to<T>(part.low);
  round_to<T>(part.high);
}

template <typename T>
__device__ __forceinline__ void embed(Part<T>& part, const float (&cosine)[kWidth<T>],
                                      const float (&sine)[kWidth<T>]) {
#pragma unroll
  for (int i = 0; i < Part<T>::kSize; ++i) turn_pair(part.low[i], part.high[i], cosine[i], sine[i]);
  round_to<T>(part.low);
  round_to<T>(part.high);
}

template <typename T>
__device__ __forceinline__ void rotate(Part<T>& part, float scale, int member, int lanes) {
  butterflies(part.low);
  butterflies(part.high);
#pragma unroll 1
  for (int distance = 1; distance < lanes; distance *= 2) {
    const bool is_second = (member & distance) != 0;
    butterflies_across(part.low, distance, is_second);
    butterflies_across(part.high, distance, is_second);
  }
#pragma unroll
  for (int i = 0; i < Part<T>::kSize; ++i) {
    const float a = part.low[i], b = part.high[i];
    part.low[i] = (a + b) * scale;
    part.high[i] = (a - b) * scale;
  }
}

// What stands for a head in a cache of codes: scaled values, rounded.
struct Codes {
  float inverse;  // by which a value is multiplied; 0 where all codes are 0
  float scale;    // by which a code is
};

// One scale a head: max |x| / largest_code. `lanes` neighbours hold the head.
template <typename T>
__device__ __forceinline__ Codes codes_of(const Part<T>& part, float largest_code, int lanes) {
  // Magnitudes order like their bits, and infinity and NaN come last.
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < Part<T>::kSize; ++i) {
    largest = max(largest, __float_as_uint(part.low[i]) & 0x7fffffffu);
    largest = max(largest, __float_as_uint(part.high[i]) & 0x7fffffffu);
  }
#pragma unroll 1
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }
  const float magnitude = __uint_as_float(largest);
  const bool is_finite = largest < 0x7f800000u;
  Codes codes{largest_code / magnitude, magnitude / largest_code};
  // Too small to be divided by, zero included.
  if (isinf(codes.inverse)) codes = {0.0f, 0.0f};
  // Not a number, so that all of the head reads as that.
  if (!is_finite) codes = {0.0f, __uint_as_float(0x7fffffffu)};
  return codes;
}

// Makes the codes of a lane's part and stores them. `row` points to the head's first byte in the cache.
template <bool kWide, DType kCode, typename T>
__device__ __forceinline__ void store_codes(Part<T>& part, const Codes& codes, uint8_t* row,
                                            const Place& place) {
  constexpr int kSize = Part<T>::kSize;
  constexpr int kInByte = kCode == DType::kInt4 ? 2 : 1;
  const auto store_half = [&](float (&values)[kSize], int first, int count) {
    uint32_t words[kSize / 4];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      values[i] = codes.inverse == 0.0f ? 0.0f : __fmul_rn(values[i], codes.inverse);
    }
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
      if constexpr (kCode == DType::kFloat8E4M3) {
        words[i] = e4m3_word(values + 4 * i);
      } else if constexpr (kCode == DType::kInt8) {
        words[i] = int8_word(values + 4 * i);
      } else if (i % 2 == 0) {
        words[i / 2] = int4_half_word(values + 4 * i);
      } else {
        words[i / 2] |= int4_half_word(values + 4 * i) << 16;
      }
    }
    store_elements<kWide, kSize / kInByte>(row + first / kInByte, words, count / kInByte);
  };
  store_half(part.low, place.low, place.low_count);
  store_half(part.high, place.high, place.high_count);
}

template <bool kWide, typename C, typename T>
__device__ __forceinline__ void store_values(const Part<T>& part, C* row, const Place& place) {
  uint32_t words[Part<T>::kSize * sizeof(C) / 4];
  pack<C>(part.low, words);
  store_elements<kWide, Part<T>::kSize>(row + place.low, words, place.low_count);
  pack<C>(part.high, words);
  store_elements<kWide, Part<T>::kSize>(row + place.high, words, place.high_count);
}

// Stores a head of a token in the cache, its scale beside it. `row`: number of the head's row in the cache.
template <bool kWide, typename T>
__device__ __forceinline__ void append(Part<T>& part, const WriteKvCacheParams& p, Kind kind, int64_t row,
                                       const Place& place, bool is_first, int lanes) {
  void* cache = kind == Kind::kKey ? p.k_cache : p.v_cache;
  float* scales = kind == Kind::kKey ? p.k_scale : p.v_scale;
  const int64_t first = row * p.head_dim;
  if (p.kv_scales == KvScales::kNone) {
    if (p.kv_dtype == DType::kFloat32) {
      store_values<kWide>(part, static_cast<float*>(cache) + first, place);
    } else if (p.kv_dtype == DType::kFloat16) {
      store_values<kWide>(part, static_cast<__half*>(cache) + first, place);
    } else {
      store_values<kWide>(part, static_cast<__nv_bfloat16*>(cache) + first, place);
    }
    return;
  }
  auto* bytes = static_cast<uint8_t*>(cache);
  if (p.kv_scales == KvScales::kTensor) {
    // Values that are not finite are NaN there, each for itself.
#pragma unroll
    for (int i = 0; i < Part<T>::kSize; ++i) {
      if (!isfinite(part.low[i])) part.low[i] = __uint_as_float(0x7fffffffu);
      if (!isfinite(part.high[i])) part.high[i] = __uint_as_float(0x7fffffffu);
    }
    store_codes<kWide, DType::kFloat8E4M3>(part, {1.0f / *scales, 0.0f}, bytes + first, place);
    return;
  }
  const bool is_int8 = p.kv_dtype == DType::kInt8, is_int4 = p.kv_dtype == DType::kInt4;
  const Codes codes = codes_of(part, is_int8 ? kLargestInt8 : is_int4 ? kLargestInt4 : kLargestE4m3, lanes);
  if (is_first) scales[row] = codes.scale;
  if (is_int8) {
    store_codes<kWide, DType::kInt8>(part, codes, bytes + first, place);
  } else if (is_int4) {
    store_codes<kWide, DType::kInt4>(part, codes, bytes + first / 2, place);
  } else {
    store_codes<kWide, DType::kFloat8E4M3>(part, codes, bytes + first, place);
  }
}

// The row of (slot, head) in a cache, of head_dim elements each.
__device__ __forceinline__ int64_t cache_row(const HeadsArguments& a, int64_t slot, int64_t head) {
  int64_t block, offset;
  if (a.block_log2 >= 0) {
    block = slot >> a.block_log2;
    offset = slot - (block << a.block_log2);
  } else {
    block = slot / a.p.block_size;
    offset = slot % a.p.block_size;
  }
  trap_unless(block < a.p.num_blocks);
  return (block * a.p.num_kv_heads + head) * a.p.block_size + offset;
}

// kAdds: q, k and v are float32 sums of the splits of a product.
template <typename T, bool kWide, bool kAdds>
__device__ __forceinline__ void write_heads(const HeadsArguments& a) {
  constexpr int kSize = Part<T>::kSize;
  const WriteKvCacheParams& p = a.p;

  // Heads of this warp, and the part of this lane
  const int lanes = 1 << a.lanes_log2;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int member = lane & (lanes - 1);
  const int64_t token = blockIdx.x;
  int tile = static_cast<int>(blockIdx.y) * kKvWarps + static_cast<int>(threadIdx.x) / kWarp;
  Kind kind = Kind::kQuery;
  if (tile >= a.q_tiles) {
    tile -= a.q_tiles;
    kind = Kind::kKey;
    if (tile >= a.kv_tiles) {
      tile -= a.kv_tiles;
      kind = Kind::kValue;
    }
  }
  const int64_t head = (static_cast<int64_t>(tile) << (5 - a.lanes_log2)) + (lane >> a.lanes_log2);
  const int head_dim = static_cast<int>(p.head_dim);
  const bool has_head = head < (kind == Kind::kQuery ? p.num_q_heads : p.num_kv_heads);
  Place place;
  place.low = member * kSize;
  place.high = place.low + a.half;
  place.low_count = has_head ? max(0, min(kSize, a.half - place.low)) : 0;
  place.high_count = has_head ? max(0, min(kSize, head_dim - place.high)) : 0;

  if (!p.settled) wait_for_producers();
  launch_dependents();  // see write_kv.h

  // Load: all that waits for nothing, what a position leads to, then what is new
  const bool normalizes = kind != Kind::kValue && p.k_norm != nullptr;
  const bool embeds = kind != Kind::kValue && p.cos_sin != nullptr;
  const int64_t slot = kind == Kind::kQuery ? 0 : load_past_l1(p.slot_mapping + token);
  const int64_t position = embeds ? load_past_l1(p.positions + token) : 0;
  Raw low_weight, high_weight;
  if (normalizes) {
    const auto* weight = static_cast<const T*>(kind == Kind::kQuery ? p.q_norm : p.k_norm);
    low_weight = load_part<kWide>(weight + place.low, place.low_count);
    high_weight = load_part<kWide>(weight + place.high, place.high_count);
  }
  float cosine[kSize], sine[kSize];
  if (embeds) {
    trap_unless(position >= 0 && position < p.max_positions);
    const float* angles = p.cos_sin + position * head_dim + place.low;
    load_angles<kWide>(angles, place.low_count, cosine);
    load_angles<kWide>(angles + a.half, place.low_count, sine);
  }
  if (p.settled) wait_for_producers();
  if (kind == Kind::kValue && tile >= a.kv_tiles) return;
  using Source = std::conditional_t<kAdds, float, T>;
  const Source* source;
  if (kind == Kind::kQuery) {
    source = static_cast<const Source*>(p.q) + token * p.q_stride;
  } else if (kind == Kind::kKey) {
    source = static_cast<const Source*>(p.k) + token * p.k_stride;
  } else {
    source = static_cast<const Source*>(p.v) + token * p.v_stride;
  }
  source += head * head_dim;
  Raw low, high;
  if constexpr (kAdds) {
    add_part<kWide, T>(source, p.splits, p.split_stride, place, low, high);
  } else {
    low = load_part<kWide>(source + place.low, place.low_count);
    high = load_part<kWide>(source + place.high, place.high_count);
  }
  if (slot < 0) return;
  const int64_t row = kind == Kind::kQuery ? token * p.num_q_heads + head : cache_row(a, slot, head);

  // Values that go to a cache of their own dtype keep their bits
  if (kind == Kind::kValue && p.kv_dtype == p.dtype) {
    T* target = static_cast<T*>(p.v_cache) + row * head_dim;
    store_elements<kWide, kSize>(target + place.low, low.words, place.low_count);
    store_elements<kWide, kSize>(target + place.high, high.words, place.high_count);
    return;
  }

  // Steps
  Part<T> part;
  widen<T>(low, part.low);
  widen<T>(high, part.high);
  if (normalizes) normalize(part, low_weight, high_weight, a);
  if (embeds) embed(part, cosine, sine);
  if (kind != Kind::kValue && p.rotate) rotate(part, a.rotation_scale, member, lanes);

  // Store
  if (kind == Kind::kQuery) {
    store_values<kWide>(part, static_cast<T*>(p.q_out) + row * head_dim, place);
  } else {
    append<kWide>(part, p, kind, row, place, member == 0 && has_head, lanes);
  }
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) write_kv_heads_kernel(const __grid_constant__ HeadsArguments a) {
  write_heads<T, kWide, false>(a);
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) write_kv_sums_kernel(const __grid_constant__ HeadsArguments a) {
  write_heads<T, kWide, true>(a);
}

int log2_of(int64_t value) {
  int log2 = 0;
  while (int64_t{1} << log2 < value) ++log2;
  return log2;
}

}  // namespace

cudaError_t launch_write_kv_heads(const WriteKvCacheParams& p, const WriteKvCacheConfig& config) {
  HeadsArguments a{};
  a.p = p;
  a.lanes_log2 = log2_of(config.lanes);
  a.q_tiles = static_cast<int>(head_tiles(p.num_q_heads, config.lanes));
  a.kv_tiles = static_cast<int>(head_tiles(p.num_kv_heads, config.lanes));
  a.half = static_cast<int>(ceil_div(p.head_dim, 2));
  a.block_log2 = (p.block_size & (p.block_size - 1)) == 0 ? log2_of(p.block_size) : -1;
  a.inverse_head_dim = 1.0f / static_cast<float>(p.head_dim);
  a.rotation_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  LaunchOptions options;
  options.overlaps_producer = config.overlaps_producer;
  const dim3 grid(p.num_tokens, ceil_div(a.q_tiles + 2 * a.kv_tiles, kKvWarps));
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto launch = [&](auto* kernel) {
      return launch_with(options, kernel, grid, dim3(kThreads), p.device, p.stream, a);
    };
    if constexpr (sizeof(T) == 2) {
      if (p.splits > 0) {
        return launch(config.is_wide ? write_kv_sums_kernel<T, true> : write_kv_sums_kernel<T, false>);
      }
    }
    return launch(config.is_wide ? write_kv_heads_kernel<T, true> : write_kv_heads_kernel<T, false>);
  });
}

}  // namespace qsun
