"""The example of docs/models.md works: a flow, objective, evaluator and preprocessing op outside the clone."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import torch

from flows import assert_invertible
from runs import scalars

ROOT = pathlib.Path(__file__).parent.parent
BLOCKS = dict(re.findall(r"^```(python|gin|bash)\n(.*?)^```$", (ROOT / "docs" / "models.md").read_text(), re.M | re.S))
# Appended to the commands, to make them short.
SHORT = {
    "jetformer.main": ["--gin_bindings=TOTAL_STEPS = 3", "--gin_bindings=BATCH_SIZE = 8", "--device=cpu"],
    "jetformer.evaluate": ["--device=cpu"],
    "jetformer.benchmark": ["--gin_bindings=BATCH_SIZE = 8", "--steps=2", "--warmup=1", "--samples=2", "--device=cpu"],
    "jetformer.sample": ["--num_images=2", "--device=cpu"],
}
COMMANDS = {shlex.split(line)[2]: shlex.split(line) for line in BLOCKS["bash"].splitlines()}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A directory with both files."""
    directory = tmp_path_factory.mktemp("my_project")
    (directory / "my_project.py").write_text(BLOCKS["python"])
    (directory / "my_experiment.gin").write_text(BLOCKS["gin"])
    return directory


@pytest.fixture(scope="module")
def run(project, data_dir):
    """Runs a command of the page in that directory, with /tmp there too; returns what it prints."""

    def run(program, *more, cwd=project):
        args = [arg.replace("/tmp/", f"{project}/") for arg in COMMANDS[program][1:]]
        if cwd != project:
            args = [arg.replace("=my_experiment", f"={project}/my_experiment") for arg in args]
        more = [*SHORT[program], *more, f'--gin_bindings=Data.data_dir = "{data_dir}"']
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, *args, *more], cwd=cwd, env=environ, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture(scope="module")
def trained(project, run):
    process = run("jetformer.main", "--gin_bindings=Latents.every_steps = 2")
    assert process.returncode == 0, process.stderr[-3000:]
    return project / "mine"


def test_every_command_has_settings():
    assert COMMANDS.keys() == SHORT.keys()


@pytest.mark.slow
def test_it_trains(trained):
    values = scalars(trained)
    assert values["train/penalty"][3] >= 0
    assert values["train/loss"][3] == pytest.approx(values["train/bits_per_dim"][3] + values["train/penalty"][3])
    lines = (trained / "eval_latents" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3]
    assert all(json.loads(line)["latents/std"] > 0 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["jetformer.evaluate", "jetformer.benchmark", "jetformer.sample"])
def test_the_other_programs_take_it(trained, run, program):
    process = run(program)
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.slow
def test_activation_checkpointing_and_compilation_take_its_blocks(project, trained, run):
    expected = scalars(trained)["train/loss"]
    for name, binding in {
        "recomputed": "train.activation_checkpointing = 'couplings'",
        "compiled": "train.compile = 'blocks'",
    }.items():
        process = run("jetformer.main", f"--workdir={project / name}", f"--gin_bindings={binding}")
        assert process.returncode == 0, process.stderr[-3000:]
        assert scalars(project / name)["train/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_module_that_is_not_found_names_pythonpath(run, tmp_path):
    process = run("jetformer.main", cwd=tmp_path)
    assert process.returncode == 1
    assert re.search(r"my_project.*PYTHONPATH", process.stderr.splitlines()[-1])


def test_its_flow_keeps_the_contract(project, monkeypatch):
    namespace = {}
    monkeypatch.syspath_prepend(project)
    source = BLOCKS["python"].replace("@gin.configurable\n", "").replace("@preprocess.register_keyed\n", "")
    exec(compile(source, "my_project.py", "exec"), namespace)
    flow = namespace["MlpFlow"]((2, 3, 2)).double()
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    assert_invertible(flow, flow.inverse, torch.randn(2, 2, 3, 2, dtype=torch.float64))
    assert flow.image_shape == (2, 3, 2)
