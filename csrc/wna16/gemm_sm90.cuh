// x (M, K) times a panel weight, for many tokens, on the tensor cores of sm_90a.
//
//   a block: 64 * kWarpGroups weight rows x kTokens tokens of out^T
//
//                 columns, blocks of 128, split over split_k blocks
//               | b0 | b1 | b2 | ...                      x^T: kTokens rows of 2 x 64 columns
//   warp group 0|    |    |    |   64 rows                +---+---+---
//   warp group 1|    |    |    |   64 rows          b0 -> | h0| h1|
//                                                         +---+---+---
//
// One thread (of the last warp) keeps the copy engine busy with a ring of stages, each with one column block:
// whole panel blocks, which are contiguous, and two boxes of x. Each warp group takes the codes of its 64
// rows to registers, makes 16-bit weights (code - zero) * scale of them, rounded once, and gives them to
// wgmma as operand A while the products before still run; x is operand B where the copy engine put it. So a
// weight is read from memory once, from shared memory once, and never written as 16 bits.
//
// What binds below some 100 tokens is the rate at which a scheduler issues instructions: 4 bits take 15 for
// the 256 weights of a warp's product. All else is kept out of the loop: a stage has one barrier to wait at
// and one to release, and what can be is a constant.
//
// Weights do not depend on the kernel before: their ring is filled before wait_for_producers(). Blocks that
// split the columns leave their sums to a second kernel (add_parts.cu), which starts early like all others,
// or, as a cluster, add them through one another's shared memory: that wants all of them at once and two
// barriers of the cluster, but saves a launch and two ways through the L2 for every sum. Both add in a fixed
// order.
#pragma once

#include <iterator>
#include <type_traits>

#include "device/async_copy.cuh"
#include "device/bulk_copy.cuh"
#include "device/dependent_launch.cuh"
#include "device/dtype.cuh"
#include "device/wgmma.cuh"
#include "runtime/alignment.h"
#include "runtime/launch.h"
#include "runtime/tensor_map.h"
#include "wna16/gemm_sm90.h"
#include "wna16/gemm_sm90_codes.cuh"
#include "wna16/gemm_sm90_place.cuh"
#include "wna16/gemm_sm90_sums.cuh"
#include "wna16/panels.h"
#include "wna16/parts.h"

namespace qsun {
namespace {

// One thread of the last warp, or warp group, copies. A warp costs the registers of one more in a quarter of
// the multiprocessor; where that is too much, a whole group that gives its registers to the others.
template <int kBits, int kTokens, int kWarpGroups>
constexpr int kCopyWarps =
    kTokens > 128 || (kTokens == 128 && kWarpGroups == 4) || (kTokens == 96 && kBits == 8) ? kGroupWarps : 1;
template <int kBits, int kTokens, int kWarpGroups>
constexpr int kGemmThreads =
    kWarpGroups * kGroupThreads + kCopyWarps<kBits, kTokens, kWarpGroups> * kWarpLanes;
constexpr int kCopyRegisters = 32;
template <int kTokens, int kWarpGroups>
constexpr int kProductRegisters = kWarpGroups == 4 ? 112
                                  : kTokens <= 96  ? 104
                                                   : 232;

template <int kTokens>
constexpr int kXBytes = kTokens * kBlockColumns * 2;  // of a stage

// Products of 16 columns in a group, of which two are in registers: one is multiplied while the next is made.
// More take registers that the warps of the block, and the blocks beside one another (gemm_blocks_per_sm), do
// not leave.
template <int kBits, int kTokens, int kWarpGroups>
constexpr int kGroupSteps = kTokens <= 32 || kTokens == 96 || (kBits == 8 && kTokens < 128) ||
                                    (kTokens == 128 && kWarpGroups > (kBits == 8 ? 2 : 3))
                                ? 2
                                : 4;

#if QSUN_HAS_WGMMA

// Addresses in shared memory. A stage is full when its weights and its x have come, empty when every warp
// that multiplies has released it.
struct Memory {
  uint32_t x, weights;   // the rings
  uint32_t full, empty;  // barriers, one a stage

  __device__ __forceinline__ Memory(const GemmArguments& a, int x_bytes) {
    x = shared_address(dynamic_shared());
    weights = x + a.stages * x_bytes;
    full = x + a.barrier_offset;
    empty = full + a.stages * kBarrierBytes;
  }
};

// The copying thread's work.
template <int kTokens, int kWarpGroups>
struct Copies {
  const GemmArguments& a;
  const CUtensorMap* x_map;
  const Memory& memory;
  uint64_t policy;
  const uint8_t* sources[kWarpGroups];  // next block of each row block
  int weights_left;                     // blocks up to the end of the part, where the order begins anew
  int first_column, column, end_column, token;  // of x
  int64_t part_bytes;                           // of a row block's part of the columns

