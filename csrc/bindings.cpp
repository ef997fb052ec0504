// The Python face of libqsun: integers in (addresses, sizes, strides, a dtype code, the device, the stream),
// nothing out. A Status that is not ok becomes qsun_kernels.errors.KernelLaunchError. The only file that
// knows pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "qsun/apply_rope.h"
#include "qsun/dequantize.h"
#include "qsun/device.h"
#include "qsun/gather_columns.h"
#include "qsun/paged_attention_decode.h"
#include "qsun/rms_norm.h"
#include "qsun/sample_tokens.h"
#include "qsun/silu_and_mul.h"
#include "qsun/types.h"
#include "qsun/wna16_linear.h"
#include "qsun/wna16_panels.h"
#include "qsun/write_kv_cache.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using PanelsConfig = std::variant<qsun::StreamConfig, qsun::GemmConfig>;

struct StatusError {
  qsun::Status status;
};

void check(qsun::Status status) {
  if (!status.ok()) throw StatusError{std::move(status)};
}

// For questions about the machine, where nothing was to be launched.
void check_device(const qsun::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.op() + "(" + status.shapes() + "): " + status.error());
}

void raise_status_error(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const StatusError& failed) {
    const qsun::Status& s = failed.status;
    // Imported when needed: the module must load before the package that holds it has finished loading.
    const py::object type = py::module_::import("qsun_kernels.errors").attr("KernelLaunchError");
    const py::object value = type(s.op(), s.shapes(), s.error());
    PyErr_SetObject(type.ptr(), value.ptr());
  }
}

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What every Params ends with.
template <typename Params>
void place(Params& p, int dtype, int device, uintptr_t stream) {
  p.dtype = static_cast<qsun::DType>(dtype);
  p.device = device;
  p.stream = reinterpret_cast<qsun::Stream>(stream);
}

template <typename Config>
py::class_<Config> printable(py::module_& m, const char* name, const char* doc) {
  return py::class_<Config>(m, name, py::module_local(), doc).def("__repr__", [name](const Config& c) {
    return std::string(name) + "(" + qsun::to_string(c) + ")";
  });
}

// ---- device

void bind_device(py::module_& m) {
  m.def(
      "build_info",
      [] {
        const qsun::BuildInfo info = qsun::build_info();
        py::list archs;
        for (size_t at = 0; at < info.archs.size();) {
          const size_t end = std::min(info.archs.find(',', at), info.archs.size());
          archs.append(info.archs.substr(at, end - at));
          at = end + 1;
        }
        return py::dict("archs"_a = py::tuple(archs), "nvcc"_a = info.nvcc_version,
                        "host_compiler"_a = info.host_compiler, "revision"_a = info.revision,
                        "cuda_runtime"_a = info.runtime_version);
      },
      "How the library was built: archs, nvcc, host_compiler, revision, cuda_runtime (1000 major + 10 "
      "minor).");
  m.def(
      "driver_version",
      [] {
        int version = 0;
        check_device(qsun::driver_version(&version));
        return version;
      },
      "The newest CUDA that the driver supports, as 1000 major + 10 minor; 0 without a driver.");
  printable<qsun::DeviceProps>(m, "DeviceProps", "Facts about a GPU that kernel choices depend on.")
      .def(py::init([](int compute_major, int compute_minor, int sm_count, int shared_memory_per_block,
                       int64_t l2_bytes) {
             return qsun::DeviceProps{compute_major, compute_minor, sm_count, shared_memory_per_block,
                                      l2_bytes};
           }),
           py::kw_only(), "compute_major"_a, "compute_minor"_a, "sm_count"_a, "shared_memory_per_block"_a,
           "l2_bytes"_a)
      .def_readonly("compute_major", &qsun::DeviceProps::compute_major)
      .def_readonly("compute_minor", &qsun::DeviceProps::compute_minor)
      .def_readonly("sm_count", &qsun::DeviceProps::sm_count)
      .def_readonly("shared_memory_per_block", &qsun::DeviceProps::shared_memory_per_block)
      .def_readonly("l2_bytes", &qsun::DeviceProps::l2_bytes);
  m.def(
      "device_info",
      [](int device) {
        qsun::DeviceProps props;
        check_device(qsun::device_props(device, &props));
        return props;
      },
      "device"_a, "Properties of a device; RuntimeError without a driver or such a device.");
}

// ---- wna16_linear, dequantize

