"""The Triton kernels of the image head: equal to PyTorch's operations, and compiled for GPUs. No GPU runs them here."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import interpreted_mixture
from jetformer.models import mixture_triton


@pytest.fixture(scope="module")
def differences():
    """What `interpreted_mixture.py` prints."""
    command = [sys.executable, interpreted_mixture.__file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", interpreted_mixture.SIZES)
def test_kernels_equal_the_operations_of_pytorch(differences, case):
    """Scores and gradients.

    Posteriors, and gradients with them, follow differences of log-densities of hundreds of nats, whose rounding in
    float32 is some 3e-5 nats: both are as far from float64. Gradients of logits in bfloat16 may be rounded differently.
    """
    for dtype, difference_of in differences[case].items():
        assert set(difference_of) == {*interpreted_mixture.NAMES, "without_gradients"}
        for name, difference in difference_of.items():
            if name in ("total", "nll", "without_gradients"):
                bound = 1e-6
            else:
                bound = 0.02 if dtype == "bfloat16" and name in ("hidden", "weight", "bias") else 2e-4
            assert difference <= bound, (name, dtype)


@pytest.mark.parametrize(("capability", "architecture"), [(80, "sm_80"), (90, "sm_90a")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", [mixture_triton.components_kernel, mixture_triton.gradients_kernel])
def test_kernels_compile_for_gpus(monkeypatch, tmp_path, kernel, dtype, capability, architecture):
    """By the ptxas that comes with Triton, for 1024 mixtures of 128 dimensions."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"K": 1024, "D": 128, "RAW_MIN": -1e6, "GROUP": 4, "COMPONENTS": 64, **mixture_triton.TILE}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    types = {"means": f"*{dtype}", "raw_scales": f"*{dtype}", "n": "i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    # Triton sees that addresses and n are divisible by 16, and loads 16 bytes at once.
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name not in constants}
    source = ASTSource(kernel, signature, constants, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f".target {architecture}" in compiled.asm["ptx"]
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert local_memory(compiled.asm["cubin"], tmp_path) == 0


def local_memory(cubin: bytes, folder: pathlib.Path) -> int:
    """Returns the bytes of memory in which a thread keeps what does not fit into its registers."""
    (folder / "kernel.cubin").write_bytes(cubin)
    command = [pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-res-usage", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return int(re.search(r"\bSTACK:(\d+)", done.stdout)[1])
