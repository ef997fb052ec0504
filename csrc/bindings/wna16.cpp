// Binds the operators of low-bit weights.
#include <pybind11/stl.h>

#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/common.h"
#include "qsun/dequantize.h"
#include "qsun/device.h"
#include "qsun/gather_columns.h"
#include "qsun/wna16_linear.h"
#include "qsun/wna16_panels.h"

namespace qsun::bindings {
namespace {

using PanelsConfig = std::variant<StreamConfig, GemmConfig, TilesConfig>;

void bind_panels(py::module_& m) {
  printable<StreamConfig>(m, "StreamConfig", "How the streaming kernel of panel weights is launched.")
      .def(py::init([](int token_tiles, int row_tiles, int row_blocks, int warps, int stages,
                       bool copy_engine, bool overlaps_producer) {
             return StreamConfig{token_tiles, row_tiles,   row_blocks,       warps,
                                 stages,      copy_engine, overlaps_producer};
           }),
           py::kw_only(), "token_tiles"_a, "row_tiles"_a, "row_blocks"_a, "warps"_a, "stages"_a,
           "copy_engine"_a, "overlaps_producer"_a)
      .def_readonly("token_tiles", &StreamConfig::token_tiles)
      .def_readonly("row_tiles", &StreamConfig::row_tiles)
      .def_readonly("row_blocks", &StreamConfig::row_blocks)
      .def_readonly("warps", &StreamConfig::warps)
      .def_readonly("stages", &StreamConfig::stages)
      .def_readonly("copy_engine", &StreamConfig::copy_engine)
      .def_readonly("overlaps_producer", &StreamConfig::overlaps_producer);
  printable<GemmConfig>(m, "GemmConfig", "How the kernel of panel weights for many tokens is launched.")
      .def(py::init([](int token_tile, int warp_groups, int split_k, int stages, bool adds_in_cluster) {
             return GemmConfig{token_tile, warp_groups, split_k, stages, adds_in_cluster};
           }),
           py::kw_only(), "token_tile"_a, "warp_groups"_a, "split_k"_a, "stages"_a, "adds_in_cluster"_a)
      .def_readonly("token_tile", &GemmConfig::token_tile)
      .def_readonly("warp_groups", &GemmConfig::warp_groups)
      .def_readonly("split_k", &GemmConfig::split_k)
      .def_readonly("stages", &GemmConfig::stages)
      .def_readonly("adds_in_cluster", &GemmConfig::adds_in_cluster);
  printable<TilesConfig>(m, "TilesConfig",
                         "How the kernel of panel weights for many tokens before sm_90 is launched.")
      .def(py::init([](int token_tiles, int row_groups, int column_groups, int split_k, int stages,
                       bool overlaps_producer) {
             return TilesConfig{token_tiles, row_groups, column_groups, split_k, stages, overlaps_producer};
           }),
           py::kw_only(), "token_tiles"_a, "row_groups"_a, "column_groups"_a, "split_k"_a, "stages"_a,
           "overlaps_producer"_a)
      .def_readonly("token_tiles", &TilesConfig::token_tiles)
      .def_readonly("row_groups", &TilesConfig::row_groups)
      .def_readonly("column_groups", &TilesConfig::column_groups)
      .def_readonly("split_k", &TilesConfig::split_k)
      .def_readonly("stages", &TilesConfig::stages)
      .def_readonly("overlaps_producer", &TilesConfig::overlaps_producer);
  m.def(
      "wna16_gemm_tiles",
      [] {
        std::vector<std::pair<int, int>> tiles;
        for (const GemmTile& tile : gemm_tiles()) {
          tiles.emplace_back(tile.token_tile, tile.warp_groups);
        }
        return tiles;
      },
      "(token_tile, warp_groups) that a GemmConfig may have.");
  const auto sizes = [](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
                        bool batch_invariant, bool in_layer = false) {
    Wna16PanelsParams p;
    p.M = M;
    p.N = N;
    p.K = K;
    p.x_stride = K;
    p.column_blocks = (K + 127) / 128;
    p.bits = bits;
    p.groups_per_block = groups_per_block;
    p.has_zeros = has_zeros;
    p.batch_invariant = batch_invariant;
    p.in_layer = in_layer;
    return p;
  };
  m.def(
      "choose_wna16_stream",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
              bool batch_invariant, const DeviceProps& props, bool in_layer) {
        return choose_stream(sizes(M, N, K, bits, groups_per_block, has_zeros, batch_invariant, in_layer),
                             props);
      },
      "M"_a, "N"_a, "K"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a, "batch_invariant"_a, "props"_a,
      "in_layer"_a = false);
  m.def(
      "choose_wna16_gemm",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
              const DeviceProps& props, bool in_layer) {
        return choose_gemm(sizes(M, N, K, bits, groups_per_block, has_zeros, false, in_layer), props);
      },
      "M"_a, "N"_a, "K"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a, "props"_a, "in_layer"_a = false);
  m.def(
      "uses_wna16_tiles",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
              bool batch_invariant, const DeviceProps& props) {
        return uses_tiles(sizes(M, N, K, bits, groups_per_block, has_zeros, batch_invariant), props);
      },
      "M"_a, "N"_a, "K"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a, "batch_invariant"_a, "props"_a);
  m.def(
      "may_pend_wna16_norm",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros, int dtype,
              const DeviceProps& props) {
        Wna16PanelsParams p = sizes(M, N, K, bits, groups_per_block, has_zeros, false);
        p.dtype = static_cast<DType>(dtype);
        return may_pend_norm(p, props);
      },
      "M"_a, "N"_a, "K"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a, "dtype"_a, "props"_a);
  m.def(
      "wna16_panels_splits",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
              const DeviceProps& props) {
        return wna16_panels_splits(sizes(M, N, K, bits, groups_per_block, has_zeros, false), props);
      },
      "Blocks over which the columns are split, where each may leave its sums; else 1.", "M"_a, "N"_a, "K"_a,
      "bits"_a, "groups_per_block"_a, "has_zeros"_a, "props"_a);
  m.def(
      "choose_wna16_tiles",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
              const DeviceProps& props) {
        return choose_tiles(sizes(M, N, K, bits, groups_per_block, has_zeros, false), props);
      },
      "M"_a, "N"_a, "K"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a, "props"_a);
  m.def(
      "wna16_panels_shared_bytes",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
              const PanelsConfig& config) {
        const Wna16PanelsParams p = sizes(M, N, K, bits, groups_per_block, has_zeros, false);
        return std::visit([&](const auto& own) { return wna16_panels_shared_bytes(p, own); }, config);
      },
      "Shared memory of a block, bytes.", "M"_a, "N"_a, "K"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a,
      "config"_a);
  m.def(
      "wna16_panels_scratch_bytes",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
              bool batch_invariant, const DeviceProps& props, bool in_layer) {
        Wna16PanelsParams p = sizes(M, N, K, bits, groups_per_block, has_zeros, batch_invariant, in_layer);
        p.x_stride = (K + 7) / 8 * 8;
        return wna16_panels_scratch_bytes(p, props);
      },
      "What a call needs where the columns are those of x and its rows aligned to 16 bytes; no call needs "
      "more.",
      "M"_a, "N"_a, "K"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a, "batch_invariant"_a, "props"_a,
      "in_layer"_a = false);
  m.def(
      "wna16_parts_bytes",
      [sizes](int64_t M, int64_t N, int64_t K, const std::variant<GemmConfig, TilesConfig>& config) {
        const Wna16PanelsParams p = sizes(M, N, K, 4, 1, false, false);
        return std::visit([&](const auto& own) { return wna16_panels_scratch_bytes(p, own); }, config);
      },
      "What a call with this configuration needs, of any format.", "M"_a, "N"_a, "K"_a, "config"_a);
  m.def(
      "describe_wna16_panels",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
              bool batch_invariant, const DeviceProps& props, bool in_layer) {
        return describe(sizes(M, N, K, bits, groups_per_block, has_zeros, batch_invariant, in_layer), props);
      },
      "M"_a, "N"_a, "K"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a, "batch_invariant"_a, "props"_a,
      "in_layer"_a = false);
  m.def(
      "wna16_panels",
      [](const std::optional<PanelsConfig>& config, uintptr_t x, uintptr_t panels, uintptr_t bias,
         uintptr_t residual, uintptr_t norm_weight, uintptr_t x_squares, uintptr_t out, uintptr_t norm_out,
         uintptr_t squares, uintptr_t scratch, int64_t scratch_bytes, int64_t M, int64_t N, int64_t K,
         int64_t column_blocks, int64_t x_stride, int64_t residual_stride, int64_t out_stride, float norm_eps,
         float x_eps, int bits, int groups_per_block, bool has_zeros, bool gate_up, bool in_layer,
         bool batch_invariant, bool leaves_sums, bool prefetch_weights, int dtype, int device,
         uintptr_t stream) {
        Wna16PanelsParams p;
        p.x = pointer(x);
        p.panels = pointer<uint8_t>(panels);
        p.bias = pointer(bias);
        p.residual = pointer(residual);
        p.norm_weight = pointer(norm_weight);
        p.x_squares = pointer<float>(x_squares);
        p.out = pointer(out);
        p.norm_out = pointer(norm_out);
        p.squares = pointer<float>(squares);
        p.norm_eps = norm_eps;
        p.x_eps = x_eps;
        p.scratch = pointer(scratch);
        p.scratch_bytes = scratch_bytes;
        p.M = M;
        p.N = N;
        p.K = K;
        p.column_blocks = column_blocks;
        p.x_stride = x_stride;
        p.residual_stride = residual_stride;
        p.out_stride = out_stride;
        p.bits = bits;
        p.groups_per_block = groups_per_block;
        p.has_zeros = has_zeros;
        p.gate_up = gate_up;
        p.batch_invariant = batch_invariant;
        p.in_layer = in_layer;
        p.leaves_sums = leaves_sums;
        p.prefetch_weights = prefetch_weights;
        place(p, dtype, device, stream);
        if (!config) return check(wna16_panels(p));
        std::visit([&](const auto& own) { check(wna16_panels(p, own)); }, *config);
      },
      "config: a StreamConfig, GemmConfig or TilesConfig to run as told by that kernel, or None.",
      "config"_a.none(true), "x"_a, "panels"_a, "bias"_a, "residual"_a, "norm_weight"_a, "x_squares"_a,
      "out"_a, "norm_out"_a, "squares"_a, "scratch"_a, "scratch_bytes"_a, "M"_a, "N"_a, "K"_a,
      "column_blocks"_a, "x_stride"_a, "residual_stride"_a, "out_stride"_a, "norm_eps"_a, "x_eps"_a, "bits"_a,
      "groups_per_block"_a, "has_zeros"_a, "gate_up"_a, "in_layer"_a, "batch_invariant"_a, "leaves_sums"_a,
      "prefetch_weights"_a, "dtype"_a, "device"_a, "stream"_a);
}

}  // namespace

