// What the files here share. They bind the operators: integers in (addresses, sizes, strides, a dtype code,
// the device, the stream), nothing out. A Status that is not ok becomes
// qsun_kernels.errors.KernelLaunchError. Only this folder knows pybind11. Its headers are about half of what
// a file costs to compile, so files are few.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "qsun/status.h"
#include "qsun/types.h"

namespace qsun::bindings {

namespace py = pybind11;
using namespace pybind11::literals;

struct StatusError {
  Status status;
};

inline void check(Status status) {
  if (!status.ok()) throw StatusError{std::move(status)};
}

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What every Params ends with.
template <typename Params>
void place(Params& p, int dtype, int device, uintptr_t stream) {
  p.dtype = static_cast<DType>(dtype);
  p.device = device;
  p.stream = reinterpret_cast<Stream>(stream);
}

template <typename Config>
py::class_<Config> printable(py::module_& m, const char* name, const char* doc) {
  return py::class_<Config>(m, name, py::module_local(), doc).def("__repr__", [name](const Config& c) {
    return std::string(name) + "(" + to_string(c) + ")";
  });
}

// What the module calls, each in the file of its operators.
void bind_wna16(py::module_& m);
void bind_attention(py::module_& m);
void bind_write_kv_cache(py::module_& m);

}  // namespace qsun::bindings