void bind_panels(py::module_& m) {
  using qsun::GemmConfig;
  using qsun::StreamConfig;
  using qsun::Wna16PanelsParams;
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
  m.def(
      "wna16_gemm_tiles",
      [] {
        std::vector<std::pair<int, int>> tiles;
        for (const qsun::GemmTile& tile : qsun::gemm_tiles()) {
          tiles.emplace_back(tile.token_tile, tile.warp_groups);
        }
        return tiles;
      },
      "(token_tile, warp_groups) that a GemmConfig may have.");
  const auto sizes = [](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
                        bool batch_invariant) {
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
    return p;
  };
  m.def(
      "choose_wna16_stream",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
              bool batch_invariant, const qsun::DeviceProps& props) {
        return qsun::choose_stream(sizes(M, N, K, bits, groups_per_block, has_zeros, batch_invariant), props);
      },
      "M"_a, "N"_a, "K"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a, "batch_invariant"_a, "props"_a);
  m.def(
      "choose_wna16_gemm",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
              const qsun::DeviceProps& props) {
        return qsun::choose_gemm(sizes(M, N, K, bits, groups_per_block, has_zeros, false), props);
      },
      "M"_a, "N"_a, "K"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a, "props"_a);
  m.def(
      "wna16_panels_shared_bytes",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
              const PanelsConfig& config) {
        const Wna16PanelsParams p = sizes(M, N, K, bits, groups_per_block, has_zeros, false);
        return std::visit([&](const auto& own) { return qsun::wna16_panels_shared_bytes(p, own); }, config);
      },
      "Shared memory of a block, bytes.", "M"_a, "N"_a, "K"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a,
      "config"_a);
  m.def(
      "wna16_panels_scratch_bytes",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
              bool batch_invariant, const qsun::DeviceProps& props) {
        Wna16PanelsParams p = sizes(M, N, K, bits, groups_per_block, has_zeros, batch_invariant);
        p.x_stride = (K + 7) / 8 * 8;
        return qsun::wna16_panels_scratch_bytes(p, props);
      },
      "What a call needs where the columns are those of x and its rows aligned to 16 bytes; no call needs "
      "more.",
      "M"_a, "N"_a, "K"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a, "batch_invariant"_a, "props"_a);
  m.def(
      "wna16_gemm_scratch_bytes",
      [sizes](int64_t M, int64_t N, int64_t K, const GemmConfig& config) {
        return qsun::wna16_panels_scratch_bytes(sizes(M, N, K, 4, 1, false, false), config);
      },
      "What a call with this configuration needs, of any format.", "M"_a, "N"_a, "K"_a, "config"_a);
  m.def(
      "describe_wna16_panels",
      [sizes](int64_t M, int64_t N, int64_t K, int bits, int groups_per_block, bool has_zeros,
              bool batch_invariant, const qsun::DeviceProps& props) {
        return qsun::describe(sizes(M, N, K, bits, groups_per_block, has_zeros, batch_invariant), props);
      },
      "M"_a, "N"_a, "K"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a, "batch_invariant"_a, "props"_a);
  m.def(
      "wna16_panels",
      [](const std::optional<PanelsConfig>& config, uintptr_t x, uintptr_t panels, uintptr_t bias,
         uintptr_t residual, uintptr_t norm_weight, uintptr_t out, uintptr_t norm_out, uintptr_t scratch,
         int64_t scratch_bytes, int64_t M, int64_t N, int64_t K, int64_t column_blocks, int64_t x_stride,
         int64_t residual_stride, int64_t out_stride, float norm_eps, int bits, int groups_per_block,
         bool has_zeros, bool gate_up, bool batch_invariant, bool prefetch_weights, int dtype, int device,
         uintptr_t stream) {
        Wna16PanelsParams p;
        p.x = pointer(x);
        p.panels = pointer<uint8_t>(panels);
        p.bias = pointer(bias);
        p.residual = pointer(residual);
        p.norm_weight = pointer(norm_weight);
        p.out = pointer(out);
        p.norm_out = pointer(norm_out);
        p.norm_eps = norm_eps;
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
        p.prefetch_weights = prefetch_weights;
        place(p, dtype, device, stream);
        if (!config) return check(qsun::wna16_panels(p));
        std::visit([&](const auto& own) { check(qsun::wna16_panels(p, own)); }, *config);
      },
      "config: a StreamConfig or a GemmConfig to run as told by that kernel, or None.", "config"_a.none(true),
      "x"_a, "panels"_a, "bias"_a, "residual"_a, "norm_weight"_a, "out"_a, "norm_out"_a, "scratch"_a,
      "scratch_bytes"_a, "M"_a, "N"_a, "K"_a, "column_blocks"_a, "x_stride"_a, "residual_stride"_a,
      "out_stride"_a, "norm_eps"_a, "bits"_a, "groups_per_block"_a, "has_zeros"_a, "gate_up"_a,
      "batch_invariant"_a, "prefetch_weights"_a, "dtype"_a, "device"_a, "stream"_a);
}

