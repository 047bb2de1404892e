"""`tinystories`: short stories with a small child's vocabulary (arXiv 2305.07759), the version by GPT-4 only.

The Hugging Face Hub has them in two text files, where `<|endoftext|>` ends a story.
"""

from collections.abc import Iterable, Iterator

import tensorflow_datasets as tfds
from etils import epath

URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
FILES = {"train": "TinyStoriesV2-GPT4-train.txt", "validation": "TinyStoriesV2-GPT4-valid.txt"}
END = "<|endoftext|>"


def stories(lines: Iterable[str]) -> Iterator[str]:
    """Yields the stories in the lines of a file, without surrounding white space, except empty ones."""
    story: list[str] = []
    for line in lines:
        *ended, rest = line.split(END)
        for part in ended:
            yield from _text([*story, part])
            story = []
        story.append(rest)
    yield from _text(story)


def _text(parts: list[str]) -> list[str]:
    text = "".join(parts).strip()
    return [text] if text else []


class TinyStories(tfds.core.GeneratorBasedBuilder):
    """`tinystories`: text; train / validation. Downloads 2.2 GB."""

    # TFDS would derive the name tiny_stories.
    name = "tinystories"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012 (TFDS requires it)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Short stories in simple English, written by GPT-4 (arXiv 2305.07759).",
            homepage="https://huggingface.co/datasets/roneneldan/TinyStories",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        )

    @property
    def urls_without_checksums(self) -> dict[str, str]:
        """URLs of the files by split."""
        return {split: f"{URL}/{file}" for split, file in FILES.items()}

    def _split_generators(self, dl_manager):
        paths = dl_manager.download(self.urls_without_checksums)
        return {split: self._generate_examples(epath.Path(path)) for split, path in paths.items()}

    def _generate_examples(self, path):
        with path.open("r", encoding="utf-8") as file:
            for i, text in enumerate(stories(file)):
                yield i, {"text": text}
