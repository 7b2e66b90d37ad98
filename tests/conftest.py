"""What every test gets: GPU tests are skipped where there is no GPU."""

from pathlib import Path

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items):
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
