"""`moebench calibrate`: measure the roofs of this device."""

from __future__ import annotations

import json
import sys

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moebench.calibrate import roofs_of_this_machine
from moebench.commands.outcome import INTERRUPTED, POINTS_FAILED, STORAGE, fail
from moebench.roofline import Roofs, RoofsError, nominal, nominal_rate, roofs_path, roofs_to_dict, save_roofs

ROWS = {
    "copy_bytes_s": ("copy", "B/s"),
    "read_bytes_s": ("read", "B/s"),
    "bf16_flop_s": ("bf16 matmul", "FLOP/s"),
    "fp8_flop_s": ("FP8 matmul", "FLOP/s"),
    "float32_flop_s": ("float32 matmul", "FLOP/s"),
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout; everything else goes to stderr.")
def calibrate(as_json: bool) -> None:
    """Measure how fast this device copies, reads and multiplies, and keep it.

    Later sweeps on such a device compare their times with these roofs instead of the data sheet's. Run it while nothing else uses
    the device. Exit status: 0 stored, 3 nothing was measured or it cannot be true, 5 it cannot be written, 130 interrupted."""
    console = Console(stderr=True, highlight=False)
    roofs: Roofs | None = None
    try:
        for news in roofs_of_this_machine():
            if isinstance(news, Roofs):
                roofs = news
            else:
                console.print(f"{news} ...", markup=False)
    except RoofsError as error:
        fail([str(error)], POINTS_FAILED)
    except KeyboardInterrupt:
        console.print("\ninterrupted; nothing was stored")
        sys.exit(INTERRUPTED)
    assert roofs is not None  # else RoofsError
    if not as_json:
        Console(highlight=False).print(_table(roofs))
    try:
        path = save_roofs(roofs)
    except RoofsError as error:
        fail([str(error)], POINTS_FAILED)
    except OSError as error:
        fail([f"{roofs_path(roofs.device)} cannot be written: {error.strerror}; set XDG_CACHE_HOME to a directory that can"], STORAGE)
    if as_json:
        click.echo(json.dumps({**roofs_to_dict(roofs), "path": str(path)}))
    else:
        click.echo(f"stored in {path}")


def _table(roofs: Roofs) -> Table:
    sheet = nominal(roofs.device)
    table = Table(title=f"{escape(roofs.device)} ({roofs.arch})", title_justify="left")
    table.add_column("what", no_wrap=True)
    for head in ("median", "95 % interval", "SM MHz", "% of nominal"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, rate in roofs.rates.items():
        what, unit = ROWS[name]
        scale, prefix = (1e12, "T") if rate.value >= 1e12 else (1e9, "G")
        says = nominal_rate(sheet, name) if sheet else None
        table.add_row(
            what,
            f"{rate.value / scale:.4g} {prefix}{unit}",
            f"{rate.low / scale:.4g} to {rate.high / scale:.4g}",
            str(rate.sm_mhz or ""),
            f"{rate.value / says:.1%}" if says else "",
        )
    return table
