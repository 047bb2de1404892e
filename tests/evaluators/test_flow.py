"""Pictures of a flow alone: rows by temperature and class, real images at the ends of interpolations."""

import math

import numpy as np
import pytest
import torch

from jetformer import prng
from jetformer.evaluators.flow import FlowSamples, great_circle
from jetformer.runtime import derive_seed
from jetformer.sampling.decode import to_uint8
from jetformer.sampling.flows import decode
from jetformer.sampling.guidance import Guidance
from runs import untrained

JET, LABELLED = "experiments/jet_digits.gin", "experiments/jet_digits_labelled.gin"
WIDTH = 4 * 9 + 1  # four images of 8 pixels with lines around them
FACTOR = 512 // WIDTH


def context_of(tmp_path, data_dir, gin_file=JET, **overrides):
    return untrained(tmp_path, data_dir, gin_file=gin_file, train__noise_scale=0.0, train__evaluators={}, **overrides)


def image_at(picture, row, column):
    """Returns an image of a labelled picture, in its original size."""
    top = row * (14 + 10 * FACTOR) + 14 + FACTOR
    left = (1 + 9 * column) * FACTOR
    return picture[top : top + 8 * FACTOR : FACTOR, left : left + 8 * FACTOR : FACTOR]


def test_rows_have_the_same_latents(tmp_path, data_dir):
    context = context_of(tmp_path, data_dir)
    samples = FlowSamples(temperatures=(0.0, 0.5, 1.0), num_images=4, num_interpolations=0, num_round_trips=0)
    samples.check(context)
    picture = samples(context).pictures["grid"]
    assert picture.shape == (3 * (14 + 10 * FACTOR), WIDTH * FACTOR, 1)
    keys = prng.example_keys(derive_seed(0, 7), torch.arange(4, dtype=torch.int32))
    with context.averaged(), torch.no_grad():
        x, _ = context.model.inverse(0.5 * prng.normal(keys, (8, 8, 1)))
    expected = ((x + 1) * 127.5).floor().clamp(0, 255).numpy()
    for column in range(4):
        assert np.abs(image_at(picture, 1, column) - expected[column]).max() <= 1
    assert (image_at(picture, 0, 0) == image_at(picture, 0, 3)).all()  # at temperature 0 all images are equal
    small = FlowSamples(temperatures=(1.0,), num_images=4, num_interpolations=0, num_round_trips=0, batch_size=3)
    again = small(context).pictures["grid"]
    assert np.abs(image_at(again, 0, 3).astype(int) - image_at(picture, 2, 3)).max() <= 1


def test_real_images_are_at_the_ends_of_an_interpolation(tmp_path, data_dir):
    context = context_of(tmp_path, data_dir)
    samples = FlowSamples(num_images=4, num_interpolations=3, num_round_trips=0)
    picture = samples(context).pictures["interpolation"]
    images = context.first_examples(6, ("image",))["image"].astype(int)
    for row in range(3):
        ends = [image_at(picture, row, column).astype(int) for column in (0, 3)]
        for end, image in zip(ends, images[2 * row : 2 * row + 2], strict=True):
            assert np.abs(end - image).max() <= 1
        between = image_at(picture, row, 1).astype(int)
        assert all(np.abs(between - end).max() > 8 for end in ends)


def test_metrics_of_the_round_trip(tmp_path, data_dir):
    context = context_of(tmp_path, data_dir)
    results = FlowSamples(num_interpolations=0, num_round_trips=4)(context)
    assert results.scalars["round_trip_error"] < 0.01
    with context.averaged(), torch.no_grad():
        image = torch.from_numpy(context.first_examples(4, ("image",))["image"])
        noise = prng.uniform(prng.example_keys(derive_seed(0, 7), torch.arange(4, dtype=torch.int32)), (8, 8, 1))
        latents, _ = context.model((image + noise) / 127.5 - 1)
    assert results.scalars["latents_mean"] == pytest.approx(latents.mean().item(), abs=1e-5)
    assert results.scalars["latents_std"] == pytest.approx(latents.std(correction=0).item(), abs=1e-5)
    picture = results.pictures["round_trip"]
    assert picture.shape[0] == 3 * (14 + 10 * FACTOR)
    for column in range(4):
        assert np.abs(image_at(picture, 1, column).astype(int) - image_at(picture, 0, column)).max() <= 1


