"""Makes the two pictures of docs/kernels.md: python docs/make_kernel_pictures.py [DIRECTORY]."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moebench.kernels.hopper_mxfp4_bf16_details.layout import _words
from moebench.kernels.hopper_mxfp4_bf16_details.shape import STAGES

LAYOUT, TIMELINE = "kernel_layout.svg", "kernel_timeline.svg"
QUAD = ("#cfe2f3", "#d9ead3", "#fff2cc", "#f4cccc")  # of a thread's number in its quad
INK, MARKED, GREY = "#1f2430", "#b4430f", "#e4e6eb"
THREAD = 37  # the one that is followed: warp 1, g 1, c 1

# Of 4096 tokens of gpt-oss-20b on an H200, bf16, 128 columns: shares of a launch of 2.50 million cycles, medians over blocks, by clock
# readings in the kernel (before the sort and the stores of z were made faster).
LAUNCH = (
    ("x reordered, pairs sorted", 3.7, "#c9cdd6"),
    ("products of 38 items", 77.4, "#7aa6d8"),
    ("swiglu, h stored", 3.8, "#6fb58a"),
    ("z stored", 3.4, "#e0a64a"),
    ("flags", 1.8, "#b58ad1"),
    ("wait for the last tiles", 1.4, "#c9cdd6"),
    ("slots added", 3.1, "#d96f5d"),
    ("rest", 5.4, "#eceef2"),
)


def block(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str = "", **how: object) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=INK, linewidth=0.6))
    if text:
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK, **{"fontsize": 8, **how})  # type: ignore[arg-type]


def bare(axes: Axes, title: str, right: float, top: float) -> None:
    axes.set_xlim(0, right)
    axes.set_ylim(top, 0)
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)


def layout() -> Figure:
    """Who has which weights of a chunk, what a stage is made of, and where the bits of a word come from."""
    figure = Figure(figsize=(10.5, 6.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.1, 1))
    chunk, stage = upper.subplots(1, 2, width_ratios=(1.7, 1))
    _chunk(chunk)
    _stage(stage)
    _word(lower.subplots())
    return figure


def _chunk(axes: Axes) -> None:
    bare(axes, f"A chunk of 64 rows, 128 columns; marked: the two blocks of 32 of thread {THREAD}", 140, 70)
    warp, g, c = THREAD >> 5, THREAD >> 2 & 7, THREAD & 3
    for w in range(4):
        for half in range(2):
            for quad in range(4):
                block(axes, 8 + 32 * quad, 2 + 16 * w + 8 * half, 32, 8, QUAD[quad])
                axes.text(
                    24 + 32 * quad, 6 + 16 * w + 8 * half, f"c = {quad}, half {half}", ha="center", va="center", fontsize=6.5, color=INK
                )
        axes.text(4, 10 + 16 * w, f"warp {w}", rotation=90, ha="center", va="center", fontsize=7.5, color=INK)
    for half in range(2):
        row = 16 * warp + g + 8 * half
        axes.add_patch(Rectangle((8 + 32 * c, 2 + row), 32, 1, facecolor=MARKED, edgecolor=MARKED))
    for number in range(5):
        axes.text(8 + 32 * number, 68.5, str(32 * number), ha="center", va="center", fontsize=7.5, color=INK)


def _stage(axes: Axes) -> None:
    used = STAGES[0]
    bare(axes, f"A stage of {used.columns} columns: {used.bytes} bytes, one copy", 10, 10)
    parts = [(f"chunk {n // 2}, half {n % 2}: 16 bytes a thread", 2048) for n in range(2 * used.chunks)]
    parts += [("half a chunk: 16 bytes a thread", 2048), ("scales: 4 bytes a thread", 512), ("scales of half a chunk", 128)]
    assert sum(size for _, size in parts) == used.bytes
    y = 0.2
    for text, size in parts:
        height = max(size / 2048 * 1.7, 0.38)
        block(
            axes, 0.3, y, 9.4, height, QUAD[1] if "half 0" in text else QUAD[2] if size == 2048 else GREY, f"{text} ({size})", fontsize=7.5
        )
        y += height


def _word(axes: Axes) -> None:
    bare(
        axes,
        "A word: 8 codes whose magnitudes are selectors of a byte permutation, and whose signs are where its results have theirs",
        32,
        5.4,
    )
    for bit in range(31, -1, -1):
        x = 31 - bit
        code, kind = _source(bit)
        block(axes, x, 1, 1, 2, QUAD[code % 4], f"{code}", fontsize=8)
        axes.text(x + 0.5, 0.6, str(bit), ha="center", va="center", fontsize=6, color=INK)
        axes.text(x + 0.5, 3.4, kind, ha="center", va="center", fontsize=7, color=MARKED if kind == "s" else INK)
    told = (
        "In a box the number of the code whose bit it is; m: magnitude, s: sign. "
        "Bits 7, 15, 23 and 31 are the signs of codes 0 to 3, and of 4 to 7 once the word is shifted by 4."
    )
    axes.text(0, 4.7, told, fontsize=8, color=INK)


def _source(bit: int) -> tuple[int, str]:
    """Which code a bit of a word is of, and whether it is of its magnitude or its sign: as `layout.py` packs it."""
    for code in range(8):
        for kind, value in (("s", 8), *(("m", 1 << n) for n in range(3))):
            packed = torch.zeros(4, dtype=torch.uint8)
            packed[code // 2] = value << (4 * (code % 2))
            word = sum(int(byte) << (8 * n) for n, byte in enumerate(_words(packed)))
            if word == 1 << bit:
                return code, kind
    raise ValueError(f"no code sets bit {bit} alone")


def timeline() -> Figure:
    """A launch of prefill.cu as one block sees it, and what the warps of a block do within an item."""
    figure = Figure(figsize=(10.5, 5.4), layout="constrained")
    whole, item = figure.subplots(2, 1, height_ratios=(1, 1.9))
    bare(whole, "A launch, in the first warpgroup of a block: 4096 tokens of gpt-oss-20b, % of 2.50 million cycles", 100, 6.4)
    x = 0.0
    for number, (text, share, color) in enumerate(LAUNCH):
        block(whole, x, 1.4, share, 1.6, color, f"{share:g}" if share > 3 else "", fontsize=7)
        column, line = divmod(number, 2)
        whole.add_patch(Rectangle((25 * column, 4.0 + 1.2 * line), 1.2, 0.8, facecolor=color, edgecolor=INK, linewidth=0.6))
        whole.text(25 * column + 1.8, 4.4 + 1.2 * line, f"{text} ({share:g} %)", va="center", fontsize=8, color=INK)
        x += share
    bare(item, "Within an item (schematic): everybody works ahead of whom it feeds, through rings in shared memory", 100, 13)
    rows = (
        "warp 8: takes items, copies weights",
        "warps 9 to 11: gather x or h",
        "warpgroup 0: expands codes",
        "warpgroup 1: expands codes",
        "tensor cores",
    )
    for number, text in enumerate(rows):
        item.text(0, 1.6 + 2.3 * number, text, va="center", fontsize=8, color=INK)
    for s in range(6):
        block(item, 28 + 12 * s - (4 if s else 0), 0.8, 7.5, 1.5, QUAD[0], f"stage {s}", fontsize=7)
    for line in range(15):
        block(item, 29 + 4.6 * line, 3.1, 3.6, 1.5, QUAD[1], str(line), fontsize=7)
    for unit in range(7):
        block(item, 32 + 9.4 * unit, 5.4, 5.4, 1.5, QUAD[2], f"unit {unit}", fontsize=7)
        block(item, 36.7 + 9.4 * unit, 7.7, 5.4, 1.5, QUAD[3], f"unit {unit}", fontsize=7)
        block(item, 37.4 + 9.4 * unit, 10.0, 4.7, 1.5, QUAD[2], f"0: {unit}", fontsize=7)
        if unit < 6:
            block(item, 42.1 + 9.4 * unit, 10.0, 4.7, 1.5, QUAD[3], f"1: {unit}", fontsize=7)
    item.text(
        28,
        12.5,
        "a unit: 64 rows, 64 columns of weights, all tokens of the pass; its products run while the next one's codes are expanded",
        fontsize=8,
        color=INK,
    )
    return figure


def saved(figure: Figure) -> str:
    with mpl.rc_context({"svg.hashsalt": "moebench", "svg.fonttype": "none", "font.family": "sans-serif"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, figure in ((LAYOUT, layout()), (TIMELINE, timeline())):
        (directory / name).write_text(saved(figure), encoding="utf-8")


if __name__ == "__main__":
    main()
