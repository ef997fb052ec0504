// x (M, K) times a panel weight, for many tokens, by mma.sync: for GPUs that have no wgmma.
//
//   a block: 64 * row_groups weight rows x 8 * kTokenTiles tokens of out^T
//
//                    a stage: column_groups * 64 columns
//                  +------------+------------+--
//    row group 0   | column     | column     |        a warp: 64 rows x 64 columns of each stage, all tokens
//                  | group 0    | group 1    |
//    row group 1   +------------+------------+--
//
// The weight is operand A (16 of its rows are the 16 rows of m16n8k16) and x operand B (tokens are its 8
// columns). A warp makes a pair of 16-bit weights once, in registers, and multiplies it by all tokens of the
// block; it loads an x fragment once for its four row tiles. Weights are rounded to (code - zero) * scale in
// 16 bits, as a dense weight would be: sums of groups would take as many registers again as the result.
//
// All threads fill a ring of stages in shared memory (tiles_sm80_copies.cuh). What the first step of a stage
// needs is loaded into registers during the last step of the stage before, behind the one barrier of a stage:
// at that barrier every warp has read all of its stage, so that the stage is filled again at once.
//
// Column groups add up at the end through shared memory in their order; blocks that split the columns leave
// their sums to a second kernel (add_parts.cu), which adds them in the order of the splits.
#pragma once

#include <iterator>
#include <type_traits>

#include "device/dependent_launch.cuh"
#include "device/dtype.cuh"
#include "device/mma.cuh"
#include "device/panel_codes.cuh"
#include "device/registers.cuh"
#include "runtime/alignment.h"
#include "runtime/launch.h"
#include "wna16/outputs.cuh"
#include "wna16/parts.h"
#include "wna16/stream_multiply.cuh"
#include "wna16/tiles_sm80_copies.cuh"

namespace qsun {
namespace {

template <int kTokenTiles>
using TileSums = float[kBlockTiles][kTokenTiles][4];

// What a warp reads of a stage, by the stage's address. kSmallGroups: groups of 32 columns, two for the warp.
template <typename T, int kBits, int kTokenTiles, bool kHasZeros, bool kSmallGroups>
struct StageReader {
  const TilesArguments& a;
  LaneAddresses<kBits> addresses;  // of the first row tile's part, in a stage
  uint32_t x;                      // the lane's row of x, in a stage

  __device__ __forceinline__ StageReader(const TilesArguments& a, int row_group, int column_group,
                                         uint32_t lane)
      : a(a),
        addresses(((row_group << a.blocks_log2) + column_group / 2) * a.block_bytes, lane,
                  a.p.groups_per_block) {
    static_assert(kBits == 4 || kBits == 8, "pieces of 16 bytes alone");
    constexpr uint32_t kXBlockBytes = kTokenTiles * kTokens * kXRowBytes;
    const uint32_t half = column_group % 2;
    // Lanes 0 to 7 name the rows of tokens 0 to 7 at columns 0, 8 to 15 at columns 8; the others those of the
    // next token tile.
    x = a.memory.x_offset + column_group / 2 * kXBlockBytes + half * (kGroupColumns * 2) +
        (lane / 16 * 8 + lane % 8) * kXRowBytes + lane / 8 % 2 * kPieceBytes;
    const uint32_t first_group = half * a.p.groups_per_block / 2 * 4;
    addresses.pieces += half * (tile_piece_bytes(kBits) / 2);
    addresses.scales += first_group, addresses.zeros += first_group / 2;
    keep(x), keep(addresses.pieces), keep(addresses.scales), keep(addresses.zeros);
  }

  __device__ __forceinline__ void load_x(uint32_t stage, int step, uint32_t (&b)[kTokenTiles][2]) const {
#pragma unroll
    for (int j = 0; j < kTokenTiles; j += 2) {
      uint32_t both[4];
      load_matrices(both, stage + x + j * kTokens * kXRowBytes + step * 32);
      b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
    }
  }

  __device__ __forceinline__ void load_words(uint32_t stage, int row_tile,
                                             uint32_t (&words)[kHalfWords<kBits>]) const {
    addresses.template load_words<2>(stage + row_tile * a.tile_bytes, 0, words);
  }

