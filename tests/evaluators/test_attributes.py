"""Attributes: real images and captions score 1, wrong ones less."""

import numpy as np
import pytest

from jetformer.data.builders.shapes import checker
from jetformer.data.builders.shapes.shapes import example
from jetformer.evaluators import attributes
from jetformer.evaluators.attributes import Attributes, ShapesChecker
from runs import untrained


@pytest.fixture
def context(tmp_path, shapes_dir):
    return untrained(tmp_path, shapes_dir, gin_file="experiments/shapes.gin", Jet__num_heads=2)


def evaluator(**kwargs):
    return Attributes(checker=ShapesChecker(), split="test", num_examples=6, **kwargs)


def test_scenes_equal_the_drawn_ones(context):
    scenes = {}
    for i in range(21_000, 22_000):
        image, captions, scene = example(i, held_out=True)
        scenes[captions[0], image.tobytes()] = scene
    examples = context.data.examples("test", 20)
    assert len(examples) == 20
    for found in examples:
        key = ShapesChecker().caption(found), found["image"].tobytes()
        assert checker.scene_of(found) == scenes[key]


def test_an_untrained_model_and_real_images(context):
    evaluator().check(context)
    scalars = evaluator()(context).scalars
    assert scalars["real_images"] == 1.0
    assert scalars["images"] < 0.5
    assert scalars["captions"] < 0.5
    assert {"images/colour", "images/background", "captions/count", "real_images/position"} <= scalars.keys()


def test_correct_samples_score_one(context, monkeypatch):
    """And swapped images score what the checker says."""
    examples = context.data.examples("test", 6)
    images, captions = np.stack([e["image"] for e in examples]), [ShapesChecker().caption(e) for e in examples]
    monkeypatch.setattr(attributes, "sample_images", lambda context, rows, **kwargs: images)
    monkeypatch.setattr(Attributes, "captions", lambda self, context, shown: captions)
    scalars = evaluator()(context).scalars
    assert (scalars["images"], scalars["captions"]) == (1.0, 1.0)
    assert scalars["images/shape"] == 1.0
    totals = np.sum(
        [checker.score_image(images[i ^ 1], captions[i])[a] for i in range(6) for a in checker.ATTRIBUTES], 0
    )
    swapped = images[[1, 0, 3, 2, 5, 4]]
    monkeypatch.setattr(attributes, "sample_images", lambda context, rows, **kwargs: swapped)
    assert evaluator()(context).scalars["images"] == pytest.approx(totals[0] / totals[1])
    assert totals[0] < totals[1]


def test_a_modality_that_the_model_does_not_learn_is_left_out(tmp_path, shapes_dir):
    context = untrained(
        tmp_path,
        shapes_dir,
        gin_file="experiments/shapes.gin",
        Jet__num_heads=2,
        JetFormerObjective__text_prefix_prob=0.0,
    )
    assert {name.partition("/")[0] for name in evaluator()(context).scalars} == {"captions", "real_images"}


def test_classes_are_not_captions(tmp_path, data_dir):
    with pytest.raises(ValueError, match="Attributes needs a JetFormer"):
        evaluator().check(untrained(tmp_path, data_dir))
