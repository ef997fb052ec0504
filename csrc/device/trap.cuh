// Indices that arrive in device memory cannot be refused on the host without waiting for the device.
#pragma once

namespace qsun {

// Ends the kernel with an error, which the next synchronisation reports, unless `holds`. Used before an
// access that would otherwise fall outside its tensor: a wrong answer, or another request's memory.
__device__ __forceinline__ void trap_unless(bool holds) {
  if (!holds) __trap();
}

}  // namespace qsun
