"""`moebench profile`: children, tools and recordings, honest about what each could show."""

import json
import os
import shlex
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from rich.console import Console

from moebench import profile as profiling
from moebench.case import case
from moebench.commands.profile import profile as command_line
from moebench.profile import Request, capture, command, load, ncu_counters, perfetto, read_nsys, run_tool, view
from moebench.reports import breakdown as report
from moebench.timeline import Event, Profile, ProfileError, diff, to_json
from tests.nsys_export import GRAPH_LAUNCH, OTHER_PROCESS, OURS, Export, recording
from tests.profiles import CASE, H200, LAUNCHES, MADE_UP, call, profile
from tests.running import FAULTS, ROOT

TINY = case("tiny", 8)


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path_factory, monkeypatch):
    """Roofs of the data sheet, whatever this machine has measured; the faults where children find them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(FAULTS)]))
    monkeypatch.syspath_prepend(str(FAULTS))


def shown(renderable, width=80):
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def run(*arguments, check=0):
    done = CliRunner().invoke(command_line, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == check, (done.exit_code, done.output)
    return done


def tool(directory, name, script):
    """An executable of that name, first on the PATH."""
    path = directory / name
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(0o755)
    return path


# The child


def profiled(backend, log, point=TINY, calls=2):
    return list(capture(Request(case=point, backend=backend, calls=calls), log))


def test_a_child_profiles_a_case_and_says_what_it_is_doing(tmp_path):
    *phases, found = profiled("torch", tmp_path / "log")
    assert phases == ["import", "alloc", "jit", "check", "warm up", "profile"]
    assert isinstance(found, Profile)
    assert (found.case, found.backend, found.act_dtype) == (TINY, "torch", "bf16")
    assert found.routing is not None
    assert len(found.calls) == len(found.untraced_us) == 2
    assert {"gemm1", "gemm2", "activation", "route"} <= view(found).breakdown.phases_us.keys()


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        ("fault_skips", "quantum"),
        ("fault_zeros", "its output is wrong, at relative L2"),
        ("fault_prepare", "in phase jit: [A-Z][A-Za-z]+Error: "),
        ("fault_dies", "died of SIGKILL"),
        ("nobody", "unknown backend 'nobody'"),
    ],
)
def test_a_backend_that_cannot_be_profiled_is_told_why(tmp_path, backend, told):
    with pytest.raises(ProfileError, match=told):
        profiled(backend, tmp_path / "log")


def test_a_silent_child_is_stopped_at_its_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "DEADLINES_S", {**profiling.DEADLINES_S, "import": 0.05})
    with pytest.raises(ProfileError, match=r"in phase import: the worker gave no sign of life for 0.05 s and was stopped; it was"):
        profiled("torch", tmp_path / "log")


def test_zero_tokens_are_profiled(tmp_path):
    *_, found = profiled("numpy", tmp_path / "log", case("tiny", 0))
    assert isinstance(found, Profile)
    assert len(found.calls) == 2
    on_a_gpu = replace(profile(calls=0), calls=((), ()))
    assert "no kernels: there is nothing to break down" in shown(report.table(view(on_a_gpu), 80))
    assert ElementTree.fromstring(report.figure([view(on_a_gpu)])).tag.endswith("svg")


# Tools


def test_nsys_is_told_to_see_inside_graphs_and_to_change_nothing():
    line = command("nsys", Request(case=CASE, backend="torch", calls=10, tool="nsys"), ROOT / "out")
    assert line[:2] == ["nsys", "profile"]
    for option in (
        "--trace=cuda,nvtx",
        "--cuda-graph-trace=node",
        "--cuda-event-trace=false",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
        "--export=sqlite",
    ):
        assert option in line
    assert line[-5:-1] == [sys.executable, "-m", "moebench.capture", "-"]
    assert json.loads(line[-1]) == {"case": json.loads(to_json(profile(calls=0)))["case"], "backend": "torch", "calls": 10, "tool": "nsys"}


def test_ncu_is_told_to_leave_the_clocks_alone_and_to_look_at_calls_only():
    line = command("ncu", Request(case=CASE, backend="torch", calls=1, tool="ncu"), ROOT / "out")
    for option, value in (
        ("--clock-control", "none"),
        ("--nvtx-include", "moebench@call/"),
        ("--graph-profiling", "node"),
        ("--profile-from-start", "off"),
        ("--target-processes", "all"),
    ):
        assert line[line.index(option) + 1] == value
    assert "--nvtx" in line


def test_a_printed_command_is_what_would_run(tmp_path):
    arguments = ("--model", "tiny", "--tokens", "8", "--backend", "torch", "--out", tmp_path)
    printed = run(*arguments, "--tool", "nsys", "--print-command").output
    assert shlex.split(printed) == command("nsys", Request(case=TINY, backend="torch", calls=10, tool="nsys"), tmp_path / "torch")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tool_is_named_and_torch_takes_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run("--model", "tiny", "--tokens", "8", "--backend", "torch", "--tool", "nsys", "--calls", "1", "--out", tmp_path / "out")
    assert "nsys is not on the PATH; profiled with torch's own profiler instead" in done.stderr
    assert "torch  tiny M=8" in done.stdout


def test_locked_counters_are_named_and_torch_takes_its_place(tmp_path, monkeypatch):
    tool(tmp_path, "ncu", "print('==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'); raise SystemExit(1)")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = run("--model", "tiny", "--tokens", "8", "--backend", "torch", "--tool", "ncu", "--out", tmp_path / "out")
    assert "counters here (ERR_NVGPUCTRPERM)" in done.stderr
    assert "torch  tiny M=8" in done.stdout


RUN_THE_CHILD = """import subprocess, sys
raise SystemExit(subprocess.call(sys.argv[sys.argv.index(sys.executable) :]))"""
COPY_TO_OUTPUT = """import shutil, sys
shutil.copy({made!r}, next(word[9:] for word in sys.argv if word.startswith("--output=")) + ".sqlite")"""


def test_what_ncu_recorded_is_shown(tmp_path, monkeypatch):
    script = """import pathlib, sys
