"""`photo_patches`: 16×16 patches of scikit-learn's two photographs, for comparing density models on natural images.

No pixel is in two splits: training patches are from the left of a photograph, the others from strips further right, one
patch width apart. So the other splits show other parts of the same two scenes.
"""

import itertools

import tensorflow_datasets as tfds

SIZE = 16
# First and last column of each split, and the stride of patches: training patches overlap.
SPLITS = {"train": (0, 448, 4), "validation": (464, 544, 8), "test": (560, 640, 8)}


class PhotoPatches(tfds.core.GeneratorBasedBuilder):
    """`photo_patches`: image uint8 [16, 16, 3] (PNG), label china or flower; train / validation / test.

    Comes with scikit-learn, without a download.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012 (TFDS requires it)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=(
                "16x16 patches of the two photographs of 427x640 pixels that scikit-learn ships, china.jpg and "
                "flower.jpg. Splits of 22,454 / 936 / 936 patches, of columns 0..447, 464..543 and 560..639: every "
                "4th row and column begins a patch of train, every 8th one of validation and test."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=("china", "flower")),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_sample_images.html",
        )

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_sample_images  # slow, and needed to prepare only

        photos = load_sample_images().images
        return {name: self._generate_examples(photos, *columns) for name, columns in SPLITS.items()}

    def _generate_examples(self, photos, left, right, stride):
        for label, photo in enumerate(photos):
            rows, columns = range(0, len(photo) - SIZE + 1, stride), range(left, right - SIZE + 1, stride)
            for y, x in itertools.product(rows, columns):
                yield f"{label}-{y}-{x}", {"image": photo[y : y + SIZE, x : x + SIZE], "label": label}
