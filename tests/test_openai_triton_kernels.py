"""The triton_kernels adapter, without a GPU: a stand-in for each of its two generations checks what it is given and computes from it."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moebench.case import case
from moebench.check import inspect
from moebench.device import Device
from moebench.kernels.openai_triton_kernels import OpenaiTritonKernels
from moebench.kernels.openai_triton_kernels_details import forward, package
from moebench.problem import make_layer, make_tokens
from moebench.reference.torch_experts import experts as reference

ROOT = Path(__file__).parents[1]
H200 = Device(arch="sm90", name="NVIDIA H200", torch="cuda:0", memory_bytes=2**37)
B200 = replace(H200, arch="sm100", name="NVIDIA B200")
TINY = case("tiny", 9)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


# ---- a stand-in that keeps the interface, its checks, and what its kernels compute; layouts are names


@dataclass
class Wrapped:
    data: torch.Tensor
    dtype: object
    layout: tuple = ()


@dataclass
class Precision:
    weight_scale: Wrapped = None
    flex_ctx: object = None


@dataclass
class Routing:
    gate_scal: torch.Tensor
    expt_hist: torch.Tensor
    n_expts_tot: int
    n_expts_act: int
    expt_data: object = None


@dataclass
class Indices:
    src_indx: torch.Tensor
    dst_indx: torch.Tensor


class StandIn:
    """generation "3.5" or "3.6"; calls: the keyword arguments of each matmul_ogs."""

    def __init__(self, generation, blackwell=False):
        self.generation, self.blackwell, self.options, self.calls = generation, blackwell, {"block_m": 7}, []
        options = SimpleNamespace(reset_opt_flags_constraints=self.options.clear, update_opt_flags_constraints=self.options.update)
        layouts = SimpleNamespace(make_default_matmul_mxfp4_w_layout=self.values, make_default_matmul_mxfp4_w_scale_layout=self.scales)
        matmul = {
            "matmul_ogs": self.matmul_ogs,
            "PrecisionConfig": Precision,
            "FlexCtx": SimpleNamespace,
            "GatherIndx": Indices,
            "ScatterIndx": Indices,
        }
        matmul |= {"RoutingData": Routing, "FnSpecs": self.specs, "FusedActivation": self.activation}
        tensor = {"FP4": "fp4", "BIT": "bit", "wrap_torch_tensor": self.wrap, "convert_layout": self.convert, "Bitmatrix": self.bits}
        tensor |= {"SparseMatrix": self.sparse, "make_ragged_tensor_metadata": self.ragged}
        self.module = SimpleNamespace(
            matmul_ogs=SimpleNamespace(**matmul),
            tensor=SimpleNamespace(**tensor),
            numerics=SimpleNamespace(InFlexData=lambda: "flex"),
            swiglu=SimpleNamespace(swiglu_fn="swiglu_fn"),
            target_info=SimpleNamespace(cuda_capability_geq=lambda major, minor=0: blackwell and major <= 10),
            tensor_details=SimpleNamespace(layout=layouts),
            matmul_ogs_details=SimpleNamespace(opt_flags=options),
            routing=SimpleNamespace(routing_from_bitmatrix=self.from_bits),
        )

    def values(self, mx_axis):
        return ("blackwell value", {}) if self.blackwell else ("hopper value", {"mx_axis": mx_axis})

    def scales(self, mx_axis, num_warps):
        return ("blackwell scale", {}) if self.blackwell else ("hopper scale", {"mx_axis": mx_axis, "num_warps": num_warps})

    def wrap(self, data, dtype=None):
        assert data.stride()[1] == 1, "K, the second of [E, K, N], is packed"
        return Wrapped(data, dtype)

    def convert(self, wrapped, layout, **options):
        if layout == "hopper scale":
            assert options == {"mx_axis": 1, "num_warps": 8}
            assert wrapped.data.shape[1] % 4 == 0, "read in fours"
        return Wrapped(wrapped.data, wrapped.dtype, layout)

    def specs(self, name, function, names, reduction_n=None):
        assert (name, function, names) == ("swiglu", "swiglu_fn", ("alpha", "limit"))
        assert (reduction_n == 2) == (self.generation == "3.6")
        return name

    def activation(self, specs, constants, reduction_n=None):
        assert (reduction_n == 2) == (self.generation == "3.5")
        return constants

    def bits(self, words, dtype=None, shape=None, shape_max=None, **scratchpad):
        assert words.dtype == torch.uint32
        assert scratchpad == ({"scratchpad": None} if self.generation == "3.5" else {})
        assert dtype == (None if self.generation == "3.5" else "bit")
        assert shape == [words.shape[0], 32 * words.shape[1]]
        assert shape_max == [words.shape[0], None]
        return (words.view(torch.int32)[:, :, None] >> torch.arange(32) & 1).flatten(1).bool()

    def sort(self, bits, ids):
        """(pairs in order of experts then -1s, where each pair went or -1, tokens an expert)."""
        assert ids.dtype == torch.int16
        flat = ids.flatten().long()
        assert torch.equal(bits.sum(0), torch.bincount(flat[flat >= 0], minlength=bits.shape[1]))
        assert all(bits[pair // ids.shape[1], expert] for pair, expert in enumerate(flat.tolist()) if expert >= 0)
        order = torch.where(flat >= 0, flat, 10**6).argsort(stable=True)
        used = int((flat >= 0).sum())
        to_slot, to_sorted = torch.full_like(flat, -1), torch.full_like(flat, -1)
        to_slot[:used] = order[:used]
        to_sorted[order[:used]] = torch.arange(used)
        return to_slot.int(), to_sorted.int(), bits.sum(0).int()

    def from_bits(self, bits, weights, ids, num_experts, top_k):
        assert self.generation == "3.5"
        assert weights.dtype == torch.bfloat16
        to_slot, to_sorted, sizes = self.sort(bits, ids)
        gates = torch.where(to_slot >= 0, weights.flatten()[to_slot.long()], float("nan"))
        return Routing(gates, sizes[:num_experts], num_experts, top_k, "data"), Indices(to_slot, to_sorted), Indices(to_sorted, to_slot)

    def sparse(self, indx, vals, mask):
        assert self.generation == "3.6"
        to_slot, to_sorted, sizes = self.sort(mask, indx)
        metadata = SimpleNamespace(col_sum=sizes, col_sorted_indx=to_slot, row_sorted_indx=to_sorted)
        return SimpleNamespace(indx=indx, vals=vals, mask=mask, mask_metadata=metadata)

    def ragged(self, sizes, rows):
        return SimpleNamespace(slice_sizes=sizes, rows=rows)

    def matmul_ogs(
        self,
        x,
        w,
        bias,
        routing,
        gather_indx=None,
        scatter_indx=None,
        precision_config=None,
        gammas=None,
        y=None,
        fused_activation=None,
    ):
        self.calls.append(SimpleNamespace(w=w, bias=bias, precision=precision_config, activation=fused_activation))
        assert self.options == ({"is_persistent": True, "epilogue_subtile": 1} if self.blackwell else {"split_k": 1})
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert bias is None or bias.dtype == torch.float32
        codes, scale = w.data.mT, precision_config.weight_scale.data.mT  # [E, N, K/2], [E, N, >= K/32]
        pairs = torch.stack((E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]), -1).flatten(-2)
        groups = pairs.shape[-1] // 32
        weights = pairs * (2.0 ** (scale[..., :groups].float() - 127)).repeat_interleave(32, -1)
        assert x.shape[1] == weights.shape[2]
        top_k = routing.n_expts_act
        rows = gather_indx.src_indx if gather_indx is not None else scatter_indx.dst_indx
        out = torch.full((len(rows), weights.shape[1]), float("nan"))
        start = 0
        for expert, size in enumerate(routing.expt_hist.tolist()):
            at = torch.arange(start, start + size)
            source = x[rows[at].long() // top_k] if gather_indx is not None else x[at]
            out[at] = source.float() @ weights[expert].T + (0 if bias is None else bias[expert])
            start += size
        if fused_activation is not None:
            alpha, limit = fused_activation
            gate, up = out[:, 0::2].clamp(max=limit), out[:, 1::2].clamp(-limit, limit)
            out = gate * (alpha * gate).sigmoid() * (up + 1)
        if gammas is not None:
            assert gammas.dtype == torch.bfloat16
            out = out * gammas[:, None].float()
        out = out.bfloat16()
        if scatter_indx is None:
            return out
        tokens = len(rows) // top_k
        if top_k == 1:  # written in place: nothing where a token has no expert here
            result = torch.full((1, tokens, out.shape[1]), float("nan"), dtype=torch.bfloat16) if y is None else y
            valid = rows >= 0
            result[0, rows[valid].long()] = out[valid]
            return result[0]
        into = scatter_indx.src_indx.long().view(tokens, top_k)
        return torch.where((into >= 0)[..., None], out[into].float(), 0).sum(1).bfloat16()


def plain_pack(tokens, first, count):
    local = tokens.topk_ids - first
    mine = (local >= 0) & (local < count)
    words = torch.zeros(len(local), -(-count // 32), dtype=torch.int32)
    for word in range(words.shape[1]):
        words[:, word] = torch.where(mine & (local // 32 == word), 1 << local % 32, 0).sum(1)
    return torch.where(mine, local, -1).short(), torch.where(mine, tokens.topk_weights, -1.0).bfloat16(), words.view(torch.uint32)


@pytest.fixture
def install(monkeypatch):
    """Takes the stand-in's place of the package; the one kernel of ours is tested further down."""

    def installed(stand_in):
        found = package.Package(directory=ROOT, generation=stand_in.generation, source="stand-in 1.0")
        monkeypatch.setattr(package, "find", lambda: found)
        monkeypatch.setattr(forward, "load", lambda found: stand_in.module)
        monkeypatch.setattr(forward, "pack", plain_pack)
        return stand_in

    return installed