void bind_wna16(py::module_& m) {
  m.def(
      "gather_columns",
      [](uintptr_t x, uintptr_t perm, uintptr_t out, int64_t M, int64_t K, int64_t columns, int64_t x_stride,
         bool prefetch_perm, int dtype, int device, uintptr_t stream) {
        qsun::GatherColumnsParams p;
        p.x = pointer(x);
        p.perm = pointer<int32_t>(perm);
        p.out = pointer(out);
        p.M = M;
        p.K = K;
        p.columns = columns;
        p.x_stride = x_stride;
        p.prefetch_perm = prefetch_perm;
        place(p, dtype, device, stream);
        check(qsun::gather_columns(p));
      },
      "x"_a, "perm"_a, "out"_a, "M"_a, "K"_a, "columns"_a, "x_stride"_a, "prefetch_perm"_a, "dtype"_a,
      "device"_a, "stream"_a);
  using qsun::Wna16LinearConfig;
  using qsun::Wna16LinearParams;
  printable<Wna16LinearConfig>(m, "Wna16LinearConfig", "How wna16_linear is launched.")
      .def_readonly("tile_m", &Wna16LinearConfig::tile_m)
      .def_readonly("warps", &Wna16LinearConfig::warps)
      .def_readonly("grid_n", &Wna16LinearConfig::grid_n)
      .def_readonly("grid_m", &Wna16LinearConfig::grid_m);
  m.def(
      "choose_wna16_linear",
      [](int64_t M, int64_t N, const qsun::DeviceProps& props) {
        Wna16LinearParams p;
        p.M = M;
        p.N = N;
        return qsun::choose(p, props);
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
        check(qsun::wna16_linear(p));
      },
      "x"_a, "qweight"_a, "scales"_a, "qzeros"_a, "g_idx"_a, "bias"_a, "residual"_a, "out"_a, "M"_a, "N"_a,
      "K"_a, "x_stride"_a, "residual_stride"_a, "out_stride"_a, "bits"_a, "group_size"_a, "dtype"_a,
      "device"_a, "stream"_a);
  bind_panels(m);
  m.def(
      "dequantize",
      [](uintptr_t qweight, uintptr_t scales, uintptr_t qzeros, uintptr_t g_idx, uintptr_t out, int64_t N,
         int64_t K, int bits, int group_size, int scale_dtype, int dtype, int device, uintptr_t stream) {
        qsun::DequantizeParams p;
        p.qweight = pointer<uint32_t>(qweight);
        p.scales = pointer(scales);
        p.qzeros = pointer<uint8_t>(qzeros);
        p.g_idx = pointer<int32_t>(g_idx);
        p.out = pointer(out);
        p.N = N;
        p.K = K;
        p.bits = bits;
        p.group_size = group_size;
        p.scale_dtype = static_cast<qsun::DType>(scale_dtype);
        place(p, dtype, device, stream);
        check(qsun::dequantize(p));
      },
      "qweight"_a, "scales"_a, "qzeros"_a, "g_idx"_a, "out"_a, "N"_a, "K"_a, "bits"_a, "group_size"_a,
      "scale_dtype"_a, "dtype"_a, "device"_a, "stream"_a);
}

// ---- paged_attention_decode

qsun::PagedAttentionDecodeParams attention_sizes(int64_t batch, int64_t q_len, int64_t num_q_heads,
                                                 int64_t num_kv_heads, int64_t head_dim, int64_t block_size,
                                                 int64_t max_blocks, int64_t window, int dtype, int kv_dtype,
                                                 int kv_scales) {
  qsun::PagedAttentionDecodeParams p;
  p.batch = batch;
  p.q_len = q_len;
  p.num_q_heads = num_q_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  p.block_size = block_size;
  p.max_blocks = max_blocks;
  p.window = window;
  p.dtype = static_cast<qsun::DType>(dtype);
  p.kv_dtype = static_cast<qsun::DType>(kv_dtype);
  p.kv_scales = static_cast<qsun::KvScales>(kv_scales);
  return p;
}

