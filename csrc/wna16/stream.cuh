// x (M, K) times a panel weight, for few tokens: weights stream once from memory through the tensor cores.
//
//                        columns in blocks of 128, which the warps of a block take in turn
//   up to kRowTiles * 16 | w0 | w1 | .. | w7 | w0 | w1 | .. | w7 | ..
//   weight rows          |    |    |    |    |    |    |    |    |
//
// A warp owns whole blocks of columns, weights and x alike, so nothing in its loop waits for another warp:
// both come into a ring of its own in shared memory (stream_copies.cuh). It takes the codes as operand A
// (rows of the weight are the 16 rows of m16n8k16) and x as operand B (tokens are its 8 columns), each x
// fragment used for all row tiles, whose products are independent of each other. At the end warps add up
// through shared memory in a fixed order.
//
// Weights do not depend on the kernel before: the ring is filled with them before wait_for_producers(), so
// the memory stays busy from one launch to the next. x follows the wait.
//
// Up to two token tiles the codes enter the product as exact integers and the scale is applied to the float32
// sum of a group ("exact"). With more, sums of groups would take as many registers as the result: weights are
// rounded to (code - zero) * scale in 16 bits instead ("rounded"), as a dense 16-bit weight would be.
#pragma once

#include <type_traits>

#include "device/activation.cuh"
#include "device/dependent_launch.cuh"
#include "device/mma.cuh"
#include "device/panel_codes.cuh"
#include "runtime/alignment.h"
#include "runtime/launch.h"
#include "wna16/stream_copies.cuh"

namespace qsun {
namespace {

// The words of this lane for quarter q (two steps) of a row tile, at the places of steps 0 and 1. codes: this
// lane's first piece.
template <int kBits>
__device__ __forceinline__ void load_words(uint32_t codes, uint32_t third_bits, uint32_t q,
                                           uint32_t (&words)[kLaneWords<kBits>]) {
  if constexpr (kBits == 8) {
    const uint4 loaded = load_shared_u128(codes + q * (kWarpLanes * kPieceBytes));
    words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
  } else if constexpr (kBits == 4) {
    const uint2 loaded = load_shared_u64(codes + q / 2 * (kWarpLanes * kPieceBytes) + q % 2 * 8);
    words[0] = loaded.x, words[1] = loaded.y;
  } else {
    words[0] = load_shared_u32(codes + q * 4);
    if constexpr (kBits == 3) words[4] = load_shared_u32(third_bits + q / 2 * 4) >> (q % 2 * 8);
  }
}

// Multiplies one block of columns, two steps ("a quarter") at a time, group by group. kOneGroup: the block is
// one group; else each quarter is taken as one.
//
// kExact: `parts` holds the sums of (code - zero) * x of the group under way, which its scale then takes into
// `sums`; else weights are rounded with their scale and summed at once.
template <typename T, int kBits, int kTokenTiles, int kRowTiles, bool kOneGroup>
__device__ __forceinline__ void multiply_block(const StreamArguments& a, uint32_t stage,
                                               const uint32_t (&x_addresses)[kTokenTiles], uint32_t lane,
                                               float (&sums)[kRowTiles][kTokenTiles][4]) {
  constexpr bool kExact = kTokenTiles <= kExactTokenTiles;
  constexpr int kShift = kExact ? kExactShift<T, kBits> : 0;
  constexpr int kGroups = kOneGroup ? 1 : kMaxGroups, kQuarters = kMaxGroups / kGroups;
  // Products on one sum wait for each other: with few sums, those of even and of odd steps are kept apart.
  constexpr int kChains = kExact && kTokenTiles * kRowTiles < 4 ? 2 : 1;
  const int groups = kOneGroup ? 1 : a.p.groups_per_block;
  const uint32_t codes = stage + lane * kPieceBytes, third_bits = stage + tile_code_bytes(kBits) + lane * 8;
  const uint32_t tables = stage + tile_code_bytes(kBits) + tile_third_bit_bytes(kBits);
  const uint32_t scales = tables + lane / 4u * groups * 4;
  const uint32_t zeros = tables + tile_scale_bytes(groups) + lane / 4u * groups * 2;
#pragma unroll 1
  for (uint32_t group = 0; group < kGroups; ++group) {
    // What the group's codes need
    const uint32_t own = kOneGroup ? 0 : group * groups / kMaxGroups;
    uint32_t zero[kRowTiles];   // of row g in the low byte, of row g + 8 in the next
    uint32_t scale[kRowTiles];  // of row g in the low half, of row g + 8 in the high
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
      scale[rt] = load_shared_u32(scales + own * 4 + rt * a.tile_bytes);
      zero[rt] = (1u << (kBits - 1)) * 0x101u;
    }
    if (a.p.has_zeros) {
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) zero[rt] = load_shared_u16(zeros + own * 2 + rt * a.tile_bytes);
    }

