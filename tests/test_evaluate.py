"""Evaluation as a job of its own: the figures of training, each checkpoint once, deletions survived."""

import json
import shutil

import pytest
import torch

from jetformer import checkpoint, evaluate, train
from jetformer.runtime import Runtime
from runs import run, scalars

pytestmark = pytest.mark.slow

CPU = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    workdir = tmp_path_factory.mktemp("finished")
    run(workdir, data_dir, train__total_steps=8, train__eval_steps=4, train__keep_last=9)
    return workdir


def results(workdir):
    return [json.loads(line) for line in (workdir / "eval" / evaluate.RESULTS_FILE).read_text().splitlines()]


def copy_of(finished, to, *steps):
    """The run as it is when it has saved these steps."""
    shutil.copytree(finished, to)
    for step in {4, 8} - set(steps):
        shutil.rmtree(to / "checkpoints" / f"{step:09d}")
    return to


def follow(workdir, once=False):
    evaluate.follow(workdir, [], [], CPU, poll_seconds=0.0, once=once)


def test_the_figures_are_those_of_training(finished, tmp_path):
    workdir = copy_of(finished, tmp_path / "run", 4, 8)
    follow(workdir)
    trained, evaluated = scalars(workdir), scalars(workdir / "eval")
    for name in ("val/bits_per_dim", "val_ema/bits_per_dim"):
        assert evaluated[name] == {8: trained[name][8]}
    assert [line["step"] for line in results(workdir)] == [8]
    follow(workdir)  # started again, it has nothing left to do
    assert [line["step"] for line in results(workdir)] == [8]


def test_checkpoints_are_evaluated_as_they_come(finished, tmp_path, monkeypatch):
    workdir = copy_of(finished, tmp_path / "run", 4)
    waited = []

    def sleep(seconds):
        """Training saves its last step meanwhile, and deletes the one before."""
        waited.append(seconds)
        shutil.copytree(finished / "checkpoints" / "000000008", workdir / "checkpoints" / "000000008")
        shutil.rmtree(workdir / "checkpoints" / "000000004")

    monkeypatch.setattr(evaluate.time, "sleep", sleep)
    follow(workdir)
    assert len(waited) == 1
    assert [line["step"] for line in results(workdir)] == [4, 8]


def test_a_checkpoint_that_is_deleted_while_it_is_read(finished, tmp_path, monkeypatch):
    workdir = copy_of(finished, tmp_path / "run", 4)
    load = train.load

    def load_too_late(*args):
        if checkpoint.latest(workdir) == 4:
            shutil.copytree(finished / "checkpoints" / "000000008", workdir / "checkpoints" / "000000008")
            shutil.rmtree(workdir / "checkpoints" / "000000004")
            raise FileNotFoundError("000000004")
        return load(*args)

    monkeypatch.setattr(train, "load", load_too_late)
    follow(workdir)
    assert [line["step"] for line in results(workdir)] == [8]


def test_once(finished, tmp_path):
    workdir = copy_of(finished, tmp_path / "run", 4)
    follow(workdir, once=True)
    assert [line["step"] for line in results(workdir)] == [4]
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        follow(workdir, once=True)


def test_a_workdir_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run: it has no config\.gin"):
        train.load(tmp_path, [], [], CPU)
