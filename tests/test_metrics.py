"""Metrics arrive in the log, in TensorBoard files and in Weights & Biases, whose failure stops no run."""

import json
import os
import pty
import struct
import subprocess
import sys
import tempfile
import threading
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from absl import logging
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import nn
from upath import UPath

from jetformer import metrics
from runs import scalars

WARNING = "without W&B: "


def write(writer):
    """Writes scalars at three steps, the last one before the others, as evaluations may, an image and a text."""
    writer.write_scalars(10, {"train/loss": 3.5, "grad_norm": np.float32(0.25)})
    writer.write_scalars(20, {"train/loss": 2.5})
    writer.write_scalars(5, {"val/loss": 4.5})
    picture = np.zeros((4, 6, 3), np.uint8)
    picture[1, 2] = (255, 128, 3)
    writer.write_images(20, {"samples": picture[None]})
    writer.write_texts(0, {"config": "    Jet.depth = 2\n    a < b"})
    return picture


def check_events(directory):
    written = scalars(directory)
    assert written["train/loss"] == {10: 3.5, 20: 2.5}
    assert written["grad_norm"] == {10: 0.25}
    assert written["val/loss"] == {5: 4.5}


@pytest.fixture
def wandb(tmp_path_factory, monkeypatch):
    """W&B offline, and logged out."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home / name.lower()))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # it reads the environment once
    yield wandb
    wandb.teardown()


def records(file):
    """Yields the records of a W&B run's file: a header of 7 bytes, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data.startswith(b":W&B")
    position, parts = 7, b""
    while position < len(data):
        if (rest := -position % 2**15) < 7:  # a header does not straddle blocks
            position += rest
        _, size, kind = struct.unpack_from("<IHB", data, position)
        position += 7
        parts += data[position : position + size]
        position += size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_runs(directory):
    """Waits for W&B, and returns the files of the W&B runs in a directory, oldest first."""
    pytest.importorskip("wandb").teardown()
    return sorted(directory.glob("wandb/*run-*/*.wandb"), key=lambda file: file.parent.name)


def history(file):
    """Returns the rows of a W&B run's history, without those keys that W&B adds."""
    rows = []
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            row = {}
            for item in record.history.item:
                key = item.key or "/".join(item.nested_key)
                if not key.startswith("_"):
                    row[key] = json.loads(item.value_json)
            rows.append(row)
    return rows


def one(file, kind):
    """Returns a W&B run's first record of a kind."""
    return next(getattr(record, kind) for record in records(file) if record.WhichOneof("record_type") == kind)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]


def test_events(tmp_path):
    written = metrics.Metrics(UPath(tmp_path), process_index=0)
    write(written.writer)
    written.publish()
    check_events(tmp_path)
    written.writer.write_scalars(30, {"train/loss": 1.5})
    written.close()
    assert scalars(tmp_path)["train/loss"][30] == 1.5
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith("events.")] == []


def infos(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "INFO"]


@pytest.fixture
def verbosity():
    """Sets absl's verbosity for a test."""
    before = logging.get_verbosity()
    yield logging.set_verbosity
    logging.set_verbosity(before)


def test_the_log_is_one_line_for_each_write(tmp_path, caplog, verbosity):
    """Loss, bits, throughput and time left; no texts, images, steps/s or metrics of parts."""
    verbosity(logging.INFO)
    written = metrics.Metrics(UPath(tmp_path), process_index=0, start_step=1000, total_steps=4000)
    written.writer.write_texts(1000, {"config": "A.b = 1"})
    written.writer.write_scalars(1010, {"steps_per_sec": 7.0, "uptime": 9.0})
    scalars = {"train/loss": 123.456, "train/bits_per_dim": 3.25, "train/text_bits_per_token": 1.75}
    scalars |= {"examples_per_sec": 1234.4, "grad_norm": 0.5}
    written.writer.write_scalars(2000, scalars)
    written.writer.write_scalars(
        2000,
        {"val/bits_per_dim": 3.5, "val_ema/bits_per_dim": 3.25, "val/effective_components": 14.5, "val/logdet": 0.125},
    )
    written.writer.write_scalars(3000, {"probe/accuracy": 0.25, "probe/accuracy/class_1": 0.75})
    written.writer.write_images(2000, {"samples": np.zeros((1, 4, 4, 3), np.uint8)})
    written.writer.write_scalars(4000, {"train/loss": 100.0})
    written.close()
    train, likelihood, probe, end = infos(caplog)
    bits = "3.2500 bits per dim, 1.7500 bits per token"
    for value in ("2,000 of 4,000", "123.46", bits, "1,234 examples/s", "left"):
        assert value in train
    assert "0.5" not in train
    assert "2,000: val/bits_per_dim 3.5, val_ema/bits_per_dim 3.25, val/effective_components 14.5" in likelihood
    assert "logdet" not in likelihood
    assert "3,000: probe/accuracy 0.25" in probe
    assert "class_1" not in probe
    assert "4,000 of 4,000" in end
    assert "0:00:00 left" in end


