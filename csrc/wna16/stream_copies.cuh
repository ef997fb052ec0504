// How a warp of the streaming kernel (stream.cuh) brings its weights and its x to shared memory: a ring of
// stages [weights | x], one block of 128 columns each, filled in the order in which the warp multiplies them.
//
// Two engines. The copy engine of sm_90 takes an order a piece: a lane asks for the weights of a stage, and
// one lane a row for x; arrival is counted by a barrier a stage. Before sm_90 all lanes copy, 16 bytes at a
// time (cp.async), in groups that end in order.
#pragma once

#include <cstdint>

#include "device/async_copy.cuh"
#include "device/bulk_copy.cuh"
#include "device/dtype.cuh"
#include "device/shared.cuh"
#include "device/vector.cuh"
#include "wna16/panels.h"
#include "wna16/stream.h"

namespace qsun {
namespace {

constexpr uint32_t kWarpLanes = 32;
constexpr uint32_t kPieceBytes = 16;  // of an asynchronous copy by a lane

struct StreamArguments {
  Wna16PanelsParams p;
  StreamMemory memory;
  EvenShares row_tiles;  // of the weight, padding left out, over the grid's x
  int column_blocks;
  int tile_bytes;
  int block_bytes;
  int warps;
  int stages;
  int x_rows;        // of a stage
  int weight_bytes;  // of a stage
  bool wide_x;       // rows of x are aligned to 16 bytes
  int whole_blocks;  // column blocks of x that the copy engine can take: none unless wide_x
};

// Copies the columns k0 .. k0 + 127 of x one by one: for rows of x that wider copies cannot take, and for the
// last columns; zeros where x has no column. Out of line: the instructions of the
// common path stay together.
template <typename T>
__device__ __noinline__ void gather_x(const StreamArguments& a, const T* x, int x_rows, int k0, uint32_t rows,
                                      uint32_t lane) {
#pragma unroll 1
  for (uint32_t column = lane; column < kBlockColumns; column += kWarpLanes) {
    const int k = k0 + static_cast<int>(column);
    const bool inside = k < a.p.K;
#pragma unroll 1
    for (int row = 0; row < x_rows; ++row) {
      const T value = inside ? x[row * a.p.x_stride + k] : from_float<T>(0.0f);
      store_shared_u16(rows + row * kXRowBytes + column * 2, bits_of(value));
    }
  }
}

// Which copies are next: a column block of a group of row tiles.
struct Cursor {
  int tile;  // first of the group; end_tile and beyond: nothing is left
  int column_block;
};

template <typename T, int kBits, int kRowTiles, bool kEngine>
struct StreamCopies {
  const StreamArguments& a;
  const T* x;  // this block's first row
  int x_rows;
  int end_tile;
  int first, step;  // the warp's column blocks: first, first + step, ...
  int start;        // the one of them that it begins with
  uint32_t lane;
  uint64_t policy;
  Cursor next;

  __device__ __forceinline__ bool is_done() const { return next.tile >= end_tile; }

  __device__ __forceinline__ void begin(int tile) {
    next = {first < a.column_blocks ? tile : end_tile, start};
  }

