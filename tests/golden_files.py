"""Access to the golden values: `.npz` files of independent implementations, see tests/golden/README.md."""

import json
import os
import pathlib

import numpy as np
import torch

DIRECTORY = pathlib.Path(os.environ.get("JETFORMER_GOLDEN_DIR", pathlib.Path(__file__).parent / "golden"))


def paths(pattern: str) -> list:
    """The directory's files of a kind. A kind of which there is none is a mistake, not an empty test."""
    found = sorted(DIRECTORY.glob(f"{pattern}*.npz"))
    if not found and "JETFORMER_GOLDEN_DIR" not in os.environ:
        raise FileNotFoundError(f"no golden file {pattern}*.npz in {DIRECTORY}")
    return found


class Golden:
    """One file: its config, and its arrays by prefix."""

    def __init__(self, path):
        self.arrays = np.load(path, allow_pickle=False)
        self.config = json.loads(str(self.arrays["config"]))

    def numpy(self, prefix: str) -> dict[str, np.ndarray]:
        prefix += "/"
        return {k.removeprefix(prefix): self.arrays[k] for k in self.arrays.files if k.startswith(prefix)}

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k: torch.from_numpy(np.asarray(v)) for k, v in self.numpy(prefix).items()}


def assert_output(actual, expected, tolerance: float = 2e-4) -> None:
    """Equal to 2e-4, relative or absolute, whichever is larger."""
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual.detach().to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


def assert_log(actual, expected) -> None:
    """Log-determinants and log-probabilities: equal to 1e-3 absolute."""
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual.detach().to(expected.dtype), expected, rtol=0, atol=1e-3)


def assert_gradients(model, expected: dict[str, torch.Tensor]) -> None:
    """Every expected gradient is there, equal to 1e-3 of its tensor's largest entry; a missing one is zero."""
    parameters = dict(model.named_parameters())
    assert expected.keys() <= parameters.keys()
    assert expected.keys() == parameters.keys(), parameters.keys() - expected.keys()
    for name, value in expected.items():
        grad = parameters[name].grad
        grad = torch.zeros_like(value) if grad is None else grad
        bound = 1e-3 * value.abs().max().item() + 1e-8
        torch.testing.assert_close(grad, value, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
