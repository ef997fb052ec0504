// The operator on panel weights: checks, the choice of kernel and configuration, and the way to the kernel of
// each dtype and bit width.
#include "qsun/wna16_panels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "runtime/checks.h"
#include "runtime/launch.h"
#include "wna16/choices.h"
#include "wna16/gemm_sm90.h"
#include "wna16/panels.h"
#include "wna16/parts.h"
#include "wna16/stream.h"
#include "wna16/tiles_sm80.h"

namespace qsun {

std::string to_string(const Wna16PanelsParams& p) {
  return Fields()
      .add("M", p.M)
      .add("N", p.N)
      .add("K", p.K)
      .add("bits", p.bits)
      .add("groups_per_block", p.groups_per_block)
      .add("zeros", p.has_zeros ? "stored" : "symmetric")
      .add("rows", p.gate_up ? "gate and up" : "plain")
      .add("norm", p.norm_weight == nullptr ? "no"
                   : p.squares == nullptr   ? "yes"
                                            : "left")
      .add("sums", p.leaves_sums ? "left" : "added")
      .add("dtype", to_string(p.dtype))
      .str();
}

std::string to_string(const StreamConfig& c) {
  return Fields()
      .add("token_tiles", c.token_tiles)
      .add("row_tiles", c.row_tiles)
      .add("row_blocks", c.row_blocks)
      .add("warps", c.warps)
      .add("stages", c.stages)
      .add("copy_engine", c.copy_engine ? "yes" : "no")
      .add("overlaps_producer", c.overlaps_producer ? "yes" : "no")
      .str();
}

namespace {

template <typename T>
struct Type {
  using type = T;
};

// Whether the library holds code of this architecture, such as "90a".
bool has_arch(const std::string& arch) {
  return ("," + build_info().archs + ",").find("," + arch + ",") != std::string::npos;
}

// Whether one of the norms is left to the product behind, which the streaming kernel alone can do and use.
bool has_pending_norm(const Wna16PanelsParams& p) { return p.squares != nullptr || p.x_squares != nullptr; }

bool has_gemm(const DeviceProps& props) {
  // wgmma is code of sm_90a alone.
  static const bool is_built = has_arch("90a");
  return is_built && props.compute_major == 9 && props.compute_minor == 0;
}

}  // namespace

bool uses_gemm(const Wna16PanelsParams& p, const DeviceProps& props) {
  if (!has_gemm(props) || p.batch_invariant || has_pending_norm(p) || !gemm_can_read(p)) return false;
  return with_measured(
      p, [&](const auto& streams, const auto& gemms) { return gemm_is_faster(streams, gemms, p); });
}

bool uses_tiles(const Wna16PanelsParams& p, const DeviceProps& props) {
  return p.M >= kFewestTileTokens && !p.batch_invariant && !has_pending_norm(p) && tiles_can_run(p) &&
         !has_gemm(props);
}

bool may_pend_norm(const Wna16PanelsParams& p, const DeviceProps& props) {
  Wna16PanelsParams own = p;
  own.in_layer = true;
  return p.dtype == DType::kBFloat16 && p.M <= kMaxPendingRows && !p.batch_invariant &&
         !uses_gemm(own, props) && !uses_tiles(own, props);
}

namespace {

// Where nothing was measured: more tokens than one wants to stream for, or rows that may not depend on M.
StreamMeasured unmeasured_stream(const Wna16PanelsParams& p) {
  StreamMeasured way{};
  // The order of sums depends on the warps and on the products that are kept apart, not on the token tiles:
  // with four row tiles one token tile or two give the same bits.
  way.token_tiles = p.M <= kTokens ? 1 : p.M <= 2 * kTokens || p.batch_invariant ? 2 : 4;
  way.row_tiles = 4, way.warps = kMaxStreamWarps / 2, way.stages = 2, way.copy_engine = 1;
  way.bits = kMainBits;
  return way;
}

}  // namespace

StreamConfig choose_stream(const Wna16PanelsParams& p, const DeviceProps& props) {
  const bool is_hopper = props.compute_major >= 9;
  const StreamMeasured* measured =
      p.batch_invariant
          ? nullptr
          : with_measured(p, [&](const auto& streams, const auto&) { return most_similar(streams, p); });
  const StreamMeasured way = measured != nullptr ? *measured : unmeasured_stream(p);
  StreamConfig c;
  c.token_tiles = way.token_tiles, c.row_tiles = way.row_tiles;
  c.copy_engine = is_hopper && way.copy_engine != 0;
  c.overlaps_producer = is_hopper;
  const int64_t tiles = ceil_div(p.N, kTileRows), fewest = ceil_div(tiles, c.row_tiles);
  c.row_blocks =
      static_cast<int>(way.waves == 0 ? fewest : std::min<int64_t>(tiles, way.waves * props.sm_count));
  const int most_warps = std::min(way.warps, max_stream_warps(c.token_tiles, c.row_tiles, p.bits));
  c.warps = static_cast<int>(std::clamp<int64_t>(p.column_blocks, 1, most_warps));
  c.stages = std::min(way.stages, max_stream_stages(c.copy_engine));
  // Half of the shared memory, for the other half is the next kernel's; more where the measured format took
  // more. A format that needs more than it has fewer stages, then fewer warps, which in a batch-invariant
  // call may not depend on M.
  Wna16PanelsParams own = p;
  StreamConfig widest = c;
  if (p.batch_invariant) own.M = 2 * kTokens, widest.token_tiles = 2;
  Wna16PanelsParams as_measured = own;
  as_measured.bits = way.bits, as_measured.groups_per_block = 1, as_measured.has_zeros = false;
  const int half = (props.shared_memory_per_block + 1024) / 2 - 1024;
  const int allowed =
      std::min(std::max(half, StreamMemory(as_measured, widest).total), props.shared_memory_per_block);
  const auto takes_more = [&] {
    widest.warps = c.warps, widest.stages = c.stages;
    return StreamMemory(own, widest).total > allowed;
  };
  while (takes_more() && c.stages > 2) --c.stages;
  while (takes_more() && c.warps > 1) --c.warps;
  return c;
}

int64_t wna16_panels_scratch_bytes(const Wna16PanelsParams& p, const DeviceProps& props) {
  if (p.M == 0) return 0;
  if (uses_gemm(p, props)) return wna16_panels_scratch_bytes(p, choose_gemm(p, props));
  return uses_tiles(p, props) ? wna16_panels_scratch_bytes(p, choose_tiles(p, props)) : 0;
}

int64_t wna16_panels_scratch_bytes(const Wna16PanelsParams&, const StreamConfig&) { return 0; }

int64_t wna16_panels_scratch_bytes(const Wna16PanelsParams& p, const GemmConfig& config) {
  return config.adds_in_cluster ? 0 : parts_bytes(p, config.split_k);
}

int64_t wna16_panels_scratch_bytes(const Wna16PanelsParams& p, const TilesConfig& config) {
  return parts_bytes(p, config.split_k);
}

namespace {

int splits_of(const StreamConfig&) { return 1; }
int splits_of(const GemmConfig& c) { return c.adds_in_cluster ? 1 : c.split_k; }
int splits_of(const TilesConfig& c) { return c.split_k; }

}  // namespace

int wna16_panels_splits(const Wna16PanelsParams& p, const DeviceProps& props) {
  if (p.M == 0) return 1;
  if (uses_gemm(p, props)) return splits_of(choose_gemm(p, props));
  return uses_tiles(p, props) ? splits_of(choose_tiles(p, props)) : 1;
}

int wna16_panels_shared_bytes(const Wna16PanelsParams& p, const StreamConfig& config) {
  return StreamMemory(p, config).total;
}

int wna16_panels_shared_bytes(const Wna16PanelsParams& p, const GemmConfig& config) {
  return gemm_shared_bytes(config, block_bytes(p.bits, p.groups_per_block, p.has_zeros));
}

int wna16_panels_shared_bytes(const Wna16PanelsParams& p, const TilesConfig& config) {
  return TilesMemory(config, block_bytes(p.bits, p.groups_per_block, p.has_zeros)).total;
}

std::string describe(const Wna16PanelsParams& p, const DeviceProps& props) {
  if (uses_gemm(p, props)) return "gemm_sm90 " + to_string(choose_gemm(p, props));
  if (uses_tiles(p, props)) return "tiles_sm80 " + to_string(choose_tiles(p, props));
  return "stream " + to_string(choose_stream(p, props));
}

namespace {

Status check(const Wna16PanelsParams& p) {
  Checks checks;
  checks.require(p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16, "dtype",
                 std::to_string(static_cast<int>(p.dtype)), "1 (float16), 2 (bfloat16)");
  checks.one_of("bits", p.bits, {2, 3, 4, 8}).one_of("groups_per_block", p.groups_per_block, {1, 2, 4});
  checks.at_least("M", p.M, 0)
      .at_least("N", p.N, 1)
      .at_least("K", p.K, 1)
      .at_most("M", p.M, p.batch_invariant ? kMaxGridY * kTokens : int64_t{1} << 21);
  checks.at_most("N", p.N, int64_t{1} << 31).at_most("K", p.K, int64_t{1} << 30);
  checks.at_most("column_blocks", p.column_blocks, (int64_t{1} << 30) / kBlockColumns);
  const int64_t stored = p.column_blocks * kBlockColumns;
  checks.at_least("column_blocks * 128", stored, p.K);
  if (p.gate_up) {
    checks.multiple_of("N", p.N, 2);
    checks.require(p.bias == nullptr, "bias", "given", "null with gate_up");
    checks.require(p.residual == nullptr, "residual", "given", "null with gate_up");
    checks.require(p.norm_weight == nullptr, "norm_weight", "given", "null with gate_up");
  }
  if (p.leaves_sums) {
    const bool is_bare = !p.gate_up && p.bias == nullptr && p.residual == nullptr &&
                         p.norm_weight == nullptr && p.x_squares == nullptr;
    checks.require(is_bare, "leaves_sums", "yes with gate_up, bias, residual or a norm",
                   "no where something follows the sums");
  }
  if (p.M > 0) {
    checks.not_null("x", p.x).not_null("panels", p.panels);
    if (!p.leaves_sums) checks.not_null("out", p.out);
    checks.aligned("panels", p.panels, 16);
    checks.require((p.norm_weight == nullptr) == (p.norm_out == nullptr), "norm_out",
                   p.norm_out == nullptr ? "null" : "given", "null exactly when norm_weight is null");
    checks.require(p.squares == nullptr || p.norm_weight != nullptr, "squares", "given",
                   "null without norm_weight");
  }
  if (has_pending_norm(p)) {
    const char* name = p.squares != nullptr ? "squares" : "x_squares";
    checks.require(p.dtype == DType::kBFloat16, name, "given with dtype " + std::string(to_string(p.dtype)),
                   "null but for bfloat16");
    checks.require(p.M <= kMaxPendingRows, name, "given with M=" + std::to_string(p.M),
                   "null above " + std::to_string(kMaxPendingRows) + " tokens");
    checks.require(!p.batch_invariant, name, "given", "null with batch_invariant");
    checks.aligned("squares", p.squares, alignof(float)).aligned("x_squares", p.x_squares, 16);
    if (p.x_squares != nullptr) checks.multiple_of("K", p.K, 4 * kSquaredColumns);
  }
  return checks.status("wna16_panels", p);
}

// For the kernels that can neither leave a norm nor take one that was left.
void require_whole_norms(Checks& checks, const Wna16PanelsParams& p) {
  checks.require(p.squares == nullptr, "squares", "given", "null for this kernel");
  checks.require(p.x_squares == nullptr, "x_squares", "given", "null for this kernel");
}

template <typename Config>
Status check_scratch(const Wna16PanelsParams& p, const Config& c) {
  Checks checks;
  checks.require(!p.leaves_sums || splits_of(c) > 1, "leaves_sums", "yes with one split",
                 "no where columns are not split over blocks");
  const int64_t needed = wna16_panels_scratch_bytes(p, c);
  if (needed > 0) {
    checks.not_null("scratch", p.scratch).aligned("scratch", p.scratch, 16);
    checks.at_least("scratch_bytes", p.scratch_bytes, needed);
  }
  return checks.status("wna16_panels", p);
}

Status check(const Wna16PanelsParams& p, const StreamConfig& c, const DeviceProps& props) {
  Checks checks;
  checks.one_of("token_tiles", c.token_tiles, {1, 2, 4}).one_of("row_tiles", c.row_tiles, {2, 4});
  checks.at_least("row_tiles", c.row_tiles, c.token_tiles == 4 ? 4 : 2);
  checks.at_least("warps", c.warps, 1);
  checks.at_most("warps", c.warps, max_stream_warps(c.token_tiles, c.row_tiles, p.bits));
  checks.at_least("row_blocks", c.row_blocks, 1)
      .at_most("row_blocks", c.row_blocks, ceil_div(p.N, kTileRows));
  checks.at_least("stages", c.stages, 2).at_most("stages", c.stages, max_stream_stages(c.copy_engine));
  checks.at_most("warps * stages", c.warps * c.stages, kMaxStreamBarriers);
  const bool is_hopper = props.compute_major >= 9;
  checks.require(!c.overlaps_producer || is_hopper, "overlaps_producer", "yes", "no below sm_90");
  checks.require(!c.copy_engine || is_hopper, "copy_engine", "yes", "no below sm_90");
  if (checks.ok()) {
    checks.at_most("shared memory", StreamMemory(p, c).total, props.shared_memory_per_block);
  }
  return checks.ok() ? check_scratch(p, c) : checks.status("wna16_panels", p);
}

Status check(const Wna16PanelsParams& p, const GemmConfig& c, const DeviceProps& props) {
  Checks checks;
  checks.require(has_gemm(props), "device", "without wgmma, or the library without its code", "sm_90a");
  checks.require(gemm_can_read(p), "x", "misaligned", "rows aligned to 16 bytes for this kernel");
  checks.require(!p.batch_invariant, "batch_invariant", "yes", "no for this kernel");
  require_whole_norms(checks, p);
  const auto is_own = [&](const GemmTile& tile) {
    return tile.token_tile == c.token_tile && tile.warp_groups == c.warp_groups;
  };
  if (std::none_of(std::begin(kGemmTiles), std::end(kGemmTiles), is_own)) {
    const std::string got = std::to_string(c.token_tile) + ", " + std::to_string(c.warp_groups);
    checks.require(false, "(token_tile, warp_groups)", got, "one of gemm_tiles()");
  }
  checks.at_least("split_k", c.split_k, 1)
      .at_most("split_k", c.split_k, std::min<int64_t>(kMaxSplit, p.column_blocks));
  if (c.adds_in_cluster) {
    checks.at_least("split_k", c.split_k, 2).at_most("split_k", c.split_k, kMaxCluster);
    checks.at_least("token_tile", c.token_tile, kFewestClusterTokens);
  }
  // A block waits for its next stage before it gives the last one back.
  const int64_t columns = ceil_div(p.column_blocks, std::max(c.split_k, 1));
  checks.at_least("stages", c.stages, columns > 1 ? 2 : 1).at_most("stages", c.stages, kMaxStages);
  checks.at_most("shared memory", wna16_panels_shared_bytes(p, c), props.shared_memory_per_block);
  return checks.ok() ? check_scratch(p, c) : checks.status("wna16_panels", p);
}

Status check(const Wna16PanelsParams& p, const TilesConfig& c, const DeviceProps& props) {
  Checks checks;
  checks.one_of("bits", p.bits, {4, 8});
  checks.require(tiles_can_run(p), "x", "misaligned, or N too large",
                 "rows aligned to 16 bytes, and N up to 64 * 65535 for this kernel");
  checks.require(!p.batch_invariant, "batch_invariant", "yes", "no for this kernel");
  require_whole_norms(checks, p);
  checks.one_of("token_tiles", c.token_tiles, {2, 4, 6, 8}).one_of("row_groups", c.row_groups, {1, 2, 4});
  checks.one_of("column_groups", c.column_groups, {2, 4, 8});
  if (!checks.ok()) return checks.status("wna16_panels", p);
  checks.at_most("row_groups * column_groups", c.row_groups * c.column_groups, kMostTileWarps);
  checks.at_least("split_k", c.split_k, 1)
      .at_most("split_k", c.split_k,
               std::min(kMostTileSplits, column_chunks(p.column_blocks, c.column_groups)));
  checks.at_least("stages", c.stages, kFewestTileStages).at_most("stages", c.stages, kMostTileStages);
  checks.require(!c.overlaps_producer || props.compute_major >= 9, "overlaps_producer", "yes",
                 "no below sm_90");
  checks.at_most("shared memory", wna16_panels_shared_bytes(p, c), props.shared_memory_per_block);
  return checks.ok() ? check_scratch(p, c) : checks.status("wna16_panels", p);
}

template <typename Launch>
cudaError_t with_format(const Wna16PanelsParams& p, Launch&& launch) {
  const auto with_bits = [&](auto tag) {
    switch (p.bits) {
      case 2:
        return launch(tag, std::integral_constant<int, 2>());
      case 3:
        return launch(tag, std::integral_constant<int, 3>());
      case 4:
        return launch(tag, std::integral_constant<int, 4>());
      default:
        return launch(tag, std::integral_constant<int, 8>());
    }
  };
  return p.dtype == DType::kFloat16 ? with_bits(Type<__half>()) : with_bits(Type<__nv_bfloat16>());
}

Status run(const Wna16PanelsParams& p, const StreamConfig& config) {
  return run_on_device("wna16_panels", p, [&] {
    return with_format(p, [&](auto tag, auto bits) {
      return launch_wna16_stream<typename decltype(tag)::type, decltype(bits)::value>(p, config);
    });
  });
}

Status run(const Wna16PanelsParams& p, const GemmConfig& config) {
  return run_on_device("wna16_panels", p, [&] {
    return with_format(p, [&](auto tag, auto bits) {
      return launch_wna16_gemm<typename decltype(tag)::type, decltype(bits)::value>(p, config);
    });
  });
}

Status run(const Wna16PanelsParams& p, const TilesConfig& config) {
  return run_on_device("wna16_panels", p, [&] {
    return with_format(p, [&](auto tag, auto bits) {
      constexpr int kBits = decltype(bits)::value;
      if constexpr (kBits == 4 || kBits == 8) {
        return launch_wna16_tiles<typename decltype(tag)::type, kBits>(p, config);
      } else {
        return cudaErrorInvalidConfiguration;  // refused before
      }
    });
  });
}

// `status` of the product, and where that is done and a norm wanted, the norm of its rows.
Status with_norm(const Wna16PanelsParams& p, const Status& status) {
  return status.ok() && p.norm_weight != nullptr ? rms_norm(norm_of(p)) : status;
}

Status run_with_norm(const Wna16PanelsParams& p, const StreamConfig& config, const DeviceProps&) {
  return p.squares != nullptr ? run(p, config) : with_norm(p, run(p, config));
}

// The kernel that adds parts up may norm the rows as well.
Status run_with_norm(const Wna16PanelsParams& p, const GemmConfig& config, const DeviceProps& props) {
  const Status status = run(p, config);
  return !config.adds_in_cluster && norms_parts(p, config.split_k, props) ? status : with_norm(p, status);
}

Status run_with_norm(const Wna16PanelsParams& p, const TilesConfig& config, const DeviceProps& props) {
  const Status status = run(p, config);
  return norms_parts(p, config.split_k, props) ? status : with_norm(p, status);
}

template <typename Config>
Status run_with_scratch(const Wna16PanelsParams& p, const Config& config, const DeviceProps& props) {
  if (Status status = check_scratch(p, config); !status.ok()) return status;
  return run_with_norm(p, config, props);
}

}  // namespace

Status wna16_panels(const Wna16PanelsParams& p) {
  if (Status status = check(p); !status.ok() || p.M == 0) return status;
  DeviceProps props;
  if (Status status = props_of("wna16_panels", p, &props); !status.ok()) return status;
  if (uses_gemm(p, props)) return run_with_scratch(p, choose_gemm(p, props), props);
  if (uses_tiles(p, props)) return run_with_scratch(p, choose_tiles(p, props), props);
  return run_with_scratch(p, choose_stream(p, props), props);
}

namespace {

template <typename Config>
Status run_as_told(const Wna16PanelsParams& p, const Config& config) {
  if (Status status = check(p); !status.ok() || p.M == 0) return status;
  DeviceProps props;
  if (Status status = props_of("wna16_panels", p, &props); !status.ok()) return status;
  if (Status status = check(p, config, props); !status.ok()) return status;
  return run_with_norm(p, config, props);
}

}  // namespace

Status wna16_panels(const Wna16PanelsParams& p, const StreamConfig& config) { return run_as_told(p, config); }

Status wna16_panels(const Wna16PanelsParams& p, const GemmConfig& config) { return run_as_told(p, config); }

Status wna16_panels(const Wna16PanelsParams& p, const TilesConfig& config) { return run_as_told(p, config); }

}  // namespace qsun
