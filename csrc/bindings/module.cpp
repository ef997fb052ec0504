// The Python module: facts about the build and the device, the small operators of a decode step, and what
// the other files bind.
#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>

#include "bindings/common.h"
#include "qsun/apply_rope.h"
#include "qsun/device.h"
#include "qsun/rms_norm.h"
#include "qsun/sample_tokens.h"
#include "qsun/silu_and_mul.h"

namespace qsun::bindings {
namespace {

// For questions about the machine, where nothing was to be launched.
void check_device(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.op() + "(" + status.shapes() + "): " + status.error());
}

void raise_status_error(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const StatusError& failed) {
    const Status& s = failed.status;
    // Imported when needed: the module must load before the package that holds it has finished loading.
    const py::object type = py::module_::import("qsun_kernels.errors").attr("KernelLaunchError");
    const py::object value = type(s.op(), s.shapes(), s.error());
    PyErr_SetObject(type.ptr(), value.ptr());
  }
}

// ---- facts about the build and the device

void bind_device(py::module_& m) {
  m.def(
      "build_info",
      [] {
        const BuildInfo info = build_info();
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
        check_device(driver_version(&version));
        return version;
      },
      "The newest CUDA that the driver supports, as 1000 major + 10 minor; 0 without a driver.");
  printable<DeviceProps>(m, "DeviceProps", "Facts about a GPU that kernel choices depend on.")
      .def(py::init([](int compute_major, int compute_minor, int sm_count, int shared_memory_per_block,
                       int64_t l2_bytes) {
             return DeviceProps{compute_major, compute_minor, sm_count, shared_memory_per_block, l2_bytes};
           }),
           py::kw_only(), "compute_major"_a, "compute_minor"_a, "sm_count"_a, "shared_memory_per_block"_a,
           "l2_bytes"_a)
      .def_readonly("compute_major", &DeviceProps::compute_major)
      .def_readonly("compute_minor", &DeviceProps::compute_minor)
      .def_readonly("sm_count", &DeviceProps::sm_count)
      .def_readonly("shared_memory_per_block", &DeviceProps::shared_memory_per_block)
      .def_readonly("l2_bytes", &DeviceProps::l2_bytes);
  m.def(
      "device_info",
      [](int device) {
        DeviceProps props;
        check_device(device_props(device, &props));
        return props;
      },
      "device"_a, "Properties of a device; RuntimeError without a driver or such a device.");
}

// ---- the small operators of a decode step

