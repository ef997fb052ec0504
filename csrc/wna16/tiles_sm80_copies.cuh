// How the blocks of the kernel in tiles_sm80.cuh bring weights and x to shared memory: all threads copy 16
// bytes at a time (cp.async) into a ring of stages
//
//   stage  | blocks of row group 0 | row group 1 | .. | x of columns 0 .. 127 | x of columns 128 .. | ..
//
// A warp copies as many bytes of its row group's blocks as it will multiply, so nobody divides: two row tiles
// of a block, which are contiguous.
#pragma once

#include <cstdint>

#include "device/async_copy.cuh"
#include "device/registers.cuh"
#include "device/shared.cuh"
#include "wna16/stream_copies.cuh"
#include "wna16/tiles_sm80.h"

namespace qsun {
namespace {

struct TilesArguments {
  Wna16PanelsParams p;
  TilesMemory memory;
  EvenShares chunks;  // of column_groups * 64 columns, over the splits
  int row_blocks;
  int tile_bytes;
  int block_bytes;
  int row_groups, row_groups_log2;
  int column_groups, column_groups_log2;
  int blocks_log2;   // of the column blocks of a chunk
  int whole_chunks;  // chunks whose columns x has all
  int x_row_step;    // rows of x that the block copies at once
  int stages;
  int64_t parts_row;  // floats of a token's row of sums in scratch
  bool leaves_sums;   // to the kernel that adds those of all splits
  bool overlaps_producer;
  bool wide;  // out, bias and residual can be accessed 16 bytes at a time
};

// What a block computes.
struct TilesPlace {
  int token;  // its first
  int tokens;
  int row_block;  // its first
  int first_chunk, num_chunks;
  int rotation;  // where in its chunks it begins

  // Blocks with the same rows of the weight are neighbours: they read it from memory once.
  __device__ __forceinline__ TilesPlace(const TilesArguments& a, int tile_tokens) {
    token = static_cast<int>(blockIdx.x) * tile_tokens;
    tokens = static_cast<int>(min(a.p.M - token, static_cast<int64_t>(tile_tokens)));
    row_block = static_cast<int>(blockIdx.y) * a.row_groups;
    first_chunk = a.chunks.begin(static_cast<int>(blockIdx.z));
    num_chunks = a.chunks.begin(static_cast<int>(blockIdx.z) + 1) - first_chunk;
    // Blocks that run at once begin at different columns: all reading the same x at the same time would have
    // the few slices of the L2 that hold it answer one after another.
    rotation = static_cast<int>(blockIdx.y) % num_chunks;
  }
};

// The copies of a thread: its part of a stage's weights and of its x, stage by stage. Addresses in shared
// memory are built from the lane on (docs/kernels/wna16.md, Traps) and stepped, never a stage's plus a
// lane's.
template <typename T, int kBits, int kTokenTiles>
struct TilesCopies {
  static constexpr int kTileTokens = kTokenTiles * kTokens;
  static constexpr uint32_t kXBlockBytes = kTileTokens * kXRowBytes;  // of 128 columns
  static constexpr int kRowsAtOnce = 4;

  const TilesArguments& a;
  uint64_t policy;
  const uint8_t* weights_source;  // the lane's first piece in the first column block
  uint32_t weights_target, end;   // in the next stage, and behind the last one
  int rest;                       // from the lane's piece to the end of scales and zero points, bytes
  const unsigned char* x_source;  // the thread's first row
  int64_t x_step;                 // bytes to its next row
  uint32_t x_distance;            // in shared memory: from weights_target to the first row of x
  uint32_t x_target_step;         // to its next row
  int column_block, x_column;     // in a chunk
  int x_row, x_rows;
  int first_chunk, end_chunk, next;  // chunks of the block, and which of them comes next

  __device__ __forceinline__ TilesCopies(const TilesArguments& a, const TilesPlace& place, uint32_t ring,
                                         int row_group, int column_group, uint32_t lane)
      : a(a), policy(evict_first_policy()) {
    // Weights. Past the last row: any rows, whose sums are not stored.
    const int64_t row_block = min(place.row_block + row_group, a.row_blocks - 1);
    const int own = column_group % 2 * 2 * a.tile_bytes + static_cast<int>(lane * kPieceBytes);
    column_block = column_group / 2;
    weights_source = a.p.panels + row_block * a.p.column_blocks * a.block_bytes + own;
    weights_target = ring + ((row_group << a.blocks_log2) + column_block) * a.block_bytes + own;
    end = weights_target + a.stages * a.memory.stage_bytes;
    rest = 2 * (a.tile_bytes - tile_code_bytes(kBits)) - static_cast<int>(lane * kPieceBytes);

    // x: a thread has 16 bytes of every so many rows
    const int thread = static_cast<int>(threadIdx.x);
    const int pieces_log2 = a.blocks_log2 + 4, piece = thread & ((1 << pieces_log2) - 1);
    x_column = piece * 8;
    x_row = thread >> pieces_log2;
    x_rows = place.tokens;
    const T* row = static_cast<const T*>(a.p.x) + (int64_t{place.token} + x_row) * a.p.x_stride;
    x_source = reinterpret_cast<const unsigned char*>(row + x_column);
    x_step = a.x_row_step * a.p.x_stride * int64_t{sizeof(T)};
    x_distance = ring + a.memory.x_offset + piece / 16 * kXBlockBytes + x_row * kXRowBytes +
                 piece % 16 * kPieceBytes - weights_target;
    x_target_step = a.x_row_step * kXRowBytes;

    first_chunk = place.first_chunk;
    end_chunk = first_chunk + place.num_chunks;
    next = first_chunk + place.rotation;
    keep(weights_source), keep(weights_target), keep(end), keep(rest);
    keep(x_source), keep(x_step), keep(x_distance), keep(x_target_step), keep(x_row);
  }

