"""A stand-in for FlashInfer 0.7.2.post1 that refuses what its binding refuses and computes from the bytes it is given.

Read for it: fused_moe/core.py and prepare.py, autotuner/autotuner.py, quantization/fp8_quantization.py,
flashinfer_cutlass_fused_moe_binding.cu (runMoe, getQuantParams, getWorkspaceInfo, setRunnerProfiles), cutlass_fused_moe_kernels.cuh
(doGatedActivationKernel, SwigluBiasAdaptor, finalize) and moe_gemm_mixed_utils.cu (the weight interleave, reproduced here bit for bit).
What the binding does not check is not checked here either: quant_scales on the sm90 path, input_sf, the width and the strides of the
input, the strides of ids and router weights. Those are read as a kernel reads them, from an address on, in the layout it expects.

Nothing is imported from moebench: layouts, formats and activation are written here a second time. It runs on a CPU."""

import contextlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
GEMM1_TACTICS, GEMM2_TACTICS = 40, 44
OPS = ("trtllm::fused_moe::gemm1", "trtllm::fused_moe::gemm2")
# Source bit -> destination bit in the 32-bit words of the sm90 FP4 interleave; interleave_fp4_weights_for_sm90_mixed_gemm_kernel has
# them as 16 masks and shifts: (lowest source bit, number of bits, left shift).
BIT_MOVES = (
    *((7, 1, 24), (4, 3, 18), (3, 1, 12), (0, 3, 6)),
    *((15, 1, 13), (12, 3, 7), (11, 1, 1), (8, 3, -5)),
    *((23, 1, 2), (20, 3, -4), (19, 1, -10), (16, 3, -16)),
    *((31, 1, -1), (28, 1, 1), (29, 2, -3), (27, 1, -13), (24, 1, -11), (25, 2, -15)),
)


class Refused(RuntimeError):
    """What TVM_FFI_ICHECK throws."""


class OutOfBounds(RuntimeError):
    """Where a GPU would read what is not the tensor's, or fault."""


def require(condition, message):
    if not condition:
        raise Refused(message)


