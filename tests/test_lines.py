"""What is read in one pass is exactly what is read field by field, and nothing that the latter refuses."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moebench.conform import misfit
from moebench.journal import _is_sound, _parse_slowly
from moebench.lines import reader
from moebench.record import Record, to_json
from tests import rounds
from tests.bench_compare import KERNELS
from tests.full_records import whole_run
from tests.test_journal import GOLDEN, RECORD

EXAMPLE = Path(__file__).parents[1] / "docs" / "example" / "journal.jsonl"
ROWS = [RECORD, *rounds.rows(1, 1, lambda cell, number: 50.0, samples=9), *whole_run()[-4:]]
MANY = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no defect

leaves = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.integers(10**18, 10**25), st.floats(), st.text(max_size=4)),
    st.sampled_from(["1.0", "1.1", "1.2", "2.0", "ok", "cold", "interval", "layer"]),
)
anything = st.recursive(leaves, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=3), one, max_size=3), max_leaves=5)


WITH_KERNELS = replace(ROWS[1], facts={}, kernels=KERNELS)
ROWS.append(WITH_KERNELS)
EXPERIENCED = reader()  # has seen texts that it need not look through again
EXPERIENCED(to_json(WITH_KERNELS).encode())


def in_one_pass(body):
    record = reader()(body)
    assert EXPERIENCED(body) == record
    return record if record is not None and _is_sound(record, plain=False) else None


def slowly(body):
    try:
        return _parse_slowly(body, plain=False)
    except ValueError as error:
        return str(error)


def agree(body):
    quick = in_one_pass(body)
    if quick is not None:
        known = slowly(body)
        assert isinstance(known, Record), known
        assert in_floats(quick) == in_floats(known)
        assert misfit(quick, Record, "it") == ""
    return quick


def in_floats(record):
    """Field by field an integer stays one where a float belongs, and 2 ** 53 + 1 is no float."""
    return json.loads(to_json(record), parse_int=float)


def places(value, path=()):
    """The path of everything in a document."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from places(child, (*path, name))


def changed(document, path, change):
    if not path:
        return change(document)
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = changed(copy[path[0]], path[1:], change)
    return copy


@MANY
@given(st.data())
def test_a_row_with_anything_anywhere_is_the_same_record_or_left_to_the_slow_way(data):
    row = json.loads(to_json(data.draw(st.sampled_from(ROWS))))
    path = data.draw(st.sampled_from(sorted(places(row), key=str)))
    new = data.draw(anything)
    how = data.draw(st.sampled_from(["replace", "add", "remove"]))

    def change(old):
        if how == "add" and isinstance(old, dict):
            return {**old, "surprise": new}
        if how == "remove" and isinstance(old, dict) and old:
            return {name: value for name, value in old.items() if name != data.draw(st.sampled_from(sorted(old)))}
        return new

    agree(json.dumps(changed(row, path, change)).encode())


@MANY
@given(st.sampled_from(ROWS), st.integers(0, 1 << 20), st.binary(max_size=3), st.integers(0, 3))
def test_a_row_with_any_bytes_anywhere_is_the_same_record_or_left_to_the_slow_way(row, place, new, old):
    body = to_json(row).encode()
    place %= len(body)
    body = body[:place] + new + body[place + old :]
    if body.isascii():  # the others are never read in one pass
        agree(body)


