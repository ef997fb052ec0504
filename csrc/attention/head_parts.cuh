// A lane's part of a head in registers, and how it is loaded and stored: by vectors of 16 bytes where heads
// are aligned, element by element where they are not.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <cstring>

#include "device/dtype.cuh"
#include "device/packed_math.cuh"
#include "device/vector.cuh"

namespace qsun {

// A lane's part of a head: where it is, and how much of it there is.
struct Place {
  int low, high;              // first elements
  int low_count, high_count;  // elements there; with aligned vectors all of a vector, or none
};

template <typename T>
struct Part {
  static constexpr int kSize = kWidth<T>;
  float low[kSize];
  float high[kSize];
};

// Vectors of kBytes in registers to an address that they divide.
template <int kBytes>
__device__ __forceinline__ void store_words(void* target, const uint32_t* words) {
  if constexpr (kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      static_cast<uint4*>(target)[i] =
          make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(target) = make_uint2(words[0], words[1]);
  } else if constexpr (kBytes == 4) {
    *static_cast<uint32_t*>(target) = words[0];
  } else {
    static_assert(kBytes == 2);
    *static_cast<uint16_t*>(target) = static_cast<uint16_t>(words[0]);
  }
}

// `count` of the elements in `words`, or all of them where vectors are aligned.
template <bool kWide, int kSize, typename Element>
__device__ __forceinline__ void store_elements(Element* target, const uint32_t* words, int count) {
  if constexpr (kWide) {
    if (count > 0) store_words<kSize* static_cast<int>(sizeof(Element))>(target, words);
  } else {
    Element elements[kSize];
    memcpy(elements, words, sizeof(elements));
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < count) target[i] = elements[i];
    }
  }
}

// 16 bytes of elements as they were loaded. Taking them apart at once would wait for each load before the
// next is sent off.
struct Raw {
  uint32_t words[kLoadBytes / 4];
};

// `count` elements at `source`, zeros behind them.
template <bool kWide, typename T>
__device__ __forceinline__ Raw load_part(const T* source, int count) {
  Raw raw{};
  if constexpr (kWide) {
    if (count > 0) {
      const uint4 loaded = *reinterpret_cast<const uint4*>(source);
      raw = {loaded.x, loaded.y, loaded.z, loaded.w};
    }
  } else {
    T elements[kWidth<T>];
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) elements[i] = i < count ? source[i] : from_float<T>(0.0f);
    memcpy(raw.words, elements, sizeof(elements));
  }
  return raw;
}

// The two halves of a part, of the dtype T, from the float32 sums that the splits of a product left,
// split_stride apart: added in their order and rounded, as where the product adds them itself. kAtOnce are on
// their way at a time: that many take as long as one.
template <bool kWide, typename T>
__device__ __forceinline__ void add_part(const float* sums, int splits, int64_t split_stride,
                                         const Place& place, Raw& low, Raw& high) {
  constexpr int kSize = kWidth<T>, kAtOnce = 2, kVectors = kSize / kWidth<float>;
  float values[2 * kSize] = {};
#pragma unroll 1
  for (int first = 0; first < splits; first += kAtOnce, sums += kAtOnce * split_stride) {
    Raw some[kAtOnce][2 * kVectors];
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      if (first + s >= splits) break;
#pragma unroll
      for (int i = 0; i < 2 * kVectors; ++i) {
        const int begin = i % kVectors * kWidth<float>;
        const int start = i < kVectors ? place.low : place.high;
        const int count = i < kVectors ? place.low_count : place.high_count;
        some[s][i] = load_part<kWide>(sums + s * split_stride + start + begin, count - begin);
      }
    }
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      if (first + s >= splits) break;
#pragma unroll
      for (int i = 0; i < 2 * kSize; ++i) {
        values[i] += __uint_as_float(some[s][i / kWidth<float>].words[i % kWidth<float>]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kSize; i += 2) {
    low.words[i / 2] = round_pair<T>(values[i], values[i + 1]);
    high.words[i / 2] = round_pair<T>(values[kSize + i], values[kSize + i + 1]);
  }
}

template <typename T>
__device__ __forceinline__ void widen(const Raw& raw, float (&values)[kWidth<T>]) {
  T elements[kWidth<T>];
  memcpy(elements, raw.words, sizeof(elements));
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) values[i] = to_float(elements[i]);
}

// kSize elements of a row of the table, float32: as many loads of 16 bytes as they take.
template <bool kWide, int kSize>
__device__ __forceinline__ void load_angles(const float* source, int count, float (&values)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; i += kWidth<float>) {
    const Raw some = load_part<kWide>(source + i, count - i);
#pragma unroll
    for (int j = 0; j < kWidth<float>; ++j) values[i + j] = __uint_as_float(some.words[j]);
  }
}

// Values rounded to C, in order.
template <typename C, int kSize>
__device__ __forceinline__ void pack(const float (&values)[kSize], uint32_t* words) {
  if constexpr (sizeof(C) == 4) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) words[i] = __float_as_uint(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; i += 2) words[i / 2] = round_pair<C>(values[i], values[i + 1]);
  }
}

template <typename T, int kSize>
__device__ __forceinline__ void round_to(float (&values)[kSize]) {
  if constexpr (sizeof(T) == 2) {
    uint32_t words[kSize / 2];
    pack<T>(values, words);
    T rounded[kSize];
    memcpy(rounded, words, sizeof(rounded));
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = to_float(rounded[i]);
  }
}

}  // namespace qsun
