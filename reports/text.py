"""Numbers and foreign text, made fit to print."""

import re
from collections.abc import Sequence
from functools import lru_cache
from unicodedata import category

ESCAPED = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {char: f"\\{char}" for char in "\\`*[]|~#"}  # in Markdown


def us(value: float) -> str:
    """Microseconds with three or four digits: 0.912, 9.12, 91.2, 912.3, 9123."""
    if value >= 1000:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def ratio(value: float) -> str:
    """1.07x, 12.3x, 480x."""
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def error(value: float) -> str:
    """A relative error with two digits after the point: 3.62e-03."""
    return f"{value:.2e}"


def gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.0f} GiB"


def count(number: int, noun: str) -> str:
    """1 point, 2 points."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def short(text: str, length: int = 100) -> str:
    """At most so many characters: C++ kernel names are templates of templates."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def label(text: str, length: int = 34) -> str:
    """For a place of limited width: the middle of a long name is left out, since names differ at their beginning or their end."""
    text = clean(text)
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


@lru_cache(maxsize=4096)
def kernel_name(name: str) -> str:
    """A kernel's own name without namespaces, arguments and template arguments, from a C++ or a mangled name; the journal has it whole."""
    if name.startswith("_ZN"):
        rest, own = name[3:], ""
        while (digits := re.match(r"\d+", rest)) and int(digits[0]) < len(rest):
            end = len(digits[0]) + int(digits[0])
            own, rest = rest[len(digits[0]) : end], rest[end:]
        return short(own or name)
    return short(re.split(r"[<(]", name.removeprefix("void "), maxsplit=1)[0].split("::")[-1].strip() or name)


def clean(text: str) -> str:
    """One line without control, formatting or unpaired surrogate characters: what a record says may not steer a terminal."""
    if text.isprintable():  # 28 times as fast on a long list of kernels
        return " ".join(text.split())
    kept = "".join(char for char in text if char.isspace() or not category(char).startswith("C"))
    return " ".join(kept.split())


def escape(text: str) -> str:
    """Foreign text as plain words inside a table cell or a heading of Markdown."""
    return "".join(ESCAPED.get(char, char) for char in clean(text))


def percent(share: float) -> str:
    """Of one: 62 %, 6.2 %, 0.62 %."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def slug(text: str) -> str:
    """Fit for a file name and an id: gpt-oss-20b-ep2."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:60].strip("-") or "x"