@MANY
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
@example([5e-324, 2.2250738585072011e-308, 1.7976931348623157e308, -0.0, 9007199254740993.0, 1e23, 0.1])
def test_every_sample_is_read_to_the_last_bit(samples):
    body = to_json(ROWS[1]).replace(json.dumps(list(ROWS[1].timing.samples_us), separators=(",", ":")), json.dumps(samples))
    read = agree(body.encode())
    assert [one.hex() for one in read.timing.samples_us] == [one.hex() for one in samples]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"status":"ok"', '"status":"fine"'),
        ('"round":0', '"round":0.0'),
        ('"round":0', '"round":false'),
        ('"round":0', '"round":00'),
        ('"prepare_s":0.5', '"prepare_s":NaN'),
        ('"prepare_s":0.5', '"prepare_s":1e999'),
        ('"prepare_s":0.5', '"prepare_s":true'),
        ('"facts":{}', '"facts":{"a":true}'),
        ('"facts":{}', '"facts":{"a":null}'),
        ('"facts":{}', '"facts":{"a":1e999}'),
        ('"facts":{}', '"facts":{},"fact":{}'),
        ('"reason":""', '"reason":"\x01"'),
        ('"window_s":null', '"window_s":[1.0]'),
        ('"l2":"cold"', '"l2":"tepid"'),
        ("[1.0,2.0,4.0]", "[]"),
        ("[1.0,2.0,4.0]", '["1.0"]'),
        ('"top_k":4', '"top_k":9'),  # of 8 experts
        ('"num_experts":8', '"num_experts":99999'),
        (',"schema":"1.2"', ""),
        ('"schema":"1.2"', '"schema":"2.0"'),
        ('"schema":"1.2"', '"schema":"1.999"'),
    ],
)
def test_what_is_not_certain_is_not_read_in_one_pass(old, new):
    body = to_json(RECORD)
    assert body.count(old) == 1
    assert in_one_pass(body.encode()) == RECORD
    assert in_one_pass(body.replace(old, new).encode()) is None


NAMED = f'"kernels":{json.dumps([asdict(kernel) for kernel in KERNELS], separators=(",", ":"))}'


@pytest.mark.parametrize(
    ("old", "new", "kernels"),
    [
        (NAMED, NAMED, KERNELS),
        (NAMED, NAMED.replace("cutlass", "CUTLASS", 1), "others"),
        (NAMED, f'{NAMED},"kernels":[]', ()),
        (NAMED, f'"kernels":[],{NAMED}', KERNELS),
        (NAMED, f'{NAMED},"k\\u0065rnels":[]', ()),
        (NAMED, f"{NAMED}0", None),
        (NAMED, f"{NAMED}[]", None),
        (NAMED, NAMED[:-1], None),
        (f'"facts":{{}},{NAMED}', f'"facts":{{"x":{{}},{NAMED}}}', None),
        (f'"facts":{{}},{NAMED}', f'"facts":{{"x":1,{NAMED}}}', None),
        (f'"facts":{{}},{NAMED}', f'{NAMED},"facts":{{}}', KERNELS),
        ('"reason":""', '"reason":"\u00e4"', None),
    ],
)
def test_kernels_that_were_seen_before_are_those_of_the_line(old, new, kernels):
    body = to_json(WITH_KERNELS)
    assert body.count(old) == 1
    body = body.replace(old, new).encode()
    read = in_one_pass(body)
    assert (read and read.kernels) == (read.kernels if kernels == "others" else kernels)
    if read is not None:
        assert in_floats(read) == in_floats(slowly(body))


def test_every_line_that_a_sweep_wrote_is_read_in_one_pass():
    journals = [EXAMPLE, *GOLDEN.glob("*/journal.jsonl")]
    lines = [line for journal in journals for line in journal.read_bytes().splitlines()]
    assert len(lines) > 100
    for line in lines:
        assert agree(line if line.startswith(b"{") else line[9:]) is not None


def test_a_number_without_a_point_is_a_float_where_a_float_belongs():
    read = agree(to_json(RECORD).replace('"prepare_s":0.5', '"prepare_s":2').encode())
    assert type(read.prepare_s) is float
    assert read.prepare_s == 2


def test_a_record_is_the_same_to_everything_that_looks_into_it():
    read = in_one_pass(to_json(ROWS[1]).encode())
    assert (read, hash(read.case), repr(read), asdict(read)) == (ROWS[1], hash(ROWS[1].case), repr(ROWS[1]), asdict(ROWS[1]))


def test_a_journal_without_anything_in_common_is_read_as_well(monkeypatch):
    monkeypatch.setattr("moebench.lines.MOST_SEEN", 2)  # it is kept from growing without bound
    read = reader()
    for number in (0, 1, 2, 3, 0, 3):
        body = to_json(RECORD).replace('"max_abs":0.1', f'"max_abs":{number}.5').encode()
        assert read(body).error.max_abs == number + 0.5
    assert read(to_json(RECORD).encode()) == RECORD