def test_the_time_left_is_estimated_without_the_first_steps(tmp_path, caplog, verbosity, monkeypatch):
    """They may include compilation."""
    verbosity(logging.INFO)
    clock = iter([0.0, 50.0, 60.0, 90.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    log = metrics.LogWriter(start_step=100, total_steps=1100)
    for step in (200, 300, 600):
        log.write_scalars(step, {"train/loss": 1.0})
    assert [line.rpartition(", ")[2] for line in infos(caplog)] == ["0:07:30 left", "0:01:20 left", "0:00:50 left"]


@pytest.mark.parametrize("verbose", [False, True])
def test_parameters_and_progress_in_the_log(tmp_path, caplog, verbosity, verbose):
    """Sizes by top-level module; --verbosity=1 adds a table, all metrics and the progress."""
    verbosity(logging.DEBUG if verbose else logging.INFO)
    model = nn.ModuleDict({"small": nn.Linear(2, 3), "large": nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 1))})
    metrics.log_parameters(model)
    assert "1,270 parameters: large 1,261, small 9" in infos(caplog)[0]
    written = metrics.Metrics(UPath(tmp_path), process_index=0)
    progress = metrics.create_progress(written.writer, 2)
    progress(1)
    progress(2)
    written.close()
    assert scalars(tmp_path).keys() == {"steps_per_sec", "uptime"}
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert ("large.0.weight" in text) == verbose
    assert ("steps_per_sec=" in text) == verbose
    assert ("steps/s" in text) == verbose
    assert len(caplog.records) > 1 if verbose else len(caplog.records) == 1


def test_a_resumed_run_replaces_later_steps(tmp_path):
    """TensorBoard shows one curve: the first run's up to the step of the resume, then the second's."""
    for start_step, value in ((0, 1.0), (20, 2.0)):
        written = metrics.Metrics(UPath(tmp_path), process_index=0, start_step=start_step)
        for step in range(start_step + 10, start_step + 31, 10):
            written.writer.write_scalars(step, {"train/loss": value})
        if start_step == 0:
            written.writer.write_scalars(20, {"val/bits_per_dim": 5.0})
        written.close()
        for file in list(tmp_path.glob("events.out.tfevents.*")):  # as if the resumed run started an hour later
            _, _, _, seconds, *rest = file.name.split(".")
            file.rename(file.with_name(".".join(("events.out.tfevents", str(int(seconds) - 3600), *rest))))
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    curve = [(e.step, make_ndarray(e.tensor_proto).item()) for e in accumulator.Tensors("train/loss")]
    assert curve == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 2.0)]
    assert [e.step for e in accumulator.Tensors("val/bits_per_dim")] == [20]


def test_events_at_a_url(tmp_path):
    workdir = UPath(f"memory://{tmp_path.name}/run")
    workdir.mkdir(parents=True)
    written = metrics.Metrics(workdir, process_index=0)

    def fetched():
        for file in workdir.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    write(written.writer)
    written.publish()
    check_events(fetched())
    written.writer.write_scalars(30, {"train/loss": 1.5})
    written.close()
    assert scalars(fetched())["train/loss"][30] == 1.5


def test_other_processes_write_only_to_the_log(tmp_path, wandb):
    written = metrics.Metrics(UPath(tmp_path), process_index=1, wandb_project="jetformer")
    write(written.writer)
    written.close()
    assert list(tmp_path.iterdir()) == []


