// Which tile of the kernel in gemm_sm90.cuh a problem gets: that of the most similar problem in a table of
// measured ones (choices.h).
#include "wna16/gemm_sm90.h"

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "runtime/alignment.h"
#include "runtime/launch.h"
#include "runtime/text.h"
#include "wna16/choices.h"

namespace qsun {

std::string to_string(const GemmConfig& c) {
  return Fields()
      .add("token_tile", c.token_tile)
      .add("warp_groups", c.warp_groups)
      .add("split_k", c.split_k)
      .add("stages", c.stages)
      .add("adds_in_cluster", c.adds_in_cluster ? "yes" : "no")
      .str();
}

bool gemm_can_read(const Wna16PanelsParams& p) { return wide({p.x}, {p.x_stride * 2}); }

namespace {

constexpr int kReservedBytes = 1024;  // of shared memory, by the system, a block

int64_t num_blocks(const Wna16PanelsParams& p, const GemmConfig& c) {
  return ceil_div(ceil_div(p.N, kBlockRows), c.warp_groups) * ceil_div(p.M, c.token_tile) * c.split_k;
}

// The most stages that fit beside those of so many blocks in all of a multiprocessor.
GemmConfig with_stages(GemmConfig c, const Wna16PanelsParams& p, const DeviceProps& props, int64_t blocks) {
  const int bytes = (props.shared_memory_per_block + kReservedBytes) / static_cast<int>(blocks) -
                    kReservedBytes - 2 * kBarrierBytes * kMaxStages;
  const int stage_bytes = gemm_stage_bytes(c, block_bytes(p.bits, p.groups_per_block, p.has_zeros));
  const int columns = static_cast<int>(std::min<int64_t>(ceil_div(p.column_blocks, c.split_k), kMaxStages));
  c.stages = std::max(1, std::min(bytes / stage_bytes, columns));
  return c;
}

// Where nothing was measured: the next launch fetches its weights beside the last blocks of this one, where
// there is room.
GemmConfig with_stages(const GemmConfig& c, const Wna16PanelsParams& p, const DeviceProps& props) {
  return with_stages(c, p, props,
                     std::min<int64_t>(ceil_div(num_blocks(p, c), props.sm_count) + 1,
                                       gemm_blocks_per_sm(c.token_tile, c.warp_groups)));
}

// The measured stages; of another format, those that leave room for as many blocks as the measured ones did.
GemmConfig with_measured_stages(GemmConfig c, const Wna16PanelsParams& p, const DeviceProps& props,
                                const GemmMeasured& measured) {
  c.stages = measured.stages;
  const int measured_bytes = block_bytes(measured.bits, 1, false);  // symmetric groups of 128
  const int room = props.shared_memory_per_block + kReservedBytes;
  const int taken = gemm_shared_bytes(c, measured_bytes) + kReservedBytes;
  const int blocks = std::clamp(room / taken, 1, gemm_blocks_per_sm(c.token_tile, c.warp_groups));
  c = with_stages(c, p, props, blocks);
  if (block_bytes(p.bits, p.groups_per_block, p.has_zeros) <= measured_bytes) {
    c.stages = std::min(c.stages, measured.stages);
  }
  return c;
}

}  // namespace

std::vector<GemmTile> gemm_tiles() { return {std::begin(kGemmTiles), std::end(kGemmTiles)}; }

GemmConfig choose_gemm(const Wna16PanelsParams& p, const DeviceProps& props) {
  GemmConfig c;
  if (p.M > kMostMeasuredTokens) {
    // Blocks enough without a split, or almost: the largest tile reads weights least often.
    c.token_tile = 256, c.warp_groups = 2;
    while (c.split_k < kMaxSplit && 2 * num_blocks(p, c) <= props.sm_count &&
           p.column_blocks >= 4 * c.split_k) {
      c.split_k *= 2;
    }
    return with_stages(c, p, props);
  }
  const GemmMeasured* best =
      with_measured(p, [&](const auto&, const auto& gemms) { return most_similar(gemms, p); });
  c.token_tile = best->token_tile, c.warp_groups = best->warp_groups;
  c.split_k = static_cast<int>(std::min<int64_t>(best->split_k, p.column_blocks));
  c.adds_in_cluster = best->in_cluster != 0 && c.split_k > 1;
  return with_measured_stages(c, p, props, *best);
}

}  // namespace qsun