def memory(tensor, shape, dtype):
    """What a kernel sees that was given the tensor's address and takes it for a contiguous one of this shape and type."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    first = tensor.storage_offset() * tensor.element_size()
    if first + count > storage.numel():
        raise OutOfBounds(f"{count} bytes are read at an address behind which {storage.numel() - first} lie")
    return storage[first : first + count].clone().view(dtype).reshape(shape)


# ---- layouts and formats


def move_bits(words, inverse=False):
    """int64 words below 2^32."""
    out = torch.zeros_like(words)
    for first, number, shift in BIT_MOVES:
        source, target = (first + shift, first) if inverse else (first, first + shift)
        out |= (words >> source & (1 << number) - 1) << target
    return out


def _sites(n, width):
    """Of each word of an interleaved [n, width] matrix: where its 4 bytes come from and go to, flat, [words, 4] each."""
    row, column = torch.meshgrid(torch.arange(n), torch.arange(0, width, 4), indexing="ij")
    row, column = row.flatten(), column.flatten()
    mma = column % 32 // 16 * 2 + row % 16 // 8  # the words of MMA fragments 0 and 2 are in the first 8 rows of 16, 1 and 3 below
    source_row = row // 16 * 16 + row % 8
    source_column = column // 32 * 32 + mma * 8 + column % 16 // 4
    source = torch.stack([(source_row + 8 * (b % 2)) * width + source_column + 4 * (b // 2) for b in range(4)], -1)
    return source, (row * width + column)[:, None] + torch.arange(4)


def interleave(weight):
    """uint8 [E, n, K/2]; n % 16 and K % 64 must be 0."""
    out = torch.empty_like(weight)
    source, target = _sites(*weight.shape[1:])
    place = torch.tensor([1, 2**8, 2**16, 2**24])
    for flat, result in zip(weight.flatten(1), out.view(len(out), -1), strict=True):
        words = move_bits((flat[source].long() * place).sum(-1))
        result[target] = (words[:, None] // place % 256).to(torch.uint8)
    return out


def deinterleave(weight):
    out = torch.empty_like(weight)
    source, target = _sites(*weight.shape[1:])
    place = torch.tensor([1, 2**8, 2**16, 2**24])
    for flat, result in zip(weight.flatten(1), out.view(len(out), -1), strict=True):
        words = move_bits((flat[target].long() * place).sum(-1), inverse=True)
        result[source] = (words[:, None] // place % 256).to(torch.uint8)
    return out


def folded_address(n, g, groups):
    """Of scale (n, g) of one expert on sm90, FlashInfer >= 0.6.16."""
    return ((n // 64) * (groups // 4) + g // 4) * 256 + n % 16 * 16 + n % 64 // 16 * 4 + g % 4


def transposed_address(n, g, groups, rows):
    """Of scale (n, g) on sm90 in FlashInfer 0.6.10 to 0.6.15: [K/128, N * 4]."""
    return g // 4 * rows * 4 + n * 4 + g % 4


def swizzled_address(n, g, groups):
    """Of scale (n, g) of one matrix on sm100 and newer."""
    return n // 128 * (-(-groups // 4) * 512) + g // 4 * 512 + n % 32 * 16 + n % 128 // 32 * 4 + g % 4


def gathered(flat, address, rows, groups):
    """[E, rows, groups] of flat bytes [E, bytes]."""
    n, g = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
    return flat[:, address(n, g)]


def numbers(codes, scale):
    """fp32 [.., N, K] of packed codes and fp32 factors [.., N, K/32]."""
    values = torch.stack((E2M1[(codes % 16).long()], E2M1[(codes // 16).long()]), -1).flatten(-2)
    return values * scale.repeat_interleave(32, -1)


def power(scales):
    return torch.pow(2.0, scales.double() - 127).float()


def quantized(x):
    """E4M3 [M, K] and E8M0 [M, K/32], the scale rounded up, all-zero blocks with scale 0."""
    blocks = x.float().reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    mantissa, exponent = torch.frexp(blocks.abs().amax(-1) / 448)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    scales = torch.where(mantissa == 0, 0, (exponent + 127).clamp(0, 254))
    codes = (blocks / power(scales)[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.reshape(x.shape), scales.to(torch.uint8)


def dequantized(codes, scales):
    return codes.float() * power(scales).repeat_interleave(32, -1)


# ---- the library


class StandIn:
    """calls: the arguments of each cutlass_fused_moe, with "tuning" and "tactics" added; tuned: (gemm, bucket) in order of tuning."""

    def __init__(self, arch, kernel_scales="folded", untunable=()):
        self.arch, self.kernel_scales, self.untunable = arch, kernel_scales, frozenset(untunable)
        self.calls, self.tuned, self.profiling_cache, self.active = [], [], {}, []
        self.warmup, self.repeat = 3, 10  # the autotuner's defaults

    def install(self, monkeypatch, directory, version="0.7.2.post1"):
        """Puts `flashinfer` where import finds it, as a package without metadata whose version is in its own file."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "_build_meta.py").write_text(f'"""Build metadata."""\n__version__ = "{version}"\n')
        package, moe, tuner = (ModuleType(name) for name in ("flashinfer", "flashinfer.fused_moe", "flashinfer.autotuner"))
        package.__spec__ = ModuleSpec("flashinfer", None, origin=str(directory / "__init__.py"), is_package=True)
        package.mxfp8_quantize = self.mxfp8_quantize
        moe.cutlass_fused_moe = self.cutlass_fused_moe
        moe.cutlass_fused_moe_workspace_size = self.cutlass_fused_moe_workspace_size
        moe.interleave_moe_weights_for_sm90_mixed_gemm = self.interleave_moe_weights_for_sm90_mixed_gemm
        moe.interleave_moe_scales_for_sm90_mixed_gemm = self.interleave_moe_scales_for_sm90_mixed_gemm
        tuner.autotune = self.autotune
        tuner.AutoTuner = type("AutoTuner", (), {"get": staticmethod(lambda: self)})
        for module in (package, moe, tuner):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return self

    # -- preparation

    def interleave_moe_weights_for_sm90_mixed_gemm(self, weight, quant_type="fp4"):
        if weight.dim() != 3 or weight.dtype != torch.uint8 or quant_type not in ("fp4", "fp4_fp8", "int4"):
            raise ValueError("weight must be uint8 (num_experts, n, k/2)")
        require(weight.shape[1] % 16 == 0, "weight n dimension must be divisible by 16 for SM90 mixed-gemm interleave")
        require(weight.shape[2] * 2 % 64 == 0, "logical K dimension must be divisible by 64 for SM90 mixed-gemm interleave")
        assert quant_type == "fp4", "the other two are of other kernels"
        return interleave(weight.contiguous())

    def interleave_moe_scales_for_sm90_mixed_gemm(self, scales, group_size=32):
        num_experts, rows, groups = scales.shape
        assert scales.dtype == torch.uint8
        assert group_size == 32
        if rows % 64:
            raise ValueError(f"scale rows={rows} must be divisible by 64")
        if groups % 4:
            raise ValueError(f"K/group_size={groups} must be divisible by scale groups per K128 block 4")
        n, g = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
        out = torch.empty(num_experts, rows * groups, dtype=torch.uint8)
        out[:, folded_address(n, g, groups).flatten()] = scales.flatten(1)
        return out.reshape(num_experts, rows // 64, groups // 4, 16, 16)

    def mxfp8_quantize(self, input, is_sf_swizzled_layout=True, alignment=32, enable_pdl=None, backend="cuda", sf_swizzle_layout=None):
        assert input.shape[-1] % 32 == 0
        assert input.is_contiguous()
        m, k = input.shape
        padded = torch.zeros(m, -(-k // alignment) * alignment, dtype=input.dtype)
        padded[:, :k] = input
        codes, scales = quantized(padded)
        if self.arch == "sm90":  # the bodies of the conversions are compiled for sm100 and newer, and return 0 elsewhere
            codes, scales = torch.zeros_like(codes), torch.zeros_like(scales)
        if not is_sf_swizzled_layout:
            return codes, scales.flatten()
        groups = scales.shape[1]
        flat = torch.zeros(-(-m // 128) * 128 * -(-groups // 4) * 4, dtype=torch.uint8)
        n, g = torch.meshgrid(torch.arange(m), torch.arange(groups), indexing="ij")
        flat[swizzled_address(n, g, groups).flatten()] = scales.flatten()
        return codes, flat

    def cutlass_fused_moe_workspace_size(
        self,
        max_num_tokens,
        hidden_size,
        intermediate_size,
        num_experts_total,
        top_k,
        *,
        x_dtype,
        weight_dtype,
        output_dtype=torch.bfloat16,
        activation_type=3,
        tp_size=1,
        tp_rank=0,
        ep_size=1,
        ep_rank=0,
        min_latency_mode=False,
        use_deepseek_fp8_block_scale=False,
        use_w4_group_scaling=False,
        use_mxfp8_act_scaling=False,
        use_fused_finalize=True,
        use_packed_weights=False,
        use_wfp4afp8_humming=False,
        device=None,
        backend="cutlass",
    ):
        if min(max_num_tokens, hidden_size, intermediate_size, num_experts_total, top_k, tp_size, ep_size) <= 0:
            raise ValueError("sizes must be positive")
        if not (0 <= tp_rank < tp_size and 0 <= ep_rank < ep_size) or num_experts_total % ep_size:
            raise ValueError("ranks must be in range and experts divide over them")
        self.kernel(x_dtype, weight_dtype, use_w4_group_scaling, use_mxfp8_act_scaling)
        return scratch(max_num_tokens, hidden_size, intermediate_size, num_experts_total, top_k)

    # -- tuning

    @contextlib.contextmanager
    def autotune(self, tune_mode=True, cache=None, tuning_buckets=None, round_up=None, skip_ops=None, cuda_graph_profile_replays=None):
        if tuning_buckets is not None and not tuning_buckets:
            raise ValueError("tuning_buckets must contain at least one value when provided")
        self.active.append((tune_mode, tuple(sorted(set(tuning_buckets or ()))), bool(round_up)))
        try:
            yield
        finally:
            self.active.pop()

    def clear_cache(self):
        self.profiling_cache.clear()

    def choose(self, gemm, shapes):
        """-1 outside of tuning, where nothing was tuned; the stand-in's winner of a bucket is its own number."""
        assert self.active, "an untuned call without profile_ids would ask the autotuner in the timed region"
        _, buckets, round_up = self.active[-1]
        for bucket in buckets:
            if bucket not in self.untunable:
                self.tuned.append((gemm, bucket))
                key = Key(OPS[gemm - 1], ((bucket, shapes[0][1]), *shapes[1:]))
                self.profiling_cache[key] = (winner(gemm, bucket), None)
        fitting = [bucket for bucket in buckets if bucket >= shapes[0][0]] if round_up else []
        return winner(gemm, min(fitting, default=max(buckets)))

    # -- the call

    def kernel(self, x, weight, w4_group, mxfp8):
        """Which of the binding's runners these types and flags select; only the two of MXFP4 weights are made here."""
        if weight == torch.int64 and x != torch.float8_e4m3fn:
            return "nvfp4"
        if weight == torch.int64 and self.arch != "sm90":
            return "w4a8_mxfp8" if mxfp8 else "w4a8_fp8"
        if w4_group and x == torch.bfloat16 and weight == torch.uint8:
            require(self.arch == "sm90", "No valid tactics available for fused moe op with the requested input combination")
            return "w4a16"
        raise Refused(f"Could not construct fused moe op with the requested input combination Activation: {x}, Weight: {weight}")

    def cutlass_fused_moe(
        self,
        input,
        token_selected_experts,
        token_final_scales,
        fc1_expert_weights,
        fc2_expert_weights,
        output_dtype,
        quant_scales,
        fc1_expert_biases=None,
        fc2_expert_biases=None,
        input_sf=None,
        swiglu_alpha=None,
        swiglu_beta=None,
        swiglu_limit=None,
        tp_size=1,
        tp_rank=0,
        ep_size=1,
        ep_rank=0,
        cluster_size=1,
        cluster_rank=0,
        output=None,
        enable_alltoall=False,
        use_deepseek_fp8_block_scale=False,
        use_w4_group_scaling=False,
        use_mxfp8_act_scaling=False,
        min_latency_mode=False,
        use_packed_weights=False,
        use_wfp4afp8_humming=False,
        tune_max_num_tokens=8192,
        enable_pdl=None,
        activation_type=3,
        swizzled_input_sf=True,
        use_fused_finalize=True,
        profile_ids=None,
        workspace_buffer=None,
        *,
        clamped_relu2_limit=None,
        situ_beta=None,
        situ_linear_beta=None,
        backend="cutlass",
    ):
        self.calls.append({name: value for name, value in locals().items() if name != "self"} | {"tuning": bool(self.active)})
        others = (enable_alltoall, use_deepseek_fp8_block_scale, min_latency_mode, use_packed_weights, use_wfp4afp8_humming)
        assert not any(others), "flags of other paths"
        assert clamped_relu2_limit is situ_beta is situ_linear_beta is None
        assert (backend, activation_type) == ("cutlass", 3)

        w13, w2, b13, b2 = fc1_expert_weights, fc2_expert_weights, fc1_expert_biases, fc2_expert_biases
        kernel = self.kernel(input.dtype, w13.dtype, use_w4_group_scaling, use_mxfp8_act_scaling)
        if output is None:
            output = torch.empty(input.shape[0], w2.shape[1], dtype=output_dtype)
        if tuple(output.shape) != (input.shape[0], w2.shape[1]) or output.dtype != output_dtype:
            raise ValueError(f"output must be {output_dtype} {(input.shape[0], w2.shape[1])}")
        shapes = [tuple(t.shape) if t is not None else (0,) for t in (input, w13, b13, w2, b2)]
        tactics = [self.choose(1, shapes), self.choose(2, shapes)] if profile_ids is None else profile_ids
        if len(tactics) != 2:
            raise ValueError("profile_ids must contain [gemm1_profile, gemm2_profile]")
        self.calls[-1]["tactics"] = list(tactics)

        # runMoe
        require(cluster_size == 1 and cluster_rank == 0, "smart_router is supported in min_latency mode")
        require(token_selected_experts.dtype == torch.int32, "Inconsistency of Tensor type: token_selected_experts")
        require(token_final_scales is None or token_final_scales.dtype == torch.float32, "Inconsistency of Tensor type: token_final_scales")
        require(w2.dtype == w13.dtype, "Inconsistency of Tensor type: fc2_expert_weights")
        require(input.dim() == 2 and token_selected_experts.dim() == 2 and w13.dim() == w2.dim() == 3, "dimensions")
        if b13 is not None or b2 is not None:
            require(b13 is not None and b2 is not None, "bad optional access: both biases are looked at where one is given")
            require(b13.dtype == b2.dtype == output_dtype, "Inconsistency of Tensor type: biases have the output's")
            require(b13.dim() == b2.dim() == 2, "biases have 2 dimensions")
            require(b13.shape[0] == w13.shape[0] and b2.shape[0] == w2.shape[0], "weights and biases must have the same number of experts.")
            require(b13.shape[1] == w13.shape[1], "fc1_expert_biases should match fc1_expert_weights output shape.")
            require(b2.shape[1] == w2.shape[1], "fc2_expert_biases should match fc2_expert_weights output shape.")
        m, top_k = token_selected_experts.shape
        require(input.shape[0] == m, "input and token_selected_experts must have the same num tokens.")
        if token_final_scales is not None:
            require(tuple(token_final_scales.shape) == (m, top_k), "token_selected_experts and token_final_scales must agree.")
        require(w13.shape[0] == w2.shape[0], "fc1_expert_weights and fc2_expert_weights must have the same number of experts.")
        codes_per_word = 2 if w13.dtype == torch.uint8 else 16
        num_experts, h, i = w2.shape[0], w2.shape[1], w2.shape[2] * codes_per_word
        require(w13.shape[1] == 2 * i, "fc1_expert_weights inter size must be 2 times fc2_expert_weights inter size.")
        multiple = 128 if kernel.startswith("w4a8") else 16
        require(h % multiple == 0, f"hidden_size must be divisible by {multiple} for MXFP4 weights")
        require(i % multiple == 0, f"inter_size must be divisible by {multiple} for MXFP4 weights")
        constants = {"alpha": swiglu_alpha, "beta": swiglu_beta, "limit": swiglu_limit}
        for name, vector in constants.items():
            if vector is not None:
                require(vector.dtype == torch.float32 and vector.is_contiguous(), f"Inconsistency of Tensor type: swiglu_{name}")
                require(tuple(vector.shape) == (num_experts,), f"swiglu_{name} must have {num_experts} element(s).")
        first, second = tactics
        require(-1 <= first < GEMM1_TACTICS, f"Invalid gemm1 profile id: {first}")
        require(second == -1 or GEMM1_TACTICS <= second < GEMM1_TACTICS + GEMM2_TACTICS, f"Invalid gemm2 profile id: {second}")
        if workspace_buffer is not None:  # its alignment is not checked: a CPU allocator gives 64 bytes
            require(workspace_buffer.dtype in (torch.int8, torch.uint8) and workspace_buffer.dim() == 1, "workspace_buffer dtype")
            require(workspace_buffer.is_contiguous(), "workspace_buffer must be contiguous")
            require(workspace_buffer.numel() >= scratch(m, h, i, num_experts * ep_size, top_k), "workspace_buffer too small")

        # getQuantParams, then what the kernels find at the addresses
        if kernel == "nvfp4":
            require(len(quant_scales) == 6, "Expecting 6 quant scales for nvfp4 quantization")
        if kernel == "w4a8_fp8":
            require(len(quant_scales) == 5, "Expecting 5 quant scales for post-MMA MXFP4 x FP8 quantization")
        assert kernel in ("w4a16", "w4a8_mxfp8"), "not modelled"
        if kernel == "w4a16":
            require(len(quant_scales) == 2, "Expecting 2 quant scales for W4A16 quantization")
            x, round_h = memory(input, (m, h), torch.bfloat16).float(), lambda act: act
            w13, w2 = (self._sm90_weights(w, s, n, k) for w, s, n, k in ((w13, quant_scales[0], 2 * i, h), (w2, quant_scales[1], h, i)))
        else:
            require(len(quant_scales) == 4, "Expecting 4 quant scales for W4A8_MXFP4_MXFP8 quantization")
            for scale, ones, n, k in ((*quant_scales[:2], 2 * i, h), (*quant_scales[2:], h, i)):
                require(scale.dtype == torch.int32 and ones.dtype == torch.float32, "Inconsistency of Tensor type: quant scales")
                require(tuple(scale.shape) == (num_experts, n, k // 128), "weight block size must be (num_experts_on_rank, n, k // 128)")
                require(tuple(ones.shape) == (num_experts,), "global size must be (num_experts_on_rank,)")
            x = self._activations(input, input_sf, swizzled_input_sf, m, h)
            round_h = lambda act: dequantized(*quantized(act))  # noqa: E731
            w13, w2 = (
                self._sm100_weights(w, s, ones, n, k)
                for w, s, ones, n, k in ((w13, *quant_scales[:2], 2 * i, h), (w2, *quant_scales[2:], h, i))
            )
        ids, router = memory(token_selected_experts, (m, top_k), torch.int32), torch.ones(m, top_k)
        if token_final_scales is not None:
            router = memory(token_final_scales, (m, top_k), torch.float32)
        b13, b2 = (None if b is None else memory(b, tuple(b.shape), torch.bfloat16).float() for b in (b13, b2))
        result = torch.zeros(m, h)
        for expert in range(num_experts):
            token, slot = (ids == ep_rank * num_experts + expert).nonzero(as_tuple=True)
            y = (x[token] @ w13[expert].T).bfloat16().float()
            if b13 is not None:
                y = y + b13[expert]
            act = round_h(gated(y, i, {name: v if v is None else v[expert] for name, v in constants.items()}).bfloat16().float())
            z = (act @ w2[expert].T).bfloat16().float()
            if b2 is not None and tp_rank == 0:
                z = z + b2[expert]
            result.index_add_(0, token, z * router[token, slot, None])
        output.copy_(result.bfloat16())
        return [output, torch.empty(1, dtype=torch.int32), torch.empty(num_experts, m), torch.empty(num_experts, dtype=torch.int32)]

    def _sm90_weights(self, weight, scale, n, k):
        codes = deinterleave(memory(weight, (weight.shape[0], n, k // 2), torch.uint8))
        flat = memory(scale, (weight.shape[0], n * k // 32), torch.uint8)
        address = {
            "folded": lambda row, group: folded_address(row, group, k // 32),
            "transposed": lambda row, group: transposed_address(row, group, k // 32, n),
        }[self.kernel_scales]
        scales = gathered(flat, address, n, k // 32)
        factors = torch.where(scales == 0, torch.zeros(()), power(scales))  # the kernel shifts the byte into an exponent: 0 is zero
        return numbers(codes, factors)

    def _sm100_weights(self, weight, scale, ones, n, k):
        codes = memory(weight, (weight.shape[0], n, k // 2), torch.uint8)
        flat = memory(scale, (weight.shape[0], n * k // 32), torch.uint8)
        scales = gathered(flat, lambda row, group: swizzled_address(row, group, k // 32), n, k // 32)
        return numbers(codes, power(scales)) * memory(ones, (weight.shape[0],), torch.float32)[:, None, None]

    def _activations(self, codes, scales, swizzled, m, k):
        if scales is None:
            raise OutOfBounds("input_sf is a null pointer")
        codes = memory(codes, (m, k), torch.float8_e4m3fn)
        if not swizzled:
            return dequantized(codes, memory(scales, (m, k // 32), torch.uint8))
        flat = memory(scales, (1, -(-m // 128) * 128 * (k // 32)), torch.uint8)
        return dequantized(codes, gathered(flat, lambda row, group: swizzled_address(row, group, k // 32), m, k // 32)[0])


class Key:
    """ProfilingCacheKey, as far as it is looked at."""

    def __init__(self, custom_op, nearest_profile):
        self.custom_op, self.nearest_profile = custom_op, nearest_profile


def winner(gemm, bucket):
    """A tactic that tells which bucket it was chosen for."""
    number = bucket.bit_length()
    return number if gemm == 1 else GEMM1_TACTICS + number


def scratch(num_tokens, hidden_size, intermediate_size, num_experts, top_k):
    """Not FlashInfer's formula, but it grows in the same sizes."""
    return 2 * num_tokens * top_k * (2 * hidden_size + 3 * intermediate_size) + 8 * num_experts + 4 * num_tokens * top_k


def gated(y, i, constants):
    """First half up, second gate; a vector of any kind selects the clamped kernel."""
    up, gate = y[:, :i], y[:, i:]
    if all(value is None for value in constants.values()):
        return gate * torch.sigmoid(gate) * up
    alpha = 1.0 if constants["alpha"] is None else constants["alpha"]
    beta = 0.0 if constants["beta"] is None else constants["beta"]
    limit = torch.tensor(torch.inf) if constants["limit"] is None else constants["limit"]
    gate, up = torch.minimum(gate, limit), torch.maximum(torch.minimum(up, limit), -limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)
