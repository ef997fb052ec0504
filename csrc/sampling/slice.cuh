// A block's share of a row of logits.
//
//   row         x x x x x x x x x x x x x x x x x x x x x         lead = 2, kUnit = 4
//   units   |. . x x|x x x x|x x x x|x x x x|x x x x|x x x .|     16 bytes each, cut at 16-byte boundaries
//   blocks  |-- 0 ----------|-- 1 ----------|-- 2 ----------|
//
// Rows may begin anywhere, so the units are those of memory: every whole unit is one 16-byte load, and the
// two at the ends are read element by element. Where there is room, the share stays in shared memory: first
// the logits, then their distances to the maximum; elsewhere each pass reads the logits again, out of the L2.
#pragma once

#include <cstdint>

#include "device/vector.cuh"
#include "sampling/numbers.cuh"

namespace qsun {
namespace {

constexpr int kSampleThreads = 512;

// kStaged: the share stays in shared memory.
template <typename T, bool kStaged>
struct Slice {
  static constexpr int kUnit = kWidth<T>;
  static constexpr int kInFlight = 32 / kUnit;  // loads of a thread: all of its share, for most vocabularies

  const T* row;
  float* staged;  // used if kStaged
  int vocab_size;
  int lead;           // elements of unit 0 that lie before the row
  int first, end;     // units of this block
  float highest = 0;  // the row's maximum
  float divisor = 1;  // the row's temperature

  __device__ __forceinline__ Slice(const T* row, int64_t vocab_size, float* staged, int rank, int blocks)
      : row(row), staged(staged), vocab_size(static_cast<int>(vocab_size)) {
    lead = static_cast<int>(reinterpret_cast<uintptr_t>(row) % kLoadBytes / sizeof(T));
    const int units = (lead + this->vocab_size + kUnit - 1) / kUnit;
    const int share = (units + blocks - 1) / blocks;
    first = min(rank * share, units);
    end = min(first + share, units);
  }

  // The largest logit that this thread reads; above all others, kOrderedNaN if one is NaN. Keeps the logits
  // if `stages`.
  __device__ __forceinline__ Candidate read(bool stages) {
    float most = -INFINITY;
    uint32_t at = 0;
    bool is_nan = false;
    // Indices rise from call to call: the first of equals stays.
    const auto take = [&](float value, int index) {
      is_nan |= value != value;
      if (value > most) {
        most = value;
        at = static_cast<uint32_t>(index);
      }
    };
    const auto take_end = [&](int unit) {
      const int index = unit * kUnit - lead + static_cast<int>(threadIdx.x);
      if (threadIdx.x >= kUnit || index < 0 || index >= vocab_size) return;
      const float value = to_float(load_element(row + index));
      take(value, index);
      if (kStaged && stages) staged[index - origin()] = value;
    };
    const int whole_first = first < end && first == 0 && lead > 0 ? 1 : first;
    const int whole_end = max(min(end, (vocab_size + lead) / kUnit), whole_first);

    if (first < whole_first) take_end(first);
    for (int base = whole_first + static_cast<int>(threadIdx.x); base < whole_end;
         base += kInFlight * kSampleThreads) {
      Vector<T, kUnit> loaded[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int unit = base + j * kSampleThreads;
        if (unit < whole_end) loaded[j] = load_readonly<kUnit>(row + (unit * kUnit - lead));
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int unit = base + j * kSampleThreads;
        if (unit < whole_end) {
          Vector<float, kUnit> values;
#pragma unroll
          for (int i = 0; i < kUnit; ++i) {
            values.data[i] = to_float(loaded[j].data[i]);
            take(values.data[i], unit * kUnit - lead + i);
          }
          if (kStaged && stages) store(staged + (unit - first) * kUnit, values);
        }
      }
    }
    if (whole_end < end) take_end(end - 1);
    return candidate(is_nan ? kOrderedNaN : ordered(most), at);
  }

  // From here on `each` gives the tokens' distances to the maximum. All threads, after a barrier.
  __device__ __forceinline__ void set(float row_highest, float row_divisor) {
    highest = row_highest;
    divisor = row_divisor;
    if constexpr (kStaged) {
      // What a thread writes here, the same thread reads in `each`: no barrier is needed.
#pragma unroll 4
      for (int index = begin() + static_cast<int>(threadIdx.x); index < stop(); index += kSampleThreads) {
        float& value = staged[index - origin()];
        value = distance(value);
      }
    }
  }

  // function(distance, index) for the tokens of this thread, in the order of their indices.
  template <int kUnroll, typename Function>
  __device__ __forceinline__ void each(Function&& function) const {
#pragma unroll kUnroll
    for (int index = begin() + static_cast<int>(threadIdx.x); index < stop(); index += kSampleThreads) {
      const auto place = static_cast<uint32_t>(index);
      if constexpr (kStaged) {
        function(staged[index - origin()], place);
      } else {
        function(distance(to_float(load_element(row + index))), place);
      }
    }
  }

 private:
  __device__ __forceinline__ float distance(float logit) const { return (highest - logit) / divisor; }

  // The tokens of this block, and the one (perhaps before the row) at the beginning of `staged`.
  __device__ __forceinline__ int origin() const { return first * kUnit - lead; }
  __device__ __forceinline__ int begin() const { return max(origin(), 0); }
  __device__ __forceinline__ int stop() const { return min(end * kUnit - lead, vocab_size); }
};

}  // namespace
}  // namespace qsun
