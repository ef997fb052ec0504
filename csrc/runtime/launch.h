#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string_view>
#include <utility>

#include "qsun/status.h"
#include "qsun/types.h"
#include "runtime/error.h"

namespace qsun {

// Makes `device` current for a scope: a stream takes launches only while its own device is current.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device_) error_ = cudaSetDevice(device_);
  }
  ~DeviceGuard() {
    if (error_ == cudaSuccess && previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int device_;
  int previous_ = 0;
  cudaError_t error_;
};

// Launches kernel<<<grid, block, 0, stream>>>(arguments...).
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream stream,
                   Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  const cudaError_t recorded = cudaGetLastError();
  return error != cudaSuccess ? error : recorded;
}

// Runs `launches` (a function without arguments that returns cudaError_t) with params.device current.
template <typename Params, typename Launches>
Status run_on_device(std::string_view op, const Params& params, Launches&& launches) {
  const DeviceGuard guard(params.device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) error = launches();
  if (error == cudaSuccess) return {};
  return cuda_status(error, std::string(op), to_string(params));
}

constexpr int64_t kMaxGridX = 2147483647;  // blocks in the first dimension of a grid
constexpr int64_t kMaxGridY = 65535;       // and in the other two

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace qsun
