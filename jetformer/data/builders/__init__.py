"""The package's own TFDS builders. Importing this module registers them with `tfds.builder(name)`."""

from jetformer.data.builders.digits import Digits
from jetformer.data.builders.photo_patches import PhotoPatches
from jetformer.data.builders.shapes import Shapes
from jetformer.data.builders.tinystories import TinyStories

__all__ = ["Digits", "PhotoPatches", "Shapes", "TinyStories"]
