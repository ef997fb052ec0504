// Which launch of the kernel in tiles_sm80.cuh a problem gets: that of the most similar problem in a table of
// measured ones (choices.h), or, where nothing was measured, the one with the shortest estimate. Measured is
// what an H100 takes with this kernel, which it does not need; GPUs that do mostly have other numbers of
// multiprocessors.
#include "wna16/tiles_sm80.h"

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "runtime/alignment.h"
#include "runtime/launch.h"
#include "runtime/text.h"
#include "wna16/choices.h"
#include "wna16/parts.h"

namespace qsun {

std::string to_string(const TilesConfig& c) {
  return Fields()
      .add("token_tiles", c.token_tiles)
      .add("row_groups", c.row_groups)
      .add("column_groups", c.column_groups)
      .add("split_k", c.split_k)
      .add("stages", c.stages)
      .add("overlaps_producer", c.overlaps_producer ? "yes" : "no")
      .str();
}

bool tiles_can_run(const Wna16PanelsParams& p) {
  return (p.bits == 4 || p.bits == 8) && wide({p.x}, {p.x_stride * 2}) && p.N <= kMaxGridY * kBlockRows;
}

namespace {

constexpr int kMeasuredMultiprocessors = 132;
constexpr int kReservedBytes = 1024;  // of shared memory, by the system, a block

int own_block_bytes(const Wna16PanelsParams& p) {
  return block_bytes(p.bits, p.groups_per_block, p.has_zeros);
}

// The most stages, up to `most`, that fit beside those of so many blocks in all of a multiprocessor; 0 where
// not even two do.
int fitting_stages(TilesConfig c, const Wna16PanelsParams& p, const DeviceProps& props, int blocks,
                   int most) {
  const int room = (props.shared_memory_per_block + kReservedBytes) / blocks - kReservedBytes;
  for (c.stages = most; c.stages >= kFewestTileStages; --c.stages) {
    if (TilesMemory(c, own_block_bytes(p)).total <= room) return c.stages;
  }
  return 0;
}

// What a launch takes, in bytes that a multiprocessor could have read meanwhile as its share of the memory:
// the longest of reading the weight, of bringing weight and x from the L2 to the multiprocessor that has most
// blocks, and of its products; and what begins and ends blocks. The constants are counts for an H100
// (docs/kernels/wna16.md), not timings.
double estimate(const Wna16PanelsParams& p, const TilesConfig& c, const DeviceProps& props, int beside) {
  constexpr double kProductBytes = 22;  // of 16 x 16 weights and 8 tokens, on four tensor cores
  constexpr double kStepBytes = 96;     // of the instructions for 16 x 16 weights
  constexpr double kLoneWarp = 1.5;     // a scheduler has no other warp to turn to
  constexpr double kTwoStages = 1.3;    // no copy is under way while a warp waits for the next stage
  constexpr double kFromCache = 0.45;   // a byte from the L2, for one from memory
  constexpr double kBlockBytes = 16e3;  // of the first bytes' way, and of the last sums'
  constexpr double kAddBytes = 40e3;    // of a second launch
  constexpr double kPartBytes = 2.5;    // for a byte of parts: written and read in the L2
  const int tokens = c.token_tiles * kTokens, column_blocks = c.column_groups / 2;
  const int64_t row_blocks = ceil_div(p.N, kBlockRows);
  const int64_t blocks = ceil_div(row_blocks, c.row_groups) * ceil_div(p.M, tokens) * c.split_k;
  const int64_t chunks = ceil_div(column_chunks(p.column_blocks, c.column_groups), c.split_k);
  const double turns = static_cast<double>(ceil_div(blocks, props.sm_count) * chunks * column_blocks);
  const double weight = static_cast<double>(row_blocks * p.column_blocks * own_block_bytes(p));
  const double stage = c.row_groups * own_block_bytes(p) + tokens * kBlockColumns * 2;
  const double step = std::max(kProductBytes * c.token_tiles, kStepBytes) *
                      (beside * c.row_groups * c.column_groups > 4 ? 1 : kLoneWarp);
  const double steps = c.row_groups * kBlockTiles * (kBlockColumns / kTileRows);
  const double longest =
      std::max({weight / props.sm_count, turns * stage * kFromCache, turns * steps * step});
  const double stalls = c.stages < 3 ? kTwoStages : 1;
  const double waves = static_cast<double>(ceil_div(blocks, int64_t{props.sm_count} * beside));
  const double parts = static_cast<double>(parts_bytes(p, c.split_k)) / props.sm_count;
  return stalls * longest + waves * kBlockBytes + (c.split_k > 1 ? kAddBytes + kPartBytes * parts : 0);
}

// The blocks whose warps a multiprocessor has registers for.
int blocks_of_registers(const TilesConfig& c, int bits) {
  return 65536 / (tiles_registers(c.token_tiles, bits) * 32 * c.row_groups * c.column_groups);
}

TilesConfig estimated_tiles(const Wna16PanelsParams& p, const DeviceProps& props) {
  TilesConfig best, c;
  double shortest = 0;
  c.token_tiles = static_cast<int>(std::min<int64_t>(ceil_div(p.M, 2 * kTokens) * 2, kMostTokenTiles));
  const int64_t token_blocks = ceil_div(p.M, c.token_tiles * kTokens);
  for (c.row_groups = 1; c.row_groups <= kMostRowGroups; c.row_groups *= 2) {
    for (c.column_groups = 2; c.row_groups * c.column_groups <= kMostTileWarps; c.column_groups *= 2) {
      if (c.row_groups * c.column_groups < kMostTileWarps / 2) continue;
      const int chunks = column_chunks(p.column_blocks, c.column_groups);
      for (c.split_k = 1; c.split_k <= std::min(kMostTileSplits, chunks); ++c.split_k) {
        const int64_t blocks = ceil_div(ceil_div(p.N, kBlockRows), c.row_groups) * token_blocks * c.split_k;
        int beside = static_cast<int>(
            std::min<int64_t>(blocks_of_registers(c, p.bits), ceil_div(blocks, props.sm_count)));
        while (beside > 1 && fitting_stages(c, p, props, beside, 3) < 3) --beside;
        c.stages = fitting_stages(c, p, props, beside, kMostTileStages);
        if (c.stages == 0) continue;
        const double own = estimate(p, c, props, beside);
        if (shortest == 0 || own < shortest) best = c, shortest = own;
      }
    }
  }
  return best;
}

}  // namespace

TilesConfig choose_tiles(const Wna16PanelsParams& p, const DeviceProps& props) {
  TilesConfig c;
  // What fills the multiprocessors that were measured does not fill another number of them.
  const TilesMeasured* measured =
      props.sm_count == kMeasuredMultiprocessors ? most_similar(kTilesMeasured, p) : nullptr;
  if (measured != nullptr) {
    c.token_tiles = measured->token_tiles;
    c.row_groups = measured->row_groups, c.column_groups = measured->column_groups;
    c.split_k = std::min(measured->split_k, column_chunks(p.column_blocks, c.column_groups));
    c.stages = fitting_stages(c, p, props, 1, measured->stages);
  }
  if (measured == nullptr || c.stages == 0) c = estimated_tiles(p, props);
  c.overlaps_producer = props.compute_major >= 9;
  return c;
}

}  // namespace qsun
