// Attention of a few query rows over paged keys and values: they stream once from memory through the tensor
// cores. The work is cut by the plan (plan.h); every block has one part of it, and goes through the requests
// in it one after another.
//
//   positions of a request    | tile of 64            | tile of 64            | ..
//   warps                     | 0   | 1   | 2   | 3   | 0   | 1   | 2   | 3   |      16 positions each
//
// A warp copies its quarter of every tile, keys and values, into a ring of its own in shared memory
// (cp.async), several tiles ahead and on into the next request, so that neither the end of a request nor
// anything that another warp does stops the copies.
//
// Queries are the tensor core's 16 rows: the q_len * (heads of the group) rows that share a key head, kept in
// registers. scores = q k.T takes keys as operand B as they lie; their exponentials go from the accumulator
// to operand A in registers; values as operand B are transposed on their way from shared memory.
//
//   up to 16 rows    a warp multiplies the quarters that it copied. At the end of a request four warps have
//                    softmax sums over different positions, merged through shared memory in their order.
//   up to 128 rows   each warp has 16 rows of its own and multiplies all four quarters (kSharesTiles): two
//                    barriers a tile, nothing to merge. With more than 64 rows four more warps do not copy.
//
// A request that lies in one part is stored at once. Else each part leaves its rows in scratch and counts up;
// the block that comes last puts them together in the order of the parts: no float is added atomically, and
// results repeat bit for bit.
#pragma once

#include "attention/results.cuh"
#include "device/arrival.cuh"
#include "device/dependent_launch.cuh"
#include "runtime/launch.h"

namespace qsun {
namespace {

// Stores a warp's own 16 rows, pairs of neighbours in a lane.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_rows(const Results<T, kHeadDim>& results,
                                           const QueryRows<kHeadDim>& rows, int first_row, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + half * 8 + lane / 4;
    if (row >= results.a.rows) continue;
    const float factor = results.end_row(row, rows.maximum[half], rows.sum[half], lane % 4 == 0);
    if (results.is_whole()) {
      T* target = results.target(row) + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        *reinterpret_cast<uint32_t*>(target + i * 8) =
            round_pair<T>(rows.out[i][half * 2] * factor, rows.out[i][half * 2 + 1] * factor);
      }
    } else {
      float* target = results.partial_target(row) + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        *reinterpret_cast<float2*>(target + i * 8) =
            make_float2(rows.out[i][half * 2] * factor, rows.out[i][half * 2 + 1] * factor);
      }
    }
  }
}

// A warp's rows on their way to the others: 32 bytes more than their data, so that the eight rows of a store
// meet different banks.
template <int kHeadDim>
constexpr int kOutRowBytes = kHeadDim * 4 + 32;

// Lays a warp's rows out at `target`, their maxima and sums at `statistics`.
template <int kHeadDim>
__device__ __forceinline__ void lay_out(const QueryRows<kHeadDim>& rows, int num_rows, uint32_t target,
                                        uint32_t statistics, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 8 + lane / 4;
    if (row >= num_rows) continue;
    if (lane % 4 == 0) {
      store_shared_f32(statistics + row * 8, rows.maximum[half]);
      store_shared_f32(statistics + row * 8 + 4, rows.sum[half]);
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      const uint32_t place = target + row * kOutRowBytes<kHeadDim> + i * 32 + lane % 4 * 8;
      store_shared_f32(place, rows.out[i][half * 2]);
      store_shared_f32(place + 4, rows.out[i][half * 2 + 1]);
    }
  }
}

// Merges the warps' rows that lie a quarter apart from `source` on, in the order of the warps, and stores
// them.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_merged(const Results<T, kHeadDim>& results, uint32_t source,
                                             uint32_t statistics, int thread) {
#pragma unroll 1
  for (int i = thread; i < results.a.rows * (kHeadDim / 4); i += kQuarters * kWarp) {
    const int row = i / (kHeadDim / 4), element = i % (kHeadDim / 4) * 4;
    float maximum = -INFINITY;
#pragma unroll
    for (int w = 0; w < kQuarters; ++w) {
      maximum = fmaxf(maximum, load_shared_f32(statistics + (w * kTileRows + row) * 8));
    }
    const float reference = reference_of(maximum);
    float sum = 0.0f;
    float values[4] = {};
#pragma unroll
    for (int w = 0; w < kQuarters; ++w) {
      const uint32_t of_warp = statistics + (w * kTileRows + row) * 8;
      const float weight = exp2f(load_shared_f32(of_warp) - reference);
      sum += weight * load_shared_f32(of_warp + 4);
      const uint4 words =
          load_shared_u128(source + w * kQuarterBytes<kHeadDim> + row * kOutRowBytes<kHeadDim> + element * 4);
      values[0] += weight * __uint_as_float(words.x);
      values[1] += weight * __uint_as_float(words.y);
      values[2] += weight * __uint_as_float(words.z);
      values[3] += weight * __uint_as_float(words.w);
    }
    const float factor = results.end_row(row, maximum, sum, element == 0);
#pragma unroll
    for (int e = 0; e < 4; ++e) values[e] *= factor;
    if (results.is_whole()) {
      *reinterpret_cast<uint2*>(results.target(row) + element) =
          make_uint2(round_pair<T>(values[0], values[1]), round_pair<T>(values[2], values[3]));
    } else {
      *reinterpret_cast<float4*>(results.partial_target(row) + element) =
          make_float4(values[0], values[1], values[2], values[3]);
    }
  }
}

