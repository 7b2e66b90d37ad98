"""What every test gets: GPU tests are skipped where there is no GPU, and files that take a minute or more begin first."""

import os
from pathlib import Path

import pytest

# before any test module makes an environment of its own from this one
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "untraced"), *filter(None, [os.environ.get("PYTHONPATH")])])
GPU_TESTS = Path(__file__).parent / "gpu"
# Where files run beside each other, a long one that began last would run alone.
LONGEST_FIRST = (
    "test_hopper_mxfp4_bf16.py",
    "test_hopper_mxfp4_fp8.py",
    "test_sweep.py",
    "test_compile_gate.py",
    "test_resume.py",
    "test_triton_mxfp4_bf16.py",
    "test_hostile_input.py",
    "test_tune.py",
    "test_profile.py",
    "test_cli.py",
    "test_ab.py",
    "test_ahead.py",
    "test_packaging.py",
    "test_prebuild.py",
    "test_hopper_mxfp4_bf16_compile_gate.py",
)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def has_gpu():
    import torch

    return torch.cuda.is_available()