// A question about sizes alone: the answer of ask(sizes, props).
template <typename Ask>
void bind_attention_question(py::module_& m, const char* name, const char* doc, Ask ask) {
  m.def(
      name,
      [ask](int64_t batch, int64_t q_len, int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim,
            int64_t block_size, int64_t max_blocks, int64_t window, int dtype, int kv_dtype, int kv_scales,
            const qsun::DeviceProps& props) {
        const auto p = attention_sizes(batch, q_len, num_q_heads, num_kv_heads, head_dim, block_size,
                                       max_blocks, window, dtype, kv_dtype, kv_scales);
        check(qsun::paged_attention_decode_sizes(p));
        return ask(p, props);
      },
      doc, "batch"_a, "q_len"_a, "num_q_heads"_a, "num_kv_heads"_a, "head_dim"_a, "block_size"_a,
      "max_blocks"_a, "window"_a, "dtype"_a, "kv_dtype"_a, "kv_scales"_a, "props"_a);
}

// The answer of ask(sizes, config), or of ask(sizes, props) where config is None.
template <typename Ask>
void bind_attention_bytes(py::module_& m, const char* name, const char* doc, Ask ask) {
  m.def(
      name,
      [ask](const qsun::PagedAttentionDecodeConfig* config, int64_t batch, int64_t q_len, int64_t num_q_heads,
            int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int64_t max_blocks, int64_t window,
            int dtype, int kv_dtype, int kv_scales, const qsun::DeviceProps& props) {
        const auto p = attention_sizes(batch, q_len, num_q_heads, num_kv_heads, head_dim, block_size,
                                       max_blocks, window, dtype, kv_dtype, kv_scales);
        check(qsun::paged_attention_decode_sizes(p));
        return config == nullptr ? ask(p, props) : ask(p, *config);
      },
      doc, "config"_a.none(true), "batch"_a, "q_len"_a, "num_q_heads"_a, "num_kv_heads"_a, "head_dim"_a,
      "block_size"_a, "max_blocks"_a, "window"_a, "dtype"_a, "kv_dtype"_a, "kv_scales"_a, "props"_a);
}

void bind_attention_configs(py::module_& m) {
  using Params = qsun::PagedAttentionDecodeParams;
  using Props = qsun::DeviceProps;
  using qsun::PagedAttentionDecodeConfig;
  using qsun::PagedAttentionSplitConfig;
  printable<PagedAttentionDecodeConfig>(m, "PagedAttentionDecodeConfig",
                                        "How the planned kernel of paged_attention_decode is launched.")
      .def(py::init([](int warps, int stages, int blocks_per_sm, int parts, int min_part_units,
                       int prefix_parts, int min_prefix_tiles, int min_saved_tiles, bool overlaps_producer) {
             return PagedAttentionDecodeConfig{warps,
                                               stages,
                                               blocks_per_sm,
                                               parts,
                                               min_part_units,
                                               prefix_parts,
                                               min_prefix_tiles,
                                               min_saved_tiles,
                                               overlaps_producer};
           }),
           py::kw_only(), "warps"_a, "stages"_a, "blocks_per_sm"_a, "parts"_a, "min_part_units"_a,
           "prefix_parts"_a = 0, "min_prefix_tiles"_a = 4, "min_saved_tiles"_a = 0, "overlaps_producer"_a)
      .def_readonly("warps", &PagedAttentionDecodeConfig::warps)
      .def_readonly("stages", &PagedAttentionDecodeConfig::stages)
      .def_readonly("blocks_per_sm", &PagedAttentionDecodeConfig::blocks_per_sm)
      .def_readonly("parts", &PagedAttentionDecodeConfig::parts)
      .def_readonly("min_part_units", &PagedAttentionDecodeConfig::min_part_units)
      .def_readonly("prefix_parts", &PagedAttentionDecodeConfig::prefix_parts)
      .def_readonly("min_prefix_tiles", &PagedAttentionDecodeConfig::min_prefix_tiles)
      .def_readonly("min_saved_tiles", &PagedAttentionDecodeConfig::min_saved_tiles)
      .def_readonly("overlaps_producer", &PagedAttentionDecodeConfig::overlaps_producer);
  printable<PagedAttentionSplitConfig>(m, "PagedAttentionSplitConfig",
                                       "How the other kernel of paged_attention_decode is launched.")
      .def_readonly("head_tile", &PagedAttentionSplitConfig::head_tile)
      .def_readonly("head_tiles", &PagedAttentionSplitConfig::head_tiles)
      .def_readonly("lanes", &PagedAttentionSplitConfig::lanes)
      .def_readonly("num_parts", &PagedAttentionSplitConfig::num_parts)
      .def_readonly("grid", &PagedAttentionSplitConfig::grid);
  bind_attention_question(m, "choose_paged_attention_decode",
                          "A PagedAttentionDecodeConfig, or None where the other kernel serves the sizes.",
                          [](const Params& p, const Props& props) {
                            return qsun::is_planned(p, props) ? py::cast(qsun::choose(p, props))
                                                              : py::object(py::none());
                          });
  bind_attention_question(m, "choose_paged_attention_split", "A PagedAttentionSplitConfig.",
                          [](const Params& p, const Props& props) { return qsun::choose_split(p, props); });
  bind_attention_bytes(
      m, "paged_attention_plan_bytes",
      "Bytes of a plan; 0 where the kernel that serves the sizes takes none.",
      [](const Params& p, const auto& how) { return qsun::paged_attention_plan_bytes(p, how); });
  bind_attention_bytes(
      m, "paged_attention_prefixes_bytes",
      "Bytes of what a plan says about shared prefixes; 0 for sizes that share none.",
      [](const Params& p, const auto& how) { return qsun::paged_attention_prefixes_bytes(p, how); });
  bind_attention_bytes(
      m, "paged_attention_decode_scratch_bytes", "Bytes of scratch of one call without shared prefixes.",
      [](const Params& p, const auto& how) { return qsun::paged_attention_decode_scratch_bytes(p, how); });
  bind_attention_bytes(m, "paged_attention_sharing_scratch_bytes",
                       "Bytes of scratch of one call with shared prefixes.",
                       [](const Params& p, const auto& how) {
                         return qsun::paged_attention_decode_scratch_bytes(p, how, true);
                       });
}

