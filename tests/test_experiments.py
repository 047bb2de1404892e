"""Every experiment file parses, is complete, and builds the model it says, on the meta device."""

import functools
import pathlib

import pytest
import torch

from jetformer import config, train
from jetformer.data import preprocess, tokenizer

DIRECTORY = pathlib.Path(__file__).parent.parent / "experiments"
PARAMETERS = {
    "digits": 530_736,
    "cifar10": 77_102_976,
    "benchmark_cpu": 23_734_528,
    "benchmark_flow": 13_314_432,
    "benchmark_head": 29_095_776,
    "benchmark_sampling": 12_464_096,
    "coco_captions": 1_117_618_435,
    "coco_captions_750m": 1_729_556_739,
    "coco_captions_1p3b": 2_731_184_387,
    "shapes": 2_845_698,
    "tinystories": 62_694_145,
    "imagenet64": 396_212_224,
    "imagenet256": 1_068_477_440,
    "imagenet256_1p3b": 2_657_488_896,
}


def test_every_experiment_is_here():
    assert {path.stem for path in DIRECTORY.glob("*.gin")} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_experiment(name, monkeypatch, tmp_path):
    # What would be downloaded by its name.
    here = (DIRECTORY / "shapes.model").as_uri()
    monkeypatch.setattr(tokenizer, "PUBLIC", {"c4_en": (here, None)})
    monkeypatch.setattr(tokenizer, "load", functools.partial(tokenizer.load, cache_dir=str(tmp_path)))
    config.parse([str(DIRECTORY / f"{name}.gin")], [])
    run = config.call(train.Run)
    with torch.device("meta"):
        model = run.model()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert run.optimizer(model).param_groups[0]["params"]
    for pp in (run.data.pp, run.data.pp_eval or run.data.pp):
        preprocess.parse(pp)
    text = (DIRECTORY / f"{name}.gin").read_text()
    assert f"--gin_file=experiments/{name}.gin" in text  # it opens with its command
