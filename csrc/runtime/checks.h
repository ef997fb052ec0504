#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "qsun/status.h"
#include "qsun/types.h"
#include "runtime/text.h"

namespace qsun {

// Collects the first broken precondition of a Params struct. Text is made only for a failure: when all hold,
// a check costs a comparison.
class Checks {
 public:
  Checks& require(bool holds, std::string_view name, std::string_view got, std::string_view expected) {
    if (!holds && error_.empty()) {
      error_.append(name).append(" is ").append(got).append("; expected ").append(expected);
    }
    return *this;
  }
  Checks& not_null(std::string_view name, const void* pointer) {
    return require(pointer != nullptr, name, "null", "a device pointer");
  }
  Checks& at_least(std::string_view name, int64_t value, int64_t minimum) {
    if (value >= minimum) return *this;
    return require(false, name, std::to_string(value), "at least " + std::to_string(minimum));
  }
  Checks& at_most(std::string_view name, int64_t value, int64_t maximum) {
    if (value <= maximum) return *this;
    return require(false, name, std::to_string(value), "at most " + std::to_string(maximum));
  }
  Checks& one_of(std::string_view name, int64_t value, std::initializer_list<int64_t> allowed) {
    for (int64_t candidate : allowed) {
      if (value == candidate) return *this;
    }
    Fields expected;
    for (int64_t candidate : allowed) expected.add("", candidate);
    return require(false, name, std::to_string(value), "one of " + expected.str());
  }
  Checks& multiple_of(std::string_view name, int64_t value, int64_t factor) {
    if (value % factor == 0) return *this;
    return require(false, name, std::to_string(value), "a multiple of " + std::to_string(factor));
  }
  Checks& aligned(std::string_view name, const void* pointer, uintptr_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0) return *this;
    return require(false, name, "misaligned", "an address divisible by " + std::to_string(bytes));
  }
  Checks& known(DType dtype) {
    if (size_of(dtype) != 0) return *this;
    return require(false, "dtype", std::to_string(static_cast<int>(dtype)),
                   "0 (float32), 1 (float16), 2 (bfloat16)");
  }

  bool ok() const { return error_.empty(); }

  template <typename Params>
  Status status(std::string_view op, const Params& params) const {
    if (ok()) return {};
    return {Status::Code::kInvalidArgument, std::string(op), to_string(params), error_};
  }

 private:
  std::string error_;
};

}  // namespace qsun
