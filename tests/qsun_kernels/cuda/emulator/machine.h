// What the parts of the emulator share: the launch that runs, its fibers and its blocks' shared memory.
#pragma once

#include <cuda_runtime.h>

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

constexpr int kLanes = 32;
constexpr int kMaxClusterBlocks = 16;  // more than 8 only for a kernel that asked for it

// A launch after its checks. Blocks outside a cluster launch are clusters of one.
struct Launch {
  dim3 grid, block, cluster;
  int shared_bytes = 0;            // of dynamic shared memory
  int capability = 9;              // of the device, its major part
  bool overlaps_producer = false;  // every thread must call wait_for_producers()
  const std::function<void()>* call = nullptr;
};

// Runs a launch. Empty: it ran to its end; else why it did not.
std::string run(const Launch& launch);

// Keeps what cudaGetErrorString() is to say; returns `error`.
cudaError_t refused(cudaError_t error, const std::string& why);

// ---- fibers (scheduler.cpp)

enum class State : uint8_t { kReady, kAtBarrier, kAtClusterBarrier, kAtWarp, kAtPhase, kAtProducers, kDone };

struct Copy {
  unsigned char* target;
  const unsigned char* source;  // null: already copied
  int bytes;
};

// The emulated thread that runs now, and what belongs to it.
struct Thread {
  uint3 index;
  int warp;  // of the launch's cluster
  int lane;
  int block;                       // of the cluster: the rank
  int barriers, cluster_barriers;  // passed so far
  bool waited_for_producers;
  uint32_t awaited_barrier;    // where it is kAtPhase
  std::vector<Copy> copies;    // asynchronous and unfinished, in order
  std::vector<size_t> groups;  // the end of each group in `copies`
};
Thread& this_thread();
void wait(State state);                          // suspends the running thread
void wake_warp();                                // lets the other lanes of its warp go on
void wake_waiters(int block, uint32_t barrier);  // lets threads that are kAtPhase there go on
void fail_launch(const char* message);           // as fail(), for code that must not be left

// ---- what the kernel in front writes (producers.cpp)

void hide_produced(const Launch& launch);  // of a cluster that is about to start
void show_produced();                      // from where the kernel in front has ended
bool hides_produced();
void check_copy_source(const void* source, int bytes);  // an error where it is hidden
void begin_triggers();                                  // of a launch

// ---- warps (warp.cpp)

void prepare_warps(int count);  // of a cluster

// ---- shared memory (memory.cpp)

void prepare_memory(int blocks, int bytes);  // of a cluster whose blocks are about to start
void end_block(int block);                   // its threads have ended
void end_cluster();
void end_thread_copies();  // an error where copies of the running thread are unfinished
bool copies_are_early();
unsigned char* at_address(uint32_t address, int bytes, int alignment);
std::string place_name(uint32_t address);

// ---- barriers and bulk copies (bulk_copy.cpp)

void prepare_barriers(const Launch& launch);       // of a cluster
void end_barriers(int block);                      // its threads have ended
bool bring_copies(int block, uint32_t barrier);    // of the phase under way; false: none could end it
std::string lacking(int block, uint32_t barrier);  // what the phase under way waits for

}  // namespace emulator
