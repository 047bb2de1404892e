"""TFDS builders the package ships. Importing this makes them known to `tfds.builder(name)`."""

from jetformer.data.builders.digits import Digits

__all__ = ["Digits"]
