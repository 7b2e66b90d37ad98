"""Who may import whom, what a module looks like, what no module does: read from the source, not from good intentions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTALLED_INSIDE = ("reference", "kernels", "reports")
DIRECTORIES = ("moebench", "moebench/commands", *INSTALLED_INSIDE)

# A module imports from lines above its own. On one line, nobody imports anybody else.
LAYERS = [
    {"once"},
    {"case", "mx", "conform", "realized", "memory", "leash", "policy_lookup", "serving_flags", "cubin", "tuned", "forked"},
    {"routing", "device", "compiled"},
    {"record", "problem"},
    {"lines"},
    {"journal", "plan", "failure", "timeline", "rotation", "router"},
    {"backend", "child", "probe", "parts"},
    {"check", "timing", "trace", "roofline", "flags", "telemetry", "gate"},
    {"brief"},
    {"compare"},
    {"verdict", "crossover", "gate_simulation", "tuning"},
    {"reference", "kernels", "reports", "registry", "machine", "simulated", "baselines"},
    {"trial", "capture", "prebuild", "compiling", "calibrate", "doctor", "profile", "soak", "api", "ab"},
    {"worker", "selfcheck", "gate_check", "tune"},
    {"sweep", "gate_worker"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
MAY_ALSO = {("registry", "kernels"), ("registry", "reference")}  # lists the packages, uses none of their modules
ONLY = {
    "plan": {"case", "record", "routing"},
    "sweep": {"case", "child", "device", "failure", "flags", "plan", "record", "telemetry"},  # the worker is a process to it
    "reports": {
        *(
            "case",
            "compare",
            "compiled",
            "crossover",
            "device",
            "flags",
            "forked",
            "gate",
            "journal",
            "parts",
            "realized",
            "record",
            "reports",
            "roofline",
            "routing",
        ),
        *("serving_flags", "timeline", "tuning", "verdict"),
    },
    "worker": set(RANK) - {"kernels", "reports", "plan"},
    "gate": set(),  # numbers in, verdicts out
    "policy_lookup": set(),  # a file that others copy
}
NEVER_TORCH = {
    *(
        "case",
        "routing",
        "record",
        "lines",
        "journal",
        "plan",
        "backend",
        "registry",
        "reports",
        "prebuild",
        "compiling",
        "sweep",
        "commands",
        "cli",
        "__main__",
    ),
    *("roofline", "flags", "telemetry", "doctor", "profile", "timeline", "simulated", "api", "compare", "crossover", "serving_flags"),
    *("gate", "gate_simulation", "baselines", "child", "failure", "conform", "leash", "policy_lookup", "rotation", "verdict", "ab"),
    *("gate_check", "compiled", "cubin", "tuned", "tuning", "forked", "parts", "brief", "once"),
}


def sources():
    """(layer, path) of each module; kernels/<name>_details/ belongs to kernels."""
    for directory in DIRECTORIES:
        for path in sorted((ROOT / directory).rglob("*.py") if directory != "moebench" else (ROOT / directory).glob("*.py")):
            yield (path.stem if directory == "moebench" else Path(directory).name), path


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    """Dotted names of everything imported at any depth, functions and TYPE_CHECKING blocks included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_when_run(tree):
    """As imported, without what only a type checker reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    return imported(tree)


def ours(names):
    """The layers that dotted names belong to."""
    parts = (name.split(".") for name in names)
    return {part[1] for part in parts if part[0] == "moebench" and len(part) > 1 and not part[1].startswith("__")}


def named(path):
    return str(path.relative_to(ROOT))


MODULES = [pytest.param(layer, path, id=named(path)) for layer, path in sources()]


@pytest.mark.parametrize(("layer", "path"), [m for m in MODULES if m.values[0] != "__init__"])
def test_imports_point_down(layer, path):
    assert layer in RANK, f"{named(path)} is new: give it a line in LAYERS"
    used = ours(imported(parse(path)))
    assert used <= set(RANK), f"{used - set(RANK)} is in no layer"
    bad = {d for d in used if RANK[d] >= RANK[layer] and d != layer and (layer, d) not in MAY_ALSO}
    assert not bad, f"{named(path)} imports {bad}, which its layer may not"
    assert used <= ONLY.get(layer, set(RANK)), f"{named(path)} may import {ONLY.get(layer)} only"


@pytest.mark.parametrize("path", [pytest.param(p, id=named(p)) for layer, p in sources() if layer == "kernels"])
def test_kernels_share_details_but_never_use_each_other(path):
    used = {name.split(".")[2] for name in imported(parse(path)) if name.startswith("moebench.kernels.")}
    assert all(name.endswith("_details") for name in used)
    assert path.parent == ROOT / "kernels" or used <= {path.parent.name}


@pytest.mark.parametrize("path", [pytest.param(p, id=named(p)) for layer, p in sources() if layer in NEVER_TORCH])
def test_plans_journals_and_reports_do_without_torch(path):
    vendors = {name.split(".")[0] for name in imported_when_run(parse(path))}
    assert not vendors & {"torch", "triton", "flashinfer"}


def test_imports_are_seen_at_any_depth_and_in_every_form():
    tree = ast.parse(
        "if TYPE_CHECKING:\n    from torch import Tensor\n"
        "def f():\n    from moebench import registry\n    import moebench.kernels.a, moebench"
    )
    assert ours(imported(tree)) == {"registry", "kernels"}
    assert "torch.Tensor" in imported(tree)
    assert "torch.Tensor" not in imported_when_run(tree)


def test_names_of_backends_are_known_without_torch_or_a_vendor_library():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'triton', 'flashinfer')))\n"
        "import moebench.cli; from moebench.registry import builtin; print(*(backend.name for backend in builtin()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout.split()


@pytest.mark.parametrize(("layer", "path"), MODULES)
def test_a_module_says_what_it_is_in_one_sentence(layer, path):
    first, _, _ = (ast.get_docstring(parse(path)) or "").partition("\n\n")
    sentence = " ".join(first.split())
    assert sentence.endswith((".", "?")), f"{named(path)} starts with {sentence!r}"
    assert ". " not in sentence, f"{named(path)} starts with more than one sentence"


@pytest.mark.parametrize(("layer", "path"), MODULES)
def test_nothing_loads_pickles_or_evaluates_text(layer, path):
    tree = parse(path)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"eval", "exec", "torch.load", "os.system"}
    assert not {name.split(".")[0] for name in imported(tree)} & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


@pytest.mark.parametrize(("layer", "path"), [m for m in MODULES if m.values[0] not in ("cli", "commands")])
def test_only_the_command_line_prints(layer, path):
    tree = parse(path)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"print", "click.echo"}
    assert "click" not in {name.split(".")[0] for name in imported(tree)}


@pytest.mark.parametrize("directory", [*INSTALLED_INSIDE, "plans"])
def test_prescribed_directories_are_no_top_level_packages(directory):
    assert not (ROOT / directory / "__init__.py").exists()
    assert (ROOT / "moebench" / directory).is_symlink()
    assert (ROOT / "moebench" / directory).resolve() == (ROOT / directory).resolve()
