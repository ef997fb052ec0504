// The planned kernel's way through its part of the work, and the copies that run ahead on it.
#pragma once

#include "attention/plan.cuh"
#include "attention/prefixes.h"
#include "attention/tiles.h"
#include "device/async_copy.cuh"
#include "device/dependent_launch.cuh"
#include "device/reduce.cuh"
#include "device/trap.cuh"
#include "device/vector.cuh"

namespace qsun {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

// Evaluated here: functions of the host have no place in a kernel.
template <int kHeadDim>
constexpr int kRowBytes = tile_row_bytes(kHeadDim);
template <int kHeadDim>
constexpr int kQuarterBytes = quarter_bytes(kHeadDim);

struct TilesArguments {
  PagedAttentionDecodeParams p;
  PlanPointers plan;  // of the line that this launch goes along
  PartialRows partial;
  PrefixPointers prefixes;  // null where none are shared
  PartialRows prefix_rows;
  int group;  // query heads a key head
  int rows;   // group * q_len, of a request; row j * group + h is query token j of the group's head h
  int reach;
  int window;  // of one query token
  int block_log2;
  int stages;
  float score_scale;  // what a product q k takes to become a score to the base 2, or the softcap's argument
  float softcap;      // to the base 2; 0: none
};

inline TilesArguments tiles_arguments(const PagedAttentionDecodeParams& p,
                                      const PagedAttentionDecodeConfig& config) {
  TilesArguments a{};
  a.p = p;
  a.plan = plan_pointers(p, config);
  a.partial = partial_rows(p, config);
  a.prefixes = prefix_pointers(p, config);
  a.prefix_rows = prefix_rows(p, config);
  a.group = static_cast<int>(p.num_q_heads / p.num_kv_heads);
  a.rows = query_rows(p);
  a.reach = reach(p);
  a.window = a.reach - static_cast<int>(p.q_len) + 1;
  while (int64_t{1} << a.block_log2 < p.block_size) ++a.block_log2;
  a.stages = config.stages;
  a.score_scale = p.softcap > 0.0f ? p.softmax_scale / p.softcap : p.softmax_scale * kLog2E;
  a.softcap = p.softcap * kLog2E;
  return a;
}

// A part's share of one request, or of one prefix and the requests that share it, under one key head.
struct Share {
  int item;
  int request;  // the item, or one of those that share the prefix
  int members;  // see PlanItem
  int head;
  int start;   // first unit of the item
  int tiles;   // of the item
  int length;  // positions of the item
  int first;   // first position attended to
  int begin;   // the share: quarters [begin, end), counted from position 0
  int end;
};

// What a launch goes along: requests of which none begins behind a shared prefix, so that its first position
// follows from its length and takes no register; requests of which some may; or the prefixes.
enum class Line { kWholeRequests, kRequests, kPrefixes };

// Reads what may be read before wait_for_producers() (see Walk::settled_end): past the L1, whose lines may be
// old.
template <typename Element>
__device__ __forceinline__ Element load_settled(const Element* source) {
  if constexpr (!kLaunchesOverlap) {
    return *source;
  } else if constexpr (sizeof(Element) % sizeof(int4) == 0) {
    constexpr int kWords = sizeof(Element) / sizeof(int4);
    int4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = load_past_l1(reinterpret_cast<const int4*>(source) + i);
    Element element;
    memcpy(&element, words, sizeof(element));
    return element;
  } else {
    return load_past_l1(source);
  }
}

// Goes through the shares of a part. kCutFirst: a request that goes on behind the part comes first, then the
// others in order: those that are cut are done early, and the launch does not end with a merge of their
// parts. It costs two registers. Where prefixes are shared all come in order: those behind a prefix leave
// their rows in the slot of the one that goes on.
template <Line kLine, bool kCutFirst>
struct Walk {
  static constexpr bool kIsPrefixes = kLine == Line::kPrefixes;

  const TilesArguments& a;
  int items;       // under a head
  int begin, end;  // units of the part; once the request that goes on is done, of the rest
  Share share;

  __device__ __forceinline__ bool is_done() const { return share.start >= end; }

  __device__ __forceinline__ bool cuts_first() const {
    return kCutFirst && (kLine == Line::kWholeRequests || a.prefixes.of_request == nullptr);
  }

  // The positions before this one may be read before wait_for_producers(), as PagedAttentionDecodeParams says
  // of follows_write. A prefix ends before the newest positions of all that share it.
  __device__ __forceinline__ int settled_end() const {
    return kIsPrefixes ? share.length : share.length - static_cast<int>(a.p.q_len);
  }

  __device__ __forceinline__ void enter(int item, int head, int start, const PlanItem& what) {
    share.item = item, share.head = head, share.start = start;
    share.request = kIsPrefixes ? what.request : item;
    share.members = kIsPrefixes ? what.members : 0;
    share.length = what.length;
    share.first = kLine == Line::kWholeRequests ? max(share.length - a.reach, 0) : what.first;
    trap_unless(share.length <= a.p.max_blocks << a.block_log2);
    share.tiles = tiles_of(share.first, share.length);
    // Units behind the item's own one are its tiles.
    const int first_tile = share.first / kTileTokens - (start + 1);
    share.begin = max((max(begin, start + 1) + first_tile) * kQuarters, share.first / kQuarterTokens);
    share.end = min((min(end, start + 1 + share.tiles) + first_tile) * kQuarters,
                    (share.length + kQuarterTokens - 1) / kQuarterTokens);
  }

  __device__ __forceinline__ void enter(const PartStart& start) {
    enter(start.item, start.head, start.start, start.what);
  }

