"""The image head: blocked equals plain, gradients are right, samples follow the density."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional as F

from jetformer import prng
from jetformer.loops.torch_loop import TorchLoop
from jetformer.models.initializers import init_weights
from jetformer.models.mixture import (
    MixtureHead,
    MultivariateGaussian,
    MultivariateHead,
    count_components,
    square_plus,
)
from jetformer.models.mixture_nll import default_block, mixture_nll, token_blocks
from jetformer.runtime import Runtime
from jetformer.sampling import guidance
from mixtures import mixture_from_logits, mixture_of


def head_inputs(tokens, width, k, d, dtype, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "hidden": (batch, tokens, width),
        "weight": (k + 2 * k * d, width),
        "bias": (k + 2 * k * d,),
        "target": (batch, tokens, d),
    }
    tensors = {name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in shapes.items()}
    tensors["weight"] /= width**0.5
    for tensor in tensors.values():
        tensor.requires_grad_()
    return tensors, torch.rand(batch, tokens, dtype=dtype, generator=generator)


def test_blocks_are_no_larger_than_requested():
    """On each device, unless one token of each example already exceeds it."""
    for batch_size, length, block, num_shards in ((5, 7, 3, None), (5, 7, 20, None), (8, 6, 4, 4), (8, 6, 2, 2)):
        seen = torch.zeros(batch_size, length)
        for rows in token_blocks(batch_size, length, block, num_shards):
            seen[rows] += 1
            shards = num_shards or 1
            assert seen[rows].numel() <= max(block, -(-batch_size // shards) if num_shards else 1) * shards
        assert (seen == 1).all()


GPU, CPU, XLA = torch.device("cuda"), torch.device("cpu"), torch.device("xla")


@pytest.mark.parametrize(
    ("device", "gigabytes", "num_logits", "block"),
    [
        *((device, None, 263_168, 64) for device in (CPU, XLA)),  # 1024 mixtures of 128 dimensions
        *((device, None, 99_328, 256) for device in (CPU, XLA)),  # of 48 dimensions
        (GPU, 80, 263_168, 4096),
        (GPU, 40, 263_168, 2048),
        (GPU, 24, 263_168, 1024),
        (GPU, 80, 100, 4096),
        (CPU, None, 2**30, 1),
    ],
)
def test_the_device_chooses_the_block(monkeypatch, device, gigabytes, num_logits, block):
    properties = lambda asked: types.SimpleNamespace(total_memory=gigabytes * 10**9) if asked == GPU else None
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert default_block(num_logits, device) == block


def plain_nll(hidden, weight, bias, target, num_mixtures, scale_tol):
    logits = F.linear(hidden, weight, bias)
    return -mixture_from_logits(logits, num_mixtures, scale_tol).log_prob(target)


def plain_responsibilities(hidden, weight, bias, target, num_mixtures, scale_tol):
    """`[B, L, K]`, by Bayes' rule."""
    mixture = mixture_from_logits(F.linear(hidden, weight, bias), num_mixtures, scale_tol)
    components = torch.distributions.Normal(mixture.locs, mixture.scales).log_prob(target.unsqueeze(-2)).sum(-1)
    return (mixture.logits.log_softmax(-1) + components).softmax(-1)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    k=st.integers(1, 5),
    d=st.integers(1, 6),
    block=st.integers(1, 12),
    scale_tol=st.sampled_from([1e-6, 0.3]),  # the second clamps about a tenth of the scales
    num_shards=st.sampled_from([None, 1, 2]),
    seed=st.integers(0, 2**32),
)
def test_blocked_equals_plain(batch, tokens, k, d, block, scale_tol, num_shards, seed):
    inputs, token_weight = head_inputs(tokens, 7, k, d, torch.float64, seed, batch)
    scores = mixture_nll(
        **inputs,
        token_weight=token_weight,
        num_mixtures=k,
        scale_tol=scale_tol,
        block=block,
        num_shards=num_shards,
    )
    expected = plain_nll(**inputs, num_mixtures=k, scale_tol=scale_tol)
    torch.testing.assert_close(scores.nll, expected)
    torch.testing.assert_close(scores.total, (expected * token_weight).sum())
    responsibilities = plain_responsibilities(**inputs, num_mixtures=k, scale_tol=scale_tol)
    torch.testing.assert_close(scores.responsibilities, responsibilities.mean(1))
    torch.testing.assert_close(scores.responsibility_entropy, torch.special.entr(responsibilities).sum(-1).mean(1))
    # A factor after the sum, as gradient accumulation or a loss weight puts there.
    gradients = torch.autograd.grad(3 * scores.total, inputs.values())
    expected = torch.autograd.grad(3 * (expected * token_weight).sum(), inputs.values())
    for actual, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, value)


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_blocked_equals_plain_in_float32(backend):
    inputs, token_weight = head_inputs(64, 32, 16, 12, torch.float32)
    kwargs = {"num_mixtures": 16, "scale_tol": 1e-6}
    total, nll, *_ = mixture_nll(**inputs, token_weight=token_weight, block=24, backend=backend, **kwargs)
    expected = plain_nll(**inputs, **kwargs)
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(total, inputs.values())
    expected = torch.autograd.grad((expected * token_weight).sum(), inputs.values())
    for actual, value in zip(gradients, expected, strict=True):
        bound = 1e-4 * value.abs().max().item()
        torch.testing.assert_close(actual, value, rtol=0, atol=bound)


