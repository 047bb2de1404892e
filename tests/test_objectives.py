"""Objectives: proper likelihoods, parts that add up to the batch, draws that can be replayed."""

import dataclasses
import math

import pytest
import torch
from scipy import stats

from flows import randomized
from jetformer import objectives, prng
from jetformer.models.factored_prior import FactoredPrior
from jetformer.models.flow_ablations import make_jet
from jetformer.models.initializers import init_weights
from jetformer.models.invertible import IdentityFlow
from jetformer.models.jet import Jet
from jetformer.objectives import JetFormerObjective, JetObjective
from small_models import small_model


def batch_of(size, image_shape=(4, 4, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (size, *image_shape), dtype=torch.uint8, generator=generator),
        "text": torch.randint(0, 10, (size, 3), generator=generator),
        "text_mask": torch.tensor([[True, True, False], [True, True, True]]).repeat(size // 2, 1),
        "text_loss": torch.tensor([[True, True, False], [True, True, True]]).repeat(size // 2, 1),
    }


EVERYTHING = JetFormerObjective(
    text_prefix_prob=0.5,
    drop_labels_prob=0.5,
    input_noise_std=0.3,
    rgb_noise_on_image_prefix=False,
    text_loss_weight=0.5,
)
OBJECTIVES = {
    "everything": EVERYTHING,
    "suffix": dataclasses.replace(EVERYTHING, loss_on_prefix=False),
    "text_first": dataclasses.replace(EVERYTHING, loss_on_prefix=False, text_prefix_prob=1.0),
}


def keys(seed, size):
    return prng.example_keys(seed, torch.arange(size, dtype=torch.int32))


def slice_of(tensors, rows):
    return {name: tensor[rows] for name, tensor in tensors.items()}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_parts_of_a_batch_add_up_to_the_batch(objective):
    """Losses, gradients and terms of the parts, with the batch's normalizers, add up to those of the batch."""
    model = small_model(factored_prior=FactoredPrior)
    batch = batch_of(8)
    draws = objective.draw(model, batch, keys(3, 8), train=True)
    normalizers = objective.normalizers(batch, draws, train=True)
    loss, terms = objective(model, batch, draws, noise_scale=4.0)
    expected = torch.autograd.grad(loss, model.parameters(), allow_unused=True)

    total, sums = 0.0, None
    for part_batch, part_draws in zip(objectives.split(batch, 4), objectives.split(draws, 4), strict=True):
        part_loss, part_terms = objective(
            model,
            part_batch,
            part_draws,
            noise_scale=4.0,
            normalizers=normalizers,
        )
        total = total + part_loss
        part = objectives.sum_terms(part_terms)
        sums = part if sums is None else objectives.add_sums(sums, part)
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(sums, objectives.sum_terms(terms))
    gradients = torch.autograd.grad(total, model.parameters(), allow_unused=True)
    for actual, value in zip(gradients, expected, strict=True):
        assert (actual is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(actual, value)


def test_draws_are_a_function_of_the_seed():
    model, batch = small_model(), batch_of(4)
    draw = lambda seed: EVERYTHING.draw(model, batch, keys(seed, 4), True)
    first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["rgb_noise"], other["rgb_noise"])
    assert first["dequant"].min() >= 0
    assert first["dequant"].max() < 1
    # An example's draws do not depend on its batch.
    part = EVERYTHING.draw(model, slice_of(batch, [2, 0]), keys(0, 4)[[2, 0]], True)
    assert all(torch.equal(first[name][[2, 0]], part[name]) for name in first)
    evaluation = EVERYTHING.draw(model, batch, keys(0, 4), train=False)
    assert evaluation.keys() == {"text_first", "dequant"}


def test_evaluation_has_no_noise():
    model, batch = small_model(), batch_of(4)
    draws = EVERYTHING.draw(model, batch, keys(0, 4), True)
    evaluate = lambda noise_scale: EVERYTHING(model, batch, draws, noise_scale=noise_scale, train=False)[0]
    torch.testing.assert_close(evaluate(0.0), evaluate(64.0))
    loss, _ = EVERYTHING(model, batch, draws, noise_scale=64.0)
    assert not torch.allclose(loss, evaluate(0.0))


def test_the_image_prefix_sends_no_gradient_to_the_flow():
    objective = JetFormerObjective(text_prefix_prob=0.0, loss_on_prefix=False, stop_grad_image_prefix=True)
    model, batch = small_model(), batch_of(4)
    draws = objective.draw(model, batch, keys(0, 4), True)
    loss, _ = objective(model, batch, draws)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.flow.parameters())
    assert model.image_emb.weight.grad.any()


def test_bits_per_dim_describe_a_distribution_over_pixels():
    """The probabilities of all images of two 8-bit pixels sum to the density's mass within the range of pixels."""
    flow = randomized(Jet((1, 1, 2), depth=2, emb_dim=4, num_heads=1, ps=1, kinds=("channels",)))
    values = torch.arange(0, 256, 2)
    pixels = torch.cartesian_prod(values, values).view(-1, 1, 1, 2).to(torch.uint8)
    # Steps of two pixel values, at their middle, so that each pair stands for four.
    bits = torch.cat(
        [
            JetObjective()(flow, {"image": part}, {"dequant": torch.ones(part.shape).double()})[1]["bits_per_dim"][0]
            for part in pixels.split(4096)
        ]
    )
    mass = (4 * 2 ** (-2 * bits)).sum()
    # The same mass, as the fraction of samples within the range.
    z = torch.randn(200_000, 1, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        x, _ = flow.inverse(z)
    inside = ((x >= -1) & (x < 256 / 127.5 - 1)).flatten(1).all(1).double()
    error = 4 * math.sqrt(inside.var() / len(inside))
    assert abs(mass - inside.mean()) < error + 1e-3


def test_jets_objective_without_couplings_is_a_normals():
    """The likelihood of an image is that of its pixels under a standard normal."""
    flow = Jet((2, 2, 1), depth=0, ps=1)
    image = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).view(1, 2, 2, 1)
    draws = {"dequant": torch.full((1, 2, 2, 1), 0.25).double()}
    loss, _ = JetObjective()(flow, {"image": image}, draws)
    x = (image.double() + 0.25) / 127.5 - 1
    expected = -(stats.norm.logpdf(x) - math.log(127.5)).mean() / math.log(2)
    assert loss.item() == pytest.approx(expected)


def test_jets_objective_has_no_curriculum():
    flow = Jet((2, 2, 1), depth=0, ps=1)
    with pytest.raises(ValueError, match="no noise curriculum"):
        JetObjective()(flow, batch_of(2, (2, 2, 1)), {}, noise_scale=3.0)


def test_values_that_do_not_count_are_not_summed():
    value = torch.tensor([1.0, float("nan"), 3.0, 5.0])
    counts = torch.tensor([True, False, True, False])
    vectors = torch.stack((value, 2 * value), dim=1)  # of which each example has one, that counts or not
    sums = objectives.sum_terms({"a": (value, counts), "b": (vectors, counts)})
    assert [x.tolist() for x in sums["a"]] == [4.0, 2]
    assert [x.tolist() for x in sums["b"]] == [[4.0, 8.0], 2]


def test_the_share_of_a_flows_largest_expansion():
    """1 if all couplings have their largest scale, 0 if they preserve volumes."""
    flow = Jet((4, 4, 1), depth=3, emb_dim=8, num_heads=2, ps=2)
    init_weights(flow, torch.Generator().manual_seed(0))
    batch = batch_of(2, (4, 4, 1))
    used = {}
    for raw_scale in (0.0, 20.0):
        with torch.no_grad():
            for coupling in flow.couplings:
                coupling.dnn.final_proj.bias.copy_(torch.tensor([0.0, 0.0, raw_scale, raw_scale]))
        _, terms = JetObjective(dequantize=False)(flow, batch, {})
        used[raw_scale] = terms["flow_expansion_used"][0]
    torch.testing.assert_close(used[0.0], torch.zeros(2))
    torch.testing.assert_close(used[20.0], torch.ones(2))


def test_a_flow_without_bound_has_no_share_of_it():
    flow = make_jet((4, 4, 1), depth=2, emb_dim=8, num_heads=2, ps=2, actnorm=True)
    init_weights(flow, torch.Generator().manual_seed(0))
    _, terms = JetObjective(dequantize=False)(flow, batch_of(2, (4, 4, 1)), {})
    assert "flow_expansion_used" not in terms


def test_noise_in_the_place_of_dequantization():
    """The density of noisy images, under another name; in training and evaluation alike."""
    objective, batch = JetObjective(noise_std=0.3), batch_of(64)
    flow = IdentityFlow((4, 4, 3))
    for train in (True, False):
        draws = objective.draw(flow, batch, keys(0, 64), train)
        assert draws.keys() == {"noise"}
        assert stats.kstest(draws["noise"].flatten(), "norm").pvalue > 0.01
        loss, terms = objective(flow, batch, draws, train=train)
        x = (batch["image"] + 0.5) / 127.5 - 1 + 0.3 * draws["noise"]
        nats = 0.5 * (x.square() + math.log(2 * math.pi)).mean()
        torch.testing.assert_close(loss, nats / math.log(2) + math.log2(127.5))
        names = ("noisy_bits_per_dim", "noisy_bits_per_dim_latents", "noisy_bits_per_dim_logdet")
        assert set(terms) == set(names)
        torch.testing.assert_close(terms[names[0]][0].mean(), loss)


def test_noise_that_denoising_removes():
    """The standard deviation of what rounding, dequantization and the noise of the end add to pixels."""
    assert JetObjective(noise_std=0.05).denoising_std() == 0.05
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (200_000,), generator=generator)
    noisy = torch.round(pixels + 3 * torch.randn(200_000, generator=generator))
    for dequantize, noise in ((True, torch.rand(200_000, generator=generator)), (False, 0)):
        measured = ((noisy + noise - pixels) / 127.5).std().item()
        assert JetFormerObjective(dequantize=dequantize).denoising_std(3.0) == pytest.approx(measured, rel=5e-3)
    for objective, name in ((JetObjective(), "noise_std"), (JetFormerObjective(), "noise_min")):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            objective.denoising_std(0.0)