def test_classes_of_a_labelled_flow(tmp_path, data_dir):
    context = context_of(tmp_path, data_dir, LABELLED)
    samples = FlowSamples(num_images=4, num_classes=2)
    samples.check(context)
    pictures = samples(context).pictures
    assert pictures["classes"].shape == (2 * (14 + 10 * FACTOR), WIDTH * FACTOR, 1)
    # An untrained flow hardly depends on labels, and the latents are those of the row of temperature 1.
    rows = [image_at(pictures["classes"], row, 0).astype(int) for row in range(2)]
    plain = image_at(pictures["grid"], 3, 0).astype(int)
    assert all(np.corrcoef(row.flat, plain.flat)[0, 1] > 0.5 for row in rows)


def test_guidance_and_denoising(tmp_path, data_dir):
    """Of the classes' pictures guidance, of all samples denoising; without them they are the plain ones."""
    context = context_of(tmp_path, data_dir, "experiments/tarflow_digits_noisy.gin", TarFlow__depth=2)
    arguments = {"temperatures": (1.0,), "num_images": 4, "num_interpolations": 0, "num_round_trips": 0}
    guided = {"guidance": Guidance("interp", 20.0)}
    plain, cleaned, moved = (
        FlowSamples(**arguments, **options)(context).pictures for options in ({}, {"denoise": True}, guided)
    )
    labels = torch.zeros(4, dtype=torch.int64)
    keys = prng.example_keys(derive_seed(0, 7), torch.arange(4, dtype=torch.int32))
    with context.averaged():
        x, _ = decode(context.model, prng.normal(keys, (8, 8, 1)), labels, **guided, noise_std=0.0)
        clean, _ = decode(context.model, prng.normal(keys, (8, 8, 1)), noise_std=0.1)
    for column in range(4):
        assert np.abs(image_at(moved["classes"], 0, column) - to_uint8(x)[column].numpy().astype(int)).max() <= 1
        assert np.abs(image_at(cleaned["grid"], 0, column) - to_uint8(clean)[column].numpy().astype(int)).max() <= 1
    assert (moved["grid"] == plain["grid"]).all()
    for other, name in ((cleaned, "grid"), (cleaned, "classes"), (moved, "classes")):
        assert (other[name] != plain[name]).any()


def test_what_a_flow_was_not_trained_for(tmp_path, data_dir):
    context = context_of(tmp_path, data_dir)
    with pytest.raises(ValueError, match="LabelledFlow of a TarFlow"):
        FlowSamples(guidance=Guidance("interp", 1.0)).check(context)
    with pytest.raises(ValueError, match="noise_std is 0"):
        FlowSamples(denoise=True).check(context)
    noisy = context_of(tmp_path, data_dir, "experiments/tarflow_digits_noisy.gin", JetObjective__drop_labels_prob=0.0)
    with pytest.raises(ValueError, match="drop_labels_prob is 0"):
        FlowSamples(guidance=Guidance("interp", 1.0)).check(noisy)


def test_it_needs_a_flow_alone(tmp_path, data_dir):
    context = untrained(tmp_path, data_dir)
    with pytest.raises(ValueError, match=r"FlowSamples needs .* not a JetFormer"):
        FlowSamples().check(context)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperatures": ()}, "temperatures"),
        ({"temperatures": (1.0, -0.1)}, "temperatures"),
        ({"num_images": 1}, "num_images = 1: "),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlowSamples(**arguments)


def test_a_great_circle_keeps_lengths():
    first, second = torch.randn(2, 3, 4, 5, dtype=torch.float64).unbind(0)
    second = 2 * second
    at = lambda weight: great_circle(first, second, torch.full((3,), weight, dtype=torch.float64))
    torch.testing.assert_close(at(0.0), first)
    torch.testing.assert_close(at(1.0), second)
    length = lambda x: x.flatten(1).norm(dim=1)
    torch.testing.assert_close(length(at(0.25)), 0.75 * length(first) + 0.25 * length(second))
    # The midpoint has the same angle to both.
    cosines = [torch.cosine_similarity(at(0.5).flatten(1), end.flatten(1)) for end in (first, second)]
    torch.testing.assert_close(*cosines)
    # Opposite or equal ends define no circle, but the result is finite.
    for end in (first, -first):
        assert great_circle(first, end, torch.full((3,), math.pi / 7, dtype=torch.float64)).isfinite().all()
