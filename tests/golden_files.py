"""Access to the golden values: `.npz` files of independent implementations, see tests/golden/README.md."""

import json
import os
import pathlib

import numpy as np
import torch

DIRECTORY = pathlib.Path(os.environ.get("JETFORMER_GOLDEN_DIR", pathlib.Path(__file__).parent / "golden"))


def paths(pattern: str) -> list:
    """Returns the directory's files of a kind.

    Raises:
      FileNotFoundError: if there is none, for a test without files would pass.
    """
    found = sorted(DIRECTORY.glob(f"{pattern}*.npz"))
    if not found and ("JETFORMER_GOLDEN_DIR" not in os.environ or not any(DIRECTORY.glob("*.npz"))):
        raise FileNotFoundError(f"no golden file {pattern}*.npz in {DIRECTORY}")
    return found


class Golden:
    """The config and the arrays of one file."""

    def __init__(self, path):
        self.arrays = np.load(path, allow_pickle=False)
        self.config = json.loads(str(self.arrays["config"]))

    def numpy(self, prefix: str) -> dict[str, np.ndarray]:
        prefix += "/"
        return {k.removeprefix(prefix): self.arrays[k] for k in self.arrays.files if k.startswith(prefix)}

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k: torch.from_numpy(np.asarray(v)) for k, v in self.numpy(prefix).items()}


def assert_output(actual, expected, tolerance: float = 2e-4) -> None:
    """Asserts equality to 2e-4, relative or absolute."""
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual.detach().to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


def assert_log(actual, expected) -> None:
    """Asserts equality of log-determinants or log-probabilities to 1e-3."""
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual.detach().to(expected.dtype), expected, rtol=0, atol=1e-3)


def assert_gradients(model, gradients: dict[str, np.ndarray], convert) -> None:
    """Asserts that all gradients exist, and equal the reference's to 1e-3 of the tensor's largest entry.

    Args:
      model: the model, after a backward pass.
      gradients: the reference's, by its names; frozen permutations are ignored.
      convert: maps tensors by the reference's names to a state dict of the model.
    """
    gradients = {k: v for k, v in gradients.items() if "FREEZE_ME" not in k}
    expected = convert(gradients, model)
    # One tensor of ours may consist of several of the reference's: the owner of each entry.
    owners = convert({k: np.full(v.shape, float(i)) for i, (k, v) in enumerate(gradients.items())}, model)
    bounds = torch.tensor([1e-3 * np.abs(v).max() + 1e-10 for v in gradients.values()])
    parameters = dict(model.named_parameters())
    assert expected.keys() == parameters.keys(), parameters.keys() ^ expected.keys()
    for name, value in expected.items():
        grad = parameters[name].grad
        grad = torch.zeros_like(value) if grad is None else grad
        assert ((grad - value).abs() <= bounds[owners[name].long()]).all(), name
