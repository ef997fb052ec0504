// x (M, K) times a panel weight, for few tokens: weights stream once from memory through the tensor cores.
//
//                        columns in blocks of 128, split over the blocks of a cluster, then over warps in
//                        turn |  rank 0                        |  rank 1                        |
//   up to kRowTiles * 16 | w0 | w1 | .. | w7 | w0 | w1 .. | w0 | w1 | ..                  |
//   weight rows          |    |    |    |    |    |       |    |    |                     |
//
// A warp owns whole blocks of columns, weights and x alike, so nothing in its loop waits for another warp:
// its lanes copy both into a ring of its own (cp.async), read the codes back as operand A (rows of the weight
// are the 16 rows of m16n8k16), and x as operand B (tokens are its 8 columns), each x fragment used for all
// row tiles. At the end warps add up through shared memory, blocks of the cluster through each other's, both
// in a fixed order.
//
// Weights do not depend on the kernel before: the ring is filled with them before wait_for_producers(), so
// the memory stays busy from one launch to the next. x follows the wait.
//
// Up to two token tiles the codes enter the product as exact integers and the scale is applied to the float32
// sum of a group ("exact"). With more, sums of groups would take as many registers as the result: weights are
// rounded to (code - zero) * scale in 16 bits instead ("rounded"), as a dense 16-bit weight would be.
//
// Small matrices leave two microseconds between the wait and the last store, so the code is short (loops stay
// loops), and the integer unit, which runs at half rate, does nothing but take codes apart.
#pragma once

#include <type_traits>

#include "device/activation.cuh"
#include "device/async_copy.cuh"
#include "device/cluster.cuh"
#include "device/dependent_launch.cuh"
#include "device/dtype.cuh"
#include "device/mma.cuh"
#include "device/panel_codes.cuh"
#include "device/vector.cuh"
#include "runtime/alignment.h"
#include "runtime/launch.h"
#include "wna16/panels.h"
#include "wna16/stream.h"

namespace qsun {
namespace {

constexpr uint32_t kWarpLanes = 32;
constexpr uint32_t kPieceBytes = 16;  // of an asynchronous copy
constexpr int kExactTokenTiles = 2;

struct StreamArguments {
  Wna16PanelsParams p;
  EvenShares row_tiles;      // of the weight, padding left out, over the grid's x
  EvenShares column_ranges;  // column blocks over the ranks of a cluster
  int column_blocks;
  int tile_bytes;
  uint32_t group_quarters;  // of a block, in one group
  int stages;
  int x_rows;        // of a stage
  int weight_bytes;  // of a stage
  bool wide_x;       // x can be copied 16 bytes at a time
};

// Copies the columns k0 .. k0 + 127 of x one by one: for a permuted weight, for rows of x that wider copies
// cannot take, and for the last columns; zeros where x has no column. Out of line:
// the instructions of the common path stay together.
template <typename T>
__device__ __noinline__ void gather_x(const StreamArguments& a, const T* x, int x_rows, int k0, uint32_t rows,
                                      uint32_t lane) {
#pragma unroll 1
  for (uint32_t column = lane; column < kBlockColumns; column += kWarpLanes) {
    const int k = a.p.perm != nullptr ? load_element(a.p.perm + k0 + column) : k0 + static_cast<int>(column);
    const bool inside = k >= 0 && k < a.p.K;
#pragma unroll 1
    for (int row = 0; row < x_rows; ++row) {
      const T value = inside ? x[row * a.p.x_stride + k] : from_float<T>(0.0f);
      store_shared_u16(rows + row * kXRowBytes + column * 2, bits_of(value));
    }
  }
}

// Where a warp's copies have got to: the next column block of the next group of row tiles.
struct Cursor {
  int tile;  // first of the group; end_tile and beyond: nothing is left
  int column_block;
};

// A warp's way through the weight and x, and its ring of stages [weights | x].
template <typename T, int kBits, int kRowTiles>
struct Copies {
  const StreamArguments& a;
  const T* x;  // this block's first row
  int x_rows;
  int end_tile;
  int first, end, step;  // column blocks: first, first + step, ...
  uint32_t ring, ring_end, stage_bytes;
  uint32_t lane;
  uint64_t policy;
  Cursor next;
  uint32_t stage;  // that `next` goes to

  __device__ __forceinline__ bool is_done() const { return next.tile >= end_tile; }

  __device__ __forceinline__ void begin(int tile) {
    next = {first < end ? tile : end_tile, first};
    stage = ring;
  }

