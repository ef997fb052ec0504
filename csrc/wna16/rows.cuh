// x (M, K) times a low-bit weight (N, K) read in the canonical layout, in float32: what the tensor cores, and
// so the kernels on panels, do not multiply.
//
//            K codes of a weight row, in chunks of 32 (= kBits words)
//            |c0 |c1 |c2 | ... |c31|c32|c33| ...
//   lane       0   1   2         31   0   1          16-byte loads, the next chunk's in flight while one is
//   used
//
// A warp takes kRowsPerWarp rows of the weight and kTileM rows of x; its lanes take chunks in turn and are
// summed at the end, in a fixed order. The block's warps share x through shared memory, a slab of K at a
// time, stored so that the 8 values that a lane needs next lie side by side with those of its neighbours:
//
//   smem_x[m][step][piece][lane][8]      value k of row m, where k = 32 * (32 * step + lane) + 8 * piece +
//   (0..7)
//
// A weight is rebuilt as the specification says, (code - zero) * scale in float32, before it meets x: a scale
// applied to a sum of (code - zero) * x would overflow where the product itself does not.
#pragma once

#include "device/dtype.cuh"
#include "device/reduce.cuh"
#include "device/unpack.cuh"
#include "device/vector.cuh"
#include "runtime/alignment.h"
#include "runtime/launch.h"
#include "wna16/rows.h"

namespace qsun {
namespace {

constexpr int kPiece = 8;  // values of x read from shared memory at once
constexpr int kPieces = kChunk / kPiece;
constexpr int kStepCodes = kWarp * kChunk;  // codes that a warp covers in one step
constexpr int kMaxWarps = 8;
constexpr int kSlabValues = 8192;  // values of x in shared memory, over all kTileM rows: 32 KB of float32

struct RowsArguments {
  Wna16LinearParams p;
  int64_t row_words;   // words of a weight row
  int64_t num_chunks;  // of a weight row, the last one possibly short
  int64_t num_groups;
  int chunks_log2;    // log2 of the chunks of a group; 62 when a row is one group
  bool wide_weight;   // chunks are whole and aligned for the widest loads
  bool wide_x;        // rows of x are aligned to 16 bytes
  int64_t num_tiles;  // of kTileM rows of x
};

// A lane's share of a weight row for one step.
template <int kBits>
struct Chunk {
  uint32_t words[kBits];
  float scale;
  float offset;  // 2^23 + zero, see centred()
};

template <typename T>
__device__ __forceinline__ float scale_of(const RowsArguments& a, int64_t n, int64_t group) {
  return to_float(load_element(static_cast<const T*>(a.p.scales) + n * a.num_groups + group));
}

template <int kBits>
__device__ __forceinline__ float offset_of(const RowsArguments& a, int64_t n, int64_t group) {
  if (a.p.qzeros == nullptr) return kTwoTo23 + static_cast<float>(1 << (kBits - 1));
  return kTwoTo23 + static_cast<float>(load_element(a.p.qzeros + n * a.num_groups + group));
}

// Reads chunk `chunk` of weight row n; past the end of the row, zeros.
template <typename T, int kBits>
__device__ __forceinline__ Chunk<kBits> load_chunk(const RowsArguments& a, int64_t n, int64_t chunk) {
  Chunk<kBits> result = {};
  if (chunk >= a.num_chunks) return result;
  const int64_t first = chunk * kBits;
  const uint32_t* source = a.p.qweight + n * a.row_words + first;
  if (a.wide_weight && kBits % 4 == 0) {
#pragma unroll
    for (int i = 0; i + 3 < kBits; i += 4) {
      const uint4 loaded = load_element(reinterpret_cast<const uint4*>(source + i));
      result.words[i] = loaded.x, result.words[i + 1] = loaded.y;
      result.words[i + 2] = loaded.z, result.words[i + 3] = loaded.w;
    }
  } else if (a.wide_weight && kBits == 2) {
    const uint2 loaded = load_element(reinterpret_cast<const uint2*>(source));
    result.words[0] = loaded.x, result.words[1] = loaded.y;
  } else {
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      if (first + i < a.row_words) result.words[i] = load_element(source + i);
    }
  }
  if (a.p.g_idx == nullptr) {
    const int64_t group = chunk >> a.chunks_log2;
    result.scale = scale_of<T>(a, n, group);
    result.offset = offset_of<kBits>(a, n, group);
  }
  return result;
}

// Rebuilds the 8 weights of piece `piece` of a chunk; those past K are zero.
template <typename T, int kBits>
__device__ __forceinline__ void rebuild(const RowsArguments& a, int64_t n, int64_t chunk,
                                        const Chunk<kBits>& codes, int piece, float (&w)[kPiece]) {
  if (a.p.g_idx == nullptr) {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      w[i] = centred(code_of_chunk<kBits>(codes.words, piece * kPiece + i), codes.offset) * codes.scale;
    }
    return;
  }
  const int64_t first = chunk * kChunk + piece * kPiece;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    w[i] = 0.0f;
    if (first + i < a.p.K) {
      const int64_t group = load_element(a.p.g_idx + first + i);
      const uint32_t code = code_of_chunk<kBits>(codes.words, piece * kPiece + i);
      w[i] = centred(code, offset_of<kBits>(a, n, group)) * scale_of<T>(a, n, group);
    }
  }
}

