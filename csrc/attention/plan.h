// The plan of the planned attention kernel: how a batch's work is cut into parts, of equal size or whole.
//
// The work is a line of items under every key head. An item is a request; in the line of shared prefixes
// (prefixes.h) it is a prefix and the requests that share it. It is one unit for its own sake (queries to
// load, a result to store) and one for every tile of 64 positions that it attends to. All units stand in one
// line, by key head, then item; the parts are equal pieces of it, a block of the grid each:
//
//   units    | head 0                                | head 1                                | ..
//            | request 0   | request 1          | .. | request 0   | ..
//            | 1 | t t t t | 1 | t t t t t t t t | .. |
//   parts    | part 0            | part 1            | part 2            | ..
//
// A request that parts share has to be merged, which a few requests of about one length, one for most of the
// multiprocessors, do better without: then every part has one item, whole, and items stand in the line as far
// apart as the longest takes. That is so where there are parts for all items and the longest is no longer
// than twice an equal part and PagedAttentionDecodeConfig::whole_slack: while few multiprocessors read, each
// gets more of the memory. In the line of prefixes all parts are equal.
//
// The plan lies in one piece of device memory, in 32-bit words:
//
//   header    4          see PlanHeader
//   parts     8 * parts  see PartStart
//   items     4 * batch  see PlanItem
//   counters  batch * num_kv_heads, zero between launches: parts of a request that have left their result
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "qsun/paged_attention_decode.h"

namespace qsun {

constexpr int kTileTokens = 64;
constexpr int kMaxPlannedBatch = 32768;  // starts of the items lie in the planning block's shared memory
constexpr int64_t kMaxTokens = 1 << 30;  // positions count in 32 bits on the device
constexpr int64_t kMaxUnits = 1 << 30;   // and so do units

// Part p owns units from p * share on, up to its end.
struct alignas(16) PlanHeader {
  int total;  // units, with what lies between whole items
  int share;
  int used;   // parts that have any
  int items;  // under a head
};

// Positions [first, length) of a request, as its row of the block table places them. members: in the line of
// prefixes the requests that share it, first * 256 + count in their order (PrefixPointers::order); else 0.
struct alignas(16) PlanItem {
  int first;
  int length;
  int request;
  int members;
};

// Where part p begins: in the units of `item` under `head`, whose first unit is `start`; the unit behind its
// last one; and the item itself, which the part then need not wait for. Undefined for parts from `used` on.
struct alignas(16) PartStart {
  int item;
  int head;
  int start;
  int end;
  PlanItem what;
};

// A plan's pieces in memory.
struct PlanPointers {
  PlanHeader* header;
  PartStart* parts;
  PlanItem* items;
  int32_t* counters;  // (num_kv_heads, batch)
};

inline PlanPointers plan_pointers(const PagedAttentionDecodeParams& p,
                                  const PagedAttentionDecodeConfig& config) {
  PlanPointers plan;
  plan.header = static_cast<PlanHeader*>(p.plan);
  plan.parts = reinterpret_cast<PartStart*>(plan.header + 1);
  plan.items = reinterpret_cast<PlanItem*>(plan.parts + config.parts);
  plan.counters = reinterpret_cast<int32_t*>(plan.items + p.batch);
  return plan;
}

inline int64_t plan_bytes(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& config) {
  return static_cast<int64_t>(sizeof(PlanHeader) + sizeof(PartStart) * config.parts) +
         p.batch * static_cast<int64_t>(sizeof(PlanItem)) +
         p.batch * p.num_kv_heads * static_cast<int64_t>(sizeof(int32_t));
}

// Dynamic shared memory of the planning block.
inline int planning_shared_bytes(const PagedAttentionDecodeParams& p) {
  return static_cast<int>(p.batch * static_cast<int64_t>(sizeof(int32_t)));
}

// How many of the last positions of a request its query tokens attend to together.
inline int reach(const PagedAttentionDecodeParams& p) {
  const int64_t window = p.window < 0 || p.window > kMaxTokens ? kMaxTokens : p.window;
  return static_cast<int>(window + p.q_len - 1);
}

cudaError_t launch_plan_paged_attention(const PagedAttentionDecodeParams& params,
                                        const PagedAttentionDecodeConfig& config);

}  // namespace qsun
