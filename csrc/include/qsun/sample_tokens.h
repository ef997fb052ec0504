#pragma once

#include <cstdint>
#include <string>

#include "qsun/device.h"
#include "qsun/status.h"
#include "qsun/types.h"

namespace qsun {

// One token a row. With x the logits of a row as float32: distance = (max x - x) / temperature; the tokens in
// the order of their distance, equals by index; of these the first top_k; of these the shortest beginning
// whose mass exp(-distance) is at least top_p of theirs; of these those with distance <= -log(min_p); of
// these the one with the largest noise - distance, where the noise is a Gumbel variable of the row's key and
// the index. A row without a temperature takes the largest x. Among equals the lowest index comes first.
struct SampleTokensParams {
  const void* logits = nullptr;        // (num_rows, vocab_size) dtype, rows logits_stride elements apart
  const float* temperature = nullptr;  // (num_rows,) 0: the largest logit
  const int32_t* top_k = nullptr;      // (num_rows,) 0: all
  const float* top_p = nullptr;        // (num_rows,) 1: all
  const float* min_p = nullptr;        // (num_rows,) 0: all
  const int64_t* keys = nullptr;       // (num_rows,)
  int64_t* tokens = nullptr;           // (num_rows,)
  uint8_t* valid = nullptr;            // (num_rows,) 0, with token 0: NaN, +inf, or nothing but -inf; else 1
  int64_t num_rows = 0;                // 0: nothing is launched
  int64_t vocab_size = 0;              // at most kMaxVocabulary
  int64_t logits_stride = 0;
  DType dtype = DType::kFloat32;
  int device = 0;
  Stream stream = nullptr;
};
QSUN_API std::string to_string(const SampleTokensParams& params);

constexpr int64_t kMaxVocabulary = int64_t{1} << 22;  // masses of that many tokens add up in 63 bits

struct SampleTokensConfig {
  int blocks = 1;        // that share a row: the size of a cluster
  int threads = 0;       // of a block
  int shared_bytes = 0;  // of a block
  bool staged = false;   // its share of the row stays in shared memory; else it is read again for every pass
  bool overlaps_producer = false;
};
QSUN_API std::string to_string(const SampleTokensConfig& config);

// Pure: looks at sizes, never at data.
QSUN_API SampleTokensConfig choose(const SampleTokensParams& params, const DeviceProps& device);

QSUN_API Status sample_tokens(const SampleTokensParams& params);

}  // namespace qsun
