// Instructions that all lanes of a warp execute together: lanes arrive one after another, the last one does
// the work for all.
#pragma GCC optimize("O3")

#include "machine.h"
#include "rounding.h"

namespace emulator {

namespace {

struct Shuffle {
  const void* mine;
  void* theirs;
  unsigned size;
  int partner;
};

struct Load {
  const unsigned char* row;
  uint32_t* r;
};

struct Product {
  Format format;
  float* c;
  const uint32_t* a;
  uint32_t b0, b1;
};

enum class Kind : uint8_t { kBarrier, kShuffle, kLoad, kLoadTransposed, kProduct };

// Where the lanes left what they bring; their stacks stay while they wait.
struct Warp {
  int arrived = 0;
  Kind kind;
  const void* lanes[kLanes];
};

std::vector<Warp> warps;  // of a cluster

void shuffle_lanes(const void* const (&lanes)[kLanes]) {
  for (const void* lane : lanes) {
    const auto& mine = *static_cast<const Shuffle*>(lane);
    std::memcpy(mine.theirs, static_cast<const Shuffle*>(lanes[mine.partner])->mine, mine.size);
  }
}

void load_lanes(const void* const (&lanes)[kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const unsigned char* row = static_cast<const Load*>(lanes[8 * i + lane / 4])->row;
      std::memcpy(static_cast<const Load*>(lanes[lane])->r + i, row + lane % 4 * 4, 4);
    }
  }
}

void load_lanes_transposed(const void* const (&lanes)[kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      auto* pair = reinterpret_cast<unsigned char*>(static_cast<const Load*>(lanes[lane])->r + i);
      for (int half = 0; half < 2; ++half) {
        const unsigned char* row = static_cast<const Load*>(lanes[8 * i + lane % 4 * 2 + half])->row;
        std::memcpy(pair + half * 2, row + lane / 4 * 2, 2);
      }
    }
  }
}

// Sums in double, rounded once.
template <typename T>
__attribute__((no_sanitize("undefined"))) void multiply_lanes(const void* const (&lanes)[kLanes]) {
  double a[16][16], b[16][8], c[16][8];
  const auto put = [](double (&row)[16], int k, uint32_t pair) {
    row[k] = T::widened(pair & 0xffffu), row[k + 1] = T::widened(pair >> 16);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& mine = *static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4, t2 = lane % 4 * 2;
    put(a[g], t2, mine.a[0]), put(a[g + 8], t2, mine.a[1]);
    put(a[g], t2 + 8, mine.a[2]), put(a[g + 8], t2 + 8, mine.a[3]);
    b[t2][g] = T::widened(mine.b0 & 0xffffu), b[t2 + 1][g] = T::widened(mine.b0 >> 16);
    b[t2 + 8][g] = T::widened(mine.b1 & 0xffffu), b[t2 + 9][g] = T::widened(mine.b1 >> 16);
    c[g][t2] = mine.c[0], c[g][t2 + 1] = mine.c[1], c[g + 8][t2] = mine.c[2], c[g + 8][t2 + 1] = mine.c[3];
  }
  for (int m = 0; m < 16; ++m) {
    double sum[8];
    for (int n = 0; n < 8; ++n) sum[n] = c[m][n];
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) sum[n] += a[m][k] * b[k][n];
    }
    for (int n = 0; n < 8; ++n) c[m][n] = sum[n];
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& mine = *static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4, t2 = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) mine.c[i] = static_cast<float>(c[g + i / 2 * 8][t2 + i % 2]);
  }
}

void perform(Kind kind, const void* const (&lanes)[kLanes]) {
  if (kind == Kind::kShuffle) return shuffle_lanes(lanes);
  if (kind == Kind::kLoad) return load_lanes(lanes);
  if (kind == Kind::kLoadTransposed) return load_lanes_transposed(lanes);
  if (kind == Kind::kBarrier) return;
  const Format format = static_cast<const Product*>(lanes[0])->format;
  format == Format::kFloat16 ? multiply_lanes<Float16>(lanes) : multiply_lanes<BFloat16>(lanes);
}

void together(Kind kind, const void* mine) {
  const Thread& thread = this_thread();
  Warp& warp = warps[thread.warp];
  if (warp.arrived > 0 && warp.kind != kind)
    fail("lanes of a warp are at different instructions of the warp");
  warp.kind = kind;
  warp.lanes[thread.lane] = mine;
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    perform(kind, warp.lanes);
    wake_warp();
    wait(State::kReady);
  } else {
    wait(State::kAtWarp);
  }
}

}  // namespace

void prepare_warps(int count) { warps.assign(count, Warp()); }

void warp_barrier(unsigned mask) {
  if (mask != 0xffffffffu) fail("the emulator knows barriers of whole warps only");
  together(Kind::kBarrier, nullptr);
}

void exchange(const void* mine, void* theirs, unsigned size, unsigned mask, int partner) {
  if (mask != 0xffffffffu) fail("the emulator knows shuffles of whole warps only");
  if (partner < 0 || partner >= kLanes) fail("a shuffle with a lane that does not exist");
  const Shuffle shuffle{mine, theirs, size, partner};
  together(Kind::kShuffle, &shuffle);
}

void load_matrices(uint32_t (&r)[4], uint32_t row_address) {
  const Load load{at_address(row_address, 16), r};
  together(Kind::kLoad, &load);
}

void load_matrices_transposed(uint32_t (&r)[4], uint32_t row_address) {
  const Load load{at_address(row_address, 16), r};
  together(Kind::kLoadTransposed, &load);
}

void multiply(Format format, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Product product{format, c, a, b0, b1};
  together(Kind::kProduct, &product);
}

}  // namespace emulator
