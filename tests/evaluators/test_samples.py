"""Pictures of samples: a row for each condition, with images that do not depend on the batch."""

import dataclasses

import numpy as np
import pytest
import torch

from jetformer import prng
from jetformer.evaluators.samples import Samples, sample_images
from jetformer.runtime import derive_seed
from jetformer.sampling import decode, grid
from jetformer.sampling.guidance import Guidance
from runs import untrained

WIDTH = 3 * 9 + 1  # three images of 8 pixels with lines around them
FACTOR = 512 // WIDTH


def image_at(picture, row, column):
    """Returns an image of a labelled picture, in its original size."""
    top = row * (14 + 10 * FACTOR) + 14 + FACTOR
    left = (1 + 9 * column) * FACTOR
    return picture[top : top + 8 * FACTOR : FACTOR, left : left + 8 * FACTOR : FACTOR]


def test_a_row_for_each_class(tmp_path, data_dir):
    context = untrained(tmp_path, data_dir)
    results = Samples(num_classes=4, num_images=3, num_round_trips=2)(context)
    picture = results.pictures["grid"]
    assert picture.shape == (4 * (14 + 10 * FACTOR), WIDTH * FACTOR, 1)
    keys = prng.example_keys(derive_seed(0, 3), torch.arange(12, dtype=torch.int32))
    with context.averaged():
        expected, _ = decode.sample_images(context.model.eval(), torch.arange(4).repeat_interleave(3)[:, None], keys)
    for row in range(4):
        for column in range(3):
            assert (image_at(picture, row, column) == expected[3 * row + column].numpy()).all()
    assert picture[:14].min() < 50  # the label
    assert results.scalars["round_trip_error"] < 0.01
    assert results.pictures["round_trip"].shape[1] % (2 * 9 + 1) == 0


@pytest.mark.parametrize(("names", "rows"), [(("cat", "dog"), 2), (tuple("abcdefghijklmn"), 10)])
def test_all_classes_of_the_data_by_default(tmp_path, data_dir, names, rows):
    context = dataclasses.replace(untrained(tmp_path, data_dir), class_names=names)
    samples = Samples(num_images=3, num_round_trips=0)
    samples.check(context)
    named = samples(context).pictures["grid"]
    assert named.shape[0] == rows * (14 + 10 * FACTOR)
    # Names are drawn above the same images.
    context = dataclasses.replace(context, class_names=None)
    numbered = Samples(num_classes=rows, num_images=3, num_round_trips=0)(context).pictures["grid"]
    is_label = np.arange(len(named)) % (14 + 10 * FACTOR) < 14
    assert (named[~is_label] == numbered[~is_label]).all()
    assert (named[is_label] != numbered[is_label]).any()
    with pytest.raises(ValueError, match="num_classes or prompts"):
        samples.check(context)


def test_a_model_of_texts_needs_prompts(tmp_path, shapes_dir):
    context = untrained(tmp_path, shapes_dir, gin_file="experiments/shapes.gin", Jet__num_heads=2)
    with pytest.raises(ValueError, match="prompts"):
        Samples(num_images=1, num_round_trips=0).check(context)


def test_guidance_in_rows(tmp_path, data_dir):
    context = untrained(tmp_path, data_dir)
    evaluator = Samples(
        num_classes=2, num_images=3, guidance=Guidance("density"), guidance_weights=(0.0, 4.0), num_round_trips=0
    )
    evaluator.check(context)
    picture = evaluator(context).pictures["grid"]
    assert picture.shape[0] == 4 * (14 + 10 * FACTOR)
    plain = Samples(num_classes=2, num_images=3, num_round_trips=0)(context).pictures["grid"]
    for row in range(2):  # weight 0 samples the class alone, up to rounding
        assert np.abs(image_at(picture, 2 * row, 1).astype(int) - image_at(plain, row, 1)).max() <= 1
        assert (image_at(picture, 2 * row + 1, 1) != image_at(plain, row, 1)).any()


def test_images_do_not_depend_on_the_batch(tmp_path, data_dir):
    context = untrained(tmp_path, data_dir)
    rows = {"text": np.arange(7, dtype=np.int32)[:, None]}
    together, three = (sample_images(context, rows, seed=1, batch_size=size).astype(int) for size in (7, 3))
    assert together.shape == (7, 8, 8, 1)
    assert np.abs(together - three).max() <= 1
    assert (sample_images(context, rows, seed=2) != together).any()


def test_the_round_trip_without_factored_out_dimensions(tmp_path, data_dir):
    context = untrained(tmp_path, data_dir, JetFormer__out_dim=2)
    results = Samples(num_classes=1, num_images=1, num_round_trips=5)(context)
    rows = 512 // (5 * 9 + 1) * 10 + 14
    assert results.pictures["round_trip"].shape[0] == 4 * rows  # images, reconstructions, from tokens alone, latents
    latents = []
    with context.averaged(), torch.no_grad():
        image = torch.from_numpy(context.first_examples(5, ("image",))["image"])
        noise = prng.uniform(prng.example_keys(derive_seed(0, 4), torch.arange(5, dtype=torch.int32)), image.shape[1:])
        latents = torch.cat(context.model.encode_image((image + noise) / 127.5 - 1)[:2], dim=-1)
    assert results.scalars["latents_mean"] == pytest.approx(latents.mean().item(), abs=1e-5)


def test_prompts(tmp_path, shapes_dir):
    context = untrained(tmp_path, shapes_dir, gin_file="experiments/shapes.gin", Jet__num_heads=2)
    samples = Samples(prompts=("a red circle", "a blue square"), num_images=2, num_round_trips=1)
    samples.check(context)
    assert samples(context).pictures["grid"].shape[2] == 3
    with pytest.raises(ValueError, match="is too long for the model"):
        dataclasses.replace(samples, prompts=("a red circle and " * 30,)).check(context)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 2, "prompts": ("a",)}, "num_classes or prompts"),
        ({"prompts": "a"}, "give a tuple of prompts"),
        ({"prompts": ()}, "give a tuple of prompts"),
        ({"num_classes": 2, "guidance_weights": (1.0,)}, "guidance weight 1.0 without guidance"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Samples(**arguments)


def test_labels_are_drawn():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    pictures = [grid.labelled(images, 2, [label]) for label in ("class 3", "class 4")]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0][:14] != pictures[1][:14]).any()
    assert (pictures[0][14:] == pictures[1][14:]).all()