  // Zeros for tokens that there are none of, once: no copy writes them.
  __device__ __forceinline__ void clear_missing_tokens() const {
    if (x_rows == kTileTokens) return;
#pragma unroll 1
    for (uint32_t target = end; target != end - a.stages * a.memory.stage_bytes;) {
      target -= a.memory.stage_bytes;
#pragma unroll 1
      for (int row = x_row; row < kTileTokens; row += a.x_row_step) {
        if (row < x_rows) continue;
        store_shared_u128(target + x_distance + (row - x_row) * kXRowBytes, make_uint4(0, 0, 0, 0));
      }
    }
  }

  // To the next chunk and the next stage.
  __device__ __forceinline__ void advance() {
    if (++next == end_chunk) next = first_chunk;
    weights_target += a.memory.stage_bytes;
    if (weights_target == end) weights_target -= a.stages * a.memory.stage_bytes;
  }

  // The weights of the chunk `next`. A block past the last column is the last one again: x is zero there.
  __device__ __forceinline__ void weights() const {
    const int last_block = static_cast<int>(a.p.column_blocks) - 1;
    const int block = min((next << a.blocks_log2) + column_block, last_block);
    const uint8_t* source = weights_source + int64_t{block} * a.block_bytes;
    constexpr uint32_t kRound = kWarpLanes * kPieceBytes;
    static_assert(2 * tile_code_bytes(kBits) == kBits * kRound);
    static_assert(2 * (tile_scale_bytes(kMaxGroups) + tile_zero_bytes(kMaxGroups, true)) <= kRound,
                  "what two row tiles have beside their codes is at most a piece a lane");
#pragma unroll
    for (uint32_t i = 0; i < kBits; ++i) {
      copy_async_streamed(weights_target + i * kRound, source + i * kRound, policy);
    }
    if (rest > 0) copy_async_streamed(weights_target + kBits * kRound, source + kBits * kRound, policy);
  }

  // Its x; zeros where x has no column.
  __device__ __forceinline__ void activations() const {
    const int k0 = next << (a.blocks_log2 + log2_of(kBlockColumns));
    const unsigned char* source = x_source + int64_t{k0} * int64_t{sizeof(T)};
    uint32_t target = weights_target + x_distance;
    if (next < a.whole_chunks) {
      // Rows in fours, each with a predicate of its own: behind every branch ptxas puts three instructions in
      // front of a copy.
#pragma unroll 1
      for (int row = x_row; row < x_rows;) {
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
          if (row < x_rows) copy_async(target, source);
          source += x_step, target += x_target_step, row += a.x_row_step;
        }
      }
    } else {
      const int left = static_cast<int>(a.p.K) - k0 - x_column;
      const int bytes = min(max(left, 0), 8) * 2;
      if (bytes == 0) source = static_cast<const unsigned char*>(a.p.x);  // not read, but an address of x
#pragma unroll 1
      for (int row = x_row; row < x_rows; row += a.x_row_step) {
        copy_async_or_zero(target, source, bytes);
        if (bytes > 0) source += x_step;
        target += x_target_step;
      }
    }
  }
};

// Waits for all copies but those of the `pending` youngest stages. Comparisons of ranges: cases, of equality
// too, would become an indirect jump.
__device__ __forceinline__ void wait_for_stages(int pending) {
  static_assert(kMostTileStages == 6);
  if (pending >= 3) {
    if (pending >= 5) {
      wait_async_copies<5>();
    } else if (pending >= 4) {
      wait_async_copies<4>();
    } else {
      wait_async_copies<3>();
    }
  } else if (pending >= 2) {
    wait_async_copies<2>();
  } else if (pending >= 1) {
    wait_async_copies<1>();
  } else {
    wait_async_copies<0>();
  }
}

}  // namespace
}  // namespace qsun