void bind_attention(py::module_& m) {
  using qsun::PagedAttentionDecodeConfig;
  bind_attention_configs(m);
  m.def(
      "plan_paged_attention",
      [](const PagedAttentionDecodeConfig* config, uintptr_t seq_lens, uintptr_t block_table, uintptr_t plan,
         int64_t plan_bytes, uintptr_t prefixes, int64_t prefixes_bytes, int64_t batch, int64_t q_len,
         int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int64_t max_blocks,
         int64_t block_table_stride, int64_t window, int dtype, int kv_dtype, int kv_scales, int device,
         uintptr_t stream) {
        auto p = attention_sizes(batch, q_len, num_q_heads, num_kv_heads, head_dim, block_size, max_blocks,
                                 window, dtype, kv_dtype, kv_scales);
        p.seq_lens = pointer<int32_t>(seq_lens);
        p.block_table = pointer<int32_t>(block_table);
        p.block_table_stride = block_table_stride;
        p.plan = pointer(plan);
        p.plan_bytes = plan_bytes;
        p.prefixes = pointer(prefixes);
        p.prefixes_bytes = prefixes_bytes;
        place(p, dtype, device, stream);
        check(config == nullptr ? qsun::plan_paged_attention(p) : qsun::plan_paged_attention(p, *config));
      },
      "config: a PagedAttentionDecodeConfig to plan for, or None. prefixes: 0 to share none, and then"
      " block_table is not looked at.",
      "config"_a.none(true), "seq_lens"_a, "block_table"_a, "plan"_a, "plan_bytes"_a, "prefixes"_a,
      "prefixes_bytes"_a, "batch"_a, "q_len"_a, "num_q_heads"_a, "num_kv_heads"_a, "head_dim"_a,
      "block_size"_a, "max_blocks"_a, "block_table_stride"_a, "window"_a, "dtype"_a, "kv_dtype"_a,
      "kv_scales"_a, "device"_a, "stream"_a);
  m.def(
      "paged_attention_decode",
      [](const PagedAttentionDecodeConfig* config, uintptr_t q, uintptr_t k_cache, uintptr_t v_cache,
         uintptr_t k_scale, uintptr_t v_scale, uintptr_t block_table, uintptr_t seq_lens, uintptr_t sinks,
         uintptr_t out, uintptr_t lse, uintptr_t plan, int64_t plan_bytes, uintptr_t prefixes,
         int64_t prefixes_bytes, uintptr_t scratch, int64_t scratch_bytes, int64_t batch, int64_t q_len,
         int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, int64_t num_blocks, int64_t block_size,
         int64_t max_blocks, int64_t q_stride, int64_t block_table_stride, int64_t window,
         float softmax_scale, float softcap, bool follows_write, int dtype, int kv_dtype, int kv_scales,
         int device, uintptr_t stream) {
        auto p = attention_sizes(batch, q_len, num_q_heads, num_kv_heads, head_dim, block_size, max_blocks,
                                 window, dtype, kv_dtype, kv_scales);
        p.q = pointer(q);
        p.k_cache = pointer(k_cache);
        p.v_cache = pointer(v_cache);
        p.k_scale = pointer<float>(k_scale);
        p.v_scale = pointer<float>(v_scale);
        p.block_table = pointer<int32_t>(block_table);
        p.seq_lens = pointer<int32_t>(seq_lens);
        p.sinks = pointer<float>(sinks);
        p.out = pointer(out);
        p.lse = pointer<float>(lse);
        p.plan = pointer(plan);
        p.plan_bytes = plan_bytes;
        p.prefixes = pointer(prefixes);
        p.prefixes_bytes = prefixes_bytes;
        p.scratch = pointer(scratch);
        p.scratch_bytes = scratch_bytes;
        p.num_blocks = num_blocks;
        p.q_stride = q_stride;
        p.block_table_stride = block_table_stride;
        p.softmax_scale = softmax_scale;
        p.softcap = softcap;
        p.follows_write = follows_write;
        place(p, dtype, device, stream);
        check(config == nullptr ? qsun::paged_attention_decode(p) : qsun::paged_attention_decode(p, *config));
      },
      "config: a PagedAttentionDecodeConfig to run as told by the planned kernel, or None.",
      "config"_a.none(true), "q"_a, "k_cache"_a, "v_cache"_a, "k_scale"_a, "v_scale"_a, "block_table"_a,
      "seq_lens"_a, "sinks"_a, "out"_a, "lse"_a, "plan"_a, "plan_bytes"_a, "prefixes"_a, "prefixes_bytes"_a,
      "scratch"_a, "scratch_bytes"_a, "batch"_a, "q_len"_a, "num_q_heads"_a, "num_kv_heads"_a, "head_dim"_a,
      "num_blocks"_a, "block_size"_a, "max_blocks"_a, "q_stride"_a, "block_table_stride"_a, "window"_a,
      "softmax_scale"_a, "softcap"_a, "follows_write"_a, "dtype"_a, "kv_dtype"_a, "kv_scales"_a, "device"_a,
      "stream"_a);
}

