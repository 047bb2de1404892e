"""Every experiment file parses, is complete, and builds its model on the meta device."""

import functools
import pathlib

import pytest
import torch

from jetformer import config
from jetformer.data import preprocess, tokenizer
from jetformer.experiment import Experiment

DIRECTORY = pathlib.Path(__file__).parent.parent / "experiments"
PARAMETERS = {
    "digits": 530_736,
    "cifar10": 77_102_976,
    "cifar10_seed": 42_222_080,
    "benchmark_cpu": 23_734_528,
    "benchmark_flow": 13_314_432,
    "benchmark_head": 29_095_776,
    "benchmark_sampling": 12_464_096,
    "coco_captions": 1_117_618_435,
    "coco_captions_750m": 1_729_556_739,
    "coco_captions_1p3b": 2_731_184_387,
    "shapes": 2_396_866,
    "folder": 2_686_624,
    "folder_captions": 3_251_146,
    "tinystories": 62_694_145,
    "imagenet64": 396_212_224,
    "imagenet256": 1_068_477_440,
    "imagenet256_1p3b": 2_657_488_896,
    "jet_digits": 825_408,
    "jet_digits_labelled": 1_026_464,
    "tarflow_digits": 414_784,
    "tarflow_digits_noisy": 419_904,
    "tarflow_digits_student": 1_230_464,
    "tarflow_imagenet64": 460_142_784,
    "tarflow_imagenet64_class": 466_286_784,
    "tarflow_afhq256": 463_481_856,
    "jetformer_tarflow_digits": 528_048,
    "jet_cifar10": 103_155_200,
    "jet_imagenet64": 207_177_216,
    "jet_imagenet21k": 207_177_216,
    "ablations/actnorm": 825_536,
    "ablations/channels_only": 825_408,
    "ablations/checkerboard": 825_408,
    "ablations/cnn": 1_194_964,
    "ablations/dense_lu": 825_984,
    "ablations/dense_plain": 825_664,
    "ablations/glow": 826_112,
    "ablations/halves": 825_408,
    "ablations/jetformer_after_flow": 530_772,
    "ablations/jetformer_before_flow": 530_772,
    "ablations/jetformer_factored_prior": 540_184,
    "ablations/jetformer_identity_flow": 324_384,
    "ablations/jetformer_patch_pca": 324_384,
    "ablations/jetformer_pca_after_flow": 530_736,
    "ablations/jetformer_pca_before_flow": 530_736,
    "ablations/levels": 822_368,
    "ablations/masking": 831_616,
    "ablations/scale_exp": 825_408,
    "ablations/stripes": 825_408,
    "ablations/tarflow_two_blocks": 403_600,
    "ablations/tarflow_pixels": 434_704,
    "ablations/tarflow_labelled": 419_904,
    "ablations/tarflow_labelled_shared": 431_520,
}
# A file to add to an experiment.
ON_TOP = "ablations/on_photo_patches"


def test_every_experiment_is_tested():
    files = {path.relative_to(DIRECTORY).with_suffix("").as_posix() for path in DIRECTORY.rglob("*.gin")}
    assert files == {*PARAMETERS, ON_TOP}


@pytest.mark.parametrize(
    ("name", "bindings", "count"), [("ablations/cnn", ["Jet.ps = 4"], 1_284_592), ("digits", [], 825_184)]
)
def test_on_photo_patches(name, bindings, count):
    config.parse([str(DIRECTORY / f"{file}.gin") for file in (name, ON_TOP)], bindings)
    run = config.call(Experiment)
    assert run.data.name == "photo_patches"
    with torch.device("meta"):
        model = run.model()
    assert model.image_shape == (16, 16, 3)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", PARAMETERS)
def test_experiment(name, monkeypatch, tmp_path):
    # The first would be downloaded, the second is the user's own.
    here = (DIRECTORY / "shapes.model").as_uri()
    monkeypatch.setattr(tokenizer, "PUBLIC", {"c4_en": (here, None), "captions.model": (here, None)})
    monkeypatch.setattr(tokenizer, "load", functools.partial(tokenizer.load, cache_dir=str(tmp_path)))
    config.parse([str(DIRECTORY / f"{name}.gin")], [])
    run = config.call(Experiment)
    with torch.device("meta"):
        model = run.model()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert run.optimizer(model).param_groups[0]["params"]
    for pp in (run.data.pp, run.data.pp_eval or run.data.pp):
        preprocess.parse(pp)
    text = (DIRECTORY / f"{name}.gin").read_text()
    assert f"--gin_file=experiments/{name}.gin" in text  # it opens with its command
