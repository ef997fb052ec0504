// The scheduler: every thread of a cluster is a fiber that runs until it must wait for others.
// QSUN_EMULATOR_ORDER picks which fiber goes first between two barriers, and which cluster of a grid:
// forward (default), reverse, or a number that seeds a random order. A kernel that is right gives the same
// bits for all.
//
// A fiber is started once, with ucontext, and then serves thread after thread: between fibers _longjmp takes
// nanoseconds where swapcontext, which saves the signal mask, enters the operating system.
#undef _FORTIFY_SOURCE  // its longjmp refuses to leave one stack for another

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <random>
#include <set>

#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kPageBytes = 4096;

struct Fiber {
  jmp_buf context;
  bool started = false;
  char* stack_top = nullptr;
  Thread thread;
};

struct Block {
  uint3 index;
  int at_barrier, done;
};

std::deque<Fiber> fibers;   // a deque: they stay where they are
std::vector<State> states;  // of the fibers, close together for the passes over them
std::vector<Block> blocks;  // of the cluster
int at_cluster_barrier, ended;
bool some_block_waited;      // of the launch, for its producers
int threads, block_threads;  // of the cluster, of a block
jmp_buf scheduler;
int current;
const Launch* running;
std::string failure;

// Leaves the running fiber; comes back when the scheduler picks it.
void leave() {
  if (_setjmp(fibers[current].context) == 0) _longjmp(scheduler, 1);
}

void release(int begin, int end, State from) {
  for (int i = begin; i < end; ++i) {
    if (states[i] == from) states[i] = State::kReady;
  }
}

// Lets threads at a barrier go on when those that have not ended are all there.
void open_barriers(int block) {
  Block& b = blocks[block];
  if (b.at_barrier > 0 && b.at_barrier + b.done == block_threads) {
    b.at_barrier = 0;
    release(block * block_threads, (block + 1) * block_threads, State::kAtBarrier);
  }
  if (at_cluster_barrier > 0 && at_cluster_barrier + ended == threads) {
    at_cluster_barrier = 0;
    // The instruction is the aligned one: all lanes of a warp, or none.
    for (int i = 0; i < threads; ++i) {
      if (i % kLanes != 0 && i % block_threads != 0 && states[i] != states[i - 1]) {
        failure = "some lanes of a warp are at a cluster barrier, others have ended";
      }
    }
    release(0, threads, State::kAtClusterBarrier);
  }
}

void end_thread() {
  const Thread& thread = fibers[current].thread;
  end_thread_copies();
  some_block_waited |= thread.waited_for_producers;
  states[current] = State::kDone;
  ++ended;
  if (++blocks[thread.block].done == block_threads) {
    end_barriers(thread.block);
    end_block(thread.block);
  }
  open_barriers(thread.block);
}

void enter() {
  for (;;) {
    (*running->call)();
    end_thread();
    leave();
  }
}

void start(Fiber& fiber) {
  static ucontext_t context;
  fiber.started = true;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack_top - (kStackBytes - kPageBytes);
  context.uc_stack.ss_size =
      static_cast<size_t>(fiber.stack_top - static_cast<char*>(context.uc_stack.ss_sp));
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

// Runs fiber `current` until it leaves.
void resume() {
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = fibers[current];
  if (!fiber.started) start(fiber);
  _longjmp(fiber.context, 1);
}

void add_fibers(int count) {
  while (static_cast<int>(fibers.size()) < count) {
    void* stack = mmap(nullptr, kStackBytes + kPageBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, kPageBytes, PROT_NONE) != 0) std::abort();
    // Stacks that began at equal offsets in their pages would compete for the same lines of the caches.
    const size_t shift = fibers.size() % 60 * 64;
    fibers.emplace_back();
    fibers.back().stack_top = static_cast<char*>(stack) + kPageBytes + kStackBytes - shift;
  }
}

std::vector<int> visiting_order(int count) {
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = i;
  const char* setting = std::getenv("QSUN_EMULATOR_ORDER");
  const std::string name = setting == nullptr ? "forward" : setting;
  if (name == "reverse") {
    std::reverse(order.begin(), order.end());
  } else if (name != "forward") {
    std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(std::stoul(name))));
  }
  return order;
}

void start_cluster(const Launch& launch, dim3 first) {
  const dim3 block = launch.block, cluster = launch.cluster;
  hide_produced(launch);
  prepare_memory(static_cast<int>(blocks.size()), launch.shared_bytes);
  prepare_barriers(launch);
  at_cluster_barrier = ended = 0;
  const int block_warps = (block_threads + kLanes - 1) / kLanes;
  prepare_warps(block_warps * static_cast<int>(blocks.size()));
  for (int rank = 0; rank < static_cast<int>(blocks.size()); ++rank) {
    const unsigned x = rank % cluster.x, y = rank / cluster.x % cluster.y, z = rank / cluster.x / cluster.y;
    blocks[rank] = {{first.x + x, first.y + y, first.z + z}, 0, 0};
    for (int i = 0; i < block_threads; ++i) {
      Thread& thread = fibers[rank * block_threads + i].thread;
      thread.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
      thread.warp = rank * block_warps + i / kLanes;
      thread.lane = i % kLanes;
      thread.block = rank;
      thread.barriers = thread.cluster_barriers = 0;
      thread.waited_for_producers = false;
      thread.copies.clear();
      thread.groups.clear();
    }
  }
  std::fill(states.begin(), states.end(), State::kReady);
}

