# Types of the binding in csrc/bindings/. Addresses are integers (0: absent), strides count elements,
# dtype codes are qsun::DType. Launches raise qsun_kernels.errors.KernelLaunchError.
from typing import TypedDict

class BuildInfo(TypedDict):
    archs: tuple[str, ...]
    nvcc: str
    host_compiler: str
    revision: str
    cuda_runtime: int

class DeviceProps:
    def __init__(
        self,
        *,
        compute_major: int,
        compute_minor: int,
        sm_count: int,
        shared_memory_per_block: int,
        l2_bytes: int,
    ) -> None: ...
    @property
    def compute_major(self) -> int: ...
    @property
    def compute_minor(self) -> int: ...
    @property
    def sm_count(self) -> int: ...
    @property
    def shared_memory_per_block(self) -> int: ...
    @property
    def l2_bytes(self) -> int: ...

class Wna16LinearConfig:
    @property
    def tile_m(self) -> int: ...
    @property
    def warps(self) -> int: ...
    @property
    def grid_n(self) -> int: ...
    @property
    def grid_m(self) -> int: ...

class StreamConfig:
    def __init__(
        self,
        *,
        token_tiles: int,
        row_tiles: int,
        row_blocks: int,
        warps: int,
        stages: int,
        copy_engine: bool,
        overlaps_producer: bool,
    ) -> None: ...
    @property
    def token_tiles(self) -> int: ...
    @property
    def row_tiles(self) -> int: ...
    @property
    def row_blocks(self) -> int: ...
    @property
    def warps(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def copy_engine(self) -> bool: ...
    @property
    def overlaps_producer(self) -> bool: ...

class GemmConfig:
    def __init__(
        self, *, token_tile: int, warp_groups: int, split_k: int, stages: int, adds_in_cluster: bool
    ) -> None: ...
    @property
    def adds_in_cluster(self) -> bool: ...
    @property
    def token_tile(self) -> int: ...
    @property
    def warp_groups(self) -> int: ...
    @property
    def split_k(self) -> int: ...
    @property
    def stages(self) -> int: ...

class TilesConfig:
    def __init__(
        self,
        *,
        token_tiles: int,
        row_groups: int,
        column_groups: int,
        split_k: int,
        stages: int,
        overlaps_producer: bool,
    ) -> None: ...
    @property
    def token_tiles(self) -> int: ...
    @property
    def row_groups(self) -> int: ...
    @property
    def column_groups(self) -> int: ...
    @property
    def split_k(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def overlaps_producer(self) -> bool: ...

class PagedAttentionDecodeConfig:
    def __init__(
        self,
        *,
        warps: int,
        stages: int,
        blocks_per_sm: int,
        parts: int,
        min_part_units: int,
        whole_slack: int = -1,
        prefix_parts: int = 0,
        min_prefix_tiles: int = 4,
        min_saved_tiles: int = 0,
        overlaps_producer: bool,
    ) -> None: ...
    @property
    def warps(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def blocks_per_sm(self) -> int: ...
    @property
    def parts(self) -> int: ...
    @property
    def min_part_units(self) -> int: ...
    @property
    def whole_slack(self) -> int: ...
    @property
    def prefix_parts(self) -> int: ...
    @property
    def min_prefix_tiles(self) -> int: ...
    @property
    def min_saved_tiles(self) -> int: ...
    @property
    def overlaps_producer(self) -> bool: ...

class PagedAttentionSplitConfig:
    @property
    def head_tile(self) -> int: ...
    @property
    def head_tiles(self) -> int: ...
    @property
    def lanes(self) -> int: ...
    @property
    def num_parts(self) -> int: ...
    @property
    def grid(self) -> int: ...

class RmsNormConfig:
    @property
    def width(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def overlaps_producer(self) -> bool: ...

class SiluAndMulConfig:
    @property
    def width(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def overlaps_producer(self) -> bool: ...

class ApplyRopeConfig:
    @property
    def width(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def overlaps_producer(self) -> bool: ...

class SampleTokensConfig:
    @property
    def blocks(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def staged(self) -> bool: ...
    @property
    def overlaps_producer(self) -> bool: ...

def build_info() -> BuildInfo: ...
def driver_version() -> int: ...
def device_info(device: int) -> DeviceProps: ...
def choose_wna16_linear(M: int, N: int, props: DeviceProps) -> Wna16LinearConfig: ...
def wna16_linear(
    x: int,
    qweight: int,
    scales: int,
    qzeros: int,
    g_idx: int,
    bias: int,
    residual: int,
    out: int,
    M: int,
    N: int,
    K: int,
    x_stride: int,
    residual_stride: int,
    out_stride: int,
    bits: int,
    group_size: int,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def choose_wna16_stream(
    M: int,
    N: int,
    K: int,
    bits: int,
    groups_per_block: int,
    has_zeros: bool,
    batch_invariant: bool,
    props: DeviceProps,
    in_layer: bool = False,
) -> StreamConfig: ...
def choose_wna16_gemm(
    M: int,
    N: int,
    K: int,
    bits: int,
    groups_per_block: int,
    has_zeros: bool,
    props: DeviceProps,
    in_layer: bool = False,
) -> GemmConfig: ...
def uses_wna16_tiles(
    M: int,
    N: int,
    K: int,
    bits: int,
    groups_per_block: int,
    has_zeros: bool,
    batch_invariant: bool,
    props: DeviceProps,
) -> bool: ...
def may_pend_wna16_norm(
    M: int,
    N: int,
    K: int,
    bits: int,
    groups_per_block: int,
    has_zeros: bool,
    dtype: int,
    props: DeviceProps,
) -> bool: ...
def choose_wna16_tiles(
    M: int, N: int, K: int, bits: int, groups_per_block: int, has_zeros: bool, props: DeviceProps
) -> TilesConfig: ...
def wna16_gemm_tiles() -> list[tuple[int, int]]: ...
def wna16_parts_bytes(M: int, N: int, K: int, config: GemmConfig | TilesConfig) -> int: ...
def wna16_panels_splits(
    M: int,
    N: int,
    K: int,
    bits: int,
    groups_per_block: int,
    has_zeros: bool,
    props: DeviceProps,
) -> int: ...
def wna16_panels_shared_bytes(
    M: int,
    N: int,
    K: int,
    bits: int,
    groups_per_block: int,
    has_zeros: bool,
    config: StreamConfig | GemmConfig | TilesConfig,
) -> int: ...
def gather_columns(
    x: int,
    perm: int,
    out: int,
    M: int,
    K: int,
    columns: int,
    x_stride: int,
    prefetch_perm: bool,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def wna16_panels_scratch_bytes(
    M: int,
    N: int,
    K: int,
    bits: int,
    groups_per_block: int,
    has_zeros: bool,
    batch_invariant: bool,
    props: DeviceProps,
    in_layer: bool = False,
) -> int: ...
def describe_wna16_panels(
    M: int,
    N: int,
    K: int,
    bits: int,
    groups_per_block: int,
    has_zeros: bool,
    batch_invariant: bool,
    props: DeviceProps,
    in_layer: bool = False,
) -> str: ...
def wna16_panels(
    config: StreamConfig | GemmConfig | TilesConfig | None,
    x: int,
    panels: int,
    bias: int,
    residual: int,
    norm_weight: int,
    x_squares: int,
    out: int,
    norm_out: int,
    squares: int,
    scratch: int,
    scratch_bytes: int,
    M: int,
    N: int,
    K: int,
    column_blocks: int,
    x_stride: int,
    residual_stride: int,
    out_stride: int,
    norm_eps: float,
    x_eps: float,
    bits: int,
    groups_per_block: int,
    has_zeros: bool,
    gate_up: bool,
    in_layer: bool,
    batch_invariant: bool,
    leaves_sums: bool,
    prefetch_weights: bool,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def dequantize(
    qweight: int,
    scales: int,
    qzeros: int,
    g_idx: int,
    out: int,
    N: int,
    K: int,
    bits: int,
    group_size: int,
    scale_dtype: int,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def choose_paged_attention_decode(
    batch: int,
    q_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_blocks: int,
    window: int,
    dtype: int,
    kv_dtype: int,
    kv_scales: int,
    props: DeviceProps,
) -> PagedAttentionDecodeConfig | None: ...
def choose_paged_attention_split(
    batch: int,
    q_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_blocks: int,
    window: int,
    dtype: int,
    kv_dtype: int,
    kv_scales: int,
    props: DeviceProps,
) -> PagedAttentionSplitConfig: ...
def paged_attention_plan_bytes(
    config: PagedAttentionDecodeConfig | None,
    batch: int,
    q_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_blocks: int,
    window: int,
    dtype: int,
    kv_dtype: int,
    kv_scales: int,
    props: DeviceProps,
) -> int: ...
def paged_attention_prefixes_bytes(
    config: PagedAttentionDecodeConfig | None,
    batch: int,
    q_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_blocks: int,
    window: int,
    dtype: int,
    kv_dtype: int,
    kv_scales: int,
    props: DeviceProps,
) -> int: ...
def paged_attention_decode_scratch_bytes(
    config: PagedAttentionDecodeConfig | None,
    batch: int,
    q_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_blocks: int,
    window: int,
    dtype: int,
    kv_dtype: int,
    kv_scales: int,
    props: DeviceProps,
) -> int: ...
def paged_attention_sharing_scratch_bytes(
    config: PagedAttentionDecodeConfig | None,
    batch: int,
    q_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_blocks: int,
    window: int,
    dtype: int,
    kv_dtype: int,
    kv_scales: int,
    props: DeviceProps,
) -> int: ...
def plan_paged_attention(
    config: PagedAttentionDecodeConfig | None,
    seq_lens: int,
    block_table: int,
    plan: int,
    plan_bytes: int,
    prefixes: int,
    prefixes_bytes: int,
    batch: int,
    q_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_blocks: int,
    block_table_stride: int,
    window: int,
    dtype: int,
    kv_dtype: int,
    kv_scales: int,
    device: int,
    stream: int,
) -> None: ...
def paged_attention_decode(
    config: PagedAttentionDecodeConfig | None,
    q: int,
    k_cache: int,
    v_cache: int,
    k_scale: int,
    v_scale: int,
    block_table: int,
    seq_lens: int,
    sinks: int,
    out: int,
    lse: int,
    plan: int,
    plan_bytes: int,
    prefixes: int,
    prefixes_bytes: int,
    scratch: int,
    scratch_bytes: int,
    batch: int,
    q_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_blocks: int,
    block_size: int,
    max_blocks: int,
    q_stride: int,
    block_table_stride: int,
    window: int,
    softmax_scale: float,
    softcap: float,
    follows_write: bool,
    dtype: int,
    kv_dtype: int,
    kv_scales: int,
    device: int,
    stream: int,
) -> None: ...

class WriteKvCacheConfig:
    @property
    def copies(self) -> bool: ...
    @property
    def is_wide(self) -> bool: ...
    @property
    def lanes(self) -> int: ...
    @property
    def overlaps_producer(self) -> bool: ...

def choose_write_kv_cache(
    k: int,
    k_stride: int,
    num_q_heads: int,
    head_dim: int,
    rope: bool,
    kv_dtype: int,
    dtype: int,
    props: DeviceProps,
) -> WriteKvCacheConfig: ...
def write_kv_cache(
    k: int,
    v: int,
    q: int,
    q_out: int,
    k_cache: int,
    v_cache: int,
    k_scale: int,
    v_scale: int,
    slot_mapping: int,
    positions: int,
    cos_sin: int,
    q_norm: int,
    k_norm: int,
    eps: float,
    rotate: bool,
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_blocks: int,
    block_size: int,
    max_positions: int,
    q_stride: int,
    k_stride: int,
    v_stride: int,
    splits: int,
    split_stride: int,
    kv_dtype: int,
    kv_scales: int,
    settled: bool,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def choose_rms_norm(
    x: int, hidden_size: int, x_stride: int, dtype: int, props: DeviceProps
) -> RmsNormConfig: ...
def rms_norm(
    x: int,
    residual: int,
    weight: int,
    out: int,
    residual_out: int,
    num_rows: int,
    hidden_size: int,
    x_stride: int,
    residual_stride: int,
    eps: float,
    prefetch_weight: bool,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def choose_silu_and_mul(
    x: int, num_rows: int, size: int, x_stride: int, dtype: int, props: DeviceProps
) -> SiluAndMulConfig: ...
def silu_and_mul(
    x: int, out: int, num_rows: int, size: int, x_stride: int, dtype: int, device: int, stream: int
) -> None: ...
def choose_apply_rope(
    q: int,
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_stride: int,
    k_stride: int,
    dtype: int,
    props: DeviceProps,
) -> ApplyRopeConfig: ...
def apply_rope(
    q: int,
    k: int,
    positions: int,
    cos_sin: int,
    q_out: int,
    k_out: int,
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_stride: int,
    k_stride: int,
    max_positions: int,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def choose_sample_tokens(vocab_size: int, dtype: int, device: DeviceProps) -> SampleTokensConfig: ...
def sample_tokens(
    logits: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    keys: int,
    tokens: int,
    valid: int,
    num_rows: int,
    vocab_size: int,
    logits_stride: int,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
