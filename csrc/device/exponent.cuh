// Powers and logarithms to the base 2 in one instruction each: relative error of a power, absolute one of a
// logarithm about 2^-22. Numbers below the normal range count as zero; exp2f and log2f go round that with
// three instructions more.
#pragma once

namespace qsun {

__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ float fast_log2(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return log2f(x);
#endif
}

}  // namespace qsun