std::string who_waits() {
  const auto count = [](State state) {
    return std::to_string(std::count(states.begin(), states.end(), state));
  };
  std::string text = "threads of a block wait for threads that will not come: " + count(State::kAtWarp) +
                     " at a shuffle or another instruction of a whole warp, " + count(State::kAtBarrier) +
                     " at a barrier, " + count(State::kAtClusterBarrier) + " at a cluster barrier, " +
                     count(State::kAtPhase) + " for the end of a phase, " + count(State::kDone) + " ended";
  std::set<std::pair<int, uint32_t>> awaited;
  for (int i = 0; i < threads; ++i) {
    const Thread& thread = fibers[i].thread;
    if (states[i] == State::kAtPhase) awaited.insert({thread.block, thread.awaited_barrier});
  }
  for (const auto& [block, barrier] : awaited) text += "; " + lacking(block, barrier);
  return text;
}

// Once no thread can go on: lets the bulk copies come for which the first thread in this order waits.
bool bring_awaited_copies(const std::vector<int>& order) {
  return std::any_of(order.begin(), order.end(), [](int i) {
    const Thread& thread = fibers[i].thread;
    return states[i] == State::kAtPhase && bring_copies(thread.block, thread.awaited_barrier);
  });
}

// Once no thread can go on: lets the kernel in front end. False: none waits for that.
bool end_producers() {
  if (std::count(states.begin(), states.end(), State::kAtProducers) == 0) return false;
  show_produced();
  release(0, threads, State::kAtProducers);
  return true;
}

void run_cluster(const std::vector<int>& order) {
  while (ended < threads) {
    bool ran = false;
    for (const int i : order) {
      if (states[i] != State::kReady) continue;
      ran = true;
      current = i;
      threadIdx = fibers[i].thread.index;
      blockIdx = blocks[fibers[i].thread.block].index;
      resume();
      if (!failure.empty()) return;
    }
    if (!ran && !bring_awaited_copies(order) && !end_producers()) {
      failure = who_waits();
      return;
    }
  }
  end_cluster();
}

}  // namespace

Thread& this_thread() { return fibers[current].thread; }

void wait(State state) {
  states[current] = state;
  const int block = fibers[current].thread.block;
  if (state == State::kAtBarrier) ++blocks[block].at_barrier;
  if (state == State::kAtClusterBarrier) ++at_cluster_barrier;
  open_barriers(block);
  leave();
}

void wake_warp() {
  const int begin = current - fibers[current].thread.lane;
  release(begin, begin + kLanes, State::kAtWarp);
}

void wake_waiters(int block, uint32_t barrier) {
  for (int i = block * block_threads; i < (block + 1) * block_threads; ++i) {
    if (states[i] == State::kAtPhase && fibers[i].thread.awaited_barrier == barrier)
      states[i] = State::kReady;
  }
}

void fail(const char* message) {
  if (failure.empty()) failure = message;
  for (;;) leave();
}

void fail_launch(const char* message) {
  if (failure.empty()) failure = message;
}

void barrier() {
  wait(State::kAtBarrier);
  ++fibers[current].thread.barriers;
}

void cluster_barrier() {
  wait(State::kAtClusterBarrier);
  ++fibers[current].thread.cluster_barriers;
}

void wait_for_producers() {
  if (hides_produced()) wait(State::kAtProducers);
  fibers[current].thread.waited_for_producers = true;
}

std::string run(const Launch& launch) {
  const dim3 block = launch.block, cluster = launch.cluster, grid = launch.grid;
  block_threads = static_cast<int>(block.x * block.y * block.z);
  blocks.resize(cluster.x * cluster.y * cluster.z);
  threads = block_threads * static_cast<int>(blocks.size());
  add_fibers(threads);
  states.assign(threads, State::kReady);
  gridDim = grid;
  blockDim = block;
  running = &launch;
  failure.clear();
  some_block_waited = false;
  begin_triggers();
  const std::vector<int> order = visiting_order(threads);
  const unsigned x_clusters = grid.x / cluster.x, y_clusters = grid.y / cluster.y;
  for (const int index : visiting_order(static_cast<int>(x_clusters * y_clusters * (grid.z / cluster.z)))) {
    const unsigned i = static_cast<unsigned>(index);
    start_cluster(launch, dim3(i % x_clusters * cluster.x, i / x_clusters % y_clusters * cluster.y,
                               i / x_clusters / y_clusters * cluster.z));
    run_cluster(order);
    show_produced();
    if (!failure.empty()) break;
  }
  // Else this kernel could end before its producer has, and who waits for this one alone would not notice.
  if (failure.empty() && launch.overlaps_producer && !some_block_waited) {
    failure =
        "a kernel that may overlap its producer ended without wait_for_producers() in any of its blocks";
  }
  // Threads that did not reach their end would go on in the middle of this kernel.
  for (int i = 0; i < threads; ++i) {
    if (states[i] != State::kDone) fibers[i].started = false;
  }
  return failure;
}

}  // namespace emulator
