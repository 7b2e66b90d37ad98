"""`moebench tune` as a user runs it, with a backend whose choices move the clock, err and die."""

import json

import pytest
import torch

from moebench import tune as tune_process
from moebench.case import case
from moebench.device import Device
from moebench.tuned import tuned_path
from tests.running import FOUND_FIRST, moebench

ACME = '''
import json, os, time
from pathlib import Path

from moebench.backend import Regime

NOW_NS = [0]  # moves by calls alone, whatever else this machine does
SHIPPED = Path(__file__).with_name("acme.toml")


class Acme:
    """Its table holds a choice for each regime, a line each; a choice is the milliseconds that a call takes, or a fault."""

    name, act_dtype, table_path = "acme", "bf16", SHIPPED

    def unsupported(self, case, device):
        return None

    def prepare(self, layer, max_num_tokens):
        raise AssertionError("tuning prepares choices")

    def regimes(self, case, arch):
        return [Regime(name="few", tokens=(1, 4), choice="12 ms"), Regime(name="many", tokens=(32,), choice="8 ms")]

    def alternatives(self, choice, arch):
        return ["dies", "wrong", "raises", "12 ms", "4 ms"]

    def prepare_choices(self, layer, max_num_tokens):
        from moebench.reference.torch_experts import experts

        known = {}
        time.perf_counter_ns = lambda: NOW_NS[0]

        def choose(choice):
            def call(tokens):
                if choice == "dies":
                    os._exit(7)
                if choice == "raises":
                    raise ValueError("no room for 9 stages")
                key = len(tokens.topk_ids), float(tokens.hidden_states.float().sum())
                known.setdefault(key, experts(layer, tokens, "bf16").bfloat16())
                NOW_NS[0] += 1_000_000 * (1 if choice == "wrong" else int(choice.split()[0]))
                return known[key] * 2 if choice == "wrong" else known[key].clone()

            return call

        return choose

    def table(self, text, arch, chosen):
        return text + "".join(f"{arch} {regime}: {choice}\\n" for regime, choice in chosen.items())


backend = Acme()
'''


@pytest.fixture
def acme(tmp_path):
    """The environment in which a backend of another distribution is installed, whose table is outside of any checkout."""
    site = tmp_path / "site"
    info = site / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme.py").write_text(ACME)
    (site / "acme.toml").write_text("# shipped\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moebench.backends]\nacme = acme:backend\n")
    return {"PYTHONPATH": ":".join([*FOUND_FIRST, str(site)]), "XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "200"}


@pytest.fixture
def tuned(acme, tmp_path):
    done = moebench("tune", "acme", "--model", "tiny", "--json", cwd=tmp_path, check=0, **acme)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_the_fastest_right_choice_is_written_where_the_backend_looks_and_what_is_wrong_or_dies_is_not(tuned, tmp_path):
    document, shown = tuned
    few, many = document["regimes"]
    assert [(r["before"], r["after"]) for r in (few, many)] == [("12 ms", "4 ms"), ("8 ms", "4 ms")]
    assert few["gain"]["ratio"] == pytest.approx(1 / 3)
    assert many["gain"]["before_us"] == {"32": 8000.0}
    assert "relative L2 error" in few["rejected"]["wrong"]
    assert "no room for 9 stages" in few["rejected"]["raises"]
    assert "dies" in few["rejected"]
    table = tmp_path / "cache" / "moebench" / "tuned" / "acme.toml"
    assert document["written"] == str(table)
    assert table.read_text().split("\n")[:2] == ["cpu few: 4 ms", "cpu many: 4 ms"]
    assert (tmp_path / "site" / "acme.toml").read_text() == "# shipped\n"
    assert "4 ms instead of 12 ms" in shown


def test_only_the_asked_token_counts_are_timed_and_the_table_goes_where_it_is_told(acme, tmp_path):
    done = moebench("tune", "acme", "--model", "tiny", "--tokens", "32", "--out", "t/mine.toml", "--json", cwd=tmp_path, check=0, **acme)
    document = json.loads(done.stdout.splitlines()[-1])
    assert [(r["regime"], r["tokens"]) for r in document["regimes"]] == [("many", [32])]
    assert (tmp_path / "t" / "mine.toml").read_text() == "cpu many: 4 ms\n"
    assert not (tmp_path / "cache" / "moebench" / "tuned").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("acme", "--tokens", "7"), "no regime is judged by 7 tokens; give of 1, 4, 32"),
        (("acme", "--tokens", "many"), "'many' is no list of whole numbers"),
        (("acme", "--write"), "--write is for a checkout"),
        (("acme", "--write", "--out", "x"), "give one of them"),
        (("acne",), "did you mean 'acme'?"),
        (("torch",), "torch has no table to tune; these have: triton_mxfp4_bf16"),
    ],
)
def test_what_cannot_be_tuned_is_said_before_anything_runs(arguments, told, acme, tmp_path):
    done = moebench("tune", *arguments, "--model", "tiny", cwd=tmp_path, check=2, **acme)
    assert told in done.stderr


