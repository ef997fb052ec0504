// What one lane of the kernel in gemm_sm90.cuh takes from a block of the weight.
#pragma once

#include "device/panel_codes.cuh"
#include "wna16/gemm_sm90_place.cuh"

namespace qsun {
namespace {

#if QSUN_HAS_WGMMA

// Where one lane's part of a row tile lies in shared memory.
struct LanePlace {
  const unsigned char *pieces, *half_pieces, *scales, *zeros;

  __device__ __forceinline__ LanePlace(const unsigned char* tile, int bits, int groups, unsigned lane)
      : pieces(tile + lane * 16),
        half_pieces(tile + tile_piece_bytes(bits) + lane * 8),
        scales(tile + tile_code_bytes(bits) + lane / 4 * groups * 4),
        zeros(scales + tile_scale_bytes(groups) - lane / 4 * groups * 2) {}
};

// What one lane takes from a panel block.
template <int kBits, bool kHasZeros, bool kOneGroup>
struct LaneCodes {
  static constexpr int kGroups = kOneGroup ? 1 : 4;
  // For want of registers with 8 bits: the second 64 columns come later, scales of small groups at their use.
  static constexpr bool kInHalves = kBits == 8, kLateGroups = kBits == 8 && !kOneGroup;

  uint32_t words[2][kHalfWords<kBits>];  // of each half of the columns
  uint32_t scales[kGroups];              // row g, row g + 8
  uint32_t zeros[kGroups] = {};          // bytes: row g, row g + 8

  template <int kFirst, int kCount>
  __device__ __forceinline__ void load_pieces(const unsigned char* pieces) {
#pragma unroll
    for (int i = kFirst; i < kFirst + kCount; ++i) {
      const uint4 loaded = *reinterpret_cast<const uint4*>(pieces + i * kWarpLanes * 16);
      if constexpr (kBits >= 4) {
        constexpr int kPieces = kHalfWords<kBits> / 4;  // of a half
        uint32_t* target = words[i / kPieces] + i % kPieces * 4;
        target[0] = loaded.x, target[1] = loaded.y, target[2] = loaded.z, target[3] = loaded.w;
      } else {
        words[0][0] = loaded.x, words[0][1] = loaded.y;
        words[1][0] = loaded.z, words[1][1] = loaded.w;
      }
    }
  }
  __device__ __forceinline__ void load_groups(const GemmArguments& a, const LanePlace& place, int block,
                                              int first, int count) {
#pragma unroll
    for (int i = first; i < first + count; ++i) {
      const int offset = kOneGroup ? 0 : a.scale_offsets[i];
      scales[i] = *reinterpret_cast<const uint32_t*>(place.scales + block + offset);
      if (kHasZeros) zeros[i] = *reinterpret_cast<const uint16_t*>(place.zeros + block + offset / 2);
    }
  }

  // `block`: bytes from the first one.
  __device__ __forceinline__ void load(const GemmArguments& a, const LanePlace& place, int block) {
    load_pieces<0, kBits >= 4 ? 2 : 1>(place.pieces + block);
    if constexpr (kBits == 3) {
      const uint2 loaded = *reinterpret_cast<const uint2*>(place.half_pieces + block);
      words[0][2] = loaded.x, words[1][2] = loaded.y;
    }
    if constexpr (!kLateGroups) load_groups(a, place, block, 0, kGroups);
  }
  __device__ __forceinline__ void load_second_half(const LanePlace& place, int block) {
    if constexpr (kInHalves) load_pieces<2, 2>(place.pieces + block);
  }
};

// What is the same for all codes of a lane in a group: [0] row g, [1] row g + 8.
template <typename T, int kBits, bool kHasZeros>
struct GroupFactors {
  using Offset = ZeroOffset<T, kBits, 0>;
  uint32_t scale[2];
  Offset offset[2] = {Offset(1u << (kBits - 1), 0), Offset(1u << (kBits - 1), 1)};

  __device__ __forceinline__ void set(uint32_t scales, uint32_t zeros) {
    scale[0] = permute_bytes(scales, scales, 0x1010), scale[1] = permute_bytes(scales, scales, 0x3232);
    if constexpr (kHasZeros) offset[0] = Offset(zeros & 0xffu, 0), offset[1] = Offset(zeros >> 8, 1);
  }
};

#endif  // QSUN_HAS_WGMMA

}  // namespace
}  // namespace qsun
