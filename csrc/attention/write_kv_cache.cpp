// The operator: checks, and which kernel serves a call.
#include "qsun/write_kv_cache.h"

#include <algorithm>

#include "attention/write_kv.h"
#include "runtime/alignment.h"
#include "runtime/checks.h"
#include "runtime/launch.h"

namespace qsun {

std::string to_string(const WriteKvCacheParams& p) {
  return Fields()
      .add("num_tokens", p.num_tokens)
      .add("num_q_heads", p.num_q_heads)
      .add("num_kv_heads", p.num_kv_heads)
      .add("head_dim", p.head_dim)
      .add("num_blocks", p.num_blocks)
      .add("block_size", p.block_size)
      .add("norm", p.k_norm != nullptr ? "yes" : "no")
      .add("rope", p.cos_sin != nullptr ? "yes" : "no")
      .add("rotate", p.rotate ? "yes" : "no")
      .add("kv_dtype", to_string(p.kv_dtype))
      .add("kv_scales", to_string(p.kv_scales))
      .add("splits", p.splits)
      .add("dtype", to_string(p.dtype))
      .str();
}

std::string to_string(const WriteKvCacheConfig& c) {
  return Fields()
      .add("copies", c.copies)
      .add("is_wide", c.is_wide)
      .add("lanes", c.lanes)
      .add("overlaps_producer", c.overlaps_producer)
      .str();
}

int lanes_of_head(int64_t head_dim, int64_t element_bytes) {
  const int64_t vector = 16 / element_bytes;
  const int64_t needed = ceil_div(ceil_div(head_dim, 2), vector);
  int lanes = 1;
  while (lanes < needed) lanes *= 2;
  return lanes;
}

int64_t head_tiles(int64_t num_heads, int lanes) { return ceil_div(num_heads * lanes, 32); }

WriteKvCacheConfig choose(const WriteKvCacheParams& p, const DeviceProps& props) {
  const int64_t bytes = size_of(p.dtype);
  const int64_t source_bytes = p.splits > 0 ? 4 : bytes;
  const bool has_steps =
      p.num_q_heads > 0 || p.k_norm != nullptr || p.cos_sin != nullptr || p.rotate || p.splits > 0;
  WriteKvCacheConfig config;
  config.copies = !has_steps && p.kv_dtype == p.dtype;
  config.is_wide = wide({p.k, p.v, p.q, p.q_out, p.k_cache, p.v_cache, p.cos_sin, p.q_norm, p.k_norm},
                        {p.k_stride * source_bytes, p.v_stride * source_bytes, p.q_stride * source_bytes,
                         p.split_stride * source_bytes});
  if (config.copies) {
    config.is_wide = config.is_wide && p.head_dim * bytes % 16 == 0;
  } else {
    config.is_wide = config.is_wide && p.head_dim * bytes % 32 == 0;  // both halves of a head
    config.lanes = lanes_of_head(p.head_dim, bytes);
  }
  config.overlaps_producer = props.compute_major >= 9;
  return config;
}

namespace {

bool is_power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

void check_steps(const WriteKvCacheParams& p, Checks* checks) {
  const int64_t bytes = size_of(p.dtype);
  checks->at_most("head_dim", p.head_dim, kMaxKvHeadBytes / bytes);
  checks->require(p.q_norm == nullptr || p.k_norm != nullptr, "q_norm", "given", "null where k_norm is null");
  if (p.cos_sin != nullptr) {
    checks->multiple_of("head_dim", p.head_dim, 2).at_least("max_positions", p.max_positions, 1);
    if (p.num_tokens > 0) checks->not_null("positions", p.positions);
  }
  if (p.rotate) {
    checks->require(is_power_of_two(p.head_dim) && p.head_dim * bytes >= 32, "head_dim",
                    std::to_string(p.head_dim), "a power of two, at least 16 (8 in float32), to rotate");
  }
  if (p.num_q_heads > 0) {
    checks->require(p.q_norm != nullptr || p.k_norm == nullptr, "q_norm", "null", "given where k_norm is");
    if (p.num_tokens > 0) checks->not_null("q", p.q).not_null("q_out", p.q_out);
  }
}

void check_codes(const WriteKvCacheParams& p, Checks* checks) {
  const bool is_code = size_of(p.kv_dtype) == 0;
  const bool is_token = p.kv_scales == KvScales::kToken;
  const bool is_tensor = p.kv_scales == KvScales::kTensor && p.kv_dtype == DType::kFloat8E4M3;
  checks->require(is_code ? is_token || is_tensor : p.kv_scales == KvScales::kNone, "kv_scales",
                  to_string(p.kv_scales),
                  !is_code                           ? "none for a cache of values"
                  : p.kv_dtype == DType::kFloat8E4M3 ? "token or tensor"
                                                     : "token");
  // A lane stores whole bytes: neighbours of a pair belong to one lane.
  if (p.kv_dtype == DType::kInt4) checks->multiple_of("head_dim", p.head_dim, 4);
  if (is_code && p.num_tokens > 0 && p.num_blocks > 0) {
    checks->not_null("k_scale", p.k_scale).not_null("v_scale", p.v_scale);
  }
}

Status check(const WriteKvCacheParams& p, const WriteKvCacheConfig& config) {
  Checks checks;
  checks.known(p.dtype).at_least("num_tokens", p.num_tokens, 0);
  checks.at_least("num_blocks", p.num_blocks, 0).at_least("num_q_heads", p.num_q_heads, 0);
  checks.at_least("num_kv_heads", p.num_kv_heads, 1).at_least("head_dim", p.head_dim, 1);
  checks.at_least("block_size", p.block_size, 1);
  checks.at_least("splits", p.splits, 0);
  checks.require(p.splits == 0 || size_of(p.dtype) == 2, "dtype", to_string(p.dtype),
                 "float16 or bfloat16 where sums are to be added");
  checks.require(to_string(p.kv_dtype) != std::string("unknown"), "kv_dtype",
                 std::to_string(static_cast<int>(p.kv_dtype)), "0 to 5 (see DType)");
  if (p.num_tokens > 0) {
    checks.not_null("k", p.k).not_null("v", p.v).not_null("slot_mapping", p.slot_mapping);
    if (p.num_blocks > 0) checks.not_null("k_cache", p.k_cache).not_null("v_cache", p.v_cache);
  }
  if (checks.ok() && !config.copies) {
    check_steps(p, &checks);
    check_codes(p, &checks);
    const int64_t tiles =
        head_tiles(p.num_q_heads, config.lanes) + 2 * head_tiles(p.num_kv_heads, config.lanes);
    checks.at_most("num_tokens", p.num_tokens, kMaxGridX);
    checks.at_most("blocks for the heads of a token", ceil_div(tiles, kKvWarps), kMaxGridY);
  }
  return checks.status("write_kv_cache", p);
}

}  // namespace

Status write_kv_cache(const WriteKvCacheParams& p) {
  // What overlaps is chosen below: checks need no device.
  if (size_of(p.dtype) == 0) return Checks().known(p.dtype).status("write_kv_cache", p);
  if (Status status = check(p, choose(p, {})); !status.ok()) return status;
  if (p.num_tokens == 0) return {};
  DeviceProps props;
  if (Status status = props_of("write_kv_cache", p, &props); !status.ok()) return status;
  const WriteKvCacheConfig config = choose(p, props);
  return run_on_device("write_kv_cache", p, [&] {
    return config.copies ? launch_write_kv_copy(p, config) : launch_write_kv_heads(p, config);
  });
}

}  // namespace qsun