  // Enters the part that begins with `first`. behind: the start of the part behind it, if there is one.
  __device__ __forceinline__ void begin_part(const PartStart& first, bool has_behind,
                                             const PartStart& behind) {
    const bool goes_on = cuts_first() && has_behind && behind.start > begin && behind.start < end;
    PartStart start = first;
    if (goes_on) start = behind;  // by value: a reference to either would put both into memory
    enter(start);
  }

  // kSettled: before wait_for_producers(), too.
  template <bool kSettled = false>
  __device__ __forceinline__ void advance() {
    PartStart next;
    next.start = share.start + 1 + share.tiles;
    if (cuts_first() && next.start > end && share.start > begin) {
      end = share.start;
      const PartStart* first = a.plan.parts + blockIdx.x;
      next = kSettled ? load_settled(first) : *first;
    } else {
      share.start = next.start;
      if (is_done()) return;
      const bool wraps = share.item + 1 == items;
      next.item = wraps ? 0 : share.item + 1;
      next.head = share.head + (wraps ? 1 : 0);
      const PlanItem* what = a.plan.items + next.item;
      next.what = kSettled ? load_settled(what) : *what;
    }
    enter(next);
  }
};

// A warp's way through its quarters, ahead of the multiplication.
template <typename T, int kHeadDim, Line kLine, bool kCutFirst>
struct Copies {
  static constexpr int kRow = kRowBytes<kHeadDim>;
  static constexpr int kPieces = kHeadDim * 2 / 16;  // of 16 bytes, of a row

  Walk<kLine, kCutFirst> walk;
  int warp, lane;
  uint64_t policy;
  int step;   // tiles of the share that are copied
  int block;  // lane i: the block of the quarter at step (step / 32 * 32 + i)

  __device__ __forceinline__ void fetch_blocks() {
    const Share& s = walk.share;
    const TilesArguments& a = walk.a;
    const int quarter = s.begin + (step + lane) * kQuarters + warp;
    block = 0;
    if (quarter >= s.end) return;
    block = load_settled(a.p.block_table + s.request * a.p.block_table_stride +
                         (quarter * kQuarterTokens >> a.block_log2));
    trap_unless(block >= 0 && block < a.p.num_blocks);
  }

  // Goes on to the share that holds the next tile.
  __device__ __forceinline__ void seek() {
    while (!walk.is_done() && walk.share.begin + step * kQuarters >= walk.share.end) {
      walk.template advance<true>();
      step = 0;
    }
  }

  // Whether next() may be called before wait_for_producers().
  __device__ __forceinline__ bool next_is_settled() {
    seek();
    const int quarter = walk.share.begin + step * kQuarters + warp;
    return walk.is_done() || quarter >= walk.share.end ||
           (quarter + 1) * kQuarterTokens <= walk.settled_end();
  }

  // Copies the next tile's quarter to `target`: keys, then values.
  __device__ __forceinline__ void next(uint32_t target) {
    seek();
    if (walk.is_done()) return;
    const Share& s = walk.share;
    const TilesArguments& a = walk.a;
    if (step % kWarp == 0) fetch_blocks();
    const int quarter = s.begin + step * kQuarters + warp;
    const int64_t in_cache = __shfl_sync(kAllLanes, block, step % kWarp);
    ++step;
    if (quarter >= s.end) return;
    const int token = quarter * kQuarterTokens;
    const int64_t row =
        ((in_cache * a.p.num_kv_heads + s.head) << a.block_log2) + (token & ((1 << a.block_log2) - 1));
    const T* k = static_cast<const T*>(a.p.k_cache) + row * kHeadDim + lane * 8;
    const T* v = static_cast<const T*>(a.p.v_cache) + row * kHeadDim + lane * 8;
    if (token >= s.first && token + kQuarterTokens <= s.length) {
#pragma unroll
      for (int i = 0; i < kQuarterTokens * kPieces / kWarp; ++i) {
        copy_async_streamed(target + offset_of(i), k + i * kWarp * 8, policy);
      }
#pragma unroll
      for (int i = 0; i < kQuarterTokens * kPieces / kWarp; ++i) {
        copy_async_streamed(target + kQuarterTokens * kRow + offset_of(i), v + i * kWarp * 8, policy);
      }
    } else {
      // Zeros for positions that are not attended to: what lies there may be anything.
#pragma unroll 1
      for (int i = 0; i < kQuarterTokens * kPieces / kWarp; ++i) {
        const int position = token + (i * kWarp + lane) / kPieces;
        const int bytes = position >= s.first && position < s.length ? 16 : 0;
        const uint32_t place = target + offset_of(i);
        copy_async_streamed_or_zero(place, k + i * kWarp * 8, bytes, policy);
        copy_async_streamed_or_zero(place + kQuarterTokens * kRow, v + i * kWarp * 8, bytes, policy);
      }
    }
  }

  // Where this lane's i-th piece goes.
  __device__ __forceinline__ uint32_t offset_of(int i) const {
    if constexpr (kWarp % kPieces == 0) {  // i times a constant, then: no arithmetic is left
      return lane / kPieces * kRow + lane % kPieces * 16 + i * (kWarp / kPieces * kRow);
    } else {
      const int piece = i * kWarp + lane;
      return piece / kPieces * kRow + piece % kPieces * 16;
    }
  }
};

// Waits for the oldest of a full ring's stages. A chain of comparisons: a switch would become an indirect
// jump.
__device__ __forceinline__ void wait_for_stage(int stages) {
  if (stages == 2) {
    wait_async_copies<1>();
  } else if (stages == 3) {
    wait_async_copies<2>();
  } else {
    wait_async_copies<3>();
  }
}

}  // namespace
}  // namespace qsun
