// Memory that the kernel in front of a launch writes, by the word of a test.
//
// Kernels run one after another here, so what a producer writes is there long before its consumer begins, and
// a kernel that reads it too early would find it. guard_produced() names such memory: until a launch that
// overlaps its producer waits for it, the memory holds bytes of 0xff, and no asynchronous copy may be asked
// of it. wait_for_producers() then takes as long as it can: until no other thread of the cluster can go on.
// What the kernel writes there before it has waited is lost.
//
// Tests also ask whether a kernel let the next one start before it had itself waited.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emulator {

namespace {

constexpr int kFill = 0xff;

struct Guarded {
  unsigned char* memory;
  size_t bytes;
  std::vector<unsigned char> produced;  // kept while the memory is filled; else empty
};

std::vector<Guarded> guarded;
bool some_triggered_early;  // of the last launch

}  // namespace

void hide_produced(const Launch& launch) {
  if (!launch.overlaps_producer) return;
  for (Guarded& one : guarded) {
    one.produced.assign(one.memory, one.memory + one.bytes);
    std::memset(one.memory, kFill, one.bytes);
  }
}

void show_produced() {
  for (Guarded& one : guarded) {
    std::copy(one.produced.begin(), one.produced.end(), one.memory);
    one.produced.clear();
  }
}

bool hides_produced() {
  return std::any_of(guarded.begin(), guarded.end(),
                     [](const Guarded& one) { return !one.produced.empty(); });
}

void check_copy_source(const void* source, int bytes) {
  if (bytes == 0) return;  // nothing is read
  const auto* begin = static_cast<const unsigned char*>(source);
  for (const Guarded& one : guarded) {
    if (one.produced.empty() || begin + bytes <= one.memory || begin >= one.memory + one.bytes) continue;
    fail("a copy from memory that the producer writes, before wait_for_producers()");
  }
}

void begin_triggers() { some_triggered_early = false; }

void launch_dependents() { some_triggered_early |= !this_thread().waited_for_producers; }

}  // namespace emulator

#define FOR_TESTS extern "C" __attribute__((visibility("default")))

FOR_TESTS void guard_produced(void* memory, int64_t bytes) {
  emulator::guarded.push_back({static_cast<unsigned char*>(memory), static_cast<size_t>(bytes), {}});
}
FOR_TESTS void forget_produced() { emulator::guarded.clear(); }
// Whether a thread of the last launch called launch_dependents() before wait_for_producers().
FOR_TESTS int triggered_before_wait() { return emulator::some_triggered_early ? 1 : 0; }
