"""Compiling ahead of time, with a package that stands in for FlashInfer, a ninja and a compiler that are shell and Python scripts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moebench.backend import Prebuilds
from moebench.registry import builtin
from tests.running import heed_interrupts

ROOT = Path(__file__).parents[1]
UNITS = ("one", "two", "three")

# FlashInfer's JitSpecNvcc as far as it is used: the folder depends on the architectures, ninja gets MAX_JOBS, a failure raises.
JIT = """
import os, subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ["FLASHINFER_WORKSPACE_BASE"], os.environ["FLASHINFER_CUDA_ARCH_LIST"].replace(" ", "_").replace(".", ""))

class Spec:
    def __init__(self, name):
        self.name = name
        self.jit_library_path = FOLDER / "cached_ops" / name / (name + ".so")
        self.ninja_path = self.jit_library_path.with_name("build.ninja")
        self.aot_path = HERE / "data" / "aot" / name / (name + ".so")
        self.is_aot = self.aot_path.exists()
        self.lock_path = self.jit_library_path.with_name("lock")
        self.lock_path.parent.mkdir(parents=True, exist_ok=True)

    def write_ninja(self):
        outputs = [self.ninja_path.with_name(unit + ".cuda.o") for unit in UNITS]
        lines = [f"build {output}: cuda_compile {output.stem}.cu" for output in outputs]
        self.ninja_path.write_text("\\n".join([*lines, f"build {self.jit_library_path}: link"]))

    def build(self, verbose, need_lock):
        assert verbose and need_lock
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        folder = self.ninja_path.parent
        if subprocess.run(["ninja", "-v", "-C", folder, "-f", self.ninja_path, *jobs], stderr=subprocess.STDOUT).returncode:
            raise RuntimeError("Ninja build failed.")
"""

NINJA = """#!{python}
import os, signal, sys, time
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("-C") + 1])
outputs = [Path(line.split()[1].rstrip(":")) for line in (folder / "build.ninja").read_text().splitlines()]
todo = [output for output in outputs if not output.exists()]
if "-t" in sys.argv:
    print("{link} " + " ".join(map(str, outputs[:-1])) + " -shared -lcudart -o " + str(outputs[-1]))
elif not todo:
    print("ninja: no work to do.")
elif "-n" in sys.argv:
    print("\\n".join(f"[{{n}}/{{len(todo)}}] nvcc" for n in range(1, len(todo) + 1)))
else:
    def stop(*_):
        (folder / "cleaned").touch()
        sys.exit(130)
    signal.signal(signal.SIGINT, stop)
    (folder / "options").write_text(" ".join(sys.argv[1:]))
    for n, output in enumerate(todo, 1):
        unit = folder.name + "/" + output.name.split(".")[0]
        if unit == os.environ.get("BREAKS"):
            sys.exit(f"FAILED: [code=2] {{output}} \\nnvcc -c x.cu -o {{output}}\\nx.cu(3): error: no such thing\\nninja: build stopped.")
        if unit == os.environ.get("HANGS"):
            time.sleep(60)
        output.write_text("x" * 2**20)
        print(f"{{os.environ['NINJA_STATUS'].replace('%f', str(n)).replace('%t', str(len(todo)))}}nvcc -c x.cu -o {{output}}", flush=True)
