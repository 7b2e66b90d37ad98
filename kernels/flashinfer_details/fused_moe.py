"""One layer in FlashInfer's hands, as the call that is checked and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moebench.backend import ActDtype
from moebench.case import MODELS
from moebench.kernels.flashinfer_details.layout import zero_padded
from moebench.kernels.flashinfer_details.tuning import Subject, Tactics, tune
from moebench.kernels.flashinfer_details.versions import FlashInfer
from moebench.problem import Layer, Tokens

Facts = dict[str, str | int | float]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A layer as cutlass_fused_moe wants it: rows [up; gate], sizes padded, scales in the kernel's order."""

    w13: Tensor  # uint8 [E_local, 2 I, H/2], or the same bytes as int64 [E_local, 2 I, H/16]
    w2: Tensor  # uint8 [E_local, H, I/2], or int64 [E_local, H, I/16]
    b13: Tensor | None  # bf16 [E_local, 2 I]
    b2: Tensor | None  # bf16 [E_local, H]; both biases or none, FlashInfer looks at both where one is given
    quant_scales: tuple[Tensor, ...]
    alpha: Tensor | None  # fp32 [E_local], as are the next two; all None is plain SwiGLU
    beta: Tensor | None
    limit: Tensor | None
    hidden_size: int  # padded
    intermediate_size: int  # padded


Activations = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # bf16 [M, H padded] -> what the first GEMM reads, and its scales


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedMoe:
    """tokens -> bf16 [M, H], a view of [M, H padded]. Inside it: padding hidden states, quantizing them where the format asks for it,
    and one cutlass_fused_moe; the output is allocated, scratch is not.

    A batch with another top_k than seen before allocates its workspace at its first call, which must be outside a graph capture."""

    vendor: FlashInfer
    layer: Layer
    weights: Weights
    act_dtype: ActDtype
    activations: Activations
    flags: dict[str, bool]
    max_num_tokens: int
    tactics: Tactics
    facts: Facts
    padded: Tensor | None  # bf16 [max_num_tokens, H padded], zero right of H and never written there; None where H needs no padding
    workspaces: dict[int, Tensor] = field(default_factory=dict)  # uint8, by top_k

    def __call__(self, tokens: Tokens) -> Tensor:
        num_tokens, hidden_size = tokens.hidden_states.shape
        if num_tokens > self.max_num_tokens:
            raise ValueError(f"{num_tokens} tokens are more than the {self.max_num_tokens} that buffers and tactics were prepared for")
        out = tokens.hidden_states.new_empty(num_tokens, self.weights.hidden_size)
        if num_tokens:
            self._launch(tokens, out, self.tactics.ids(num_tokens, tokens.topk_ids.shape[1]))
        return out[:, :hidden_size]

    def _launch(self, tokens: Tokens, out: Tensor, profile_ids: list[int] | None) -> None:
        x, x_scales = self.activations(self._padded(tokens.hidden_states))
        w, layer = self.weights, self.layer
        self.vendor.fused_moe(
            input=x,
            token_selected_experts=tokens.topk_ids.contiguous(),  # read by address, strides are not looked at
            token_final_scales=tokens.topk_weights.contiguous(),
            fc1_expert_weights=w.w13,
            fc2_expert_weights=w.w2,
            output_dtype=torch.bfloat16,
            quant_scales=list(w.quant_scales),
            fc1_expert_biases=w.b13,
            fc2_expert_biases=w.b2,
            input_sf=x_scales,
            swiglu_alpha=w.alpha,
            swiglu_beta=w.beta,
            swiglu_limit=w.limit,
            tp_size=layer.tp_size,
            tp_rank=layer.tp_rank,  # FlashInfer adds b2 on rank 0 only, where our layers hold it: once over all ranks
            ep_size=layer.ep_size,
            ep_rank=layer.ep_rank,
            output=out,
            profile_ids=profile_ids,
            workspace_buffer=self._workspace(tokens.topk_ids.shape[1]),
            **self.flags,
        )

    def _padded(self, hidden_states: Tensor) -> Tensor:
        """One copy kernel; torch.nn.functional.pad would fill the columns with zeros again each call."""
        if self.padded is None:
            return hidden_states.contiguous()
        rows = self.padded[: hidden_states.shape[0]]
        rows[:, : hidden_states.shape[1]].copy_(hidden_states)
        return rows

    def _workspace(self, top_k: int) -> Tensor:
        if top_k not in self.workspaces:
            layer, w = self.layer, self.weights
            self.workspaces[top_k] = torch.empty(
                self.vendor.workspace_size(
                    self.max_num_tokens,
                    w.hidden_size,
                    w.intermediate_size,
                    layer.num_experts,
                    top_k,
                    x_dtype=torch.bfloat16 if self.act_dtype == "bf16" else torch.float8_e4m3fn,
                    weight_dtype=w.w13.dtype,
                    output_dtype=torch.bfloat16,
                    tp_size=layer.tp_size,
                    tp_rank=layer.tp_rank,
                    ep_size=layer.ep_size,
                    ep_rank=layer.ep_rank,
                    device=w.w13.device,
                    **{name: on for name, on in self.flags.items() if name != "swizzled_input_sf"},
                ),
                dtype=torch.uint8,
                device=w.w13.device,
            )
        return self.workspaces[top_k]


