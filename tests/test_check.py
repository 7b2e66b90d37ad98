"""The check passes what is right, with room to spare, and rejects each known mistake under its own name."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
import torch

from moebench.backend import ACT_DTYPES
from moebench.case import case
from moebench.check import compare, inspect
from moebench.problem import Swiglu, make_layer, make_tokens
from moebench.reference.diagnosis import explain
from moebench.reference.torch_experts import experts
from tests.mutants import MUTANTS, computed

ON = {
    "gpt-oss": [(case("tiny", tokens), None) for tokens in (1, 24)],
    "gentle": [(case("tiny", 24), Swiglu(alpha=0.5, beta=0.0, limit=3.0))],
    "ep": [(case("tiny", 24, ep_size=2, ep_rank=1), None)],
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors here are small; a second thread costs more than it does where other programs hold its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def posed(point, constants=None):
    layer, tokens = make_layer(point, "cpu"), make_tokens(point, "cpu")
    return (replace(layer, swiglu=constants) if constants else layer), tokens


def judged(call, point=None, act_dtype="bf16", **options):
    layer, tokens = posed(point or case("tiny", 9))
    return inspect(partial(call, layer), layer, tokens, experts(layer, tokens, act_dtype), act_dtype, **options)


def right(layer, tokens, act_dtype="bf16"):
    return experts(layer, tokens, act_dtype).bfloat16()


@pytest.mark.parametrize("act_dtype", ACT_DTYPES)
@pytest.mark.parametrize(
    "point",
    [case("tiny", 0), case("tiny", 1), case("tiny", 33), case("tiny", 20, ep_size=4, ep_rank=1), case("tiny", 5, tp_size=3, tp_rank=2)],
)
def test_the_reference_passes_its_own_check(act_dtype, point):
    found = judged(partial(right, act_dtype=act_dtype), point, act_dtype)
    assert (found.status, found.reason) == ("ok", "")
    assert found.error.ok


@pytest.mark.parametrize("tokens", [1, 7, 64, 200])
def test_a_right_bf16_kernel_has_margin(tokens):
    found = judged(computed, case("tiny", tokens))
    assert found.status == "ok"
    assert found.error.rel_l2 < 0.0035
    assert found.error.worst < 0.025


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_rejected_and_named(mutant):
    told = []
    for point, constants in ON[mutant.on]:
        layer, tokens = posed(point, constants)
        want = experts(layer, tokens, "bf16")
        assert compare(computed(layer, tokens), want, "bf16").ok  # the computation that the mutant spoils
        found = inspect(partial(mutant.call, layer), layer, tokens, want, "bf16")
        if found.status == "ok":
            continue
        assert found.status == mutant.status
        told.append(explain(found.output, layer, tokens, "bf16", want) if found.output is not None else "")
    assert told, "no case rejects it"
    assert any(mutant.told in clause for clause in told) if mutant.told else not any(told)


@pytest.mark.parametrize("kernel", ACT_DTYPES)
@pytest.mark.parametrize("claimed", ACT_DTYPES)
def test_a_kernel_that_rounds_in_another_format_than_it_claims_is_wrong(kernel, claimed):
    point = case("tiny", 24)
    layer, tokens = posed(point)
    found = judged(partial(right, act_dtype=kernel), point, claimed)
    if {kernel, claimed} == {"mxfp8", "fp8_pow2"}:  # E4M3 times powers of two, both
        assert found.status == "ok"
        assert found.error.rel_l2 > 0.005
        return
    assert found.status == ("ok" if kernel == claimed else "wrong")
    if kernel != claimed:
        assert explain(found.output, layer, tokens, claimed) == f"it looks as if activations are rounded as {kernel} does"


def test_a_wrong_output_is_reported_with_numbers_and_place():
    def call(layer, tokens):
        out = right(layer, tokens)
        out[4, 77] += 3
        return out

    found = judged(call)
    assert found.status == "wrong"
    assert "token 4, column 77 is" in found.reason
    assert "at most 0.15" in found.reason
    assert (found.error.worst_token, found.error.worst_column) == (4, 77)
    assert found.error.max_abs == pytest.approx(3, abs=0.02)


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "1 NaN, 0 Inf"), (float("inf"), "0 NaN, 1 Inf")])
def test_a_value_that_is_not_finite_is_told_apart(value, words):
    def call(layer, tokens):
        out = right(layer, tokens)
        out[2, 3] = value
        return out

    found = judged(call)
    assert found.status == "nonfinite"
    assert words in found.reason
    assert "token 2, column 3" in found.reason


def test_reading_unwritten_memory_is_found():
    def call(layer, tokens):
        scratch = torch.empty(1, dtype=torch.float32)
        return (right(layer, tokens).float() + scratch * 0).bfloat16()  # harmless until the memory holds a NaN

    found = judged(call)
    assert found.status in ("nonfinite", "unwritten")
    assert found.status == "nonfinite"
    assert found.reason.startswith("2880 of 2880 elements are not finite") or "poisoned" in found.reason


@pytest.mark.parametrize(
    "allocate",
    [
        torch.empty_like,
        lambda x: x.new_empty(x.shape),
        lambda x: torch.empty(x.shape, dtype=x.dtype),
        lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype),
        lambda x: x.new_empty_strided(x.shape, x.stride()),
    ],
)
def test_an_unwritten_tail_is_found_however_it_was_allocated(allocate):
    def call(layer, tokens):
        out = allocate(tokens.hidden_states)
        out[:7] = right(layer, tokens)[:7]
        return out

    found = judged(call)
    assert found.status == "unwritten"
    assert found.reason == "640 of 2880 elements were never written, the first at token 7, column 0"


def test_an_unwritten_tail_of_a_buffer_kept_from_prepare_is_found():
    kept = torch.zeros(9, 320, dtype=torch.bfloat16)

    def call(layer, tokens):
        kept[:8] = right(layer, tokens)[:8]
        return kept

    assert judged(call).status == "unwritten"


def test_a_buffer_that_is_returned_every_time_is_fine():
    kept = torch.zeros(9, 320, dtype=torch.bfloat16)
    found = judged(lambda layer, tokens: kept.copy_(right(layer, tokens)))
    assert found.status == "ok"


@pytest.mark.parametrize("name", ["hidden_states", "topk_ids", "topk_weights"])
def test_a_call_that_writes_its_tokens_is_named(name):
    def call(layer, tokens):
        out = right(layer, tokens)
        getattr(tokens, name)[-1, -1] += 1
        return out

    found = judged(call)
    assert found.status == "input_changed"
    assert name in found.reason


def test_a_call_that_writes_the_weights_is_named():
    def call(layer, tokens):
        out = right(layer, tokens)
        layer.w2.scales[0, 0, 0] ^= 1
        return out

    found = judged(call)
    assert found.status == "input_changed"
    assert "the layer's weights" in found.reason


def test_a_prepare_that_wrote_the_weights_is_found_by_the_checksum_from_before():
    layer, tokens = posed(case("tiny", 3))
    before = layer.checksum()
    layer.w13.codes[0, 0, 0] ^= 1
    found = inspect(partial(right, layer), layer, tokens, experts(layer, tokens, "bf16"), "bf16", layer_checksum=before)
    assert found.status == "input_changed"


def test_a_call_that_returns_its_input_is_stopped_before_it_is_overwritten():
    layer, tokens = posed(case("tiny", 3))
    before = tokens.hidden_states.clone()
    found = inspect(lambda given: given.hidden_states.view(3, 320), layer, tokens, experts(layer, tokens, "bf16"), "bf16")
    assert found.status == "input_changed"
    assert "memory of hidden_states" in found.reason
    assert torch.equal(tokens.hidden_states, before)


def test_a_call_that_differs_from_run_to_run_is_found_with_the_size():
    runs = iter(range(100))

    def call(layer, tokens):
        out = right(layer, tokens)
        out[0, 0] *= 1 + 2**-7 * (next(runs) % 2)
        return out

    found = judged(call)
    assert found.status == "nondeterministic"
    assert found.reason.startswith("1 of 2880 elements differ between two runs of the same call, by up to")
    assert found.error.ok


def jittering(at, factor):
    """A right call but for one element in the launches numbered `at`: 0 to 2, then poisoned with NaN and with the sentinel."""
    launches = count()

    def call(layer, tokens):
        out = right(layer, tokens)
        if next(launches) in at:
            out[4, 77] *= factor
        return out

    return call


@pytest.mark.parametrize("at", [{0}, {1}, {2}, {3}, {4}, {0, 1, 2, 3}])
def test_a_declared_jitter_within_tolerance_is_ok_and_counted(at):
    found = judged(jittering(at, 1 + 2**-7), deterministic=False)
    assert (found.status, found.reason, found.differing) == ("ok", "", 1)
    assert found.error.ok


@pytest.mark.parametrize("at", [{0}, {1}, {2}, {3}, {4}])
def test_the_same_jitter_undeclared_is_nondeterministic(at):
    found = judged(jittering(at, 1 + 2**-7))
    assert (found.status, found.differing) == ("nondeterministic", 1)


def test_a_finite_result_that_depends_on_memory_which_nobody_wrote_is_found():
    def call(layer, tokens):
        out = right(layer, tokens)
        scratch = torch.empty(64)  # one number beyond 2**99 is in such memory at times, but not 64
        out[4, 77] *= 1 + 2**-7 * float((scratch > 2.0**99).all())
        return out

    found = judged(call)
    assert (found.status, found.differing) == ("nondeterministic", 1)
    assert found.reason.endswith("once unwritten memory is poisoned: the result depends on what that holds")
    assert found.error.ok


@pytest.mark.parametrize("at", [{0}, {1}, {2}, {3}, {4}])
def test_a_declared_jitter_out_of_tolerance_is_wrong_in_whichever_launch(at):
    found = judged(jittering(at, 100), deterministic=False)
    assert (found.status, found.differing) == ("wrong", 1)
    assert "token 4, column 77 is" in found.reason
    assert (found.error.worst_token, found.error.worst_column, found.error.ok) == (4, 77, False)
    assert float(found.output[4, 77]) == pytest.approx(100 * float(right(*posed(case("tiny", 9)))[4, 77]), rel=0.01)


def test_a_launch_wrong_in_one_element_outranks_one_that_is_farther_off_but_right():
    layer, tokens = posed(case("tiny", 9))
    want, out = experts(layer, tokens, "bf16"), right(layer, tokens)
    far, spoiled = out.clone(), out.clone()
    far[:2] *= 1 + 2**-7  # many elements a little
    spoiled[4, 77] = want[4, 77] + 0.17 * torch.maximum(want[4].square().mean(), want[:, 77].square().mean()).sqrt()  # one element much
    assert compare(far, want, "bf16").rel_l2 > compare(spoiled, want, "bf16").rel_l2
    launches = iter([out, far, spoiled, out, out])
    found = inspect(lambda _: next(launches).clone(), layer, tokens, want, "bf16", deterministic=False)
    assert found.status == "wrong"
    assert (found.error.worst_token, found.error.worst_column) == (4, 77)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_call_that_repeats_its_bits_differs_nowhere_whatever_it_declares(deterministic):
    found = judged(right, deterministic=deterministic)
    assert (found.status, found.differing) == ("ok", 0)


def test_elements_that_differ_are_counted_once_over_all_launches():
    launches = count()

    def call(layer, tokens):
        out = right(layer, tokens)
        out[0, next(launches)] *= 1 + 2**-7
        out[1, 1] *= 1 + 2**-7
        return out

    assert judged(call, deterministic=False).differing == 5


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out: out[:, :-1], "returned shape [9, 319], expected [9, 320]"),
        (lambda out: out.flatten(), "returned shape [2880], expected [9, 320]"),
        (lambda out: out.float(), "returned float32, expected bfloat16"),
        (lambda out: (out,), "returned tuple, not a tensor"),
        (lambda out: out.to("meta"), "returned a tensor on meta, expected cpu"),
    ],
)
def test_a_wrong_form_is_told(spoil, words):
    found = judged(lambda layer, tokens: spoil(right(layer, tokens)))
    assert (found.status, found.reason, found.output) == ("wrong", words, None)


def test_a_rank_that_no_token_hits_returns_exact_zeros():
    layer, tokens = posed(case("tiny", 6, ep_size=8, ep_rank=7))
    tokens = replace(tokens, topk_ids=tokens.topk_ids % 4)
    want = experts(layer, tokens, "bf16")
    assert not want.any()
    for value, status in ((0.0, "ok"), (-0.0, "ok"), (1e-30, "wrong")):
        out = torch.full_like(tokens.hidden_states, value)
        found = inspect(lambda _, out=out: out.clone(), layer, tokens, want, "bf16")
        assert found.status == status
    assert found.error.rel_l2 == found.error.worst == 1.0
    assert explain(out, layer, tokens, "bf16") == ""


def test_compare_is_its_definition_across_chunks():
    generator = torch.Generator().manual_seed(1)
    ref = torch.randn(2500, 8, generator=generator)
    out = (ref + 0.001 * torch.randn(2500, 8, generator=generator)).bfloat16()
    out[2100, 3] += 1
    got = compare(out, ref, "bf16")
    difference = (out.double() - ref.double()).abs()
    token, column = (ref.double().square().mean(dim, keepdim=True).sqrt() for dim in (1, 0))
    relative = difference / torch.maximum(ref.double().abs(), torch.maximum(token, column))
    assert got.rel_l2 == pytest.approx(float(difference.norm() / ref.double().norm()), rel=1e-12)
    assert got.worst == pytest.approx(float(relative.max()), rel=1e-12)
    assert (got.worst_token, got.worst_column) == (2100, 3)
    assert got.max_abs == float(difference.max())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_compare_never_accepts_what_is_not_a_number_or_huge(value):
    ref = torch.ones(4, 32)
    out = ref.bfloat16()
    out[1, 1] = value
    assert not compare(out, ref, "mxfp8").ok


def test_compare_stays_finite_where_token_and_column_are_zero():
    ref = torch.zeros(3, 32)
    ref[0, 0] = 1.0
    out = ref.bfloat16()
    assert compare(out, ref, "bf16").worst == 0.0
    out[2, 5] = 3e38
    error = compare(out, ref, "bf16")
    assert (error.worst_token, error.worst_column, error.ok) == (2, 5, False)
    assert 1e38 < error.worst < float("inf")


def test_a_right_output_is_explained_by_nothing():
    layer, tokens = posed(case("tiny", 5))
    assert explain(right(layer, tokens), layer, tokens, "bf16") == ""


def test_noise_is_explained_by_nothing():
    layer, tokens = posed(case("tiny", 5))
    noise = torch.randn(5, 320, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert explain(noise, layer, tokens, "bf16") == ""
    assert explain(noise * float("nan"), layer, tokens, "bf16") == ""


CHECKED = """
import sys
from moebench.case import case
from moebench.check import inspect
from moebench.problem import make_layer, make_tokens
from moebench.reference.torch_experts import experts
layer, tokens = make_layer(case("tiny", 1), "cpu"), make_tokens(case("tiny", 1), "cpu")
found = inspect(lambda given: experts(layer, given, "bf16").bfloat16(), layer, tokens, experts(layer, tokens, "bf16"), "bf16")
print(found.status, "torch._dynamo" in sys.modules)
"""


def test_a_check_does_not_import_a_compiler():
    done = subprocess.run([sys.executable, "-c", CHECKED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ok", "False"]
