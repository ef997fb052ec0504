// The scheduler of the emulated GPU. QSUN_EMULATOR_ORDER picks which fiber goes first between two barriers:
// forward (default), reverse, or a number that seeds a random order. A kernel that is right gives the same
// bits for all.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kLanes = 32;
constexpr int kMaxShuffleBytes = 16;

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kDone;
  uint3 index = {};
  int exchanges = 0;  // so far: neighbours in number use different slots
};

struct LaneSlot {
  char value[2][kMaxShuffleBytes];
};

std::vector<Fiber> fibers;
std::vector<LaneSlot> slots;
ucontext_t scheduler;
int current = 0;
const std::function<void()>* body = nullptr;
std::string failure;

void enter() {
  (*body)();
  fibers[current].state = State::kDone;
  swapcontext(&fibers[current].context, &scheduler);
}

void wait(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
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

// Lets waiting fibers go on where everyone they wait for has arrived. False: nobody can go on.
bool release(int count) {
  bool released = false;
  int at_barrier = 0, done = 0;
  for (int i = 0; i < count; ++i) {
    at_barrier += fibers[i].state == State::kAtBarrier;
    done += fibers[i].state == State::kDone;
  }
  if (at_barrier > 0 && at_barrier + done == count) {
    for (int i = 0; i < count; ++i) {
      if (fibers[i].state == State::kAtBarrier) fibers[i].state = State::kReady;
    }
    return true;
  }
  for (int warp = 0; warp * kLanes < count; ++warp) {
    bool complete = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int i = warp * kLanes + lane;
      complete = complete && i < count && fibers[i].state == State::kAtExchange;
    }
    if (!complete) continue;
    for (int lane = 0; lane < kLanes; ++lane) fibers[warp * kLanes + lane].state = State::kReady;
    released = true;
  }
  return released;
}

extern "C" char __start_qsun_shared[];
extern "C" char __stop_qsun_shared[];

void run_block(int count) {
  // All bits set is not a number in every floating-point type, and a large index in every integer type.
  std::fill(__start_qsun_shared, __stop_qsun_shared, static_cast<char>(0xff));
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::kReady;
    fiber.exchanges = 0;
    const unsigned x = i % blockDim.x, y = i / blockDim.x % blockDim.y, z = i / blockDim.x / blockDim.y;
    fiber.index = {x, y, z};
  }
  const std::vector<int> order = visiting_order(count);
  for (;;) {
    bool ran = false;
    for (int i : order) {
      if (fibers[i].state != State::kReady) continue;
      ran = true;
      current = i;
      threadIdx = fibers[i].index;
      swapcontext(&scheduler, &fibers[i].context);
      if (!failure.empty()) return;
    }
    if (release(count)) continue;
    const bool all_done = std::all_of(fibers.begin(), fibers.begin() + count,
                                      [](const Fiber& fiber) { return fiber.state == State::kDone; });
    if (all_done) return;
    if (!ran) {
      failure =
          "threads of a block wait for threads that will not come (a shuffle or barrier not reached by all)";
      return;
    }
  }
}

}  // namespace

void barrier() { wait(State::kAtBarrier); }

void exchange(const void* mine, void* theirs, unsigned size, unsigned mask, int partner) {
  if (mask != 0xffffffffu || size > kMaxShuffleBytes) {
    failure = "the emulator knows shuffles of whole warps only, of at most 16 bytes";
    wait(State::kAtExchange);
  }
  Fiber& fiber = fibers[current];
  const int parity = fiber.exchanges++ % 2;
  std::memcpy(slots[current].value[parity], mine, size);
  wait(State::kAtExchange);
  std::memcpy(theirs, slots[current / kLanes * kLanes + partner].value[parity], size);
}

void trap() {
  failure = "trap";
  for (;;) wait(State::kAtBarrier);
}

void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  const int count = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(fibers.size()) < count) {
    fibers.emplace_back();
    fibers.back().stack = std::make_unique<char[]>(kStackBytes);
  }
  slots.resize(fibers.size());
  gridDim = grid;
  blockDim = block;
  body = &kernel;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(count);
        if (!failure.empty()) return;
      }
    }
  }
}

}  // namespace emulator

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || threads > 1024 || grid.x > 2147483647u ||
      grid.y > 65535 || grid.z > 65535 || config.dynamicSmemBytes > 49152) {
    return cudaErrorInvalidConfiguration;
  }
  emulator::failure.clear();
  emulator::run_grid(grid, block, kernel);
  return emulator::failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "emulator"; }
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidDevice) return "the emulator has device 0 only";
  return error == cudaErrorInvalidConfiguration ? "invalid grid or block" : emulator::failure.c_str();
}

// A GPU of four multiprocessors: small problems then fill it, and take the paths that large ones take on a
// large GPU.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 166912;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 1 << 20;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

}  // extern "C"
