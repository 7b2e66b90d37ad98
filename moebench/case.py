"""One point of a sweep, as plain numbers."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher
from operator import attrgetter

from moebench.once import once

BLOCK = 32  # elements along K that share one E8M0 scale; tensor-parallel shards are multiples of it


@dataclass(frozen=True, kw_only=True)
class Model:
    """The routed experts of a model: sizes, activation constants, whether its projections have biases."""

    name: str
    hidden_size: int
    intermediate_size: int  # of one of gate and up
    num_experts: int
    top_k: int
    alpha: float = 1.0  # swiglu: gate * sigmoid(alpha * gate) * (up + beta)
    beta: float = 0.0
    limit: float | None = None  # gate <= limit, -limit <= up <= limit
    bias: bool = False


# Each size was read in the source named beside it. Only gpt-oss ships MXFP4 experts; the others lend their
# shapes and their plain SwiGLU. Shared experts are not part of the routed layer.
MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        # openai/gpt-oss-20b, config.json; activation from openai/gpt-oss gpt_oss/torch/model.py (swiglu)
        Model(
            name="gpt-oss-20b",
            hidden_size=2880,
            intermediate_size=2880,
            num_experts=32,
            top_k=4,
            alpha=1.702,
            beta=1.0,
            limit=7.0,
            bias=True,
        ),
        # openai/gpt-oss-120b, config.json
        Model(
            name="gpt-oss-120b",
            hidden_size=2880,
            intermediate_size=2880,
            num_experts=128,
            top_k=4,
            alpha=1.702,
            beta=1.0,
            limit=7.0,
            bias=True,
        ),
        # deepseek-ai/DeepSeek-V3, config.json: hidden_size, moe_intermediate_size, n_routed_experts, num_experts_per_tok
        Model(name="deepseek-v3", hidden_size=7168, intermediate_size=2048, num_experts=256, top_k=8),
        # Ascend/MindSpeed-RL, configs/model/qwen3_235b_a22b.yaml: hidden_size, moe_ffn_hidden_size, num_experts, moe_router_topk
        Model(name="qwen3-235b-a22b", hidden_size=4096, intermediate_size=1536, num_experts=128, top_k=8),
        # mistralai/Mixtral-8x7B-Instruct-v0.1, config.json
        Model(name="mixtral-8x7b", hidden_size=4096, intermediate_size=14336, num_experts=8, top_k=2),
        # ours, for laptops and tests: gpt-oss in small, sizes 64 over a multiple of 128 as 2880 is
        Model(
            name="tiny",
            hidden_size=320,
            intermediate_size=192,
            num_experts=8,
            top_k=4,
            alpha=1.702,
            beta=1.0,
            limit=7.0,
            bias=True,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """The shape of one MoE layer and one batch, seen from one rank; every field is a column."""

    model: str
    num_tokens: int
    hidden_size: int
    intermediate_size: int  # over all tensor-parallel ranks
    num_experts: int  # over all expert-parallel ranks
    top_k: int
    tp_size: int = 1
    tp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0
    routing: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        if problem := shape_error(self):
            raise ValueError(problem)

    def __hash__(self) -> int:
        return self._hash

    @once
    def _hash(self) -> int:
        """Computed once: the gate alone asks for it four times a record."""
        return hash(_values(self))

    @property
    def key(self) -> str:
        """Stable name, for NVTX ranges, baselines and messages."""
        return ",".join(f"{name}={getattr(self, name)}" for name in CASE_FIELDS)  # 4 us; asdict takes 40

    @property
    def layer_key(self) -> str:
        """Cases with the same layer_key share their weights."""
        shared = replace(self, num_tokens=0, top_k=1, routing="uniform")
        return shared.key

    @property
    def label(self) -> str:
        """What differs from a plain case of this model, for people."""
        model = MODELS[self.model]
        parts = [self.model, f"M={self.num_tokens}"]
        parts += [f"top_k={self.top_k}"] if self.top_k != model.top_k else []
        parts += [f"tp={self.tp_rank}/{self.tp_size}"] if self.tp_size > 1 else []
        parts += [f"ep={self.ep_rank}/{self.ep_size}"] if self.ep_size > 1 else []
        parts += [self.routing] if self.routing != "uniform" else []
        parts += [f"seed={self.seed}"] if self.seed else []
        return " ".join(parts)

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.ep_size

    @property
    def local_expert_start(self) -> int:
        return self.ep_rank * self.num_local_experts

    @property
    def shard(self) -> tuple[int, int]:
        """First and one-past-last intermediate index of this tensor-parallel rank.

        Shards are ceil(blocks / tp_size) blocks of 32 and the last one takes the rest, as vLLM's gpt-oss loader does."""
        per_rank = -(-self.intermediate_size // BLOCK // self.tp_size) * BLOCK
        return self.tp_rank * per_rank, min((self.tp_rank + 1) * per_rank, self.intermediate_size)

    @property
    def local_intermediate_size(self) -> int:
        start, stop = self.shard
        return stop - start

    @property
    def weight_bytes(self) -> int:
        """Bytes of this rank's codes, scales and biases."""
        weights = 3 * self.hidden_size * self.local_intermediate_size  # a local expert's
        biases = 2 * self.local_intermediate_size + self.hidden_size if MODELS[self.model].bias else 0
        return self.num_local_experts * (weights // 2 + weights // BLOCK + 2 * biases)

    @property
    def device_bytes(self) -> int:
        """Upper estimate of the device memory one backend needs for this case: the layer as generated, the backend's own
        copy of it, activations of every pair in fp32, one dequantized expert of the reference."""
        pairs = self.num_tokens * self.top_k
        activations = 4 * pairs * (2 * self.local_intermediate_size + self.hidden_size) + 4 * self.num_tokens * self.hidden_size
        return 2 * self.weight_bytes + activations + 4 * 3 * self.hidden_size * self.local_intermediate_size


def case(model: str, num_tokens: int, **fields_: int | str) -> Case:
    """A case of a preset; fields_ override what the preset says."""
    preset = MODELS[model]
    values: dict[str, int | str] = {
        "hidden_size": preset.hidden_size,
        "intermediate_size": preset.intermediate_size,
        "num_experts": preset.num_experts,
        "top_k": preset.top_k,
        **fields_,
    }
    return Case(model=model, num_tokens=num_tokens, **values)  # type: ignore[arg-type]  # Case checks them


def shape_error(case: Case) -> str | None:
    """What is wrong with the numbers of a case, as a sentence with a way out, or None."""
    if case.model not in MODELS:
        return f"unknown model {case.model!r}{did_you_mean(case.model, MODELS)}; known models: {', '.join(MODELS)}"
    if case.num_tokens < 0:
        return f"num_tokens={case.num_tokens} is negative; give 0 or more"
    if not 1 <= case.top_k <= case.num_experts:
        return f"top_k={case.top_k} is out of range; {case.model} has {case.num_experts} experts, so give 1 to {case.num_experts}"
    for name, size in (("hidden_size", case.hidden_size), ("intermediate_size", case.intermediate_size)):
        if size <= 0 or size % BLOCK:
            return f"{name}={size} is not a positive multiple of {BLOCK}, the MX block"
    if case.ep_size < 1 or case.num_experts % case.ep_size:
        fits = ", ".join(str(n) for n in range(1, case.num_experts + 1) if case.num_experts % n == 0)
        return f"num_experts={case.num_experts} does not divide over ep_size={case.ep_size}; sizes that fit: {fits}"
    blocks = case.intermediate_size // BLOCK
    if case.tp_size < 1 or -(-blocks // max(case.tp_size, 1)) * (case.tp_size - 1) >= blocks:
        work = f"intermediate_size={case.intermediate_size} is {blocks} blocks of {BLOCK}"
        return f"tp_size={case.tp_size} leaves a rank without work: {work}; try 1, 2, 4 or 8"
    for rank, size in (("ep_rank", case.ep_size), ("tp_rank", case.tp_size)):
        if not 0 <= getattr(case, rank) < size:
            return f"{rank}={getattr(case, rank)} is not between 0 and {size - 1}"
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a known word, or the beginning of one, is near; else nothing."""

    def nearness(name: str) -> float:
        return max(SequenceMatcher(None, word[:64], part).ratio() for part in (name, name[: len(word) + 1]))

    best = max(known, key=nearness, default="")
    return f"; did you mean {best!r}?" if best and nearness(best) >= 0.6 else ""


CASE_FIELDS = tuple(field.name for field in fields(Case))
_values = attrgetter(*CASE_FIELDS)
# What cases of one layer and its ranks have in common, as a tuple: 0.3 us, where replace() takes 10.
layer_of = attrgetter(*(name for name in CASE_FIELDS if name not in ("num_tokens", "ep_rank", "tp_rank")))
