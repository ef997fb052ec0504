// Shared memory of the blocks of a cluster, and asynchronous copies into it.
//
// Blocks find it filled with bytes of 0xff, which are not a number in every floating-point type and a large
// index in every integer type, and leave it so. Around dynamic shared memory lie guards that no one may
// write. Static shared variables exist once, so a cluster of several blocks may not use them.
//
// QSUN_EMULATOR_COPIES says when an asynchronous copy takes place: late (default), when the thread waits for
// it, which shows missing waits; or early, at once, which shows a target that is still in use. A kernel that
// is right gives the same bits for both.
#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "machine.h"

extern "C" char __start_qsun_shared[];
extern "C" char __stop_qsun_shared[];

namespace emulator {

namespace {

constexpr int kMaxBytes = 227 * 1024;
constexpr int kGuardBytes = 4096;  // before and after dynamic shared memory
constexpr int kAlignment = 1024;
constexpr char kFill = static_cast<char>(0xff);
constexpr unsigned char kGuard = 0xfe;  // as halves and floats: not a number, or huge
// Addresses of shared memory as instructions take them. 0 is none of them.
constexpr uint32_t kDynamicAddress = 1024;
constexpr uint32_t kStaticAddress = 1u << 24;

struct alignas(kAlignment) Memory {
  unsigned char before[kGuardBytes];
  unsigned char bytes[kMaxBytes + kGuardBytes];
};

__attribute__((used)) __shared__ char at_least_one_variable[1];  // else the section might not exist

std::unique_ptr<Memory[]> memories;  // of the blocks of a cluster
int num_blocks, num_bytes;
bool clean = false;                  // the static variables are filled with kFill
int last_use_of[kMaxClusterBlocks];  // cluster barriers that the last one to use it from another block had
                                     // passed; -1: none
int barriers_passed_by[kMaxClusterBlocks];  // at most, by threads that have ended
bool copies_early;

bool is_static(const void* pointer) {
  const auto* p = static_cast<const char*>(pointer);
  return p >= __start_qsun_shared && p < __stop_qsun_shared;
}

bool is_static_address(uint32_t address) { return address >= kStaticAddress && address < 2 * kStaticAddress; }

void perform(Copy& copy) {
  if (copy.source == nullptr) return;
  std::memcpy(copy.target, copy.source, copy.bytes);
  std::memset(copy.target + copy.bytes, 0, 16 - copy.bytes);
  copy.source = nullptr;
}

}  // namespace

void prepare_memory(int blocks, int bytes) {
  if (memories == nullptr) memories.reset(new Memory[kMaxClusterBlocks]);
  num_blocks = blocks, num_bytes = bytes;
  for (int i = 0; i < blocks; ++i) {
    Memory& memory = memories[i];
    std::memset(memory.before, kGuard, kGuardBytes);
    std::memset(memory.bytes, kFill, bytes);
    std::memset(memory.bytes + bytes, kGuard, kGuardBytes);
    last_use_of[i] = -1, barriers_passed_by[i] = 0;
  }
  if (!clean) std::fill(__start_qsun_shared, __stop_qsun_shared, kFill);
  clean = false;
  const char* setting = std::getenv("QSUN_EMULATOR_COPIES");
  copies_early = setting != nullptr && std::string_view(setting) == "early";
}

void end_block(int block) {
  Memory& memory = memories[block];
  const auto untouched = [](const unsigned char* begin) {
    return std::all_of(begin, begin + kGuardBytes, [](unsigned char byte) { return byte == kGuard; });
  };
  if (!untouched(memory.before)) fail_launch("a block wrote before its dynamic shared memory");
  if (!untouched(memory.bytes + num_bytes)) fail_launch("a block wrote past its dynamic shared memory");
  std::memset(memory.bytes, kFill, num_bytes);
}

void end_cluster() {
  if (num_blocks == 1) return;
  for (int i = 0; i < num_blocks; ++i) {
    if (last_use_of[i] >= barriers_passed_by[i]) {
      fail_launch(
          "a block used the shared memory of another that could have ended: no cluster barrier follows");
    }
  }
  clean = std::all_of(__start_qsun_shared, __stop_qsun_shared, [](char byte) { return byte == kFill; });
  if (!clean) fail_launch("a kernel launched in clusters wrote a static __shared__ variable: not emulated");
}

void end_thread_copies() {
  Thread& thread = this_thread();
  if (!thread.copies.empty()) fail("a thread ended before it waited for its asynchronous copies");
  barriers_passed_by[thread.block] = std::max(barriers_passed_by[thread.block], thread.cluster_barriers);
}

bool copies_are_early() { return copies_early; }

unsigned char* dynamic_shared() { return memories[this_thread().block].bytes; }

uint32_t shared_address(const void* shared) {
  if (is_static(shared)) {
    return kStaticAddress + static_cast<uint32_t>(static_cast<const char*>(shared) - __start_qsun_shared);
  }
  const ptrdiff_t offset = static_cast<const unsigned char*>(shared) - dynamic_shared();
  if (offset < 0 || offset > num_bytes) fail("shared_address() of what is not the block's shared memory");
  return kDynamicAddress + static_cast<uint32_t>(offset);
}

unsigned char* at_address(uint32_t address, int bytes) { return at_address(address, bytes, bytes); }

unsigned char* at_address(uint32_t address, int bytes, int alignment) {
  if (address % static_cast<uint32_t>(alignment) != 0) fail("a misaligned address of shared memory");
  const bool is_static = is_static_address(address);
  const int64_t offset = int64_t{address} - (is_static ? kStaticAddress : kDynamicAddress);
  const int64_t size = is_static ? __stop_qsun_shared - __start_qsun_shared : num_bytes;
  if (offset < 0 || offset + bytes > size) fail("an address outside the block's shared memory");
  return (is_static ? reinterpret_cast<unsigned char*>(__start_qsun_shared) : dynamic_shared()) + offset;
}

std::string place_name(uint32_t address) {
  const bool is_static = is_static_address(address);
  return "byte " + std::to_string(address - (is_static ? kStaticAddress : kDynamicAddress)) + " of the " +
         (is_static ? "static" : "dynamic") + " shared memory";
}

namespace {

// Where block `rank` has what lies at this address; from here on it must not end before a cluster barrier.
unsigned char* place_in_block(uint32_t address, int bytes, int rank) {
  if (rank < 0 || rank >= num_blocks) fail("a block of that rank is not in the cluster");
  unsigned char* mine = at_address(address, bytes);
  const Thread& thread = this_thread();
  if (rank == thread.block) return mine;
  if (address >= kStaticAddress) fail("static shared memory of another block is not emulated");
  last_use_of[rank] = std::max(last_use_of[rank], thread.cluster_barriers);
  return memories[rank].bytes + (mine - dynamic_shared());
}

}  // namespace

const unsigned char* in_block(uint32_t address, int bytes, int rank) {
  return place_in_block(address, bytes, rank);
}

unsigned char* in_block_to_write(uint32_t address, int bytes, int rank) {
  const Thread& thread = this_thread();
  if (rank != thread.block && thread.cluster_barriers == 0) {
    fail("a block wrote to another that may not have started: no cluster barrier before");
  }
  return place_in_block(address, bytes, rank);
}

void copy_async(uint32_t shared, const void* global, int bytes) {
  if (bytes < 0 || bytes > 16) fail("an asynchronous copy of less than 0 or more than 16 bytes");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("an asynchronous copy from a misaligned address");
  check_copy_source(global, bytes);
  Copy copy{at_address(shared, 16), static_cast<const unsigned char*>(global), bytes};
  if (copies_early) perform(copy);
  this_thread().copies.push_back(copy);
}

void commit_async_copies() {
  Thread& thread = this_thread();
  thread.groups.push_back(thread.copies.size());
}

void wait_async_copies(int pending) {
  Thread& thread = this_thread();
  const size_t finished = thread.groups.size() - std::min<size_t>(thread.groups.size(), pending);
  if (finished == 0) return;
  const size_t end = thread.groups[finished - 1];
  for (size_t i = 0; i < end; ++i) perform(thread.copies[i]);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + end);
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + finished);
  for (size_t& group : thread.groups) group -= end;
}

}  // namespace emulator