  __device__ __forceinline__ void init_barriers(uint32_t barriers) const {
    if constexpr (kEngine) {
      if (lane == 0) {
#pragma unroll 1
        for (int i = 0; i < a.stages; ++i)
          init_barrier(barriers + i * kBarrierBytes, 2);  // weights() and activations()
        publish_barriers();
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ void advance() {
    next.column_block += step;
    if (next.column_block >= a.column_blocks) next.column_block = first;
    if (next.column_block == start) next.tile += kRowTiles;
  }

  // One column block of up to kRowTiles row tiles, to `stage`. Row blocks of a panel lie apart by all their
  // column blocks, so tiles are contiguous up to the next row block.
  __device__ __forceinline__ void weights(uint32_t stage, uint32_t barrier) const {
    const int num_tiles = min(end_tile - next.tile, kRowTiles);
    const uint32_t tile = next.tile, in_row_block = tile % kBlockTiles;
    const int num_contiguous = min(num_tiles, kBlockTiles - static_cast<int>(in_row_block));
    const int64_t block = int64_t{tile / kBlockTiles} * a.column_blocks + next.column_block;
    const uint8_t* source = a.p.panels + block * a.block_bytes + in_row_block * a.tile_bytes;
    const int64_t to_other = num_contiguous * a.tile_bytes + (a.column_blocks - 1) * int64_t{a.block_bytes};
    if constexpr (kEngine) {
      if (lane == 0) {
        const int bytes = num_contiguous * a.tile_bytes, rest = num_tiles * a.tile_bytes - bytes;
        arrive_expecting(barrier, bytes + rest);
        copy_bulk_streamed(stage, source, bytes, barrier, policy);
        if (rest > 0) copy_bulk_streamed(stage + bytes, source + to_other, rest, barrier, policy);
      }
    } else {
      static_assert(tile_bytes(kBits, kMaxGroups, true) - tile_piece_bytes(kBits) <= kWarpLanes * kPieceBytes,
                    "what follows the pieces is at most a piece a lane");
      const uint32_t at = lane * kPieceBytes;
      const bool has_rest = at < static_cast<uint32_t>(a.tile_bytes - tile_piece_bytes(kBits));
      const uint8_t* piece = source + at;
      uint32_t target = stage + at;
#pragma unroll 1
      for (int i = 0; i < num_tiles; ++i, piece += a.tile_bytes, target += a.tile_bytes) {
        if (i == num_contiguous) piece = source + to_other + at;
#pragma unroll
        for (uint32_t j = 0; j < tile_piece_bytes(kBits); j += kWarpLanes * kPieceBytes) {
          copy_async_streamed(target + j, piece + j, policy);
        }
        if (has_rest) {
          copy_async_streamed(target + tile_piece_bytes(kBits), piece + tile_piece_bytes(kBits), policy);
        }
      }
    }
  }

  // The rows of x for the same columns; zeros where x has no column.
  __device__ __forceinline__ void activations(uint32_t stage, uint32_t barrier) const {
    const int k0 = next.column_block * kBlockColumns;
    const uint32_t rows = stage + a.weight_bytes;
    if (kEngine ? next.column_block >= a.whole_blocks : !a.wide_x) {
      gather_x<T>(a, x, x_rows, k0, rows, lane);
      if constexpr (kEngine) {
        order_before_copies();  // the engine writes here again
        __syncwarp();
        if (lane == 0) arrive(barrier);
      }
    } else if constexpr (kEngine) {
      constexpr int kBytes = kBlockColumns * sizeof(T);
      if (lane == 0) arrive_expecting(barrier, x_rows * kBytes);
      if (static_cast<int>(lane) < x_rows) {
        copy_bulk(rows + lane * kXRowBytes, x + lane * a.p.x_stride + k0, kBytes, barrier);
      }
    } else {
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
  }

  // Closes what has been asked for since the last call. Once for each stage in its turn, also when nothing
  // was.
  __device__ __forceinline__ void commit() const {
    if constexpr (!kEngine) commit_async_copies();
  }

  // Waits for a stage, whose barrier ends its phase `parity`: the oldest one that has not been waited for. A
  // chain of comparisons: a switch would become an indirect jump.
  __device__ __forceinline__ void wait(uint32_t stage_barrier, uint32_t parity) const {
    if constexpr (kEngine) {
      wait_for_phase(stage_barrier, parity);
    } else {
      if (a.stages == 2) {
        wait_async_copies<1>();
      } else if (a.stages == 3) {
        wait_async_copies<2>();
      } else {
        wait_async_copies<3>();
      }
      __syncwarp();
    }
  }
};

}  // namespace
}  // namespace qsun
