// How the blocks of a launch find out which of them comes last.
#pragma once

#include <cstdint>

namespace qsun {

// Adds one to `counter` and returns what it held, for the whole block of the calling thread. What the block's
// threads wrote before a barrier in front of this call is seen by a block that arrives later, by its threads
// behind a barrier after its own call: the one thread's release and acquire stand for all that the barriers
// order. A fence of every thread would say the same and takes longer than the rest of a merge.
__device__ __forceinline__ int32_t arrive_in_order(int32_t* counter) {
  int32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

}  // namespace qsun