def fused_moe(
    vendor: FlashInfer,
    layer: Layer,
    weights: Weights,
    max_num_tokens: int,
    act_dtype: ActDtype,
    activations: Activations,
    flags: dict[str, bool],
) -> FusedMoe:
    """Untuned; its scratch for the top_k of the layer's model is allocated."""
    device = weights.w13.device
    padded = None
    if weights.hidden_size != layer.hidden_size:
        padded = torch.zeros(max(max_num_tokens, 1), weights.hidden_size, dtype=torch.bfloat16, device=device)
    call = FusedMoe(
        vendor=vendor,
        layer=layer,
        weights=weights,
        act_dtype=act_dtype,
        activations=activations,
        flags=flags,
        max_num_tokens=max(max_num_tokens, 1),
        tactics=Tactics(top_k=usual_top_k(layer)),
        facts={
            "flashinfer": vendor.version,
            "padded_hidden": weights.hidden_size,
            "padded_intermediate": weights.intermediate_size,
            "tuned": "no",
            "tactics": "default",
        },
        padded=padded,
    )
    call._workspace(call.tactics.top_k)
    return call


def noted(call: FusedMoe, **facts: str | int | float) -> FusedMoe:
    """The same call with more facts."""
    return replace(call, facts={**call.facts, **facts})


def tuned(call: FusedMoe) -> FusedMoe:
    """The same call with measured tactics, and with what measuring them took in its facts."""
    layer, w = call.layer, call.weights
    device = w.w13.device
    subject = Subject(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        flashinfer=call.vendor.version,
        cuda=torch.version.cuda or "none",
        act_dtype=call.act_dtype,
        num_local_experts=layer.num_local_experts,
        hidden_size=w.hidden_size,
        intermediate_size=w.intermediate_size,
        top_k=call.tactics.top_k,
        ep_size=layer.ep_size,
        tp_size=layer.tp_size,
        bias=w.b13 is not None,
    )
    found = tune(call.vendor, subject, call.max_num_tokens, lambda: _probe(call))
    return noted(
        replace(call, tactics=found.tactics),
        tuned="yes",
        tuned_tokens=max(found.tactics.by_bucket),
        tuned_top_k=found.tactics.top_k,
        tuning_s=found.seconds,
        tuning_cold_s=found.cold_seconds,
        tuning_cache=found.cache,
        tuning_file=found.path.name,  # its folder is this user's; a run is for others too
        tactics=str(found.tactics),
    )


def vectors(layer: Layer) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """alpha, beta, limit: fp32, one entry a local expert (FlashInfer checks the number), or None for what FlashInfer does by itself."""
    constants = layer.swiglu

    def filled(value: float | None) -> Tensor | None:
        if value is None:
            return None
        return torch.full((layer.num_local_experts,), value, dtype=torch.float32, device=layer.w13.codes.device)

    if constants.alpha == 1.0 and constants.beta == 0.0 and constants.limit is None:
        return None, None, None  # any vector selects the other kernel, SwigluBias
    return filled(constants.alpha), filled(constants.beta), filled(constants.limit)


def usual_top_k(layer: Layer) -> int:
    """Of the preset with these sizes, else 4: weights say nothing of how many of them a token takes."""
    same = [m.top_k for m in MODELS.values() if (m.hidden_size, m.num_experts) == (layer.hidden_size, layer.num_experts)]
    return min(same[0] if same else 4, layer.num_experts)


def _probe(call: FusedMoe) -> None:
    """One token for this rank's first experts; the autotuner makes its own batches of every bucket."""
    layer, top_k = call.layer, call.tactics.top_k
    device = call.weights.w13.device
    tokens = Tokens(
        hidden_states=torch.zeros(1, layer.hidden_size, dtype=torch.bfloat16, device=device),
        topk_ids=(torch.arange(top_k, dtype=torch.int32, device=device) + layer.local_expert_start)[None] % layer.num_experts,
        topk_weights=torch.full((1, top_k), 1 / top_k, dtype=torch.float32, device=device),
    )
    out = zero_padded(tokens.hidden_states, call.weights.hidden_size)
    call._launch(tokens, out, None)