POINTS = [
    TINY,
    case("tiny", 1),
    case("tiny", 70),
    case("tiny", 9, top_k=1),
    case("tiny", 9, top_k=8),
    case("tiny", 9, ep_size=4, ep_rank=3),
    case("tiny", 9, top_k=1, ep_size=4, ep_rank=1),
    case("tiny", 9, num_experts=72, ep_size=2, ep_rank=1),
    case("tiny", 9, tp_size=2, tp_rank=1),
    case("tiny", 9, hidden_size=160),
]


@pytest.mark.parametrize("generation", ["3.5", "3.6"])
@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.label} {point.num_experts}x{point.hidden_size}")
def test_the_adapter_is_right_on_shards_slices_and_slots(install, generation, point):
    torch.set_num_threads(1)
    install(StandIn(generation))
    layer, tokens = make_layer(point, "cpu"), make_tokens(point, "cpu")
    found = inspect(OpenaiTritonKernels().prepare(layer, point.num_tokens), layer, tokens, reference(layer, tokens, "bf16"), "bf16")
    assert (found.status, found.reason) == ("ok", "")


@pytest.mark.parametrize(("blackwell", "groups"), [(False, 12), (True, 10)])
def test_hoppers_scales_are_padded_to_fours_and_each_gets_its_layouts(install, blackwell, groups):
    stand_in = install(StandIn("3.5", blackwell))
    call = OpenaiTritonKernels().prepare(make_layer(TINY, "cpu"), 1)  # H = 320: 10 groups, as 2880 has 90
    first, second = stand_in.calls
    assert first.precision.weight_scale.data.shape == (8, groups, 384)
    kind = "blackwell" if blackwell else "hopper"
    assert (first.w.layout, first.precision.weight_scale.layout) == (f"{kind} value", f"{kind} scale")
    assert first.activation == (1.702, 7.0)
    assert second.activation is None
    assert call.facts == {"triton_kernels": "stand-in 1.0", "triton_kernels_generation": "3.5", "padded_intermediate_size": 192}


