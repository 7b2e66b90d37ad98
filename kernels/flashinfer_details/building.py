"""Compiling FlashInfer's modules ahead of time, through FlashInfer's own build.

A process for each architecture imports FlashInfer, whose folders depend on FLASHINFER_CUDA_ARCH_LIST as it is at import, and lets it
build; what it and ninja say is read line by line here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TextIO

from moebench.backend import BuildFailed, BuildState, BuildStep, CannotBuild
from moebench.kernels.flashinfer_details import versions

# What cutlass_fused_moe (get_cutlass_fused_moe_module), mxfp8_quantize and the autotuner (delay_kernel) load, the largest last; read in
# 0.7.2.post1.
FUSED_MOE = "flashinfer.jit.fused_moe:gen_cutlass_fused_moe_sm{}_module"
QUANTIZE = "flashinfer.jit.fp8_quantization:gen_mxfp8_quantization_sm100_module"
TUNE = "flashinfer.jit.tllm_utils:gen_trtllm_utils_module"
SM90_MODULES = {"sm90": (TUNE, FUSED_MOE.format(90))}
MXFP8_MODULES = {
    arch: (TUNE, QUANTIZE, FUSED_MOE.format(module)) for arch, module in (("sm100", 100), ("sm103", 103), ("sm120", 120), ("sm121", 120))
}
# As FlashInfer names the folder of a machine that has such a GPU; it chooses the suffix of sm12x by the version of nvcc.
ARCH_LISTS = {"sm90": "9.0a", "sm100": "10.0a", "sm103": "10.3a", "sm120": "12.0", "sm121": "12.1"}
LOG = "prebuild.log"
MARK = "moebench-prebuild "  # before our own JSON among the lines of ninja
STOP_S = 30.0
WRONG = re.compile(r"\berror\b|undefined reference|cannot find|Killed|No space left", re.IGNORECASE)  # the line that says why


def prebuild(
    modules: Mapping[str, Sequence[str]], archs: Sequence[str], jobs: int | None, dry_run: bool
) -> Iterator[BuildStep | BuildState]:
    """modules: by architecture, what makes each, as module:function."""
    if problem := versions.unusable():
        raise CannotBuild(problem)
    archs = archs or [_this_machine(modules)]
    for arch in archs:
        if arch not in modules:
            raise CannotBuild(f"FlashInfer compiles this backend for {', '.join(modules)}, not for {arch}")
    environments = [_environment(arch, jobs) for arch in archs]
    for arch, environment in zip(archs, environments, strict=True):
        yield from _build(arch, modules[arch], environment, dry_run)


def _this_machine(modules: Mapping[str, Sequence[str]]) -> str:
    if len(modules) == 1:
        return next(iter(modules))
    from moebench.device import detect

    device = detect()
    if device.arch not in modules:
        raise CannotBuild(f"say what for: FlashInfer compiles this backend for {', '.join(modules)}; this machine is {device.arch}")
    return device.arch


def _environment(arch: str, jobs: int | None) -> dict[str, str]:
    """The user's; FlashInfer's own variables only where they are not set. Raises CannotBuild where a tool is missing."""
    env = dict(os.environ)
    # FlashInfer calls plain `ninja`, which pip puts beside an interpreter that need not be on PATH
    env["PATH"] = os.pathsep.join(filter(None, [env.get("PATH", ""), str(Path(sys.executable).parent)]))
    if shutil.which("ninja", path=env["PATH"]) is None:
        raise CannotBuild("ninja is not on PATH, and FlashInfer compiles with it; pip install ninja")
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    nvcc = env.get("FLASHINFER_NVCC") or (f"{home}/bin/nvcc" if home else "nvcc")
    if shutil.which(nvcc, path=env["PATH"]) is None and (home or shutil.which("/usr/local/cuda/bin/nvcc") is None):
        where = f"{nvcc} is not there" if home else "nvcc is not on PATH nor in /usr/local/cuda/bin"
        raise CannotBuild(f"{where}; install the CUDA toolkit (12.8 or newer, a GPU is not needed), or set CUDA_HOME to where it is")
    if env.get("FLASHINFER_DISABLE_JIT"):
        raise CannotBuild(f"FLASHINFER_DISABLE_JIT={env['FLASHINFER_DISABLE_JIT']} forbids FlashInfer to compile; unset it")
    wanted = ARCH_LISTS[arch].rstrip("a")
    listed = env.setdefault("FLASHINFER_CUDA_ARCH_LIST", ARCH_LISTS[arch])
    if wanted not in [entry.rstrip("abcdefghijklmnopqrstuvwxyz") for entry in listed.split()]:
        raise CannotBuild(f"FLASHINFER_CUDA_ARCH_LIST={listed!r} leaves {arch} out; unset it, or add {ARCH_LISTS[arch]} to it")
    if jobs is not None:
        env["MAX_JOBS"] = str(jobs)  # what FlashInfer hands ninja as -j
    env["NINJA_STATUS"] = "[%f/%t] "
    return env


def _build(arch: str, generators: Sequence[str], env: Mapping[str, str], dry_run: bool) -> Iterator[BuildStep | BuildState]:
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, arch, "dry" if dry_run else "build", *generators],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # to be stopped with all that it started
    )
    try:
        yield from _read(process, keep=not dry_run)
    finally:
        _stop(process)


def _read(process: subprocess.Popen[str], keep: bool) -> Iterator[BuildStep | BuildState]:
    """States and steps, and at the end what went wrong; all lines go to a log beside the module."""
    state: BuildState | None = None
    log: TextIO | None = None
    unit, told, last = "", "", ""
    assert process.stdout is not None  # stdout=PIPE
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                frame = json.loads(line.removeprefix(MARK))
                if "refused" in frame:
                    raise CannotBuild(frame["refused"])
                state = BuildState(**frame | {"ship": tuple(frame["ship"])})
                if keep and state.done < state.total:
                    if log:
                        log.close()
                    log = Path(state.path).with_name(LOG).open("w", encoding="utf-8")
                yield state
                continue
            if log:
                log.write(line)
                log.flush()
            last = line.strip()[:300] or last
            if line.startswith("FAILED: "):
                unit = unit or Path(line.split()[-1]).name
            elif unit and not told and WRONG.search(line):
                told = line.strip()[:300]
            elif state and not unit and (found := re.match(r"\[(\d+)/(\d+)\] ", line)):
                done = state.total - int(found[2]) + int(found[1])
                yield BuildStep(module=state.module, done=done, total=state.total, what=_unit(line))
        if process.wait():
            raise BuildFailed(_failure(unit, told or last, log.name if log else ""))
    finally:
        if log:
            log.close()


def _failure(unit: str, told: str, log: str) -> str:
    what = f"FlashInfer could not build {unit}" if unit else "FlashInfer's build failed"
    see = f"\nlog: {log}\nwhat was compiled is kept; the same command goes on from there" if log else ""
    return f"{what}: {told or 'it did not say why'}{see}"


def _unit(line: str) -> str:
    """The file that a compiler or linker was told to write."""
    words = line.split()
    output = words[words.index("-o") + 1] if "-o" in words[:-1] else words[-1]
    return Path(output).name.removesuffix(".o").removesuffix(".cuda")


def _stop(process: subprocess.Popen[str]) -> None:
    """SIGINT first: ninja then ends its compilers, which are in process groups of their own, and removes what they left half done."""
    for number, wait_s in ((signal.SIGINT, STOP_S), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            break
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)


# ---- in the process that imports FlashInfer


class Spec(Protocol):
    """Of flashinfer.jit.JitSpec what is used here."""

    @property
    def name(self) -> str: ...
    @property
    def is_aot(self) -> bool: ...
    @property
    def aot_path(self) -> Path: ...
    @property
    def jit_library_path(self) -> Path: ...
    @property
    def lock_path(self) -> Path: ...
    @property
    def ninja_path(self) -> Path: ...
    def write_ninja(self) -> None: ...
    def build(self, verbose: bool, need_lock: bool) -> None: ...


@dataclass(frozen=True, kw_only=True)
class _Plan:
    spec: Spec
    todo: int
    total: int


def main(arch: str, generators: Sequence[str], dry_run: bool) -> None:
    """Print states and whatever FlashInfer prints."""
    from filelock import Timeout

    signal.signal(signal.SIGINT, lambda *_: None)  # FlashInfer would kill ninja a quarter second later, before it has cleaned up
    specs = []
    for generator in generators:
        module, _, function = generator.partition(":")
        try:
            specs.append(getattr(import_module(module), function)())
        except (ImportError, AttributeError) as error:
            have = f"{versions.PACKAGE} {versions.installed()}"
            _say({"refused": f"{have} has no usable {function} ({error}); pip install {versions.PACKAGE}=={versions.NEWEST}"})
            return
    try:
        plans = [_plan(spec) for spec in specs]
    except Timeout as error:
        _say({"refused": f"another process builds it now (it holds {error.lock_file}); wait for that one, or end it"})
        return
    if not dry_run:
        for plan in plans:
            if plan.todo and (problem := _cannot_link(plan.spec)):
                _say({"refused": problem})
                return
    for plan in plans:
        _state(arch, plan.spec, plan.total - plan.todo, plan.total)
        if plan.todo and not dry_run:
            try:
                plan.spec.build(verbose=True, need_lock=True)
            except RuntimeError as error:
                sys.stdout.write(f"{error}\n")
                sys.exit(1)
            _state(arch, plan.spec, plan.total, plan.total)


def _plan(spec: Spec) -> _Plan:
    """Steps that ninja has yet to do. A module in FlashInfer's package is loaded as it is, without ninja."""
    if spec.is_aot:
        return _Plan(spec=spec, todo=0, total=1)
    from filelock import FileLock  # as FlashInfer does

    with FileLock(spec.lock_path, timeout=0):  # ninja repairs its log when it reads one that another is writing
        spec.write_ninja()
        told = _ninja(spec, "-n").stdout
    total = sum(line.startswith("build ") for line in spec.ninja_path.read_text(encoding="utf-8").splitlines())
    return _Plan(spec=spec, todo=max((int(m) for m in re.findall(r"^\[\d+/(\d+)\] ", told, re.MULTILINE)), default=0), total=total)


