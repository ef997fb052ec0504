// See csrc/device/async_copy.cuh.
#pragma once

#include <cstdint>

#include "device/shared.cuh"

namespace qsun {

inline uint64_t evict_first_policy() { return 0; }

inline void copy_async_streamed(uint32_t shared, const void* global, uint64_t) {
  emulator::copy_async(shared, global, 16);
}

inline void copy_async_streamed_or_zero(uint32_t shared, const void* global, int bytes, uint64_t) {
  emulator::copy_async(shared, global, bytes);
}

constexpr int kSectorBytes = 32;
inline void prefetch_to_l2(const void*) {}

inline void copy_async(uint32_t shared, const void* global) { emulator::copy_async(shared, global, 16); }

inline void copy_async_or_zero(uint32_t shared, const void* global, int bytes) {
  emulator::copy_async(shared, global, bytes);
}

inline void commit_async_copies() { emulator::commit_async_copies(); }

template <int kPending>
inline void wait_async_copies() {
  static_assert(kPending >= 0);
  emulator::wait_async_copies(kPending);
}

}  // namespace qsun
