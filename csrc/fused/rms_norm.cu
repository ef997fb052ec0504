// Root-mean-square norm of rows, with an optional residual added first.
//
// One block a row. The first pass reads x (and the residual), writes r and sums its squares; the second
// scales the row. The second pass reads back what the same thread wrote or read in the first, out of the
// cache: rows are a few KB, so this costs less than it would to hold rows of any length in registers.
#include "qsun/rms_norm.h"

#include <algorithm>

#include "device/dtype.cuh"
#include "device/inverse_root.cuh"
#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "runtime/alignment.h"
#include "runtime/checks.h"
#include "runtime/launch.h"

namespace qsun {

std::string to_string(const RmsNormParams& p) {
  return Fields()
      .add("num_rows", p.num_rows)
      .add("hidden_size", p.hidden_size)
      .add("residual", p.residual != nullptr ? "yes" : "no")
      .add("dtype", to_string(p.dtype))
      .str();
}

std::string to_string(const RmsNormConfig& c) {
  return Fields().add("width", c.width).add("threads", c.threads).str();
}

RmsNormConfig choose(const RmsNormParams& p) {
  const int64_t bytes = size_of(p.dtype);
  const bool is_wide = wide({p.x, p.residual, p.weight, p.out, p.residual_out},
                            {p.hidden_size * bytes, p.x_stride * bytes, p.residual_stride * bytes});
  RmsNormConfig config;
  config.width = is_wide ? static_cast<int>(16 / bytes) : 1;
  // Two loads a thread at most while the block can grow: decode has few rows, so latency decides.
  const int64_t loads = ceil_div(p.hidden_size, config.width);
  config.threads = static_cast<int>(std::clamp<int64_t>(ceil_div(ceil_div(loads, 2), 32) * 32, 32, 1024));
  return config;
}

namespace {

constexpr int kMaxThreads = 1024;

template <typename T, int kSize>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(RmsNormParams p) {
  // Rows
  const int64_t row = blockIdx.x;
  const auto* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const auto* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
  const auto* weight = static_cast<const T*>(p.weight);
  auto* out = static_cast<T*>(p.out) + row * p.hidden_size;
  auto* residual_out = static_cast<T*>(p.residual_out) + row * p.hidden_size;
  const bool has_residual = p.residual != nullptr;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kSize;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kSize;

  // Residual and sum of squares
  float squares = 0.0f;
  for (int64_t h = first; h < p.hidden_size; h += step) {
    Vector<T, kSize> r = load<kSize>(x + h);
    if (has_residual) {
      const Vector<T, kSize> added = load<kSize>(residual + h);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        r.data[i] = from_float<T>(to_float(r.data[i]) + to_float(added.data[i]));
      store(residual_out + h, r);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) squares = fmaf(to_float(r.data[i]), to_float(r.data[i]), squares);
  }
  const float mean = block_sum(squares) / static_cast<float>(p.hidden_size);
  const InverseRoot scale(mean + p.eps);

  // Scale; every thread reads what it wrote or read itself, so no thread waits for another.
  const T* source = has_residual ? residual_out : x;
  for (int64_t h = first; h < p.hidden_size; h += step) {
    Vector<T, kSize> r = load<kSize>(source + h);
    const Vector<T, kSize> w = load_readonly<kSize>(weight + h);
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      r.data[i] = from_float<T>(scale.times(to_float(r.data[i]), to_float(w.data[i])));
    store(out + h, r);
  }
}

Status check(const RmsNormParams& p) {
  Checks checks;
  checks.known(p.dtype).at_least("num_rows", p.num_rows, 0).at_most("num_rows", p.num_rows, kMaxGridX);
  checks.at_least("hidden_size", p.hidden_size, 1);
  if (p.num_rows > 0) {
    checks.not_null("x", p.x).not_null("weight", p.weight).not_null("out", p.out);
    checks.require((p.residual == nullptr) == (p.residual_out == nullptr), "residual_out",
                   p.residual_out == nullptr ? "null" : "given", "null exactly when residual is null");
  }
  return checks.status("rms_norm", p);
}

}  // namespace

Status rms_norm(const RmsNormParams& p) {
  if (Status status = check(p); !status.ok()) return status;
  if (p.num_rows == 0) return {};
  return run_on_device("rms_norm", p, [&] {
    const RmsNormConfig config = choose(p);
    return with_type(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      auto* kernel = config.width == 1 ? rms_norm_kernel<T, 1> : rms_norm_kernel<T, kWidth<T>>;
      return launch(kernel, dim3(p.num_rows), dim3(config.threads), p.stream, p);
    });
  });
}

}  // namespace qsun
