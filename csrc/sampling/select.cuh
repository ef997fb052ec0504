// Where the order of a row's tokens is to be cut: the shortest beginning that holds a number of tokens
// (top-k), or a share of their mass (top-p), without sorting.
//
// The tokens' place in the order is (bits of the distance, index): distances are not negative, so that their
// bits rise with them. A pass over the row adds every token that may be the last one to one of 512 bins; the
// blocks of the cluster add their bins up, and the bin in which the sum passes what is wanted is cut into 512
// again, until it holds one distance. Its tokens are equal, and weigh the same: it is known how many of them
// stay, and when not all do, the same search over the index finds the last.
//
// The first pass cuts the distances evenly, 16 bins a unit of logit, because their bits crowd: half of a row
// can share its exponent. The maximum has a bin of its own; likely tokens often end there.
//
// All sums are of integers: they do not depend on the order of the atomic additions.
#pragma once

#include <cstdint>

#include "device/cluster.cuh"
#include "device/reduce.cuh"
#include "sampling/slice.cuh"

namespace qsun {
namespace {

constexpr int kBinBits = 9;
constexpr int kBins = 1 << kBinBits;
static_assert(kBins == kSampleThreads);  // a thread a bin
constexpr int kSampleWarps = kSampleThreads / kWarp;
constexpr float kBinsPerUnit = 16.0f;
constexpr uint32_t kInfiniteKey = 0x7f800000u;  // the bits of an infinite distance: never drawn
constexpr uint32_t kAllIndices = 0xffffffffu;

// Tokens up to and including a place in the order.
struct Beginning {
  uint32_t key;    // bits of the distance
  uint32_t index;  // of the last token at that distance

  __device__ __forceinline__ bool holds(uint32_t of_key, uint32_t of_index) const {
    return of_key < key || (of_key == key && of_index <= index);
  }
};

// The bin in which a sum over bins passes what is wanted.
struct Found {
  int bin;
  uint64_t before;  // the sum of the bins in front of it
  uint64_t inside;  // its own
};

// Sums over the cluster's blocks, by bin. In shared memory.
struct Bins {
  // Two sets in turn: while a block fills one, others may still read the other.
  uint32_t low[2][kBins];
  uint32_t high[2][kBins];
  uint64_t warp_sums[kSampleWarps];
  Found found;
};

__device__ __forceinline__ int first_bin(float distance) {
  if (distance == 0.0f) return 0;
  return 1 + static_cast<int>(fminf(distance * kBinsPerUnit, static_cast<float>(kBins - 2)));
}
// The key with which a bin of the first pass begins.
__device__ __forceinline__ uint32_t first_key(int bin) {
  if (bin < 2) return static_cast<uint32_t>(bin);
  if (bin == kBins) return kInfiniteKey;
  return __float_as_uint(static_cast<float>(bin - 1) / kBinsPerUnit);
}

// The bits by which numbers below `width` are to be shifted so that kBins bins hold them.
__device__ __forceinline__ int shift_of(uint32_t width) {
  return max(32 - __clz(static_cast<int>(width - 1)) - kBinBits, 0);
}

// How much of `width` the bin holds: the last one may hold less.
__device__ __forceinline__ uint32_t width_of_bin(uint32_t width, int bin, int shift) {
  const uint32_t left = width - (static_cast<uint32_t>(bin) << shift);
  return left < 1u << shift ? left : 1u << shift;
}

// Counts, or masses.
template <bool kMass>
struct Search {
  Bins& bins;
  int blocks;
  int set = 0;         // that is filled
  uint64_t value = 0;  // of this thread's bin
  uint64_t up_to = 0;  // the sum up to and including it
  uint64_t total = 0;

  // Begins a pass. All threads.
  __device__ __forceinline__ void clear() {
    set ^= 1;
    bins.low[set][threadIdx.x] = 0;
    if constexpr (kMass) bins.high[set][threadIdx.x] = 0;
    __syncthreads();
  }