  __device__ __forceinline__ void advance() {
    next.column_block += step;
    if (next.column_block >= end) next.column_block = first, next.tile += kRowTiles;
    stage += stage_bytes;
    if (stage == ring_end) stage = ring;
  }

  // One column block of up to kRowTiles row tiles. Row blocks of a panel lie apart by all their column
  // blocks, so tiles are contiguous up to the next row block.
  __device__ __forceinline__ void weights() const {
    const int tiles = min(end_tile - next.tile, kRowTiles);
    const uint32_t in_row_block = static_cast<uint32_t>(next.tile) % kBlockTiles;
    const int64_t row_block = static_cast<uint32_t>(next.tile) / kBlockTiles;
    const uint8_t* source =
        a.p.panels +
        ((row_block * a.column_blocks + next.column_block) * kBlockTiles + in_row_block) * a.tile_bytes;
    const int contiguous = min(tiles, kBlockTiles - static_cast<int>(in_row_block));
    const uint8_t* other =
        source + (contiguous + (a.column_blocks - 1) * int64_t{kBlockTiles}) * a.tile_bytes;
    static_assert(tile_bytes(kBits, kMaxGroups, true) - tile_code_bytes(kBits) <= kWarpLanes * kPieceBytes,
                  "what follows the codes is at most a piece a lane");
    const uint32_t at = lane * kPieceBytes;
    const bool has_rest = at < static_cast<uint32_t>(a.tile_bytes - tile_code_bytes(kBits));
    uint32_t target = stage + at;
#pragma unroll 1
    for (int i = 0; i < tiles; ++i, source += a.tile_bytes, target += a.tile_bytes) {
      if (i == contiguous) source = other;
#pragma unroll
      for (uint32_t j = 0; j < tile_code_bytes(kBits); j += kWarpLanes * kPieceBytes) {
        copy_async_streamed(target + j, source + at + j, policy);
      }
      if (has_rest)
        copy_async_streamed(target + tile_code_bytes(kBits), source + at + tile_code_bytes(kBits), policy);
    }
  }

  // The rows of x for the same columns; zeros where x has no column.
  __device__ __forceinline__ void activations() const {
    const int k0 = next.column_block * kBlockColumns;
    const uint32_t rows = stage + a.weight_bytes;
    if (!a.wide_x) return gather_x<T>(a, x, x_rows, k0, rows, lane);
    constexpr uint32_t kPieces = kBlockColumns * 2 / kPieceBytes;
    const int k = k0 + static_cast<int>(lane % kPieces * 8);
    const int bytes = min(max(static_cast<int>(a.p.K) - k, 0), 8) * 2;
    const T* source = x + lane / kPieces * a.p.x_stride + (bytes > 0 ? k : 0);
    uint32_t target = rows + lane / kPieces * kXRowBytes + lane % kPieces * kPieceBytes;
#pragma unroll 1
    for (int row = static_cast<int>(lane / kPieces); row < x_rows; row += kWarpLanes / kPieces) {
      copy_async_or_zero(target, source, bytes);
      source += kWarpLanes / kPieces * a.p.x_stride;
      target += kWarpLanes / kPieces * kXRowBytes;
    }
  }
};

// The words of this lane for quarter q (two steps) of a row tile, at the places of steps 0 and 1.
template <int kBits>
__device__ __forceinline__ void load_words(uint32_t tile, uint32_t q, uint32_t lane,
                                           uint32_t (&words)[kLaneWords<kBits>]) {
  const uint32_t codes = tile + lane * kPieceBytes;
  if constexpr (kBits == 8) {
    const uint4 loaded = load_shared_u128(codes + q * (kWarpLanes * kPieceBytes));
    words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
  } else if constexpr (kBits == 4) {
    const uint2 loaded = load_shared_u64(codes + q / 2 * (kWarpLanes * kPieceBytes) + q % 2 * 8);
    words[0] = loaded.x, words[1] = loaded.y;
  } else {
    words[0] = load_shared_u32(codes + q * 4);
    if constexpr (kBits == 3) {
      words[4] = load_shared_u32(tile + tile_code_bytes(3) + lane * 8 + q / 2 * 4) >> (q % 2 * 8);
    }
  }
}

// Multiplies one block of columns, two steps ("a quarter") at a time, group by group.
//
// kExact: `parts` holds the sums of (code - zero) * x of the group under way, which its scale then takes into
// `sums`; else weights are rounded with their scale and summed at once.
template <typename T, int kBits, int kTokenTiles, int kRowTiles, bool kExact>
__device__ __forceinline__ void multiply_block(const StreamArguments& a, uint32_t stage,
                                               const uint32_t (&x_addresses)[kTokenTiles], uint32_t lane,
                                               float (&sums)[kRowTiles][kTokenTiles][4]) {
  constexpr int kShift = kExact ? kExactShift<T, kBits> : 0;
  const int groups = a.p.groups_per_block;
  const uint32_t tables = stage + tile_code_bytes(kBits) + tile_third_bit_bytes(kBits);
  uint32_t scales = tables + lane / 4u * groups * 4;
  uint32_t zeros = tables + tile_scale_bytes(groups) + lane / 4u * groups * 2;
  uint32_t q = 0;
#pragma unroll 1
  for (int group = 0; group < groups; ++group, scales += 4, zeros += 2) {
    // What the group's codes need
    uint32_t zero[kRowTiles];  // of row g in the low byte, of row g + 8 in the next
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) zero[rt] = (1u << (kBits - 1)) * 0x101u;
    if (a.p.has_zeros) {
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) zero[rt] = load_shared_u16(zeros + rt * a.tile_bytes);
    }
    uint32_t scale[kRowTiles];  // of row g in the low half, of row g + 8 in the high
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) scale[rt] = load_shared_u32(scales + rt * a.tile_bytes);