  __device__ __forceinline__ Copies(const GemmArguments& a, const CUtensorMap* x_map, const Place& place,
                                    const Memory& memory)
      : a(a), x_map(x_map), memory(memory), policy(evict_first_policy()) {
#pragma unroll
    for (int i = 0; i < kWarpGroups; ++i) {
      // Past the last row: any rows, whose sums are not stored.
      const int64_t row_block = min(place.row_block + i, a.row_blocks - 1);
      sources[i] =
          a.p.panels + (row_block * a.p.column_blocks + place.column_block + place.rotation) * a.block_bytes;
    }
    weights_left = place.num_column_blocks - place.rotation;
    part_bytes = int64_t{place.num_column_blocks} * a.block_bytes;
    first_column = place.column_block * kBlockColumns;
    column = first_column + place.rotation * kBlockColumns;
    end_column = first_column + place.num_column_blocks * kBlockColumns;
    token = place.token;
  }

  __device__ __forceinline__ void weights(int stage) {
    const uint32_t full = memory.full + stage * kBarrierBytes;
    arrive_expecting(full, kWarpGroups * a.block_bytes);
    uint32_t target = memory.weights + stage * kWarpGroups * a.block_bytes;
#pragma unroll
    for (int i = 0; i < kWarpGroups; ++i) {
      if (a.weights_read_once) {
        copy_bulk_streamed(target, sources[i], a.block_bytes, full, policy);
      } else {
        copy_bulk(target, sources[i], a.block_bytes, full);
      }
      sources[i] += a.block_bytes;
      target += a.block_bytes;
    }
    if (--weights_left == 0) {
#pragma unroll
      for (int i = 0; i < kWarpGroups; ++i) sources[i] -= part_bytes;
    }
  }

  __device__ __forceinline__ void x(int stage) {
    const uint32_t full = memory.full + stage * kBarrierBytes;
    arrive_expecting(full, kXBytes<kTokens>);
    const uint32_t target = memory.x + stage * kXBytes<kTokens>;
    copy_box(target, x_map, column, token, full);
    copy_box(target + kXBytes<kTokens> / 2, x_map, column + kBoxColumns, token, full);
    column += kBlockColumns;
    if (column == end_column) column = first_column;
  }

  // From the second round on, each stage when the warps have released it.
  __device__ __forceinline__ void rest(int num_column_blocks) {
    int stage = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int b = a.stages; b < num_column_blocks; ++b) {
      wait_for_phase(memory.empty + stage * kBarrierBytes, parity);
      x(stage);
      weights(stage);
      if (++stage == a.stages) stage = 0, parity ^= 1u;
    }
  }
};

// The sums of 64 weight rows and kTokens tokens over this block's columns.
template <typename T, int kBits, int kTokens, int kWarpGroups, bool kHasZeros, bool kOneGroup>
__device__ __forceinline__ void multiply(const GemmArguments& a, int num_column_blocks, const Memory& memory,
                                         int warp, int lane, float (&sums)[kTokens / 2]) {
  constexpr int kSteps = kGroupSteps<kBits, kTokens, kWarpGroups>;
  constexpr int kProductGroups = kBlockSteps / kSteps;  // of a column block
  static_assert(kProductGroups % 2 == 0, "fragments[0] begins each column block");
  // When the next codes are loaded: behind products that take long enough to hide the load, or a group
  // before.
  constexpr int kLoadGroup = kProductGroups - (kTokens > 128 ? 1 : 2);

  const int stage_bytes = kWarpGroups * a.block_bytes;
  const unsigned char* tile = dynamic_shared() + a.stages * kXBytes<kTokens> +
                              warp / kGroupWarps * a.block_bytes + warp % kGroupWarps * a.tile_bytes;
  const LanePlace place(tile, kBits, kOneGroup ? 1 : a.p.groups_per_block, lane);

  int block = 0;  // in codes: bytes from the first one
  uint32_t fragments[2][kSteps][4];
  LaneCodes<kBits, kHasZeros, kOneGroup> codes;
  GroupFactors<T, kBits, kHasZeros> factors;
  const auto make_group = [&](int group) {
    if (kOneGroup && group == 0) factors.set(codes.scales[0], codes.zeros[0]);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = group * kSteps + i, quarter = step / 2;  // 32 columns: the smallest group
      if (codes.kLateGroups && step % 2 == 0) codes.load_groups(a, place, block, quarter, 1);
      if (!kOneGroup && step % 2 == 0) factors.set(codes.scales[quarter], codes.zeros[quarter]);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        uint32_t& pair = fragments[group % 2][i][r];
        pair = scaled_pair<T, kBits>(codes.words[step / kHalfSteps], step % kHalfSteps, r,
                                     factors.offset[r % 2], factors.scale[r % 2]);
      }
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) pin(fragments[group % 2][i][r]);
    }
  };

  wait_for_phase(memory.full, 0);
  codes.load(a, place, 0);
  make_group(0);
  if (kProductGroups == 2) codes.load_second_half(place, block);

  int stage = 0;
  uint32_t parity = 0;
  uint32_t release = memory.empty;  // of the stage before
