#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <string>

#include "qsun/device.h"
#include "runtime/error.h"
#include "runtime/text.h"

namespace qsun {

std::string to_string(const DeviceProps& p) {
  return Fields()
      .add("compute_capability", std::to_string(p.compute_major) + "." + std::to_string(p.compute_minor))
      .add("sm_count", p.sm_count)
      .add("shared_memory_per_block", p.shared_memory_per_block)
      .add("l2_bytes", p.l2_bytes)
      .str();
}

namespace {

// cudaGetDeviceProperties would take milliseconds; these attributes take microseconds, once a device.
cudaError_t query(int device, DeviceProps* props) {
  int l2_bytes = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {
      {cudaDevAttrComputeCapabilityMajor, &props->compute_major},
      {cudaDevAttrComputeCapabilityMinor, &props->compute_minor},
      {cudaDevAttrMultiProcessorCount, &props->sm_count},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &props->shared_memory_per_block},
      {cudaDevAttrL2CacheSize, &l2_bytes},
  };
  for (const auto& one : wanted) {
    if (cudaError_t error = cudaDeviceGetAttribute(one.value, one.attribute, device); error != cudaSuccess) {
      return error;
    }
  }
  props->l2_bytes = l2_bytes;
  return cudaSuccess;
}

}  // namespace

Status device_props(int device, DeviceProps* props) {
  static std::mutex mutex;
  static std::map<int, DeviceProps> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(device); found != known.end()) {
    *props = found->second;
    return {};
  }
  DeviceProps asked;
  if (cudaError_t error = query(device, &asked); error != cudaSuccess) {
    return cuda_status(error, "device_props", "device=" + std::to_string(device));
  }
  *props = known[device] = asked;
  return {};
}

Status driver_version(int* version) {
  return cuda_status(cudaDriverGetVersion(version), "driver_version", "no arguments");
}

}  // namespace qsun
