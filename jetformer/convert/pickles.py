"""Files of PyTorch and of safetensors, without ever unpickling anything but tensors and plain values."""

import pickle
from typing import Any

import torch
from torch import Tensor


def load_pt(path: str) -> dict[str, Any]:
    """What `torch.save` wrote, on the CPU.

    Raises:
      ValueError: if there is no such file, it is damaged, or it holds more than tensors and plain values: to load that
        would run what the file says.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not loaded: it holds more than tensors and plain values, or is damaged, and to unpickle it "
            "could run any program"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is no PyTorch file, or damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary, but a {type(content).__name__}")
    return content


def load_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the file's notes.

    Raises:
      ValueError: if there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from error


def state_dict(content: Any, where: str) -> dict[str, Tensor]:
    """Looks that something is a state dict, and takes off what wrappers put before its names.

    Raises:
      ValueError: if it is none.
    """
    if not isinstance(content, dict) or not content or not all(isinstance(x, Tensor) for x in content.values()):
        raise ValueError(f"{where} is no state dict: tensors by name")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in content.items()}
