"""Datasets of the Hugging Face Hub: `huggingface:owner/name`, `huggingface:owner/name/config`, or `huggingface:/path`
for a local directory with the same content.

They are prepared by TFDS's builder for them, with three changes: a prepared dataset is read without asking the Hub;
names are those of the Hub, which TFDS would otherwise search for in a list of the whole Hub; and images keep their
bytes instead of being encoded again as PNG.
"""

import contextlib
import io
import os
import re
import types
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder
from tensorflow_datasets.core.dataset_builders import huggingface_dataset_builder
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.utils import conversion_utils

PREFIX = "huggingface:"


def builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Returns the builder of a prepared dataset or, if it is not prepared, one that downloads it.

    Downloading needs the package `datasets`, and honours the environment variables HF_TOKEN, HF_HOME and HF_ENDPOINT.

    Raises:
      ValueError: there is no such dataset, the Hub cannot be reached, or `datasets` is not installed.
    """
    repo, config = split_name(name)
    found = {"config": conversion_utils.to_tfds_name(config)} if config else {}
    with contextlib.suppress(tfds.core.DatasetNotFoundError):
        return read_only_builder.builder_from_files(tfds_name(repo), data_dir=data_dir, **found)
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"dataset {name!r} is not prepared, and preparing it needs the package datasets ({error}): "
            "pip install -e '.[hf]'"
        ) from error
    try:
        return HuggingFace(hf_repo_id=repo, hf_config=config, data_dir=data_dir)
    # The Hub may be unreachable; the repository unknown, gated, without data, or with several configurations.
    except Exception as error:
        causes = []
        cause: BaseException | None = error.__cause__ or error
        while cause is not None and cause not in causes:
            causes.append(cause)
            cause = cause.__cause__
        reason = " ".join(f"{type(causes[0]).__name__}: {causes[0]}".split())[:300]
        raise ValueError(
            f"cannot load dataset {name!r}: {reason}. Names are huggingface:owner/name or "
            "huggingface:owner/name/config; for a gated dataset, accept its conditions on its page and set HF_TOKEN"
        ) from error


def split_name(name: str) -> tuple[str, str | None]:
    """Returns the repository (or directory) of `huggingface:…`, and the configuration, None for the only one.

    Raises:
      ValueError: the name has another form.
    """
    rest = name.removeprefix(PREFIX)
    if rest.startswith(("/", "~", ".")):
        return os.path.abspath(os.path.expanduser(rest)), None
    if "/" not in rest:
        rest = rest.replace("__", "/", 1)  # TFDS's notation
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+){0,2}", rest):
        raise ValueError(f"dataset {name!r}: use huggingface:owner/name or huggingface:owner/name/config")
    repo, config = rest, None
    if rest.count("/") == 2:
        repo, config = rest.rsplit("/", 1)
    return repo, config


def tfds_name(repo: str) -> str:
    """Returns TFDS's name of a repository."""
    return conversion_utils.to_tfds_name(repo).strip("_")


class HuggingFace(huggingface_dataset_builder.HuggingfaceDatasetBuilder, skip_registration=True):
    """TFDS's builder for a dataset of the Hub, or for a local directory."""

    # TFDS's setter would set a name that begins with underscores for a path.
    @property
    def name(self) -> str:
        return tfds_name(self._hf_repo_id)

    @name.setter
    def name(self, value: str) -> None:
        del value

    def _hf_features(self):
        return _with_lists(super()._hf_features())

    @property
    def _hf_hub_info(self) -> Any:
        if os.path.isabs(self._hf_repo_id):
            return types.SimpleNamespace(gated=False, card_data=None, tags=None)
        return super()._hf_hub_info

    def _write_shards(self, shard_specs_by_split):
        import datasets

        features = self.info.features
        serializer = ExampleSerializer(features.get_serialized_info())
        images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
        writer = self._example_writer()

        def records(spec) -> Iterator[bytes]:
            rows = self._hf_builder.as_dataset(split=spec.shard_split)
            for key in images:
                rows = rows.cast_column(key, datasets.Image(decode=False))
            for row in rows:
                example = {
                    key: _encoded_image(row[key])
                    if key in images
                    else conversion_utils.to_tfds_value(row[key], feature)
                    for key, feature in features.items()
                }
                yield serializer.serialize_example(features.encode_example(example))

        infos = {}
        for split, specs in shard_specs_by_split.items():
            infos[split] = []
            for spec in specs:
                num_bytes = 0

                def counted(spec=spec):
                    nonlocal num_bytes
                    for i, record in enumerate(records(spec)):
                        num_bytes += len(record)
                        yield i, record

                writer.write(os.fspath(spec.path), counted())
                infos[split].append(
                    huggingface_dataset_builder._ShardInfo(
                        num_bytes=num_bytes, num_examples=spec.num_examples, num_exceptions=0
                    )
                )
        return infos


def _with_lists(feature: Any) -> Any:
    """Replaces the class List in features of `datasets` by lists, which TFDS's builder needs."""
    if isinstance(feature, dict):
        return type(feature)({key: _with_lists(value) for key, value in feature.items()})
    if type(feature).__name__ == "List":
        return [_with_lists(feature.feature)]
    return feature


def _encoded_image(value: dict[str, Any] | None) -> io.BytesIO | str:
    """Returns an undecoded image of `datasets` as TFDS takes files; None becomes an empty file."""
    if value is None or value["bytes"] is not None or not value["path"]:
        return io.BytesIO((value or {}).get("bytes") or b"")
    return value["path"]
