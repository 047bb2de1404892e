"""Computing without autocast, whatever the loop uses."""

import contextlib

import torch


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Returns a context in which operations keep the precision of their arguments.

    Heads choose their own dtypes, and linear maps of a flow have to be inverted exactly.
    """
    if device.type == "meta":  # autocast does not know it
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
