"""Which backend is said to win where, from records made by hand."""

import pytest

from moebench.reports import answer, grid
from tests.made_runs import rounds, timed

SHARP = {"spread": 0.001}  # 95 % intervals of under 0.1 %


def only_grid(*records):
    ((found,),) = [family.grids() for family in grid.families(records)]
    return found


def sharp(backend, num_tokens, median_us, **more):
    return timed(backend, num_tokens, median_us, how=SHARP, **more)


def outcome(*records):
    return [(part.tokens, part.names, part.lead) for part in answer.stretches(only_grid(*records))]


def test_neighbouring_counts_with_one_winner_are_one_stretch():
    records = [sharp(name, tokens, us) for tokens, a, b in ((1, 10, 15), (2, 20, 22), (4, 40, 30)) for name, us in (("a", a), ("b", b))]
    assert outcome(*records) == [("1 to 2", ("a",), "1.10x to 1.50x"), ("4", ("b",), "1.33x")]


def test_overlapping_intervals_are_a_tie_that_ends_a_stretch():
    wide = [timed(name, 2, us, how={"spread": 0.2}) for name, us in (("a", 20.0), ("b", 20.5))]
    shown = outcome(sharp("a", 1, 10), sharp("b", 1, 15), *wide, sharp("a", 4, 40), sharp("b", 4, 60))
    assert shown == [("1", ("a",), "1.50x"), ("2", ("a", "b"), ""), ("4", ("a",), "1.50x")]


def test_a_lead_is_over_the_fastest_that_does_not_tie():
    records = [timed("a", 1, 10.0, how={"spread": 0.1}), timed("b", 1, 10.1, how={"spread": 0.1}), sharp("c", 1, 20.0), sharp("d", 1, 30.0)]
    (win,) = answer.wins(only_grid(*records))
    assert (win.names, win.runner_up.backend, win.lead) == (("a", "b"), "c", 2.0)


def test_the_sentence_names_every_stretch_and_its_lead():
    times = ((1, 10, 15), (2, 20, 22), (4, 40, 30), (8, 80, 100))
    found = only_grid(*(sharp(name, tokens, us) for tokens, a, b in times for name, us in (("a", a), ("b", b))))
    assert answer.sentence(found) == (
        "At 1 to 2 and 8 tokens a is fastest (1.10x to 1.50x as fast as the next); at 4 tokens b is fastest (1.33x as fast as the next)."
    )


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([sharp("a", 1, 10)], "Only a has a time under this contract, so nothing was compared."),
        (
            [sharp("a", 1, 10), sharp("b", 2, 10)],
            "a and b have no time at a common token count under this contract, so nothing was compared.",
        ),
        ([timed("a", 1, 10.0, how={"comparable": False})], "No backend has a time that describes its kernel."),
        ([timed("a", 1, 10.0), timed("b", 1, 10.01)], "At 1 token a and b tie."),
        (
            [sharp("a", 1, 10), sharp("b", 1, 20), sharp("b", 2, 20)],
            "At 1 token a is fastest (2.00x as fast as the next); at 2 tokens b is alone.",
        ),
    ],
)
def test_what_cannot_be_said_is_not_said(records, told):
    assert answer.sentence(only_grid(*records)) == told


def test_a_time_that_does_not_describe_the_kernel_never_wins():
    records = [timed("fast", 1, 1.0, how={"comparable": False}), sharp("a", 1, 10), sharp("b", 1, 20)]
    assert outcome(*records) == [("1", ("a",), "2.00x")]


def test_rounds_are_one_point_whose_interval_reaches_over_all_of_them():
    medians = (9.5, 10.0, 10.4)
    found = only_grid(*rounds("a", 1, medians, how=SHARP), *rounds("b", 1, (10.3, 10.5, 10.6), how=SHARP))
    (win,) = answer.wins(found)
    assert win.best.slowest_us == 10.0
    low, high = win.best.interval_us
    assert 9.4 < low < 9.5
    assert 10.4 < high < 10.5
    assert win.names == ("a", "b")


def test_from_six_rounds_on_the_interval_is_of_their_medians():
    point = only_grid(*rounds("a", 1, (10.0, 10.2, 10.1, 10.4, 10.3, 10.5))).rows[1]["a"]
    assert (point.slowest_us, point.interval_us) == (10.25, (10.0, 10.5))


def test_two_contracts_are_two_grids_that_say_how_they_differ():
    (family,) = grid.families([sharp("a", 1, 10), timed("b", 1, 5.0, how={"l2": "hot", "spread": 0.001})])
    assert [found.title for found in family.grids()] == ["CUDA graph replay, cold L2", "CUDA graph replay, hot L2"]
    assert [found.backends for found in family.grids()] == [("a",), ("b",)]