    // Multiply
    float parts[kExact ? kRowTiles : 1][kTokenTiles][4] = {};
#pragma unroll 1
    for (const uint32_t end = q + a.group_quarters; q < end; ++q) {
      uint32_t b[kTokenTiles][4];
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) load_matrices(b[j], x_addresses[j] + q * 64);
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
        uint32_t words[kLaneWords<kBits>];
        load_words<kBits>(stage + rt * a.tile_bytes, q, lane, words);
        const ZeroOffset<T, kBits, kShift> offset[2] = {ZeroOffset<T, kBits, kShift>(zero[rt] & 0xffu),
                                                        ZeroOffset<T, kBits, kShift>(zero[rt] >> 8)};
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          uint32_t w[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            if constexpr (kExact) {
              w[r] = exact_pair<T, kBits, kShift>(words, s, r, offset[r % 2]);
            } else {
              const uint32_t twice = permute_bytes(scale[rt], scale[rt], r % 2 == 0 ? 0x1010 : 0x3232);
              w[r] = scaled_pair<T, kBits>(words, s, r, offset[r % 2], twice);
            }
          }
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            mma_m16n8k16<T>(kExact ? parts[rt][j] : sums[rt][j], w, b[j][2 * s], b[j][2 * s + 1]);
          }
        }
      }
    }

    // Scale
    if constexpr (kExact) {
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
        const Pair<T> both = as_pair<T>(scale[rt]);
        const float factor[2] = {to_float(both.x), to_float(both.y)};
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            sums[rt][j][c] = fmaf(parts[rt][j][c], factor[c / 2], sums[rt][j][c]);
          }
        }
      }
    }
  }
}

// Waits for the oldest of a ring's stages. A chain of comparisons: a switch would become an indirect jump.
__device__ __forceinline__ void wait_for_stage(int stages) {
  if (stages == 2) {
    wait_async_copies<0>();
  } else if (stages == 3) {
    wait_async_copies<1>();
  } else if (stages == 4) {
    wait_async_copies<2>();
  } else {
    wait_async_copies<4>();
  }
}

// Blocks of a multiprocessor that registers must allow: this kernel's and, beside it, the next one's, whose
// weights are already on their way.
template <int kTokenTiles>
constexpr int kStreamBlocks = kTokenTiles > 2 ? 1 : 2;

