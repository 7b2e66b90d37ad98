"""How a command ends."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from moebench.reports.text import clean, short

OK, REGRESSION, USAGE, POINTS_FAILED, NO_VERDICT, STORAGE, UNREADABLE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130


MOST_ERRORS, ERROR_CHARACTERS = 50, 2000  # printed; an input made to annoy can have as many as it likes


def fail(errors: list[str], code: int) -> NoReturn:
    for error in errors[:MOST_ERRORS]:
        click.echo(f"error: {short(clean(error), ERROR_CHARACTERS)}", err=True)
    if len(errors) > MOST_ERRORS:
        click.echo(f"and {len(errors) - MOST_ERRORS} more errors", err=True)
    sys.exit(code)
