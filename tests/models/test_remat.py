"""Activation checkpointing recomputes the blocks that its policy names, in any model."""

import pytest
import torch
from torch import nn

from jetformer.models import remat


class Block(nn.Module):
    is_block = True

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x, factor):
        self.calls += 1
        return x + factor * self.linear(x).tanh()


class Step(Block):
    recompute_policy = "couplings"


class Model(nn.Module):
    """A model that is not part of the package."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Step(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = remat.run_block(block, x, 0.5)
        return x


@pytest.mark.parametrize(
    ("policy", "every", "calls"),
    [
        ("none", 1, [1, 1, 1]),
        ("blocks", 1, [2, 1, 2]),
        ("couplings", 1, [1, 2, 1]),
        ("everything", 1, [2, 2, 2]),
        ("blocks", 2, [2, 1, 1]),
        ("everything", 2, [2, 1, 2]),
    ],
)
def test_a_policy_recomputes_its_blocks(policy, every, calls):
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 4, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()))
    for block in model.blocks:
        block.calls = 0
    remat.set_policy(model, policy, every)
    gradients = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()))
    assert [block.calls for block in model.blocks] == calls
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))
    with torch.no_grad():
        model(x)
    assert [block.calls for block in model.blocks] == [n + 1 for n in calls]


def test_a_model_without_a_policy_recomputes_nothing():
    model = Model()
    model(torch.randn(3, 4)).sum().backward()
    assert [block.calls for block in model.blocks] == [1, 1, 1]
