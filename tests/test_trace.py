"""Whether the backend that was asked for is the one that ran."""

import re

import pytest

from moebench.record import Kernel
from moebench.registry import builtin
from moebench.trace import INJECTED, launched_kernels, missing_kernel

RAN = (Kernel(name="Memcpy DtoD (Device -> Device)", count=1), Kernel(name="void cutlass::device_kernel<GemmUniversal<Mixed>>", count=2))


def test_a_backend_whose_kernel_ran_is_believed():
    assert missing_kernel(r"device_kernel<.*Mixed", RAN) is None


def test_a_backend_none_of_whose_kernels_ran_is_told_what_did():
    sentence = missing_kernel("marlin", RAN)
    assert sentence is not None
    assert "'marlin'" in sentence
    assert "Memcpy DtoD" in sentence


@pytest.mark.parametrize(("pattern", "kernels"), [(None, RAN), ("marlin", ())])
def test_nothing_is_claimed_without_a_pattern_or_without_kernels(pattern, kernels):
    assert missing_kernel(pattern, kernels) is None


@pytest.mark.parametrize("variable", INJECTED)
def test_the_trace_stands_aside_where_another_profiler_is_attached(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    called = []
    assert launched_kernels(lambda: called.append(1)) == ()
    assert called == []


@pytest.mark.parametrize("backend", [b for b in builtin() if b.name not in ("torch", "numpy")], ids=lambda b: b.name)
def test_every_gpu_backend_says_which_kernel_must_run(backend):
    re.compile(backend.kernel_pattern)
    assert missing_kernel(backend.kernel_pattern, (Kernel(name="void at::native::vectorized_elementwise_kernel<4>", count=9),))


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        # names as a trace on an H200 gave them
        ("triton_mxfp4_bf16", "gate_up_kernel"),
        ("openai_triton_kernels", "_matmul_ogs_NNT_bf16xbf16xmxfp4_16x256x128x1_swiglu"),
        (
            "marlin_mxfp4_bf16",
            "void marlin_moe_wna16::Marlin<1125899906909960l, 562949953487106l, 1125899906909960l, 2814749767106568l, 128>",
        ),
    ],
)
def test_the_pattern_knows_the_kernels_seen_on_a_gpu(name, kernel):
    (backend,) = (b for b in builtin() if b.name == name)
    assert missing_kernel(backend.kernel_pattern, (Kernel(name=kernel, count=1),)) is None
