"""The table of triton_mxfp4_bf16: what is shipped, what a file may hold, what tuning may write."""

from dataclasses import replace
from math import inf

import pytest

from moebench.case import case
from moebench.kernels.triton_mxfp4_bf16 import BACKENDS
from moebench.kernels.triton_mxfp4_bf16_details import configs
from moebench.kernels.triton_mxfp4_bf16_details.configs import (
    SHIPPED,
    TILES,
    TableError,
    Tile,
    from_label,
    neighbours,
    parse,
    read,
    shipped,
)

(BACKEND,) = BACKENDS


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_the_shipped_table_is_what_writing_it_again_gives():
    assert configs.written(read(SHIPPED)) == SHIPPED.read_text()


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "sm120", "sm999"])
def test_every_architecture_has_a_table_for_any_number_of_pairs(arch):
    assert shipped(arch)[-1].up_to == inf
    assert [config.tokens for config in shipped(arch)] == sorted(config.tokens for config in shipped(arch))


def test_a_label_says_all_that_is_tuned():
    for config in {c for table in read(SHIPPED).values() for c in table}:
        every = [config, *neighbours(config)]
        assert all(replace(from_label(one.label), up_to=one.up_to) == one for one in every)
        assert len({one.label for one in every}) == len(set(every))


@pytest.mark.parametrize(
    "label", ["", "128 tokens", "128 tokens; both GEMMs 128 x 128", "x tokens; both GEMMs 64 x 128, 4 warps, 3 stages"]
)
def test_what_is_no_label_is_refused(label):
    with pytest.raises(TableError, match="no label"):
        from_label(label)


def test_regimes_are_judged_by_counts_that_fall_into_them():
    regimes = BACKEND.regimes(case("gpt-oss-20b", 1), "sm90")
    assert {regime.name: regime.tokens for regime in regimes} == {
        "up to 12 pairs an expert": (1, 8, 64),
        "up to 24 pairs an expert": (128,),
        "up to 64 pairs an expert": (256, 512),
        "up to 256 pairs an expert": (1024, 2048),
        "any number of pairs": (4096, 8192, 16384),
    }
    for regime, config in zip(regimes, shipped("sm90"), strict=True):
        assert all(configs.choose(shipped("sm90"), 4 * count, 32) == config for count in regime.tokens)


def test_two_blocks_a_multiprocessor_are_among_what_is_tried_for_large_batches():
    tried = BACKEND.alternatives(shipped("sm90")[-1].label, "sm90")
    assert "128 tokens; both GEMMs 128 x 128, 4 warps, 3 stages, bands of 8" in tried
    assert shipped("sm90")[-1].label not in tried
    assert len(tried) == len(set(tried)) > 2 * len(TILES[128])


def test_a_tuned_table_of_this_architecture_is_used_and_others_are_as_shipped(home):
    choice = BACKEND.alternatives(shipped("sm90")[-1].label, "sm90")[0]
    path = home / "moebench" / "tuned" / "triton_mxfp4_bf16.toml"
    path.parent.mkdir(parents=True)
    path.write_text(BACKEND.table("", "sm90", {"any number of pairs": choice}))
    found = configs.configs_for("sm90")
    assert (found.source, found.configs[-1].label) == (str(path), choice)
    assert found.configs[:-1] == shipped("sm90")[:-1]
    assert configs.configs_for("sm100").source == "shipped"


def test_writing_the_shipped_table_keeps_what_other_architectures_have():
    choice = BACKEND.alternatives(shipped("sm90")[3].label, "sm90")[0]
    tables = parse(BACKEND.table(SHIPPED.read_text(), "sm90", {"up to 256 pairs an expert": choice}), "new")
    assert tables["any"] == read(SHIPPED)["any"]
    assert (tables["sm90"][3].label, tables["sm90"][3].up_to) == (choice, 256)


def test_a_regime_that_the_table_lacks_is_refused():
    with pytest.raises(TableError, match="no regime 'up to 7 pairs an expert'"):
        BACKEND.table("", "sm90", {"up to 7 pairs an expert": shipped("sm90")[0].label})


GOOD = "[[sm90]]\nup_to = inf\ntokens = 64\ngate_up = { blocks = 1, warps = 4, stages = 2 }\ndown = { blocks = 1, warps = 4, stages = 2 }\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[[sm90", "mend it, or remove the file"),
        ("sm90 = 3", "is no list"),
        (GOOD.replace("inf", "64"), "end with inf"),
        (GOOD + GOOD, "must grow"),
        (GOOD.replace("inf", "nan"), "not a finite number|must grow"),
        (GOOD.replace("tokens = 64", "tokens = 'many'"), "tokens is 'many', not int"),
        (GOOD.replace("tokens = 64", "tokens = 0"), "a number below 1"),
        (GOOD.replace("tokens = 64\n", ""), "tokens is missing or unknown"),
        (GOOD.replace("stages = 2 }", "stages = 2, wraps = 3 }"), "wraps is missing or unknown"),
    ],
)
def test_a_bad_table_is_refused_with_the_file_and_the_place(text, told, tmp_path):
    assert parse(GOOD, "x")["sm90"][0].down == Tile(blocks=1, warps=4, stages=2)
    path = tmp_path / "table.toml"
    path.write_text(text)
    with pytest.raises(TableError, match=told) as caught:
        read(path)
    assert str(path) in str(caught.value)
