#include "qsun/status.h"

#include <utility>

#include "qsun/types.h"

namespace qsun {

Status::Status(Code code, std::string op, std::string shapes, std::string error)
    : code_(code), op_(std::move(op)), shapes_(std::move(shapes)), error_(std::move(error)) {}

const char* to_string(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
  }
  return "unknown";
}

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
      return 2;
    case DType::kBFloat16:
      return 2;
  }
  return 0;
}

}  // namespace qsun
