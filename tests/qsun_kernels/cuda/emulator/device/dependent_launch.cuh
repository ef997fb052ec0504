// See csrc/device/dependent_launch.cuh. Kernels run one after another; what is checked is that a kernel
// launched to overlap its producer waits for it.
#pragma once

namespace qsun {

inline void launch_dependents() {}

inline void wait_for_producers() { emulator::wait_for_producers(); }

}  // namespace qsun