@pytest.mark.parametrize("raw", [-300.0, -3.0, 0.0, 3.0, 300.0, 3000.0, 20_000.0])
def test_extreme_scales_in_float32(raw):
    """For any raw scale the blocked head in float32 is as accurate as the formula in float64."""
    inputs, token_weight = head_inputs(8, 4, 2, 3, torch.float32)
    with torch.no_grad():
        inputs["bias"][8:] = raw
        inputs["weight"][8:] = 0.0
    kwargs = {"num_mixtures": 2, "scale_tol": 1e-6}
    total, nll, *_ = mixture_nll(**inputs, token_weight=token_weight, block=8, **kwargs)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = plain_nll(**exact, **kwargs)
    torch.testing.assert_close(nll.double(), expected.detach(), rtol=2e-5, atol=1e-4)
    gradients = torch.autograd.grad(total, inputs.values())
    expected = torch.autograd.grad((expected * token_weight).sum(), exact.values())
    for actual, value in zip(gradients, expected, strict=True):
        bound = 1e-3 * value.abs().max().item() + 1e-5  # of differences of weights near 1
        torch.testing.assert_close(actual.double(), value, rtol=0, atol=bound)


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_a_compiled_step_leaves_the_likelihood_out(backend):
    head = MixtureHead(8, 2, 3)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    TorchLoop(Runtime(CPU)).place(head, compile="step")
    head.backend = backend
    shapes = (2, 5, 8), (2, 5, 2), (2, 5)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    graphs = []

    def record(graph, example_inputs):
        del example_inputs
        graphs.append(graph)
        return graph.forward

    step = lambda hidden, target, weight: 2 * head(hidden + 1, target, weight).total
    torch.testing.assert_close(torch.compile(step, backend=record)(*inputs), step(*inputs))
    assert not any("log_softmax" in str(node.target) for graph in graphs for node in graph.graph.nodes)


def test_gradcheck():
    inputs, token_weight = head_inputs(5, 3, 2, 2, torch.float64)
    function = lambda *tensors: mixture_nll(*tensors, token_weight, num_mixtures=2, scale_tol=1e-6, block=2)[0]
    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_a_scale_below_the_smallest_has_no_gradient():
    inputs, _ = head_inputs(1, 2, 1, 1, torch.float64)
    with torch.no_grad():
        inputs["weight"].zero_()
        inputs["bias"].copy_(torch.tensor([0.0, 0.0, -50.0]))
    token_weight = torch.ones(1, 1).double()
    scores = mixture_nll(**inputs, token_weight=token_weight, num_mixtures=1, scale_tol=0.5, block=1)
    (gradient,) = torch.autograd.grad(scores.total, inputs["bias"])
    assert gradient[1] != 0
    assert gradient[2] == 0