void bind_wna16(py::module_& m) {
  m.def(
      "gather_columns",
      [](uintptr_t x, uintptr_t perm, uintptr_t out, int64_t M, int64_t K, int64_t columns, int64_t x_stride,
         bool prefetch_perm, int dtype, int device, uintptr_t stream) {
        GatherColumnsParams p;
        p.x = pointer(x);
        p.perm = pointer<int32_t>(perm);
        p.out = pointer(out);
        p.M = M;
        p.K = K;
        p.columns = columns;
        p.x_stride = x_stride;
        p.prefetch_perm = prefetch_perm;
        place(p, dtype, device, stream);
        check(gather_columns(p));
      },
      "x"_a, "perm"_a, "out"_a, "M"_a, "K"_a, "columns"_a, "x_stride"_a, "prefetch_perm"_a, "dtype"_a,
      "device"_a, "stream"_a);
  printable<Wna16LinearConfig>(m, "Wna16LinearConfig", "How wna16_linear is launched.")
      .def_readonly("tile_m", &Wna16LinearConfig::tile_m)
      .def_readonly("warps", &Wna16LinearConfig::warps)
      .def_readonly("grid_n", &Wna16LinearConfig::grid_n)
      .def_readonly("grid_m", &Wna16LinearConfig::grid_m);
  m.def(
      "choose_wna16_linear",
      [](int64_t M, int64_t N, const DeviceProps& props) {
        Wna16LinearParams p;
        p.M = M;
        p.N = N;
        return choose(p, props);
      },
      "M"_a, "N"_a, "props"_a);
  m.def(
      "wna16_linear",
      [](uintptr_t x, uintptr_t qweight, uintptr_t scales, uintptr_t qzeros, uintptr_t g_idx, uintptr_t bias,
         uintptr_t residual, uintptr_t out, int64_t M, int64_t N, int64_t K, int64_t x_stride,
         int64_t residual_stride, int64_t out_stride, int bits, int group_size, int dtype, int device,
         uintptr_t stream) {
        Wna16LinearParams p;
        p.x = pointer(x);
        p.qweight = pointer<uint32_t>(qweight);
        p.scales = pointer(scales);
        p.qzeros = pointer<uint8_t>(qzeros);
        p.g_idx = pointer<int32_t>(g_idx);
        p.bias = pointer(bias);
        p.residual = pointer(residual);
        p.out = pointer(out);
        p.M = M;
        p.N = N;
        p.K = K;
        p.x_stride = x_stride;
        p.residual_stride = residual_stride;
        p.out_stride = out_stride;
        p.bits = bits;
        p.group_size = group_size;
        place(p, dtype, device, stream);
        check(wna16_linear(p));
      },
      "x"_a, "qweight"_a, "scales"_a, "qzeros"_a, "g_idx"_a, "bias"_a, "residual"_a, "out"_a, "M"_a, "N"_a,
      "K"_a, "x_stride"_a, "residual_stride"_a, "out_stride"_a, "bits"_a, "group_size"_a, "dtype"_a,
      "device"_a, "stream"_a);
  bind_panels(m);
  m.def(
      "dequantize",
      [](uintptr_t qweight, uintptr_t scales, uintptr_t qzeros, uintptr_t g_idx, uintptr_t out, int64_t N,
         int64_t K, int bits, int group_size, int scale_dtype, int dtype, int device, uintptr_t stream) {
        DequantizeParams p;
        p.qweight = pointer<uint32_t>(qweight);
        p.scales = pointer(scales);
        p.qzeros = pointer<uint8_t>(qzeros);
        p.g_idx = pointer<int32_t>(g_idx);
        p.out = pointer(out);
        p.N = N;
        p.K = K;
        p.bits = bits;
        p.group_size = group_size;
        p.scale_dtype = static_cast<DType>(scale_dtype);
        place(p, dtype, device, stream);
        check(dequantize(p));
      },
      "qweight"_a, "scales"_a, "qzeros"_a, "g_idx"_a, "out"_a, "N"_a, "K"_a, "bits"_a, "group_size"_a,
      "scale_dtype"_a, "dtype"_a, "device"_a, "stream"_a);
}

}  // namespace qsun::bindings
