// One token a row, in one launch: a cluster of blocks a row.
//
//   read          every logit once, from memory; the row's maximum, and whether all is finite
//   (a row without a temperature, or not finite, ends here)
//   top-k         where the order is cut by count   \  select.cuh: passes over what the blocks hold in shared
//   top-p         where it is cut by mass           /  memory, one cluster barrier each
//   draw          the largest noise - distance of what is kept
//
// The noise takes two logarithms in float64, so the draw first asks for a cheap upper bound: only a token
// that could still beat the best one known to its block gets the real thing. Which tokens are skipped depends
// on the order in which warps run; what wins does not.
//
// Below sm_90 there are no clusters: a block has the row to itself and reads it anew in each pass.
#include "qsun/sample_tokens.h"

#include <algorithm>

#include "device/dependent_launch.cuh"
#include "device/dtype.cuh"
#include "runtime/checks.h"
#include "runtime/launch.h"
#include "sampling/select.cuh"

namespace qsun {

std::string to_string(const SampleTokensParams& p) {
  return Fields()
      .add("num_rows", p.num_rows)
      .add("vocab_size", p.vocab_size)
      .add("dtype", to_string(p.dtype))
      .str();
}

std::string to_string(const SampleTokensConfig& c) {
  return Fields()
      .add("blocks", c.blocks)
      .add("threads", c.threads)
      .add("shared_bytes", c.shared_bytes)
      .add("staged", c.staged)
      .add("overlaps_producer", c.overlaps_producer)
      .str();
}

namespace {

constexpr int kMaxBlocks = 8;           // of a cluster on every device that has them
constexpr int64_t kBlockValues = 2048;  // of a row that are worth another block: a load or so a thread
constexpr float kLargest = 3.402823466e+38f;

struct Workspace {
  Bins bins;
  Candidate warp_best[kSampleWarps];
  uint32_t best[2][2];  // the block's candidates, in words: of the logits, then of the draw
  uint32_t bound;       // what a token of this block must reach to be drawn, ordered()
};
constexpr int kWorkspaceBytes = (sizeof(Workspace) + kLoadBytes - 1) / kLoadBytes * kLoadBytes;

struct Arguments {
  SampleTokensParams p;
  int blocks;
};

__device__ __forceinline__ Candidate warp_best(Candidate mine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Candidate other = __shfl_xor_sync(kAllLanes, mine, distance);
    mine = other > mine ? other : mine;
  }
  return mine;
}

// The best candidate of the cluster, in every thread. All threads; each `round` once.
__device__ __forceinline__ Candidate cluster_best(Workspace& workspace, int round, int blocks,
                                                  Candidate mine) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  mine = warp_best(mine);
  if (lane == 0) workspace.warp_best[warp] = mine;
  __syncthreads();
  if (warp == 0) {
    mine = warp_best(lane < kSampleWarps ? workspace.warp_best[lane] : 0);
    if (lane < 2) workspace.best[round][lane] = static_cast<uint32_t>(lane == 0 ? mine : mine >> 32);
  }
  cluster_barrier();
  mine = 0;
  if (lane < blocks) {
    const uint32_t address = shared_address(workspace.best[round]);
    mine = load_from_block(address, lane) |
           static_cast<uint64_t>(load_from_block(address + sizeof(uint32_t), lane)) << 32;
  }
  return warp_best(mine);
}

// What top-k, top-p and min-p leave. All threads of the cluster.
template <typename Slice>
__device__ __forceinline__ Beginning kept_tokens(const Slice& slice, const Arguments& a, int64_t row,
                                                 Bins& bins) {
  Beginning kept{kInfiniteKey - 1, kAllIndices};
  int set = 0;
  const int top_k = a.p.top_k[row];
  if (top_k > 0 && top_k < slice.vocab_size) {
    kept = shortest_beginning<false>(slice, bins, set, a.blocks, kept,
                                     [&](uint64_t) { return static_cast<uint64_t>(top_k); });
  }
  const float top_p = a.p.top_p[row];
  if (top_p < 1.0f) {
    kept = shortest_beginning<true>(slice, bins, set, a.blocks, kept, [&](uint64_t total) {
      const double share = ceil(static_cast<double>(total) * static_cast<double>(top_p));
      return share > 1.0 ? static_cast<uint64_t>(share) : uint64_t{1};
    });
  }
  const float min_p = a.p.min_p[row];
  if (min_p > 0.0f) {
    const float farthest = 0.0f - static_cast<float>(log(static_cast<double>(fminf(min_p, 1.0f))));
    const uint32_t key = __float_as_uint(farthest);
    if (key < kept.key) kept = {key, kAllIndices};
  }
  return kept;
}

