"""The one interface a kernel implements to be benchmarked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args, runtime_checkable

if TYPE_CHECKING:  # this module is imported where torch is not installed
    from pathlib import Path

    from torch import Tensor

    from moebench.case import Case
    from moebench.compiled import Compiled
    from moebench.device import Device
    from moebench.problem import Layer, Tokens

# What the inputs of both GEMMs are rounded to. mxfp8: E4M3 in blocks of 32 whose E8M0 scale is rounded up, so that nothing
# saturates (FlashInfer, TensorRT-LLM); mxfp8_ocp: scale rounded down as OCP MX v1.0 says, values above 448 saturate; fp8: E4M3 with
# one float32 scale a row, taken from the row's largest element at run time (FlashInfer's W4A8 on Hopper); fp8_pow2: E4M3 with a power
# of two for each row of hidden states, and one for all of h where the activation's limit bounds it (our W4A8 on Hopper).
ActDtype = Literal["bf16", "mxfp8", "mxfp8_ocp", "fp8", "fp8_pow2"]
ACT_DTYPES: tuple[ActDtype, ...] = get_args(ActDtype)

Experts = Callable[["Tokens"], "Tensor"]  # what prepare returns


class Backend(Protocol):
    """One way to compute the local experts of an MoE layer.

    A backend may also have, as plain attributes that need not be there:
    kernel_pattern, a regular expression that the name of one GPU kernel of a call must match, else the row is wrong;
    computes_on_cpu = True, wherever its tensors are: its time is the host clock's;
    deterministic = False, where two calls on the same tokens may differ in their bits, because sums are taken in the order in which
    blocks finish: each checked call must then be within tolerance, and the record says how many elements differed;
    and, on the call that prepare returns, facts: a dict of str, int and float that goes into the record."""

    @property
    def name(self) -> str: ...  # "cutlass_mxfp4_bf16"; unique and stable, baselines use it

    @property
    def act_dtype(self) -> ActDtype: ...

    def unsupported(self, case: Case, device: Device) -> str | None:
        """The reason this backend cannot run `case` on `device`, with what would change that, or None if it can.

        Called where torch may not be installed: it looks at facts and imports no vendor library."""
        ...

    def prepare(self, layer: Layer, max_num_tokens: int) -> Experts:
        """Convert weights, size workspaces and tune up to max_num_tokens, as a server does at start; the weight layout may
        not depend on it.

        Returns the call that is checked and timed: it enqueues on the current stream, never synchronizes, leaves its tokens
        alone, and returns bf16 [M, H], the weighted sum over this rank's experts only."""
        ...


@dataclass(frozen=True, kw_only=True)
class BuildStep:
    """One unit of a module was compiled."""

    module: str
    done: int  # of total, with what earlier runs did
    total: int
    what: str  # the unit, "90_cutlass_kernel_file_gemm_grouped_sm90_M128_Mixed_group39.generated"


@dataclass(frozen=True, kw_only=True)
class BuildState:
    """A module that a vendor library compiles: once before it is compiled, and once when it is there."""

    module: str  # "fused_moe_90"
    arch: str
    path: str  # the library that is there when done == total
    done: int
    total: int
    ship: tuple[str, ...] = ()  # sentences: how another machine gets it


class CannotBuild(Exception):
    """Nothing was compiled; the message says why, and what would change that."""


class BuildFailed(Exception):
    """A unit does not compile; the message names it and the log."""


@runtime_checkable
class Prebuilds(Protocol):
    """What a backend has besides, where its vendor library compiles at the first call."""

    def prebuild(self, archs: Sequence[str], jobs: int | None, dry_run: bool) -> Iterator[BuildStep | BuildState]:
        """Compile it now, through the vendor's own build interface and with what earlier runs did; needs no GPU.

        No archs: the only one it compiles for, or this machine's. No jobs: as many at once as the vendor takes. A dry run yields the
        states and compiles nothing. Raises CannotBuild or BuildFailed; closing the iterator stops the compilers."""
        ...


@runtime_checkable
class Compiles(Protocol):
    """What a backend has besides, where its kernels can be compiled for a GPU that is not here."""

    def compiled(self, arch: str) -> Iterator[Compiled]:
        """Every kernel of every configuration that it ships for `arch`, such as "sm90", as its compiler here makes it; needs no GPU.

        Called in a process of its own. Raises CannotBuild where this backend has nothing for the architecture or a tool is missing,
        and BuildFailed where a kernel does not compile."""
        ...


Choice = str  # one way to run a regime, in the words of its backend: shown to people, and given back to it


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Calls that run alike, and the choice that a backend's table makes for them."""

    name: str  # "up to 64 pairs an expert"; unique within its table
    tokens: tuple[int, ...]  # counts of the case that was asked about, by whose times choices are judged
    choice: Choice


@runtime_checkable
class Tunable(Protocol):
    """What a backend has besides, where `moebench tune` may rewrite the table that it chooses from."""

    @property
    def table_path(self) -> Path:
        """The table that it ships; one that lies at `moebench.tuned.tuned_path(name)` it uses instead."""
        ...

    def regimes(self, case: Case, arch: str) -> Sequence[Regime]:
        """Of the table that it would use now, those that calls of a layer like the case's fall into, whatever their token count."""
        ...

    def alternatives(self, choice: Choice, arch: str) -> Sequence[Choice]:
        """What to try instead; asked again about each choice that was better."""
        ...

    def prepare_choices(self, layer: Layer, max_num_tokens: int) -> Callable[[Choice], Experts]:
        """As `prepare`, once for all choices. The call of a choice compiles nothing more after it was made once for a token count."""
        ...

    def table(self, text: str, arch: str, chosen: Mapping[str, Choice]) -> str:
        """The text of a table file for `arch` with the choice of each regime named, all else as in `text`, which may be empty."""
        ...
