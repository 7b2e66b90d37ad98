"""Profiles for tests and for a picture: kernel names as one H200 gave them, times that were made up.

`python -m tests.profiles FILE.svg` draws them."""

import sys
from pathlib import Path

from moebench.case import case
from moebench.device import Device
from moebench.profile import view
from moebench.reports import breakdown
from moebench.routing import assign, realized
from moebench.timeline import Event, Profile

CASE = case("gpt-oss-20b", 64)
H200 = Device(arch="sm90", name="NVIDIA H200", torch="cuda:0", memory_bytes=150_109_880_320, l2_bytes=62_914_560, num_sms=132)
MADE_UP = "synthetic: kernel names of an H200, times made up"

TRTLLM = "tensorrt_llm::kernels::cutlass_kernels::"
TILE_MAP = "_ZN12tensorrt_llm7kernels19cutlass_kernels_oss6detail38build_precomputed_work_tile_map_kernelILi64ELi16ELi1ELi1ELb0ELb0EN4cute5tupleIJiiiEEEN7cutlass4gemm10collective28CollectiveMmaArrayMixedInputINS8_49MainloopSm90ArrayTmaGmmaWarpSpecializedMixedInputILi24ENS"  # noqa: E501
GROUPED = "_ZN7cutlass13device_kernelINS_4gemm6kernel33GemmUniversalPrecomputedSchedulerINS1_17GroupProblemShapeIN4cute5tupleIJiiiEEEEENS1_10collective28CollectiveMmaArrayMixedInputINS1_49MainloopSm90ArrayTmaGmmaWarpSpecializedMixedInputILi24ENS6_IJNS5_1CILi1EEESD_SD_EEE"  # noqa: E501
COPY = "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}>"  # noqa: E501
MARLIN = "void marlin_moe_wna16::Marlin<1125899906909960l, 562949953487106l, 1125899906909960l, 2814749767106568l, 128, 1, 8, 4, true, 4, 2, false>(int4 const*)"  # noqa: E501
SWIGLU = "void vllm::swigluoai_and_mul_kernel<c10::BFloat16, &(c10::BFloat16 vllm::swigluoai_and_mul<c10::BFloat16>)>(c10::BFloat16*, int, float, float)"  # noqa: E501
REDUCE = "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16, at::native::func_wrapper_t<c10::BFloat16>>>"
OURS = (("sort_pairs", 3_100), ("gate_up_kernel", 96_000), ("down_kernel", 59_000), ("add_slots", 4_200))
OPENAI = (
    ("pack_kernel", 2_000),
    ("_sum_bitmatrix_memset", 1_300),
    ("_sum_bitmatrix_rows", 2_100),
    ("_combined_routing_memset", 1_600),
    ("_combined_routing_compute", 3_000),
    ("_matmul_ogs_NNT_bf16xbf16xmxfp4_16x256x128x1_swiglu", 105_000),
    ("_matmul_ogs_NNT_bf16xbf16xmxfp4_16x256x128x1", 63_000),
    ("_reduce_grouped", 4_400),
)
CUTLASS = (
    (COPY, 2_000),
    (f"void {TRTLLM}blockExpertPrefixSumKernel<32>(int const*, int*, int*, long, long, int)", 2_300),
    (f"void {TRTLLM}globalExpertPrefixSumKernel<32>(int const*, int*, long*, long, long)", 2_100),
    (f"{TRTLLM}mergeExpertPrefixSumKernel(int const*, int const*, int const*, int*, int*, int*, int)", 1_900),
    (
        f"void {TRTLLM}expandInputRowsKernel<__nv_bfloat16, __nv_bfloat16, ({TRTLLM}FpXBlockScalingType)2, false>(__nv_bfloat16 const*)",
        3_000,
    ),
    (f"void {TRTLLM}computeStridesTmaWarpSpecializedKernel<__nv_bfloat16, cutlass::float_e2m1_t, __nv_bfloat16>(long const*)", 2_500),
    (TILE_MAP, 2_800),
    (GROUPED, 120_000),
    (f"void {TRTLLM}doActivationKernel<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, {TRTLLM}SwigluBiasAdaptor>(__nv_bfloat16*)", 3_600),
    (TILE_MAP, 2_700),
    (GROUPED, 71_000),
    (
        f"void {TRTLLM}finalizeMoeRoutingKernel<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, ({TRTLLM}ScaleMode)1>(__nv_bfloat16 const*)",
        4_000,
    ),
)
MARLINS = (
    ("void vllm::moe::moe_align_block_size_small_batch_expert_kernel<int, 256>(int const*, int*, int*, int*, int*, int)", 4_100),
    (COPY, 2_200),
    (MARLIN, 118_000),
    (SWIGLU, 3_300),
    (MARLIN, 70_000),
    (REDUCE, 4_600),
)
LAUNCHES = {"triton_mxfp4_bf16": OURS, "openai_triton_kernels": OPENAI, "cutlass_mxfp4_bf16": CUTLASS, "marlin_mxfp4_bf16": MARLINS}


def call(launches, start_ns=0, gap_ns=900):
    """Events one after the other; a negative gap lets each begin before the one before it has ended."""
    events = []
    for name, length_ns in launches:
        kind = {"Memcpy": "memcpy", "Memset": "memset"}.get(name[:6], "kernel")
        events.append(Event(name=name, start_ns=start_ns, end_ns=start_ns + length_ns, stream=7, kind=kind))
        start_ns += length_ns + gap_ns
    return tuple(events)


def profile(backend="triton_mxfp4_bf16", launches=None, calls=10, point=CASE, **fields):
    launches = LAUNCHES[backend] if launches is None else launches
    made = tuple(call([(name, ns + 40 * number) for name, ns in launches], number * 1_000_000) for number in range(calls))
    spans = [max(e.end_ns for e in one) - one[0].start_ns for one in made if one]
    values = {
        "case": point,
        "backend": backend,
        "act_dtype": "bf16",
        "device": H200,
        "source": "kineto",
        "launch": "cuda_graph",
        "calls": made,
        "untraced_us": tuple(ns / 1e3 for ns in spans),
        "routing": realized(point, assign(point)),
        "notes": (MADE_UP,),
    }
    return Profile(**(values | fields))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(breakdown.figure([view(profile(backend)) for backend in LAUNCHES]))
