"""Makes docs/example and what README shows of it from the directory of a run: python docs/make_example.py RUN."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from moebench.crossover import crossovers
from moebench.journal import JOURNAL, MANIFEST, load_run, merge
from moebench.record import RecordError
from moebench.reports import policy, render
from moebench.reports.figures import album
from moebench.reports.page import page

ROOT = Path(__file__).parents[1]
EXAMPLE = Path("docs/example")
PAGE, PLOT = "report.html", "latency.svg"
BEGIN, END = "<!-- made by `make example` from docs/example -->", "<!-- end of what `make example` made -->"
MOST_BYTES = 8_000_000  # of the journal; 120 rows of 2000 samples are 5 MB
VERSIONS = ("moebench", "torch", "triton", "flashinfer", "vllm", "triton_kernels")


class Unfit(Exception):
    """A run that is no example; the message says what it lacks."""


def copied(run: Path, root: Path) -> None:
    """The journal and the manifest of the run into the example; nothing else of it is kept."""
    there = root / EXAMPLE
    if run.resolve() == there.resolve():
        return
    loaded = load_run(run)
    if not loaded.records or loaded.torn:
        raise Unfit(f"{run} {'has a line that was cut off' if loaded.torn else 'has no records'}")
    if paths := sorted(set(_paths((run / MANIFEST).read_text("utf-8") + (run / JOURNAL).read_text("utf-8")))):
        raise Unfit(
            f"{run} names places of the machine that made it, such as {paths[0]}; an example is for everybody (sweep with a short --out)"
        )
    if (run / JOURNAL).stat().st_size > MOST_BYTES:
        raise Unfit(f"{run / JOURNAL} has {(run / JOURNAL).stat().st_size} bytes, an example at most {MOST_BYTES}; take fewer rows")
    there.mkdir(parents=True, exist_ok=True)
    for name in (JOURNAL, MANIFEST):
        (there / name).write_bytes((run / name).read_bytes())


def made(root: Path) -> dict[Path, str]:
    """Every text that follows from the example's journal: its page, its plot, and README with what it shows of it."""
    run = load_run(root / EXAMPLE)
    records = merge([run])
    drawn = album(records)
    latencies = [figure for _, _, figures in drawn.grids for figure in figures if figure.name.startswith("latency-")]
    tables = crossovers(records)
    if not latencies or not tables:
        raise Unfit(f"{root / EXAMPLE} has no plot of time against tokens, or nothing that can win: no example")
    first, device, manifest = latencies[0], run.manifest.device, run.manifest
    facts_of_rows = {name: str(record.facts[name]) for record in records for name in VERSIONS if name in record.facts}
    told_by_rows = {name: text for name, text in facts_of_rows.items() if text[:1].isdigit()}  # others say whose copy it is
    versions = {**told_by_rows, **device.versions, **manifest.versions}  # a tree that was copied has no metadata, its backend knows
    known = [f"{name} {versions[name]}" for name in (*VERSIONS, *sorted(set(versions) - set(VERSIONS))) if versions.get(name)]
    facts = [manifest.started[:10], *([f"driver {device.driver}"] if device.driver else []), *known]
    told = [
        BEGIN,
        f"{device.name}, {', '.join(facts)}; {len(records)} rows, medians of all samples.",
        f"![{first.title}: {first.finding}]({EXAMPLE}/{PLOT})",
        policy.markdown(tables).rstrip(),
        f"All of it: [{EXAMPLE}/{PAGE}]({EXAMPLE}/{PAGE}), made from [the journal]({EXAMPLE}/{JOURNAL}) by `make example`.",
        END,
    ]
    readme = (root / "README.md").read_text(encoding="utf-8")
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise Unfit(f"README.md needs one line {BEGIN!r} and one line {END!r} around what the example replaces")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return {
        root / EXAMPLE / PAGE: page([run]),
        root / EXAMPLE / PLOT: render.picture(first),
        root / "README.md": before + "\n\n".join(told) + after,
    }


def stale(root: Path) -> list[str]:
    """What of the example is missing, or is not what its journal makes; nothing where there is no example."""
    if not (root / EXAMPLE).exists():
        return []
    try:
        wanted = made(root)
    except (RecordError, Unfit) as error:
        return [str(error)]
    extra = {path.name for path in (root / EXAMPLE).iterdir()} - {JOURNAL, MANIFEST, PAGE, PLOT}
    found = [f"{EXAMPLE / name} does not belong there" for name in sorted(extra)]
    for path, text in wanted.items():
        if not path.exists():
            found.append(f"{path.relative_to(root)} is missing; make example")
        elif path.read_text(encoding="utf-8") != text:
            found.append(f"{path.relative_to(root)} is not what {EXAMPLE} makes; make example")
    return found


def _paths(text: str) -> list[str]:
    """Absolute paths: what a string starts with, or follows a blank or = in one."""
    return re.findall(r'(?<=[" =])/(?:home|root|tmp|work|mnt|var|opt|data)/[^"\s\\]*', text)


def main(run: Path, root: Path = ROOT) -> int:
    try:
        copied(run, root)
        for path, text in made(root).items():
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(root)}: {len(text.encode())} bytes\n")
    except (RecordError, Unfit, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else EXAMPLE)))
