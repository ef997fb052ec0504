// Root-mean-square norm of rows, with an optional residual added first.
//
// One block a row: r = x (+ residual) is written and its squares are summed, then the row is scaled. Decode
// has few rows, so latency decides. The weight is asked for before the launch waits for x, since a step reads
// it once and finds it in no cache. Rows of up to two vectors a thread stay in registers; of longer
// ones each thread reads back what it wrote or read itself.
#include "qsun/rms_norm.h"

#include <algorithm>

#include "device/dependent_launch.cuh"
#include "device/dtype.cuh"
#include "device/reduce.cuh"
#include "device/rms_norm.cuh"
#include "device/vector.cuh"
#include "runtime/alignment.h"
#include "runtime/checks.h"
#include "runtime/launch.h"

namespace qsun {

namespace {

constexpr int kMaxThreads = 1024;

}  // namespace

std::string to_string(const RmsNormParams& p) {
  return Fields()
      .add("num_rows", p.num_rows)
      .add("hidden_size", p.hidden_size)
      .add("residual", p.residual != nullptr ? "yes" : "no")
      .add("dtype", to_string(p.dtype))
      .str();
}

std::string to_string(const RmsNormConfig& c) {
  return Fields()
      .add("width", c.width)
      .add("threads", c.threads)
      .add("overlaps_producer", c.overlaps_producer)
      .str();
}

RmsNormConfig choose(const RmsNormParams& p, const DeviceProps& device) {
  const int64_t bytes = size_of(p.dtype);
  const bool is_wide = wide({p.x, p.residual, p.weight, p.out, p.residual_out},
                            {p.hidden_size * bytes, p.x_stride * bytes, p.residual_stride * bytes});
  RmsNormConfig config;
  config.width = is_wide ? static_cast<int>(16 / bytes) : 1;
  // As many loads a thread as stay in registers, while the block can grow
  const int64_t loads = ceil_div(p.hidden_size, config.width);
  config.threads = static_cast<int>(
      std::clamp<int64_t>(ceil_div(ceil_div(loads, kNormVectors), 32) * 32, 32, kMaxThreads));
  config.overlaps_producer = device.compute_major >= 9;
  return config;
}

namespace {

// A vector of r at h, written where there is a residual.
template <typename T, int kSize>
__device__ __forceinline__ Vector<T, kSize> residual_stream(const RmsNormParams& p, int64_t row, int64_t h) {
  Vector<T, kSize> r = load<kSize>(static_cast<const T*>(p.x) + row * p.x_stride + h);
  if (p.residual == nullptr) return r;
  const Vector<T, kSize> added = load<kSize>(static_cast<const T*>(p.residual) + row * p.residual_stride + h);
#pragma unroll
  for (int i = 0; i < kSize; ++i) r.data[i] = from_float<T>(to_float(r.data[i]) + to_float(added.data[i]));
  store(static_cast<T*>(p.residual_out) + row * p.hidden_size + h, r);
  return r;
}

// kHolds: the row stays in registers, kNormVectors vectors a thread.
template <typename T, int kSize, bool kHolds>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  launch_dependents();
  if (!kHolds || !p.prefetch_weight) wait_for_producers();

  // Rows
  const int64_t row = blockIdx.x;
  const auto* weight = static_cast<const T*>(p.weight);
  auto* out = static_cast<T*>(p.out) + row * p.hidden_size;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kSize;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kSize;
  const auto inverse_root = [&](float squares) {
    return norm_scale(block_sum(squares), p.hidden_size, p.eps);
  };

  if constexpr (kHolds) {
    Vector<T, kSize> weights[kNormVectors], held[kNormVectors];
#pragma unroll
    for (int i = 0; i < kNormVectors; ++i) {
      if (first + i * step < p.hidden_size) weights[i] = load<kSize>(weight + first + i * step);
    }
    if (p.prefetch_weight) wait_for_producers();
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kNormVectors; ++i) {
      if (first + i * step >= p.hidden_size) continue;
      held[i] = residual_stream<T, kSize>(p, row, first + i * step);
      squares = with_squares(held[i], squares);
    }
    const InverseRoot scale = inverse_root(squares);
#pragma unroll
    for (int i = 0; i < kNormVectors; ++i) {
      if (first + i * step >= p.hidden_size) continue;
      store_scaled(out + first + i * step, held[i], weights[i], scale);
    }
  } else {
    float squares = 0.0f;
    for (int64_t h = first; h < p.hidden_size; h += step) {
      squares = with_squares(residual_stream<T, kSize>(p, row, h), squares);
    }
    const InverseRoot scale = inverse_root(squares);
    const T* source = p.residual != nullptr ? static_cast<const T*>(p.residual_out) + row * p.hidden_size
                                            : static_cast<const T*>(p.x) + row * p.x_stride;
    for (int64_t h = first; h < p.hidden_size; h += step) {
      store_scaled(out + h, load<kSize>(source + h), load<kSize>(weight + h), scale);
    }
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
  DeviceProps props;
  if (Status status = props_of("rms_norm", p, &props); !status.ok()) return status;
  return run_on_device("rms_norm", p, [&] {
    const RmsNormConfig config = choose(p, props);
    LaunchOptions options;
    options.overlaps_producer = config.overlaps_producer;
    const bool holds = p.hidden_size <= int64_t{kNormVectors} * config.width * config.threads;
    return with_type(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      auto* kernel = config.width == 1 ? rms_norm_kernel<T, 1, false>
                     : holds           ? rms_norm_kernel<T, kWidth<T>, true>
                                       : rms_norm_kernel<T, kWidth<T>, false>;
      return launch_with(options, kernel, dim3(static_cast<unsigned>(p.num_rows)), dim3(config.threads),
                         p.device, p.stream, p);
    });
  });
}

}  // namespace qsun
