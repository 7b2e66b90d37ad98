"""Which of FlashInfer's tactics each token count gets, measured once a device, version and layer shape, kept on disk.

FlashInfer's autotuner measures; its own cache file is not used, because it is written only when all is done, is keyed by Python
reprs, and is dropped in silence when an unrelated library (cuDNN, CuTe DSL) changes. Ours is written after every bucket, so an
interrupted tuning goes on where it stopped, and holds what a record needs: tactic ids and seconds. Calls get their tactics
through `profile_ids`, so the autotuner is asked nothing inside the timed region and cannot map a token count to a bucket it never saw
(its bucket map is process-wide and set by the first call with each `tune_max_num_tokens`: MoERunner.refine_tuning_config)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from time import perf_counter
from typing import Literal

from moebench.kernels.flashinfer_details.versions import FlashInfer, Tuner

DEFAULT = -1  # the first tactic of a GEMM's list, which is what FlashInfer takes untuned
OPS = ("trtllm::fused_moe::gemm1", "trtllm::fused_moe::gemm2")
SCHEMA = 1
LONG_BUCKET = 1024  # tokens from which a call takes milliseconds

Cache = Literal["hit", "partial", "miss"]


@dataclass(frozen=True, kw_only=True)
class Tactics:
    """Ids of the two GEMMs by tokens, for batches with top_k experts a token."""

    top_k: int
    by_bucket: dict[int, tuple[int, int]] = field(default_factory=dict)  # empty: untuned

    def ids(self, num_tokens: int, top_k: int) -> list[int]:
        """Of the smallest bucket that holds the batch, else of the largest; a GEMM sees num_tokens * top_k rows, so another top_k
        than the tuned one is another number of tokens."""
        if not self.by_bucket:
            return [DEFAULT, DEFAULT]
        tokens = -(-num_tokens * top_k // self.top_k)
        fitting = [bucket for bucket in self.by_bucket if bucket >= tokens]
        return list(self.by_bucket[min(fitting) if fitting else max(self.by_bucket)])

    def __str__(self) -> str:
        """1:3/40 2:3/41 ...: bucket, id of GEMM 1, id of GEMM 2."""
        return " ".join(f"{bucket}:{first}/{second}" for bucket, (first, second) in sorted(self.by_bucket.items())) or "default"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a tactic depends on, and so the name of the file. Ranks are not part of it: they share their sizes, as FlashInfer's do."""

    device: str  # "NVIDIA H200"
    flashinfer: str
    cuda: str
    act_dtype: str
    num_local_experts: int
    hidden_size: int  # padded
    intermediate_size: int  # padded
    top_k: int
    ep_size: int
    tp_size: int
    bias: bool

    @property
    def file_name(self) -> str:
        text = (
            f"{self.device}-flashinfer{self.flashinfer}-cuda{self.cuda}-{self.act_dtype}-experts{self.num_local_experts}-"
            f"{self.hidden_size}x{self.intermediate_size}-top{self.top_k}-ep{self.ep_size}-tp{self.tp_size}-bias{int(self.bias)}.json"
        )
        return re.sub(r"[^A-Za-z0-9._-]+", "_", text)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was found, and what it took."""

    tactics: Tactics
    seconds: float  # in this process
    cold_seconds: float  # of all its buckets, whenever they were measured
    cache: Cache
    path: Path


def token_buckets(max_num_tokens: int) -> tuple[int, ...]:
    """Powers of two below max_num_tokens, then max_num_tokens: 15 of them up to 16384, each 1 to 6 s a GEMM on an H200."""
    powers = [2**n for n in range(max(max_num_tokens, 1).bit_length()) if 2**n < max_num_tokens]
    return (*powers, max(max_num_tokens, 1))


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/moebench/flashinfer, ~/.cache for the first where it is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moebench" / "flashinfer"


def tune(vendor: FlashInfer, subject: Subject, max_num_tokens: int, probe: Callable[[], None]) -> Tuning:
    """Measure every bucket that the file of this subject lacks. probe: one call of the fused MoE without profile_ids, any tokens.

    Raises RuntimeError where FlashInfer gave no tactic to a bucket (it logs running out of memory, and falls back)."""
    path = cache_dir() / subject.file_name
    known, cold_s = _load(path, subject)
    buckets = token_buckets(max_num_tokens)
    missing = [bucket for bucket in buckets if bucket not in known]
    started = perf_counter()
    for bucket in missing:
        bucket_started = perf_counter()
        vendor.tuner().clear_cache()  # so that what is there afterwards is of this bucket; nobody else asks it in this process
        with _repeats(vendor.tuner(), bucket), vendor.autotune(True, tuning_buckets=(bucket,), round_up=True):
            probe()
        known[bucket] = _winner(vendor, bucket)
        cold_s[bucket] = perf_counter() - bucket_started
        _save(path, subject, known, cold_s)
    return Tuning(
        tactics=Tactics(top_k=subject.top_k, by_bucket={bucket: known[bucket] for bucket in buckets}),
        seconds=perf_counter() - started,
        cold_seconds=sum(cold_s.get(bucket, 0.0) for bucket in buckets),
        cache="hit" if not missing else "miss" if len(missing) == len(buckets) else "partial",
        path=path,
    )


@contextmanager
def _repeats(tuner: Tuner, bucket: int) -> Iterator[None]:
    """Fewer calls of each tactic where a call takes milliseconds and hardly varies: of 95 s for a gpt-oss-20b layer on an H200, the
    buckets from 1024 tokens on took most."""
    before = tuner.warmup, tuner.repeat
    if bucket >= LONG_BUCKET:
        tuner.warmup, tuner.repeat = 1, 3
    try:
        yield
    finally:
        tuner.warmup, tuner.repeat = before


def _winner(vendor: FlashInfer, bucket: int) -> tuple[int, int]:
    winners = {key.custom_op: tactic for key, (tactic, _) in vendor.tuner().profiling_cache.items() if key.nearest_profile[0][0] == bucket}
    if not set(OPS) <= winners.keys():
        raise RuntimeError(
            f"FlashInfer's autotuner chose no tactic for {bucket} tokens (found {sorted(winners) or 'none'}), every tactic failed: "
            "for want of memory, or of a module it could not build (its log says); take fewer tokens, or the backend named @untuned"
        )
    return int(winners[OPS[0]]), int(winners[OPS[1]])


def _load(path: Path, subject: Subject) -> tuple[dict[int, tuple[int, int]], dict[int, float]]:
    """What a file says of this subject; nothing where it is absent, of another subject or not ours, and then it is written anew."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["schema"] != SCHEMA or stored["subject"] != asdict(subject):
            return {}, {}
        tactics = {int(bucket): (int(first), int(second)) for bucket, (first, second) in stored["tactics"].items()}
        return tactics, {int(bucket): float(seconds) for bucket, seconds in stored["seconds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, {}


def _save(path: Path, subject: Subject, tactics: dict[int, tuple[int, int]], seconds: dict[int, float]) -> None:
    """At once or not at all: another process may read it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "schema": SCHEMA,
        "subject": asdict(subject),
        "tactics": dict(sorted(tactics.items())),
        "seconds": dict(sorted(seconds.items())),
    }
    with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", suffix=".json", delete=False) as file:
        json.dump(content, file, indent=1)
    Path(file.name).replace(path)