void bind_fused(py::module_& m) {
  printable<RmsNormConfig>(m, "RmsNormConfig", "How rms_norm is launched.")
      .def_readonly("width", &RmsNormConfig::width)
      .def_readonly("threads", &RmsNormConfig::threads)
      .def_readonly("overlaps_producer", &RmsNormConfig::overlaps_producer);
  m.def(
      "choose_rms_norm",
      [](uintptr_t x, int64_t hidden_size, int64_t x_stride, int dtype, const DeviceProps& props) {
        RmsNormParams p;
        p.x = pointer(x);
        p.hidden_size = hidden_size;
        p.x_stride = x_stride;
        p.dtype = static_cast<DType>(dtype);
        return choose(p, props);
      },
      "x"_a, "hidden_size"_a, "x_stride"_a, "dtype"_a, "props"_a);
  m.def(
      "rms_norm",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out, uintptr_t residual_out,
         int64_t num_rows, int64_t hidden_size, int64_t x_stride, int64_t residual_stride, float eps,
         bool prefetch_weight, int dtype, int device, uintptr_t stream) {
        RmsNormParams p;
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
        check(rms_norm(p));
      },
      "x"_a, "residual"_a, "weight"_a, "out"_a, "residual_out"_a, "num_rows"_a, "hidden_size"_a, "x_stride"_a,
      "residual_stride"_a, "eps"_a, "prefetch_weight"_a, "dtype"_a, "device"_a, "stream"_a);
  printable<SiluAndMulConfig>(m, "SiluAndMulConfig", "How silu_and_mul is launched.")
      .def_readonly("width", &SiluAndMulConfig::width)
      .def_readonly("blocks", &SiluAndMulConfig::blocks)
      .def_readonly("overlaps_producer", &SiluAndMulConfig::overlaps_producer);
  m.def(
      "choose_silu_and_mul",
      [](uintptr_t x, int64_t num_rows, int64_t size, int64_t x_stride, int dtype, const DeviceProps& props) {
        SiluAndMulParams p;
        p.x = pointer(x);
        p.num_rows = num_rows;
        p.size = size;
        p.x_stride = x_stride;
        p.dtype = static_cast<DType>(dtype);
        return choose(p, props);
      },
      "x"_a, "num_rows"_a, "size"_a, "x_stride"_a, "dtype"_a, "props"_a);
  m.def(
      "silu_and_mul",
      [](uintptr_t x, uintptr_t out, int64_t num_rows, int64_t size, int64_t x_stride, int dtype, int device,
         uintptr_t stream) {
        SiluAndMulParams p;
        p.x = pointer(x);
        p.out = pointer(out);
        p.num_rows = num_rows;
        p.size = size;
        p.x_stride = x_stride;
        place(p, dtype, device, stream);
        check(silu_and_mul(p));
      },
      "x"_a, "out"_a, "num_rows"_a, "size"_a, "x_stride"_a, "dtype"_a, "device"_a, "stream"_a);
  printable<ApplyRopeConfig>(m, "ApplyRopeConfig", "How apply_rope is launched.")
      .def_readonly("width", &ApplyRopeConfig::width)
      .def_readonly("blocks", &ApplyRopeConfig::blocks)
      .def_readonly("overlaps_producer", &ApplyRopeConfig::overlaps_producer);
  m.def(
      "choose_apply_rope",
      [](uintptr_t q, int64_t num_tokens, int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim,
         int64_t q_stride, int64_t k_stride, int dtype, const DeviceProps& props) {
        ApplyRopeParams p;
        p.q = pointer(q);
        p.num_tokens = num_tokens;
        p.num_q_heads = num_q_heads;
        p.num_kv_heads = num_kv_heads;
        p.head_dim = head_dim;
        p.q_stride = q_stride;
        p.k_stride = k_stride;
        p.dtype = static_cast<DType>(dtype);
        return choose(p, props);
      },
      "q"_a, "num_tokens"_a, "num_q_heads"_a, "num_kv_heads"_a, "head_dim"_a, "q_stride"_a, "k_stride"_a,
      "dtype"_a, "props"_a);
  m.def(
      "apply_rope",
      [](uintptr_t q, uintptr_t k, uintptr_t positions, uintptr_t cos_sin, uintptr_t q_out, uintptr_t k_out,
         int64_t num_tokens, int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, int64_t q_stride,
         int64_t k_stride, int64_t max_positions, int dtype, int device, uintptr_t stream) {
        ApplyRopeParams p;
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
        check(apply_rope(p));
      },
      "q"_a, "k"_a, "positions"_a, "cos_sin"_a, "q_out"_a, "k_out"_a, "num_tokens"_a, "num_q_heads"_a,
      "num_kv_heads"_a, "head_dim"_a, "q_stride"_a, "k_stride"_a, "max_positions"_a, "dtype"_a, "device"_a,
      "stream"_a);
}

void bind_sampling(py::module_& m) {
  printable<SampleTokensConfig>(m, "SampleTokensConfig", "How sample_tokens is launched.")
      .def_readonly("blocks", &SampleTokensConfig::blocks)
      .def_readonly("threads", &SampleTokensConfig::threads)
      .def_readonly("shared_bytes", &SampleTokensConfig::shared_bytes)
      .def_readonly("staged", &SampleTokensConfig::staged)
      .def_readonly("overlaps_producer", &SampleTokensConfig::overlaps_producer);
  m.def(
      "choose_sample_tokens",
      [](int64_t vocab_size, int dtype, const DeviceProps& device) {
        SampleTokensParams p;
        p.vocab_size = vocab_size;
        p.dtype = static_cast<DType>(dtype);
        return choose(p, device);
      },
      "vocab_size"_a, "dtype"_a, "device"_a);
  m.def(
      "sample_tokens",
      [](uintptr_t logits, uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p,
         uintptr_t keys, uintptr_t tokens, uintptr_t valid, int64_t num_rows, int64_t vocab_size,
         int64_t logits_stride, int dtype, int device, uintptr_t stream) {
        SampleTokensParams p;
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
        check(sample_tokens(p));
      },
      "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "keys"_a, "tokens"_a, "valid"_a,
      "num_rows"_a, "vocab_size"_a, "logits_stride"_a, "dtype"_a, "device"_a, "stream"_a);
}

}  // namespace
}  // namespace qsun::bindings

PYBIND11_MODULE(_C, m) {
  using namespace qsun::bindings;
  m.doc() = "Binding of libqsun. Called by qsun_kernels.backends.cuda alone.";
  py::register_exception_translator(raise_status_error);
  bind_device(m);
  bind_wna16(m);
  bind_attention(m);
  bind_write_kv_cache(m);
  bind_fused(m);
  bind_sampling(m);
}
