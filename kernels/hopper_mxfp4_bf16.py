"""Our own CUDA kernels for Hopper: a layer in one launch, MXFP4 weights as FP8 and bf16 activations as two FP8 numbers, or all in bf16."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from moebench.kernels.hopper_mxfp4_bf16_details.shape import MAX_TOP_K, TILE_ROWS, Sizes, tier_of, variant

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moebench.backend import ActDtype, Experts
    from moebench.case import Case
    from moebench.compiled import Compiled
    from moebench.device import Device
    from moebench.problem import Layer

INSTALL = "pip install 'moebench[hopper]', or pip install cuda-bindings nvidia-cuda-nvrtc"


class HopperMxfp4Bf16:
    name = "hopper_mxfp4_bf16"
    act_dtype: ActDtype = "bf16"
    kernel_pattern = r"^hopper_mxfp4_(bf16|prefill)$"

    def unsupported(self, case: Case, device: Device) -> str | None:
        if device.arch != "sm90":
            return f"uses Hopper's warpgroup instructions, which only sm90 has; this is {device.arch}"
        if not _installed("cuda.bindings"):
            return f"cuda-bindings, which compiles and launches the kernel, is not installed; {INSTALL}"
        if case.top_k > MAX_TOP_K:
            return f"top_k={case.top_k} is more than the {MAX_TOP_K} slots the kernel is written for; give at most {MAX_TOP_K}"
        if case.hidden_size % TILE_ROWS:
            return f"hidden_size={case.hidden_size} is not a multiple of {TILE_ROWS}, the rows of a tile; use triton_mxfp4_bf16"
        sizes = Sizes(
            hidden=case.hidden_size,
            intermediate=case.local_intermediate_size,
            num_experts=case.num_experts,
            local_experts=case.num_local_experts,
        )
        if variant(sizes, tier_of(min(case.num_tokens, sizes.few_up_to)), h_static=True, outliers=False) is None:
            return (
                f"a row of hidden_size={sizes.hidden} or intermediate_size={sizes.intermediate} leaves no room for weights "
                "in shared memory; use triton_mxfp4_bf16"
            )
        return None

    def prepare(self, layer: Layer, max_num_tokens: int) -> Experts:
        from moebench.kernels.hopper_mxfp4_bf16_details import launch

        return launch.load(launch.prepare(layer, max_num_tokens))

    def compiled(self, arch: str) -> Iterator[Compiled]:
        """By every compiler that is here, NVRTC and nvcc, since they differ; the backend itself uses NVRTC."""
        from moebench.backend import CannotBuild
        from moebench.compiled import Compiled
        from moebench.kernels.hopper_mxfp4_bf16_details import aot

        if arch != "sm90":
            raise CannotBuild(f"uses Hopper's warpgroup instructions, which only sm90 has; it is not for {arch}")
        if aot.disassembler() is None:
            raise CannotBuild("nvdisasm is not here, which reads what was compiled; a CUDA toolkit has it, and so has pip install triton")
        if not aot.compilers():
            raise CannotBuild(f"neither NVRTC nor nvcc is here; {INSTALL}")
        for compiler in aot.compilers():
            for variant_ in aot.all_variants():
                found = aot.compile_one(variant_, compiler)
                yield Compiled(
                    kernel=self.name,
                    config=variant_.label,
                    arch=arch,
                    compiler=compiler,
                    registers=found.registers,
                    stack_bytes=found.stack_bytes,
                    spills=found.spill_instructions,
                    loop_spills=found.loop_spill_instructions,
                    shared_bytes=found.shared_bytes,
                    tensor_cores=found.mma_kinds,
                    loop_instructions_per_weight=found.loop_instructions_per_weight,
                    cubin=found.cubin,
                )


def _installed(module: str) -> bool:
    """find_spec imports the parent, which may not be there."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


BACKENDS = (HopperMxfp4Bf16(),)
