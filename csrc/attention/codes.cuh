// Attention of a few query rows over paged keys and values that are codes of 8 or 4 bits. Plan, ring, merge
// of parts and use of the walk are those of the kernel in tiles.cuh; what differs follows from the time that
// a token may take, a half or a quarter of that of 16-bit values:
//
//   slices    a warp copies and multiplies 32 tokens at once, not 16: what a step costs besides its products
//             (waiting, addresses, maxima, moving the result to a new maximum) is paid half as often
//   the ring  holds codes as they lie in the cache, and their scales beside them; they become operands in
//             registers (codes_layout.cuh)
//   operands  codes are operand A, query rows operand B (codes_rows.cuh): 8 rows fill a product
//   floats    float16 inside whatever the dtype of q: one kernel serves both
//
//   up to 8, 16 rows  a warp multiplies the slices that it copied; at the end of a request four warps are
//   merged up to 128 rows    each of eight warps has 16 rows of its own and multiplies all four slices
//   (kSharesTiles);
//                     four warps copy
#pragma once

#include "attention/codes_rows.cuh"
#include "attention/results.cuh"
#include "device/arrival.cuh"
#include "device/dependent_launch.cuh"
#include "runtime/launch.h"

namespace qsun {
namespace {

// Few registers are free here, since several blocks share a multiprocessor.
template <int kHeadDim>
constexpr int kCodesAhead = kHeadDim > 64 ? (kLaunchesOverlap ? 3 : 2) : 8;

// Prefixes of codes are not shared.
template <typename T, int kHeadDim>
using CodesResults = Results<T, kHeadDim, false, kCodesAhead<kHeadDim>>;

// The first element of head_dim of this lane's results i, i + 1 of CodesRows::out.
template <typename Layout>
__device__ __forceinline__ int element_of_result(int i, int lane) {
  constexpr int kResults = Layout::kValueElements / 2;  // of a load
  return (i / kResults * 8 + lane / 4) * Layout::kValueElements + i % kResults * 2;
}

// Stores a warp's own rows, four neighbours at a time.
template <typename Layout, typename T, int kHeadDim, int kTiles>
__device__ __forceinline__ void store_rows(const CodesResults<T, kHeadDim>& results,
                                           const CodesRows<kHeadDim, kTiles>& rows, int first_row,
                                           float value_scale, int lane) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = first_row + n * kHeadTile + lane % 4 * 2 + j;
      if (row >= results.a.rows) continue;
      const float factor =
          results.end_row(row, rows.maximum[n][j], rows.sum[n][j], lane / 4 == 0) * value_scale;
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; i += 2) {
        const float values[4] = {rows.out[n][i][j] * factor, rows.out[n][i][2 + j] * factor,
                                 rows.out[n][i + 1][j] * factor, rows.out[n][i + 1][2 + j] * factor};
        const int element = element_of_result<Layout>(i, lane);
        if (results.is_whole()) {
          *reinterpret_cast<uint2*>(results.target(row) + element) =
              make_uint2(round_pair<T>(values[0], values[1]), round_pair<T>(values[2], values[3]));
        } else {
          *reinterpret_cast<float4*>(results.partial_target(row) + element) =
              make_float4(values[0], values[1], values[2], values[3]);
        }
      }
    }
  }
}

// A row on its way to the other warps: 16 bytes more than its data, against conflicts of banks.
template <int kHeadDim>
constexpr int kCodesOutBytes = kHeadDim * 4 + 16;

// Lays tile n of a warp's rows out at `target`, their maxima and sums at `statistics`.
template <typename Layout, int kHeadDim, int kTiles>
__device__ __forceinline__ void lay_out(const CodesRows<kHeadDim, kTiles>& rows, int n, uint32_t target,
                                        uint32_t statistics, int lane) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = lane % 4 * 2 + j;
    if (lane / 4 == 0) {
      store_shared_f32(statistics + row * 8, rows.maximum[n][j]);
      store_shared_f32(statistics + row * 8 + 4, rows.sum[n][j]);
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; i += 2) {
      const uint4 values = {__float_as_uint(rows.out[n][i][j]), __float_as_uint(rows.out[n][i][2 + j]),
                            __float_as_uint(rows.out[n][i + 1][j]),
                            __float_as_uint(rows.out[n][i + 1][2 + j])};
      store_shared_u128(target + row * kCodesOutBytes<kHeadDim> + element_of_result<Layout>(i, lane) * 4,
                        values);
    }
  }
}

