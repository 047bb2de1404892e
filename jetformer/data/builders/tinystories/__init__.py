"""`tinystories`: short stories in simple English, to train a language model on."""

from jetformer.data.builders.tinystories.tinystories import TinyStories

__all__ = ["TinyStories"]