template <typename T, int kBits, int kTokenTiles, int kRowTiles>
__global__ void __launch_bounds__(max_stream_warps(kTokenTiles, kRowTiles) * kWarpLanes,
                                  kStreamBlocks<kTokenTiles>)
    wna16_stream_kernel(const __grid_constant__ StreamArguments a) {
  constexpr bool kExact = kTokenTiles <= kExactTokenTiles;
  launch_dependents();

  // Roles
  const uint32_t shared = shared_address(dynamic_shared());
  const uint32_t lane = threadIdx.x % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x / kWarpLanes),
            warps = static_cast<int>(blockDim.x / kWarpLanes);
  const int rank = static_cast<int>(blockIdx.y), ranks = static_cast<int>(gridDim.y);
  const int first_tile = a.row_tiles.begin(static_cast<int>(blockIdx.x));
  const int end_tile = a.row_tiles.begin(static_cast<int>(blockIdx.x) + 1);
  const int m0 = static_cast<int>(blockIdx.z) * kTokenTiles * kTokens;
  const int x_rows = min(static_cast<int>(a.p.M) - m0, a.x_rows);
  const int stage_bytes = a.weight_bytes + a.x_rows * kXRowBytes;
  const uint32_t ring = shared + kHeadBytes + warp * a.stages * stage_bytes;
  const uint32_t part_places = shared + kZeroRowBytes;  // one word a warp
  Copies<T, kBits, kRowTiles> copies{a,
                                     static_cast<const T*>(a.p.x) + m0 * a.p.x_stride,
                                     x_rows,
                                     end_tile,
                                     a.column_ranges.begin(rank) + warp,
                                     a.column_ranges.begin(rank + 1),
                                     warps,
                                     ring,
                                     ring + a.stages * stage_bytes,
                                     static_cast<uint32_t>(stage_bytes),
                                     lane,
                                     evict_first_policy()};

  // Fill the ring: weights before the wait, x after it
  if (!a.p.prefetch_weights) wait_for_producers();
  copies.begin(first_tile);
#pragma unroll 1
  for (int i = 0; i < a.stages - 1; ++i) {
    if (!copies.is_done()) {
      copies.weights();
      copies.advance();
    }
    commit_async_copies();
  }
  if (threadIdx.x < kZeroRowBytes / 16) store_shared_u128(shared + threadIdx.x * 16, {0, 0, 0, 0});
  __syncthreads();
  wait_for_producers();
  copies.begin(first_tile);
#pragma unroll 1
  for (int i = 0; i < a.stages - 1; ++i) {
    if (!copies.is_done()) {
      copies.activations();
      copies.advance();
    }
    commit_async_copies();
  }

  uint32_t read = ring;
#pragma unroll 1
  for (int tile = first_tile; tile < end_tile; tile += kRowTiles) {
    // Multiply
    float sums[kRowTiles][kTokenTiles][4] = {};
    uint32_t part = ring;
#pragma unroll 1
    for (int column_block = copies.first; column_block < copies.end; column_block += warps) {
      wait_for_stage(a.stages);
      __syncwarp();
      if (!copies.is_done()) {
        copies.weights();
        copies.activations();
        copies.advance();
      }
      commit_async_copies();

      uint32_t x_addresses[kTokenTiles];
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int row = static_cast<int>(j * kTokens + lane % 8);
        x_addresses[j] =
            (row < x_rows ? read + a.weight_bytes + row * kXRowBytes : shared) + lane / 8 * kPieceBytes;
      }
      multiply_block<T, kBits, kTokenTiles, kRowTiles, kExact>(a, read, x_addresses, lane, sums);
      part = read;
      read += stage_bytes;
      if (read == copies.ring_end) read = ring;
    }

    // Lay this warp's sums out by token and row, in the stage that it read last
    constexpr int kRows = kRowTiles * kTileRows;
    constexpr int kPartRow = part_row_floats(kRowTiles) * 4;
    const auto barrier = [&] {
      if (ranks > 1) {
        cluster_barrier();
      } else {
        __syncthreads();
      }
    };
    __syncwarp();
    if (lane == 0) store_shared_u32(part_places + warp * 4, part);
    part += lane % 4 * 2 * kPartRow + lane / 4 * 4;
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      if (j * kTokens >= x_rows) break;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (static_cast<int>(j * kTokens + lane % 4 * 2 + c % 2) >= x_rows) continue;
#pragma unroll
        for (int rt = 0; rt < kRowTiles; ++rt) {
          store_shared_f32(part + (j * kTokens + c % 2) * kPartRow + (rt * kTileRows + c / 2 * 8) * 4,
                           sums[rt][j][c]);
        }
      }
    }
    barrier();

    // Add up warps, then ranks, in order. The blocks of a cluster share the outputs.
    constexpr float kUnshift = kExact ? static_cast<float>(1u << kExactShift<T, kBits>) : 1.0f;
    const int is_pair = a.p.gate_up ? 1 : 0;  // an output takes a row of gate and one of up
    const int64_t n0 = static_cast<int64_t>(tile) * kTileRows >> is_pair;
    const int columns = min(min(end_tile - tile, kRowTiles) * kTileRows >> is_pair,
                            static_cast<int>((a.p.N >> is_pair) - n0));
    const int columns_log2 = log2_of(kRows) - is_pair;
    auto* out = static_cast<T*>(a.p.out) + m0 * a.p.out_stride + n0;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) + rank * static_cast<int>(blockDim.x);
         i < x_rows << columns_log2; i += static_cast<int>(blockDim.x) * ranks) {
      const int token = i >> columns_log2, column = i & ((1 << columns_log2) - 1);
      if (column >= columns) continue;
      const int row = is_pair ? column / 8 * kTileRows + column % 8 : column;
      uint32_t place = token * kPartRow + row * 4;
      float value = 0.0f, gate = 0.0f;
#pragma unroll 1
      for (int half = 0; half <= is_pair; ++half, place += 8 * 4) {
        gate = value;
        value = 0.0f;
#pragma unroll 1
        for (int other = 0; other < ranks; ++other) {
#pragma unroll 4
          for (int w = 0; w < warps; ++w) {
            const uint32_t at = part_places + w * 4;
            if (ranks > 1) {
              value += __uint_as_float(load_from_block(load_from_block(at, other) + place, other));
            } else {
              value += load_shared_f32(load_shared_u32(at) + place);
            }
          }
        }
        value *= kUnshift;
      }
      if (is_pair) {
        value *= silu(gate);
      } else {
        if (a.p.bias != nullptr) value += to_float(static_cast<const T*>(a.p.bias)[n0 + column]);
        if (a.p.residual != nullptr) {
          value +=
              to_float(static_cast<const T*>(a.p.residual)[(m0 + token) * a.p.residual_stride + n0 + column]);
        }
      }
      out[token * a.p.out_stride + column] = from_float<T>(value);
    }
    // The stages are copied to again, and a block's shared memory lives, when all have read them
    if (ranks > 1 || tile + kRowTiles < end_tile) barrier();
  }
  wait_async_copies<0>();
}