def test_gradients_that_are_not_needed_are_not_computed():
    """Under no_grad no score requires a gradient, and frozen parameters get none."""
    inputs, token_weight = head_inputs(4, 3, 2, 2, torch.float64)
    kwargs = {"num_mixtures": 2, "scale_tol": 1e-6, "block": 2}
    with torch.no_grad():
        scores = mixture_nll(**inputs, token_weight=token_weight, **kwargs)
    assert not any(score.requires_grad for score in scores)
    inputs["weight"].requires_grad_(False)
    mixture_nll(**inputs, token_weight=token_weight, **kwargs).total.backward()
    assert inputs["weight"].grad is None
    assert inputs["hidden"].grad is not None


def test_bfloat16_head_is_close():
    torch.manual_seed(0)
    heads = {dtype: MixtureHead(16, 4, 8, dtype=dtype) for dtype in ("float32", "bfloat16")}
    heads["bfloat16"].load_state_dict(heads["float32"].state_dict())
    hidden, target = torch.randn(2, 3, 16), torch.randn(2, 3, 4)
    results = {}
    for dtype, head in heads.items():
        total, nll, *_ = head(hidden, target, torch.full((2, 3), 1 / 6))
        total.backward()
        assert nll.dtype == torch.float32
        results[dtype] = (total, head.linear.weight.grad)
    for actual, expected in zip(results["bfloat16"], results["float32"], strict=True):
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() < 0.02 * expected.norm()


def test_bfloat16_gradients_do_not_depend_on_the_number_of_blocks():
    """In bfloat16 sums over hundreds of blocks would stop growing."""
    generator = torch.Generator().manual_seed(0)
    hidden = 1 + torch.randn(1, 2048, 8, generator=generator)
    target = torch.randn(1, 2048, 2, generator=generator)
    gradients = {}
    for dtype, block in (("float32", 2048), ("bfloat16", 2048), ("bfloat16", 4)):
        head = MixtureHead(8, 2, 3, dtype=dtype, block=block)
        torch.nn.init.normal_(head.linear.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        torch.nn.init.zeros_(head.linear.bias)
        head(hidden, target, torch.full((1, 2048), 1 / 2048))[0].backward()
        gradients[dtype, block] = [p.grad for p in head.parameters()]
    for value in (gradients["bfloat16", 2048], gradients["bfloat16", 4]):
        for actual, expected in zip(value, gradients["float32", 2048], strict=True):
            error = (actual - expected).norm() / expected.norm()
            assert error < 0.02


@pytest.mark.parametrize("head", [MixtureHead, MultivariateHead])
def test_head_weighs_tokens(head):
    kwargs = {"num_mixtures": 3} if head is MixtureHead else {}
    model = head(8, 2, **kwargs)
    torch.nn.init.normal_(model.linear.weight, generator=torch.Generator().manual_seed(0))
    hidden, target, weight = torch.randn(2, 5, 8), torch.randn(2, 5, 2), torch.rand(2, 5)
    total, nll, *_ = model(hidden, target, weight)
    assert nll.shape == (2, 5)
    torch.testing.assert_close(total, (nll * weight).sum())


def test_a_new_head_is_one_broad_gaussian():
    head = MixtureHead(4, 3, 5)
    init_weights(head, torch.Generator())
    mixture = mixture_of(head, head.logits(torch.randn(2, 4)))
    x = torch.randn(2, 3)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(mixture.log_prob(x), expected)


def test_new_components_differ_only_by_the_noise_of_their_means():
    head = MixtureHead(4, 50, 40, mean_init_std=0.3, scale_init=0.4)
    init_weights(head, torch.Generator().manual_seed(0))
    mixture = mixture_of(head, head.logits(torch.randn(2, 4)))
    assert stats.kstest(mixture.locs[0].flatten().detach().numpy() / 0.3, "norm").pvalue > 1e-3
    torch.testing.assert_close(mixture.locs[0], mixture.locs[1])  # for all hidden states
    torch.testing.assert_close(mixture.scales, torch.full_like(mixture.scales, 0.4))
    assert (mixture.logits == 0).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("mean_init_std", value) for value in (-0.1, float("nan"), float("inf"))),
        *(("scale_init", value) for value in (-0.1, 0.0, 1e-6, float("nan"), float("inf"))),
    ],
)
def test_an_initial_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        MixtureHead(4, 3, 5, **{name: value})