// ---- write_kv_cache

void bind_write_kv_cache(py::module_& m) {
  printable<qsun::WriteKvCacheConfig>(m, "WriteKvCacheConfig", "How write_kv_cache is launched.")
      .def_readonly("copies", &qsun::WriteKvCacheConfig::copies)
      .def_readonly("is_wide", &qsun::WriteKvCacheConfig::is_wide)
      .def_readonly("lanes", &qsun::WriteKvCacheConfig::lanes)
      .def_readonly("overlaps_producer", &qsun::WriteKvCacheConfig::overlaps_producer);
  m.def(
      "choose_write_kv_cache",
      [](uintptr_t k, int64_t k_stride, int64_t num_q_heads, int64_t head_dim, bool rope, int kv_dtype,
         int dtype, const qsun::DeviceProps& props) {
        qsun::WriteKvCacheParams p;
        p.k = pointer(k);
        p.k_stride = k_stride;
        p.num_q_heads = num_q_heads;
        p.head_dim = head_dim;
        p.cos_sin = rope ? pointer<float>(k) : nullptr;
        p.kv_dtype = static_cast<qsun::DType>(kv_dtype);
        p.dtype = static_cast<qsun::DType>(dtype);
        return qsun::choose(p, props);
      },
      "The launch for k at an address, cos_sin there too where rope, all other tensors aligned.", "k"_a,
      "k_stride"_a, "num_q_heads"_a, "head_dim"_a, "rope"_a, "kv_dtype"_a, "dtype"_a, "props"_a);
  m.def(
      "write_kv_cache",
      [](uintptr_t k, uintptr_t v, uintptr_t q, uintptr_t q_out, uintptr_t k_cache, uintptr_t v_cache,
         uintptr_t k_scale, uintptr_t v_scale, uintptr_t slot_mapping, uintptr_t positions, uintptr_t cos_sin,
         uintptr_t q_norm, uintptr_t k_norm, float eps, bool rotate, int64_t num_tokens, int64_t num_q_heads,
         int64_t num_kv_heads, int64_t head_dim, int64_t num_blocks, int64_t block_size,
         int64_t max_positions, int64_t q_stride, int64_t k_stride, int64_t v_stride, int kv_dtype,
         int kv_scales, bool settled, int dtype, int device, uintptr_t stream) {
        qsun::WriteKvCacheParams p;
        p.k = pointer(k);
        p.v = pointer(v);
        p.q = pointer(q);
        p.q_out = pointer(q_out);
        p.k_cache = pointer(k_cache);
        p.v_cache = pointer(v_cache);
        p.k_scale = pointer<float>(k_scale);
        p.v_scale = pointer<float>(v_scale);
        p.slot_mapping = pointer<int64_t>(slot_mapping);
        p.positions = pointer<int64_t>(positions);
        p.cos_sin = pointer<float>(cos_sin);
        p.q_norm = pointer(q_norm);
        p.k_norm = pointer(k_norm);
        p.eps = eps;
        p.rotate = rotate;
        p.num_tokens = num_tokens;
        p.num_q_heads = num_q_heads;
        p.num_kv_heads = num_kv_heads;
        p.head_dim = head_dim;
        p.num_blocks = num_blocks;
        p.block_size = block_size;
        p.max_positions = max_positions;
        p.q_stride = q_stride;
        p.k_stride = k_stride;
        p.v_stride = v_stride;
        p.kv_dtype = static_cast<qsun::DType>(kv_dtype);
        p.kv_scales = static_cast<qsun::KvScales>(kv_scales);
        p.settled = settled;
        place(p, dtype, device, stream);
        check(qsun::write_kv_cache(p));
      },
      "k"_a, "v"_a, "q"_a, "q_out"_a, "k_cache"_a, "v_cache"_a, "k_scale"_a, "v_scale"_a, "slot_mapping"_a,
      "positions"_a, "cos_sin"_a, "q_norm"_a, "k_norm"_a, "eps"_a, "rotate"_a, "num_tokens"_a,
      "num_q_heads"_a, "num_kv_heads"_a, "head_dim"_a, "num_blocks"_a, "block_size"_a, "max_positions"_a,
      "q_stride"_a, "k_stride"_a, "v_stride"_a, "kv_dtype"_a, "kv_scales"_a, "settled"_a, "dtype"_a,
      "device"_a, "stream"_a);
}