// kIsPrefixes: goes along the line of prefixes (prefixes.h), whose rows are those of several requests, and
// leaves all results in scratch.
template <typename T, int kHeadDim, int kWarps, bool kSharesTiles, bool kIsPrefixes>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    paged_attention_tiles_kernel(const __grid_constant__ TilesArguments a) {
  constexpr int kRow = kRowBytes<kHeadDim>;
  constexpr int kQuarter = kQuarterBytes<kHeadDim>;
  constexpr int kStage = kQuarters * kQuarter;
  static_assert(kTileRows * kOutRowBytes<kHeadDim> <= kQuarter);
  static_assert(kSharesTiles || kWarps == kQuarters);
  static_assert(!kIsPrefixes || (kSharesTiles && kWarps * kTileRows == kPrefixRows));
  // Quarters at once. A prefix has whole tiles alone, and many rows for each: what a step costs besides its
  // products counts. With wider heads the scores of a whole tile do not fit into the registers.
  constexpr int kSpan = kIsPrefixes && kHeadDim <= 128 ? kQuarters : 1;
  launch_dependents();

  // Roles
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp, lane = thread % kWarp;
  const bool is_copying = kWarps == kQuarters || warp < kQuarters;
  const int first_row = kSharesTiles ? warp * kTileRows : 0;
  const uint32_t statistics = shared_address(dynamic_shared());
  const uint32_t places = statistics + kStatisticsBytes;
  const uint32_t is_last_place = places + kRowPlacesBytes;
  const uint32_t ring = statistics + kTilesHeadBytes;
  const uint32_t ring_end = ring + a.stages * kStage;
  // This lane's addresses in a quarter, for the loads of operands
  const uint32_t key_row = (lane / 16 * 8 + lane % 8) * kRow + lane / 8 % 2 * 16;
  const uint32_t value_row = (kQuarterTokens + lane / 8 % 2 * 8 + lane % 8) * kRow + lane / 16 * 16;
  store_row_places<kIsPrefixes>(a, places, thread, kWarps * kWarp);
  const bool starts_early = kLaunchesOverlap && a.p.follows_write;
  if (!starts_early) wait_for_producers();

  // Part
  const int part = static_cast<int>(blockIdx.x);
  const PlanHeader plan = load_settled(a.plan.header);
  // Undefined where a part has nothing
  const PartStart start = load_settled(a.plan.parts + part);
  const PartStart behind = load_settled(a.plan.parts + min(part + 1, static_cast<int>(gridDim.x) - 1));
  if (part >= plan.used) {
    // That a launch has ended is to say that those before it have: one block is enough for that.
    if (part == 0) wait_for_producers();
    return;
  }
  const int items = kIsPrefixes ? plan.items : static_cast<int>(a.p.batch);
  constexpr Line kLine = kIsPrefixes ? Line::kPrefixes : Line::kRequests;
  // What the launch for prefixes leaves is merged by the next one; the widest heads have no register left.
  constexpr bool kCutFirst = !kIsPrefixes && kHeadDim <= 128;
  Walk<kLine, kCutFirst> walk{a, items, part * plan.share, start.end, {}};
  walk.begin_part(start, part + 1 < plan.used, behind);
  Copies<T, kHeadDim, kLine, kCutFirst> copies{walk, warp, lane, evict_first_policy(), 0, 0};
  int missing = a.stages;  // stages to copy before the next product: at first all, then one
  uint32_t stage = ring;   // to copy to; once it is copied to, the one behind it is the oldest
  const auto copy_step = [&] {
    if (is_copying) copies.next(stage + warp * kQuarter);
    commit_async_copies();
    stage += kStage;
    if (stage == ring_end) stage = ring;
  };
  if (starts_early) {
    // What is older than the launch in front, up to the first step that is not, and all but one stage
#pragma unroll 1
    for (; missing > 1 && is_copying && copies.next_is_settled(); --missing) copy_step();
    wait_for_producers();
  }
  __syncthreads();

#pragma unroll 1
  for (; !walk.is_done(); walk.advance()) {
    const Share& share = walk.share;
    Results<T, kHeadDim> results{a, share, places, part, part, part};
    if (!kIsPrefixes && share.tiles == 0) {
      // The part with the request's own unit says so.
      if (share.start >= walk.begin) store_nothing(results, thread, kWarps * kWarp);
      continue;
    }
    if (share.begin >= share.end) continue;

    // Multiply
    QueryRows<kHeadDim> rows;
    begin_rows<T, kIsPrefixes>(rows, a, share, places, first_row, lane);
    const bool has_rows = first_row < rows_of<kIsPrefixes>(a, share);
    const auto attend_to = [&](int quarter, uint32_t at) {
      const int token = quarter * kQuarterTokens;
      const bool masked = !kIsPrefixes && is_masked(a, share, token);  // all rows see all of a prefix
      attend<T, kSpan>(rows, a, at + key_row, at + value_row, token, masked, lane);
    };
#pragma unroll 1
    for (int quarter = share.begin; quarter < share.end; quarter += kQuarters) {
      const auto meet = [] {
        if constexpr (kSharesTiles) {
          __syncthreads();
        } else {
          __syncwarp();
        }
      };
      meet();  // all have read the stage that is copied to
#pragma unroll 1
      do {
        copy_step();
      } while (--missing > 0);
      missing = 1;
      wait_for_stage(a.stages);
      meet();  // all copies of the oldest stage can be seen
      if constexpr (kSharesTiles) {
        if (has_rows) {
#pragma unroll 1
          for (int i = 0; i < min(kQuarters, share.end - quarter); i += kSpan) {
            attend_to(quarter + i, stage + i * kQuarter);
          }
        }
      } else {
        if (quarter + warp < share.end) attend_to(quarter + warp, stage + warp * kQuarter);
      }
    }
    end_rows<T>(rows);

    // Store
    if constexpr (kIsPrefixes) {
      store_prefix_rows<T>(a, share, part, rows, first_row, lane);
      continue;
    }
    const int first_unit = share.start + 1, last_unit = share.start + share.tiles;
    if (first_unit < walk.begin || last_unit >= walk.end) {
      results.first_part = first_unit / plan.share;
      results.last_part = last_unit / plan.share;
    }
    if constexpr (kSharesTiles) {
      store_rows(results, rows, first_row, lane);
    } else {
      // Warps meet in the stage that they read last, which is copied to only after this.
      __syncwarp();
      lay_out(rows, a.rows, stage + warp * kQuarter, statistics + warp * kTileRows * 8, lane);
      __syncthreads();
      store_merged(results, stage, statistics, thread);
      __syncthreads();
    }
    if (results.is_whole()) continue;

    // Parts: the last one to come puts them together
    __syncthreads();
    int32_t* counter = a.plan.counters + share.head * a.p.batch + share.request;
    const int others = results.last_part - results.first_part;
    if (thread == 0) {
      const bool is_last = others == 0 || arrive_in_order(counter) == others;
      store_shared_u32(is_last_place, is_last ? 1 : 0);
    }
    __syncthreads();
    if (load_shared_u32(is_last_place) != 0) {
      results.merge(warp, kWarps, lane);
      if (thread == 0 && others > 0) *counter = 0;
    }
  }
  wait_async_copies<0>();
}

