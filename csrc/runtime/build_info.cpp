#include <cuda_runtime_api.h>

#include "qsun/device.h"

namespace qsun {

// The macros come from CMake and reach this file alone, so that a new revision recompiles nothing else.
BuildInfo build_info() {
  return {QSUN_CUDA_ARCHS, QSUN_NVCC_VERSION, QSUN_HOST_COMPILER, QSUN_REVISION, CUDART_VERSION};
}

}  // namespace qsun