  // group: 0, or 1 with kSmallGroups. scale: of row g in the low half, of row g + 8 in the high. zero: bytes
  // likewise.
  __device__ __forceinline__ void load_group(uint32_t stage, int row_tile, int group, uint32_t& scale,
                                             uint32_t& zero) const {
    const uint32_t own = stage + row_tile * a.tile_bytes;
    scale = load_shared_u32(addresses.scales + own + group * 4);
    if constexpr (kHasZeros) zero = load_shared_u16(addresses.zeros + own + group * 2);
  }
};

// The sums of a warp's 64 rows, its columns and all tokens of the block. The first stage has come.
template <typename T, int kBits, int kTokenTiles, bool kHasZeros, bool kSmallGroups>
__device__ __forceinline__ void multiply_chunks(const TilesArguments& a, uint32_t ring, int num_chunks,
                                                TilesCopies<T, kBits, kTokenTiles>& copies, int row_group,
                                                int column_group, uint32_t lane,
                                                TileSums<kTokenTiles>& sums) {
  using Offset = ZeroOffset<T, kBits, 0>;
  const StageReader<T, kBits, kTokenTiles, kHasZeros, kSmallGroups> reader(a, row_group, column_group, lane);
  const uint32_t one = opaque(kOnePair<T>);
  uint32_t b[2][kTokenTiles][2];
  uint32_t words[kBlockTiles][kHalfWords<kBits>];
  uint32_t scale[kBlockTiles], zero[kBlockTiles];  // of the group under way
#pragma unroll
  for (int rt = 0; rt < kBlockTiles; ++rt) zero[rt] = (1u << (kBits - 1)) * 0x101u;

  uint32_t stage = ring;
  const uint32_t last_stage = ring + (a.stages - 1) * a.memory.stage_bytes;
  reader.load_x(stage, 0, b[0]);
#pragma unroll
  for (int rt = 0; rt < kBlockTiles; ++rt) {
    reader.load_words(stage, rt, words[rt]);
    reader.load_group(stage, rt, 0, scale[rt], zero[rt]);
  }
#pragma unroll 1
  for (int left = num_chunks - 1; left >= 0; --left) {
#pragma unroll
    for (int step = 0; step < kHalfSteps; ++step) {
      // This step's, before the next one's are loaded
      uint32_t own_words[kBlockTiles][kHalfWords<kBits>], own_scale[kBlockTiles], own_zero[kBlockTiles];
#pragma unroll
      for (int rt = 0; rt < kBlockTiles; ++rt) {
        own_scale[rt] = scale[rt], own_zero[rt] = zero[rt];
#pragma unroll
        for (int i = 0; i < kHalfWords<kBits>; ++i) own_words[rt][i] = words[rt][i];
      }

      if (step + 1 < kHalfSteps) {
        reader.load_x(stage, step + 1, b[(step + 1) % 2]);
        if (kSmallGroups && step == 1) {
#pragma unroll
          for (int rt = 0; rt < kBlockTiles; ++rt) reader.load_group(stage, rt, 1, scale[rt], zero[rt]);
        }
      } else {
        // All of this stage is in registers. When the next one has come, this one can be filled again. Behind
        // the last chunk it is read once more, to no purpose but to be the same code.
        wait_for_stages(a.stages - 2);
        __syncthreads();
        if (left > 0) stage = stage == last_stage ? ring : stage + a.memory.stage_bytes;
        reader.load_x(stage, 0, b[(step + 1) % 2]);
#pragma unroll
        for (int rt = 0; rt < kBlockTiles; ++rt) {
          reader.load_words(stage, rt, words[rt]);
          reader.load_group(stage, rt, 0, scale[rt], zero[rt]);
        }
        if (left >= a.stages) {
          copies.weights();
          copies.activations();
          copies.advance();
        }
        commit_async_copies();
      }

#pragma unroll
      for (int rt = 0; rt < kBlockTiles; ++rt) {
        const Offset offset[2] = {Offset(own_zero[rt] & 0xffu, 0), Offset(own_zero[rt] >> 8, 1)};
        uint32_t w[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const uint32_t both = permute_bytes(own_scale[rt], own_scale[rt], r % 2 == 0 ? 0x1010 : 0x3232);
          w[r] = scaled_pair<T, kBits>(own_words[rt], step, r, offset[r % 2], both, one);
        }
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          mma_m16n8k16<T>(sums[rt][j], w, b[step % 2][j][0], b[step % 2][j][1]);
        }
      }
    }
  }
}

// The sums of all warps as [column group][token][weight row].
template <int kTokenTiles>
__device__ __forceinline__ void stage_tile_sums(const TilesArguments& a, uint32_t staged, int row_group,
                                                int column_group, uint32_t lane,
                                                const TileSums<kTokenTiles>& sums) {
  const uint32_t row_bytes = a.memory.staged_row * 4;
  uint32_t target = staged + (column_group * kTokenTiles * kTokens + lane % 4 * 2) * row_bytes +
                    (row_group * kBlockRows + lane / 4) * 4;
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j, target += kTokens * row_bytes) {
#pragma unroll
    for (int rt = 0; rt < kBlockTiles; ++rt) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        store_shared_f32(target + c % 2 * row_bytes + (rt * kTileRows + c / 2 * 8) * 4, sums[rt][j][c]);
      }
    }
  }
}

