"""Tells which values of a metric are better, by the words of its name."""

import re

_NEITHER = {"std", "logdet", "tokens"}  # of a spread, and of the terms of a sum
_LOWER = {"bits", "loss", "nats", "perplexity", "error", "mse", "distance", "fid", "kid"}
_HIGHER = {"accuracy", "score", "precision", "recall", "psnr", "ssim", "images", "captions"}


def better(tag: str) -> str | None:
    """Returns "lower" or "higher", by the part of the tag after the slash; None if its words imply neither."""
    words = set(re.split("[/_]", tag.partition("/")[2] or tag))
    if words & _NEITHER:
        return None
    # An inception distance is a distance, not a score.
    return "lower" if words & _LOWER else "higher" if words & _HIGHER else None