def test_with_write_the_shipped_table_of_a_checkout_is_rewritten(acme, tmp_path):
    (tmp_path / ".git").mkdir()
    moebench("tune", "acme", "--model", "tiny", "--tokens", "32", "--write", cwd=tmp_path, check=0, **acme)
    assert (tmp_path / "site" / "acme.toml").read_text() == "# shipped\ncpu many: 4 ms\n"


def test_a_table_that_cannot_be_written_is_a_storage_error(acme, tmp_path):
    (tmp_path / "file").write_text("")
    done = moebench("tune", "acme", "--model", "tiny", "--tokens", "32", "--out", "file/t.toml", cwd=tmp_path, check=5, **acme)
    assert "cannot be written" in done.stderr


def test_our_triton_kernels_are_not_tuned_in_their_interpreter(tmp_path):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which they would be tuned")
    done = moebench("tune", "triton_mxfp4_bf16", "--model", "tiny", "--tokens", "1", cwd=tmp_path, check=2, XDG_CACHE_HOME=str(tmp_path))
    assert "its times say nothing" in done.stderr


def test_a_users_table_has_a_place_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned_path("acme") == tmp_path / "moebench" / "tuned" / "acme.toml"


class Recorded:
    """A backend that keeps where its weights are and what it was asked to launch."""

    name, act_dtype = "recorded", "bf16"

    def __init__(self):
        self.weights, self.launched = [], []

    def prepare_choices(self, layer, max_num_tokens):
        self.weights.append(layer.w13.codes)  # kept, so that no other copy gets its address
        which = len(self.weights) - 1
        return lambda choice: lambda batch: self.launched.append((which, choice, batch.num_tokens))


def bench_on_a_gpu(monkeypatch, free_bytes):
    """A bench whose device says that it is a GPU; its clock launches every call once."""
    made = []

    def stopwatch(calls, l2, flush_bytes):
        made.append((len(calls), l2, flush_bytes))
        for call in calls:
            call()

    monkeypatch.setattr(tune_process, "CudaStopwatch", stopwatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_bytes, 1 << 34))
    device = Device(arch="sm90", name="gpu", torch="cpu", memory_bytes=1 << 34, l2_bytes=1 << 20)
    backend, said = Recorded(), []
    bench = tune_process.DeviceBench(backend, case("tiny", 1), device, 64, lambda phase, choice: said.append((phase, choice)))
    return bench, backend, made, said


def test_on_a_gpu_each_choice_is_launched_on_every_weight_copy_in_turn(monkeypatch):
    bench, backend, made, said = bench_on_a_gpu(monkeypatch, 1 << 33)
    with bench.ready(64, ["a", "b"]) as watches:
        assert list(watches) == ["a", "b"]
    assert not watches
    copies = len(backend.weights)
    assert copies > 4  # 1 MB of weights, 5 times an L2 of 1 MB
    assert len({weights.data_ptr() for weights in backend.weights}) == copies
    assert made == [(copies, "cold", 0)] * 2
    assert backend.launched == [(which, choice, 64) for choice in "ab" for which in range(copies)]
    assert said[-3:] == [("time", "a"), ("time", "b"), ("time", "")]


def test_without_memory_for_copies_the_l2_is_flushed_by_reading(monkeypatch):
    bench, backend, made, _ = bench_on_a_gpu(monkeypatch, 0)
    with bench.ready(64, ["a"]):
        assert made == [(1, "cold", 256 << 20)]
    assert len(backend.weights) == 1