def test_components_start_at_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 5.0], [-4.0, 0.0], [3.0, -3.0]])
    stds, counts = torch.tensor([0.3, 0.4, 0.5]), [100, 200, 300]
    clusters = [c + s * torch.randn(n, 2, generator=generator) for c, s, n in zip(centres, stds, counts, strict=True)]
    head = MixtureHead(4, 2, 3, scale_init=2.0, kmeans_init=True)
    init_weights(head, generator)
    head.start_at_clusters(torch.cat(clusters)[torch.randperm(600, generator=generator)])
    mixture = mixture_of(head, head.logits(torch.randn(4, generator=generator)))
    order = mixture.logits.argsort()
    torch.testing.assert_close(mixture.logits.softmax(-1)[order], torch.tensor(counts) / 600)
    torch.testing.assert_close(mixture.locs[order], torch.stack([x.mean(0) for x in clusters]))
    expected = torch.stack([2 * x.std(0, correction=0) for x in clusters])
    torch.testing.assert_close(mixture.scales[order], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"2 tokens .* 3 components"):
        head.start_at_clusters(torch.randn(2, 2))


def test_noise_and_clusters_do_not_go_together():
    with pytest.raises(ValueError, match=r"mean_init_std = 0\.1.*kmeans_init"):
        MixtureHead(4, 2, 3, mean_init_std=0.1, kmeans_init=True)


