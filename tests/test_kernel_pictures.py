"""The pictures of docs/kernels.md: they are what the script makes of the layout as it is."""

import subprocess
import sys

from tests.running import ENVIRONMENT, ROOT


def test_the_pictures_are_what_the_script_makes_of_the_layout(tmp_path):
    subprocess.run([sys.executable, str(ROOT / "docs" / "make_kernel_pictures.py"), str(tmp_path)], check=True, env=ENVIRONMENT)
    made = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    assert sorted(made) == ["kernel_layout.svg", "kernel_timeline.svg"]
    for name, text in made.items():
        assert text == (ROOT / "docs" / name).read_text("utf-8"), f"run python docs/make_kernel_pictures.py for {name}"
        assert f"({name})" in (ROOT / "docs" / "kernels.md").read_text("utf-8")
