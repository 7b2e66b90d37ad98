"""Prints how long compare and policy take for 1,000 and for 100,000 records: python tests/bench_compare.py [RECORDS ...]."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from zlib import crc32

from moebench.case import case
from moebench.device import Device
from moebench.journal import load_run, merge, write_manifest
from moebench.realized import Realized
from moebench.record import Error, Kernel, Manifest, Record, Timing, to_json

BACKENDS = ("cutlass_mxfp4_bf16", "marlin_mxfp4_bf16", "openai_triton_kernels", "triton_mxfp4_bf16")
TOKENS = tuple(2**exponent for exponent in range(15))
ROUNDS = 5
SAMPLES = 60
TARGETS_S = {1_000: 2.0, 100_000: 10.0}  # by number of records: what a command may take
# As many kernels with names as long as a record of cutlass_mxfp4_bf16 on an H200 has: 6.7 KB of its 9 KB.
KERNELS = tuple(Kernel(name=f"void cutlass::device_kernel<{number}, {'cute::tuple<int>, ' * 34}>(Params)", count=1) for number in range(10))


def records(count: int, factor: float) -> Iterator[Record]:
    noise = random.Random(factor)
    for number in range(count):
        rest, backend = divmod(number, len(BACKENDS))
        rest, tokens = divmod(rest, len(TOKENS))
        seed, round_ = divmod(rest, ROUNDS)
        center_us = factor * (50 + TOKENS[tokens] / 4) * (1 + backend / 20)
        yield Record(
            case=case("gpt-oss-20b", TOKENS[tokens], seed=seed),
            backend=BACKENDS[backend],
            act_dtype="bf16",
            arch="sm90",
            device="NVIDIA H200",
            status="ok",
            error=Error(rel_l2=2e-3, worst=0.01, worst_token=0, worst_column=1, max_abs=0.1, rel_l2_tolerance=5e-3, worst_tolerance=0.15),
            timing=Timing(
                samples_us=tuple(noise.gauss(center_us, center_us / 100) for _ in range(SAMPLES)),
                clock="cuda_graph",
                l2="cold",
                l2_method="256 MiB read before each sample",
                warmup_calls=100,
            ),
            routing=Realized(
                active_experts=32, empty_experts=0, local_pairs=4, load_max_over_mean=1.0, pairs_per_rank=(4,), sha256="ab" * 32
            ),
            prepare_s=2.0,
            facts={"padded_hidden": 2944, "padded_intermediate": 2944, "tactics": " ".join(f"{2**n}:73/188" for n in range(15))},
            kernels=KERNELS,
            round=round_,
            run_id="bench",
            time=f"2026-01-01T00:00:00.{number:06d}+00:00",
        )


def write(path: Path, made: Iterable[Record]) -> Path:
    """A run directory; not by Journal, which brings each record to the disk before it takes the next."""
    path.mkdir()
    device = Device(arch="sm90", name="NVIDIA H200", torch="cuda:0", memory_bytes=140 << 30)
    started = "2026-01-01T00:00:00+00:00"
    write_manifest(path, Manifest(run_id="bench", started=started, command=("moebench",), device=device, plan={}, plan_hash="0"))
    with (path / "journal.jsonl").open("wb") as file:
        for record in made:
            body = to_json(record).encode()
            file.write(b"%08x %s\n" % (crc32(body), body))
    return path


def called(count: int, *words: str | Path) -> str:
    """What one command took, start of Python included: seconds on the wall and on the CPU, and how they compare with the target.

    Raises CalledProcessError for an exit status other than 0."""
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "moebench", *map(str, words)], stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return told(wall, after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime, count, TARGETS_S.get(count))


def told(wall_s: float, cpu_s: float, count: int, target_s: float | None = None) -> str:
    """CPU beside the wall: where other programs run as well, the latter says more about them."""
    line = f"{wall_s:6.2f} s, {cpu_s:6.2f} s of CPU, {count / wall_s:7.0f} records/s ({count / cpu_s:7.0f} of CPU)"
    return f"{line}, {wall_s / target_s:.2f} of the {target_s:g} s it may take ({cpu_s / target_s:.2f} by CPU)" if target_s else line


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(counts: list[int]) -> None:
    for count in counts:
        with tempfile.TemporaryDirectory() as temporary:
            base = write(Path(temporary) / "base", records(count // 2, 1.0))
            candidate = write(Path(temporary) / "candidate", records(count // 2, 1.01))
            size = sum((path / "journal.jsonl").stat().st_size for path in (base, candidate))
            say(f"{count} records, {size / 1e6:.0f} MB")
            used = time.process_time()
            runs = [load_run(base), load_run(candidate)]
            loaded = time.process_time()
            merge(runs)
            say(f"  load_run {loaded - used:6.2f} s of CPU, merge {time.process_time() - loaded:.2f} s")
            del runs
            say(f"  compare  {called(count, 'compare', base, candidate)}")
            say(f"  policy   {called(count, 'policy', base, candidate)}")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [1_000, 100_000])