"""


@pytest.fixture
def machine(tmp_path):
    """A folder `flashinfer` to import, ninja and nvcc on PATH, a workspace."""
    jit = tmp_path / "site" / "flashinfer" / "jit"
    jit.mkdir(parents=True)
    (jit.parent / "__init__.py").write_text("")
    (jit.parent / "_build_meta.py").write_text('__version__ = "0.7.2.post1"\n')
    (jit / "__init__.py").write_text("")
    (jit / "fused_moe.py").write_text(
        f"UNITS = {UNITS}\n{JIT}\ndef gen_cutlass_fused_moe_sm90_module(): return Spec('fused_moe_90')\n"
        "def gen_cutlass_fused_moe_sm100_module(): return Spec('fused_moe_100')\n"
    )
    (jit / "fp8_quantization.py").write_text(
        "from flashinfer.jit.fused_moe import Spec\ndef gen_mxfp8_quantization_sm100_module(): return Spec('mxfp8_quantization_sm100')\n"
    )
    (jit / "tllm_utils.py").write_text(
        "from flashinfer.jit.fused_moe import Spec\ndef gen_trtllm_utils_module(): return Spec('trtllm_utils')\n"
    )
    (tmp_path / "bin").mkdir()
    script(tmp_path, "ninja", NINJA.format(python=sys.executable, link=tmp_path / "bin" / "c++"))
    script(tmp_path, "nvcc", "#!/bin/sh\nexit 0\n")
    script(tmp_path, "c++", "#!/bin/sh\nexit 0\n")
    return tmp_path


def script(machine, name, text):
    path = machine / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def environment(machine, **extra):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FLASHINFER_", "CUDA_", "MAX_JOBS"))}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join([str(machine / "site"), str(ROOT)]),
        "PATH": f"{machine / 'bin'}:/usr/bin:/bin",
        "FLASHINFER_WORKSPACE_BASE": str(machine / "work"),
        **extra,
    }


def prebuild(machine, *arguments, check, **extra):
    command = [sys.executable, "-m", "moebench", "prebuild", *arguments]
    env = environment(machine, **extra)
    done = subprocess.run(command, cwd=machine, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == check, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def test_every_unit_is_shown_and_then_where_the_module_is_and_how_to_ship_it(machine):
    shown = prebuild(machine, "cutlass_mxfp4_bf16", "--jobs", "3", check=0).stdout
    folder = machine / "work" / "90a" / "cached_ops" / "fused_moe_90"
    assert f"fused_moe_90 (sm90): 0 of 4 steps are done, in {folder}" in shown
    assert [line for line in shown.splitlines() if line.startswith("[")] == [
        f"[{n}/4] {module} {what}" for module in ("trtllm_utils", "fused_moe_90") for n, what in enumerate((*UNITS, f"{module}.so"), 1)
    ]
    assert f"{folder / 'fused_moe_90.so'}, 1.0 MiB" in shown
    assert "flashinfer/data/aot/fused_moe_90/fused_moe_90.so" in shown
    assert (folder / "options").read_text().endswith("-j 3")
    assert "nvcc -c x.cu" in (folder / "prebuild.log").read_text()
    again = prebuild(machine, "cutlass_mxfp4_bf16", "--json", check=0)
    modules = json.loads(again.stdout)["modules"]
    assert [(m["module"], m["arch"], m["done"], m["total"]) for m in modules] == [
        ("trtllm_utils", "sm90", 4, 4),
        ("fused_moe_90", "sm90", 4, 4),
    ]
    assert "[" not in again.stderr


def test_a_dry_run_counts_and_compiles_nothing(machine):
    shown = prebuild(machine, "cutlass_mxfp4_bf16", "--dry-run", check=0).stdout
    assert "0 of 4 steps are done" in shown
    assert not list(machine.rglob("*.o")) + list(machine.rglob("prebuild.log"))


def test_a_unit_that_fails_is_named_and_the_next_run_goes_on_there(machine):
    folder = machine / "work" / "90a" / "cached_ops" / "fused_moe_90"
    failed = prebuild(machine, "cutlass_mxfp4_bf16", check=3, BREAKS="fused_moe_90/two")
    assert "could not build two.cuda.o: x.cu(3): error: no such thing" in failed.stderr
    assert f"log: {folder / 'prebuild.log'}" in failed.stderr
    assert "FAILED" in (folder / "prebuild.log").read_text()
    resumed = prebuild(machine, "cutlass_mxfp4_bf16", check=0).stdout
    assert "fused_moe_90 (sm90): 1 of 4 steps are done" in resumed
    assert "[2/4] fused_moe_90 two" in resumed
    assert "[1/4]" not in resumed
    assert "trtllm_utils (sm90): 0" not in resumed


def test_ctrl_c_lets_ninja_clean_up_and_says_how_to_go_on(machine):
    folder = machine / "work" / "90a" / "cached_ops" / "fused_moe_90"
    command = [sys.executable, "-m", "moebench", "prebuild", "cutlass_mxfp4_bf16"]
    env = environment(machine, HANGS="fused_moe_90/two")
    running = subprocess.Popen(
        command, cwd=machine, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed_interrupts
    )
    deadline = time.monotonic() + 60
    while not (folder / "one.cuda.o").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    shown, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted; what was compiled is kept, go on with: moebench prebuild cutlass_mxfp4_bf16" in shown
    assert (folder / "cleaned").exists()
    assert "1 of 4 steps are done" in prebuild(machine, "cutlass_mxfp4_bf16", check=0).stdout


def test_each_architecture_has_what_its_first_call_would_compile_in_its_own_folder(machine):
    document = json.loads(prebuild(machine, "cutlass_mxfp4_mxfp8", "--arch", "sm100", "--json", check=0).stdout)
    assert [Path(m["path"]).relative_to(machine / "work").parts[::3] for m in document["modules"]] == [
        ("100a", "trtllm_utils.so"),
        ("100a", "mxfp8_quantization_sm100.so"),
        ("100a", "fused_moe_100.so"),
    ]


def test_the_users_own_architecture_list_is_kept(machine):
    listed = prebuild(machine, "cutlass_mxfp4_bf16", check=0, FLASHINFER_CUDA_ARCH_LIST="9.0a 10.0a").stdout
    assert str(machine / "work" / "90a_100a") in listed
    refused = prebuild(machine, "cutlass_mxfp4_bf16", check=2, FLASHINFER_CUDA_ARCH_LIST="8.0").stderr
    assert "FLASHINFER_CUDA_ARCH_LIST='8.0' leaves sm90 out; unset it, or add 9.0a to it" in refused


def test_a_module_inside_the_package_is_not_compiled_again(machine):
    aot = machine / "site" / "flashinfer" / "data" / "aot" / "fused_moe_90"
    aot.mkdir(parents=True)
    (aot / "fused_moe_90.so").write_text("x")
    shown = prebuild(machine, "cutlass_mxfp4_bf16", check=0).stdout
    assert f"fused_moe_90 (sm90): {aot / 'fused_moe_90.so'}" in shown
    assert "fused_moe_90 (sm90): 0" not in shown


def without(name):
    return lambda machine: (machine / "bin" / name).unlink()


def cannot_link(machine):
    script(machine, "c++", "#!/bin/sh\necho '/usr/bin/ld: cannot find -lcuda: No such file or directory' >&2; exit 1\n")


def no_flashinfer(machine):
    (machine / "site" / "flashinfer").rename(machine / "elsewhere")


def no_generator(machine):
    path = machine / "site" / "flashinfer" / "jit" / "fused_moe.py"
    path.write_text(path.read_text().replace("gen_cutlass_fused_moe_sm90_module", "gen_something_else"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param(no_flashinfer, "flashinfer-python is not installed; pip install flashinfer-python==", id="no FlashInfer"),
        pytest.param(no_generator, "has no usable gen_cutlass_fused_moe_sm90_module", id="another FlashInfer"),
        pytest.param(without("ninja"), "pip install ninja", id="no ninja"),
        pytest.param(without("nvcc"), "install the CUDA toolkit", id="no nvcc"),
        pytest.param(cannot_link, "compiled but not linked here: the linker does not find libcuda.so", id="no libcuda"),
    ],
)
def test_what_is_missing_is_a_sentence_and_nothing_is_compiled(machine, change, sentence):
    change(machine)
    extra = {"CUDA_HOME": str(machine)} if sentence.startswith("install the CUDA") else {}
    extra |= {"PATH": str(machine / "bin")} if "ninja" in sentence else {}
    if extra.get("PATH") and (Path(sys.executable).parent / "ninja").exists():
        pytest.skip("there is a ninja beside this interpreter")
    done = prebuild(machine, "cutlass_mxfp4_bf16", check=2, **extra)
    assert sentence in done.stderr
    assert done.stderr.startswith("error: ")
    assert not list(machine.rglob("*.o"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["cutlass_mxfp4_bf61"], "unknown backend 'cutlass_mxfp4_bf61'; did you mean 'cutlass_mxfp4_bf16'?"),
        (["cutlass_mxfp4_bf16", "--arch", "sm900"], "unknown architecture 'sm900'; did you mean 'sm90'? (known: cpu,"),
        (["cutlass_mxfp4_bf16", "--arch", "sm90,sm100"], "FlashInfer compiles this backend for sm90, not for sm100"),
        (["torch"], "torch compiles nothing ahead of time; these do: cutlass_mxfp4_bf16,"),
    ],
)
def test_what_cannot_be_asked_for_is_a_sentence(machine, arguments, sentence):
    assert sentence in prebuild(machine, *arguments, check=2).stderr


def test_the_command_line_does_without_torch(machine):
    code = (
        "import sys; from moebench.cli import main\n"
        "try: main(['prebuild', 'cutlass_mxfp4_bf16'])\n"
        "except SystemExit as end: print('torch' in sys.modules, 'flashinfer' in sys.modules, end.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=machine, env=environment(machine), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False 0"


def test_all_of_flashinfers_backends_can_be_built_ahead():
    assert {b.name.split("@")[0] for b in builtin() if isinstance(b, Prebuilds)} == {
        "cutlass_mxfp4_bf16",
        "cutlass_mxfp4_fp8",
        "cutlass_mxfp4_mxfp8",
    }