def test_wandb(tmp_path, wandb, caplog):
    workdir = tmp_path / "digits" / "3"
    workdir.mkdir(parents=True)
    written = metrics.Metrics(UPath(workdir), process_index=0, wandb_project="jetformer")
    picture = write(written.writer)
    written.writer.write_images(20, {"grey": np.full((2, 4, 4, 1), 128, np.uint8)})
    written.close()

    check_events(workdir)
    (file,) = wandb_runs(workdir)
    rows = history(file)
    assert rows[:3] == [
        {"step": 10, "train/loss": 3.5, "grad_norm": 0.25},
        {"step": 20, "train/loss": 2.5},
        {"step": 5, "val/loss": 4.5},
    ]
    samples, config, grey = rows[3:]
    files = file.parent / "files"
    assert samples["step"] == 20
    with Image.open(files / samples["samples/filenames"][0]) as image:
        np.testing.assert_array_equal(np.asarray(image), picture)
    assert grey["grey/count"] == 2
    with Image.open(files / grey["grey/filenames"][1]) as image:
        np.testing.assert_array_equal(np.asarray(image), np.full((4, 4), 128))
    assert config["step"] == 0
    assert "<pre>    Jet.depth = 2\n    a &lt; b</pre>" in (files / config["config/path"]).read_text()
    run = one(file, "run")
    assert (run.project, run.display_name, run.run_group, run.job_type) == (
        "jetformer",
        "digits/3",
        "digits/3",
        "train",
    )
    x_axes = {record.metric.glob_name: record.metric.step_metric for record in records(file)}
    assert x_axes["*"] == "step"
    assert one(file, "exit").exit_code == 0
    assert not list(file.parent.rglob("*.patch"))
    assert warnings(caplog) == []


def test_a_resumed_run_continues_its_wandb_run(tmp_path, wandb):
    workdir = UPath(tmp_path)
    ids = []
    for step in (1, 2):
        written = metrics.Metrics(workdir, process_index=0, wandb_project="jetformer")
        written.writer.write_scalars(step, {"train/loss": 1.0})
        written.close()
        ids.append(one(wandb_runs(tmp_path)[-1], "run").run_id)
    assert ids == [(workdir / metrics.WANDB_ID_FILE).read_text()] * 2
    assert [history(file)[0]["step"] for file in wandb_runs(tmp_path)] == [1, 2]


def test_evaluation_jobs_are_wandb_runs_in_the_group_of_their_run(tmp_path, wandb):
    """Even in the same process, at the same time."""
    workdir = UPath(tmp_path / "digits" / "3")
    directory = workdir / "eval_fid"
    directory.mkdir(parents=True)
    training = metrics.Metrics(workdir, process_index=0, wandb_project="jetformer")
    training.writer.write_scalars(7, {"train/loss": 1.0})
    evaluation = metrics.Metrics(directory, process_index=0, wandb_project="jetformer", training_workdir=workdir)
    evaluation.writer.write_scalars(5, {"val/fid": 9.0})
    evaluation.close()
    training.close()
    of_training, of_evaluation = (wandb_runs(place)[0] for place in (workdir, directory))
    runs = [one(file, "run") for file in (of_training, of_evaluation)]
    assert runs[0].run_id != runs[1].run_id
    assert [run.run_group for run in runs] == ["digits/3", "digits/3"]
    assert [run.display_name for run in runs] == ["digits/3", "3/eval_fid"]
    assert [run.job_type for run in runs] == ["train", "eval"]
    assert history(of_training) == [{"step": 7, "train/loss": 1.0}]
    assert history(of_evaluation) == [{"step": 5, "val/fid": 9.0}]