template <typename T, int kBits, int kTokenTiles, int kRowTiles>
cudaError_t launch_stream_tile(const Wna16PanelsParams& p, const StreamConfig& config) {
  StreamArguments a{};
  a.p = p;
  a.column_blocks = static_cast<int>(p.column_blocks);
  a.row_tiles = EvenShares(static_cast<int>(ceil_div(p.N, kTileRows)), config.row_blocks);
  a.column_ranges = EvenShares(a.column_blocks, config.split_k);
  a.tile_bytes = tile_bytes(p.bits, p.groups_per_block, p.has_zeros);
  a.group_quarters = 4 / static_cast<uint32_t>(p.groups_per_block);
  a.stages = config.stages;
  a.x_rows = static_cast<int>(p.M < kTokenTiles * kTokens ? p.M : kTokenTiles * kTokens);
  a.weight_bytes = kRowTiles * a.tile_bytes;
  a.wide_x = p.perm == nullptr && wide({p.x}, {p.x_stride * static_cast<int64_t>(sizeof(T))});
  const dim3 grid(config.row_blocks, config.split_k, ceil_div(p.M, kTokenTiles * kTokens));
  LaunchOptions options;
  options.shared_bytes = stream_shared_bytes(p, config);
  options.cluster = dim3(1, config.split_k, 1);
  options.overlaps_producer = config.overlaps_producer;
  const dim3 block(config.warps * kWarpLanes);
  return launch_with(options, wna16_stream_kernel<T, kBits, kTokenTiles, kRowTiles>, grid, block, p.device,
                     p.stream, a);
}

template <typename T, int kBits>
cudaError_t launch_stream(const Wna16PanelsParams& p, const StreamConfig& config) {
  const auto tiles = [&](auto token_tiles) {
    constexpr int kTokenTiles = decltype(token_tiles)::value;
    switch (config.row_tiles) {
      case 1:
        if constexpr (kTokenTiles == 1) return launch_stream_tile<T, kBits, kTokenTiles, 1>(p, config);
        break;
      case 2:
        if constexpr (kTokenTiles <= 2) return launch_stream_tile<T, kBits, kTokenTiles, 2>(p, config);
        break;
      case 4:
        return launch_stream_tile<T, kBits, kTokenTiles, 4>(p, config);
    }
    return cudaErrorInvalidConfiguration;
  };
  switch (config.token_tiles) {
    case 1:
      return tiles(std::integral_constant<int, 1>());
    case 2:
      return tiles(std::integral_constant<int, 2>());
    case 3:
      return tiles(std::integral_constant<int, 3>());
    case 4:
      return tiles(std::integral_constant<int, 4>());
    case 6:
      return tiles(std::integral_constant<int, 6>());
    case 8:
      return tiles(std::integral_constant<int, 8>());
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace
}  // namespace qsun