    // Multiply
    float parts[kExact ? kChains : 1][kExact ? kRowTiles : 1][kTokenTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kQuarters; ++i) {
      const uint32_t q = group * kQuarters + i;
      uint32_t b[kTokenTiles][4];
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) load_matrices(b[j], x_addresses[j] + q * 64);
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
        uint32_t words[kLaneWords<kBits>];
        load_words<kBits>(codes + rt * a.tile_bytes, third_bits + rt * a.tile_bytes, q, words);
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
            mma_m16n8k16<T>(kExact ? parts[s % kChains][rt][j] : sums[rt][j], w, b[j][2 * s],
                            b[j][2 * s + 1]);
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
            float part = parts[0][rt][j][c];
            if constexpr (kChains == 2) part += parts[1][rt][j][c];
            sums[rt][j][c] = fmaf(part, factor[c / 2], sums[rt][j][c]);
          }
        }
      }
    }
  }
}

// What an output takes besides its product.
template <typename T>
struct Addends {
  T bias, residual;
};

template <typename T, int kBits, int kTokenTiles, int kRowTiles, bool kEngine>
__global__ void __launch_bounds__(max_stream_warps(kTokenTiles, kRowTiles, kBits) * kWarpLanes,
                                  stream_blocks_per_sm(kTokenTiles, kRowTiles))
    wna16_stream_kernel(const __grid_constant__ StreamArguments a) {
#if !QSUN_HAS_COPY_ENGINE
  if constexpr (kEngine) {
    __trap();  // never chosen: compiled for architectures without it only to keep one list of sources
  } else
#endif
  {
    launch_dependents();

    // Roles
    const uint32_t shared = shared_address(dynamic_shared());
    const uint32_t lane = threadIdx.x % kWarpLanes;
    const int warp = static_cast<int>(threadIdx.x / kWarpLanes),
              warps = static_cast<int>(blockDim.x / kWarpLanes);
    const int first_tile = a.row_tiles.begin(static_cast<int>(blockIdx.x));
    const int end_tile = a.row_tiles.begin(static_cast<int>(blockIdx.x) + 1);
    const int m0 = static_cast<int>(blockIdx.y) * kTokenTiles * kTokens;
    const int x_rows = min(static_cast<int>(a.p.M) - m0, a.x_rows);
    const uint32_t stage_bytes = a.memory.stage_bytes;
    const uint32_t ring = shared + kHeadBytes + warp * a.memory.ring_bytes;
    // Blocks that run at once begin at different columns: all reading the same x at the same time would have
    // the few slices of the L2 that hold it answer one after another.
    const int own_blocks = warp < a.column_blocks ? (a.column_blocks - warp - 1) / warps + 1 : 1;
    const int start = warp + static_cast<int>(blockIdx.x) % own_blocks * warps;
    const uint32_t barriers = shared + kZeroRowBytes + warp * kMaxStreamStages * kBarrierBytes;
    StreamCopies<T, kBits, kRowTiles, kEngine> copies{a,
                                                      static_cast<const T*>(a.p.x) + m0 * a.p.x_stride,
                                                      x_rows,
                                                      end_tile,
                                                      warp,
                                                      warps,
                                                      start,
                                                      ring,
                                                      ring + a.memory.ring_bytes,
                                                      stage_bytes,
                                                      barriers,
                                                      lane,
                                                      evict_first_policy()};

    // Fill the ring: weights before the wait, x after it
    copies.init_barriers();
    if (!a.p.prefetch_weights) wait_for_producers();
    copies.begin(first_tile);
#pragma unroll 1
    for (int i = 0; i < a.stages; ++i) {
      if (!copies.is_done()) {
        copies.weights();
        copies.advance();
      }
      copies.commit();
    }
    if (threadIdx.x < kZeroRowBytes / 16) store_shared_u128(shared + threadIdx.x * 16, {0, 0, 0, 0});
    __syncthreads();
    wait_for_producers();
    copies.begin(first_tile);
#pragma unroll 1
    for (int i = 0; i < a.stages; ++i) {
      if (!copies.is_done()) {
        copies.activations();
        copies.advance();
      }
      copies.commit();
    }

    constexpr int kRows = kRowTiles * kTileRows;
    constexpr int kPartRow = part_row_floats(kRowTiles) * 4;
    const uint32_t parts = shared + a.memory.part_offset, part_stride = a.memory.part_stride;
    uint32_t read = ring, read_barrier = barriers, parity = 0;
#pragma unroll 1
    for (int tile = first_tile; tile < end_tile; tile += kRowTiles) {
      // Outputs of this tile: token and column of each
      const int is_pair = a.p.gate_up ? 1 : 0;  // an output takes a row of gate and one of up
      const int64_t n0 = static_cast<int64_t>(tile) * kTileRows >> is_pair;
      const int columns = min(min(end_tile - tile, kRowTiles) * kTileRows >> is_pair,
                              static_cast<int>((a.p.N >> is_pair) - n0));
      const int columns_log2 = log2_of(kRows) - is_pair;
      const int outputs = x_rows << columns_log2;
      const auto addends_of = [&](int i) {
        const int token = i >> columns_log2, column = i & ((1 << columns_log2) - 1);
        Addends<T> addends{from_float<T>(0.0f), from_float<T>(0.0f)};
        if (is_pair || i >= outputs || column >= columns) return addends;
        if (a.p.bias != nullptr) addends.bias = static_cast<const T*>(a.p.bias)[n0 + column];
        if (a.p.residual != nullptr) {
          addends.residual =
              static_cast<const T*>(a.p.residual)[(m0 + token) * a.p.residual_stride + n0 + column];
        }
        return addends;
      };
      // A thread's first output is often its only one: what is added to it comes while products are made.
      const Addends<T> first_addends = addends_of(static_cast<int>(threadIdx.x));

      // Multiply
      float sums[kRowTiles][kTokenTiles][4] = {};
#pragma unroll 1
      for (int column_block = warp; column_block < a.column_blocks; column_block += warps) {
        uint32_t x_addresses[kTokenTiles];
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const int row = static_cast<int>(j * kTokens + lane % 8);
          x_addresses[j] =
              (row < x_rows ? read + a.weight_bytes + row * kXRowBytes : shared) + lane / 8 * kPieceBytes;
        }
        copies.wait(read_barrier, parity);
        if (a.p.groups_per_block == 1) {
          multiply_block<T, kBits, kTokenTiles, kRowTiles, true>(a, read, x_addresses, lane, sums);
        } else {
          multiply_block<T, kBits, kTokenTiles, kRowTiles, false>(a, read, x_addresses, lane, sums);
        }
        __syncwarp();
        if (!copies.is_done()) {
          copies.weights();
          copies.activations();
          copies.advance();
        }
        copies.commit();
        read += stage_bytes, read_barrier += kBarrierBytes;
        if (read == copies.ring_end) read = ring, read_barrier = barriers, parity ^= 1u;
      }

      // Lay this warp's sums out by token and row
      if (tile > first_tile) __syncthreads();  // those of the tiles before have been read
      const uint32_t part = parts + warp * part_stride + lane % 4 * 2 * kPartRow + lane / 4 * 4;
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
      __syncthreads();

      // Add up warps, in order
      constexpr bool kExact = kTokenTiles <= kExactTokenTiles;
      constexpr float kUnshift = kExact ? static_cast<float>(1u << kExactShift<T, kBits>) : 1.0f;
      auto* out = static_cast<T*>(a.p.out) + m0 * a.p.out_stride + n0;
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < outputs; i += static_cast<int>(blockDim.x)) {
        const int token = i >> columns_log2, column = i & ((1 << columns_log2) - 1);
        if (column >= columns) continue;
        const int row = is_pair ? column / 8 * kTileRows + column % 8 : column;
        uint32_t place = parts + token * kPartRow + row * 4;
        float value = 0.0f, gate = 0.0f;
#pragma unroll 1
        for (int half = 0; half <= is_pair; ++half, place += 8 * 4) {
          gate = value;
          value = 0.0f;
          uint32_t at = place;
#pragma unroll 4
          for (int w = 0; w < warps; ++w, at += part_stride) value += load_shared_f32(at);
          value *= kUnshift;
        }
        if (is_pair) {
          value *= silu(gate);
        } else {
          const Addends<T> addends = i == static_cast<int>(threadIdx.x) ? first_addends : addends_of(i);
          if (a.p.bias != nullptr) value += to_float(addends.bias);
          if (a.p.residual != nullptr) value += to_float(addends.residual);
        }
        out[token * a.p.out_stride + column] = from_float<T>(value);
      }
    }
    if constexpr (!kEngine) wait_async_copies<0>();
  }
}

