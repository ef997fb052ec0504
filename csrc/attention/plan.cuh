// What the planning kernel and the planned one must agree on: the units of a request.
#pragma once

#include "attention/plan.h"

namespace qsun {

// The first position that any query token of a request attends to.
__device__ __forceinline__ int first_token(int length, int reach) { return max(length - reach, 0); }

// Tiles that hold the positions attended to; tiles begin at multiples of their size.
__device__ __forceinline__ int tiles_of(int length, int reach) {
  const int first = first_token(length, reach);
  if (first >= length) return 0;
  return (length - 1) / kTileTokens - first / kTileTokens + 1;
}

}  // namespace qsun
