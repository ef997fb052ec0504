// Small kernels that show what the emulator makes of an instruction, and of its misuse; test_emulator.py runs
// them. Every entry returns what went wrong, empty for nothing.
#include "device/async_copy.cuh"
#include "device/bulk_copy.cuh"
#include "device/cluster.cuh"
#include "device/dependent_launch.cuh"
#include "device/dtype.cuh"
#include "device/mma.cuh"
#include "device/panel_codes.cuh"
#include "device/reduce.cuh"
#include "runtime/launch.h"

#define ENTRY extern "C" __attribute__((visibility("default"))) const char*

namespace qsun {
namespace {

// The dtypes of the tests: 1 is float16, 2 is bfloat16.
template <typename Function>
cudaError_t with_half(int dtype, Function&& function) {
  if (dtype == 1) return function(TypeTag<__half>());
  return function(TypeTag<__nv_bfloat16>());
}

const char* text(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

template <typename... Parameters, typename... Arguments>
const char* run(const LaunchOptions& options, void (*kernel)(Parameters...), dim3 grid, int threads,
                Arguments... arguments) {
  return text(launch_with(options, kernel, grid, dim3(threads), 0, nullptr, arguments...));
}

__device__ void copy_to_shared(unsigned char* shared, const void* source, int bytes) {
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += static_cast<int>(blockDim.x)) {
    shared[i] = static_cast<const unsigned char*>(source)[i];
  }
  __syncwarp();
}

// ---- the tensor core. a: (16, 16), b: (8, 16), the operand's columns as rows; c: (16, 8), added to

template <typename T>
__global__ void multiply_kernel(const void* a, const void* b, float* c, int absent_lane, int repeats) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  unsigned char* shared = dynamic_shared();
  copy_to_shared(shared, a, 512);
  copy_to_shared(shared + 512, b, 256);
  const int row = lane % 8, matrix = lane / 8;
  uint32_t a_pairs[4], b_pairs[4];
  const uint32_t address = shared_address(shared);
  load_matrices(a_pairs, address + (row + matrix % 2 * 8) * 32 + matrix / 2 * 16);
  load_matrices(b_pairs, address + 512 + row * 32 + matrix % 2 * 16);
  float sums[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[g * 8 + 64 + 2 * t], c[g * 8 + 64 + 2 * t + 1]};
  if (lane == absent_lane) return;
  for (int i = 0; i < repeats; ++i) mma_m16n8k16<T>(sums, a_pairs, b_pairs[0], b_pairs[1]);
  c[g * 8 + 2 * t] = sums[0], c[g * 8 + 2 * t + 1] = sums[1];
  c[g * 8 + 64 + 2 * t] = sums[2], c[g * 8 + 64 + 2 * t + 1] = sums[3];
}

// r: (4 matrices, 32 lanes); rows: an address offset a lane
__global__ void load_kernel(const void* source, int bytes, const int* offsets, uint32_t* r, int transposed) {
  copy_to_shared(dynamic_shared(), source, bytes);
  uint32_t loaded[4];
  const uint32_t address = shared_address(dynamic_shared()) + offsets[threadIdx.x];
  transposed ? load_matrices_transposed(loaded, address) : load_matrices(loaded, address);
  for (int i = 0; i < 4; ++i) r[i * 32 + threadIdx.x] = loaded[i];
}

// The shuffles and the counting that lanes do one for another.
__global__ void count_kernel(int distance, int64_t* from_below, int* counter, int* before) {
  from_below[threadIdx.x] = __shfl_up_sync(kAllLanes, int64_t{threadIdx.x} << 33, distance);
  before[threadIdx.x] = atomicAdd(counter, 2);
}

// Lanes below 16 shuffle, the others are at a barrier of the warp, and then the other way round.
__global__ void mixed_kernel() {
  if (threadIdx.x < 16) {
    __shfl_xor_sync(kAllLanes, 1, 16);
    __syncwarp();
  } else {
    __syncwarp();
    __shfl_xor_sync(kAllLanes, 1, 16);
  }
}

// ---- asynchronous copies. Each thread copies a piece of 16 bytes into each of two stages, a group each.

struct CopyCase {
  int waits;         // 2: for both groups, 1: for the first, 0: not before it reads
  int commits;       // groups that are closed before the wait
  int finishes;      // waits for all at the end
  int shared_shift;  // bytes
  int global_shift;
  int bytes;  // of 16
  int far;    // from the place in shared memory
};

__global__ void copy_kernel(const unsigned char* source, unsigned char* out, CopyCase c) {
  unsigned char* shared = dynamic_shared();
  const int at = static_cast<int>(threadIdx.x) * 16;
  const int stage_bytes = static_cast<int>(blockDim.x) * 16;
  for (int stage = 0; stage < 2; ++stage) {
    const int place = stage * stage_bytes + at;
    copy_async_or_zero(shared_address(shared) + place + c.shared_shift + c.far,
                       source + place + c.global_shift, c.bytes);
    if (stage < c.commits) commit_async_copies();
  }
  if (c.waits == 2) wait_async_copies<0>();
  if (c.waits == 1) wait_async_copies<1>();
  __syncthreads();
  for (int stage = 0; stage < 2; ++stage) {
    for (int i = 0; i < 16; ++i) {
      const int place = stage * stage_bytes + (at + 16) % stage_bytes + i;  // the neighbour's
      out[place] = shared[place];
    }
  }
  __syncthreads();  // what is finished from here on was seen by none
  commit_async_copies();
  if (c.finishes) wait_async_copies<0>();
}

// ---- barriers and bulk copies

// What one thread does, or all (-1): the names are those of test_emulator.py.
enum ScriptAction { kInit, kPublish, kSync, kSyncWarp, kArrive, kExpect, kWait, kTest, kBulk, kStore, kRead };

struct ScriptStep {
  int thread;
  int action;
  int barrier;  // as kBulk, kStore and kRead: bytes from the begin of dynamic shared memory
  int value;    // arrivals, bytes or parity
  int place;    // in shared memory
  int source;   // in global memory; for kRead the place in `out`
};

__global__ void script_kernel(const ScriptStep* steps, int count, const unsigned char* source,
                              unsigned char* out) {
  const uint32_t shared = shared_address(dynamic_shared());
  for (int i = 0; i < count; ++i) {
    const ScriptStep& step = steps[i];
    if (step.thread != -1 && step.thread != static_cast<int>(threadIdx.x)) continue;
    const uint32_t barrier = shared + step.barrier;
    switch (step.action) {
      case kInit:
        init_barrier(barrier, step.value);
        break;
      case kPublish:
        publish_barriers();
        break;
      case kSync:
        __syncthreads();
        break;
      case kSyncWarp:
        __syncwarp();
        break;
      case kArrive:
        arrive(barrier);
        break;
      case kExpect:
        arrive_expecting(barrier, step.value);
        break;
      case kWait:
        wait_for_phase(barrier, step.value);
        break;
      case kTest:
        while (!phase_has_ended(barrier, step.value)) {
        }
        break;
      case kBulk:
        copy_bulk(shared + step.place, source + step.source, step.value, barrier);
        break;
      case kStore:
        store_shared_f32(shared + step.place, 1.0f);
        break;
      case kRead:
        for (int byte = 0; byte < step.value; ++byte) {
          out[step.source + byte] = dynamic_shared()[step.place + byte];
        }
        break;
    }
  }
}

// A ring as kernels use it: warp 0 fills slots, the other warps empty them, each thread all bytes of a slot
// that its index picks. out: (blocks, pieces, bytes) as source.
struct RingCase {
  int slots, pieces, bytes;
  int waits_for_full;   // else the readers read at once
  int waits_for_empty;  // else the slots are filled again at once
};

__global__ void ring_kernel(const unsigned char* source, unsigned char* out, RingCase c) {
  const uint32_t shared = shared_address(dynamic_shared());
  const uint32_t full = shared + c.slots * c.bytes, empty = full + c.slots * 8;
  const int thread = static_cast<int>(threadIdx.x), readers = static_cast<int>(blockDim.x) - 32;
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  source += block * c.pieces * c.bytes;
  out += block * c.pieces * c.bytes;
  if (thread == 0) {
    for (int slot = 0; slot < c.slots; ++slot) {
      init_barrier(full + slot * 8, 1);
      init_barrier(empty + slot * 8, readers);
    }
    publish_barriers();
  }
  __syncthreads();
  const uint64_t policy = evict_first_policy();
  for (int piece = 0; piece < c.pieces; ++piece) {
    const int slot = piece % c.slots;
    const uint32_t parity = piece / c.slots % 2;
    if (thread == 0) {
      if (c.waits_for_empty) wait_for_phase(empty + slot * 8, parity ^ 1u);
      arrive_expecting(full + slot * 8, c.bytes);
      copy_bulk(shared + slot * c.bytes, source + piece * c.bytes, 16, full + slot * 8);
      copy_bulk_streamed(shared + slot * c.bytes + 16, source + piece * c.bytes + 16, c.bytes - 16,
                         full + slot * 8, policy);
    } else if (thread >= 32) {
      if (c.waits_for_full) wait_for_phase(full + slot * 8, parity);
      for (int i = thread - 32; i < c.bytes; i += readers) {
        out[piece * c.bytes + i] = dynamic_shared()[slot * c.bytes + i];
      }
      arrive(empty + slot * 8);
    }
  }
}

// ---- shared memory

// Each thread stores 16 bytes with a store of each size, and loads them likewise; then one of a wrong
// address.
__global__ void access_kernel(uint32_t* out, int shift) {
  const uint32_t place = shared_address(dynamic_shared()) + threadIdx.x * 16;
  store_shared_u128(place, {1, 2, 3, 0});
  store_shared_u32(place + 12, 4u);
  store_shared_f32(place + 4, 1.0f);
  store_shared_u16(place + 10, 0xabcdu);
  out[0] = load_shared_u32(place), out[1] = __float_as_uint(load_shared_f32(place + 4));
  out[2] = load_shared_u64(place + 8).x, out[3] = load_shared_u128(place).w;
  out[4] = load_shared_u16(place + 10), out[5] = load_shared_u32(place + shift);
}

__global__ void shared_kernel(unsigned char* seen, int bytes, int write_at) {
  if (threadIdx.x != 0) return;
  for (int i = 0; i < bytes; ++i) seen[i] = dynamic_shared()[i];
  for (int i = 0; i < bytes; ++i) dynamic_shared()[i] = 7;
  dynamic_shared()[write_at] = 7;
}

// ---- clusters. Every block leaves its rank; every block adds up all of them.

enum ClusterMisuse { kNone, kNoFirstBarrier, kNoLastBarrier, kStatic, kNoSuchRank, kHalfWarp, kForeign };

__global__ void cluster_kernel(float* out, int misuse) {
  const int rank = static_cast<int>(blockIdx.y), ranks = static_cast<int>(gridDim.y);
  auto* values = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  const float value = static_cast<float>(rank + 1 + 100 * blockIdx.x);
  values[thread] = value;
  if (misuse == kStatic) block_sum(value);
  if (misuse == kHalfWarp && thread == 3 && rank == 1) return;
  if (misuse != kNoFirstBarrier) cluster_barrier();
  float sum = 0.0f;
  for (int i = 0; i < ranks; ++i) {
    const uint32_t place = shared_address(values + thread) + (misuse == kForeign ? 1 << 20 : 0);
    sum += __uint_as_float(load_from_block(place, i + (misuse == kNoSuchRank ? 1 : 0)));
  }
  out[(blockIdx.x * ranks + rank) * blockDim.x + thread] = sum;
  if (misuse != kNoLastBarrier) cluster_barrier();
}

// The same by sending: every block leaves its rank with all of them.
__global__ void sending_kernel(float* out, int misuse) {
  const int rank = static_cast<int>(blockIdx.x), ranks = static_cast<int>(gridDim.x);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto* values = reinterpret_cast<const float*>(dynamic_shared());
  if (misuse != kNoFirstBarrier) cluster_barrier();
  for (int i = 0; i < ranks; ++i) {
    store_to_block(shared_address(values + rank * threads + thread), i, __float_as_uint(rank + 1.0f));
  }
  if (misuse != kNoLastBarrier) cluster_barrier();
  float sum = 0.0f;
  for (int i = 0; i < ranks; ++i) sum += values[i * threads + thread];
  out[rank * threads + thread] = sum;
}

__global__ void dependent_kernel(int waiting_block) {
  launch_dependents();
  if (waiting_block < 0 || static_cast<int>(blockIdx.x) == waiting_block) wait_for_producers();
}

// ---- arithmetic

template <typename T>
__global__ void pairs_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n) {
  for (int i = 0; i < n; ++i) {
    out[i] = fma_pairs<T>(a[i], b[i], c[i]);
    out[n + i] = add_pairs<T>(a[i], b[i]);
    out[2 * n + i] = mul_pairs<T>(a[i], b[i]);
    out[3 * n + i] = round_pair<T>(__uint_as_float(a[i]), __uint_as_float(b[i]));
    out[4 * n + i] = permute_bytes(a[i], b[i], c[i]);
  }
}

