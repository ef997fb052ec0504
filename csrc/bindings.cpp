// The Python face of libqsun: integers in (addresses, sizes, strides, a dtype code, the device, the stream),
// nothing out. A Status that is not ok becomes qsun_kernels.errors.KernelLaunchError. The only file that
// knows pybind11.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "qsun/device.h"
#include "qsun/rms_norm.h"
#include "qsun/types.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

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

const void* in(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* out(uintptr_t address) { return reinterpret_cast<void*>(address); }
qsun::Stream as_stream(uintptr_t stream) { return reinterpret_cast<qsun::Stream>(stream); }

template <typename Config>
py::class_<Config> printable(py::module_& m, const char* name, const char* doc) {
  return py::class_<Config>(m, name, doc).def("__repr__", [name](const Config& c) {
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

// ---- rms_norm

qsun::RmsNormParams rms_norm_params(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out_,
                                    uintptr_t residual_out, int64_t num_rows, int64_t hidden_size,
                                    int64_t x_stride, int64_t residual_stride, float eps, int dtype,
                                    int device, uintptr_t stream) {
  qsun::RmsNormParams p;
  p.x = in(x);
  p.residual = in(residual);
  p.weight = in(weight);
  p.out = out(out_);
  p.residual_out = out(residual_out);
  p.num_rows = num_rows;
  p.hidden_size = hidden_size;
  p.x_stride = x_stride;
  p.residual_stride = residual_stride;
  p.eps = eps;
  p.dtype = static_cast<qsun::DType>(dtype);
  p.device = device;
  p.stream = as_stream(stream);
  return p;
}

void bind_rms_norm(py::module_& m) {
  printable<qsun::RmsNormConfig>(m, "RmsNormConfig", "How rms_norm is launched.")
      .def_readonly("width", &qsun::RmsNormConfig::width)
      .def_readonly("threads", &qsun::RmsNormConfig::threads);
  m.def(
      "rms_norm",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out_, uintptr_t residual_out,
         int64_t num_rows, int64_t hidden_size, int64_t x_stride, int64_t residual_stride, float eps,
         int dtype, int device, uintptr_t stream) {
        check(qsun::rms_norm(rms_norm_params(x, residual, weight, out_, residual_out, num_rows, hidden_size,
                                             x_stride, residual_stride, eps, dtype, device, stream)));
      },
      "x"_a, "residual"_a, "weight"_a, "out"_a, "residual_out"_a, "num_rows"_a, "hidden_size"_a, "x_stride"_a,
      "residual_stride"_a, "eps"_a, "dtype"_a, "device"_a, "stream"_a);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Binding of libqsun. Called by qsun_kernels.backends.cuda alone.";
  py::register_exception_translator(raise_status_error);
  bind_device(m);
  bind_rms_norm(m);
}
