// The operator: checks, the choice of tile and grid, and the way to the kernel of each bit width.
#include "qsun/wna16_linear.h"

#include <algorithm>

#include "runtime/checks.h"
#include "runtime/launch.h"
#include "wna16/rows.h"

namespace qsun {

std::string to_string(const Wna16LinearParams& p) {
  return Fields()
      .add("M", p.M)
      .add("N", p.N)
      .add("K", p.K)
      .add("bits", p.bits)
      .add("group_size", p.group_size < 0 ? "channel" : std::to_string(p.group_size))
      .add("zeros", p.qzeros != nullptr ? "stored" : "symmetric")
      .add("g_idx", p.g_idx != nullptr ? "yes" : "no")
      .add("dtype", to_string(p.dtype))
      .str();
}

std::string to_string(const Wna16LinearConfig& c) {
  return Fields()
      .add("tile_m", c.tile_m)
      .add("warps", c.warps)
      .add("grid_n", c.grid_n)
      .add("grid_m", c.grid_m)
      .str();
}

Wna16LinearConfig choose(const Wna16LinearParams& p, const DeviceProps& props) {
  Wna16LinearConfig c;
  c.tile_m = p.M <= 1 ? 1 : p.M <= 2 ? 2 : p.M <= 4 ? 4 : 8;
  c.grid_m = std::clamp<int64_t>(ceil_div(p.M, c.tile_m), 1, kMaxGridY);
  // Large blocks share x among more rows of the weight; smaller ones reach every multiprocessor when N is
  // small.
  for (c.warps = 8; c.warps >= 2; c.warps /= 2) {
    c.grid_n = ceil_div(p.N, static_cast<int64_t>(c.warps) * kRowsPerWarp);
    if (c.grid_n * c.grid_m >= props.sm_count || c.warps == 2) break;
  }
  return c;
}

namespace {

Status check(const Wna16LinearParams& p) {
  Checks checks;
  checks.known(p.dtype)
      .one_of("bits", p.bits, {2, 3, 4, 8})
      .one_of("group_size", p.group_size, {32, 64, 128, -1});
  checks.at_least("M", p.M, 0).at_least("N", p.N, 1).at_least("K", p.K, 1).at_most("N", p.N, kMaxGridX);
  if (p.M > 0) {
    checks.not_null("x", p.x)
        .not_null("qweight", p.qweight)
        .not_null("scales", p.scales)
        .not_null("out", p.out);
    checks.aligned("qweight", p.qweight, 4).aligned("g_idx", p.g_idx, 4);
  }
  checks.require(p.dtype == DType::kFloat32, "dtype", to_string(p.dtype),
                 "float32; 16-bit activations take panels (wna16_panels.h)");
  return checks.status("wna16_linear", p);
}

}  // namespace

Status wna16_linear(const Wna16LinearParams& p) {
  if (Status status = check(p); !status.ok()) return status;
  if (p.M == 0) return {};
  DeviceProps props;
  if (Status status = props_of("wna16_linear", p, &props); !status.ok()) return status;
  return run_on_device("wna16_linear", p, [&] {
    const Wna16LinearConfig config = choose(p, props);
    switch (p.bits) {
      case 2:
        return launch_wna16_rows<2>(p, config);
      case 3:
        return launch_wna16_rows<3>(p, config);
      case 4:
        return launch_wna16_rows<4>(p, config);
      default:
        return launch_wna16_rows<8>(p, config);
    }
  });
}

}  // namespace qsun
