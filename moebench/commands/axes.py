"""The axes of a plan as options, and a plan and a survey from them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from moebench import registry
from moebench.commands.outcome import USAGE, fail
from moebench.plan import Plan, PlanError, build
from moebench.sweep import Survey, SweepError
from moebench.sweep import survey as survey_machine

AXIS_HELP = {
    "model": "Models, such as gpt-oss-20b,gpt-oss-120b.",
    "tokens": "Token counts: 1,4,16 or 0:64:8 or 1:8192:x2 (ends included).",
    "top_k": "Experts per token; the model's own by default.",
    "ep": "Expert-parallel sizes; each rank's slice is one row.",
    "ep_ranks": "Which of those ranks: all, worst (most pairs) or a number.  [default: all]",
    "tp": "Tensor-parallel sizes, sharding the intermediate size in blocks of 32.",
    "tp_ranks": "Which of those ranks: all, worst (largest shard) or a number.  [default: worst]",
    "arch": "Architectures the run is for, such as sm90,sm100; rows of others than this machine's are skipped.",
    "routing": "uniform, balanced, zipf:S, hotspot:SHARE@N or trace:FILE.",
    "backend": "Backends or patterns, such as cutlass*; moebench backends lists them. All but the variants (name@variant) by default.",
    "seed": "Seeds of weights, tokens and routing.",
}


def axis_options(command: click.decorators.FC) -> click.decorators.FC:
    for name, text in reversed(AXIS_HELP.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, metavar="LIST", help=text)(command)
    return command


def build_plan(axes: dict[str, str | None], plan_file: str | None, l2: Literal["cold", "hot"] | None) -> Plan:
    if plan_file is None and not any(axes.values()):
        plan_file = "quick"
    try:
        return build(axes, plan_file, l2, registry.names(), registry.unknown)
    except PlanError as error:
        fail(error.errors, USAGE)
    except registry.RegistryError as error:
        fail([str(error)], USAGE)


def survey_plan(plan: Plan, log: Path | None) -> Survey:
    try:
        return survey_machine(plan.points, plugins(plan.backends), log)
    except SweepError as error:
        fail([str(error)], USAGE)


def plugins(names: list[str] | tuple[str, ...]) -> set[str]:
    return {name for name in names if registry.source(name) != "moebench"}
