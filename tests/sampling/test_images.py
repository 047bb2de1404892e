"""Samplers as a library: batches, classes, and flows that are not of this package."""

import math
import types

import pytest
import torch
from torch import nn

from jetformer import prng
from jetformer.loops.base import Runner
from jetformer.loops.torch_loop import TorchLoop
from jetformer.objectives import JetObjective, check_tokens
from jetformer.runtime import Runtime
from jetformer.sampling.images import FlowSampler
from jetformer.sampling.sampler import Request, draw, repeated
from jetformer.state import State
from small_models import small_model

CPU = Runtime(torch.device("cpu"))
EXPERIMENT = types.SimpleNamespace(objective=JetObjective(), noise_min=0.0)


class Shift(nn.Module):
    """A flow with nothing but the contract of flows."""

    image_shape = (4, 4, 3)

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.25))

    def forward(self, x, context=None):
        return 2 * (x - self.shift), x.new_full((len(x),), math.log(2) * 48)

    def inverse(self, z, context=None):
        return z / 2 + self.shift, z.new_full((len(z),), -math.log(2) * 48)


class ShiftByClass(Shift):
    """The same, conditional on classes."""

    num_labels = 3

    def context(self, labels):
        return labels.float()[:, None, None]

    def inverse(self, z, context=None):
        x, logdet = super().inverse(z)
        return (x, logdet) if context is None else (x + context.view(-1, 1, 1, 1), logdet)


def drawn(model, requests, batch_size=32, **options):
    """The samples of requests."""
    state = State(TorchLoop(CPU, {"data": 1}), Runner(model), None, None)
    batches = draw(FlowSampler(EXPERIMENT, model, **options), requests, state, CPU, batch_size=batch_size)
    return [sample for batch in batches for sample in batch]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_flow_that_keeps_the_contract(temperature):
    """Its samples decode latents of their seeds; its likelihoods are the objective's."""
    model = Shift()
    samples = drawn(model, repeated([Request("sample")], 3, seed=7), temperature=temperature)
    assert [request.seed for request, _ in samples] == [7, 8, 9]
    latents = temperature * prng.normal(torch.stack([prng.key(seed) for seed in (7, 8, 9)]), model.image_shape)
    with torch.no_grad():
        x, _ = model.inverse(latents)
        bits, _ = JetObjective.score(model, x)["bits_per_dim"]
    for (_, sample), image, expected in zip(samples, x, bits, strict=True):
        assert torch.equal(torch.from_numpy(sample["image"]), ((image + 1) * 127.5).floor().clamp(0, 255).byte())
        assert sample["bits_per_dim"] == pytest.approx(expected.item(), rel=1e-5)
        assert sample["log_likelihood"] == pytest.approx(-expected.item() * 48 * math.log(2), rel=1e-5)


def test_samples_do_not_depend_on_the_batch_size():
    requests = repeated([Request("sample")], 5, seed=0)
    small, large = (drawn(Shift(), requests, size) for size in (2, 32))
    for (a, sample), (b, other) in zip(small, large, strict=True):
        assert a == b
        assert (sample["image"] == other["image"]).all()


def test_a_flow_of_classes_gets_their_context():
    images = []
    for label in (0, 1):
        text = torch.tensor([label]).numpy()
        ((_, sample),) = drawn(ShiftByClass(), [Request("class", text)], temperature=0.1)
        images.append(sample["image"].mean())
    assert images[0] < 200 < images[1]


def test_classes_and_tokens_that_a_model_does_not_have():
    token = lambda value: torch.tensor([[value]])
    for model, valid, wrong in ((ShiftByClass(), 2, 3), (small_model(), 9, 10)):
        check_tokens(token(valid), model)
        for value in (wrong, -1):
            with pytest.raises(ValueError, match=rf"{value}.* 0 to {valid}"):
                check_tokens(token(value), model)
    with pytest.raises(ValueError, match="Shift "):
        check_tokens(token(0), Shift())


def test_a_model_that_cannot_be_sampled():
    """One line names the model and what it lacks."""
    with pytest.raises(ValueError, match=r"^Linear .*inverse and image_shape$"):
        FlowSampler(EXPERIMENT, nn.Linear(2, 2))