def components_learned(std, steps):
    """Trains a head on three clusters of tokens; returns its counts of components, and the largest difference between
    two components' parameters."""
    head = MixtureHead(4, 2, 3, mean_init_std=std).double()
    init_weights(head, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(8, 16, 4, generator=generator).double()
    target = torch.randint(-1, 2, (8, 16, 1), generator=generator) * 2.0
    target = (target + 0.1 * torch.randn(8, 16, 2, generator=generator)).double()
    for _ in range(steps):
        optimizer.zero_grad()
        scores = head(hidden, target, torch.full((8, 16), 1 / 128))
        scores.total.backward()
        optimizer.step()
    logits = head.linear.bias.detach()[3:].view(2, 3, 2)
    counted = count_components(scores.responsibilities.mean(0).numpy(), scores.responsibility_entropy.mean().item())
    return counted, (logits.amax(1) - logits.amin(1)).max().item()


def test_components_specialize():
    counted, difference = components_learned(std=0.1, steps=100)
    assert counted["distinct_components"] == pytest.approx(3, abs=0.2)
    assert difference > 1


def test_without_noise_components_stay_equal():
    """As in the reference, where only rounding makes a difference."""
    counted, difference = components_learned(std=0.0, steps=5)
    assert counted == pytest.approx({"effective_components": 3, "distinct_components": 1})
    assert difference < 1e-5
    assert components_learned(std=0.1, steps=5)[1] > 0.1


@settings(max_examples=20, deadline=None)
@given(k=st.integers(1, 9), apart=st.booleans())
def test_components_are_counted(k, apart):
    """Equal components and separate components are all used; only the separate ones are distinct."""
    head = head_with_bias(MixtureHead(4, 1, k), torch.zeros(3 * k))
    with torch.no_grad():
        if apart:
            head.linear.bias[k : 2 * k] = 10.0 * torch.arange(k)
        target = 10.0 * torch.arange(k).repeat(5).view(5, k, 1)
        scores = head(torch.zeros(5, k, 4), target, torch.ones(5, k))
    counted = count_components(scores.responsibilities.mean(0).numpy(), scores.responsibility_entropy.mean().item())
    assert counted["effective_components"] == pytest.approx(k, rel=1e-3)
    assert counted["distinct_components"] == pytest.approx(k if apart else 1, rel=1e-3)


def test_unused_components_do_not_count():
    counted = count_components(np.array([0.5, 0.5, 0.0]), 0.0)
    assert counted == pytest.approx({"effective_components": 2, "distinct_components": 2})


def assert_same_distribution(samples, cdf):
    assert stats.kstest(samples.numpy(), cdf).pvalue > 1e-3


def head_with_bias(head, bias):
    """A head with the same density for all hidden states."""
    init_weights(head, torch.Generator())
    with torch.no_grad():
        head.linear.bias.copy_(bias)
    return head


def noise(size, num_mixtures, dim):
    keys = prng.example_keys(0, torch.arange(size, dtype=torch.int32))
    return guidance.gumbel(prng.fold_in(keys, 0), num_mixtures), prng.normal(prng.fold_in(keys, 1), (dim,))


@torch.no_grad()
def test_mixture_samples_follow_the_density():
    n, logits, locs, raw_scales = 4000, torch.tensor([0.0, 1.0]), torch.tensor([-2.0, 1.0]), torch.tensor([-1.5, 0.0])
    head = head_with_bias(MixtureHead(4, 1, 2), torch.cat((logits, locs, raw_scales)))
    samples = head.sample(torch.zeros(n, 4), *noise(n, 2, 1))
    weights, scales = logits.softmax(0).numpy(), square_plus(raw_scales)
    cdf = lambda x: sum(
        w * stats.norm.cdf(x, m, s) for w, m, s in zip(weights, locs.numpy(), scales.numpy(), strict=True)
    )
    assert_same_distribution(samples[:, 0], cdf)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_a_component_is_that_of_the_mixture(dtype):
    generator = torch.Generator().manual_seed(0)
    head = MixtureHead(8, 3, 5, dtype=dtype)
    for p in head.parameters():
        p.normal_(generator=generator)
    hidden, chosen = torch.randn(6, 8, generator=generator), torch.tensor([0, 4, 2, 2, 1, 3])
    mixture = mixture_of(head, head.logits(hidden))
    loc, raw = head.component(hidden, chosen)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(head.component_logits(hidden), mixture.logits)
    torch.testing.assert_close(loc, mixture.locs[range(6), chosen], **close)
    torch.testing.assert_close(head.scale(raw), mixture.scales[range(6), chosen], **close)


def test_multivariate_gaussian_agrees_with_torch():
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(3, 3, generator=generator).abs().tril() + torch.eye(3)
    loc = torch.randn(3, generator=generator)
    ours = MultivariateGaussian(loc.expand(5000, 3), scale.expand(5000, 3, 3))
    reference = torch.distributions.MultivariateNormal(loc, scale_tril=scale)
    x = torch.randn(5000, 3, generator=generator)
    torch.testing.assert_close(ours.log_prob(x), reference.log_prob(x))
    head = MultivariateHead(4, 3)
    raw = scale - 1 / scale.where(scale > 0, 1.0)  # what square_plus makes `scale` of
    head = head_with_bias(head, torch.cat((raw.where(scale > 0, 0.0).flatten(), loc)))
    with torch.no_grad():
        samples = head.sample(torch.zeros(5000, 4), *noise(5000, 1, 3))
    covariance = scale @ scale.T
    for i in range(3):
        assert_same_distribution(samples[:, i], stats.norm(loc[i].item(), covariance[i, i].sqrt().item()).cdf)
    torch.testing.assert_close(samples.T.cov(), covariance, rtol=0.1, atol=0.3)