// exact, scaled: (8 steps, 4 registers) of a lane with these words.
// words: of both halves of a block. factors: (rows g, g + 8) x (base, what stands for one).
template <typename T, int kBits>
__global__ void codes_kernel(const uint32_t* words, uint32_t zero, uint32_t scale, uint32_t* exact,
                             uint32_t* scaled, uint32_t* bare, float* factors, uint32_t* ones) {
  constexpr int kShift = kBits == 8 ? kExactShift<T> : 0;
  for (int half = 0; half < 2; ++half) {
    uint32_t mine[kHalfWords<kBits>];
    for (int i = 0; i < kHalfWords<kBits>; ++i) mine[i] = words[half * kHalfWords<kBits> + i];
    for (int step = 0; step < kHalfSteps; ++step) {
      for (int r = 0; r < 4; ++r) {
        const int at = (half * kHalfSteps + step) * 4 + r;
        exact[at] = exact_pair<T, kBits, kShift>(mine, step, r, ZeroOffset<T, kBits, kShift>(zero, r % 2));
        scaled[at] =
            scaled_pair<T, kBits>(mine, step, r, ZeroOffset<T, kBits, 0>(zero, r % 2), scale * 0x00010001u);
        if constexpr (kHasBareCodes<T, kBits>) bare[at] = bare_pair<T, kBits>(mine, step, r);
      }
    }
  }
  if constexpr (kHasBareCodes<T, kBits>) {
    constexpr uint32_t kMiddle = 1u << (kBits - 1);
    constexpr int kBase0 = kBareBase<T, kBits, 0>, kBase1 = kBareBase<T, kBits, 1>;
    factors[0] = kBase0, factors[1] = 1.0f / (1u << kBareShift<T, kBits, 0>);
    factors[2] = kBase1, factors[3] = 1.0f / (1u << kBareShift<T, kBits, 1>);
    ones[0] = minus_bare<T, kBits, 0>(1), ones[1] = minus_bare<T, kBits, 0>(kBase0 + kMiddle);
    ones[2] = minus_bare<T, kBits, 1>(1), ones[3] = minus_bare<T, kBits, 1>(kBase1 + kMiddle);
  }
}

}  // namespace

