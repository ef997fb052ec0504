// The operator: checks, which kernel serves a call and how it is cut, and the launches.
#include "qsun/paged_attention_decode.h"

#include <algorithm>

#include "attention/codes.h"
#include "attention/plan.h"
#include "attention/prefixes.h"
#include "attention/split.h"
#include "attention/tiles.h"
#include "runtime/checks.h"
#include "runtime/launch.h"

namespace qsun {

std::string to_string(const PagedAttentionDecodeParams& p) {
  return Fields()
      .add("batch", p.batch)
      .add("q_len", p.q_len)
      .add("num_q_heads", p.num_q_heads)
      .add("num_kv_heads", p.num_kv_heads)
      .add("head_dim", p.head_dim)
      .add("num_blocks", p.num_blocks)
      .add("block_size", p.block_size)
      .add("max_blocks", p.max_blocks)
      .add("window", p.window < 0 ? "none" : std::to_string(p.window))
      .add("dtype", to_string(p.dtype))
      .add("kv_dtype", to_string(p.kv_dtype))
      .add("kv_scales", to_string(p.kv_scales))
      .add("follows_write", p.follows_write)
      .str();
}

std::string to_string(const PagedAttentionDecodeConfig& c) {
  return Fields()
      .add("warps", c.warps)
      .add("stages", c.stages)
      .add("blocks_per_sm", c.blocks_per_sm)
      .add("parts", c.parts)
      .add("min_part_units", c.min_part_units)
      .add("whole_slack", c.whole_slack)
      .add("prefix_parts", c.prefix_parts)
      .add("min_prefix_tiles", c.min_prefix_tiles)
      .add("min_saved_tiles", c.min_saved_tiles)
      .add("overlaps_producer", c.overlaps_producer)
      .str();
}

std::string to_string(const PagedAttentionSplitConfig& c) {
  return Fields()
      .add("head_tile", c.head_tile)
      .add("head_tiles", c.head_tiles)
      .add("lanes", c.lanes)
      .add("num_parts", c.num_parts)
      .add("grid", c.grid)
      .str();
}

namespace {

constexpr int64_t kMaxQLen = 8;
constexpr int kMinStages = 2, kMaxStages = 4;
constexpr int kMaxParts = 8192;            // of the planned kernel
constexpr int64_t kMergeBytes = 96 << 10;  // what a multiprocessor gets of the memory while parts are merged
constexpr int kMinPrefixTiles = 4;      // 256 tokens: what two requests save by them is hardly a microsecond
constexpr int kMinSavedTilesAPart = 2;  // about the time of one more launch
constexpr int kReservedBytes = 1024;    // of shared memory, by the driver for every block
constexpr int64_t kSplitBlocksPerSm = 4;   // what registers let run at once, about
constexpr int64_t kMinSplitTokens = 64;    // shorter parts cost more to combine than they save
constexpr int64_t kMaxSplitTokens = 4096;  // longer ones let one request outlast a batch of short ones
constexpr int64_t kMaxSplitParts = 256;    // a thread of the combining kernel goes through all of them
constexpr int64_t kMaxCounters = 1 << 30;  // counted in 32 bits on the device

// A cache of values has the dtype of q, one of codes the scales that belong to them.
Checks check_cache_kind(const PagedAttentionDecodeParams& p) {
  Checks checks;
  checks.known(p.dtype);
  const std::string dtype = to_string(p.dtype), kv_dtype = to_string(p.kv_dtype);
  if (!is_codes(p.kv_dtype)) {
    checks.require(p.kv_dtype == p.dtype, "kv_dtype", kv_dtype, dtype + " as q, or codes");
    return checks.require(p.kv_scales == KvScales::kNone, "kv_scales", to_string(p.kv_scales),
                          "none for " + kv_dtype);
  }
  checks.require(size_of(p.dtype) == 2, "dtype", dtype, "float16 or bfloat16 beside " + kv_dtype);
  const bool is_per_tensor = p.kv_dtype == DType::kFloat8E4M3 && p.kv_scales == KvScales::kTensor;
  return checks.require(is_per_tensor || p.kv_scales == KvScales::kToken, "kv_scales", to_string(p.kv_scales),
                        p.kv_dtype == DType::kFloat8E4M3 ? "token or tensor" : "token for " + kv_dtype);
}

Checks check_sizes(const PagedAttentionDecodeParams& p) {
  Checks checks = check_cache_kind(p);
  checks.at_least("batch", p.batch, 0).at_least("num_kv_heads", p.num_kv_heads, 1);
  checks.at_least("q_len", p.q_len, 1).at_most("q_len", p.q_len, kMaxQLen);
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
  checks.require(p.softcap >= 0.0f, "softcap", std::to_string(p.softcap), "above 0, or 0 for none");
  checks.at_most("batch * q_len * num_q_heads", p.batch * p.q_len * p.num_q_heads,
                 kMaxGridX / kMaxSplitParts);
  return checks;
}

// What a call that launches kernels needs besides.
Checks check(const PagedAttentionDecodeParams& p) {
  Checks checks = check_sizes(p);
  if (p.batch > 0) {
    checks.not_null("q", p.q);
    if (p.num_blocks > 0) checks.not_null("k_cache", p.k_cache).not_null("v_cache", p.v_cache);
    checks.not_null("seq_lens", p.seq_lens).not_null("out", p.out).not_null("lse", p.lse);
    if (p.max_blocks > 0) checks.not_null("block_table", p.block_table);
    checks.aligned("k_cache", p.k_cache, 16).aligned("v_cache", p.v_cache, 16);
    if (p.kv_scales != KvScales::kNone) checks.not_null("k_scale", p.k_scale).not_null("v_scale", p.v_scale);
    if (p.kv_scales == KvScales::kToken) {
      checks.aligned("k_scale", p.k_scale, 16).aligned("v_scale", p.v_scale, 16);
    }
    checks.aligned("scratch", p.scratch, 16).aligned("plan", p.plan, 16);
  }
  return checks;
}

// Sizes that the planned kernels are compiled for.
bool has_planned_sizes(const PagedAttentionDecodeParams& p) {
  const bool codes = is_codes(p.kv_dtype);
  const bool is_width =
      p.head_dim == 64 || p.head_dim == 128 || p.head_dim == 256 || (p.head_dim == 96 && !codes);
  const int max_rows = codes ? max_codes_rows(static_cast<int>(p.head_dim)) : kMaxQueryRows;
  return size_of(p.dtype) == 2 && is_width && p.block_size >= kQuarterTokens && query_rows(p) <= max_rows &&
         p.batch <= kMaxPlannedBatch && p.batch * p.num_kv_heads <= kMaxCounters;
}

// Whether two requests or more fit into an item of the line of prefixes, and all see the same positions of
// it.
bool has_prefix_sizes(const PagedAttentionDecodeParams& p) {
  return has_planned_sizes(p) && !is_codes(p.kv_dtype) && p.window < 0 && 2 * query_rows(p) <= kPrefixRows &&
         p.batch <= kMaxSharingBatch;
}

// Of keys and values of a token under one key head, scales apart.
int64_t item_token_bytes(const PagedAttentionDecodeParams& p) {
  const int head_dim = static_cast<int>(p.head_dim);
  return 2 * (is_codes(p.kv_dtype) ? codes_row_bytes(p.kv_dtype, head_dim) : 2 * head_dim);
}

// Of a block of the planned kernel.
int shared_bytes(const PagedAttentionDecodeParams& p, int stages) {
  const int head_dim = static_cast<int>(p.head_dim);
  return is_codes(p.kv_dtype) ? codes_shared_bytes(p.kv_dtype, head_dim, stages)
                              : tiles_shared_bytes(head_dim, stages);
}

Checks check_config(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& c) {
  Checks checks;
  checks.require(has_planned_sizes(p), "config", "given", "sizes that the planned kernel takes");
  if (!checks.ok()) return checks;
  if (is_codes(p.kv_dtype)) {
    checks.one_of("config.warps", c.warps, {codes_shape(p).warps});
  } else {
    checks.one_of("config.warps", c.warps, {4, 8});
    checks.at_least("config.warps * 16", c.warps * kTileRows, query_rows(p));
  }
  checks.at_least("config.stages", c.stages, kMinStages).at_most("config.stages", c.stages, kMaxStages);
  checks.at_least("config.parts", c.parts, 1).at_most("config.parts", c.parts, kMaxParts);
  checks.at_least("config.min_part_units", c.min_part_units, 1);
  checks.at_most("config.min_part_units", c.min_part_units, kMaxUnits);
  checks.at_least("config.whole_slack", c.whole_slack, -1);
  checks.at_most("config.whole_slack", c.whole_slack, kMaxUnits);
  checks.at_least("config.prefix_parts", c.prefix_parts, 0);
  checks.at_most("config.prefix_parts", c.prefix_parts, has_prefix_sizes(p) ? kMaxParts : 0);
  checks.at_least("config.min_prefix_tiles", c.min_prefix_tiles, 1);
  checks.at_most("config.min_prefix_tiles", c.min_prefix_tiles, kMaxTokens / kTileTokens);
  checks.at_least("config.min_saved_tiles", c.min_saved_tiles, 0);
  return checks;
}

Checks check_plan(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& config) {
  Checks checks;
  checks.at_least("plan_bytes", p.plan_bytes, paged_attention_plan_bytes(p, config));
  checks.not_null("plan", p.plan).aligned("plan", p.plan, 16);
  if (p.prefixes == nullptr) return checks;
  checks.require(config.prefix_parts > 0, "prefixes", "given", "none for sizes that share none");
  checks.at_least("prefixes_bytes", p.prefixes_bytes, paged_attention_prefixes_bytes(p, config));
  return checks.aligned("prefixes", p.prefixes, 16);
}

Checks check_scratch(const PagedAttentionDecodeParams& p, int64_t needed) {
  Checks checks;
  checks.at_least("scratch_bytes", p.scratch_bytes, needed);
  if (needed > 0) checks.not_null("scratch", p.scratch);
  return checks;
}

int64_t split_scratch_bytes(const PagedAttentionDecodeParams& p, const PagedAttentionSplitConfig& c) {
  if (c.num_parts == 1) return 0;
  const int64_t values =
      partial_lse_values(p, c) + p.batch * p.q_len * p.num_q_heads * c.num_parts * p.head_dim;
  return values * static_cast<int64_t>(sizeof(float));
}

template <typename T>
cudaError_t launch_tiles_of(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& config) {
  switch (p.head_dim) {
    case 64:
      return launch_paged_attention_tiles<T, 64>(p, config);
    case 96:
      return launch_paged_attention_tiles<T, 96>(p, config);
    case 128:
      return launch_paged_attention_tiles<T, 128>(p, config);
    default:
      return launch_paged_attention_tiles<T, 256>(p, config);
  }
}

cudaError_t launch_codes_of(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& config) {
  switch (p.kv_dtype) {
    case DType::kFloat8E4M3:
      return launch_paged_attention_codes<DType::kFloat8E4M3>(p, config);
    case DType::kInt8:
      return launch_paged_attention_codes<DType::kInt8>(p, config);
    default:
      return launch_paged_attention_codes<DType::kInt4>(p, config);
  }
}

Status run_split(const PagedAttentionDecodeParams& p, const DeviceProps& props) {
  const PagedAttentionSplitConfig config = choose_split(p, props);
  if (Checks checks = check_scratch(p, split_scratch_bytes(p, config)); !checks.ok()) {
    return checks.status("paged_attention_decode", p);
  }
  return run_on_device("paged_attention_decode", p, [&] {
    const cudaError_t error = with_type(p.dtype, [&](auto tag) {
      return launch_paged_attention_split<typename decltype(tag)::type>(p, config);
    });
    if (error != cudaSuccess || config.num_parts == 1) return error;
    return launch_paged_attention_combine(p, config);
  });
}

}  // namespace

bool is_planned(const PagedAttentionDecodeParams& p, const DeviceProps& props) {
  if (!has_planned_sizes(p)) return false;
  return std::max(shared_bytes(p, kMinStages), planning_shared_bytes(p)) + kReservedBytes <=
         props.shared_memory_per_block;
}

Status paged_attention_decode_sizes(const PagedAttentionDecodeParams& p) {
  return check_sizes(p).status("paged_attention_decode", p);
}

PagedAttentionDecodeConfig choose(const PagedAttentionDecodeParams& p, const DeviceProps& props) {
  PagedAttentionDecodeConfig c;
  const int room = props.shared_memory_per_block + kReservedBytes;  // of a multiprocessor
  const auto blocks_with = [&](int stages) { return room / (shared_bytes(p, stages) + kReservedBytes); };
  const int64_t items = p.batch * p.num_kv_heads;  // of the plan
  bool has_one_each = items <= props.sm_count;
  if (is_codes(p.kv_dtype)) {
    // As many blocks as registers and rings of three stages allow: turning codes into operands takes issue
    // slots, and more warps use more of them.
    const CodesShape shape = codes_shape(p);
    c.warps = shape.warps;
    c.blocks_per_sm = std::clamp(blocks_with(kMinStages + 1), 1, shape.blocks_per_sm);
    // Few warps would not keep up with what memory brings of the shortest rows.
    has_one_each = has_one_each && c.blocks_per_sm <= 2;
  } else {
    c.warps = query_rows(p) > kQuarters * kTileRows ? 8 : 4;
    // As many stages as let two blocks of four warps share a multiprocessor: one copies on while the other
    // stores a result. Where two do not fit, one has the ring to itself.
    // Nor are there two where most multiprocessors have one item, whole, and a deeper ring for it.
    has_one_each = has_one_each && 3 * items > 2 * props.sm_count && query_rows(p) <= kTileRows &&
                   blocks_with(kMaxStages) == 1;
    c.blocks_per_sm = c.warps == 4 && blocks_with(kMinStages + 1) >= 2 && !has_one_each ? 2 : 1;
  }
  c.stages = kMaxStages;
  while (c.stages > kMinStages && blocks_with(c.stages) < c.blocks_per_sm) --c.stages;
  c.parts = std::min(c.blocks_per_sm * props.sm_count, kMaxParts);
  // Whole items spare their merges. Where some multiprocessors would have two of them and others one, that
  // costs more than it spares.
  if (has_one_each || 8 * items > 7 * c.parts) {
    c.whole_slack = static_cast<int>(kMergeBytes / (kTileTokens * item_token_bytes(p)));
  }
  c.overlaps_producer = props.compute_major >= 9;
  c.min_prefix_tiles = kMinPrefixTiles;
  if (has_prefix_sizes(p)) {
    c.prefix_parts = c.parts;  // the same rings, four warps, too
    c.min_saved_tiles = kMinSavedTilesAPart * c.prefix_parts;
  }
  return c;
}

PagedAttentionSplitConfig choose_split(const PagedAttentionDecodeParams& p, const DeviceProps& props) {
  PagedAttentionSplitConfig c;
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  c.head_tile = group <= 1 ? 1 : group <= 4 ? 4 : 8;
  c.head_tiles = static_cast<int>(ceil_div(group, c.head_tile));
  c.lanes = p.head_dim <= 64 ? 8 : p.head_dim <= 128 ? 16 : 32;
  const int64_t whole = std::max<int64_t>(p.batch * p.q_len * p.num_kv_heads * c.head_tiles,
                                          1);  // blocks without cutting
  const int64_t room = p.max_blocks * p.block_size;
  const int64_t tokens = p.window >= 0 ? std::min(p.window, room) : room;
  const int64_t wanted =
      std::max(ceil_div(kSplitBlocksPerSm * props.sm_count, whole), ceil_div(tokens, kMaxSplitTokens));
  const int64_t useful = std::clamp<int64_t>(ceil_div(tokens, kMinSplitTokens), 1, kMaxSplitParts);
  c.num_parts = static_cast<int>(std::min(wanted, useful));
  c.grid = p.batch * p.q_len * p.num_kv_heads * c.head_tiles * c.num_parts;
  return c;
}

int64_t paged_attention_plan_bytes(const PagedAttentionDecodeParams& p,
                                   const PagedAttentionDecodeConfig& config) {
  return has_planned_sizes(p) ? plan_bytes(p, config) : 0;
}

int64_t paged_attention_plan_bytes(const PagedAttentionDecodeParams& p, const DeviceProps& props) {
  return is_planned(p, props) ? paged_attention_plan_bytes(p, choose(p, props)) : 0;
}

int64_t paged_attention_prefixes_bytes(const PagedAttentionDecodeParams& p,
                                       const PagedAttentionDecodeConfig& config) {
  return has_prefix_sizes(p) && config.prefix_parts > 0 ? prefixes_bytes(p, config) : 0;
}

int64_t paged_attention_prefixes_bytes(const PagedAttentionDecodeParams& p, const DeviceProps& props) {
  return is_planned(p, props) ? paged_attention_prefixes_bytes(p, choose(p, props)) : 0;
}

int64_t paged_attention_decode_scratch_bytes(const PagedAttentionDecodeParams& p,
                                             const PagedAttentionDecodeConfig& config, bool shares_prefixes) {
  const int64_t floats = partial_floats(p, config) + (shares_prefixes ? prefix_scratch_floats(p, config) : 0);
  return floats * static_cast<int64_t>(sizeof(float));
}

int64_t paged_attention_decode_scratch_bytes(const PagedAttentionDecodeParams& p, const DeviceProps& props,
                                             bool shares_prefixes) {
  if (is_planned(p, props)) return paged_attention_decode_scratch_bytes(p, choose(p, props), shares_prefixes);
  return split_scratch_bytes(p, choose_split(p, props));
}

Status plan_paged_attention(const PagedAttentionDecodeParams& p) {
  Checks checks = check_sizes(p);
  if (checks.ok() && p.batch == 0) return {};
  checks.not_null("seq_lens", p.seq_lens);
  if (!checks.ok()) return checks.status("plan_paged_attention", p);
  DeviceProps props;
  if (Status status = props_of("plan_paged_attention", p, &props); !status.ok()) return status;
  checks.require(is_planned(p, props), "plan", "asked for",
                 "sizes that the planned kernel takes on this device");
  if (!checks.ok()) return checks.status("plan_paged_attention", p);
  return plan_paged_attention(p, choose(p, props));
}

Status plan_paged_attention(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& config) {
  Checks checks = check_sizes(p);
  if (checks.ok() && p.batch == 0) return {};
  checks.not_null("seq_lens", p.seq_lens);
  if (checks.ok()) checks = check_config(p, config);
  if (checks.ok()) checks = check_plan(p, config);
  if (p.prefixes != nullptr && p.max_blocks > 0) checks.not_null("block_table", p.block_table);
  if (!checks.ok()) return checks.status("plan_paged_attention", p);
  return run_on_device("plan_paged_attention", p, [&] { return launch_plan_paged_attention(p, config); });
}

Status paged_attention_decode(const PagedAttentionDecodeParams& p) {
  if (Checks checks = check(p); !checks.ok()) return checks.status("paged_attention_decode", p);
  if (p.batch == 0) return {};
  DeviceProps props;
  if (Status status = props_of("paged_attention_decode", p, &props); !status.ok()) return status;
  if (is_planned(p, props)) return paged_attention_decode(p, choose(p, props));
  Checks checks;
  checks.require(!is_codes(p.kv_dtype), "kv_dtype", to_string(p.kv_dtype),
                 std::string(to_string(p.dtype)) + " for sizes that the planned kernel does not take");
  return checks.ok() ? run_split(p, props) : checks.status("paged_attention_decode", p);
}

Status paged_attention_decode(const PagedAttentionDecodeParams& p, const PagedAttentionDecodeConfig& config) {
  Checks checks = check(p);
  if (checks.ok() && p.batch == 0) return {};
  if (checks.ok()) checks = check_config(p, config);
  if (checks.ok()) checks = check_plan(p, config);
  checks.aligned("q", p.q, 4).multiple_of("q_stride", p.q_stride, 2).aligned("out", p.out, 8);
  if (checks.ok()) {
    checks = check_scratch(p, paged_attention_decode_scratch_bytes(p, config, p.prefixes != nullptr));
  }
  if (!checks.ok()) return checks.status("paged_attention_decode", p);
  return run_on_device("paged_attention_decode", p, [&] {
    if (is_codes(p.kv_dtype)) return launch_codes_of(p, config);
    if (p.dtype == DType::kFloat16) return launch_tiles_of<__half>(p, config);
    return launch_tiles_of<__nv_bfloat16>(p, config);
  });
}

}  // namespace qsun
