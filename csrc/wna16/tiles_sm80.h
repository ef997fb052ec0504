// What the host side and the kernel in tiles_sm80.cuh agree on, and the entries of the kernel: one a (dtype,
// bit width), each compiled in its own file.
#pragma once

#include <cuda_runtime_api.h>

#include "qsun/wna16_panels.h"
#include "wna16/panels.h"
#include "wna16/stream.h"

namespace qsun {

constexpr int kTileTokenTiles[] = {2, 4, 6, 8};
constexpr int kMostTokenTiles = 8;
constexpr int kMostTileWarps = 8;
constexpr int kMostRowGroups = 4;
constexpr int kFewestTileStages = 2, kMostTileStages = 6;
constexpr int kMostTileSplits = 16;
constexpr int kGroupColumns = kBlockColumns / 2;  // of a warp in a stage

// From how many tokens on the kernel is taken where there is no kernel of wgmma: from where the streaming
// kernel falls behind. Below, where that was measured to keep up, this one has yet to be measured.
constexpr int kFewestTileTokens = 17;

// Blocks of eight warps of a multiprocessor that registers must allow. Of smaller blocks more fit.
constexpr int tiles_blocks_per_sm(int token_tiles, int bits) { return token_tiles <= 2 && bits < 8 ? 2 : 1; }

// Registers that a thread takes, or a few more.
constexpr int tiles_registers(int token_tiles, int bits) {
  constexpr int kOfBlock = 65536 / (kMostTileWarps * 32);
  const int taken = 88 + 20 * token_tiles + (bits == 8 ? 24 : 0);
  const int allowed = kOfBlock / tiles_blocks_per_sm(token_tiles, bits);
  return taken < allowed ? taken : allowed;
}

// Whether the kernel can run the problem: the bit width is compiled, and rows of x can be copied 16 bytes at
// a time.
bool tiles_can_run(const Wna16PanelsParams& params);

// Stages of columns that a problem has in all.
constexpr int column_chunks(int64_t column_blocks, int column_groups) {
  const int64_t blocks = column_groups / 2;
  return static_cast<int>((column_blocks + blocks - 1) / blocks);
}

// Where a stage's parts and, at the end, the sums lie in shared memory.
struct TilesMemory {
  int x_offset = 0;  // of x in a stage, after its blocks of the weight
  int stage_bytes = 0;
  int staged_row = 0;  // floats of a token's row of sums; padded: what a warp stores at once lies in 32 banks
  int total = 0;

  TilesMemory() = default;
  TilesMemory(const TilesConfig& c, int block_bytes) {
    const int column_blocks = c.column_groups / 2, tokens = c.token_tiles * kTokens;
    x_offset = c.row_groups * column_blocks * block_bytes;
    stage_bytes = x_offset + column_blocks * tokens * kXRowBytes;
    staged_row = c.row_groups * kBlockRows + 4;
    const int stages = c.stages * stage_bytes, staged = c.column_groups * tokens * staged_row * 4;
    total = stages > staged ? stages : staged;
  }
};

template <typename T, int kBits>
cudaError_t launch_wna16_tiles(const Wna16PanelsParams& params, const TilesConfig& config);

}  // namespace qsun
