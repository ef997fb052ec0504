// See csrc/device/bulk_copy.cuh. What is missing here is not emulated: tensor maps, and barriers and copies
// of other blocks.
#pragma once

#include <cstdint>

#include "device/shared.cuh"

#define QSUN_HAS_COPY_ENGINE 1

namespace qsun {

// Emulated copies are made when they are asked for, or when they are waited for: either way after what the
// thread has written before.
inline void order_before_copies() {}

inline void init_barrier(uint32_t barrier, int arrivals) { emulator::init_barrier(barrier, arrivals); }

inline void publish_barriers() { emulator::publish_barriers(); }

inline void arrive_expecting(uint32_t barrier, int bytes) { emulator::arrive(barrier, bytes); }

inline void arrive(uint32_t barrier) { emulator::arrive(barrier, 0); }

inline void wait_for_phase(uint32_t barrier, uint32_t parity) { emulator::wait_for_phase(barrier, parity); }

// Waits to the end, where a GPU's may give up after a while: a thread that would do other work meanwhile, and
// whose phase needs that work, is reported as waiting for ever.
inline bool phase_has_ended(uint32_t barrier, uint32_t parity) {
  emulator::wait_for_phase(barrier, parity);
  return true;
}

inline void copy_bulk(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  emulator::copy_bulk(shared, global, bytes, barrier);
}

inline void copy_bulk_streamed(uint32_t shared, const void* global, int bytes, uint32_t barrier, uint64_t) {
  emulator::copy_bulk(shared, global, bytes, barrier);
}

}  // namespace qsun