// ---- the small operators of a decode step

void bind_fused(py::module_& m) {
  printable<qsun::RmsNormConfig>(m, "RmsNormConfig", "How rms_norm is launched.")
      .def_readonly("width", &qsun::RmsNormConfig::width)
      .def_readonly("threads", &qsun::RmsNormConfig::threads)
      .def_readonly("overlaps_producer", &qsun::RmsNormConfig::overlaps_producer);
  m.def(
      "choose_rms_norm",
      [](uintptr_t x, int64_t hidden_size, int64_t x_stride, int dtype, const qsun::DeviceProps& props) {
        qsun::RmsNormParams p;
        p.x = pointer(x);
        p.hidden_size = hidden_size;
        p.x_stride = x_stride;
        p.dtype = static_cast<qsun::DType>(dtype);
        return qsun::choose(p, props);
      },
      "x"_a, "hidden_size"_a, "x_stride"_a, "dtype"_a, "props"_a);
  m.def(
      "rms_norm",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out, uintptr_t residual_out,
         int64_t num_rows, int64_t hidden_size, int64_t x_stride, int64_t residual_stride, float eps,
         bool prefetch_weight, int dtype, int device, uintptr_t stream) {
        qsun::RmsNormParams p;
        p.x = pointer(x);
        p.residual = pointer(residual);
        p.weight = pointer(weight);
        p.out = pointer(out);
        p.residual_out = pointer(residual_out);
        p.num_rows = num_rows;
        p.hidden_size = hidden_size;
        p.x_stride = x_stride;
        p.residual_stride = residual_stride;
        p.eps = eps;
        p.prefetch_weight = prefetch_weight;
        place(p, dtype, device, stream);
        check(qsun::rms_norm(p));
      },
      "x"_a, "residual"_a, "weight"_a, "out"_a, "residual_out"_a, "num_rows"_a, "hidden_size"_a, "x_stride"_a,
      "residual_stride"_a, "eps"_a, "prefetch_weight"_a, "dtype"_a, "device"_a, "stream"_a);
  m.def(
      "silu_and_mul",
      [](uintptr_t x, uintptr_t out, int64_t num_rows, int64_t size, int64_t x_stride, int dtype, int device,
         uintptr_t stream) {
        qsun::SiluAndMulParams p;
        p.x = pointer(x);
        p.out = pointer(out);
        p.num_rows = num_rows;
        p.size = size;
        p.x_stride = x_stride;
        place(p, dtype, device, stream);
        check(qsun::silu_and_mul(p));
      },
      "x"_a, "out"_a, "num_rows"_a, "size"_a, "x_stride"_a, "dtype"_a, "device"_a, "stream"_a);
  m.def(
      "apply_rope",
      [](uintptr_t q, uintptr_t k, uintptr_t positions, uintptr_t cos_sin, uintptr_t q_out, uintptr_t k_out,
         int64_t num_tokens, int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, int64_t q_stride,
         int64_t k_stride, int64_t max_positions, int dtype, int device, uintptr_t stream) {
        qsun::ApplyRopeParams p;
        p.q = pointer(q);
        p.k = pointer(k);
        p.positions = pointer<int64_t>(positions);
        p.cos_sin = pointer<float>(cos_sin);
        p.q_out = pointer(q_out);
        p.k_out = pointer(k_out);
        p.num_tokens = num_tokens;
        p.num_q_heads = num_q_heads;
        p.num_kv_heads = num_kv_heads;
        p.head_dim = head_dim;
        p.q_stride = q_stride;
        p.k_stride = k_stride;
        p.max_positions = max_positions;
        place(p, dtype, device, stream);
        check(qsun::apply_rope(p));
      },
      "q"_a, "k"_a, "positions"_a, "cos_sin"_a, "q_out"_a, "k_out"_a, "num_tokens"_a, "num_q_heads"_a,
      "num_kv_heads"_a, "head_dim"_a, "q_stride"_a, "k_stride"_a, "max_positions"_a, "dtype"_a, "device"_a,
      "stream"_a);
}

