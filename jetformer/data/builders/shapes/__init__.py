"""`shapes`: captioned scenes of drawn objects, the smallest data set of images and text."""

from jetformer.data.builders.shapes.shapes import Object, Scene, Shapes

__all__ = ["Object", "Scene", "Shapes"]
