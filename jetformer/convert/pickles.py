"""Reads files of PyTorch and safetensors; unpickles tensors and plain values only."""

import pickle
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def load_pt(path: str) -> dict[str, Any]:
    """Reads a dictionary that `torch.save` wrote, to the CPU.

    Raises:
      ValueError: if the file is damaged, or holds more than tensors and plain values, which could run any code.
      OSError: if there is no such file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not loaded: it is damaged or holds more than tensors and plain values, and unpickling it could "
            "run any code"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is not a PyTorch file, or damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    return content


def load_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns tensors by name, and the file's metadata.

    Raises:
      ValueError: if the file is damaged.
      OSError: if there is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or damaged: {error}") from error


def state_dict(content: Any, where: str) -> dict[str, Tensor]:
    """Returns a state dict without the prefixes of DDP and torch.compile.

    Args:
      content: what was read.
      where: its place, for messages.

    Raises:
      ValueError: if it is not a state dict.
    """
    if not isinstance(content, dict) or not content or not all(isinstance(x, Tensor) for x in content.values()):
        raise ValueError(f"{where} is not a state dict of tensors by name")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in content.items()}


def check_axes(tensors: Mapping[str, Tensor], axes: Mapping[str, int], path: str, format: str) -> None:
    """Checks that a state dict has some tensors, with the expected numbers of axes.

    Args:
      tensors: the state dict.
      axes: number of axes by name.
      path: of its file, for messages.
      format: for messages.

    Raises:
      ValueError: if one is missing, or has another number of axes.
    """
    for name, ndim in axes.items():
        if name not in tensors or tensors[name].ndim != ndim:
            has = f"its shape is {list(tensors[name].shape)}" if name in tensors else "it is missing"
            raise ValueError(f"{path} is not a state dict of {format}: {name} should have {ndim} axes, but {has}")


def count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Returns the number of modules in a list of modules, whose tensors' names begin with `prefix`, as "blocks."."""
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
