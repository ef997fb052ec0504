// See csrc/device/cluster.cuh.
#pragma once

#include "device/shared.cuh"

namespace qsun {

inline void cluster_barrier() { emulator::cluster_barrier(); }

inline uint32_t load_from_block(uint32_t shared, int rank) {
  uint32_t word;
  std::memcpy(&word, emulator::in_block(shared, sizeof(word), rank), sizeof(word));
  return word;
}

inline void store_to_block(uint32_t shared, int rank, uint32_t value) {
  std::memcpy(emulator::in_block_to_write(shared, sizeof(value), rank), &value, sizeof(value));
}

}  // namespace qsun
