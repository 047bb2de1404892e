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
from jetformer import config
from runs import preloaded, scalars

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

    def run(program, *more):
        args = [arg.replace("/tmp/", f"{project}/") for arg in COMMANDS[program][1:]]
        more = [*SHORT[program], *more, f'--gin_bindings=Data.data_dir = "{data_dir}"']
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            preloaded([sys.executable, *args, *more]),
            cwd=project,
            env=environ,
            capture_output=True,
            text=True,
            timeout=600,
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
@pytest.mark.parametrize(
    "program",
    ["jetformer.evaluate", "jetformer.benchmark", "jetformer.sample"],
)
def test_the_other_programs_take_it(trained, run, program):
    process = run(program)
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.slow
def test_recomputed_and_compiled_blocks_train_alike(project, trained, run):
    bindings = ["train.activation_checkpointing = 'couplings'", "train.compile = 'blocks'"]
    process = run("jetformer.main", f"--workdir={project / 'other'}", *(f"--gin_bindings={b}" for b in bindings))
    assert process.returncode == 0, process.stderr[-3000:]
    assert scalars(project / "other")["train/loss"] == pytest.approx(scalars(trained)["train/loss"], rel=1e-5)


def test_a_module_that_is_not_found_names_pythonpath(project):
    with pytest.raises(config.ConfigError, match=r"my_project.*PYTHONPATH") as error:
        config.parse([str(project / "my_experiment.gin")], [])
    assert "\n" not in str(error.value)


def test_its_flow_keeps_the_contract():
    namespace = {}
    # Unregistered, for this process may not get another `invert`.
    exec(re.sub(r"^@(gin|preprocess)\..*\n", "", BLOCKS["python"], flags=re.M), namespace)
    flow = namespace["MlpFlow"]((2, 3, 2)).double()
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    assert_invertible(flow, flow.inverse, torch.randn(2, 2, 3, 2, dtype=torch.float64))
    assert flow.image_shape == (2, 3, 2)
