// Binds the operators of the paged KV cache.
#include "bindings/common.h"
#include "qsun/device.h"
#include "qsun/paged_attention_decode.h"
#include "qsun/write_kv_cache.h"

namespace qsun::bindings {
namespace {

PagedAttentionDecodeParams attention_sizes(int64_t batch, int64_t q_len, int64_t num_q_heads,
                                           int64_t num_kv_heads, int64_t head_dim, int64_t block_size,
                                           int64_t max_blocks, int64_t window, int dtype, int kv_dtype,
                                           int kv_scales) {
  PagedAttentionDecodeParams p;
  p.batch = batch;
  p.q_len = q_len;
  p.num_q_heads = num_q_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  p.block_size = block_size;
  p.max_blocks = max_blocks;
  p.window = window;
  p.dtype = static_cast<DType>(dtype);
  p.kv_dtype = static_cast<DType>(kv_dtype);
  p.kv_scales = static_cast<KvScales>(kv_scales);
  return p;
}

// A question about sizes alone: the answer of ask(sizes, props).
template <typename Ask>
void bind_attention_question(py::module_& m, const char* name, const char* doc, Ask ask) {
  m.def(
      name,
      [ask](int64_t batch, int64_t q_len, int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim,
            int64_t block_size, int64_t max_blocks, int64_t window, int dtype, int kv_dtype, int kv_scales,
            const DeviceProps& props) {
        const auto p = attention_sizes(batch, q_len, num_q_heads, num_kv_heads, head_dim, block_size,
                                       max_blocks, window, dtype, kv_dtype, kv_scales);
        check(paged_attention_decode_sizes(p));
        return ask(p, props);
      },
      doc, "batch"_a, "q_len"_a, "num_q_heads"_a, "num_kv_heads"_a, "head_dim"_a, "block_size"_a,
      "max_blocks"_a, "window"_a, "dtype"_a, "kv_dtype"_a, "kv_scales"_a, "props"_a);
}

// The answer of ask(sizes, config), or of ask(sizes, props) where config is None.
template <typename Ask>
void bind_attention_bytes(py::module_& m, const char* name, const char* doc, Ask ask) {
  m.def(
      name,
      [ask](const PagedAttentionDecodeConfig* config, int64_t batch, int64_t q_len, int64_t num_q_heads,
            int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int64_t max_blocks, int64_t window,
            int dtype, int kv_dtype, int kv_scales, const DeviceProps& props) {
        const auto p = attention_sizes(batch, q_len, num_q_heads, num_kv_heads, head_dim, block_size,
                                       max_blocks, window, dtype, kv_dtype, kv_scales);
        check(paged_attention_decode_sizes(p));
        return config == nullptr ? ask(p, props) : ask(p, *config);
      },
      doc, "config"_a.none(true), "batch"_a, "q_len"_a, "num_q_heads"_a, "num_kv_heads"_a, "head_dim"_a,
      "block_size"_a, "max_blocks"_a, "window"_a, "dtype"_a, "kv_dtype"_a, "kv_scales"_a, "props"_a);
}

void bind_attention_configs(py::module_& m) {
  using Params = PagedAttentionDecodeParams;
  using Props = DeviceProps;
  printable<PagedAttentionDecodeConfig>(m, "PagedAttentionDecodeConfig",
                                        "How the planned kernel of paged_attention_decode is launched.")
      .def(py::init([](int warps, int stages, int blocks_per_sm, int parts, int min_part_units,
                       int whole_slack, int prefix_parts, int min_prefix_tiles, int min_saved_tiles,
                       bool overlaps_producer) {
             return PagedAttentionDecodeConfig{
                 warps,       stages,       blocks_per_sm,    parts,           min_part_units,
                 whole_slack, prefix_parts, min_prefix_tiles, min_saved_tiles, overlaps_producer};
           }),
           py::kw_only(), "warps"_a, "stages"_a, "blocks_per_sm"_a, "parts"_a, "min_part_units"_a,
           "whole_slack"_a = -1, "prefix_parts"_a = 0, "min_prefix_tiles"_a = 4, "min_saved_tiles"_a = 0,
           "overlaps_producer"_a)
      .def_readonly("warps", &PagedAttentionDecodeConfig::warps)
      .def_readonly("stages", &PagedAttentionDecodeConfig::stages)
      .def_readonly("blocks_per_sm", &PagedAttentionDecodeConfig::blocks_per_sm)
      .def_readonly("parts", &PagedAttentionDecodeConfig::parts)
      .def_readonly("min_part_units", &PagedAttentionDecodeConfig::min_part_units)
      .def_readonly("whole_slack", &PagedAttentionDecodeConfig::whole_slack)
      .def_readonly("prefix_parts", &PagedAttentionDecodeConfig::prefix_parts)
      .def_readonly("min_prefix_tiles", &PagedAttentionDecodeConfig::min_prefix_tiles)
      .def_readonly("min_saved_tiles", &PagedAttentionDecodeConfig::min_saved_tiles)
      .def_readonly("overlaps_producer", &PagedAttentionDecodeConfig::overlaps_producer);
  printable<PagedAttentionSplitConfig>(m, "PagedAttentionSplitConfig",
                                       "How the other kernel of paged_attention_decode is launched.")
      .def_readonly("head_tile", &PagedAttentionSplitConfig::head_tile)
      .def_readonly("head_tiles", &PagedAttentionSplitConfig::head_tiles)
      .def_readonly("lanes", &PagedAttentionSplitConfig::lanes)
      .def_readonly("num_parts", &PagedAttentionSplitConfig::num_parts)
      .def_readonly("grid", &PagedAttentionSplitConfig::grid);
  bind_attention_question(m, "choose_paged_attention_decode",
                          "A PagedAttentionDecodeConfig, or None where the other kernel serves the sizes.",
                          [](const Params& p, const Props& props) {
                            return is_planned(p, props) ? py::cast(choose(p, props)) : py::object(py::none());
                          });
  bind_attention_question(m, "choose_paged_attention_split", "A PagedAttentionSplitConfig.",
                          [](const Params& p, const Props& props) { return choose_split(p, props); });
  bind_attention_bytes(m, "paged_attention_plan_bytes",
                       "Bytes of a plan; 0 where the kernel that serves the sizes takes none.",
                       [](const Params& p, const auto& how) { return paged_attention_plan_bytes(p, how); });
  bind_attention_bytes(
      m, "paged_attention_prefixes_bytes",
      "Bytes of what a plan says about shared prefixes; 0 for sizes that share none.",
      [](const Params& p, const auto& how) { return paged_attention_prefixes_bytes(p, how); });
  bind_attention_bytes(
      m, "paged_attention_decode_scratch_bytes", "Bytes of scratch of one call without shared prefixes.",
      [](const Params& p, const auto& how) { return paged_attention_decode_scratch_bytes(p, how); });
  bind_attention_bytes(
      m, "paged_attention_sharing_scratch_bytes", "Bytes of scratch of one call with shared prefixes.",
      [](const Params& p, const auto& how) { return paged_attention_decode_scratch_bytes(p, how, true); });
}

}  // namespace

void bind_attention(py::module_& m) {
  bind_attention_configs(m);
  m.def(
      "plan_paged_attention",
      [](const PagedAttentionDecodeConfig* config, uintptr_t seq_lens, uintptr_t block_table, uintptr_t plan,
         int64_t plan_bytes, uintptr_t prefixes, int64_t prefixes_bytes, int64_t batch, int64_t q_len,
         int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int64_t max_blocks,
         int64_t block_table_stride, int64_t window, int dtype, int kv_dtype, int kv_scales, int device,
         uintptr_t stream) {
        auto p = attention_sizes(batch, q_len, num_q_heads, num_kv_heads, head_dim, block_size, max_blocks,
                                 window, dtype, kv_dtype, kv_scales);
        p.seq_lens = pointer<int32_t>(seq_lens);
        p.block_table = pointer<int32_t>(block_table);
        p.block_table_stride = block_table_stride;
        p.plan = pointer(plan);
        p.plan_bytes = plan_bytes;
        p.prefixes = pointer(prefixes);
        p.prefixes_bytes = prefixes_bytes;
        place(p, dtype, device, stream);
        check(config == nullptr ? plan_paged_attention(p) : plan_paged_attention(p, *config));
      },
      "config: a PagedAttentionDecodeConfig to plan for, or None. prefixes: 0 to share none, and then"
      " block_table is not looked at.",
      "config"_a.none(true), "seq_lens"_a, "block_table"_a, "plan"_a, "plan_bytes"_a, "prefixes"_a,
      "prefixes_bytes"_a, "batch"_a, "q_len"_a, "num_q_heads"_a, "num_kv_heads"_a, "head_dim"_a,
      "block_size"_a, "max_blocks"_a, "block_table_stride"_a, "window"_a, "dtype"_a, "kv_dtype"_a,
      "kv_scales"_a, "device"_a, "stream"_a);
  m.def(
      "paged_attention_decode",
      [](const PagedAttentionDecodeConfig* config, uintptr_t q, uintptr_t k_cache, uintptr_t v_cache,
         uintptr_t k_scale, uintptr_t v_scale, uintptr_t block_table, uintptr_t seq_lens, uintptr_t sinks,
         uintptr_t out, uintptr_t lse, uintptr_t plan, int64_t plan_bytes, uintptr_t prefixes,
         int64_t prefixes_bytes, uintptr_t scratch, int64_t scratch_bytes, int64_t batch, int64_t q_len,
         int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, int64_t num_blocks, int64_t block_size,
         int64_t max_blocks, int64_t q_stride, int64_t block_table_stride, int64_t window,
         float softmax_scale, float softcap, bool follows_write, int dtype, int kv_dtype, int kv_scales,
         int device, uintptr_t stream) {
        auto p = attention_sizes(batch, q_len, num_q_heads, num_kv_heads, head_dim, block_size, max_blocks,
                                 window, dtype, kv_dtype, kv_scales);
        p.q = pointer(q);
        p.k_cache = pointer(k_cache);
        p.v_cache = pointer(v_cache);
        p.k_scale = pointer<float>(k_scale);
        p.v_scale = pointer<float>(v_scale);
        p.block_table = pointer<int32_t>(block_table);
        p.seq_lens = pointer<int32_t>(seq_lens);
        p.sinks = pointer<float>(sinks);
        p.out = pointer(out);
        p.lse = pointer<float>(lse);
        p.plan = pointer(plan);
        p.plan_bytes = plan_bytes;
        p.prefixes = pointer(prefixes);
        p.prefixes_bytes = prefixes_bytes;
        p.scratch = pointer(scratch);
        p.scratch_bytes = scratch_bytes;
        p.num_blocks = num_blocks;
        p.q_stride = q_stride;
        p.block_table_stride = block_table_stride;
        p.softmax_scale = softmax_scale;
        p.softcap = softcap;
        p.follows_write = follows_write;
        place(p, dtype, device, stream);
        check(config == nullptr ? paged_attention_decode(p) : paged_attention_decode(p, *config));
      },
      "config: a PagedAttentionDecodeConfig to run as told by the planned kernel, or None.",
      "config"_a.none(true), "q"_a, "k_cache"_a, "v_cache"_a, "k_scale"_a, "v_scale"_a, "block_table"_a,
      "seq_lens"_a, "sinks"_a, "out"_a, "lse"_a, "plan"_a, "plan_bytes"_a, "prefixes"_a, "prefixes_bytes"_a,
      "scratch"_a, "scratch_bytes"_a, "batch"_a, "q_len"_a, "num_q_heads"_a, "num_kv_heads"_a, "head_dim"_a,
      "num_blocks"_a, "block_size"_a, "max_blocks"_a, "q_stride"_a, "block_table_stride"_a, "window"_a,
      "softmax_scale"_a, "softcap"_a, "follows_write"_a, "dtype"_a, "kv_dtype"_a, "kv_scales"_a, "device"_a,
      "stream"_a);
}

void bind_write_kv_cache(py::module_& m) {
  printable<WriteKvCacheConfig>(m, "WriteKvCacheConfig", "How write_kv_cache is launched.")
      .def_readonly("copies", &WriteKvCacheConfig::copies)
      .def_readonly("is_wide", &WriteKvCacheConfig::is_wide)
      .def_readonly("lanes", &WriteKvCacheConfig::lanes)
      .def_readonly("overlaps_producer", &WriteKvCacheConfig::overlaps_producer);
  m.def(
      "choose_write_kv_cache",
      [](uintptr_t k, int64_t k_stride, int64_t num_q_heads, int64_t head_dim, bool rope, int kv_dtype,
         int dtype, const DeviceProps& props) {
        WriteKvCacheParams p;
        p.k = pointer(k);
        p.k_stride = k_stride;
        p.num_q_heads = num_q_heads;
        p.head_dim = head_dim;
        p.cos_sin = rope ? pointer<float>(k) : nullptr;
        p.kv_dtype = static_cast<DType>(kv_dtype);
        p.dtype = static_cast<DType>(dtype);
        return choose(p, props);
      },
      "The launch for k at an address, cos_sin there too where rope, all other tensors aligned.", "k"_a,
      "k_stride"_a, "num_q_heads"_a, "head_dim"_a, "rope"_a, "kv_dtype"_a, "dtype"_a, "props"_a);
  m.def(
      "write_kv_cache",
      [](uintptr_t k, uintptr_t v, uintptr_t q, uintptr_t q_out, uintptr_t k_cache, uintptr_t v_cache,
         uintptr_t k_scale, uintptr_t v_scale, uintptr_t slot_mapping, uintptr_t positions, uintptr_t cos_sin,
         uintptr_t q_norm, uintptr_t k_norm, float eps, bool rotate, int64_t num_tokens, int64_t num_q_heads,
         int64_t num_kv_heads, int64_t head_dim, int64_t num_blocks, int64_t block_size,
         int64_t max_positions, int64_t q_stride, int64_t k_stride, int64_t v_stride, int splits,
         int64_t split_stride, int kv_dtype, int kv_scales, bool settled, int dtype, int device,
         uintptr_t stream) {
        WriteKvCacheParams p;
        p.k = pointer(k);
        p.v = pointer(v);
        p.q = pointer(q);
        p.q_out = pointer(q_out);
        p.k_cache = pointer(k_cache);
        p.v_cache = pointer(v_cache);
        p.k_scale = pointer<float>(k_scale);
        p.v_scale = pointer<float>(v_scale);
        p.slot_mapping = pointer<int64_t>(slot_mapping);
        p.positions = pointer<int64_t>(positions);
        p.cos_sin = pointer<float>(cos_sin);
        p.q_norm = pointer(q_norm);
        p.k_norm = pointer(k_norm);
        p.eps = eps;
        p.rotate = rotate;
        p.num_tokens = num_tokens;
        p.num_q_heads = num_q_heads;
        p.num_kv_heads = num_kv_heads;
        p.head_dim = head_dim;
        p.num_blocks = num_blocks;
        p.block_size = block_size;
        p.max_positions = max_positions;
        p.q_stride = q_stride;
        p.k_stride = k_stride;
        p.v_stride = v_stride;
        p.splits = splits;
        p.split_stride = split_stride;
        p.kv_dtype = static_cast<DType>(kv_dtype);
        p.kv_scales = static_cast<KvScales>(kv_scales);
        p.settled = settled;
        place(p, dtype, device, stream);
        check(write_kv_cache(p));
      },
      "k"_a, "v"_a, "q"_a, "q_out"_a, "k_cache"_a, "v_cache"_a, "k_scale"_a, "v_scale"_a, "slot_mapping"_a,
      "positions"_a, "cos_sin"_a, "q_norm"_a, "k_norm"_a, "eps"_a, "rotate"_a, "num_tokens"_a,
      "num_q_heads"_a, "num_kv_heads"_a, "head_dim"_a, "num_blocks"_a, "block_size"_a, "max_positions"_a,
      "q_stride"_a, "k_stride"_a, "v_stride"_a, "splits"_a, "split_stride"_a, "kv_dtype"_a, "kv_scales"_a,
      "settled"_a, "dtype"_a, "device"_a, "stream"_a);
}

}  // namespace qsun::bindings
