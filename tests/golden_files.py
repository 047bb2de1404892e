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
    if not found and ("JETFORMER_GOLDEN_DIR" not in os.environ or not any(DIRECTORY.glob("*.npz"))):
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


def assert_gradients(model, gradients: dict[str, np.ndarray], convert) -> None:
    """Every gradient is there, equal to 1e-3 of the largest entry of the reference's tensor it belongs to.

    Args:
      model: after a backward pass.
      gradients: the reference's, by its names; those of frozen permutations do not count.
      convert: maps parameters by the reference's names to a state dict of the model.
    """
    gradients = {k: v for k, v in gradients.items() if "FREEZE_ME" not in k}
    expected = convert(gradients, model)
    # Several tensors of the reference may make up one of ours: which entry is whose?
    owners = convert({k: np.full(v.shape, float(i)) for i, (k, v) in enumerate(gradients.items())}, model)
    bounds = torch.tensor([1e-3 * np.abs(v).max() + 1e-10 for v in gradients.values()])
    parameters = dict(model.named_parameters())
    assert expected.keys() == parameters.keys(), parameters.keys() ^ expected.keys()
    for name, value in expected.items():
        grad = parameters[name].grad
        grad = torch.zeros_like(value) if grad is None else grad
        assert ((grad - value).abs() <= bounds[owners[name].long()]).all(), name
