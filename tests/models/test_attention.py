"""Both implementations of attention compute the formula."""

import pytest
import torch
from torch.nn import functional as F

from jetformer.models import attention


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("masking", ["none", "causal", "mask"])
def test_both_implementations_compute_the_formula(monkeypatch, num_heads, num_kv_heads, masking):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, num_heads, 5, 8), (2, num_kv_heads, 5, 8), (2, num_kv_heads, 5, 8)]
    q, k, v = (torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes)
    random = torch.rand(2, 5, 5, generator=generator) < 0.5
    mask = random | torch.eye(5, dtype=torch.bool) if masking == "mask" else None

    allowed = {"none": torch.ones(5, 5), "causal": torch.ones(5, 5).tril(), "mask": mask}[masking]
    shared_k, shared_v = (x.repeat_interleave(num_heads // num_kv_heads, 1) for x in (k, v))
    scores = torch.einsum("bnth,bnsh->bnts", q, shared_k) / 8**0.5
    allowed = allowed.expand(2, 5, 5).bool()[:, None]
    expected = F.softmax(scores.where(allowed, torch.tensor(float("-inf")).double()), -1) @ shared_v
    expected_gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))

    for short in (0, 128):
        monkeypatch.setitem(attention.MAX_SHORT_KEYS, "cpu", short)
        y = attention.attend(q, k, v, mask, is_causal=masking == "causal")
        torch.testing.assert_close(y, expected)
        gradients = torch.autograd.grad(y.square().sum(), (q, k, v))
        for actual, value in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(actual, value)
