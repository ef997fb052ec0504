// Barriers in shared memory that count arrivals and bytes, and the copies that bring the bytes
// (device/bulk_copy.cuh).
//
// Early copies (QSUN_EMULATOR_COPIES, see memory.cpp) take place where they are issued. Late ones take place
// when no thread of the cluster could go on without them, and then those of one phase that a thread waits
// for.
//
// The state of a barrier is kept here; its place in shared memory holds a mark, by which other writes to it
// are noticed.
#include <algorithm>
#include <deque>
#include <map>

#include "machine.h"

namespace emulator {

namespace {

constexpr int kBarrierBytes = 8;
constexpr int kMaxCount = (1 << 20) - 1;         // of arrivals and of bytes under way (PTX ISA, "mbarrier")
constexpr uint64_t kMark = 0xfdfdfdfdfdfdfdfdu;  // as halves: not a number, or huge

struct BulkCopy {
  unsigned char* target;
  const unsigned char* source;
  int bytes;
};

struct Barrier {
  const unsigned char* place;
  int arrivals;           // that a phase takes
  int pending;            // of them, in the phase under way
  int64_t bytes = 0;      // announced and not arrived in it; negative: arrived and not announced
  int phases = 0;         // that have ended
  int waited_phases = 0;  // up to the last whose end a thread has waited for
  int filled_phases = 0;  // up to the last in which bytes arrived
  const Thread* maker;
  int maker_warp;
  int made_after;  // block and cluster barriers of its maker
  bool published = false;
  std::deque<BulkCopy> copies;  // under way, in order

