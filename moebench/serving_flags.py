"""What to tell a server so that it runs a backend's kernels: one table, each line read in the server's release that it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Server = Literal["vllm", "sglang"]
MODELS = ("gpt-oss-20b", "gpt-oss-120b")  # the only ones here whose checkpoints have MXFP4 experts, so what was read is theirs


@dataclass(frozen=True, kw_only=True)
class Flag:
    """How one release of a server is told to run one backend's kernels."""

    server: Server
    version: str
    backend: str
    archs: tuple[str, ...]
    flags: str  # for its command line, quoted for a shell
    source: str  # the file in that release
    note: str = ""
    ep_sizes: Literal["any", "1"] = "any"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The flags, or why there are none."""

    flags: str  # empty: none
    why: str  # empty where there are flags
    note: str = ""
    source: str = ""


VLLM = "vllm/model_executor/layers/fused_moe/oracle/mxfp4.py (map_mxfp4_backend) and vllm/config/kernel.py (MoEBackend)"
SGLANG = "sglang/srt/layers/quantization/mxfp4.py (Mxfp4MoEMethod) and sglang/srt/arg_groups/choices.py (MOE_RUNNER_BACKEND_CHOICES)"
SGLANG_GPT_OSS = "sglang/srt/arg_groups/model_overrides/gpt_oss.py and sglang/srt/arg_groups/model_hook.py"
SGLANG_PADS = "SGLang pads the hidden size 2880 to 3072 there, moebench to 2944: 4 % more weights than were timed"

# Read in the wheels on PyPI, not by starting a server. A release that is not here gets no flag: names and meanings have changed before
# (vLLM's environment variables for this are gone, and setting one changes nothing).
FLAGS: tuple[Flag, ...] = (
    Flag(
        server="vllm",
        version="0.33.0",
        backend="openai_triton_kernels",
        archs=("sm90", "sm100", "sm103"),
        flags="--moe-backend triton",
        source=VLLM,
        note="without expert parallelism vLLM's call includes top-k and softmax, which were not timed here",
    ),
    Flag(
        server="vllm",
        version="0.33.0",
        backend="cutlass_mxfp4_bf16",
        archs=("sm90",),
        flags="--moe-backend flashinfer_cutlass",
        source=VLLM,
    ),
    Flag(
        server="vllm",
        version="0.33.0",
        backend="cutlass_mxfp4_mxfp8",
        archs=("sm100", "sm103", "sm120", "sm121"),
        flags="""--moe-backend flashinfer_cutlass --quantization-config '{"moe": {"activation": "mxfp8"}}'""",
        source=VLLM,
        note="without the activation format vLLM asks for bf16, which these GPUs do not have there, and fails",
    ),
    Flag(
        server="vllm",
        version="0.33.0",
        backend="marlin_mxfp4_bf16",
        archs=("sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
        flags="--moe-backend marlin",
        source=VLLM,
    ),
    Flag(
        server="sglang",
        version="0.5.23",
        backend="openai_triton_kernels",
        archs=("sm90",),
        flags="--moe-runner-backend triton_kernel",
        source=SGLANG_GPT_OSS,
        ep_sizes="1",  # it asserts ep_size == 1 for gpt-oss
        note="needs the triton_kernels package beside it",
    ),
    Flag(
        server="sglang",
        version="0.5.23",
        backend="cutlass_mxfp4_bf16",
        archs=("sm90",),
        flags="--moe-runner-backend flashinfer_mxfp4",
        source=SGLANG,
        note=SGLANG_PADS,
    ),
    Flag(
        server="sglang",
        version="0.5.23",
        backend="cutlass_mxfp4_fp8",
        archs=("sm90",),
        flags="--moe-runner-backend flashinfer_mxfp4 --flashinfer-mxfp4-moe-precision fp8",
        source=SGLANG,
        note=SGLANG_PADS,
    ),
    Flag(
        server="sglang",
        version="0.5.23",
        backend="cutlass_mxfp4_mxfp8",
        archs=("sm120",),
        flags="--moe-runner-backend flashinfer_mxfp4",
        source=SGLANG,
        note=SGLANG_PADS,
    ),
    Flag(
        server="sglang",
        version="0.5.23",
        backend="marlin_mxfp4_bf16",
        archs=("sm80", "sm86", "sm89", "sm90"),
        flags="--moe-runner-backend marlin",
        source=SGLANG,
        note="SGLang has its own copy of Marlin, vLLM's was timed",
    ),
)


def versions(server: Server) -> tuple[str, ...]:
    """The releases that were read, oldest first."""
    return tuple(dict.fromkeys(flag.version for flag in FLAGS if flag.server == server))


def setting(server: Server, version: str, backend: str, *, model: str, arch: str, ep_size: int) -> Setting:
    """What makes that release run the backend's kernels."""
    release = f"{server} {version}"
    if version not in versions(server):
        return Setting(flags="", why=f"{release} was not read, only {', '.join(versions(server))}; another release may name it otherwise")
    if model not in MODELS:
        return Setting(flags="", why=f"only {' and '.join(MODELS)} have MXFP4 experts that {server} was read for")
    found = next((flag for flag in FLAGS if (flag.server, flag.version, flag.backend) == (server, version, backend)), None)
    if found is None:
        return Setting(flags="", why=f"{release} has no flag for it")
    if arch not in found.archs:
        return Setting(flags="", why=f"{release} runs it on {', '.join(found.archs)} only, as far as was read")
    if found.ep_sizes == "1" and ep_size > 1:
        return Setting(flags="", why=f"{release} refuses it with more than one expert-parallel rank")
    return Setting(flags=found.flags, why="", note=found.note, source=found.source)
