// The dense weight (N, K) that a packed weight stands for. A thread rebuilds 8 consecutive weights and writes
// them at once; neighbouring threads write neighbouring pieces.
#include "qsun/dequantize.h"

#include <algorithm>

#include "device/dtype.cuh"
#include "device/unpack.cuh"
#include "device/vector.cuh"
#include "runtime/alignment.h"
#include "runtime/checks.h"
#include "runtime/launch.h"

namespace qsun {

std::string to_string(const DequantizeParams& p) {
  return Fields()
      .add("N", p.N)
      .add("K", p.K)
      .add("bits", p.bits)
      .add("group_size", p.group_size < 0 ? "channel" : std::to_string(p.group_size))
      .add("zeros", p.qzeros != nullptr ? "stored" : "symmetric")
      .add("g_idx", p.g_idx != nullptr ? "yes" : "no")
      .add("scale_dtype", to_string(p.scale_dtype))
      .add("dtype", to_string(p.dtype))
      .str();
}

namespace {

constexpr int kPiece = 8;
constexpr int kThreads = 256;

struct DequantizeArguments {
  DequantizeParams p;
  int64_t row_words;
  int64_t row_pieces;  // ceil(K / 8)
  int64_t num_groups;
  int64_t group_codes;  // codes a group; K when a row is one group
  bool wide_out;
};

__device__ __forceinline__ float load_scale(const DequantizeParams& p, int64_t at) {
  switch (p.scale_dtype) {
    case DType::kFloat16:
      return to_float(load_element(static_cast<const __half*>(p.scales) + at));
    case DType::kBFloat16:
      return to_float(load_element(static_cast<const __nv_bfloat16*>(p.scales) + at));
    default:
      return load_element(static_cast<const float*>(p.scales) + at);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeArguments a) {
  const DequantizeParams& p = a.p;
  const int64_t num_pieces = p.N * a.row_pieces;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < num_pieces; at += step) {
    const int64_t n = at / a.row_pieces;
    const int64_t k = at % a.row_pieces * kPiece;

    // 8 codes are p.bits bytes: at most 64 bits, beginning at a byte of one word and ending in that word or
    // the next.
    const int64_t word = k * p.bits / 32;
    const int shift = static_cast<int>(k * p.bits % 32);
    const uint32_t* row = p.qweight + n * a.row_words;
    uint64_t codes = load_element(row + word);
    if (shift + kPiece * p.bits > 32 && word + 1 < a.row_words)
      codes |= static_cast<uint64_t>(load_element(row + word + 1)) << 32;
    codes >>= shift;

    Vector<T, kPiece> values;
    const uint32_t mask = (1u << p.bits) - 1u;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      values.data[i] = from_float<T>(0.0f);
      if (k + i < p.K) {
        const int64_t group = p.g_idx != nullptr ? load_element(p.g_idx + k + i) : (k + i) / a.group_codes;
        const int zero =
            p.qzeros != nullptr ? load_element(p.qzeros + n * a.num_groups + group) : 1 << (p.bits - 1);
        const uint32_t code = static_cast<uint32_t>(codes >> (i * p.bits)) & mask;
        const float weight =
            centred(code, kTwoTo23 + static_cast<float>(zero)) * load_scale(p, n * a.num_groups + group);
        values.data[i] = from_float<T>(weight);
      }
    }

    T* target = static_cast<T*>(p.out) + n * p.K + k;
    if (a.wide_out) {
      store(target, values);
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        if (k + i < p.K) target[i] = values.data[i];
      }
    }
  }
}

Status check(const DequantizeParams& p) {
  Checks checks;
  checks.known(p.dtype).known(p.scale_dtype);
  checks.one_of("bits", p.bits, {2, 3, 4, 8}).one_of("group_size", p.group_size, {32, 64, 128, -1});
  checks.at_least("N", p.N, 0).at_least("K", p.K, 1);
  if (p.N > 0) {
    checks.not_null("qweight", p.qweight).not_null("scales", p.scales).not_null("out", p.out);
    checks.aligned("qweight", p.qweight, 4).aligned("g_idx", p.g_idx, 4);
  }
  return checks.status("dequantize", p);
}

}  // namespace

Status dequantize(const DequantizeParams& p) {
  if (Status status = check(p); !status.ok()) return status;
  if (p.N == 0) return {};
  return run_on_device("dequantize", p, [&] {
    return with_type(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      DequantizeArguments a{};
      a.p = p;
      a.row_words = ceil_div(p.K * p.bits, 32);
      a.row_pieces = ceil_div(p.K, kPiece);
      a.group_codes = p.group_size < 0 ? p.K : p.group_size;
      a.num_groups = ceil_div(p.K, a.group_codes);
      a.wide_out = p.K % kPiece == 0 && wide({p.out}, {});
      const int64_t grid = std::min(ceil_div(p.N * a.row_pieces, kThreads), kMaxGridX);
      return launch(dequantize_kernel<T>, dim3(grid), dim3(kThreads), p.stream, a);
    });
  });
}

}  // namespace qsun
