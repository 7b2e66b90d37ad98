"""The probe knows a device that computes from one that does not."""

import numpy as np

from moebench import probe
from moebench.child import spawn


def test_a_cpu_that_runs_us_is_well():
    verdicts = []
    with spawn("moebench.probe", {"on_gpu": False, "needed_bytes": 1}, {}) as child:
        verdicts += [frame["verdict"] for frame in child.frames() if "verdict" in frame]
    assert child.failure is None
    (verdict,) = verdicts
    assert verdict["reason"] == ""
    assert verdict["free_bytes"] > 0


def test_the_product_is_exact_in_bf16_and_needs_every_row_and_column():
    a, b, expected = probe._product()
    exact = a.astype(np.int64) @ b.astype(np.int64)
    assert np.array_equal(expected, exact)
    assert 16 < np.abs(exact).max() <= 256  # whole numbers up to 256 are exact in bf16
    assert a.any(axis=0).all()
    assert a.any(axis=1).all()
    assert b.any(axis=0).all()
    assert b.any(axis=1).all()


def test_a_wrong_product_is_told(monkeypatch):
    a, b, expected = probe._product()
    expected[3, 4] += 1
    monkeypatch.setattr(probe, "_product", lambda: (a, b, expected))
    assert "came out wrong" in probe._cpu().reason
