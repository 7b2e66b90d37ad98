"""How a command ends."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

OK, REGRESSION, USAGE, POINTS_FAILED, NO_VERDICT, STORAGE, UNREADABLE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130


def fail(errors: list[str], code: int) -> NoReturn:
    for error in errors:
        click.echo(f"error: {error}", err=True)
    sys.exit(code)