template <typename T, int kHeadDim, int kWarps, bool kSharesTiles, bool kIsPrefixes = false>
cudaError_t launch_instance(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& config,
                            const TilesArguments& a) {
  LaunchOptions options;
  options.shared_bytes = tiles_shared_bytes(kHeadDim, config.stages);
  options.overlaps_producer = config.overlaps_producer;
  return launch_with(options, paged_attention_tiles_kernel<T, kHeadDim, kWarps, kSharesTiles, kIsPrefixes>,
                     dim3(kIsPrefixes ? config.prefix_parts : config.parts), dim3(kWarps * kWarp), p.device,
                     p.stream, a);
}

template <typename T, int kHeadDim>
cudaError_t launch_tiles(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& config) {
  const TilesArguments a = tiles_arguments(p, config);
  if (p.prefixes != nullptr) {
    TilesArguments of_prefixes = a;
    of_prefixes.plan = a.prefixes.line;
    const cudaError_t error = launch_instance<T, kHeadDim, 4, true, true>(p, config, of_prefixes);
    if (error != cudaSuccess) return error;
  }
  if (config.warps == 8) return launch_instance<T, kHeadDim, 8, true>(p, config, a);
  if (a.rows > kTileRows) return launch_instance<T, kHeadDim, 4, true>(p, config, a);
  return launch_instance<T, kHeadDim, 4, false>(p, config, a);
}

}  // namespace
}  // namespace qsun
