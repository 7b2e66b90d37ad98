"""What a layer's sizes decide, as plain numbers: the stages of its weights, which kernel a token count gets, the constants of `moe.cu`."""

from __future__ import annotations

from dataclasses import dataclass

MAX_TOP_K = 8
TYPICAL_TOP_K = 4  # a layer does not say; the kernel takes any up to MAX_TOP_K, this one decides how many columns its product has
WARPGROUPS = 3
THREADS = WARPGROUPS * 128 + 32  # of a block; one block on each multiprocessor
TILE_ROWS = 64
SHARED_BYTES = 227 * 1024  # that a block can have on sm90
LEAST_RING_STAGES = 2 * WARPGROUPS
OUTLIER_BYTES = 32
PADDING_WORTH_WHILE = 1.02  # more weights than with the best stage, for a wider one


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Columns that a stage of 64 rows has: whole chunks of 128, with or without half a chunk more."""

    chunks: int
    half: int

    @property
    def columns(self) -> int:
        return 128 * self.chunks + 64 * self.half

    @property
    def lines(self) -> int:
        """128-byte lines that a row of activations takes in shared memory, of the last perhaps half."""
        return self.chunks + self.half

    @property
    def code_bytes(self) -> int:
        return TILE_ROWS * self.columns // 2

    @property
    def bytes(self) -> int:
        return self.code_bytes + TILE_ROWS * self.columns // 32

    def count(self, k: int) -> int:
        return -(-k // self.columns)

    def padded(self, k: int) -> int:
        return self.count(k) * self.columns

    def filled(self, k: int) -> int:
        """k, up to the end of the chunk or half chunk that it ends in."""
        whole, rest = divmod(k, self.columns)
        return whole * self.columns + min(-(-rest // 128) * 128, self.columns)


STAGES = (Stage(chunks=2, half=1), Stage(chunks=2, half=0), Stage(chunks=1, half=1))  # 320 (2880 is 9 of them), 256, 192


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a layer's shape decides."""

    hidden: int
    intermediate: int  # of this rank's shard
    num_experts: int  # over all ranks
    local_experts: int

    @property
    def stage(self) -> Stage:
        """The widest one whose zeros at the end of rows cost next to nothing; the weights' layout depends on it, and on nothing else."""
        columns = {
            stage: 2 * self.intermediate * stage.padded(self.hidden) + self.hidden * stage.padded(self.intermediate) for stage in STAGES
        }
        return next(stage for stage in STAGES if columns[stage] <= PADDING_WORTH_WHILE * min(columns.values()))

    @property
    def few_up_to(self) -> int:
        """Tokens up to which moe.cu runs: as long as it has few passes that read an expert's weights once more."""
        return next(up_to for pairs, up_to in FEW_UP_TO if 128 * TYPICAL_TOP_K / self.num_experts <= pairs)

    @property
    def pair_up_to(self) -> int:
        """Tokens up to which prefill.cu takes a pair as two columns of e4m3, where that is possible, and above which it takes bf16."""
        return int(PAIR_UP_TO * self.num_experts / TYPICAL_TOP_K)


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Calls of up to max_tokens tokens, and more than the tier before."""

    max_tokens: int
    most_ring_stages: int


# A longer ring takes more of memory's first microsecond, in which the hidden states have to arrive: measured for 1 and 8 tokens.
TIERS = (
    Tier(max_tokens=2, most_ring_stages=15),
    Tier(max_tokens=8, most_ring_stages=18),
    Tier(max_tokens=32, most_ring_stages=18),
    Tier(max_tokens=64, most_ring_stages=18),
    Tier(max_tokens=128, most_ring_stages=18),
)
# (pairs for an expert on average at 128 tokens, tokens)
FEW_UP_TO = ((8.0, 128), (float("inf"), 64))
# pairs for an expert on average: up to there expanding weights is what takes time, and e4m3 takes half of bf16's
PAIR_UP_TO = 40.0
SPLIT_ONCE_ABOVE = 8  # tokens; up to these each block splits the rows it needs
# (pairs for an expert on average, columns of the product: a high and a low one for each token of a pass)
COLUMNS = ((1.0, 8), (4.0, 16), (float("inf"), 32))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One compilation of the kernel."""

    sizes: Sizes
    tier: Tier
    columns: int
    ring_stages: int
    h_static: bool
    outliers: bool

    @property
    def label(self) -> str:
        layer = f"{self.sizes.hidden} x {self.sizes.intermediate}, {self.sizes.local_experts} experts, up to {self.tier.max_tokens} tokens"
        return layer + ("" if self.h_static else ", h by row") + (", outliers" if self.outliers else "")

    @property
    def pass_tokens(self) -> int:
        return self.columns // 2

    @property
    def max_pairs(self) -> int:
        return self.tier.max_tokens * MAX_TOP_K

    @property
    def max_passes(self) -> int:
        return min(self.max_pairs, self.sizes.local_experts + self.max_pairs // self.pass_tokens)

    @property
    def counters(self) -> int:
        """32-bit words between launches zero: blocks, passes, tokens times tiles of GEMM 2, tokens."""
        return 1 + self.max_passes + self.tier.max_tokens * (self.sizes.hidden // TILE_ROWS) + self.tier.max_tokens

    @property
    def shared_bytes(self) -> int:
        return _shared_bytes(self.sizes, self.tier, self.columns, self.ring_stages)

    @property
    def defines(self) -> dict[str, int]:
        stage = self.sizes.stage
        return {
            "HIDDEN": self.sizes.hidden,
            "INTERMEDIATE": self.sizes.intermediate,
            "EXPERTS": self.sizes.local_experts,
            "MAX_TOP_K": MAX_TOP_K,
            "COLUMNS": self.columns,
            "STAGE_CHUNKS": stage.chunks,
            "STAGE_HALF": stage.half,
            "RING_STAGES": self.ring_stages,
            "MAX_TOKENS": self.tier.max_tokens,
            "SPLIT_ONCE": int(self.tier.max_tokens > SPLIT_ONCE_ABOVE),
            "H_STATIC": int(self.h_static),
            "OUTLIERS": int(self.outliers),
            "STATE_BYTES": _state_bytes(self.sizes, self.tier, self.columns, self.ring_stages),
        }


def tier_of(num_tokens: int) -> Tier:
    """The one that runs a call; num_tokens is at most MAX_TOKENS."""
    return next(tier for tier in TIERS if num_tokens <= tier.max_tokens)


def variant(sizes: Sizes, tier: Tier, *, h_static: bool, outliers: bool) -> Variant | None:
    """None where a block's shared memory does not hold a pass's activations and the smallest ring, even with the fewest columns."""
    pairs = tier.max_tokens * TYPICAL_TOP_K / sizes.num_experts
    wanted = next(columns for up_to, columns in COLUMNS if pairs <= up_to)
    for columns in (32, 16, 8):
        if columns > wanted:
            continue
        for ring_stages in range(tier.most_ring_stages, LEAST_RING_STAGES - 1, -WARPGROUPS):
            if _shared_bytes(sizes, tier, columns, ring_stages) <= SHARED_BYTES:
                return Variant(sizes=sizes, tier=tier, columns=columns, ring_stages=ring_stages, h_static=h_static, outliers=outliers)
    return None


def h_scale(alpha: float, beta: float, limit: float | None) -> float | None:
    """The power of two with which every |h| is at most 448, e4m3's largest; None where nothing bounds h.

    gate <= limit and |up| <= limit, so |gate * sigmoid(alpha * gate)| is at most limit above zero, and at most 0.2785 / alpha below."""
    if limit is None or alpha <= 0:
        return None
    bound = max(limit, 0.2785 / alpha) * (limit + abs(beta))
    if bound == 0:  # h is 0, and any power would do
        return None
    scale = 1.0
    while bound * scale > 448:
        scale /= 2
    while bound * scale * 2 <= 448:
        scale *= 2
    return scale


def _shared_bytes(sizes: Sizes, tier: Tier, columns: int, ring_stages: int) -> int:
    stage = sizes.stage
    activations = max(stage.count(sizes.hidden), stage.count(sizes.intermediate)) * stage.lines * columns * 128
    partial = (WARPGROUPS - 1) * 128 * columns // 2 * 4
    return activations + ring_stages * stage.bytes + partial + _state_bytes(sizes, tier, columns, ring_stages)


def _state_bytes(sizes: Sizes, tier: Tier, columns: int, ring_stages: int) -> int:
    """At least sizeof(State): barriers, list, token, first_of, passes, slots, rows of a pass, two words, counts of groups; rounded up."""
    pairs = tier.max_tokens * MAX_TOP_K
    passes = min(pairs, sizes.local_experts + pairs // (columns // 2))
    words = 2 * (2 * ring_stages + 2) + 2 * pairs + sizes.local_experts + 2 * passes + tier.max_tokens + columns + 2
    return -(-(4 * words + -(-pairs // 32) * sizes.local_experts) // 16) * 16
