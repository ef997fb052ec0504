// The operator on panel weights: checks, the choice of kernel and configuration, and the way to the kernel of
// each dtype and bit width.
#include "qsun/wna16_panels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "runtime/checks.h"
#include "runtime/launch.h"
#include "wna16/gemm_sm90.h"
#include "wna16/panels.h"
#include "wna16/stream.h"

namespace qsun {

std::string to_string(const Wna16PanelsParams& p) {
  return Fields()
      .add("M", p.M)
      .add("N", p.N)
      .add("K", p.K)
      .add("bits", p.bits)
      .add("groups_per_block", p.groups_per_block)
      .add("zeros", p.has_zeros ? "stored" : "symmetric")
      .add("perm", p.perm != nullptr ? "yes" : "no")
      .add("rows", p.gate_up ? "gate and up" : "plain")
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
      .add("split_k", c.split_k)
      .add("overlaps_producer", c.overlaps_producer ? "yes" : "no")
      .str();
}

namespace {

// Above this many tokens the matrix product for many of them is faster (docs/kernels/wna16.md).
constexpr int64_t kMaxStreamTokens = 8;

template <typename T>
struct Type {
  using type = T;
};

// Whether the library holds code of this architecture, such as "90a".
bool has_arch(const std::string& arch) {
  return ("," + build_info().archs + ",").find("," + arch + ",") != std::string::npos;
}

}  // namespace

int stream_shared_bytes(const Wna16PanelsParams& p, const StreamConfig& c) {
  const int x_rows = static_cast<int>(std::min<int64_t>(p.M, c.token_tiles * 8));
  const int stage = c.row_tiles * tile_bytes(p.bits, p.groups_per_block, p.has_zeros) + x_rows * kXRowBytes;
  return kHeadBytes + c.warps * c.stages * stage;
}

bool uses_gemm(const Wna16PanelsParams& p, const DeviceProps& props) {
  // wgmma is code of sm_90a alone.
  static const bool is_built = has_arch("90a");
  return is_built && props.compute_major == 9 && props.compute_minor == 0 && !p.batch_invariant &&
         p.M > kMaxStreamTokens && gemm_can_read(p);
}

StreamConfig choose_stream(const Wna16PanelsParams& params, const DeviceProps& props) {
  Wna16PanelsParams p = params;
  // The order of sums depends on the number of warps, so the number of tokens may not decide it.
  if (p.batch_invariant) p.M = kTokens;
  const bool is_hopper = props.compute_major >= 9;
  const int64_t row_tiles = ceil_div(p.N, kTileRows), sm = props.sm_count;
  StreamConfig c;
  c.overlaps_producer = is_hopper;
  c.token_tiles = static_cast<int>(std::clamp<int64_t>(ceil_div(p.M, kTokens), 1, 8));
  if (c.token_tiles == 5) c.token_tiles = 6;
  if (c.token_tiles == 7) c.token_tiles = 8;
  // Two row tiles a block up to two blocks a multiprocessor; beyond, four, which use x more often. A block
  // for each multiprocessor, if that is enough, leaves none with two; at most two each: blocks take several
  // turns.
  c.row_tiles = c.token_tiles <= 2 && row_tiles <= 4 * sm ? 2 : 4;
  const int64_t blocks = ceil_div(row_tiles, c.row_tiles);
  c.row_blocks = static_cast<int>(std::min(row_tiles, blocks <= sm ? sm : std::min(blocks, 2 * sm)));
  // As many warps as there are column blocks, and half of the shared memory: the other half is for the next
  // kernel's blocks. With 16 warps one stage ahead is enough.
  const int most_warps = max_stream_warps(c.token_tiles, c.row_tiles);
  c.warps = static_cast<int>(std::clamp<int64_t>(p.column_blocks, 1, most_warps));
  const int half = (props.shared_memory_per_block + 1024) / 2 - 1024;
  c.stages = c.warps <= kMaxStreamWarps / 2 ? 3 : 2;
  if (stream_shared_bytes(p, c) > half) c.stages = 2;
  while (stream_shared_bytes(p, c) > half && c.warps > 4) --c.warps;
  while (stream_shared_bytes(p, c) > props.shared_memory_per_block && c.warps > 1) --c.warps;
  return c;
}

std::string describe(const Wna16PanelsParams& p, const DeviceProps& props) {
  if (uses_gemm(p, props)) return "gemm_sm90 " + to_string(choose_gemm(p, props));
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
  const int64_t stored = p.column_blocks * kBlockColumns;
  checks.at_least("column_blocks * 128", stored, p.perm != nullptr ? 1 : p.K);
  if (p.gate_up) {
    checks.multiple_of("N", p.N, 2);
    checks.require(p.bias == nullptr, "bias", "given", "null with gate_up");
    checks.require(p.residual == nullptr, "residual", "given", "null with gate_up");
  }
  if (p.M > 0) {
    checks.not_null("x", p.x).not_null("panels", p.panels).not_null("out", p.out);
    checks.aligned("panels", p.panels, 16).aligned("perm", p.perm, 4);
  }
  return checks.status("wna16_panels", p);
}

Status check(const Wna16PanelsParams& p, const StreamConfig& c, const DeviceProps& props) {
  Checks checks;
  checks.one_of("token_tiles", c.token_tiles, {1, 2, 3, 4, 6, 8}).one_of("row_tiles", c.row_tiles, {1, 2, 4});
  checks.at_least("row_tiles", c.row_tiles, c.token_tiles == 1 ? 1 : c.token_tiles == 2 ? 2 : 4);
  checks.at_least("warps", c.warps, 1);
  checks.at_most("warps", c.warps, max_stream_warps(c.token_tiles, c.row_tiles));
  checks.at_least("row_blocks", c.row_blocks, 1)
      .at_most("row_blocks", c.row_blocks, ceil_div(p.N, kTileRows));
  checks.one_of("stages", c.stages, {2, 3, 4, 6});
  checks.at_least("split_k", c.split_k, 1);
  checks.at_most("split_k", c.split_k, props.compute_major >= 9 ? kMaxCluster : 1);
  checks.require(!c.overlaps_producer || props.compute_major >= 9, "overlaps_producer", "yes",
                 "no below sm_90");
  if (checks.ok()) {
    checks.at_most("shared memory", stream_shared_bytes(p, c), props.shared_memory_per_block);
  }
  return checks.status("wna16_panels", p);
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

Status with_props(const Wna16PanelsParams& p, DeviceProps* props) {
  if (Status status = device_props(p.device, props); !status.ok()) {
    return {status.code(), "wna16_panels", to_string(p), status.error()};
  }
  return {};
}

}  // namespace

Status wna16_panels(const Wna16PanelsParams& p) {
  if (Status status = check(p); !status.ok() || p.M == 0) return status;
  DeviceProps props;
  if (Status status = with_props(p, &props); !status.ok()) return status;
  return uses_gemm(p, props) ? run(p, choose_gemm(p, props)) : run(p, choose_stream(p, props));
}

Status wna16_panels(const Wna16PanelsParams& p, const StreamConfig& config) {
  if (Status status = check(p); !status.ok() || p.M == 0) return status;
  DeviceProps props;
  if (Status status = with_props(p, &props); !status.ok()) return status;
  if (Status status = check(p, config, props); !status.ok()) return status;
  return run(p, config);
}

}  // namespace qsun
