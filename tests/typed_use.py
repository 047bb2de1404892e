"""What a type checker knows of the Python API: mypy checks this file, nothing runs it."""

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import assert_type

import jetformer


def numpy_in_and_out(pixels: npt.NDArray[np.uint8]) -> None:
    model = jetformer.load("/tmp/digits", step="best")
    assert_type(model, jetformer.Trained)
    assert_type(model.sample(classes=[3, 7], num_images=2), npt.NDArray[np.uint8])
    assert_type(model.caption(pixels), list[str])
    assert_type(model.continue_texts("once"), list[str])
    assert_type(model.step, int | None)
    model.bits_per_dim(pixels, classes=np.array([3])).mean()
    model.decode(model.encode(pixels)).astype(np.int64)


def tensors_in_and_out(pixels: torch.Tensor) -> None:
    model = jetformer.load("hf://owner/name").to("cpu", torch.float64)
    assert_type(model.encode(pixels), torch.Tensor)
    assert_type(model.bits_per_dim(pixels, classes=torch.tensor([3])), torch.Tensor)
    assert_type(model.complete(pixels, rows=4, classes=3), torch.Tensor)
    assert_type(model.inpaint(pixels, pixels > 0, classes=3), torch.Tensor)
    jetformer.train("experiments/digits.gin", ["TOTAL_STEPS = 2"], "/tmp/digits")


def mistakes(model: jetformer.Trained) -> None:
    """Each of these is an error for mypy; one that it does not find is an unused comment, which fails too."""
    model.sample(clases=[3])  # type: ignore[call-arg]
    model.encode([1, 2])  # type: ignore[type-var]
    jetformer.lod("/tmp/digits")  # type: ignore[attr-defined]