  bool has_ended(uint32_t parity) const { return static_cast<uint32_t>(phases % 2) != parity; }
};

std::map<uint32_t, Barrier> barriers[kMaxClusterBlocks];  // of the blocks of a cluster, by address
bool can_copy_bulk;

std::string barrier_name(int block, uint32_t address) {
  return "the barrier at " + place_name(address) + " of block " + std::to_string(block);
}

[[noreturn]] void fail_at(uint32_t address, const char* what) {
  static std::string message;  // the stack of a thread that fails is not unwound
  message = barrier_name(this_thread().block, address) + " " + what;
  fail(message.c_str());
}

void check_capability() {
  if (!can_copy_bulk) fail("bulk copies and their barriers need sm_90");
}

int barriers_passed(const Thread& thread) { return thread.barriers + thread.cluster_barriers; }

bool is_overwritten(const Barrier& barrier) { return std::memcmp(barrier.place, &kMark, kBarrierBytes) != 0; }

// The barrier at an address of the running thread's block, which the thread may use.
Barrier& barrier_at(uint32_t address) {
  check_capability();
  at_address(address, kBarrierBytes);
  const Thread& thread = this_thread();
  const auto found = barriers[thread.block].find(address);
  if (found == barriers[thread.block].end()) fail_at(address, "is not initialised");
  Barrier& barrier = found->second;
  if (is_overwritten(barrier)) fail_at(address, "was overwritten");
  if (thread.warp != barrier.maker_warp && barriers_passed(thread) <= barrier.made_after) {
    fail_at(address, "is used by another warp with no barrier of the block since it was initialised");
  }
  return barrier;
}

void end_phase_when_complete(int block, uint32_t address, Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phases;
  barrier.pending = barrier.arrivals;
  wake_waiters(block, address);
}

void bring_next(int block, uint32_t address, Barrier& barrier) {
  const BulkCopy copy = barrier.copies.front();
  barrier.copies.pop_front();
  std::memcpy(copy.target, copy.source, copy.bytes);
  barrier.bytes -= copy.bytes;
  barrier.filled_phases = barrier.phases + 1;
  end_phase_when_complete(block, address, barrier);
}

// What is wrong with a barrier whose block has ended; null: nothing.
const char* left_wrong(const Barrier& barrier) {
  if (is_overwritten(barrier)) return "was overwritten";
  if (!barrier.copies.empty()) return "has bulk copies that were not finished when the block ended";
  if (barrier.bytes < 0) return "took bytes that no thread had announced";
  if (barrier.bytes > 0) return "was announced bytes that no copy brought";
  if (barrier.filled_phases > barrier.waited_phases) {
    return "ended a phase of bulk copies for which no thread waited";  // the block could end before them
  }
  return nullptr;
}

}  // namespace

void prepare_barriers(const Launch& launch) {
  for (auto& of_block : barriers) of_block.clear();
  can_copy_bulk = launch.capability >= 9;
}

void end_barriers(int block) {
  for (const auto& [address, barrier] : barriers[block]) {
    const char* wrong = left_wrong(barrier);
    if (wrong != nullptr) fail_launch((barrier_name(block, address) + " " + wrong).c_str());
  }
}

bool bring_copies(int block, uint32_t address) {
  Barrier& barrier = barriers[block].at(address);
  if (barrier.pending > 0 || barrier.copies.empty()) return false;
  const int phase = barrier.phases;
  while (barrier.phases == phase && !barrier.copies.empty()) bring_next(block, address, barrier);
  return true;
}

std::string lacking(int block, uint32_t address) {
  const Barrier& barrier = barriers[block].at(address);
  std::string text = barrier_name(block, address) + " lacks " + std::to_string(barrier.pending) + " of " +
                     std::to_string(barrier.arrivals) + " arrivals";
  if (barrier.bytes > 0) text += " and " + std::to_string(barrier.bytes) + " bytes";
  if (barrier.bytes < 0) text += " and took " + std::to_string(-barrier.bytes) + " bytes not announced";
  return text + " in phase " + std::to_string(barrier.phases);
}

void init_barrier(uint32_t address, int arrivals) {
  check_capability();
  unsigned char* place = at_address(address, kBarrierBytes);
  const Thread& thread = this_thread();
  if (arrivals < 1 || arrivals > kMaxCount) fail_at(address, "is initialised for a wrong number of arrivals");
  if (barriers[thread.block].count(address) != 0) fail_at(address, "is initialised twice");
  std::memcpy(place, &kMark, kBarrierBytes);
  Barrier& barrier = barriers[thread.block][address];
  barrier.place = place;
  barrier.arrivals = barrier.pending = arrivals;
  barrier.maker = &thread;
  barrier.maker_warp = thread.warp;
  barrier.made_after = barriers_passed(thread);
}

void publish_barriers() {
  check_capability();
  const Thread& thread = this_thread();
  for (auto& [address, barrier] : barriers[thread.block]) {
    if (barrier.maker == &thread) barrier.published = true;
  }
}

void arrive(uint32_t address, int bytes) {
  Barrier& barrier = barrier_at(address);
  if (bytes < 0) fail_at(address, "is announced less than 0 bytes");
  if (barrier.pending == 0) fail_at(address, "has an arrival more than a phase takes");
  barrier.bytes += bytes;
  if (barrier.bytes > kMaxCount) fail_at(address, "is announced more bytes than it can count");
  --barrier.pending;
  end_phase_when_complete(this_thread().block, address, barrier);
}

void wait_for_phase(uint32_t address, uint32_t parity) {
  Barrier& barrier = barrier_at(address);
  if (parity > 1) fail_at(address, "is waited for with a parity that is neither 0 nor 1");
  if (!barrier.has_ended(parity)) {
    this_thread().awaited_barrier = address;
    wait(State::kAtPhase);
    if (!barrier.has_ended(parity)) {
      fail_at(address, "ended a second phase before a thread that waited for the first could see its end");
    }
  }
  barrier.waited_phases = std::max(barrier.waited_phases, barrier.phases);
}

void copy_bulk(uint32_t shared, const void* global, int bytes, uint32_t address) {
  Barrier& barrier = barrier_at(address);
  if (!barrier.published) fail_at(address, "takes a bulk copy without publish_barriers()");
  if (bytes <= 0 || bytes % 16 != 0) fail("a bulk copy of a size that is no positive multiple of 16");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("a bulk copy from a misaligned address");
  check_copy_source(global, bytes);
  unsigned char* target = at_address(shared, bytes, 16);
  barrier.copies.push_back({target, static_cast<const unsigned char*>(global), bytes});
  if (!copies_are_early()) return;
  bring_next(this_thread().block, address, barrier);
  if (barrier.bytes < -kMaxCount) fail_at(address, "took more bytes than it can count");
}

}  // namespace emulator