// Fills the slab that begins at chunk `first_chunk` with rows m0 .. m0 + kTileM of x; zeros past M and K.
template <typename T, int kTileM>
__device__ __forceinline__ void stage_x(const RowsArguments& a, int64_t m0, int64_t first_chunk, T* smem_x) {
  constexpr int kSlabPieces = kSlabValues / kTileM / kPiece;
  const auto* x = static_cast<const T*>(a.p.x);
  for (int u = threadIdx.x; u < kTileM * kSlabPieces; u += blockDim.x) {
    const int64_t m = m0 + u / kSlabPieces;
    const int at = u % kSlabPieces;  // pieces from the slab's beginning
    const int64_t k = first_chunk * kChunk + static_cast<int64_t>(at) * kPiece;
    if (k >= a.num_chunks * kChunk) continue;  // no lane reads past the last chunk
    Vector<T, kPiece> values;
    if (a.wide_x && m < a.p.M && k + kPiece <= a.p.K) {
      values = load_readonly<kPiece>(x + m * a.p.x_stride + k);
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        const bool inside = m < a.p.M && k + i < a.p.K;
        values.data[i] = inside ? load_element(x + m * a.p.x_stride + k + i) : from_float<T>(0.0f);
      }
    }
    const int chunk = at / kPieces;
    const int step = chunk / kWarp;
    const int position =
        (u / kSlabPieces * (kSlabPieces / kWarp) + step * kPieces + at % kPieces) * kWarp + chunk % kWarp;
    store(smem_x + position * kPiece, values);
  }
}