// ---- sampling

void bind_sampling(py::module_& m) {
  printable<qsun::SampleTokensConfig>(m, "SampleTokensConfig", "How sample_tokens is launched.")
      .def_readonly("blocks", &qsun::SampleTokensConfig::blocks)
      .def_readonly("threads", &qsun::SampleTokensConfig::threads)
      .def_readonly("shared_bytes", &qsun::SampleTokensConfig::shared_bytes)
      .def_readonly("staged", &qsun::SampleTokensConfig::staged)
      .def_readonly("overlaps_producer", &qsun::SampleTokensConfig::overlaps_producer);
  m.def(
      "choose_sample_tokens",
      [](int64_t vocab_size, int dtype, const qsun::DeviceProps& device) {
        qsun::SampleTokensParams p;
        p.vocab_size = vocab_size;
        p.dtype = static_cast<qsun::DType>(dtype);
        return qsun::choose(p, device);
      },
      "vocab_size"_a, "dtype"_a, "device"_a);
  m.def(
      "sample_tokens",
      [](uintptr_t logits, uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p,
         uintptr_t keys, uintptr_t tokens, uintptr_t valid, int64_t num_rows, int64_t vocab_size,
         int64_t logits_stride, int dtype, int device, uintptr_t stream) {
        qsun::SampleTokensParams p;
        p.logits = pointer(logits);
        p.temperature = pointer<float>(temperature);
        p.top_k = pointer<int32_t>(top_k);
        p.top_p = pointer<float>(top_p);
        p.min_p = pointer<float>(min_p);
        p.keys = pointer<int64_t>(keys);
        p.tokens = pointer<int64_t>(tokens);
        p.valid = pointer<uint8_t>(valid);
        p.num_rows = num_rows;
        p.vocab_size = vocab_size;
        p.logits_stride = logits_stride;
        place(p, dtype, device, stream);
        check(qsun::sample_tokens(p));
      },
      "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "keys"_a, "tokens"_a, "valid"_a,
      "num_rows"_a, "vocab_size"_a, "logits_stride"_a, "dtype"_a, "device"_a, "stream"_a);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Binding of libqsun. Called by qsun_kernels.backends.cuda alone.";
  py::register_exception_translator(raise_status_error);
  bind_device(m);
  bind_wna16(m);
  bind_attention(m);
  bind_write_kv_cache(m);
  bind_fused(m);
  bind_sampling(m);
}