def test_a_tensor_parallel_shard_is_padded_to_64_and_the_rest_left_alone(install):
    stand_in = install(StandIn("3.5"))
    layer = make_layer(case("tiny", 1, tp_size=2), "cpu")  # 96
    OpenaiTritonKernels().prepare(layer, 1)
    assert stand_in.calls[0].w.data.shape == (8, 160, 256)
    assert stand_in.calls[0].bias.shape == (8, 256)


def test_no_tokens_give_no_rows(install):
    install(StandIn("3.6"))
    call = OpenaiTritonKernels().prepare(make_layer(TINY, "cpu"), 1)
    assert call(make_tokens(case("tiny", 0), "cpu")).shape == (0, 320)


@pytest.mark.parametrize("mistake", ["swapped nibbles", "transposed scales", "biases in bf16"])
def test_a_wrong_preparation_is_noticed(install, monkeypatch, mistake):
    stand_in = install(StandIn("3.5"))
    layer, tokens = make_layer(TINY, "cpu"), make_tokens(TINY, "cpu")
    right = forward.weight

    def wrong(library, matrix, more_rows=0, more_columns=0):
        if mistake == "swapped nibbles":
            matrix = replace(matrix, codes=matrix.codes >> 4 | matrix.codes << 4)
        if mistake == "transposed scales":
            matrix = replace(matrix, scales=matrix.scales.flip(-1))
        return right(library, matrix, more_rows, more_columns)

    if mistake == "biases in bf16":
        call = stand_in.matmul_ogs
        stand_in.module.matmul_ogs.matmul_ogs = lambda x, w, bias, *rest, **named: call(x, w, bias.bfloat16(), *rest, **named)
        with pytest.raises(AssertionError):
            OpenaiTritonKernels().prepare(layer, 9)
        return
    monkeypatch.setattr(forward, "weight", wrong)
    found = inspect(OpenaiTritonKernels().prepare(layer, 9), layer, tokens, reference(layer, tokens, "bf16"), "bf16")
    assert found.status == "wrong"


# ---- our one kernel, in Triton's interpreter

