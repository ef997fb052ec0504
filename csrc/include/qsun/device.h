#pragma once

#include <cstdint>
#include <string>

#include "qsun/status.h"

namespace qsun {

// The facts about a GPU that kernel choices depend on. Plain data: tests make their own.
struct DeviceProps {
  int compute_major = 0;
  int compute_minor = 0;
  int sm_count = 0;
  int shared_memory_per_block = 0;  // bytes, the opt-in maximum
  int64_t l2_bytes = 0;
};
QSUN_API std::string to_string(const DeviceProps& props);

// Properties of device `device`, remembered after the first call. Fails without a driver or such a device.
QSUN_API Status device_props(int device, DeviceProps* props);

// Versions as 1000 * major + 10 * minor. driver_version: the newest CUDA that the installed driver supports;
// 0 when there is no driver.
QSUN_API Status driver_version(int* version);

// How this library was built.
struct BuildInfo {
  std::string archs;          // comma-separated, for example "80,90a"
  std::string nvcc_version;   // for example "13.0.88"
  std::string host_compiler;  // for example "GNU 12.2.0"
  std::string revision;       // of the sources
  int runtime_version = 0;    // of the CUDA runtime linked in
};
QSUN_API BuildInfo build_info();

}  // namespace qsun