// Merges the warps' rows that lie a slice apart from `source` on, in the order of the warps, and stores them
// as rows from first_row on.
template <int kSlice, typename T, int kHeadDim>
__device__ __forceinline__ void store_merged(const CodesResults<T, kHeadDim>& results, int first_row,
                                             float value_scale, uint32_t source, uint32_t statistics,
                                             int thread) {
  const int num_rows = min(results.a.rows - first_row, kHeadTile);
#pragma unroll 1
  for (int i = thread; i < num_rows * (kHeadDim / 4); i += kSlices * kWarp) {
    const int row = i / (kHeadDim / 4), element = i % (kHeadDim / 4) * 4;
    float maximum = -INFINITY;
#pragma unroll
    for (int w = 0; w < kSlices; ++w) {
      maximum = fmaxf(maximum, load_shared_f32(statistics + (w * kHeadTile + row) * 8));
    }
    const float reference = reference_of(maximum);
    float sum = 0.0f;
    float values[4] = {};
#pragma unroll
    for (int w = 0; w < kSlices; ++w) {
      const uint32_t of_warp = statistics + (w * kHeadTile + row) * 8;
      const float weight = fast_exp2(load_shared_f32(of_warp) - reference);
      sum += weight * load_shared_f32(of_warp + 4);
      const uint4 words =
          load_shared_u128(source + w * kSlice + row * kCodesOutBytes<kHeadDim> + element * 4);
      values[0] += weight * __uint_as_float(words.x);
      values[1] += weight * __uint_as_float(words.y);
      values[2] += weight * __uint_as_float(words.z);
      values[3] += weight * __uint_as_float(words.w);
    }
    const float factor = results.end_row(first_row + row, maximum, sum, element == 0) * value_scale;
#pragma unroll
    for (int e = 0; e < 4; ++e) values[e] *= factor;
    if (results.is_whole()) {
      *reinterpret_cast<uint2*>(results.target(first_row + row) + element) =
          make_uint2(round_pair<T>(values[0], values[1]), round_pair<T>(values[2], values[3]));
    } else {
      *reinterpret_cast<float4*>(results.partial_target(first_row + row) + element) =
          make_float4(values[0], values[1], values[2], values[3]);
    }
  }
}

// Calls function(TypeTag<T>()) with the dtype of q, one of 16 bits.
template <typename Function>
__device__ __forceinline__ void with_half_type(DType dtype, Function&& function) {
  if (dtype == DType::kBFloat16) {
    function(TypeTag<__nv_bfloat16>());
  } else {
    function(TypeTag<__half>());
  }
}

// Evaluated here: functions of the host have no place in a kernel.
template <DType kCodes, int kHeadDim, int kRows>
constexpr CodesShape kCodesShape = codes_shape(kCodes, kHeadDim, kRows);