def test_wandb_of_a_run_at_a_url(tmp_path, wandb, monkeypatch):
    """The files of an offline run are kept."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    workdir = UPath(f"memory://{tmp_path.name}/wandb/3")
    workdir.mkdir(parents=True)
    written = metrics.Metrics(workdir, process_index=0, wandb_project="jetformer")
    written.writer.write_scalars(7, {"train/loss": 1.0})
    written.publish()
    written.close()
    (directory,) = tmp_path.glob("wandb-*")
    (file,) = wandb_runs(directory)
    assert history(file) == [{"step": 7, "train/loss": 1.0}]
    run = one(file, "run")
    assert run.display_name == "wandb/3"
    assert run.run_id == (workdir / metrics.WANDB_ID_FILE).read_text()


def test_a_failed_run_is_a_failed_wandb_run(tmp_path, wandb):
    written = metrics.Metrics(UPath(tmp_path), process_index=0, wandb_project="jetformer")
    with pytest.raises(FloatingPointError), closing(written):
        raise FloatingPointError
    assert one(wandb_runs(tmp_path)[0], "exit").exit_code == 1


def test_wandb_disabled(tmp_path, wandb, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    written = metrics.Metrics(UPath(tmp_path), process_index=0, wandb_project="jetformer")
    write(written.writer)
    written.close()
    check_events(tmp_path)
    assert not (tmp_path / "wandb").exists()
    assert warnings(caplog) == []


def test_wandb_is_not_installed(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it raises ModuleNotFoundError
    written = metrics.Metrics(UPath(tmp_path), process_index=0, wandb_project="jetformer")
    write(written.writer)
    written.close()
    check_events(tmp_path)
    (warning,) = warnings(caplog)
    assert "pip install -e '.[wandb]'" in warning


def test_only_the_first_error_of_wandb_is_logged(tmp_path, wandb, caplog):
    writer = metrics.WandbWriter("jetformer", UPath(tmp_path))
    writer.write_scalars(1, {"train/loss": 1.0})
    writer.write_scalars(2, {"train/loss": np.zeros(3)})
    for step in range(3, 6):
        writer.write_scalars(step, {"train/loss": np.zeros(3)})
    writer.close()
    (warning,) = warnings(caplog)
    assert "can only convert an array of size 1" in warning


def test_no_network(tmp_path, wandb, monkeypatch, caplog):
    """Only the end of the run waits for W&B."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setattr(metrics, "WANDB_INIT_SECONDS", 2)
    written = metrics.Metrics(UPath(tmp_path), process_index=0, wandb_project="jetformer")
    write(written.writer)
    written.publish()
    assert warnings(caplog) == []  # W&B is still connecting
    check_events(tmp_path)
    written.writer.write_scalars(30, {"train/loss": 1.5})
    written.close()
    assert scalars(tmp_path)["train/loss"][30] == 1.5
    (warning,) = warnings(caplog)
    assert "refused" in warning
    assert "\n" not in warning


@pytest.mark.slow
def test_no_login_at_a_terminal(tmp_path, wandb, monkeypatch):
    """W&B asks for no key, even at a terminal."""
    monkeypatch.delenv("WANDB_MODE")
    program = (
        "import sys; from jetformer import metrics; from upath import UPath\n"
        "written = metrics.Metrics(UPath(sys.argv[1]), process_index=0, wandb_project='jetformer')\n"
        "written.writer.write_scalars(1, {'train/loss': 1.0})\n"
        "written.close()\n"
    )
    terminal, other_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=other_end, stdout=other_end, stderr=other_end
    )
    os.close(other_end)
    too_late = threading.Timer(180, process.kill)
    too_late.start()
    output = b""
    try:
        while part := os.read(terminal, 2**16):
            output += part
    except OSError:  # Linux: the other end is closed
        pass
    finally:
        os.close(terminal)
    returncode = process.wait()
    too_late.cancel()
    assert returncode == 0, output
    assert output.count(WARNING.encode() + b"No API key configured.") == 1, output
    assert b"choice" not in output
    assert scalars(tmp_path)["train/loss"] == {1: 1.0}


def test_a_full_disk_ends_the_program_in_one_line(tmp_path):
    """With a limit on the size of files in place of the disk's."""
    code = """
import resource, sys
from jetformer import metrics, program
from upath import UPath
with program.one_line_errors():
    written = metrics.Metrics(UPath(sys.argv[1]), 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    for step in range(100):
        written.writer.write_scalars(step, {"train/loss": 1.0})
    written.close()
"""
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert str(tmp_path) in line
    assert "File too large" in line
