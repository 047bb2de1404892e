"""The best checkpoint by a metric: how steps are ranked, and what is best by the name of a metric."""

import pytest
from upath import UPath

from jetformer.evaluators import best
from jetformer.evaluators.better import better


@pytest.mark.parametrize(
    ("tag", "direction"),
    [
        ("val/bits_per_dim", "lower"),
        ("val_ema/text_bits_per_token", "lower"),
        ("val/bits_per_dim_logdet", None),
        ("fid/frechet_inception_distance", "lower"),
        ("fid/inception_score_mean", "higher"),
        ("fid/inception_score_std", None),
        ("probe/accuracy", "higher"),
        ("probe/accuracy_5_shot/layer_0", "higher"),
        ("shown/images/colour", "higher"),
        ("grad_norm", None),
    ],
)
def test_which_values_are_better(tag, direction):
    assert better(tag) == direction


@pytest.mark.parametrize(
    ("found", "mode", "order", "since"),
    [
        ({}, "lower", [], 0),
        ({2: None, 4: None}, "lower", [], 2),
        ({2: 3.0, 4: 1.0, 6: None, 8: 2.0}, "lower", [4, 8, 2], 2),
        ({2: 3.0, 4: 1.0, 6: None, 8: 2.0}, "higher", [2, 8, 4], 3),
        ({2: 1.0, 4: 1.0}, "lower", [2, 4], 1),  # an equal value is not better
        ({2: 1.0, 4: 0.5}, "lower", [4, 2], 0),
    ],
)
def test_ranks(found, mode, order, since):
    assert best.rank(found, mode) == order
    assert best.evaluations_since_best(found, mode) == since


def test_what_was_recorded_of_a_metric(tmp_path):
    lines = ['{"step": 2, "seconds": 1, "val/x": 3.0}', '{"step": 4, "seconds": 1, "val/x": null, "val_ema/x": 1.0}']
    (tmp_path / "eval_val").mkdir()
    (tmp_path / "eval_val" / "results.jsonl").write_text("\n".join(lines))
    assert best.values(UPath(tmp_path), "val/x") == {2: 3.0, 4: None}
    assert best.values(UPath(tmp_path), "val_ema/x") == {4: 1.0}
    assert best.values(UPath(tmp_path), "test/x") == {}
