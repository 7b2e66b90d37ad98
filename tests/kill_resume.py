"""Kills the supervisor at random moments, resumes, and checks that nothing was lost and nothing was done twice.

python tests/kill_resume.py --kills 200 DIRECTORY"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from moebench.journal import load_run, problems
from tests.orphans import left_over
from tests.running import ENVIRONMENT

AXES = ("--model", "tiny", "--tokens", "1:16:1", "--backend", "torch", "--repeat-check", "5", "--out", "run")
POINTS = 16


@dataclass
class Tally:
    kills: int = 0
    runs: int = 0
    torn: int = 0  # kills that left a half line
    before_first_record: int = 0


def sweep(directory: Path, mark: str, output, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "moebench", "sweep", *AXES, *options]
    return subprocess.Popen(command, cwd=directory, env={**ENVIRONMENT, "KILL_RESUME": mark}, stdout=output, stderr=subprocess.STDOUT)


def result(directory: Path):
    """What a run found, without what two runs of one plan never share: times, and the doubts that follow from them."""
    assert problems(directory / "run") == []
    records = load_run(directory / "run").records
    assert len({(r.key, r.scope, r.round) for r in records}) == len(records), "a point was done twice"
    neutral = {"timing": None, "time": "", "run_id": "", "prepare_s": None, "phases_s": {}, "canary": None, "telemetry": None}
    neutral |= {"flags": {}, "roofline": None, "launches_compared": 0}  # as many launches as fit into a second
    return sorted((replace(record, **neutral) for record in records), key=lambda record: record.key)


def acknowledged(output: Path) -> set[int]:
    return {int(tokens) for tokens in re.findall(r"^ok .* M=(\d+) ", output.read_text(), re.MULTILINE)}


def kill_once(directory: Path, dice: random.Random, tally: Tally) -> bool:
    """Start or resume, kill at a random moment; whether the run was done before that moment came."""
    mark, output = f"{directory}-{tally.kills}", directory / "output"
    with output.open("a") as file:
        process = sweep(directory, mark, file, "--resume")
    already = len(acknowledged(output))
    if dice.random() < 0.4:  # anywhere: at start, while the machine is looked at, between and within points
        moment = time.monotonic() + dice.uniform(0, 6)
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.002)
    else:  # near an acknowledgement, where a record is on its way to the disk
        more = dice.randint(1, 6)
        while process.poll() is None and len(acknowledged(output)) < already + more:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.3))
    if process.poll() is not None:
        assert process.returncode == 0, output.read_text()[-2000:]
        return True
    process.send_signal(signal.SIGKILL)
    process.wait()
    tally.kills += 1
    deadline = time.monotonic() + 10
    while (orphans := left_over("KILL_RESUME", mark)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not orphans, f"these outlived the supervisor: {orphans}"
    told = acknowledged(output)
    if (directory / "run" / "run.json").exists():
        run = load_run(directory / "run")
        tally.torn += run.torn
        tally.before_first_record += not run.records
        stored = {record.case.num_tokens for record in run.records}
    else:
        stored = set()
        tally.before_first_record += 1
    assert told <= stored, f"acknowledged and lost: {told - stored}"
    return False


def kill_and_resume(base: Path, kills: int, seed: int) -> Tally:
    dice, tally = random.Random(seed), Tally()
    undisturbed = base / "undisturbed"
    undisturbed.mkdir(parents=True)
    with (undisturbed / "output").open("w") as file:
        assert sweep(undisturbed, str(undisturbed), file).wait() == 0, (undisturbed / "output").read_text()
    expected = result(undisturbed)
    assert len(expected) == POINTS
    while tally.kills < kills:
        directory = base / f"run-{tally.runs}"
        directory.mkdir()
        done = False
        while not done and tally.kills < kills:
            done = kill_once(directory, dice, tally)
        if not done:
            with (directory / "output").open("a") as file:
                assert sweep(directory, str(directory), file, "--resume").wait() == 0, (directory / "output").read_text()
        assert result(directory) == expected
        tally.runs += 1
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2)))
    given = parser.parse_args()
    sys.stdout.write(f"seed {given.seed}\n")
    found = kill_and_resume(given.directory, given.kills, given.seed)
    sys.stdout.write(json.dumps(vars(found)) + "\n")
