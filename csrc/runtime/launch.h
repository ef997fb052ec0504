#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "qsun/device.h"
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

// What a launch may need beyond its grid.
struct LaunchOptions {
  int shared_bytes = 0;            // of dynamic shared memory
  dim3 cluster = dim3(1, 1, 1);    // blocks of a cluster; more than one needs sm_90
  bool overlaps_producer = false;  // the kernel waits for the one before it by itself (dependent_launch.cuh)
};

// Allows `kernel` the whole shared memory of a block on `device`, at its first call for that pair.
cudaError_t allow_shared_memory(const void* kernel, int device);

// launch() with options. `device` is the current one.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_with(const LaunchOptions& options, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                        int device, Stream stream, Arguments&&... arguments) {
  const cudaError_t allowed = allow_shared_memory(reinterpret_cast<const void*>(kernel), device);
  if (allowed != cudaSuccess) return allowed;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(options.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (options.cluster.x * options.cluster.y * options.cluster.z > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = options.cluster.x;
    cluster.val.clusterDim.y = options.cluster.y;
    cluster.val.clusterDim.z = options.cluster.z;
  }
  if (options.overlaps_producer) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
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

// The properties of params.device; a failure to ask carries the operator's name and sizes.
template <typename Params>
Status props_of(std::string_view op, const Params& params, DeviceProps* props) {
  const Status status = device_props(params.device, props);
  return status.ok() ? status : Status(status.code(), std::string(op), to_string(params), status.error());
}

constexpr int64_t kMaxGridX = 2147483647;  // blocks in the first dimension of a grid
constexpr int64_t kMaxGridY = 65535;       // and in the other two

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace qsun
