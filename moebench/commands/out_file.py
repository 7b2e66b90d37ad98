"""A file that a command writes: never one of a run, since what was measured cannot be made again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from moebench.journal import is_of_a_run


class OutFile(click.Path):
    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, context)))
        if is_of_a_run(path):
            self.fail(f"{path} is what a run has measured, and it would be lost; choose another file", param, context)
        return path