// Eight neighbouring sums, those of the column groups added in their order.
template <int kTokenTiles>
__device__ __forceinline__ void add_column_groups(const TilesArguments& a, const float* first,
                                                  float (&values)[kUnit]) {
  read_sums(first, values);
#pragma unroll 1
  for (int group = 1; group < a.column_groups; ++group) {
    first += kTokenTiles * kTokens * a.memory.staged_row;
    float more[kUnit];
    read_sums(first, more);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) values[i] += more[i];
  }
}

// Writes the block's tile of out, or of its split's sums.
template <typename T, int kTokenTiles>
__device__ __forceinline__ void store_tile_sums(const TilesArguments& a, const TilesPlace& place,
                                                const float* staged) {
  const int64_t first_row = int64_t{place.row_block} * kBlockRows;
  const bool is_pair = a.p.gate_up && !a.leaves_sums;  // a unit of out takes the sums of 16 weight rows
  const int row_units_log2 = a.row_groups_log2 + log2_of(kBlockRows / kUnit) - (is_pair ? 1 : 0);
  const int64_t first_column = is_pair ? first_row / 2 : first_row;
  const int64_t columns = a.leaves_sums ? a.parts_row : a.p.gate_up ? a.p.N / 2 : a.p.N;
  const int threads = static_cast<int>(blockDim.x), units = place.tokens << row_units_log2;
#pragma unroll 1
  for (int u = static_cast<int>(threadIdx.x); u < units; u += threads) {
    const int token = u >> row_units_log2, unit = u - (token << row_units_log2);
    const int64_t n = first_column + unit * kUnit, m = int64_t{place.token} + token;
    const int count = static_cast<int>(min(columns - n, static_cast<int64_t>(kUnit)));
    if (count <= 0) continue;
    const float* own = staged + token * a.memory.staged_row;
    if (a.leaves_sums) {
      float values[kUnit];
      add_column_groups<kTokenTiles>(a, own + unit * kUnit, values);
      float* target = static_cast<float*>(a.p.scratch) + (blockIdx.z * a.p.M + m) * a.parts_row + n;
      *reinterpret_cast<float4*>(target) = make_float4(values[0], values[1], values[2], values[3]);
      *reinterpret_cast<float4*>(target + 4) = make_float4(values[4], values[5], values[6], values[7]);
    } else {
      write_unit<T>(a.p, a.wide, m, n, count, [&](int64_t row, float (&values)[kUnit]) {
        add_column_groups<kTokenTiles>(a, own + (row - first_row), values);
      });
    }
  }
}

template <typename T, int kBits, int kTokenTiles>
__global__ void __launch_bounds__(kMostTileWarps* kWarpLanes, tiles_blocks_per_sm(kTokenTiles, kBits))
    wna16_tiles_sm80_kernel(const __grid_constant__ TilesArguments a) {
  launch_dependents();

  // Roles
  const uint32_t ring = shared_address(dynamic_shared());
  const uint32_t lane = threadIdx.x % kWarpLanes;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / kWarpLanes), 0);  // uniform
  const int column_group = warp & (a.column_groups - 1), row_group = warp >> a.column_groups_log2;
  const TilesPlace place(a, kTokenTiles * kTokens);
  TilesCopies<T, kBits, kTokenTiles> copies(a, place, ring, row_group, column_group, lane);
  const int first_stages = min(a.stages, place.num_chunks);

  // Fill the ring. Where launches overlap, weights come before the wait; else stage by stage, so that the
  // first can be waited for alone.
  const bool is_early = kLaunchesOverlap && a.overlaps_producer && a.p.prefetch_weights;
  if (is_early) {
    TilesCopies<T, kBits, kTokenTiles> early = copies;
#pragma unroll 1
    for (int i = 0; i < first_stages; ++i, early.advance()) early.weights();
  }
  wait_for_producers();