  __device__ __forceinline__ void add(int bin, float distance) {
    if constexpr (kMass) {
      const uint64_t mass = relative_mass(distance);
      const uint32_t low = static_cast<uint32_t>(mass);
      const uint32_t before = atomicAdd(&bins.low[set][bin], low);
      // The high word is seldom touched: by likely tokens, and by a carry.
      const uint32_t high = static_cast<uint32_t>(mass >> 32) + (before + low < before ? 1u : 0u);
      if (high != 0) atomicAdd(&bins.high[set][bin], high);
    } else {
      atomicAdd(&bins.low[set][bin], 1u);
    }
  }

  // Ends a pass: sums over the blocks, then over the bins. All threads of the cluster.
  __device__ __forceinline__ void sum() {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarp;
    const int warp = thread / kWarp;
    cluster_barrier();
    const uint32_t low_address = shared_address(&bins.low[set][thread]);
    const uint32_t high_address = shared_address(&bins.high[set][thread]);
    value = 0;
#pragma unroll 4
    for (int rank = 0; rank < blocks; ++rank) {
      value += load_from_block(low_address, rank);
      if constexpr (kMass) value += static_cast<uint64_t>(load_from_block(high_address, rank)) << 32;
    }
    up_to = value;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, up_to, distance);
      if (lane >= distance) up_to += other;
    }
    if (lane == kWarp - 1) bins.warp_sums[warp] = up_to;
    __syncthreads();
    total = 0;
#pragma unroll 4
    for (int other = 0; other < kSampleWarps; ++other) {
      if (other == warp) up_to += total;
      total += bins.warp_sums[other];
    }
  }

  // wanted: from 1 to total. All threads.
  __device__ __forceinline__ Found find(uint64_t wanted) {
    if (up_to - value < wanted && wanted <= up_to) {
      bins.found = {static_cast<int>(threadIdx.x), up_to - value, value};
    }
    __syncthreads();
    return bins.found;
  }
};

// The shortest beginning within `within` that holds `wanted` tokens or, if kMass, the share `wanted` of its
// mass. All threads of the cluster; all get the same.
template <bool kMass, typename Slice, typename Wanted>
__device__ __forceinline__ Beginning shortest_beginning(const Slice& slice, Bins& bins, int& set, int blocks,
                                                        const Beginning& within, Wanted wanted_of) {
  Search<kMass> search{bins, blocks, set};

  // Even bins
  search.clear();
  slice.template each<4>([&](float distance, uint32_t index) {
    const uint32_t key = __float_as_uint(distance);
    if (key < kInfiniteKey && within.holds(key, index)) search.add(first_bin(distance), distance);
  });
  search.sum();
  set = search.set;
  uint64_t wanted = wanted_of(search.total);
  if (wanted > search.total) return within;
  Found found = search.find(wanted);
  wanted -= found.before;
  uint32_t low = first_key(found.bin);
  uint32_t width = first_key(found.bin + 1) - low;

  // Down to one distance
  while (width > 1) {
    const int shift = shift_of(width);
    search.clear();
    slice.template each<4>([&](float distance, uint32_t index) {
      const uint32_t key = __float_as_uint(distance);
      if (key - low < width && within.holds(key, index)) {
        search.add(static_cast<int>((key - low) >> shift), distance);
      }
    });
    search.sum();
    found = search.find(wanted);
    wanted -= found.before;
    low += static_cast<uint32_t>(found.bin) << shift;
    width = width_of_bin(width, found.bin, shift);
  }
  set = search.set;

  // How many of its tokens stay
  const uint64_t each = kMass ? relative_mass(__uint_as_float(low)) : 1;
  uint64_t stay = (wanted + each - 1) / each;
  if (stay * each == found.inside) return {low, low == within.key ? within.index : kAllIndices};

  // The index of the last
  Search<false> count{bins, blocks, set};
  uint32_t start = 0;
  uint32_t span = static_cast<uint32_t>(slice.vocab_size);
  while (span > 1) {
    const int shift = shift_of(span);
    count.clear();
    slice.template each<4>([&](float distance, uint32_t index) {
      const uint32_t key = __float_as_uint(distance);
      if (key == low && index - start < span && within.holds(key, index)) {
        count.add(static_cast<int>((index - start) >> shift), distance);
      }
    });
    count.sum();
    found = count.find(stay);
    stay -= found.before;
    start += static_cast<uint32_t>(found.bin) << shift;
    span = width_of_bin(span, found.bin, shift);
  }
  set = count.set;
  return {low, start};
}

}  // namespace
}  // namespace qsun
