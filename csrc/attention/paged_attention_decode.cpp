// The operator: checks, the choice of how to cut the work, and the two launches.
#include "qsun/paged_attention_decode.h"

#include <algorithm>

#include "attention/split.h"
#include "runtime/checks.h"
#include "runtime/launch.h"

namespace qsun {

std::string to_string(const PagedAttentionDecodeParams& p) {
  return Fields()
      .add("batch", p.batch)
      .add("num_q_heads", p.num_q_heads)
      .add("num_kv_heads", p.num_kv_heads)
      .add("head_dim", p.head_dim)
      .add("num_blocks", p.num_blocks)
      .add("block_size", p.block_size)
      .add("max_blocks", p.max_blocks)
      .add("window", p.window < 0 ? "none" : std::to_string(p.window))
      .add("dtype", to_string(p.dtype))
      .str();
}

std::string to_string(const PagedAttentionDecodeConfig& c) {
  return Fields()
      .add("head_tile", c.head_tile)
      .add("head_tiles", c.head_tiles)
      .add("lanes", c.lanes)
      .add("num_parts", c.num_parts)
      .add("grid", c.grid)
      .str();
}

namespace {

constexpr int64_t kBlocksPerSm = 4;       // what registers let run at once, about
constexpr int64_t kMinPartTokens = 64;    // shorter parts cost more to combine than they save
constexpr int64_t kMaxPartTokens = 4096;  // longer ones let one request outlast a batch of short ones
constexpr int64_t kMaxTokens = 1 << 30;   // positions count in 32 bits on the device
constexpr int64_t kMaxParts = 256;        // a thread of the combining kernel goes through all of them

Checks check_sizes(const PagedAttentionDecodeParams& p) {
  Checks checks;
  checks.known(p.dtype).at_least("batch", p.batch, 0).at_least("num_kv_heads", p.num_kv_heads, 1);
  checks.at_least("num_q_heads", p.num_q_heads, 1);
  if (checks.ok()) checks.multiple_of("num_q_heads", p.num_q_heads, p.num_kv_heads);
  checks.at_least("head_dim", p.head_dim, 8).at_most("head_dim", p.head_dim, 256);
  checks.multiple_of("head_dim", p.head_dim, 8);
  checks.at_least("block_size", p.block_size, 8).at_most("block_size", p.block_size, 65536);
  checks.require((p.block_size & (p.block_size - 1)) == 0, "block_size", std::to_string(p.block_size),
                 "a power of two");
  checks.at_least("max_blocks", p.max_blocks, 0).at_least("num_blocks", p.num_blocks, 0);
  checks.at_most("max_blocks * block_size", p.max_blocks * p.block_size, kMaxTokens);
  checks.at_least("window", p.window, -1);
  checks.at_most("batch * num_q_heads", p.batch * p.num_q_heads, kMaxGridX / kMaxParts);
  return checks;
}

Status check(const PagedAttentionDecodeParams& p) {
  Checks checks = check_sizes(p);
  if (p.batch > 0) {
    checks.not_null("q", p.q);
    if (p.num_blocks > 0) checks.not_null("k_cache", p.k_cache).not_null("v_cache", p.v_cache);
    checks.not_null("seq_lens", p.seq_lens).not_null("out", p.out).not_null("lse", p.lse);
    if (p.max_blocks > 0) checks.not_null("block_table", p.block_table);
    checks.aligned("k_cache", p.k_cache, 16)
        .aligned("v_cache", p.v_cache, 16)
        .aligned("scratch", p.scratch, 16);
  }
  return checks.status("paged_attention_decode", p);
}

}  // namespace

Status paged_attention_decode_sizes(const PagedAttentionDecodeParams& p) {
  return check_sizes(p).status("paged_attention_decode", p);
}

PagedAttentionDecodeConfig choose(const PagedAttentionDecodeParams& p, const DeviceProps& props) {
  PagedAttentionDecodeConfig c;
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  c.head_tile = group <= 1 ? 1 : group <= 4 ? 4 : 8;
  c.head_tiles = static_cast<int>(ceil_div(group, c.head_tile));
  c.lanes = p.head_dim <= 64 ? 8 : p.head_dim <= 128 ? 16 : 32;
  const int64_t whole =
      std::max<int64_t>(p.batch * p.num_kv_heads * c.head_tiles, 1);  // blocks without cutting
  const int64_t room = p.max_blocks * p.block_size;
  const int64_t tokens = p.window >= 0 ? std::min(p.window, room) : room;
  const int64_t wanted =
      std::max(ceil_div(kBlocksPerSm * props.sm_count, whole), ceil_div(tokens, kMaxPartTokens));
  const int64_t useful = std::clamp<int64_t>(ceil_div(tokens, kMinPartTokens), 1, kMaxParts);
  c.num_parts = static_cast<int>(std::min(wanted, useful));
  c.grid = p.batch * p.num_kv_heads * c.head_tiles * c.num_parts;
  return c;
}

int64_t paged_attention_decode_scratch_bytes(const PagedAttentionDecodeParams& p, const DeviceProps& props) {
  const PagedAttentionDecodeConfig c = choose(p, props);
  if (c.num_parts == 1) return 0;
  const int64_t values = partial_lse_values(p, c) + p.batch * p.num_q_heads * c.num_parts * p.head_dim;
  return values * static_cast<int64_t>(sizeof(float));
}

Status paged_attention_decode(const PagedAttentionDecodeParams& p) {
  if (Status status = check(p); !status.ok()) return status;
  if (p.batch == 0) return {};
  DeviceProps props;
  if (Status status = device_props(p.device, &props); !status.ok()) {
    return {status.code(), "paged_attention_decode", to_string(p), status.error()};
  }
  Checks checks;
  const int64_t needed = paged_attention_decode_scratch_bytes(p, props);
  checks.at_least("scratch_bytes", p.scratch_bytes, needed);
  if (needed > 0) checks.not_null("scratch", p.scratch);
  if (!checks.ok()) return checks.status("paged_attention_decode", p);
  return run_on_device("paged_attention_decode", p, [&] {
    const PagedAttentionDecodeConfig config = choose(p, props);
    const cudaError_t error = with_type(p.dtype, [&](auto tag) {
      return launch_paged_attention_split<typename decltype(tag)::type>(p, config);
    });
    if (error != cudaSuccess || config.num_parts == 1) return error;
    return launch_paged_attention_combine(p, config);
  });
}

}  // namespace qsun