#pragma unroll 1
  for (int i = 0; i < a.stages; ++i) {
    if (i < first_stages) {
      if (!is_early) copies.weights();
      copies.activations();
      copies.advance();
    }
    commit_async_copies();
  }
  copies.clear_missing_tokens();

  // Multiply. The first stage has come when all but the others have.
  float sums[kBlockTiles][kTokenTiles][4] = {};
  wait_for_stages(a.stages - 1);
  __syncthreads();
  const auto multiply = [&](auto has_zeros, auto small_groups) {
    multiply_chunks<T, kBits, kTokenTiles, has_zeros.value, small_groups.value>(
        a, ring, place.num_chunks, copies, row_group, column_group, lane, sums);
  };
  if (a.p.groups_per_block == kMaxGroups) {
    a.p.has_zeros ? multiply(std::true_type(), std::true_type())
                  : multiply(std::false_type(), std::true_type());
  } else {
    a.p.has_zeros ? multiply(std::true_type(), std::false_type())
                  : multiply(std::false_type(), std::false_type());
  }

  // Add up column groups, in order
  wait_async_copies<0>();
  __syncthreads();  // the stages have been read
  stage_tile_sums<kTokenTiles>(a, ring, row_group, column_group, lane, sums);
  __syncthreads();
  store_tile_sums<T, kTokenTiles>(a, place, reinterpret_cast<const float*>(dynamic_shared()));
}

template <typename T, int kBits, int kTokenTiles>
cudaError_t launch_tiles_of(const Wna16PanelsParams& p, const TilesConfig& config) {
  TilesArguments a{};
  a.p = p;
  a.tile_bytes = tile_bytes(p.bits, p.groups_per_block, p.has_zeros);
  a.block_bytes = block_bytes(p.bits, p.groups_per_block, p.has_zeros);
  a.memory = TilesMemory(config, a.block_bytes);
  a.chunks = EvenShares(column_chunks(p.column_blocks, config.column_groups), config.split_k);
  a.row_blocks = static_cast<int>(ceil_div(p.N, kBlockRows));
  a.row_groups = config.row_groups, a.row_groups_log2 = log2_of(config.row_groups);
  a.column_groups = config.column_groups, a.column_groups_log2 = log2_of(config.column_groups);
  a.stages = config.stages;
  a.blocks_log2 = a.column_groups_log2 - 1;
  a.whole_chunks = static_cast<int>(p.K / (config.column_groups * kGroupColumns));
  a.x_row_step =
      4 * config.row_groups;  // 32 * row_groups * column_groups threads, 8 * column_groups to a row
  a.parts_row = padded_rows(p.N);
  a.leaves_sums = config.split_k > 1;
  a.overlaps_producer = config.overlaps_producer;
  a.wide = wide({p.out, p.bias, p.residual},
                {p.out_stride * 2, p.residual != nullptr ? p.residual_stride * 2 : 0});

  LaunchOptions options;
  options.shared_bytes = a.memory.total;
  options.overlaps_producer = config.overlaps_producer;
  const dim3 grid(ceil_div(p.M, kTokenTiles * kTokens), ceil_div(a.row_blocks, config.row_groups),
                  config.split_k);
  const dim3 block(config.row_groups * config.column_groups * kWarpLanes);
  const cudaError_t launched = launch_with(options, wna16_tiles_sm80_kernel<T, kBits, kTokenTiles>, grid,
                                           block, p.device, p.stream, a);
  if (launched != cudaSuccess || !a.leaves_sums || p.leaves_sums) return launched;
  return launch_add_parts<T>(p, config.split_k, config.overlaps_producer);
}

template <typename T, int kBits, size_t kFirst = 0>
cudaError_t launch_tiles(const Wna16PanelsParams& p, const TilesConfig& config) {
  if constexpr (kFirst == std::size(kTileTokenTiles)) {
    return cudaErrorInvalidConfiguration;
  } else {
    if (config.token_tiles == kTileTokenTiles[kFirst]) {
      return launch_tiles_of<T, kBits, kTileTokenTiles[kFirst]>(p, config);
    }
    return launch_tiles<T, kBits, kFirst + 1>(p, config);
  }
}

}  // namespace
}  // namespace qsun