ENTRY multiply(int dtype, const void* a, const void* b, float* c, int absent_lane, int repeats) {
  return text(with_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    LaunchOptions options;
    options.shared_bytes = 768;
    return launch_with(options, multiply_kernel<T>, dim3(1), dim3(32), 0, nullptr, a, b, c, absent_lane,
                       repeats);
  }));
}

ENTRY load(const void* source, int bytes, const int* offsets, uint32_t* r, int transposed) {
  LaunchOptions options;
  options.shared_bytes = bytes;
  return run(options, load_kernel, dim3(1), 32, source, bytes, offsets, r, transposed);
}

ENTRY count(int distance, int64_t* from_below, int* counter, int* before) {
  return run({}, count_kernel, dim3(1), 32, distance, from_below, counter, before);
}

ENTRY mixed() { return run({}, mixed_kernel, dim3(1), 32); }

ENTRY copy(const unsigned char* source, unsigned char* out, int threads, int waits, int commits, int finishes,
           int shared_shift, int global_shift, int bytes, int far) {
  LaunchOptions options;
  options.shared_bytes = 32 * threads;
  const CopyCase c{waits, commits, finishes, shared_shift, global_shift, bytes, far};
  return run(options, copy_kernel, dim3(1), threads, source, out, c);
}

ENTRY script(const int* steps, int count, int threads, int device, const unsigned char* source,
             unsigned char* out) {
  LaunchOptions options;
  options.shared_bytes = 1024;
  const DeviceGuard guard(device);
  return text(launch_with(options, script_kernel, dim3(1), dim3(threads), device, nullptr,
                          reinterpret_cast<const ScriptStep*>(steps), count, source, out));
}

