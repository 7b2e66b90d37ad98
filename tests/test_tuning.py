"""What tuning takes and what it leaves, on clocks that run on a script."""

import io
import itertools
import json
from contextlib import contextmanager
from dataclasses import asdict

import pytest
from rich.console import Console

from moebench.backend import Regime
from moebench.reports.tuned_choices import tuned_table
from moebench.simulated import Scenario, SimulatedStopwatch
from moebench.tuning import AT_ONCE, outcome_of, tune


class SimulatedBench:
    """Choices whose calls take so long; "wrong" ones never get a clock."""

    def __init__(self, times_us, *, noise=0.003, wrong=(), seed=0):
        self.seeds = itertools.count(10_000 * seed)  # a clock has noise of its own
        self.times_us, self.noise, self.wrong = times_us, noise, wrong
        self.asked, self.timed, self.most = [], set(), 0

    def reject(self, choice, tokens):
        self.asked.append(choice)
        return "wrong at 64 tokens: relative L2 error 0.3" if choice in self.wrong else ""

    @contextmanager
    def ready(self, tokens, choices):
        assert set(choices) <= set(self.asked), "a choice is timed that was not checked"
        self.timed |= set(choices)
        self.most = max(self.most, len(choices))
        yield {choice: self._watch(choice, tokens) for choice in choices}

    def _watch(self, choice, tokens):
        us = self.times_us[choice]
        return SimulatedStopwatch(Scenario(call_us=us[tokens] if isinstance(us, dict) else us, noise=self.noise), seed=next(self.seeds))


def text_of(table):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


REGIME = Regime(name="up to 64 pairs an expert", tokens=(256, 512), choice="now")


def tuned(times_us, *, alternatives=None, **more):
    bench = SimulatedBench(times_us, **more)
    others = [choice for choice in times_us if choice != "now"]
    outcome = tune(REGIME, alternatives or (lambda choice: others), bench)
    assert outcome == outcome_of(json.loads(json.dumps(asdict(outcome))))
    return outcome, bench


def test_the_fastest_choice_is_taken_with_its_gain():
    outcome, _ = tuned({"now": 100.0, "a": 104.0, "b": 90.0, "c": 97.0})
    assert (outcome.before, outcome.after, outcome.tried) == ("now", "b", 3)
    assert outcome.gain.low < 0.9 < outcome.gain.high < 0.91
    assert outcome.gain.by_tokens == pytest.approx({256: 0.9, 512: 0.9}, rel=0.01)
    assert outcome.gain.after_us[256] == pytest.approx(90, rel=0.01)


def test_a_gain_within_the_noise_is_not_taken():
    outcome, _ = tuned({"now": 100.0, "a": 99.9, "b": 99.8}, noise=0.02)
    assert outcome.after == "now"
    assert outcome.reason in ("its interval holds no gain for certain", "it gains less than 0.5 %", "nothing was faster")


def test_a_certain_gain_of_less_than_half_a_percent_is_not_taken():
    outcome, _ = tuned({"now": 100.0, "a": 99.7}, noise=0.0001)
    assert (outcome.after, outcome.candidate, outcome.reason) == ("now", "a", "it gains less than 0.5 %")
    assert outcome.gain.high < 1


def test_equal_choices_are_hardly_ever_taken():
    taken = 0
    for number in range(40):
        bench = SimulatedBench({"now": 100.0, **{f"c{i}": 100.0 for i in range(12)}}, noise=0.01, seed=number)
        taken += tune(REGIME, lambda choice: [f"c{i}" for i in range(12)], bench, seed=number).after != "now"
    assert taken == 0


def test_what_gains_here_and_loses_there_is_not_taken():
    outcome, _ = tuned({"now": 100.0, "a": {256: 80.0, 512: 103.0}})
    assert (outcome.after, outcome.candidate) == ("now", "a")
    assert outcome.reason == "512 tokens would lose more than 1 %"


def test_a_wrong_choice_is_never_timed_however_fast():
    outcome, bench = tuned({"now": 100.0, "cheat": 10.0, "b": 95.0}, wrong=("cheat",))
    assert outcome.after == "b"
    assert outcome.rejected == {"cheat": "wrong at 64 tokens: relative L2 error 0.3"}
    assert "cheat" not in bench.timed


def test_a_choice_that_ended_a_process_is_not_looked_at_again():
    bench = SimulatedBench({"now": 100.0, "crash": 10.0})
    outcome = tune(REGIME, lambda choice: ["crash"], bench, rejected={"crash": "cuda_error: 700"})
    assert (outcome.after, outcome.reason, outcome.rejected) == ("now", "nothing is left to try", {"crash": "cuda_error: 700"})
    assert bench.asked == ["now"]


def test_a_present_choice_that_is_wrong_is_said_and_nothing_is_timed():
    outcome, bench = tuned({"now": 100.0, "a": 90.0}, wrong=("now",))
    assert outcome.reason.startswith("the present choice cannot be timed: wrong at 64 tokens")
    assert not bench.timed


def test_what_was_taken_is_improved_once_more_and_the_gain_is_over_the_first():
    chain = {"now": ["a"], "a": ["now", "b"], "b": ["a", "c"]}
    outcome, _ = tuned({"now": 100.0, "a": 90.0, "b": 81.0, "c": 85.0}, alternatives=chain.__getitem__)
    assert (outcome.after, outcome.tried) == ("b", 3)
    assert outcome.gain.ratio == pytest.approx(0.81, rel=0.01)


def test_few_choices_are_held_ready_at_a_time():
    outcome, bench = tuned({"now": 100.0, **{f"c{i}": 100.0 + i for i in range(1, 30)}, "best": 50.0})
    assert outcome.after == "best"
    assert bench.most == AT_ONCE + 1


def test_a_regime_without_token_counts_is_left_alone():
    outcome = tune(Regime(name="many", tokens=(), choice="now"), lambda choice: ["a"], SimulatedBench({"now": 1.0}))
    assert outcome.reason == "no token count of this case falls into it"


def test_the_table_shows_gain_interval_and_both_choices():
    outcome, _ = tuned({"now": 100.0, "b": 90.0})
    shown = text_of(tuned_table([outcome]))
    assert "b instead of now" in shown
    assert "256: 100" in shown
    assert "10.0 % (" in shown
    stays, _ = tuned({"now": 100.0, "b": 110.0})
    assert "stays now; nothing was faster" in text_of(tuned_table([stays]))
