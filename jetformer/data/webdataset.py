"""WebDataset shards, tar files in which consecutive files with the same stem are one example:
`webdataset:/path/{000..099}.tar`, also on gs://.

Images, captions and labels are written once as a TFDS dataset, in `data_dir`: a tar file can neither be shuffled well
nor be resumed at any example. (https://github.com/webdataset/webdataset has the format.)
"""

import contextlib
import hashlib
import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import read_only_builder

from jetformer.data.folder import EXTENSIONS

PREFIX = "webdataset:"

_CAPTION, _LABEL = ".txt", ".cls"


def builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Returns the builder of prepared shards or, if they are not prepared, one that reads them.

    Raises:
      ValueError: there are no such shards, or they hold no images.
    """
    pattern = name.removeprefix(PREFIX)
    if "://" not in pattern:
        pattern = os.path.abspath(os.path.expanduser(pattern))
    with contextlib.suppress(tfds.core.DatasetNotFoundError):
        return read_only_builder.builder_from_files(tfds_name(pattern), data_dir=data_dir)
    return WebDataset(pattern=pattern, data_dir=data_dir)


def tfds_name(pattern: str) -> str:
    """Returns the name under which shards are prepared."""
    words = re.sub(r"\W+", "_", pattern.rpartition("/")[2].lower()).strip("_")
    return f"webdataset_{words}_{hashlib.sha256(pattern.encode()).hexdigest()[:8]}"


def expand(pattern: str) -> list[str]:
    """Returns the paths of `{000..099}`, `{train,extra}` and, by what exists, of `*`, in order.

    Raises:
      ValueError: no file fits a pattern with `*`.
    """

    def choices(braces: str) -> list[str]:
        first, dots, last = braces.partition("..")
        if dots and first.isdecimal() and last.isdecimal():
            return [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
        return braces.split(",")

    parts = re.split(r"\{([^{}]*)\}", pattern)  # what is in braces is at odd positions
    listed = [choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    paths = ["".join(path) for path in itertools.product(*listed)]
    if "*" not in pattern:
        return paths
    found = []
    for path in paths:
        directory, _, last = path.rpartition("/")
        found += sorted(os.fspath(file) for file in epath.Path(directory).glob(last))
    if not found:
        raise ValueError(f"no file fits {pattern}: give tar files, as {PREFIX}/data/{{000..099}}.tar")
    return found


class WebDataset(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """`webdataset:…`, split train: image; captions (the lines of .txt) and label (of .cls) if the first example has
    them.

    Raises:
      ValueError: there are no such shards, or the first example has no image.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, pattern: str, **kwargs):
        self._pattern, self._paths = pattern, expand(pattern)
        first = next(examples(self._paths[0]), (None, {}))[1]
        self._keys = {_key(suffix) for suffix in first} - {None}
        if "image" not in self._keys:
            has = ", ".join(first) or "no files"
            raise ValueError(
                f"the first example of {self._paths[0]} has {has}: expected one of {', '.join(EXTENSIONS)}"
            )
        super().__init__(**kwargs)

    # TFDS would take the class's.
    @property
    def name(self) -> str:
        return tfds_name(self._pattern)

    @name.setter
    def name(self, value: str) -> None:
        del value

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "label": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"WebDataset shards {self._pattern}",
            features=tfds.features.FeaturesDict({key: features[key] for key in sorted(self._keys)}),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for path in self._paths:
            for name, files in examples(path):
                values = {_key(suffix): content for suffix, content in files.items()}
                if missing := sorted(self._keys - values.keys()):
                    raise ValueError(f"example {name} of {path} has no {missing[0]}, unlike the first one of all")
                yield f"{path}/{name}", {key: _value(key, values[key], f"{name} of {path}") for key in self._keys}


def examples(path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields the examples of a tar file: their names, and their files by suffix, as ".jpg".

    Raises:
      ValueError: it cannot be read.
    """
    try:
        with epath.Path(path).open("rb") as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
            files = (member for member in archive if member.isfile())
            for name, members in itertools.groupby(files, lambda member: _split(member.name)[0]):
                yield name, {_split(member.name)[1]: archive.extractfile(member).read() for member in members}
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}): replace it") from error


def _split(path: str) -> tuple[str, str]:
    """Returns the name and the suffix of a file: what follows the first dot of its last part."""
    directory, slash, file = path.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return directory + slash + stem, (dot + suffix).lower()


def _key(suffix: str) -> str | None:
    """Returns the feature that a file becomes; None if it is ignored."""
    return "image" if suffix in EXTENSIONS else {_CAPTION: "captions", _LABEL: "label"}.get(suffix)


def _value(key: str, content: bytes, where: str) -> io.BytesIO | list[str] | int:
    if key == "image":
        return io.BytesIO(content)  # as it is encoded
    try:
        text = content.decode()
        return int(text) if key == "label" else [line for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{key} of {where} cannot be read: {error}") from error