// kRows: a number of rows of the shape that it is compiled for.
template <DType kCodes, int kHeadDim, int kRows>
__global__ void __launch_bounds__((kCodesShape<kCodes, kHeadDim, kRows>.warps * kWarp),
                                  (kCodesShape<kCodes, kHeadDim, kRows>.blocks_per_sm))
    paged_attention_codes_kernel(const __grid_constant__ TilesArguments a) {
  constexpr int kWarps = kCodesShape<kCodes, kHeadDim, kRows>.warps;
  constexpr int kTiles = kCodesShape<kCodes, kHeadDim, kRows>.tiles;
  using Layout = CodesLayout<kCodes, kHeadDim>;
  constexpr bool kSharesTiles = kWarps > kSlices;
  constexpr bool kCutFirst =
      kCodesShape<kCodes, kHeadDim, kRows>.blocks_per_sm < 4;  // else no register is left
  constexpr int kStage = kSlices * Layout::kSlice;
  static_assert(kHeadTile * kCodesOutBytes<kHeadDim> <= Layout::kSlice);
  launch_dependents();

  // Roles
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp, lane = thread % kWarp;
  const bool is_copying = kWarps == kSlices || warp < kSlices;
  const int first_row = kSharesTiles ? warp * kTiles * kHeadTile : 0;
  const bool has_rows = first_row < a.rows;
  const uint32_t statistics = shared_address(dynamic_shared());
  const uint32_t places = statistics + kStatisticsBytes;
  const uint32_t is_last_place = places + kRowPlacesBytes;
  const uint32_t ring = statistics + kTilesHeadBytes;
  const uint32_t ring_end = ring + a.stages * kStage;
  const auto addresses = SliceAddresses::of<Layout>(lane);
  store_row_places<false>(a, places, thread, kWarps * kWarp);
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
  Walk<Line::kWholeRequests, kCutFirst> walk{
      a, static_cast<int>(a.p.batch), part * plan.share, start.end, {}};
  walk.begin_part(start, part + 1 < plan.used, behind);
  CodesCopies<kCodes, kHeadDim, kCutFirst> copies{walk, warp, lane, evict_first_policy(), 0, 0};
  int missing = a.stages;  // stages to copy before the next product: at first all, then one
  uint32_t stage = ring;   // to copy to; once it is copied to, the one behind it is the oldest
  const auto copy_step = [&] {
    if (is_copying) copies.next(stage + warp * Layout::kSlice);
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
    if (share.tiles == 0) {
      // The part with the request's own unit says so.
      if (share.start >= walk.begin) {
        with_half_type(a.p.dtype, [&](auto tag) {
          using T = typename decltype(tag)::type;
          store_nothing(CodesResults<T, kHeadDim>{a, share, places, part, part, part}, thread,
                        kWarps * kWarp);
        });
      }
      continue;
    }
    if (share.begin >= share.end) continue;

    // Multiply
    CodesRows<kHeadDim, kTiles> rows;
    begin_rows<kCodes>(rows, a, share, places, first_row, lane);
#pragma unroll 1
    for (int quarter = share.begin; quarter < share.end; quarter += kStepQuarters) {
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
      // One call: the products are most of the code.
      int slice = kSharesTiles ? 0 : warp;
      const int last_slice = kSharesTiles ? (has_rows ? kSlices - 1 : -1) : warp;
#pragma unroll 1
      for (; slice <= last_slice; ++slice) {
        const int at = quarter + slice * kSliceQuarters;
        if (at >= share.end) break;
        attend<kCodes>(rows, a, share, addresses, stage + slice * Layout::kSlice, at * kQuarterTokens, lane);
      }
    }
    end_rows(rows);

    // Store
    const int first_unit = share.start + 1, last_unit = share.start + share.tiles;
    int first_part = part, last_part = part;
    if (first_unit < walk.begin || last_unit >= walk.end) {
      first_part = first_unit / plan.share;
      last_part = last_unit / plan.share;
    }
    const float value_scale = kUnlift * (a.p.kv_scales == KvScales::kTensor ? *a.p.v_scale : 1.0f);
    const auto with_results = [&](auto&& function) {
      with_half_type(a.p.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        function(CodesResults<T, kHeadDim>{a, share, places, first_part, last_part, part});
      });
    };
    if constexpr (kSharesTiles) {
      with_results(
          [&](const auto& results) { store_rows<Layout>(results, rows, first_row, value_scale, lane); });
    } else {
      // Warps meet in the stage that they read last, which is copied to only after this.
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (n * kHeadTile >= a.rows) break;
        __syncwarp();
        lay_out<Layout>(rows, n, stage + warp * Layout::kSlice, statistics + warp * kHeadTile * 8, lane);
        __syncthreads();
        with_results([&](const auto& results) {
          store_merged<Layout::kSlice>(results, n * kHeadTile, value_scale, stage, statistics, thread);
        });
        __syncthreads();
      }
    }
    if (first_part == last_part) continue;

    // Parts: the last one to come puts them together
    __syncthreads();
    int32_t* counter = a.plan.counters + share.head * a.p.batch + share.request;
    if (thread == 0) {
      store_shared_u32(is_last_place, arrive_in_order(counter) == last_part - first_part ? 1 : 0);
    }
    __syncthreads();
    if (load_shared_u32(is_last_place) != 0) {
      with_results([&](const auto& results) { results.merge(warp, kWarps, lane); });
      if (thread == 0) *counter = 0;
    }
  }
  wait_async_copies<0>();
}

template <DType kCodes, int kHeadDim, int kRows>
cudaError_t launch_instance(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& config) {
  LaunchOptions options;
  options.shared_bytes = codes_shared_bytes(kCodes, kHeadDim, config.stages);
  options.overlaps_producer = config.overlaps_producer;
  return launch_with(options, paged_attention_codes_kernel<kCodes, kHeadDim, kRows>, dim3(config.parts),
                     dim3(config.warps * kWarp), p.device, p.stream, tiles_arguments(p, config));
}

template <DType kCodes, int kHeadDim>
cudaError_t launch_head_dim(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& config) {
  const int rows = query_rows(p);
  if (rows <= kHeadTile) return launch_instance<kCodes, kHeadDim, kHeadTile>(p, config);
  if constexpr (codes_shape(kCodes, kHeadDim, 2 * kHeadTile).warps == 4) {
    if (rows <= 2 * kHeadTile) return launch_instance<kCodes, kHeadDim, 2 * kHeadTile>(p, config);
  }
  return launch_instance<kCodes, kHeadDim, max_codes_rows(kHeadDim)>(p, config);
}

template <DType kCodes>
cudaError_t launch_codes(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& config) {
  switch (p.head_dim) {
    case 64:
      return launch_head_dim<kCodes, 64>(p, config);
    case 128:
      return launch_head_dim<kCodes, 128>(p, config);
    default:
      return launch_head_dim<kCodes, 256>(p, config);
  }
}

}  // namespace
}  // namespace qsun
