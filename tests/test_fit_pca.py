"""An experiment trains with a PCA that the program has fitted."""

import sys

import numpy as np
import pytest
import torch
from upath import UPath

from jetformer.runtime import Runtime
from jetformer.state import load
from runs import bindings, run, scalars, start


@pytest.mark.slow
def test_fit_and_train(tmp_path, data_dir):
    output = tmp_path / "pca.npz"
    args = [sys.executable, "-m", "jetformer.fit_pca", "--gin_file=experiments/digits.gin", "--patch_size=2"]
    args += [f"--output={output}", *(f"--gin_bindings={b}" for b in bindings(data_dir))]
    process = start(args)
    _, log = process.communicate(timeout=240)
    assert process.returncode == 0, log
    with np.load(output) as pca:
        assert pca["components_"].shape == (4, 4)
        np.testing.assert_allclose(pca["components_"] @ pca["components_"].T, np.eye(4), atol=1e-5)
    run(
        tmp_path / "run",
        data_dir,
        JetFormer__patches="@PatchPCA",
        PatchPCA__patch_size=2,
        PatchPCA__path=f'"{output}"',
        train__total_steps=2,
    )
    assert 0 < scalars(tmp_path / "run")["train/bits_per_dim"][1] < 12
    # The checkpoint has the PCA: the file is not needed any more.
    output.unlink()
    _, state, _ = load(UPath(tmp_path / "run"), [], [], Runtime(torch.device("cpu")))
    components = state.model.patches.components
    torch.testing.assert_close(components @ components.T, torch.eye(4), atol=1e-5, rtol=0)