if "--import" in sys.argv:
    print({counted!r})
else:
    pathlib.Path(sys.argv[sys.argv.index("--export") + 1] + ".ncu-rep").touch()"""
    tool(tmp_path, "ncu", script.format(counted=NCU))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = run("--model", "tiny", "--tokens", "8", "--backend", "torch", "--tool", "ncu", "--out", tmp_path / "out", "--json")
    rows = json.loads(done.stdout)["counters"]["torch"]
    assert [(row["phase"], row["us"]) for row in rows] == [("gemm1+activation", 96.5), ("gemm2", 59.0)]
    assert "each kernel alone, by ncu" in done.stderr
    assert f"ncu-ui {tmp_path}/out/torch.ncu-rep" in done.stderr


def test_what_the_child_refuses_under_a_tool_is_the_reason(tmp_path, monkeypatch):
    tool(tmp_path, "nsys", RUN_THE_CHILD)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ProfileError, match="numpy does not run on a GPU here"):
        run_tool("nsys", Request(case=TINY, backend="numpy", calls=1, tool="nsys"), tmp_path / "out")


def test_a_tool_that_fails_is_quoted(tmp_path, monkeypatch):
    tool(tmp_path, "nsys", "print('unrecognised option'); raise SystemExit(1)")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ProfileError, match=r"ended with exit code 1 and left no out.sqlite: unrecognised option; see .*out.log"):
        run_tool("nsys", Request(case=TINY, backend="torch", calls=1, tool="nsys"), tmp_path / "out")


def test_what_nsys_recorded_is_shown(tmp_path, monkeypatch):
    made = recording(tmp_path / "made.sqlite", CASE, "triton_mxfp4_bf16", profile(calls=3).calls, graph=True)
    tool(tmp_path, "nsys", COPY_TO_OUTPUT.format(made=str(made)))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = run("--model", "gpt-oss-20b", "--tokens", "64", "--backend", "triton_mxfp4_bf16", "--tool", "nsys", "--out", tmp_path / "out")
    assert "3 calls as a CUDA graph, L2 cold, traced by nsys" in done.stdout
    assert f"nsys-ui {tmp_path}/out/triton_mxfp4_bf16.nsys-rep" in done.stderr


NCU = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","gpu__dram_throughput.avg.PEAK","sm__throughput.avg.PEAK"
"","","ns","%","%"
"0","gate_up_kernel","96,500","71.5","22.25"
"1","down_kernel","59000","n/a","20"
""".replace("PEAK", "pct_of_peak_sustained_elapsed")