#pragma unroll 1
  for (int b = 0; b < num_column_blocks; ++b) {
    const uint64_t x = describe_operand(memory.x + stage * kXBytes<kTokens>);
    const uint32_t own = memory.empty + stage * kBarrierBytes;
    if (++stage == a.stages) stage = 0, parity ^= 1u;
    const bool is_last = b + 1 == num_column_blocks;
#pragma unroll
    for (int group = 0; group < kProductGroups; ++group) {
      begin_products();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        // 32 bytes to the right for each product, and the second box after the first
        const int step = group * kSteps + i;
        const int offset = step % 4 * 32 + step / 4 * (kXBytes<kTokens> / 2);
        Product<T, kTokens>::issue(sums, fragments[group % 2][i], x + offset / 16);
      }
      commit_products();

      // All products before these are done: their fragments are free, and the stage before this one.
      wait_products<1>();
      if (group == 0) {
        if (lane == 0 && b > 0) arrive(release);
        release = own;
      }
      if (group + 1 < kProductGroups) make_group(group + 1);
      if (kProductGroups > 2 && group + 2 == kProductGroups / 2) codes.load_second_half(place, block);
      if (group == kLoadGroup && !is_last) {
        wait_for_phase(memory.full + stage * kBarrierBytes, parity);
        block = stage * stage_bytes;
        codes.load(a, place, block);
      }
      if (group == kProductGroups - 1 && !is_last) {
        make_group(0);
        if (kProductGroups == 2) codes.load_second_half(place, block);
      }
    }
  }
  wait_products<0>();
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) pin(sums[i]);
}

#endif  // QSUN_HAS_WGMMA

template <typename T, int kBits, int kTokens, int kWarpGroups>
__global__ void __launch_bounds__(kGemmThreads<kBits, kTokens, kWarpGroups>,
                                  gemm_blocks_per_sm(kTokens, kWarpGroups))
    wna16_gemm_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                           const __grid_constant__ GemmArguments a) {
#if QSUN_HAS_WGMMA
  launch_dependents();
  constexpr int kWarps = kWarpGroups * kGroupWarps;  // that multiply
  constexpr bool kGivesRegisters = kCopyWarps<kBits, kTokens, kWarpGroups> == kGroupWarps;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpLanes, 0);
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const Place place(a, kWarpGroups, kTokens);
  const Memory memory(a, kXBytes<kTokens>);
  const bool copies_here = warp == kWarps && lane == 0;
  Copies<kTokens, kWarpGroups> copies(a, &x_map, place, memory);
  const int first_stages = min(a.stages, place.num_column_blocks);

  // Barriers, and the first weights
  if (copies_here) {
    for (int i = 0; i < a.stages; ++i) {
      init_barrier(memory.full + i * kBarrierBytes, 2);  // by weights() and by x()
      init_barrier(memory.empty + i * kBarrierBytes, kWarps);
    }
    publish_barriers();
    prefetch_map(&x_map);
    if (a.p.prefetch_weights) {
      for (int i = 0; i < first_stages; ++i) copies.weights(i);
    }
  }
  __syncthreads();

  // Roles
  if (warp >= kWarps) {
    if constexpr (kGivesRegisters) give_registers<kCopyRegisters>();
    if (copies_here) {
      wait_for_producers();
      for (int i = 0; i < first_stages; ++i) {
        if (!a.p.prefetch_weights) copies.weights(i);
        copies.x(i);
      }
      copies.rest(place.num_column_blocks);
    }
    if (kAddsInCluster<kTokens> && a.cluster > 1) {
      __syncwarp();
      meet_cluster();  // the two barriers of the other branch
      meet_cluster();
    }
  } else {
    if constexpr (kGivesRegisters) take_registers<kProductRegisters<kTokens, kWarpGroups>>();
    float sums[kTokens / 2] = {};
    const auto multiply_with = [&](auto has_zeros, auto one_group) {
      multiply<T, kBits, kTokens, kWarpGroups, has_zeros.value, one_group.value>(a, place.num_column_blocks,
                                                                                 memory, warp, lane, sums);
    };
    if (a.p.groups_per_block == 1) {
      a.p.has_zeros ? multiply_with(std::true_type(), std::true_type())
                    : multiply_with(std::false_type(), std::true_type());
    } else {
      a.p.has_zeros ? multiply_with(std::true_type(), std::false_type())
                    : multiply_with(std::false_type(), std::false_type());
    }
    wait_for_producers();  // long over: orders this thread's own reads and writes

    if (a.leaves_sums) {
      leave_sums<kTokens>(a, place, sums, warp, lane);
    } else {
      float* staged = reinterpret_cast<float*>(dynamic_shared());
      named_barrier(1, kWarps * kWarpLanes);  // the stages have been read
      stage_sums<kTokens>(sums, staged, warp, lane);
      if (kAddsInCluster<kTokens> && a.cluster > 1) {
        cluster_barrier();
      } else {
        named_barrier(1, kWarps * kWarpLanes);
      }
      store_tile<T, kTokens, kWarpGroups>(a, place, staged, static_cast<int>(threadIdx.x));
      if (kAddsInCluster<kTokens> && a.cluster > 1) {
        __syncwarp();
        meet_cluster();  // this block's sums have been read
      }
    }
  }
