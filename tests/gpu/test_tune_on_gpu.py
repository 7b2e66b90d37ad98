"""`moebench tune` on a GPU: real kernels, real clocks, a table that the backend takes."""

import json

from moebench.kernels.triton_mxfp4_bf16_details.configs import read
from tests.running import moebench


def test_triton_is_tuned_and_a_sweep_uses_the_table(tmp_path):
    here = {"XDG_CACHE_HOME": str(tmp_path)}
    done = moebench("tune", "triton_mxfp4_bf16", "--model", "tiny", "--tokens", "512", "--json", cwd=tmp_path, check=0, timeout=900, **here)
    document = json.loads(done.stdout.splitlines()[-1])
    (regime,) = document["regimes"]
    assert regime["regime"] == "up to 256 pairs an expert"
    assert regime["tried"] + len(regime["rejected"]) >= 20
    assert not any(reason.startswith(("wrong", "nondeterministic", "nonfinite")) for reason in regime["rejected"].values())
    table = tmp_path / "moebench" / "tuned" / "triton_mxfp4_bf16.toml"
    assert bool(document["written"]) == (regime["after"] != regime["before"]) == table.exists()
    swept = moebench(
        "sweep",
        "--model",
        "tiny",
        "--tokens",
        "512",
        "--backend",
        "triton_mxfp4_bf16",
        "--json",
        cwd=tmp_path,
        check=0,
        timeout=900,
        **here,
    )
    (row,) = json.loads(swept.stdout.splitlines()[-1])["records"]
    assert row["status"] == "ok"
    if table.exists():
        (configs,) = read(table).values()
        assert regime["after"] in {config.label for config in configs}
