"""Our own Triton kernels: MXFP4 weights dequantized in registers, bf16 activations."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from moebench.backend import CannotBuild, Regime
from moebench.kernels.triton_mxfp4_bf16_details import configs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import ModuleType

    from torch import Tensor

    from moebench.backend import ActDtype, Choice, Experts
    from moebench.case import Case
    from moebench.compiled import Compiled
    from moebench.device import Device
    from moebench.problem import Layer, Tokens

MAX_TOP_K = 8
MAX_CPU_WEIGHTS = 4_000_000  # per layer: Triton's interpreter takes seconds for as many
MAX_CPU_TOKENS = 64
TUNED_TOKENS = tuple(1 << power for power in range(15))  # 1 to 16384, of which each regime is judged by at most three


class TritonMxfp4Bf16:
    name = "triton_mxfp4_bf16"
    act_dtype: ActDtype = "bf16"
    kernel_pattern = r"^gate_up_kernel"  # Triton names a kernel after its function

    def unsupported(self, case: Case, device: Device) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed; pip install triton (Linux only)"
        if case.top_k > MAX_TOP_K:
            return f"top_k={case.top_k} is more than the {MAX_TOP_K} slots the kernels are written for; give at most {MAX_TOP_K}"
        if device.is_gpu:
            if int(device.arch.removeprefix("sm")) < 80:
                return f"needs bf16 tensor cores, sm80 or later; this is {device.arch}"
            return None
        weights = 3 * case.num_local_experts * case.hidden_size * case.local_intermediate_size
        if weights > MAX_CPU_WEIGHTS:
            return (
                f"{weights} weights are too many for Triton's interpreter, which stands in for a GPU here (limit {MAX_CPU_WEIGHTS}); "
                "use model tiny or a GPU"
            )
        if case.num_tokens > MAX_CPU_TOKENS:
            return (
                f"num_tokens={case.num_tokens} is too many for Triton's interpreter, which stands in for a GPU here; "
                f"give at most {MAX_CPU_TOKENS} or use a GPU"
            )
        return None

    def prepare(self, layer: Layer, max_num_tokens: int) -> Experts:
        launch = _launch(layer)
        prepared = launch.prepare(layer)
        if prepared.mode != "interpreter":
            launch.warm_up(prepared, max_num_tokens)

        def experts(tokens: Tokens) -> Tensor:
            out: Tensor = launch.run(prepared, tokens)
            return out

        experts.facts = {"tiles": prepared.configs_from}  # type: ignore[attr-defined]  # a function may have attributes
        return experts

    def compiled(self, arch: str) -> Iterator[Compiled]:
        if find_spec("triton") is None:
            raise CannotBuild("triton is not installed; pip install triton (Linux only)")
        from moebench.kernels.triton_mxfp4_bf16_details.aot import compile_all

        yield from compile_all(arch)

    @property
    def table_path(self) -> Path:
        return configs.SHIPPED

    def regimes(self, case: Case, arch: str) -> Sequence[Regime]:
        found, least = [], 0.0
        for config in configs.configs_for(arch).configs:
            pairs = {tokens: tokens * case.top_k / case.num_experts for tokens in TUNED_TOKENS}
            inside = [tokens for tokens, each in pairs.items() if least < each <= config.up_to]
            some = tuple(dict.fromkeys((inside[0], inside[len(inside) // 2], inside[-1]))) if inside else ()
            found.append(Regime(name=config.regime, tokens=some, choice=config.label))
            least = config.up_to
        return found

    def alternatives(self, choice: Choice, arch: str) -> Sequence[Choice]:
        found = (config.label for config in configs.neighbours(configs.from_label(choice)))
        return [label for label in dict.fromkeys(found) if label != choice]

    def prepare_choices(self, layer: Layer, max_num_tokens: int) -> Callable[[Choice], Experts]:
        launch = _launch(layer)
        prepared = launch.prepare(layer)

        def choose(choice: Choice) -> Experts:
            config = configs.from_label(choice)
            return lambda tokens: launch.run(prepared, tokens, config)

        return choose

    def table(self, text: str, arch: str, chosen: Mapping[str, Choice]) -> str:
        return configs.with_choices(text, arch, {regime: configs.from_label(choice) for regime, choice in chosen.items()})


def _launch(layer: Layer) -> ModuleType:
    """The module that launches, with triton imported for the device that the weights are on."""
    on_cpu = layer.w13.codes.device.type == "cpu"
    if on_cpu and "triton" not in sys.modules:
        # @triton.jit, of our kernels and of triton's own library, looks at this once, when it decorates; a worker process
        # runs one backend on one device, so nobody else in it is affected.
        os.environ["TRITON_INTERPRET"] = "1"
    from moebench.kernels.triton_mxfp4_bf16_details import launch

    if on_cpu and not launch.INTERPRETED:
        raise RuntimeError(
            "the weights are on a CPU, but triton was imported in this process to compile for a GPU; "
            "start a new process, or set TRITON_INTERPRET=1 before anything imports triton"
        )
    return launch


BACKENDS = (TritonMxfp4Bf16(),)
