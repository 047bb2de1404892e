"""The datasets that experiments and the README name exist; nothing is downloaded."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jetformer.data import sources
from jetformer.data.dataset import Data

# Features of each that preprocessing strings name.
NAMES = {
    "imagenet2012": {"image", "label"},
    "imagenet2012:5.1.0": {"image", "label"},
    "downsampled_imagenet/32x32": {"image"},
    "downsampled_imagenet/64x64": {"image"},
    "imagenet_resized/32x32": {"image", "label"},
    "imagenet_resized/64x64": {"image", "label"},
    "cifar10": {"image", "label"},
    "coco_captions": {"image", "captions"},
    "oxford_flowers102": {"image", "label"},
    "digits": {"image", "label"},
    "photo_patches": {"image", "label", "photo"},
    "shapes": {"image", "captions"},
    "tinystories": {"text"},
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name, tmp_path):
    builder = sources.builder(name, str(tmp_path))
    assert NAMES[name] <= set(builder.info.features)
    assert not builder.is_prepared()
    with pytest.raises(ValueError, match=rf"{name.partition(':')[0]}.* {tmp_path}/.*data_dir"):
        sources.open_source(name, str(tmp_path))


def test_the_only_class_feature_is_the_label(data_dir, shapes_dir):
    sources.prepare("digits", str(data_dir))
    assert Data("digits", pp="", data_dir=str(data_dir)).class_names() == tuple(map(str, range(10)))
    assert sources.open_source("shapes", shapes_dir).label_key == "background"


def test_a_prepared_directory_without_a_registered_builder(tmp_path):
    """A copy of a prepared dataset in data_dir is found by its files, as one on gs:// is."""
    with tfds.core.registered.skip_registration():

        class Unheard(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("2.0.0")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="small")]  # noqa: RUF012

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"id": np.int64}))

            def _split_generators(self, dl_manager):
                return {"train": ((i, {"id": i}) for i in range(7))}

            def _generate_examples(self):
                pass

    Unheard(data_dir=tmp_path).download_and_prepare()
    (batch,) = Data("unheard/small:2.0.0", "", eval_split="train[2:]", data_dir=str(tmp_path)).eval_batches(
        batch_size=5
    )
    assert sorted(batch)[:3] == ["_index", "_mask", "id"]


def test_a_prepared_dataset_on_gs(data_dir):
    """Its metadata is read, and its files are named by their URLs. (TensorFlow reads them.)"""
    sources.prepare("digits", str(data_dir))
    directory = sources.builder("digits", str(data_dir)).data_path
    files = {path.name: path.read_text() for path in directory.iterdir() if path.suffix in (".json", ".txt")}
    files["dataset_info.json"] = json.dumps(json.loads(files["dataset_info.json"]) | {"name": "numbers"})
    with tfds.testing.MockFs() as fs:
        for file, text in files.items():
            fs.add_file(f"gs://bucket/data/numbers/1.0.0/{file}", text)
        source = sources.TfdsSource("numbers", "gs://bucket/data")
        (shard,) = source.shards("train[100:]")
        assert shard.filename.startswith("gs://bucket/data/numbers/1.0.0/")
        assert (shard.skip, shard.take) == (100, 1247)
        assert source.class_names == tuple(map(str, range(10)))
        # Files about the dataset are kept there, too.
        path = source.keep_beside("labels-train.npz", b"1")
        assert str(path) == "gs://bucket/data/numbers/1.0.0/labels-train.npz"
        assert source.beside("labels-train.npz").read_bytes() == b"1"