// The best of this thread's tokens with their noise. workspace.bound holds the maximum's.
template <typename Slice>
__device__ __forceinline__ Candidate draw(const Slice& slice, const Beginning& kept, uint64_t key,
                                          Workspace& workspace) {
  Candidate best = 0;
  const volatile uint32_t* bound = &workspace.bound;
  slice.template each<1>([&](float distance, uint32_t index) {
    if (!kept.holds(__float_as_uint(distance), index)) return;
    const uint64_t bits = uniform_bits(key, index);
    if (gumbel_bound(bits) - distance < from_ordered(*bound)) return;
    const uint32_t order = ordered(gumbel(bits) - distance);
    const Candidate mine = candidate(order, index);
    if (mine > best) best = mine;
    atomicMax(&workspace.bound, order);
  });
  return best;
}

template <typename T, bool kStaged>
__global__ void __launch_bounds__(kSampleThreads, 2) sample_tokens_kernel(Arguments a) {
  // Shared memory and place
  auto& workspace = *reinterpret_cast<Workspace*>(dynamic_shared());
  auto* staged = reinterpret_cast<float*>(dynamic_shared() + kWorkspaceBytes);
  const int rank = static_cast<int>(blockIdx.x) % a.blocks;
  const int64_t row = blockIdx.x / a.blocks;
  const auto* logits = static_cast<const T*>(a.p.logits) + row * a.p.logits_stride;
  Slice<T, kStaged> slice(logits, a.p.vocab_size, staged, rank, a.blocks);
  launch_dependents();
  wait_for_producers();

  // Read
  const float temperature = a.p.temperature[row];
  const bool draws = temperature > 0.0f;
  Candidate best = slice.read(draws);
  best = cluster_best(workspace, 0, a.blocks, best);
  const bool is_valid = order_of(best) >= kOrderedLowest && order_of(best) <= kOrderedHighest;

  // Draw
  if (draws && is_valid) {
    const auto key = static_cast<uint64_t>(a.p.keys[row]);
    slice.set(from_ordered(order_of(best)), fminf(temperature, kLargest));
    // The maximum is always kept, at distance 0: nothing below its noise can win.
    if (threadIdx.x == 0) workspace.bound = ordered(gumbel(uniform_bits(key, index_of(best))));
    const Beginning kept = kept_tokens(slice, a, row, workspace.bins);
    __syncthreads();
    best = cluster_best(workspace, 1, a.blocks, draw(slice, kept, key, workspace));
  }

  // Store
  if (rank == 0 && threadIdx.x == 0) {
    a.p.tokens[row] = is_valid ? static_cast<int64_t>(index_of(best)) : 0;
    a.p.valid[row] = is_valid ? 1 : 0;
  }
  cluster_barrier();  // others may still read this block's candidates
}

Status check(const SampleTokensParams& p) {
  Checks checks;
  checks.known(p.dtype).at_least("num_rows", p.num_rows, 0);
  checks.at_most("num_rows", p.num_rows, kMaxGridX / kMaxBlocks);
  checks.at_least("vocab_size", p.vocab_size, 1).at_most("vocab_size", p.vocab_size, kMaxVocabulary);
  if (p.num_rows > 0) {
    checks.not_null("logits", p.logits).not_null("temperature", p.temperature);
    checks.not_null("top_k", p.top_k).not_null("top_p", p.top_p).not_null("min_p", p.min_p);
    checks.not_null("keys", p.keys).not_null("tokens", p.tokens).not_null("valid", p.valid);
  }
  return checks.status("sample_tokens", p);
}

}  // namespace

SampleTokensConfig choose(const SampleTokensParams& p, const DeviceProps& device) {
  const bool has_clusters = device.compute_major >= 9;
  SampleTokensConfig config;
  while (has_clusters && config.blocks < kMaxBlocks && p.vocab_size > kBlockValues * config.blocks) {
    config.blocks *= 2;
  }
  config.threads = kSampleThreads;
  // Units of the row wherever it begins, and the largest share of them.
  const int64_t unit = kLoadBytes / size_of(p.dtype);
  const int64_t units = ceil_div(ceil_div(p.vocab_size + unit - 1, unit), config.blocks);
  const int64_t bytes = kWorkspaceBytes + units * unit * static_cast<int64_t>(sizeof(float));
  config.staged = bytes <= device.shared_memory_per_block;
  config.shared_bytes = config.staged ? static_cast<int>(bytes) : kWorkspaceBytes;
  config.overlaps_producer = has_clusters;
  return config;
}

Status sample_tokens(const SampleTokensParams& p) {
  if (Status status = check(p); !status.ok()) return status;
  if (p.num_rows == 0) return {};
  DeviceProps props;
  if (Status status = props_of("sample_tokens", p, &props); !status.ok()) return status;
  return run_on_device("sample_tokens", p, [&] {
    const SampleTokensConfig config = choose(p, props);
    LaunchOptions options;
    options.shared_bytes = config.shared_bytes;
    options.cluster = dim3(config.blocks);
    options.overlaps_producer = config.overlaps_producer;
    const auto grid = dim3(static_cast<unsigned>(p.num_rows * config.blocks));
    const Arguments arguments{p, config.blocks};
    return with_type(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      auto* kernel = config.staged ? sample_tokens_kernel<T, true> : sample_tokens_kernel<T, false>;
      return launch_with(options, kernel, grid, dim3(config.threads), p.device, p.stream, arguments);
    });
  });
}

}  // namespace qsun
