"""Which of a metric's values are better, by the words of its name. (Of others that is not said.)"""

import re

_NEITHER = {"std", "logdet", "tokens"}  # of a spread, and of the terms of a sum
_LOWER = {"bits", "loss", "nats", "perplexity", "error", "mse", "distance", "fid", "kid"}
_HIGHER = {"accuracy", "score", "precision", "recall", "psnr", "ssim", "images", "captions"}


def better(tag: str) -> str | None:
    """Returns whether a metric's "lower" or "higher" values are better, if its name says so: what follows the slash."""
    words = set(re.split("[/_]", tag.partition("/")[2] or tag))
    if words & _NEITHER:
        return None
    # An Inception distance is one, and no score.
    return "lower" if words & _LOWER else "higher" if words & _HIGHER else None