template <typename T, int kBits, int kTokenTiles, int kRowTiles>
cudaError_t launch_stream_tile(const Wna16PanelsParams& p, const StreamConfig& config) {
  StreamArguments a{};
  a.p = p;
  a.memory = StreamMemory(p, config);
  a.column_blocks = static_cast<int>(p.column_blocks);
  a.row_tiles = EvenShares(static_cast<int>(ceil_div(p.N, kTileRows)), config.row_blocks);
  a.tile_bytes = tile_bytes(p.bits, p.groups_per_block, p.has_zeros);
  a.stages = config.stages;
  a.x_rows = stream_x_rows(p, config);
  a.weight_bytes = kRowTiles * a.tile_bytes;
  a.wide_x = wide({p.x}, {p.x_stride * static_cast<int64_t>(sizeof(T))});
  const dim3 grid(config.row_blocks, ceil_div(p.M, kTokenTiles * kTokens));
  LaunchOptions options;
  options.shared_bytes = a.memory.total;
  options.overlaps_producer = config.overlaps_producer;
  const dim3 block(config.warps * kWarpLanes);
  const auto kernel = config.copy_engine ? wna16_stream_kernel<T, kBits, kTokenTiles, kRowTiles, true>
                                         : wna16_stream_kernel<T, kBits, kTokenTiles, kRowTiles, false>;
  return launch_with(options, kernel, grid, block, p.device, p.stream, a);
}

template <typename T, int kBits>
cudaError_t launch_stream(const Wna16PanelsParams& p, const StreamConfig& config) {
  switch (config.token_tiles * 10 + config.row_tiles) {
    case 12:
      return launch_stream_tile<T, kBits, 1, 2>(p, config);
    case 14:
      return launch_stream_tile<T, kBits, 1, 4>(p, config);
    case 22:
      return launch_stream_tile<T, kBits, 2, 2>(p, config);
    case 24:
      return launch_stream_tile<T, kBits, 2, 4>(p, config);
    case 44:
      return launch_stream_tile<T, kBits, 4, 4>(p, config);
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace
}  // namespace qsun
