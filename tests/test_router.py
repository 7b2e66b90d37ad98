"""From logits back to the assignment they were made of."""

import numpy as np
import pytest
import torch

from moebench.case import case
from moebench.router import logits, route
from moebench.routing import assign


@pytest.mark.parametrize("model", ["tiny", "gpt-oss-120b", "deepseek-v3"])
@pytest.mark.parametrize("tokens", [0, 1, 64])
def test_routing_logits_gives_the_experts_and_weights_they_stand_for(model, tokens):
    point = case(model, tokens)
    wanted = assign(point)
    ids, weights = route(logits(wanted, point.num_experts, "cpu"), point.top_k)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    by_expert = np.argsort(wanted.topk_ids, axis=1)
    order = torch.argsort(ids, dim=1)
    assert np.array_equal(np.take_along_axis(wanted.topk_ids, by_expert, 1), ids.gather(1, order).numpy())
    sums = wanted.topk_weights.sum(1, keepdims=True)
    scaled = np.take_along_axis(wanted.topk_weights / np.maximum(sums, 1e-9), by_expert, 1)
    assert np.allclose(scaled, weights.gather(1, order).numpy(), rtol=1e-5, atol=1e-7)
