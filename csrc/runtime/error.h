#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <utility>

#include "qsun/status.h"

namespace qsun {

// `error` as a Status. An error is also taken off the runtime's own record, where it would be reported again
// by whichever call looks next.
inline Status cuda_status(cudaError_t error, std::string op, std::string shapes) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return {Status::Code::kCudaError, std::move(op), std::move(shapes),
          std::string(cudaGetErrorName(error)) + " (" + std::to_string(static_cast<int>(error)) +
              "): " + cudaGetErrorString(error)};
}

}  // namespace qsun
