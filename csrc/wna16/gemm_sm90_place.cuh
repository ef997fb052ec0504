// What the kernel in gemm_sm90.cuh is told, and what one of its blocks computes.
#pragma once

#include "device/wgmma.cuh"
#include "wna16/gemm_sm90.h"
#include "wna16/panels.h"

namespace qsun {
namespace {

constexpr int kWarpLanes = 32;
constexpr int kGroupWarps = 4;  // of a warp group
constexpr int kGroupThreads = kGroupWarps * kWarpLanes;

struct GemmArguments {
  Wna16PanelsParams p;
  int tile_bytes;
  int block_bytes;
  int row_blocks;
  bool leaves_sums;          // to the second kernel
  int cluster;               // splits that add their sums among themselves
  EvenShares column_ranges;  // column blocks over the splits
  int64_t parts_row;         // floats of a token's row of sums in scratch
  int stages;
  int barrier_offset;
  int scale_offsets[4];  // bytes from a row's first scale to that of 32 columns; half of it for zero points
  bool weights_read_once;
  bool wide;  // out, bias and residual can be accessed 16 bytes at a time
};

#if QSUN_HAS_WGMMA

// What this block computes.
struct Place {
  int split;              // which part of the columns
  int row_block;          // its first
  int token;              // its first
  int column_block;       // the first of its part
  int num_column_blocks;  // at least one
  int rotation;           // where in its part it begins

  // Blocks with the same rows of the weight are neighbours: they read it from memory once.
  __device__ __forceinline__ Place(const GemmArguments& a, int warp_groups, int tokens) {
    split = static_cast<int>(blockIdx.z);
    row_block = static_cast<int>(blockIdx.y) * warp_groups;
    token = static_cast<int>(blockIdx.x) * tokens;
    column_block = a.column_ranges.begin(split);
    num_column_blocks = a.column_ranges.begin(split + 1) - column_block;
    // Blocks that run at once begin at different columns: all reading the same x at the same time would have
    // the few slices of the L2 that hold it answer one after another.
    rotation = static_cast<int>(blockIdx.y) % num_column_blocks;
  }
};

#endif  // QSUN_HAS_WGMMA

}  // namespace
}  // namespace qsun
