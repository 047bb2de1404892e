"""`photo_patches`: 16×16 patches of eight photographs, for comparing density models on natural images.

Splits are of whole photographs, so validation and test show scenes that training does not.
"""

import itertools

import tensorflow_datasets as tfds

SIZE = 16
# The photographs of each split, and the stride of their patches. Strides give the photographs of training, which differ
# in size, similar numbers of patches.
SPLITS = {
    "train": {"astronaut": 5, "cat": 4, "hubble": 10, "motorcycle": 6},
    "validation": {"coffee": 16, "flower": 16},
    "test": {"china": 16, "rocket": 16},
}
PHOTOS = tuple(itertools.chain.from_iterable(SPLITS.values()))


class PhotoPatches(tfds.core.GeneratorBasedBuilder):
    """`photo_patches`: image uint8 [16, 16, 3] (PNG), label of the one class photograph, photo (its name).

    The photographs come with scikit-learn and scikit-image, without a download.
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {  # noqa: RUF012 (TFDS requires it)
        "2.0.0": "Eight photographs instead of two, and splits of whole photographs instead of their parts.",
        "1.0.0": "Initial release.",
    }

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=(
                "16x16 patches of photographs that scikit-learn (china, flower) and scikit-image (the others) ship. "
                "train: 36,163 patches of astronaut, cat, hubble and motorcycle, which overlap; validation: 1,965 of "
                "coffee and flower; test: 2,080 of china and rocket."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    # Of a photograph that training does not show a model could not know the name.
                    "label": tfds.features.ClassLabel(names=("photograph",)),
                    "photo": tfds.features.ClassLabel(names=PHOTOS),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-image.org/docs/stable/api/skimage.data.html",
        )

    def _split_generators(self, dl_manager):
        photos = load_photos()
        return {name: self._generate_examples(photos, strides) for name, strides in SPLITS.items()}

    def _generate_examples(self, photos, strides):
        for name, stride in strides.items():
            photo = photos[name]
            for y, x in itertools.product(*(range(0, size - SIZE + 1, stride) for size in photo.shape[:2])):
                patch = photo[y : y + SIZE, x : x + SIZE]
                yield f"{name}-{y}-{x}", {"image": patch, "label": 0, "photo": name}


def load_photos():
    """Returns the photographs by name, uint8 `[H, W, 3]`.

    Raises:
      ValueError: if scikit-image is not installed.
    """
    from sklearn.datasets import load_sample_images  # slow, and needed to prepare only

    try:
        from skimage import data
    except ImportError as error:
        raise ValueError(
            f"preparing photo_patches needs the package scikit-image ({error}): pip install -e '.[photos]'"
        ) from error
    china, flower = load_sample_images().images
    return {
        "astronaut": data.astronaut(),
        "cat": data.cat(),
        "china": china,
        "coffee": data.coffee(),
        "flower": flower,
        "hubble": data.hubble_deep_field(),
        "motorcycle": data.stereo_motorcycle()[0],
        "rocket": data.rocket(),
    }