PACK = """
import torch
from moebench.case import case
from moebench.kernels.openai_triton_kernels_details.forward import pack
from moebench.problem import make_tokens
from tests.test_openai_triton_kernels import plain_pack
points = (case("tiny", 9), 0, 8), (case("tiny", 200, top_k=8, num_experts=72), 36, 36), (case("tiny", 3, top_k=1), 6, 2)
for point, first, count in points:
    tokens = make_tokens(point, "cpu")
    for got, want in zip(pack(tokens, first, count), plain_pack(tokens, first, count), strict=True):
        assert got.dtype == want.dtype, (got.dtype, want.dtype)
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (point, got, want)
every = make_tokens(case("tiny", 1, top_k=8), "cpu")
assert pack(every, 0, 8)[2].view(torch.int32).tolist() == [[255]]
"""


def test_ids_become_a_bit_matrix():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PACK], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- which package

OLD = {
    "matmul_ogs.py": "def matmul_ogs(x): ...",
    "tensor.py": "def wrap_torch_tensor(x): ...",
    "routing.py": "def routing_from_bitmatrix(x): ...",
}
NEW = {
    "matmul_ogs.py": "class RoutingData: ...\ndef matmul_ogs(x): ...",
    "tensor.py": "class SparseMatrix: ...\nmake_ragged_tensor_metadata = 1\ndef wrap_torch_tensor(x): ...",
}
NEWER = {"matmul.py": "", "tensor.py": "class SparseMatrix: ..."}


@pytest.fixture
def put(monkeypatch, tmp_path):
    """put(name, files): a package of that name for find_spec; files None: none."""

    def done(name, files, below="."):
        monkeypatch.delitem(sys.modules, name, raising=False)
        if files is None:
            monkeypatch.setitem(sys.modules, name, None)
            return None
        directory = tmp_path / name / below
        directory.mkdir(parents=True, exist_ok=True)
        for file, text in {"__init__.py": "", **files}.items():
            (directory / file).write_text(text)
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__spec__.submodule_search_locations.append(str(tmp_path / name))
        monkeypatch.setitem(sys.modules, name, module)
        return directory

    return done


@pytest.mark.parametrize(
    ("outside", "inside", "generation"),
    [(None, OLD, "3.5"), (NEW, None, "3.6"), (OLD, NEW, "3.5"), (NEWER, OLD, "3.5"), ({"hello.py": ""}, NEW, "3.6")],
)
def test_a_package_of_either_generation_is_found_and_others_are_passed_over(put, outside, inside, generation):
    put("triton_kernels", outside)
    put("vllm", inside, "third_party/triton_kernels")
    found = package.find()
    assert found.generation == generation


def test_absences_are_sentences(put):
    backend = OpenaiTritonKernels()
    put("triton_kernels", None)
    put("vllm", None)
    assert "triton_kernels is not installed (the package of that name on PyPI is another one); pip install vllm" in backend.unsupported(
        TINY, H200
    )
    put("triton_kernels", {"hello.py": ""})
    assert "is another package" in backend.unsupported(TINY, H200)
    put("vllm", NEWER, "third_party/triton_kernels")
    assert "is newer (it has matmul instead of matmul_ogs)" in backend.unsupported(TINY, H200)
    put("vllm", OLD, "third_party/triton_kernels")
    for device in (H200, B200):
        assert backend.unsupported(TINY, device) is None
        assert "power of two" in backend.unsupported(replace(TINY, top_k=6), device)
    assert "beta=0" in backend.unsupported(case("mixtral-8x7b", 1), H200)
    assert "this is sm80" in backend.unsupported(TINY, replace(H200, arch="sm80"))
    assert "this is cpu" in backend.unsupported(TINY, replace(H200, arch="cpu"))


def test_the_package_is_imported_under_its_short_name_and_without_vllm(put, tmp_path):
    parts = {
        "numerics.py": "",
        "swiglu.py": "",
        "target_info.py": "",
        "matmul_ogs_details/opt_flags.py": "",
        "tensor_details/layout.py": "",
    }
    inside = tmp_path / "vllm/third_party/triton_kernels"
    for folder in ("matmul_ogs_details", "tensor_details"):
        (inside / folder).mkdir(parents=True)
    put("vllm", {**OLD, **parts, "tensor.py": OLD["tensor.py"] + "\nfrom triton_kernels import target_info"}, "third_party/triton_kernels")
    code = (
        "import sys; from moebench.kernels.openai_triton_kernels_details import package\n"
        "found = package.find(); loaded = package.load(found); assert package.load(found) is loaded\n"
        "assert package.find() == found, package.find()\n"
        "print(found.generation, loaded.tensor.target_info.__name__, 'vllm' in sys.modules)"
    )
    (tmp_path / "vllm/__init__.py").write_text("raise ImportError")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["3.5", "triton_kernels.target_info", "False"], done.stderr
