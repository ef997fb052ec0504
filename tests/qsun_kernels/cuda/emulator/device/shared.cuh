// See csrc/device/shared.cuh. Addresses are checked: divisible by the size of the access, and of the block.
#pragma once

#include <cstdint>

namespace qsun {

inline unsigned char* dynamic_shared() { return emulator::dynamic_shared(); }

inline uint32_t shared_address(const void* shared) { return emulator::shared_address(shared); }

template <typename T>
inline T load_shared(uint32_t address) {
  T value;
  std::memcpy(&value, emulator::at_address(address, sizeof(T)), sizeof(T));
  return value;
}
template <typename T>
inline void store_shared(uint32_t address, T value) {
  std::memcpy(emulator::at_address(address, sizeof(T)), &value, sizeof(T));
}

inline uint32_t load_shared_u16(uint32_t address) { return load_shared<uint16_t>(address); }
inline uint32_t load_shared_u32(uint32_t address) { return load_shared<uint32_t>(address); }
inline uint2 load_shared_u64(uint32_t address) { return load_shared<uint2>(address); }
inline uint4 load_shared_u128(uint32_t address) { return load_shared<uint4>(address); }
inline float load_shared_f32(uint32_t address) { return load_shared<float>(address); }
inline void store_shared_u16(uint32_t address, uint32_t value) {
  store_shared(address, static_cast<uint16_t>(value));
}
inline void store_shared_u32(uint32_t address, uint32_t value) { store_shared(address, value); }
inline void store_shared_f32(uint32_t address, float value) { store_shared(address, value); }
inline void store_shared_u128(uint32_t address, uint4 value) { store_shared(address, value); }

}  // namespace qsun