def test_what_ncu_counted_gets_phases():
    first, second = ncu_counters(NCU)
    assert (first.phase, first.us, first.dram_share, first.sm_share) == ("gemm1+activation", 96.5, 0.715, 0.2225)
    assert (second.phase, second.dram_share) == ("gemm2", None)
    table = shown(report.counters([first, second]))
    assert "71.5 %" in table


@pytest.mark.parametrize("text", ["", "nothing", '"ID","Name"\n', NCU.replace("96,500", "fast")])
def test_a_table_of_ncu_that_is_not_understood_is_an_error(text):
    with pytest.raises(ProfileError, match="ncu's table"):
        ncu_counters(text)


# Exports of nsys


@pytest.mark.parametrize(("graph", "known_launch"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("backend", LAUNCHES)
def test_an_export_gives_the_calls_back(tmp_path, backend, graph, known_launch):
    calls = profile(backend, calls=3).calls
    (found,) = read_nsys(recording(tmp_path / "x.sqlite", CASE, backend, calls, graph, known_launch))
    assert found.calls == calls
    assert (found.case, found.backend, found.source) == (CASE, backend, "nsys")
    assert (found.act_dtype, found.launch) == ("bf16", "cuda_graph" if graph else "eager")
    assert (found.device.name, found.device.arch, found.device.num_sms) == ("NVIDIA H200", "sm90", 132)
    assert found.routing == profile(backend).routing
    assert view(found).floors.keys() == view(profile(backend)).floors.keys() != set()


def sweep(path, backends, registered):
    with Export(path) as export:
        export.domain("moebench", OURS)
        for number, backend in enumerate(backends):
            begin = number * 10**9
            export.range(f"case|{backend}|{CASE.key}", begin, begin + 9 * 10**8, registered=registered)
            warm = export.launch(begin + 5 * 10**5, name=GRAPH_LAUNCH)  # still running when the region that counts begins
            export.range("timed", begin + 10**6, begin + 8 * 10**8, registered=registered)
            for event in call(LAUNCHES[backend], begin + 9 * 10**5):
                export.activity(event, warm, node=1)
            replayed = export.launch(begin + 2 * 10**6, name=GRAPH_LAUNCH)
            for again in range(4):
                for event in call(LAUNCHES[backend], begin + 3 * 10**6 + again * 10**6):
                    export.activity(event, replayed, node=1)
    return path


@pytest.mark.parametrize("registered", [True, False])
def test_an_export_of_a_sweep_has_each_case_with_its_calls(tmp_path, registered):
    found = read_nsys(sweep(tmp_path / "x.sqlite", list(LAUNCHES), registered))
    assert [one.backend for one in found] == list(LAUNCHES)
    assert [len(one.calls) for one in found] == [4] * 4
    assert {len(events) for events in found[2].calls} == {12}
    assert "sequence of kernel names" in found[0].notes[0]


def test_copies_and_fills_are_events_too(tmp_path):
    calls = [call([("Memcpy DtoD", 1000), ("gate_up_kernel", 5000), ("Memset", 500)])]
    (found,) = read_nsys(recording(tmp_path / "x.sqlite", CASE, "triton_mxfp4_bf16", calls))
    assert found.calls == tuple(calls)


def test_another_process_with_the_same_correlations_is_left_out(tmp_path):
    calls = profile(calls=1).calls
    path = recording(tmp_path / "x.sqlite", CASE, "triton_mxfp4_bf16", calls)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET globalPid = {OTHER_PROCESS} WHERE start = {calls[0][1].start_ns}")
        connection.commit()
    (found,) = read_nsys(path)
    assert found.calls == ((calls[0][0], *calls[0][2:]),)


def broken(path, *statements):
    recording(path, CASE, "triton_mxfp4_bf16", profile(calls=1).calls)
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return path


NO_KERNELS = ("DROP TABLE CUPTI_ACTIVITY_KIND_KERNEL", "DROP TABLE CUPTI_ACTIVITY_KIND_MEMCPY")
HUGE_KEY = "replace(value, 'num_tokens=64', 'num_tokens=' || hex(zeroblob(9999)))"
ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)"


@pytest.mark.parametrize(
    ("statements", "told"),
    [
        (["DELETE FROM NVTX_EVENTS"], "no ranges of moebench"),
        (["DROP TABLE NVTX_EVENTS"], "no ranges of moebench"),
        (["DELETE FROM NVTX_EVENTS WHERE textId IN (SELECT id FROM StringIds WHERE value = 'call')"], "no range `call` or `timed`"),
        (["UPDATE NVTX_EVENTS SET domainId = 4 WHERE eventType = 59"], "no ranges of moebench"),
        (["UPDATE StringIds SET value = 'case|x|model=tiny' WHERE value LIKE 'case|%'"], "no ranges of moebench"),
        ([f"UPDATE StringIds SET value = {HUGE_KEY} WHERE value LIKE 'case|%'"], "no ranges of moebench"),
        (NO_KERNELS, "no CUDA kernels"),
        (["UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = 'soon'"], "a value is 'soon'"),
        (["UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET end = x'00ff'"], "where there should be a number"),
        (["UPDATE NVTX_EVENTS SET globalTid = NULL WHERE eventType = 59"], "a value is 'None'"),
        (["UPDATE StringIds SET value = zeroblob(2000000)"], "cannot be read as an nsys export"),
        (["UPDATE StringIds SET value = zeroblob(20)"], "where there should be a text"),
        (  # code of the file's, under a table's name
            [*NO_KERNELS, f"CREATE VIEW CUPTI_ACTIVITY_KIND_KERNEL AS {ENDLESS} SELECT x AS start, x AS end FROM n"],
            "no CUDA kernels",
        ),
    ],
)
def test_an_export_that_was_tampered_with_is_refused_with_the_reason(tmp_path, statements, told):
    with pytest.raises(ProfileError, match=told):
        read_nsys(broken(tmp_path / "x.sqlite", *statements))


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        (b"", "x.sqlite", "is not an SQLite file"),
        (b"\x00" * 4096, "x.nsys-rep", "nsys export --type sqlite makes one"),
        (b"SQLite format 3\x00" + b"\xff" * 4096, "x.sqlite", "cannot be read as an nsys export"),
    ],
)
def test_a_file_that_is_no_export_is_refused(tmp_path, content, name, told):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=told):
        read_nsys(path)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    path = recording(tmp_path / "x.sqlite", CASE, "triton_mxfp4_bf16", profile(calls=1).calls)
    path.write_bytes(path.read_bytes()[: 3 * 4096])
    with pytest.raises(ProfileError, match="cannot be read as an nsys export"):
        read_nsys(path)


