// Columns of x in the order of an act-order weight, as a launch of its own: what it costs is hidden behind
// the weights that the product behind it is already asking for. In the product itself each warp would gather
// its columns anew for every group of rows.
//
// A thread makes eight neighbours of the result. It has their places before it waits for x.
#include "qsun/gather_columns.h"

#include "device/dependent_launch.cuh"
#include "device/vector.cuh"
#include "qsun/device.h"
#include "runtime/checks.h"
#include "runtime/launch.h"

namespace qsun {

std::string to_string(const GatherColumnsParams& p) {
  return Fields()
      .add("M", p.M)
      .add("K", p.K)
      .add("columns", p.columns)
      .add("dtype", to_string(p.dtype))
      .str();
}

namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 8;  // of a thread

// Elements are moved, not computed with: both dtypes are 16 bits.
__global__ void __launch_bounds__(kThreads)
    gather_columns_kernel(const __grid_constant__ GatherColumnsParams p) {
  launch_dependents();
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kColumns;
  const bool has_columns = column < p.columns;
  if (!p.prefetch_perm) wait_for_producers();
  int places[kColumns];
  if (has_columns) {
    const Vector<int32_t, kColumns> own = load_readonly<kColumns>(p.perm + column);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) places[i] = own.data[i];
  }
  wait_for_producers();
  if (!has_columns) return;
#pragma unroll 1
  for (int64_t m = blockIdx.y; m < p.M; m += gridDim.y) {
    const auto* row = static_cast<const uint16_t*>(p.x) + m * p.x_stride;
    Vector<uint16_t, kColumns> values;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const bool is_inside = places[i] >= 0 && places[i] < p.K;
      values.data[i] = is_inside ? row[places[i]] : uint16_t{0};
    }
    store(static_cast<uint16_t*>(p.out) + m * p.columns + column, values);
  }
}

Status check(const GatherColumnsParams& p) {
  Checks checks;
  checks.known(p.dtype);
  checks.require(p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16, "dtype", to_string(p.dtype),
                 "float16 or bfloat16");
  checks.at_least("M", p.M, 0).at_least("K", p.K, 1).at_most("K", p.K, int64_t{1} << 30);
  checks.at_least("columns", p.columns, kColumns).multiple_of("columns", p.columns, kColumns);
  if (p.M > 0) {
    checks.not_null("x", p.x).not_null("perm", p.perm).not_null("out", p.out);
    checks.aligned("perm", p.perm, 16).aligned("out", p.out, 16);
  }
  return checks.status("gather_columns", p);
}

}  // namespace

Status gather_columns(const GatherColumnsParams& p) {
  if (Status status = check(p); !status.ok() || p.M == 0) return status;
  DeviceProps props;
  if (Status status = props_of("gather_columns", p, &props); !status.ok()) return status;
  return run_on_device("gather_columns", p, [&] {
    LaunchOptions options;
    options.overlaps_producer = props.compute_major >= 9;
    const int64_t rows = p.M < kMaxGridY ? p.M : kMaxGridY;
    return launch_with(options, gather_columns_kernel,
                       dim3(ceil_div(p.columns, kThreads * kColumns), static_cast<unsigned>(rows)),
                       dim3(kThreads), p.device, p.stream, p);
  });
}

}  // namespace qsun