template <typename T, int kBits, int kTileM>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1) wna16_rows_kernel(RowsArguments a) {
  static_assert(kSlabValues / kTileM % kStepCodes == 0, "a slab is a whole number of steps");
  constexpr int kSlabSteps = kSlabValues / kTileM / kStepCodes;
  alignas(16) __shared__ T smem_x[kSlabValues];

  // Roles. A warp past the last row repeats it and writes nothing: it still has to help with x.
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int num_warps = static_cast<int>(blockDim.x) / kWarp;
  const int64_t n0 = (static_cast<int64_t>(blockIdx.x) * num_warps + warp) * kRowsPerWarp;
  int64_t n[kRowsPerWarp];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) n[r] = n0 + r < a.p.N ? n0 + r : a.p.N - 1;

  for (int64_t tile = blockIdx.y; tile < a.num_tiles; tile += gridDim.y) {
    const int64_t m0 = tile * kTileM;
    float sums[kRowsPerWarp][kTileM] = {};
    Chunk<kBits> next[kRowsPerWarp];
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) next[r] = load_chunk<T, kBits>(a, n[r], lane);

    for (int64_t slab = 0; slab < a.num_chunks; slab += kSlabSteps * kWarp) {
      __syncthreads();  // the slab before has been read
      stage_x<T, kTileM>(a, m0, slab, smem_x);
      __syncthreads();

      for (int step = 0; step < kSlabSteps && slab + step * kWarp < a.num_chunks; ++step) {
        // Prefetch
        const int64_t chunk = slab + step * kWarp + lane;
        Chunk<kBits> codes[kRowsPerWarp];
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r) {
          codes[r] = next[r];
          next[r] = load_chunk<T, kBits>(a, n[r], chunk + kWarp);
        }
        if (chunk >= a.num_chunks) continue;

        // Multiply
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          float w[kRowsPerWarp][kPiece];
#pragma unroll
          for (int r = 0; r < kRowsPerWarp; ++r) rebuild<T, kBits>(a, n[r], chunk, codes[r], piece, w[r]);
#pragma unroll
          for (int m = 0; m < kTileM; ++m) {
            const int position = ((m * kSlabSteps + step) * kPieces + piece) * kWarp + lane;
            const Vector<T, kPiece> values = load<kPiece>(smem_x + position * kPiece);
#pragma unroll
            for (int i = 0; i < kPiece; ++i) {
#pragma unroll
              for (int r = 0; r < kRowsPerWarp; ++r)
                sums[r][m] = fmaf(w[r][i], to_float(values.data[i]), sums[r][m]);
            }
          }
        }
      }
    }

    // Sum over lanes; lane r * kTileM + m keeps the value of row n0 + r, m0 + m.
    static_assert(kRowsPerWarp * kTileM <= kWarp);
    float value = 0.0f;
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
#pragma unroll
      for (int m = 0; m < kTileM; ++m) {
        const float sum = warp_sum(sums[r][m]);
        if (lane == r * kTileM + m) value = sum;
      }
    }

    // Bias, residual, store
    const int64_t row = n0 + lane / kTileM;
    const int64_t m = m0 + lane % kTileM;
    if (lane < kRowsPerWarp * kTileM && row < a.p.N && m < a.p.M) {
      if (a.p.bias != nullptr) value += to_float(static_cast<const T*>(a.p.bias)[row]);
      if (a.p.residual != nullptr)
        value += to_float(static_cast<const T*>(a.p.residual)[m * a.p.residual_stride + row]);
      static_cast<T*>(a.p.out)[m * a.p.out_stride + row] = from_float<T>(value);
    }
  }
}

template <typename T, int kBits, int kTileM>
cudaError_t launch_tile(const Wna16LinearParams& p, const Wna16LinearConfig& config) {
  RowsArguments a{};
  a.p = p;
  a.row_words = ceil_div(p.K * kBits, 32);
  a.num_chunks = ceil_div(p.K, kChunk);
  a.num_groups = p.group_size < 0 ? 1 : ceil_div(p.K, p.group_size);
  a.chunks_log2 = p.group_size < 0 ? 62 : p.group_size == 128 ? 2 : p.group_size == 64 ? 1 : 0;
  a.wide_weight = p.K % kChunk == 0 && wide({p.qweight}, {});
  a.wide_x = wide({p.x}, {p.x_stride * static_cast<int64_t>(sizeof(T))});
  a.num_tiles = ceil_div(p.M, kTileM);
  return launch(wna16_rows_kernel<T, kBits, kTileM>, dim3(config.grid_n, config.grid_m),
                dim3(config.warps * kWarp), p.stream, a);
}

template <int kBits>
cudaError_t launch_rows(const Wna16LinearParams& p, const Wna16LinearConfig& config) {
  switch (config.tile_m) {
    case 1:
      return launch_tile<float, kBits, 1>(p, config);
    case 2:
      return launch_tile<float, kBits, 2>(p, config);
    case 4:
      return launch_tile<float, kBits, 4>(p, config);
    default:
      return launch_tile<float, kBits, 8>(p, config);
  }
}

}  // namespace
}  // namespace qsun
