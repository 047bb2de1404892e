"""`photo_patches`: 16×16 patches of two photographs, the smallest natural images."""

from jetformer.data.builders.photo_patches.photo_patches import PhotoPatches

__all__ = ["PhotoPatches"]
