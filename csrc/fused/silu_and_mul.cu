// The gated activation between a decoder layer's two feed-forward matrices.
#include "qsun/silu_and_mul.h"

#include <algorithm>

#include "device/dtype.cuh"
#include "device/vector.cuh"
#include "runtime/alignment.h"
#include "runtime/checks.h"
#include "runtime/launch.h"

namespace qsun {

std::string to_string(const SiluAndMulParams& p) {
  return Fields().add("num_rows", p.num_rows).add("size", p.size).add("dtype", to_string(p.dtype)).str();
}

namespace {

constexpr int kThreads = 256;

// A thread an output vector, vectors of all rows in one sequence.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) silu_and_mul_kernel(SiluAndMulParams p) {
  const int64_t row_vectors = p.size / kSize;
  const int64_t num_vectors = p.num_rows * row_vectors;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < num_vectors; at += step) {
    const int64_t row = at / row_vectors;
    const int64_t column = at % row_vectors * kSize;
    const T* gate_source = static_cast<const T*>(p.x) + row * p.x_stride + column;
    const Vector<T, kSize> gate = load_readonly<kSize>(gate_source);
    Vector<T, kSize> result = load_readonly<kSize>(gate_source + p.size);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float g = to_float(gate.data[i]);
      result.data[i] = from_float<T>(g / (1.0f + expf(-g)) * to_float(result.data[i]));
    }
    store(static_cast<T*>(p.out) + row * p.size + column, result);
  }
}

Status check(const SiluAndMulParams& p) {
  Checks checks;
  checks.known(p.dtype).at_least("num_rows", p.num_rows, 0).at_least("size", p.size, 1);
  if (p.num_rows > 0) checks.not_null("x", p.x).not_null("out", p.out);
  return checks.status("silu_and_mul", p);
}

}  // namespace

Status silu_and_mul(const SiluAndMulParams& p) {
  if (Status status = check(p); !status.ok()) return status;
  if (p.num_rows == 0) return {};
  return run_on_device("silu_and_mul", p, [&] {
    return with_type(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const int64_t bytes = sizeof(T);
      const bool is_wide = wide({p.x, p.out}, {p.size * bytes, p.x_stride * bytes});
      auto* kernel = is_wide ? silu_and_mul_kernel<T, kWidth<T>> : silu_and_mul_kernel<T, 1>;
      const int64_t num_vectors = p.num_rows * (p.size / (is_wide ? kWidth<T> : 1));
      const int64_t grid = std::min(ceil_div(num_vectors, kThreads), kMaxGridX);
      return launch(kernel, dim3(grid), dim3(kThreads), p.stream, p);
    });
  });
}

}  // namespace qsun
