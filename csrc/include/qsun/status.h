#pragma once

#include <string>

#include "qsun/export.h"

namespace qsun {

// How a call ended. A failure carries the operator, the sizes it was called with, and what went wrong, apart
// from each other so that a binding can raise its own kind of error from them.
class [[nodiscard]] QSUN_API Status {
 public:
  enum class Code {
    kOk,
    kInvalidArgument,  // the Params break a stated precondition: nothing was launched
    kCudaError,        // the CUDA runtime or driver refused
  };

  Status() = default;  // success
  Status(Code code, std::string op, std::string shapes, std::string error);

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& op() const { return op_; }          // for example "rms_norm"
  const std::string& shapes() const { return shapes_; }  // for example "num_rows=8 hidden_size=4096 float16"
  const std::string& error() const { return error_; }  // got and expected, or the CUDA error's name and text

 private:
  Code code_ = Code::kOk;
  std::string op_, shapes_, error_;
};

}  // namespace qsun
