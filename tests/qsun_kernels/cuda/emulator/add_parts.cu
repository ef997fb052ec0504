// A way for tests to the kernels that add the parts of a split product: what leaves those parts is not
// emulated (wgmma).
#include "runtime/launch.h"
#include "wna16/parts.h"

// Adds `splits` parts float32 (splits, M, padded N) with what follows a product, in the dtype of code
// `dtype`. *norm_blocks: how many blocks have a row where the norm is made in the same launch, else 0.
extern "C" __attribute__((visibility("default"))) int add_parts(const float* parts, const void* bias,
                                                                const void* residual, const void* norm_weight,
                                                                void* out, void* norm_out, int64_t M,
                                                                int64_t N, int splits, float eps, int dtype,
                                                                int* norm_blocks) {
  qsun::Wna16PanelsParams p;
  p.scratch = const_cast<float*>(parts);
  p.bias = bias, p.residual = residual, p.norm_weight = norm_weight;
  p.out = out, p.norm_out = norm_out;
  p.M = M, p.N = N, p.residual_stride = N, p.out_stride = N;
  p.norm_eps = eps, p.dtype = static_cast<qsun::DType>(dtype);
  qsun::DeviceProps props;
  if (!qsun::device_props(p.device, &props).ok()) return cudaErrorInvalidDevice;
  const bool norms = qsun::norms_parts(p, splits, props);
  *norm_blocks = norms ? qsun::choose_norm_parts(p, props).blocks : 0;
  const bool overlaps = props.compute_major >= 9;
  const qsun::DeviceGuard guard(p.device);
  return p.dtype == qsun::DType::kFloat16 ? qsun::launch_add_parts<__half>(p, splits, overlaps)
                                          : qsun::launch_add_parts<__nv_bfloat16>(p, splits, overlaps);
}