ENTRY ring(const unsigned char* source, unsigned char* out, int clusters, int ranks, int threads, int slots,
           int pieces, int bytes, int waits_for_full, int waits_for_empty) {
  LaunchOptions options;
  options.shared_bytes = slots * (bytes + 16);
  options.cluster = dim3(1, ranks, 1);
  const RingCase c{slots, pieces, bytes, waits_for_full, waits_for_empty};
  return run(options, ring_kernel, dim3(clusters, ranks), threads, source, out, c);
}

ENTRY access(uint32_t* out, int shift) {
  LaunchOptions options;
  options.shared_bytes = 32 * 16;
  return run(options, access_kernel, dim3(1), 32, out, shift);
}

// allowed: through cudaFuncSetAttribute before the launch; negative: not called.
ENTRY shared(unsigned char* seen, int bytes, int write_at, int allowed) {
  if (allowed >= 0) {
    const cudaError_t error =
        cudaFuncSetAttribute(shared_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
    if (error != cudaSuccess) return text(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(3);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  return text(cudaLaunchKernelEx(&config, shared_kernel, seen, bytes, write_at));
}

ENTRY cluster(float* out, int device, int clusters, int ranks, int grid_y, int threads, int misuse) {
  LaunchOptions options;
  options.shared_bytes = threads * 4;
  options.cluster = dim3(1, ranks, 1);
  const DeviceGuard guard(device);
  return text(launch_with(options, cluster_kernel, dim3(clusters, grid_y), dim3(threads), device, nullptr,
                          out, misuse));
}

ENTRY sending(float* out, int ranks, int threads, int misuse) {
  LaunchOptions options;
  options.shared_bytes = ranks * threads * 4;
  options.cluster = dim3(ranks, 1, 1);
  return run(options, sending_kernel, dim3(ranks), threads, out, misuse);
}

ENTRY dependent(int overlaps, int waiting_block) {
  LaunchOptions options;
  options.overlaps_producer = overlaps != 0;
  return run(options, dependent_kernel, dim3(2), 64, waiting_block);
}

ENTRY pairs(int dtype, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n) {
  return text(with_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch_with({}, pairs_kernel<T>, dim3(1), dim3(1), 0, nullptr, a, b, c, out, n);
  }));
}

ENTRY codes(int dtype, int bits, const uint32_t* words, uint32_t zero, uint32_t scale, uint32_t* exact,
            uint32_t* scaled, uint32_t* bare, float* factors, uint32_t* ones) {
  return text(with_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* kernel = bits == 2   ? codes_kernel<T, 2>
                   : bits == 3 ? codes_kernel<T, 3>
                   : bits == 4 ? codes_kernel<T, 4>
                               : codes_kernel<T, 8>;
    return launch_with({}, kernel, dim3(1), dim3(1), 0, nullptr, words, zero, scale, exact, scaled, bare,
                       factors, ones);
  }));
}

ENTRY device_props_of(int device, int* major, int* shared_bytes) {
  cudaError_t error = cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return text(error);
}

}  // namespace qsun
