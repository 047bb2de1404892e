"""The parallel inverse of TarFlow equals the sequential one to its tolerance, and exactly after as many iterations as
tokens."""

import functools

import pytest
import torch
from absl import logging

from flows import assert_invertible, randomized
from jetformer import config
from jetformer.experiment import Experiment
from jetformer.models.tarflow import TarFlow
from jetformer.sampling.jacobi import Jacobi

SHAPE = (8, 6, 3)  # 12 tokens


def flow_with(method, scale=0.05, shape=SHAPE, **kwargs):
    flow = TarFlow(shape, depth=2, block_depth=2, emb_dim=8, num_heads=2, ps=2, inverse_method=method, **kwargs)
    flow = randomized(flow)
    for block in flow.blocks:
        block.final_proj.weight.data *= scale
    return flow


def latents(batch=3):
    return torch.randn(batch, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("segment", [None, 1, 4, 5, 100])
@torch.no_grad()
def test_it_equals_the_sequential_inverse(segment):
    """Also with segments that do not divide the tokens."""
    z, context = latents(), torch.randn(3, 2, 4, dtype=torch.float64)
    expected = flow_with(None, context_dim=4).inverse(z, context)
    for tolerance in (1e-2, 1e-5, 0.0):
        found = flow_with(Jacobi(tolerance, segment), context_dim=4).inverse(z, context)
        for theirs, ours in zip(expected, found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * tolerance or 1e-12)


@pytest.mark.parametrize("segment", [None, 4])
def test_it_inverts_the_flow(segment):
    flow = flow_with(Jacobi(0.0, segment), context_dim=4)
    context = torch.randn(1, 2, 4, dtype=torch.float64)
    assert_invertible(*(functools.partial(f, context=context) for f in (flow, flow.inverse)), latents(1))


@pytest.mark.parametrize("segment", [None, 4])
@torch.no_grad()
def test_the_worst_case_is_exact(segment):
    """A flow whose tokens depend strongly on those before them takes as many iterations as it has tokens."""
    flow, method = flow_with(None, scale=0.5), Jacobi(0.0, segment)
    x, _ = flow.patchify(latents())
    for block in flow.blocks:
        z, logdet = block(x)
        tokens, inverse_logdet, iterations, error = method.solve(block, z)
        torch.testing.assert_close(tokens, x)
        torch.testing.assert_close(inverse_logdet, -logdet)
        assert iterations == ([11] if segment is None else [4, 4, 4])
        assert error == 0


@torch.no_grad()
def test_iterations_that_overflow_do_not_spread():
    """Tokens that are far off overflow those predicted from them, which must not reach the tokens before."""
    flow = flow_with(None, shape=(4, 4, 3))  # more tokens would grow rounding errors
    block = flow.blocks[0]
    block.final_proj.bias[12:] = 1e5  # latents are far from their tokens
    x, _ = flow.patchify(latents()[:, :4, :4])
    z, _ = block(x)
    _, log_scale = block.predict(z, block.condition(None))
    assert log_scale[:, :-1].exp().isinf().any()
    torch.testing.assert_close(Jacobi(0.0).solve(block, z).tokens, x, rtol=0, atol=1e-2)


@torch.no_grad()
def test_iterations_grow_with_accuracy():
    flow = flow_with(None)
    z, _ = flow.patchify(latents())
    count = lambda *args: sum(Jacobi(*args).solve(flow.blocks[0], z).iterations)
    assert 1 < count(1e-1) < count(1e-4) < 11
    # Segments take fewer iterations for each token.
    assert count(1e-4, 3) < 4 * count(1e-4)


@pytest.mark.parametrize("segment", [None, 4])
@torch.no_grad()
def test_a_result_does_not_depend_on_the_rest_of_the_batch(segment):
    z = latents(4) * torch.tensor([0.1, 1.0, 3.0, 0.0]).view(-1, 1, 1, 1)
    flow = flow_with(Jacobi(1e-2, segment))
    whole = flow.inverse(z)
    for i in range(4):
        for ours, theirs in zip(flow.inverse(z[i : i + 1]), whole, strict=True):
            torch.testing.assert_close(ours[0], theirs[i], rtol=0, atol=1e-12)


@torch.no_grad()
def test_too_few_iterations_are_told(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda line, *args: lines.append(line % args))
    flow_with(Jacobi(1e-6, None, 12)).inverse(latents())
    assert not lines
    flow = flow_with(Jacobi(1e-6, None, 2))
    flow.inverse(latents())
    assert len(lines) == 2
    errors = []
    z, _ = flow.patchify(latents())
    for block in reversed(flow.blocks):
        solution = block.inverse_method.solve(block, z)
        z = solution.tokens
        errors.append(solution.error)
    for line, error in zip(lines, errors, strict=True):
        assert error > 1e-6
        assert "2 iterations" in line
        assert "1e-06" in line
        assert f"{error:g}" in line


@torch.no_grad()
def test_one_token():
    flow = TarFlow((2, 2, 3), depth=1, block_depth=1, emb_dim=8, num_heads=2, ps=2, inverse_method=Jacobi())
    z = torch.randn(2, 2, 2, 3)
    x, logdet = flow.inverse(z)
    assert torch.equal(x, z)
    assert torch.equal(logdet, torch.zeros(2))


def test_an_experiment_binds_it():
    bound = ["TarFlow.inverse_method = @Jacobi()", "Jacobi.tolerance = 1e-2", "Jacobi.segment = 4"]
    config.parse(["experiments/tarflow_digits.gin"], bound)
    assert config.call(Experiment).model().blocks[0].inverse_method == Jacobi(1e-2, 4)


@pytest.mark.parametrize("arguments", [{"tolerance": -1.0}, {"segment": 0}, {"max_iterations": 0}])
def test_mistakes(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"Jacobi.{name} = {arguments[name]}"):
        Jacobi(**arguments)


def test_a_method_without_parentheses():
    with pytest.raises(ValueError, match=r"inverse_method .*@Jacobi\(\)"):
        flow_with(Jacobi)
