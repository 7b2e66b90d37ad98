"""Axes become points, and everything wrong with them is said at once."""

import pytest

from moebench.case import MODELS, case
from moebench.plan import Plan, PlanError, build, parse_ints, shipped

BACKENDS = ("torch", "numpy", "triton_mxfp4_bf16")


def plan(file=None, l2=None, **options):
    return build(options, file, {"l2": l2}, BACKENDS, lambda name: f"unknown backend {name!r}")


def errors(file=None, **options):
    with pytest.raises(PlanError) as caught:
        plan(file, **options)
    return caught.value.errors


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("4", [4]),
        ("0:64:16", [0, 16, 32, 48, 64]),
        ("1:8192:x2", [2**i for i in range(14)]),
        ("1:9:x3", [1, 3, 9]),
        ("5:6:10", [5]),
        ("3:10:x2", [3, 6]),
    ],
)
def test_ranges_include_both_ends(text, values):
    assert parse_ints(text, 0, 1 << 20) == values


@pytest.mark.parametrize("text", ["", "a", "1.5", "1e3", "1:2", "1:8:0", "8:1:1", "1:8:x1", "0:8:x2", "1:8:x", "1:2:3:4", "99999999999999"])
def test_what_is_no_range_is_refused_with_a_hint(text):
    with pytest.raises(ValueError, match=r"1:8192:x2|out of range"):
        parse_ints(text, 0, 1 << 20)


def test_a_plan_is_the_product_of_its_axes():
    made = plan(model="gpt-oss-20b,tiny", tokens="1,4", backend="torch,numpy")
    assert len(made.points) == 8
    assert {point.case.model for point in made.points} == {"gpt-oss-20b", "tiny"}
    assert made.backends == ("torch", "numpy")


def test_the_issue_line_prints_six_separate_errors():
    found = errors(model="gpt-oss-20b,gpt-oss-20", tokens="-1,foo", top_k="99", ep="3", backend="tritn")
    assert len(found) == 6
    for value, way_out in [
        ("gpt-oss-20'", "did you mean 'gpt-oss-20b'"),
        ("'-1'", "give 0 to"),
        ("'foo'", "1,4,16"),
        ("99", "give 1 to 32"),
        ("ep 3", "1, 2, 4, 8, 16, 32"),
        ("tritn", "unknown backend"),
    ]:
        assert any(value in error and way_out in error for error in found), (value, found)


def test_every_expert_parallel_rank_is_a_point():
    made = plan(model="tiny", tokens="4", ep="1,4", backend="torch")
    assert [(p.case.ep_size, p.case.ep_rank) for p in made.points] == [(1, 0), (4, 0), (4, 1), (4, 2), (4, 3)]


def test_one_rank_or_the_worst_can_be_chosen():
    one = plan(model="tiny", tokens="4", ep="4", ep_ranks="2", backend="torch")
    assert [p.case.ep_rank for p in one.points] == [2]
    hot = plan(model="tiny", tokens="64", ep="4", ep_ranks="worst", routing="zipf:2", backend="torch")
    assert len(hot.points) == 1
    assert "ranks 0 to 3" in errors(model="tiny", ep="4", ep_ranks="7")[0]
    assert "all, worst" in errors(model="tiny", ep="4", ep_ranks="best")[0]


def test_tensor_parallel_ranks_take_the_largest_shard_unless_told():
    assert [p.case.tp_rank for p in plan(model="gpt-oss-20b", tp="8", backend="torch").points] == [0]
    every = plan(model="gpt-oss-20b", tp="8", tp_ranks="all", backend="torch")
    assert [p.case.local_intermediate_size for p in every.points] == [384] * 7 + [192]


@pytest.mark.parametrize(("tp", "sizes"), [(2, [1440, 1440]), (4, [736, 736, 736, 672])])
def test_shards_are_vllms(tp, sizes):
    assert [case("gpt-oss-20b", 1, tp_size=tp, tp_rank=r).local_intermediate_size for r in range(tp)] == sizes


def test_duplicates_are_dropped_with_a_note():
    made = plan(model="tiny", tokens="4,4,1:4:x2", backend="torch")
    assert [p.case.num_tokens for p in made.points] == [4, 1, 2]


def test_a_routing_that_cannot_be_is_refused_with_its_key():
    (error,) = errors(model="tiny", tokens="4", routing="zpif:1", backend="torch")
    assert error.startswith("--routing zpif:1")
    assert "zipf" in error