#else
  __trap();  // never chosen: compiled for architectures without wgmma only to keep one list of sources
#endif
}

template <typename T, int kBits, int kTokens, int kWarpGroups>
cudaError_t launch_tile(const Wna16PanelsParams& p, const GemmConfig& config) {
  GemmArguments a{};
  a.p = p;
  a.tile_bytes = tile_bytes(p.bits, p.groups_per_block, p.has_zeros);
  a.block_bytes = block_bytes(p.bits, p.groups_per_block, p.has_zeros);
  a.row_blocks = static_cast<int>(ceil_div(p.N, kBlockRows));
  a.leaves_sums = config.split_k > 1 && !config.adds_in_cluster;
  a.cluster = config.adds_in_cluster ? config.split_k : 1;
  a.column_ranges = EvenShares(static_cast<int>(p.column_blocks), config.split_k);
  a.parts_row = padded_rows(p.N);
  a.stages = config.stages;
  a.barrier_offset = gemm_barrier_offset(config, a.block_bytes);
  for (int i = 0; i < 4; ++i) a.scale_offsets[i] = i * p.groups_per_block / 4 * 4;
  a.wide = wide({p.out, p.bias, p.residual},
                {p.out_stride * 2, p.residual != nullptr ? p.residual_stride * 2 : 0});
  const int64_t token_tiles = ceil_div(p.M, kTokens);
  a.weights_read_once = token_tiles == 1;

  CUtensorMap x_map;
  const cudaError_t error = describe_matrix(&x_map, p.dtype, p.x, p.M, p.K, p.x_stride, kTokens);
  if (error != cudaSuccess) return error;

  LaunchOptions options;
  options.shared_bytes = gemm_shared_bytes(config, a.block_bytes);
  options.overlaps_producer = true;
  options.cluster = dim3(1, 1, a.cluster);
  const dim3 grid(token_tiles, ceil_div(a.row_blocks, kWarpGroups), config.split_k);
  const cudaError_t launched =
      launch_with(options, wna16_gemm_sm90_kernel<T, kBits, kTokens, kWarpGroups>, grid,
                  dim3(kGemmThreads<kBits, kTokens, kWarpGroups>), p.device, p.stream, x_map, a);
  if (launched != cudaSuccess || !a.leaves_sums || p.leaves_sums) return launched;
  return launch_add_parts<T>(p, config.split_k, true);
}

template <typename T, int kBits, size_t kFirst = 0>
cudaError_t launch_gemm(const Wna16PanelsParams& p, const GemmConfig& config) {
  if constexpr (kFirst == std::size(kGemmTiles)) {
    return cudaErrorInvalidValue;
  } else {
    constexpr GemmTile kTile = kGemmTiles[kFirst];
    if (config.token_tile == kTile.token_tile && config.warp_groups == kTile.warp_groups) {
      return launch_tile<T, kBits, kTile.token_tile, kTile.warp_groups>(p, config);
    }
    return launch_gemm<T, kBits, kFirst + 1>(p, config);
  }
}

}  // namespace
}  // namespace qsun
