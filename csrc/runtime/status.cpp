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
    case DType::kFloat8E4M3:
      return "float8_e4m3";
    case DType::kInt8:
      return "int8";
    case DType::kInt4:
      return "int4";
  }
  return "unknown";
}

const char* to_string(KvScales scales) {
  switch (scales) {
    case KvScales::kNone:
      return "none";
    case KvScales::kTensor:
      return "tensor";
    case KvScales::kToken:
      return "token";
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
    case DType::kFloat8E4M3:
    case DType::kInt8:
    case DType::kInt4:
      return 0;
  }
  return 0;
}

}  // namespace qsun
