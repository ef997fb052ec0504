// The runtime's functions. Device 0 is a GPU of the compute capability that QSUN_EMULATOR_CAPABILITY says
// (9.0, the default, or 8.0); device 1 is one of 8.0.
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "machine.h"

namespace emulator {

namespace {

constexpr int kDevices = 2;
constexpr size_t kSharedBytes = 48 * 1024;  // of a kernel that did not ask for more

struct Kernel {
  size_t shared_bytes = kSharedBytes;
  bool any_cluster = false;  // of more than 8 blocks
};

std::map<std::pair<const void*, int>, Kernel> kernels;  // and devices that attributes were set for
int current_device = 0;
std::string error_text;

int capability_major(int device) {
  const char* setting = device == 0 ? std::getenv("QSUN_EMULATOR_CAPABILITY") : "8.0";
  const std::string capability = setting == nullptr ? "9.0" : setting;
  if (capability != "8.0" && capability != "9.0") {
    throw std::invalid_argument("QSUN_EMULATOR_CAPABILITY is " + capability + "; expected 8.0 or 9.0");
  }
  return capability == "8.0" ? 8 : 9;
}

int most_shared_bytes(int device) { return capability_major(device) == 8 ? 163 * 1024 : 227 * 1024; }

cudaError_t read_attributes(const cudaLaunchConfig_t& config, Launch* launch) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (capability_major(current_device) < 9) {
      return refused(cudaErrorNotSupported, "launch attributes for clusters and overlap need sm_90");
    }
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& cluster = attribute.val.clusterDim;
      launch->cluster = dim3(cluster.x, cluster.y, cluster.z);
    } else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      launch->overlaps_producer = attribute.val.programmaticStreamSerializationAllowed != 0;
    } else {
      return refused(cudaErrorNotSupported, "a launch attribute that the emulator does not know");
    }
  }
  return cudaSuccess;
}

cudaError_t check(const Launch& launch, size_t shared_bytes, const Kernel& kernel) {
  const dim3 grid = launch.grid, block = launch.block, cluster = launch.cluster;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || threads > 1024 || grid.x > 2147483647u ||
      grid.y > 65535 || grid.z > 65535) {
    return refused(cudaErrorInvalidConfiguration, "invalid grid or block");
  }
  if (shared_bytes > kernel.shared_bytes) {
    return refused(cudaErrorInvalidValue, std::to_string(shared_bytes) +
                                              " bytes of dynamic shared memory; the kernel is allowed " +
                                              std::to_string(kernel.shared_bytes));
  }
  const uint64_t blocks = uint64_t{cluster.x} * cluster.y * cluster.z;
  if (blocks == 0 || blocks > (kernel.any_cluster ? kMaxClusterBlocks : 8)) {
    return refused(cudaErrorInvalidClusterSize, "a cluster of " + std::to_string(blocks) + " blocks");
  }
  if (grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0) {
    return refused(cudaErrorInvalidClusterSize, "the grid is not a whole number of clusters");
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t refused(cudaError_t error, const std::string& why) {
  error_text = why;
  return error;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& call) {
  Launch launch;
  launch.grid = config.gridDim;
  launch.block = config.blockDim;
  launch.capability = capability_major(current_device);
  launch.call = &call;
  const auto known = kernels.find({kernel, current_device});
  if (cudaError_t error = read_attributes(config, &launch); error != cudaSuccess) return error;
  const Kernel limits = known == kernels.end() ? Kernel() : known->second;
  if (cudaError_t error = check(launch, config.dynamicSmemBytes, limits); error != cudaSuccess) return error;
  launch.shared_bytes = static_cast<int>(config.dynamicSmemBytes);
  error_text = run(launch);
  return error_text.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulator

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = emulator::current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulator::kDevices) return cudaErrorInvalidDevice;
  emulator::current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "emulator"; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "the emulator has devices 0 and 1 only"
                                         : emulator::error_text.c_str();
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};  // static shared memory is not counted
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > emulator::most_shared_bytes(emulator::current_device)) {
        return emulator::refused(cudaErrorInvalidValue, "more shared memory than a block can have");
      }
      emulator::kernels[{kernel, emulator::current_device}].shared_bytes = static_cast<size_t>(value);
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      emulator::kernels[{kernel, emulator::current_device}].any_cluster = value != 0;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return cudaSuccess;
    default:
      return emulator::refused(cudaErrorInvalidValue, "a function attribute that the emulator does not know");
  }
}

// A GPU of four multiprocessors: small problems then fill it, and take the paths that large ones take on a
// large GPU.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= emulator::kDevices) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulator::capability_major(device);
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::most_shared_bytes(device);
      break;
    case cudaDevAttrL2CacheSize:
      *value = 1 << 20;
      break;
    default:
      return emulator::refused(cudaErrorInvalidValue, "a device attribute that the emulator does not know");
  }
  return cudaSuccess;
}

}  // extern "C"
