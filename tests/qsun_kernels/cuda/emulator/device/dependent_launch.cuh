// See csrc/device/dependent_launch.cuh. Kernels run one after another; what is checked is that a kernel
// launched to overlap its producer waits for it, and what it does before (producers.cpp).
#pragma once

namespace qsun {

constexpr bool kLaunchesOverlap = true;

inline void launch_dependents() { emulator::launch_dependents(); }

inline void wait_for_producers() { emulator::wait_for_producers(); }

}  // namespace qsun
