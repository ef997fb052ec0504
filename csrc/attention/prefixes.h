// Prefixes that requests share: blocks of the cache with which several rows of the block table begin.
//
// The device finds them, so that a captured graph serves every batch. Requests are sorted so that those with
// the same beginning are neighbours, wherever they stand in the batch; neighbours are compared block by
// block; runs of neighbours with a long common beginning become groups. A group's prefix is what all of it
// have in common in full tiles, short of the tokens whose visibility differs among a request's query tokens:
//
//   order      request 2 | request 0 | request 5 | request 1 | request 7 | ..      sorted
//   common               | 64 tiles  | 64 tiles  | 0         | 30        | ..      with the one before
//   groups     | 2, 0, 5: 64 tiles               | 1, 7: 30 tiles        | ..
//
// A launch of its own goes along a line of items (plan.h), an item being a prefix and up to 64 query rows of
// the requests that share it, and leaves normalised rows and their lse in scratch, one row for every part of
// the line that has some of the prefix. The launch behind it begins each request after its prefix, and merges
// these rows in front of its own.
//
// In memory, in 32-bit words:
//
//   header     4              of the line
//   parts      8 * prefix_parts
//   items      4 * batch      a group of two requests has at least one item
//   of_request 4 * batch      see RequestPrefix
//   order      batch
//   common     batch          tiles that order[i] has in common with order[i - 1]
#pragma once

#include "attention/plan.h"
#include "attention/tiles.h"

namespace qsun {

constexpr int kMaxSharingBatch = 4096;  // requests are sorted in one block's shared memory
constexpr int kPrefixRows = 64;         // query rows of an item: 16 for each of four warps

// A request's prefix. tokens: 0 where it shares none, and the rest is undefined.
struct alignas(16) RequestPrefix {
  int tokens;
  int member;  // its place in the order
  int start;   // first unit of its item in the line, under head 0
  int unused;
};

struct PrefixPointers {
  PlanPointers line;  // without counters
  RequestPrefix* of_request;
  int32_t* order;
  int32_t* common;
};

inline PrefixPointers prefix_pointers(const PagedAttentionDecodeParams& p,
                                      const PagedAttentionDecodeConfig& config) {
  PrefixPointers prefixes{};
  if (p.prefixes == nullptr) return prefixes;
  prefixes.line.header = static_cast<PlanHeader*>(p.prefixes);
  prefixes.line.parts = reinterpret_cast<PartStart*>(prefixes.line.header + 1);
  prefixes.line.items = reinterpret_cast<PlanItem*>(prefixes.line.parts + config.prefix_parts);
  prefixes.of_request = reinterpret_cast<RequestPrefix*>(prefixes.line.items + p.batch);
  prefixes.order = reinterpret_cast<int32_t*>(prefixes.of_request + p.batch);
  prefixes.common = prefixes.order + p.batch;
  return prefixes;
}

inline int64_t prefixes_bytes(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& config) {
  const int64_t of_a_request = sizeof(PlanItem) + sizeof(RequestPrefix) + 2 * sizeof(int32_t);
  return static_cast<int64_t>(sizeof(PlanHeader) + sizeof(PartStart) * config.prefix_parts) +
         p.batch * of_a_request;
}

// Rows of scratch. Going along the line, either the part or the item changes, so that row
//   part * kPrefixRows + (head * batch + member) * (query rows of a request) + row
// belongs to nobody else.
inline int64_t prefix_scratch_rows(const PagedAttentionDecodeParams& p,
                                   const PagedAttentionDecodeConfig& config) {
  return int64_t{config.prefix_parts} * kPrefixRows + p.batch * p.q_len * p.num_q_heads;
}

// Behind the scratch of the parts.
inline PartialRows prefix_rows(const PagedAttentionDecodeParams& p,
                               const PagedAttentionDecodeConfig& config) {
  if (p.prefixes == nullptr) return {};
  float* scratch = static_cast<float*>(p.scratch) + partial_floats(p, config);
  return {scratch, scratch + (prefix_scratch_rows(p, config) + 3) / 4 * 4};
}

inline int64_t prefix_scratch_floats(const PagedAttentionDecodeParams& p,
                                     const PagedAttentionDecodeConfig& config) {
  const int64_t rows = prefix_scratch_rows(p, config);
  return (rows + 3) / 4 * 4 + rows * p.head_dim;
}

// Finds groups and their items; the line is cut by the planning kernel, behind it.
cudaError_t launch_find_prefixes(const PagedAttentionDecodeParams& params,
                                 const PagedAttentionDecodeConfig& config);

}  // namespace qsun
