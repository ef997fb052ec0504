// The gated activation between a decoder layer's two feed-forward matrices.
#include "qsun/silu_and_mul.h"

#include <algorithm>

#include "device/dependent_launch.cuh"
#include "device/dtype.cuh"
#include "device/vector.cuh"
#include "runtime/alignment.h"
#include "runtime/checks.h"
#include "runtime/launch.h"

namespace qsun {

std::string to_string(const SiluAndMulParams& p) {
  return Fields().add("num_rows", p.num_rows).add("size", p.size).add("dtype", to_string(p.dtype)).str();
}

std::string to_string(const SiluAndMulConfig& c) {
  return Fields()
      .add("width", c.width)
      .add("blocks", c.blocks)
      .add("overlaps_producer", c.overlaps_producer)
      .str();
}

namespace {

constexpr int kThreads = 256;

}  // namespace

SiluAndMulConfig choose(const SiluAndMulParams& p, const DeviceProps& props) {
  const int64_t bytes = size_of(p.dtype);
  SiluAndMulConfig config;
  config.width = wide({p.x, p.out}, {p.size * bytes, p.x_stride * bytes}) ? static_cast<int>(16 / bytes) : 1;
  const int64_t vectors = p.num_rows * (p.size / config.width);
  config.blocks = static_cast<int>(std::min(ceil_div(vectors, kThreads), kMaxGridX));
  config.overlaps_producer = props.compute_major >= 9;
  return config;
}

namespace {

// A thread an output vector, vectors of all rows in one sequence. x is read by plain loads: the kernel in
// front may still write it when this one begins.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) silu_and_mul_kernel(const __grid_constant__ SiluAndMulParams p) {
  launch_dependents();
  wait_for_producers();
  const int64_t row_vectors = p.size / kSize;
  const int64_t num_vectors = p.num_rows * row_vectors;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < num_vectors; at += step) {
    const int64_t row = at / row_vectors;
    const int64_t column = at % row_vectors * kSize;
    const T* gate_source = static_cast<const T*>(p.x) + row * p.x_stride + column;
    const Vector<T, kSize> gate = load<kSize>(gate_source);
    Vector<T, kSize> result = load<kSize>(gate_source + p.size);
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
  DeviceProps props;
  if (Status status = props_of("silu_and_mul", p, &props); !status.ok()) return status;
  return run_on_device("silu_and_mul", p, [&] {
    const SiluAndMulConfig config = choose(p, props);
    LaunchOptions options;
    options.overlaps_producer = config.overlaps_producer;
    return with_type(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      auto* kernel = config.width == 1 ? silu_and_mul_kernel<T, 1> : silu_and_mul_kernel<T, kWidth<T>>;
      return launch_with(options, kernel, dim3(config.blocks), dim3(kThreads), p.device, p.stream, p);
    });
  });
}

}  // namespace qsun
