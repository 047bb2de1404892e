"""`shapes`: captioned drawings of simple scenes, the smallest dataset of images and texts."""

from jetformer.data.builders.shapes.shapes import Object, Scene, Shapes

__all__ = ["Object", "Scene", "Shapes"]
