"""What this machine is, and when torch need not be imported to know."""

import os
import subprocess
import sys

import pytest

from tests.running import ENVIRONMENT


@pytest.mark.parametrize(("version", "told"), [("9.0+cpu", "cpu"), ("9.0", "None"), ("9.0+cu130", "None")])
def test_only_a_torch_that_is_built_for_the_cpu_is_not_imported_to_look_for_a_gpu(tmp_path, version, told):
    info = tmp_path / "torch-9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (tmp_path / "torch.py").write_text("raise ImportError('it was imported')\n")
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    code = "from moebench.device import detect; print(detect().torch)"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT | {"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == told
