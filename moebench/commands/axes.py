"""The axes of a plan as options, and a plan and a survey from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from moebench import registry
from moebench.commands.outcome import USAGE, fail
from moebench.plan import MAX_ROUNDS, TIMING, Plan, PlanError, build
from moebench.record import SCOPES
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


def timing_options(command: click.decorators.FC) -> click.decorators.FC:
    options = (
        click.option("--scope", type=click.Choice(SCOPES), help="From ids and weights, or from router logits.  [default: experts]"),
        click.option("--l2", type=click.Choice(["cold", "hot"]), help="State of the L2 cache before each call.  [default: cold]"),
        click.option(
            "--rounds",
            type=click.IntRange(1, MAX_ROUNDS),
            metavar="N",
            help="Measure everything this often, in fresh processes.  [default: 1]",
        ),
        click.option(
            "--order-seed", type=click.IntRange(0, (1 << 31) - 1), metavar="N", help="Of the order of the backends.  [default: 0]"
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def build_plan(options: Mapping[str, str | int | None], plan_file: str | None) -> Plan:
    """options: by the names of axes and of TIMING, as axis_options and timing_options give them."""
    axes = {name: value for name, value in options.items() if name not in TIMING}
    timing = {name: value for name, value in options.items() if name in TIMING}
    if plan_file is None and not any(axes.values()):
        plan_file = "quick"
    try:
        return build(axes, plan_file, timing, registry.names(), registry.unknown)  # type: ignore[arg-type]  # axes are texts
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