@pytest.mark.parametrize("limit", ["EXPORT_BYTES_LIMIT", "MOST_EVENTS", "EXPORT_SECONDS_LIMIT"])
def test_an_export_larger_than_any_of_ours_is_refused(tmp_path, monkeypatch, limit):
    path = recording(tmp_path / "x.sqlite", CASE, "triton_mxfp4_bf16", profile(calls=2000).calls)
    monkeypatch.setattr(profiling, limit, -1 if limit == "EXPORT_SECONDS_LIMIT" else 5)
    with pytest.raises(ProfileError, match="more than"):
        read_nsys(path)


def test_an_export_is_never_written_to(tmp_path):
    path = recording(tmp_path / "x.sqlite", CASE, "triton_mxfp4_bf16", profile(calls=1).calls)
    path.chmod(0o400)
    before = path.read_bytes()
    read_nsys(path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["x.sqlite"]


def test_a_trace_file_that_an_export_names_is_not_opened(tmp_path):
    point = replace(CASE, routing="trace:/dev/zero")
    (found,) = read_nsys(recording(tmp_path / "x.sqlite", point, "triton_mxfp4_bf16", profile(calls=1).calls))
    assert found.case == point
    assert found.routing is None
    assert "which experts got tokens" in view(found).roof


# What is shown


@pytest.mark.parametrize("width", [80, 130])
@pytest.mark.parametrize("backend", LAUNCHES)
def test_a_table_fits_the_terminal_and_has_every_phase(backend, width):
    text = shown(report.table(view(profile(backend)), width), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert all(phase in text for phase in view(profile(backend)).breakdown.phases_us)
    assert "over its memory floor" in text
    assert "100 % of the busy time" in text
    assert "times made up" in text
    assert ("█" in text) == (width == 130)


def test_what_is_not_known_is_listed_not_hidden():
    strange = profile(launches=[*LAUNCHES["triton_mxfp4_bf16"], ("void who::knows<int>(int)", 30_000)], calls=1)
    text = shown(report.table(view(strange), 100), 100)
    assert "84.4 % of the busy time" in text
    assert "not known: knows 30.0 us" in text
    assert "unclassified" in text


def test_overlap_and_a_slow_profiler_are_told():
    overlapping = replace(profile(calls=1), calls=(call(LAUNCHES["triton_mxfp4_bf16"], gap_ns=-1000),), untraced_us=(50.0,))
    text = " ".join(shown(report.table(view(overlapping), 80)).split())
    assert "For 3.00 us several kernels ran at once" in text
    assert "3.19x as long as without" in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"device": replace(H200, name="NVIDIA X1")}, "the roofs of NVIDIA X1 are not known; moebench calibrate"),
        ({"routing": None}, "which experts got tokens"),
        ({"act_dtype": "int3"}, "which experts got tokens"),
    ],
)
def test_without_roofs_there_are_no_floors_and_the_reason_is_told(change, told):
    found = view(replace(profile(calls=1), **change))
    assert found.floors == {}
    assert told in " ".join(shown(report.table(found, 80)).split())


