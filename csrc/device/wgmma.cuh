// The tensor core's product of a warpgroup, four warps of which the first one's number divides by four
// (sm_90a only).
//
//   c (64 x kN, float32) += a (64 x 16) * b (16 x kN)        warp w of the four, lane = 4 * g + t
//   a    in registers: warp w has rows 16w .. 16w + 15, as mma_m16n8k16 has them (mma.cuh)
//   b    in shared memory: kN rows of 64 columns of 16 bits, the 16-byte pieces of row i exchanged by
//        piece ^ (i % 8), as the copy engine's 128-byte swizzle leaves them
//   c[4j], c[4j + 1]: row 16w + g, columns 8j + 2t, 8j + 2t + 1      c[4j + 2], c[4j + 3]: row 16w + g + 8
//
// A product runs on while its warps go on. From the call until wait_products() its registers belong to it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace qsun {

// Whether this compilation is for the one architecture that has these instructions.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH_SPECIFIC__ == 900
#define QSUN_HAS_WGMMA 1
#else
#define QSUN_HAS_WGMMA 0
#endif

// Describes b: 128-byte swizzle, 8 rows of 128 bytes are 1024 bytes. `shared` divides by 1024, or is such an
// address plus 32 bytes for each product of 16 columns to the right.
__device__ __forceinline__ uint64_t describe_operand(uint32_t shared) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kRowGroupStride = 1024ull / 16 << 32;
  constexpr uint64_t kUnusedStride = 1ull << 16;
  return kSwizzle128 | kRowGroupStride | kUnusedStride | (shared & 0x3ffffu) >> 4;
}

#if QSUN_HAS_WGMMA

// Before the first product, and after registers of one were written by other instructions.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of the products since the last call.
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending groups run.
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Sets the registers of each thread of the calling warpgroup, a multiple of 8: fewer, which others may then
// take, or more, which waits until they are there. All warps of a warpgroup call it.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Keeps the compiler from moving reads and writes of a register across this place: it does not know that a
// product goes on reading and writing after its instruction.
__device__ __forceinline__ void pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ __forceinline__ void pin(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }

template <typename T, int kN>
struct Product;

#define QSUN_C8(i)                                                                            \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define QSUN_C16(i) QSUN_C8(i), QSUN_C8(i + 8)
#define QSUN_C32(i) QSUN_C16(i), QSUN_C16(i + 16)
#define QSUN_C64(i) QSUN_C32(i), QSUN_C32(i + 32)

#define QSUN_R0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define QSUN_R8 "%8,%9,%10,%11,%12,%13,%14,%15"
#define QSUN_R16 "%16,%17,%18,%19,%20,%21,%22,%23"
#define QSUN_R24 "%24,%25,%26,%27,%28,%29,%30,%31"
#define QSUN_R32 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define QSUN_R48 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QSUN_R64                                                                                             \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89," \
  "%90,"                                                                                                     \
  "%91,%92,%93,%94,%95"
#define QSUN_R96                                                                                           \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%" \
  "117,"                                                                                                   \
  "%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// kN, type, the names of c's registers, of a's, of b's descriptor, and c as operands of the assembly.
#define QSUN_ISSUE(N, TYPE, C_NAMES, A_NAMES, B_NAME, ...)                                                 \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" C_NAMES "}, {" A_NAMES \
               "}, " B_NAME ", 1, 1, 1, 0;"                                                                \
               : __VA_ARGS__                                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

#define QSUN_PRODUCT(N, C_NAMES, A_NAMES, B_NAME, ...)                                                    \
  template <typename T>                                                                                   \
  struct Product<T, N> {                                                                                  \
    __device__ __forceinline__ static void issue(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b) { \
      if constexpr (std::is_same_v<T, __half>) {                                                          \
        QSUN_ISSUE(N, "f16", C_NAMES, A_NAMES, B_NAME, __VA_ARGS__);                                      \
      } else {                                                                                            \
        static_assert(std::is_same_v<T, __nv_bfloat16>);                                                  \
        QSUN_ISSUE(N, "bf16", C_NAMES, A_NAMES, B_NAME, __VA_ARGS__);                                     \
      }                                                                                                   \
    }                                                                                                     \
  };

QSUN_PRODUCT(16, QSUN_R0, "%8,%9,%10,%11", "%12", QSUN_C8(0))
QSUN_PRODUCT(32, QSUN_R0 "," QSUN_R8, "%16,%17,%18,%19", "%20", QSUN_C16(0))
QSUN_PRODUCT(48, QSUN_R0 "," QSUN_R8 "," QSUN_R16, "%24,%25,%26,%27", "%28", QSUN_C16(0), QSUN_C8(16))
QSUN_PRODUCT(64, QSUN_R0 "," QSUN_R8 "," QSUN_R16 "," QSUN_R24, "%32,%33,%34,%35", "%36", QSUN_C32(0))
QSUN_PRODUCT(96, QSUN_R0 "," QSUN_R8 "," QSUN_R16 "," QSUN_R24 "," QSUN_R32, "%48,%49,%50,%51", "%52",
             QSUN_C32(0), QSUN_C16(32))
QSUN_PRODUCT(128, QSUN_R0 "," QSUN_R8 "," QSUN_R16 "," QSUN_R24 "," QSUN_R32 "," QSUN_R48, "%64,%65,%66,%67",
             "%68", QSUN_C64(0))
QSUN_PRODUCT(192, QSUN_R0 "," QSUN_R8 "," QSUN_R16 "," QSUN_R24 "," QSUN_R32 "," QSUN_R48 "," QSUN_R64,
             "%96,%97,%98,%99", "%100", QSUN_C64(0), QSUN_C32(64))
QSUN_PRODUCT(256,
             QSUN_R0 "," QSUN_R8 "," QSUN_R16 "," QSUN_R24 "," QSUN_R32 "," QSUN_R48 "," QSUN_R64
                     "," QSUN_R96,
             "%128,%129,%130,%131", "%132", QSUN_C64(0), QSUN_C64(64))

#undef QSUN_PRODUCT
#undef QSUN_ISSUE
#undef QSUN_C8
#undef QSUN_C16
#undef QSUN_C32
#undef QSUN_C64
#undef QSUN_R0
#undef QSUN_R8
#undef QSUN_R16
#undef QSUN_R24
#undef QSUN_R32
#undef QSUN_R48
#undef QSUN_R64
#undef QSUN_R96

#endif  // QSUN_HAS_WGMMA

}  // namespace qsun
