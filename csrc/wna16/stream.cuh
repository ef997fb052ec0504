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
// Up to two token tiles the codes enter the product with the base of their float, which is taken off the
// float32 sum of a group before its scale is applied (stream_multiply.cuh). With more, sums of groups would
// take as many registers as the result: weights are rounded to (code - zero) * scale in 16 bits instead, as a
// dense 16-bit weight would be.
#pragma once

#include "device/activation.cuh"
#include "device/dependent_launch.cuh"
#include "device/reduce.cuh"
#include "device/registers.cuh"
#include "runtime/alignment.h"
#include "runtime/launch.h"
#include "wna16/stream_copies.cuh"
#include "wna16/stream_multiply.cuh"
#include "wna16/stream_norm.cuh"

namespace qsun {
namespace {

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
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / kWarpLanes), 0);  // uniform
    const int warps = a.warps;
    const int first_tile = a.row_tiles.begin(static_cast<int>(blockIdx.x));
    const int end_tile = a.row_tiles.begin(static_cast<int>(blockIdx.x) + 1);
    const int m0 = static_cast<int>(blockIdx.y) * kTokenTiles * kTokens;
    const int x_rows = min(static_cast<int>(a.p.M) - m0, a.x_rows);
    const uint32_t stage_bytes = a.memory.stage_bytes;
    const uint32_t ring = shared + a.memory.head_bytes + warp * a.memory.ring_bytes;
    const uint32_t barriers = shared + warp * a.stages * kBarrierBytes;
    // Blocks that run at once begin at different columns: all reading the same x at the same time would have
    // the few slices of the L2 that hold it answer one after another.
    const int own_blocks = warp < a.column_blocks ? (a.column_blocks - warp - 1) / warps + 1 : 1;
    const int start = warp + static_cast<int>(blockIdx.x) % own_blocks * warps;
    StreamCopies<T, kBits, kRowTiles, kEngine> copies{a,
                                                      static_cast<const T*>(a.p.x) + m0 * a.p.x_stride,
                                                      x_rows,
                                                      end_tile,
                                                      warp,
                                                      warps,
                                                      start,
                                                      lane,
                                                      evict_first_policy()};

    // Fill the ring: weights before the wait, x after it
    copies.init_barriers(barriers);
    if (!a.p.prefetch_weights) wait_for_producers();
    if (leaves_norm<T>(a.p)) ask_for_norm_weights<T, kRowTiles>(a.p, first_tile);
    copies.begin(first_tile);
#pragma unroll 1
    for (int i = 0; i < a.stages; ++i) {
      if (!copies.is_done()) {
        copies.weights(ring + i * stage_bytes, barriers + i * kBarrierBytes);
        copies.advance();
      }
      copies.commit();
    }
    wait_for_producers();
    copies.begin(first_tile);
#pragma unroll 1
    for (int i = 0; i < a.stages; ++i) {
      if (!copies.is_done()) {
        copies.activations(ring + i * stage_bytes, barriers + i * kBarrierBytes);
        copies.advance();
      }
      copies.commit();
    }
    if (leaves_norm<T>(a.p)) {
      keep_norm_weights<T, kRowTiles>(a.p, first_tile, shared + a.memory.norm_weights_offset);
    }
    if (takes_norm<T>(a.p)) find_roots(a.p, m0, x_rows, warp, warps, lane, shared + a.memory.roots_offset);

    // Where the lane's address of x lies in a stage. Tokens past the last are the last one again: a product
    // of their own, which nobody reads.
    uint32_t x_offsets[kTokenTiles];
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const int row = min(static_cast<int>(j * kTokens + lane % 8), x_rows - 1);
      x_offsets[j] = a.weight_bytes + row * kXRowBytes + lane / 8 * kPieceBytes;
    }

    constexpr int kRows = kRowTiles * kTileRows;
    constexpr int kPartRow = part_row_floats(kRowTiles) * 4;
    const uint32_t parts = shared + a.memory.part_offset, part_stride = a.memory.part_stride;
    int turn = 0;  // of two rounds through the ring: which stage is read next, and in which phase