def _cannot_link(spec: Spec) -> str | None:
    """Linking comes last, hours after the first unit, so it is tried first: the same command with nothing in it."""
    commands = _ninja(spec, "-t", "commands", str(spec.jit_library_path)).stdout.splitlines()
    words = shlex.split(commands[-1]) if commands else []
    if "-o" not in words:
        return None
    with TemporaryDirectory() as folder:
        (empty := Path(folder) / "empty.c").write_text("", encoding="utf-8")
        words[words.index("-o") + 1] = f"{folder}/empty.so"
        words = [str(empty) if word.endswith(".o") else word for word in words if not word.endswith(".o") or word == _first(words)]
        tried = subprocess.run(words, capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return None
    lacking = re.findall(r"cannot find -l(\S+?):?(?:\s|$)", tried.stderr)
    named = ", ".join(f"lib{name}.so" for name in dict.fromkeys(lacking)) or tried.stderr.strip()[-300:]
    return (
        f"{spec.name} could be compiled but not linked here: the linker does not find {named}; install them (libcuda.so is also "
        "among the CUDA toolkit's stubs), or name their folder in FLASHINFER_EXTRA_LDFLAGS=-L..."
    )


def _first(words: Sequence[str]) -> str:
    return next((word for word in words if word.endswith(".o")), "")


def _ninja(spec: Spec, *options: str) -> subprocess.CompletedProcess[str]:
    folder = spec.ninja_path.parent
    command = ["ninja", "-C", str(folder), "-f", str(spec.ninja_path), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _state(arch: str, spec: Spec, done: int, total: int) -> None:
    path = spec.aot_path if spec.is_aot else spec.jit_library_path
    ship: tuple[str, ...] = ()
    if done == total:
        inside = f"flashinfer/data/aot/{spec.name}/{spec.name}.so"
        ship = (
            f"copy it to {inside} in the site-packages of a machine with FlashInfer {versions.installed()} and the same CUDA major "
            "version; it is then loaded as it is, without ninja or nvcc",
        )
        if not spec.is_aot:
            ship += (
                f"or, within one container image, keep {path.parents[2]} (cached_ops and generated) at this path, with its times, beside "
                "the same installation of FlashInfer and the same ninja, which compiles again what looks older than its sources",
            )
    _say(asdict(BuildState(module=spec.name, arch=arch, path=str(path), done=done, total=total, ship=ship)))


def _say(frame: dict[str, object]) -> None:
    sys.stdout.write(MARK + json.dumps(frame) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3:], sys.argv[2] == "dry")