def test_a_file_gives_axes_and_options_replace_them(tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text('description = "x"\n[[sweep]]\nmodel = "tiny"\ntokens = [1, "2:8:x2"]\nbackend = "torch"\n[timing]\nl2 = "hot"\n')
    assert [p.case.num_tokens for p in plan(str(file)).points] == [1, 2, 4, 8]
    assert plan(str(file)).l2 == "hot"
    assert [p.case.num_tokens for p in plan(str(file), tokens="7").points] == [7]
    assert plan(str(file), l2="cold").l2 == "cold"


def test_everything_wrong_with_a_file_is_said_at_once(tmp_path):
    file = tmp_path / "plan.toml"
    first = '[[sweep]]\nmodle = "tiny"\ntokens = [1.5]\n'
    second = '[[sweep]]\nmodel = "tiny"\ntokens = "x"\nseed = true\n'
    file.write_text(f'sweeps = 1\n{first}{second}[timing]\nl2 = "warm"\nl3 = 1\n')
    found = errors(str(file))
    for part in (
        "unknown key 'sweeps'; did you mean 'sweep'",
        "sweep[0].modle: unknown axis; did you mean 'model'",
        "sweep[0].tokens = [1.5]",
        "sweep[1].tokens 'x'",
        "sweep[1].seed = True",
        'give "cold" or "hot"',
        "timing.l3",
    ):
        assert any(part in error for error in found), (part, found)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("[[sweep]", "line 1"),
        ("", "at least one"),
        ("sweep = 3", "at least one"),
        ("x = " + "[" * 3000, "plan.toml"),
        ("\udcff", "plan.toml"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(tmp_path, content, part):
    file = tmp_path / "plan.toml"
    file.write_bytes(content.encode(errors="surrogateescape"))
    assert any(part in error for error in errors(str(file)))


def test_a_plan_that_is_not_there_names_the_shipped_ones():
    (error,) = errors("quik")
    assert "did you mean 'quick'" in error
    assert set(shipped()) >= {"quick", "gpt-oss", "ep"}


@pytest.mark.parametrize("name", shipped())
def test_shipped_plans_are_valid(name):
    assert plan(name).points


def test_a_huge_plan_is_refused_and_not_expanded():
    assert any("20000" in error for error in errors(model="tiny", tokens="0:1000000:1", seed="0:1000:1"))


def test_a_plan_survives_its_manifest():
    made = plan(model="tiny", tokens="1,4", ep="2", arch="sm90,cpu", backend="torch", l2="hot")
    again = Plan.from_dict(made.to_dict())
    assert again == made
    assert again.hash == made.hash
    assert plan(model="tiny", tokens="1", backend="torch").hash != made.hash


@pytest.mark.parametrize("model", MODELS)
def test_memory_of_a_point_is_at_least_its_weights(model):
    point = case(model, 1)
    assert point.device_bytes > point.weight_bytes
    if model == "gpt-oss-20b":
        assert point.weight_bytes == pytest.approx(423e6, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_size": 100}, "multiple of 32"),
        ({"ep_size": 3}, "sizes that fit"),
        ({"tp_size": 91}, "without work"),
        ({"ep_size": 2, "ep_rank": 2}, "between 0 and 1"),
        ({"top_k": 0}, "give 1 to 32"),
        ({"num_tokens": -1}, "negative"),
    ],
)
def test_a_case_with_impossible_numbers_cannot_be_made(changes, part):
    with pytest.raises(ValueError, match=part):
        case("gpt-oss-20b", **{"num_tokens": 1, **changes})


def made_of(**timing):
    return build({"tokens": "1,2", "backend": "torch,numpy,triton_mxfp4_bf16"}, None, timing, BACKENDS, str)


def test_each_round_has_every_point_once_and_its_own_order():
    plan = made_of(rounds=12)
    orders = {}
    for number, points in plan.groups():
        assert len({(point.case.layer_key, point.backend) for point in points}) == 1  # a group is one process
        orders.setdefault(number, []).extend(points)
    assert list(orders) == list(range(12))
    assert all(sorted(map(str, points)) == sorted(map(str, plan.points)) for points in orders.values())
    assert len({tuple(point.backend for point in points) for points in orders.values()}) > 1


def test_the_order_is_that_of_its_seed():
    def order(seed):
        return [points[0].backend for _, points in made_of(rounds=6, order_seed=seed).groups()]

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_what_changes_a_time_changes_the_hash():
    plans = [made_of(), made_of(rounds=2), made_of(scope="layer"), made_of(l2="hot"), made_of(order_seed=1)]
    assert len({plan.hash for plan in plans}) == len(plans)
    assert all(Plan.from_dict(plan.to_dict()).hash == plan.hash for plan in plans)


def test_a_file_says_how_to_time_and_the_command_line_wins(tmp_path):
    file = tmp_path / "p.toml"
    file.write_text('[[sweep]]\ntokens = 1\n[timing]\nscope = "layer"\nrounds = 3\nl2 = "hot"\norder_seed = 7\n')
    found = build({}, str(file), {"rounds": 5, "l2": None}, BACKENDS, str)
    assert (found.scope, found.rounds, found.l2, found.order_seed) == ("layer", 5, "hot", 7)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("rounds = 0", "timing.rounds = 0: give a whole number, 1 to 1000"),
        ("rounds = true", "timing.rounds = True: give a whole number"),
        ('scope = "server"', 'timing.scope = \'server\': give "experts" or "layer"'),
        ("order_seed = -1", "timing.order_seed = -1: give a whole number"),
        ("round = 3", "timing.round: unknown key; did you mean 'rounds'?"),
    ],
)
def test_a_wrong_timing_is_refused_in_words(tmp_path, line, sentence):
    file = tmp_path / "p.toml"
    file.write_text(f"[[sweep]]\ntokens = 1\n[timing]\n{line}\n")
    (error,) = errors(str(file))
    assert error.startswith(sentence)
