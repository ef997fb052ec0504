#pragma once

#include <cstdint>
#include <initializer_list>

namespace qsun {

// Whether every address or byte count of the list is divisible by 16, so that 16-byte loads may be used. Null
// pointers (absent arguments) are divisible by anything.
inline bool wide(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> byte_counts) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  for (int64_t bytes : byte_counts) {
    if (bytes % 16 != 0) return false;
  }
  return true;
}

}  // namespace qsun