def test_roofs_that_cannot_be_read_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "moebench" / "roofs").mkdir(parents=True)
    (tmp_path / "moebench" / "roofs" / "nvidia-h200.json").write_text("{")
    assert "holds no usable roofs" in view(profile(calls=1)).roof


def test_floors_are_weights_over_bandwidth_where_tokens_are_few():
    found = view(profile(calls=1))
    gemm1 = 32 * (2880 * 5760 // 2 + 2880 * 5760 // 32 + 2 * 5760) + 2 * 64 * 2880
    assert found.floors["gemm1+activation"].us == pytest.approx(gemm1 / 4.8e12 * 1e6)
    assert found.floors["gemm1+activation"].limiter == "memory"


def test_a_call_that_is_mostly_python_is_not_broken_down():
    ops = tuple(Event(name="aten::mm [1, 2] [2, 3]", start_ns=n * 1000, end_ns=n * 1000 + 10, kind="op") for n in range(10))
    text = shown(report.table(view(replace(profile(calls=1), source="cpu", launch="eager", calls=(ops,))), 80))
    assert "there is nothing to break down" in " ".join(text.split())
    assert "gemm1" not in text


def test_a_picture_is_well_formed_whatever_the_names_are():
    hostile = profile(launches=[('</text><script>alert("1")</script>\x1b[31m', 50_000), ("down_kernel", 50_000)], calls=1)
    drawn = report.figure([view(replace(hostile, backend="<b>&\x07")), view(profile())])
    tree = ElementTree.fromstring(drawn)
    assert not [node for node in tree.iter() if "script" in node.tag]
    words = [node.text for node in tree.iter() if node.tag.endswith("text")]
    assert "<b>&" in words
    assert any(word and word.startswith("floor 29.4 us") for word in words)
    assert any(word and MADE_UP in word for word in words)


def test_a_perfetto_trace_holds_every_event_in_microseconds():
    first = profile(calls=2)
    hostile = replace(profile(launches=[('a"b\\c\n\u2028</script>', 1_500)], calls=1), backend="x\x00y")
    document = json.loads(perfetto([view(first), view(hostile)]))
    spans = [event for event in document["traceEvents"] if event["ph"] == "X"]
    kernels = [event for event in spans if event["pid"] == 1 and event["tid"] != 0]
    assert [(e["ts"], e["dur"]) for e in kernels[:2]] == [(0.0, 3.1), (4.0, 96.0)]
    assert kernels[1]["cat"] == "gemm1+activation"
    assert [e["dur"] for e in spans if e["pid"] == 2] == [1.5, 1.5]
    assert [e["args"]["name"] for e in spans if e["pid"] == 2 and e["tid"]] == ['a"b\\c\n\u2028</script>']
    names = {(e["pid"], e["name"]): e["args"]["name"] for e in document["traceEvents"] if e["ph"] == "M" and e["tid"] == 0}
    assert names[1, "process_name"] == "triton_mxfp4_bf16, gpt-oss-20b M=64, NVIDIA H200"


def test_names_cannot_steer_the_terminal():
    hostile = profile(launches=[("\x1b]0;title\x07[red]name[/red]", 50_000)], calls=1)
    text = shown(report.table(view(replace(hostile, backend="\x1b[2J[bold]x")), 100), 100)
    assert "\x1b" not in text
    assert "[bold]x" in text


# The command


def saved(path, **fields):
    path.write_text(to_json(profile(**fields)))
    return path


def test_a_saved_profile_is_shown_again(tmp_path):
    path = saved(tmp_path / "a.json")
    done = run("--load", path, "--perfetto", tmp_path / "t.json", "--figure", tmp_path / "f.svg", "--save", tmp_path / "b.json")
    assert "gemm1+activation" in done.output
    assert load(tmp_path / "b.json") == load(path)
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    ElementTree.fromstring((tmp_path / "f.svg").read_text())


def test_json_holds_what_the_table_shows(tmp_path):
    done = run("--load", saved(tmp_path / "a.json"), "--json")
    document = json.loads(done.stdout)
    (row,) = document["profiles"]
    assert document["exit_code"] == 0
    assert [phase["phase"] for phase in row["phases"]] == ["route", "gemm1+activation", "gemm2", "finalize"]
    assert sum(phase["us"] for phase in row["phases"]) + row["gaps_us"] == pytest.approx(row["span_us"])
    assert row["phases"][2]["over"] == pytest.approx(row["phases"][2]["us"] / row["phases"][2]["floor_us"])
    assert row["coverage"] == 1.0
    assert "gemm1" in done.stderr


def test_a_difference_of_two_files_adds_up(tmp_path):
    slower = [(name, ns + 10_000 * (name == "down_kernel")) for name, ns in LAUNCHES["triton_mxfp4_bf16"]]
    before, after = saved(tmp_path / "a.json"), saved(tmp_path / "b.json", launches=slower)
    done = run("--diff", before, after, "--json")
    found = json.loads(done.stdout)["diff"]
    assert found["delta_us"] == pytest.approx(10.0)
    assert sum(change["delta_us"] for change in found["changes"]) == pytest.approx(10.0)
    assert (found["changes"][0]["after"], found["changes"][0]["what"]) == ("down_kernel", "slower")
    assert "Largest: gemm2 +10.0 us." in done.stderr


def test_a_difference_that_is_not_of_kernels_alone_says_so():
    one, other = (
        view(profile(calls=1)),
        view(replace(profile(calls=1), launch="eager", device=replace(H200, name="NVIDIA H100"), source="nsys")),
    )
    text = shown(report.difference(one, other, diff(one.breakdown, other.breakdown)))
    assert "the devices differ: NVIDIA H200, NVIDIA H100" in text
    assert "launched differently: as a CUDA graph, eagerly" in text
    assert "traced differently" in text
    assert "No kernel made a difference." in text


def test_two_backends_of_one_case_are_compared(tmp_path):
    done = run("--model", "tiny", "--tokens", "8", "--calls", "1", "--diff", "torch", "fault_ok", "--json")
    document = json.loads(done.stdout)
    assert [row["backend"] for row in document["profiles"]] == ["torch", "fault_ok"]
    spans = [row["span_us"] for row in document["profiles"]]
    assert sum(change["delta_us"] for change in document["diff"]["changes"]) == pytest.approx(spans[1] - spans[0], abs=1e-2)


def test_one_backend_that_fails_does_not_hide_the_other():
    done = run("--model", "tiny", "--tokens", "8", "--calls", "1", "--backend", "fault_zeros,torch", check=3)
    assert "error: fault_zeros: its output is wrong" in done.stderr
    assert "torch  tiny M=8" in done.stdout


def test_interrupting_is_told_and_has_its_exit_code(monkeypatch):
    def interrupt(request, log):
        raise KeyboardInterrupt

    monkeypatch.setattr("moebench.commands.profile.capture", interrupt)
    assert "interrupted" in run("--model", "tiny", "--tokens", "8", "--backend", "torch", check=130).stdout


ONE = ("--model", "tiny", "--tokens", "8")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "which case?"),
        (("--model", "tiny", "--tokens", "1,2"), "these are 2 cases (tiny M=1, tiny M=2)"),
        (("--model", "tny"), "did you mean 'tiny'"),
        ((*ONE, "--arch", "sm100"), "a profile is of this machine"),
        ((*ONE, "--print-command"), "add --tool nsys or --tool ncu"),
        ((*ONE, "--load", "x"), "--model and --tokens say what to profile"),
        (("--tool", "nsys", "--from-nsys", "x"), "--tool nsys records a new profile"),
        (("--diff", "a", "b", "--load", "x"), "--diff names both profiles itself"),
        (("--diff", "a", "b"), "no such files; name two saved profiles, or the case beside two backends"),
        ((*ONE, "--diff", "torch", "numpy", "--tool", "ncu"), "ncu runs kernels one by one"),
        ((*ONE, "--diff", "torch", "numpy", "--backend", "torch"), "leave --backend out"),
        ((*ONE, "--diff", "torch", "t*h"), "give two names"),
        ((*ONE, "--backend", "torch,numpy", "--save", "x"), "--save writes one profile"),
        ((*ONE, "--calls", "0"), "--calls"),
    ],
)
def test_a_mistake_is_a_sentence(tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments, check=2)
    assert told in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_half_a_pair_of_files_is_a_mistake(tmp_path):
    assert "is a file and the other is not" in run("--diff", saved(tmp_path / "a.json"), "torch", check=2).stderr


@pytest.mark.parametrize("option", ["--load", "--from-nsys"])
@pytest.mark.parametrize("content", [None, b"{}", b"\x00" * 100])
def test_an_unreadable_file_is_told_in_one_line(tmp_path, option, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    done = run(option, path, check=6)
    assert done.stderr.startswith(f"error: {path}")
    assert len(done.stderr.splitlines()) == 1


def test_a_saved_profile_larger_than_any_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "SAVED_BYTES_LIMIT", 10)
    with pytest.raises(ProfileError, match="larger than"):
        load(saved(tmp_path / "a.json"))


@pytest.mark.parametrize("option", ["--save", "--perfetto", "--figure"])
def test_what_cannot_be_written_is_a_storage_error(tmp_path, option):
    done = run("--load", saved(tmp_path / "a.json"), option, tmp_path / "no" / "x", check=5)
    assert "No such file or directory" in done.stderr