#pragma unroll 1
    for (int tile = first_tile; tile < end_tile; tile += kRowTiles) {
      // A thread's first output is often its only one: what is added to it comes while products are made, if
      // there are registers for it.
      Addends<T> first_addends;
      if constexpr (kEngine) {
        const TileOutputs<kRows> of_tile(a.p, tile, min(end_tile - tile, kRowTiles), x_rows);
        first_addends = of_tile.template addends<T>(a.p, m0, static_cast<int>(threadIdx.x));
      }

      // Multiply
      float sums[kRowTiles][kTokenTiles][4] = {};
#pragma unroll 1
      for (int column_block = warp; column_block < a.column_blocks; column_block += warps) {
        const int parity = turn >= a.stages ? 1 : 0, index = turn - parity * a.stages;
        const uint32_t stage = ring + index * stage_bytes, barrier = barriers + index * kBarrierBytes;
        uint32_t x_addresses[kTokenTiles];
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) x_addresses[j] = stage + x_offsets[j];
        copies.wait(barrier, parity);
        if (a.p.groups_per_block == 1) {
          if (a.p.has_zeros) {
            multiply_block<T, kBits, kTokenTiles, kRowTiles, true, true>(a, stage, x_addresses, lane, sums);
          } else {
            multiply_block<T, kBits, kTokenTiles, kRowTiles, true, false>(a, stage, x_addresses, lane, sums);
          }
        } else if (a.p.has_zeros) {
          multiply_block<T, kBits, kTokenTiles, kRowTiles, false, true>(a, stage, x_addresses, lane, sums);
        } else {
          multiply_block<T, kBits, kTokenTiles, kRowTiles, false, false>(a, stage, x_addresses, lane, sums);
        }
        __syncwarp();
        if (!copies.is_done()) {
          copies.weights(stage, barrier);
          copies.activations(stage, barrier);
          copies.advance();
        }
        copies.commit();
        if (++turn == 2 * a.stages) turn = 0;
      }

      // Lay this warp's sums out by token and row
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
      constexpr float kFactors[2] = {sum_factor<T, kBits, 0>(kTokenTiles),
                                     sum_factor<T, kBits, 1>(kTokenTiles)};
      const TileOutputs<kRows> outputs(a.p, tile, min(end_tile - tile, kRowTiles), x_rows);
      auto* out = static_cast<T*>(a.p.out) + m0 * a.p.out_stride + outputs.n0;
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < outputs.count; i += static_cast<int>(blockDim.x)) {
        const int token = outputs.token(i), column = outputs.column(i);
        if (column >= outputs.columns) continue;
        const int row = outputs.is_pair ? column / 8 * kTileRows + column % 8 : column;
        uint32_t place = parts + token * kPartRow + row * 4;
        float value = 0.0f, gate = 0.0f;
        const float root =
            takes_norm<T>(a.p) ? load_shared_f32(shared + a.memory.roots_offset + token * 4) : 1.0f;
#pragma unroll 1
        for (int half = 0; half <= outputs.is_pair; ++half, place += 8 * 4) {
          gate = value;
          value = 0.0f;
          uint32_t at = place;
#pragma unroll 4
          for (int w = 0; w < warps; ++w, at += part_stride) value += load_shared_f32(at);
          value *= ((row + half * 8) % kTileRows < 8 ? kFactors[0] : kFactors[1]) * root;
        }
        if (outputs.is_pair) {
          value *= silu(gate);
        } else {
          const bool is_first = kEngine && i == static_cast<int>(threadIdx.x);
          const Addends<T> addends = is_first ? first_addends : outputs.template addends<T>(a.p, m0, i);
          if (a.p.bias != nullptr) value += to_float(addends.bias);
          if (a.p.residual != nullptr) value += to_float(addends.residual);
        }
        const T rounded = from_float<T>(value);
        out[token * a.p.out_stride + column] = rounded;
        if (leaves_norm<T>(a.p)) store_shared_f32(place - 8 * 4, to_float(rounded));
      }
      if (leaves_norm<T>(a.p)) {
        int block = static_cast<int>(blockIdx.x);
        keep(block);  // the block's first tile is found once more, not kept while products are made
        const uint32_t weights = tile == a.row_tiles.begin(block) ? shared + a.memory.norm_weights_offset : 0;
        leave_norm<T, kRowTiles>(a.p, outputs, m0, warp, warps, lane, parts, weights);
      }
      if (tile + kRowTiles < end_tile) __syncthreads();  // before the next tiles' sums are laid out
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
  a.block_bytes = block_bytes(p.bits, p.groups_per_block, p.has_zeros);
  a.warps = config.warps;
  a.stages = config.stages;
  a.x_rows = stream_x_rows(p, config);
  a.weight_bytes = kRowTiles * a.tile_bytes;
  a.wide_x = wide({p.x}, {p.x_stride * static_cast<int64_t>(sizeof(T))});
  a.whole_blocks = a.wide_x ? static_cast<int>(p.K / kBlockColumns) : 0;
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
