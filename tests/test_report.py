"""The pages of runs: contents, self-containment, rendering in a browser, errors, packaging."""

import base64
import html.parser
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.compat.proto import event_pb2, types_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from upath import UPath

from jetformer.report import charts, page, read
from runs import start

CONFIG = """# Macros:
# ==============================================================================
TOTAL_STEPS = 800

# Parameters for Data:
# ==============================================================================
Data.name = 'digits'
Data.pp = \\
    ("decode | keep('image', "
     "'text')")
"""

FACTS = {
    "device": "2 CPU threads",
    "device_count": 1,
    "process_count": 1,
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "jetformer": "0.1"},
    "total_steps": 800,
    "batch_size": 128,
    "train_examples": 1347,
    "parameters": [
        {"name": "decoder.blocks.0.norm", "shape": [96, 3], "dtype": "float32", "size": 288},
        {"name": "decoder.head", "shape": [1000], "dtype": "float32", "size": 1000},
    ],
}

RESULTS = [
    {"step": 200, "seconds": 1.25, "val/bits_per_dim": 6.4321, "val_ema/bits_per_dim": 6.3},
    {"step": 400, "seconds": 1.5, "val/bits_per_dim": 5.4321, "val_ema/bits_per_dim": 5.3},
    {"step": 600, "seconds": 1.5, "val/bits_per_dim": 5.9321, "val_ema/bits_per_dim": 5.2},
]


def write_events(directory, scalars, name="events.out.tfevents.1.host.1.0.v2", wall_time=1.0, start=0):
    """Writes an event file as CLU does in training: the configuration at the start step, then scalars
    `{tag: {step: value}}` as tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    events = [event_pb2.Event(file_version="brain.Event:2", wall_time=wall_time)]
    events.append(event_pb2.Event(step=start, wall_time=wall_time))
    text = events[-1].summary.value.add(tag="config")
    text.metadata.plugin_data.plugin_name = "text"
    text.tensor.dtype = types_pb2.DT_STRING
    text.tensor.string_val.append(b"A.b = 1")
    for tag, curve in scalars.items():
        for step, value in curve.items():
            events.append(event_pb2.Event(step=step, wall_time=wall_time))
            summary = events[-1].summary.value.add(tag=tag)
            summary.metadata.plugin_data.plugin_name = "scalars"
            summary.tensor.dtype = types_pb2.DT_FLOAT
            summary.tensor.float_val.append(value)
    with (directory / name).open("wb") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())


def make_run(directory, scalars=None, config=CONFIG, results=RESULTS, images=(200, 400)):
    """Writes a workdir as training and evaluations do."""
    if scalars is None:
        steps = range(10, 401, 10)
        scalars = {
            "train/bits_per_dim": {step: 4 + 400 / step for step in steps},
            "train/loss": {step: 100 + 400 / step for step in steps},
            "learning_rate": dict.fromkeys(steps, 1e-3),
            "examples_per_sec": {200: 900.0, 300: 1000.0, 400: 1234.0},
            "uptime": {200: 60.0, 300: 90.0, 400: 150.0},
        }
    write_events(directory, scalars)
    (directory / "config.gin").write_text(config)
    (directory / "operative_config.gin").write_text(config)
    (directory / "run.json").write_text(json.dumps(FACTS))
    (directory / "eval_val").mkdir()
    (directory / "eval_val" / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in results))
    for step in images:
        grid = directory / "eval_samples" / "grid"
        grid.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 8, 3), step % 251, np.uint8)).save(grid / f"{step:09d}.png")
    return UPath(directory)


class Parsed(html.parser.HTMLParser):
    """A parsed page: tags with attributes, text outside of scripts, tables as lists of rows, figures."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.tables, self.scripts = [], "", {}, []
        self._raw, self._cell = None, False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._raw = tag
        elif tag == "table":
            self._table = self.tables.setdefault(dict(attrs).get("id", dict(attrs).get("class")), [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._raw = None
        elif tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if self._raw == "script":
            self.scripts.append(data)
        elif self._raw is None:
            self.text += data
            if self._cell:
                self._table[-1][-1] += data

    def rows(self, table):
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[table]]

    def figures(self):
        return json.loads(next(script for script in self.scripts if script.startswith("[")))

    def plots(self):
        return [attributes for _, attributes in self.tags if attributes.get("class") == "plot"]

    def images(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]


def parsed(workdir, metrics=None):
    return Parsed(page.run_page(read.read_run(workdir), metrics))


def test_a_page_shows_what_the_workdir_holds(tmp_path):
    workdir = make_run(tmp_path / "digits")
    shown = parsed(workdir)
    assert shown.rows("summary") == [
        ["evaluation", "last", "at step", "best", "at step"],
        ["val/bits_per_dim", "5.9321", "600", "5.4321", "400"],
        ["val_ema/bits_per_dim", "5.2000", "600", "5.2000", "600"],
    ]
    facts = ["600 of 800", "57.0 of 1,347 examples", "1,288", "2 CPU threads", "1,000 examples / s (median)", "2 min"]
    for fact in [*facts, "python 3.11.7, torch 2.13.0+cpu, jetformer 0.1", "digits", CONFIG]:
        assert fact in shown.text
    assert shown.rows("evaluation") == [
        ["step", "val/bits_per_dim", "val_ema/bits_per_dim", "seconds"],
        ["600", "5.9321", "5.2000", "1.5000"],
        ["400", "5.4321", "5.3000", "1.5000"],
        ["200", "6.4321", "6.3000", "1.2500"],
    ]
    assert ["decoder.blocks.0.norm", "96 × 3", "float32", "288"] in shown.rows("parameters")
    assert "1,288 in 2 arrays" in shown.text
    oldest, newest = shown.images()
    assert (newest["alt"], oldest["alt"]) == ("samples/grid, step 400", "samples/grid, step 200")
    data = (workdir / "eval_samples" / "grid" / "000000400.png").read_bytes()
    assert base64.b64decode(newest["src"].removeprefix("data:image/png;base64,")) == data
    assert (newest["width"], newest["height"]) == ("320", "160")


def test_curves_of_a_quantity_share_a_chart(tmp_path):
    shown = parsed(make_run(tmp_path / "digits"))
    figures = shown.figures()
    names = [[line["name"] for line in figure["lines"]] for figure in figures]
    assert names == [["train", "val", "val_ema"], ["train"], ["run"], ["run"], ["run"]]
    train, val, _ = figures[0]["lines"]
    assert (train["x"][0], train["y"][0]) == (10, 44)
    assert (val["x"], val["y"]) == ([200, 400, 600], [6.4321, 5.4321, 5.9321])
    assert len({line["colour"] for line in figures[0]["lines"]}) == 3
    assert "bits_per_dim bits per dim" in shown.text


def test_metrics_can_be_selected(tmp_path):
    workdir = make_run(tmp_path / "digits")
    (figure,) = parsed(workdir, ["val/bits_per_dim"]).figures()
    assert [line["name"] for line in figure["lines"]] == ["val"]
    tags = "examples_per_sec, learning_rate, train/bits_per_dim, train/loss, uptime, val/bits_per_dim"
    with pytest.raises(ValueError, match=f"--metrics.*'val/bpd'.*{tags}"):
        parsed(workdir, ["train/loss", "val/bpd"])


def test_a_page_loads_nothing_and_escapes_text(tmp_path):
    """Neither by its own tags nor by names from the run."""
    evil = "</script><script src=http://example.org/x.js></script><b>bold"
    workdir = make_run(
        tmp_path / "a<b>&",
        {f"train/{evil}": {1: 1.0, 2: math.nan}, "train/</script>": {1: 2.0}},
        config=f"Data.name = '{evil}'\n",
        results=[{"step": 1, f"val/{evil}": 3.0}],
    )
    (workdir / "run.json").write_text(json.dumps({"device": evil, "versions": {evil: evil}}))
    runs = [read.read_run(workdir), read.read_run(make_run(tmp_path / "b"))]
    for text in (page.run_page(runs[0]), page.comparison_page(runs)):
        shown = Parsed(text)
        assert evil in shown.text
        assert "b" not in [tag for tag, _ in shown.tags]
        assert {tag for tag, _ in shown.tags if tag in ("link", "iframe", "object", "embed", "base")} == set()
        for _, attributes in shown.tags:
            assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
            assert not {"href", "srcset", "onload", "onclick", "onerror"} & set(attributes)
        policies = [a["content"] for _, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy"]
        assert [policy.partition(";")[0] for policy in policies] == ["default-src 'none'"]
        assert [line["name"] for figure in shown.figures() for line in figure["lines"]]


def test_the_values_written_last_by_a_resumed_run_count(tmp_path):
    """The time of writing decides: file names have seconds only, and then process IDs, which sort as text."""
    workdir = make_run(tmp_path / "run", {}, images=())
    first = {"train/loss": {10: 1.0, 20: 2.0, 30: 3.0}, "uptime": {10: 5.0, 20: 10.0, 30: 15.0}}
    write_events(workdir, first, "events.out.tfevents.1.host.999.0.v2", wall_time=5)
    second = {
        "train/loss": {30: 33.0, 40: 44.0},
        "uptime": {30: 4.0, 40: 8.0},
        "val/bits_per_dim": {200: 9.0, 100: 8.0},
    }
    write_events(workdir, second, "events.out.tfevents.1.host.1000.0.v2", wall_time=6, start=20)
    run = read.read_run(workdir)
    assert run.curves["train/loss"] == {10: 1.0, 20: 2.0, 30: 33.0, 40: 44.0}
    assert list(run.curves["train/loss"]) == [10, 20, 30, 40]
    assert page.duration(run.curves["uptime"]) == 18.0
    # Evaluators' results take precedence.
    assert run.curves["val/bits_per_dim"] == {100: 8.0, 200: 6.4321, 400: 5.4321, 600: 5.9321}


def test_values_that_a_resumed_run_discarded_do_not_count(tmp_path):
    """Twice its newest checkpoints were deleted, and it resumed from an earlier step."""
    workdir = make_run(tmp_path / "run", {"train/loss": {10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0}}, results=[], images=())
    again = {"train/loss": {30: 30.0, 40: 40.0, 50: 50.0}, "only/then": {50: 1.0}}
    write_events(workdir, again, "events.out.tfevents.1.host.2", wall_time=2, start=20)
    run = read.read_run(workdir)
    assert run.curves["train/loss"] == {10: 1.0, 20: 2.0, 30: 30.0, 40: 40.0, 50: 50.0}
    write_events(workdir, {}, "events.out.tfevents.1.host.3", wall_time=3, start=10)
    run = read.read_run(workdir)  # nothing written since
    assert run.curves == {"train/loss": {10: 1.0}}
    assert page.known_facts(run)["Steps"] == "10 of 800"
    write_events(workdir, {"train/loss": {20: 7.0, 40: 8.0}}, "events.out.tfevents.1.host.4", wall_time=4, start=10)
    assert read.read_run(workdir).curves == {"train/loss": {10: 1.0, 20: 7.0, 40: 8.0}}


def test_older_runs_have_evaluations_in_event_files_only(tmp_path):
    write_events(tmp_path / "old", {"train/loss": {1: 2.0, 2: 1.0}, "val/loss": {2: 1.5}})
    (tmp_path / "old" / "config.gin").write_text("A.b = 1\n")
    shown = parsed(UPath(tmp_path / "old"))
    assert shown.rows("summary")[1:] == [["val/loss", "1.5000", "2", "1.5000", "2"]]
    assert shown.rows("evaluation") == [["step", "val/loss"], ["2", "1.5000"]]
    assert "Samples" not in shown.text
    assert "Parameters" not in shown.text


@pytest.mark.slow  # imports TensorFlow
def test_event_files_of_clu_read_as_in_tensorboard(tmp_path):
    from clu import metric_writers
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    writer = metric_writers.SummaryWriter(str(tmp_path))
    writer.write_texts(0, {"config": "text"})
    for step in (1, 2, 3):
        writer.write_scalars(step, {"train/loss": 1 / step, "learning_rate": np.float32(0.1)})
    writer.write_hparams({"width": 3})
    writer.write_images(2, {"grid": np.zeros((1, 4, 4, 3), np.uint8)})
    writer.write_histograms(2, {"h": np.arange(5)}, {"h": 2})
    writer.close()
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    accumulator.Reload()
    expected = {
        tag: {event.step: make_ndarray(event.tensor_proto).item() for event in accumulator.Tensors(tag)}
        for tag in ("train/loss", "learning_rate")
    }
    warnings = []
    assert read.event_scalars(UPath(tmp_path).iterdir(), warnings) == expected
    assert not warnings
    writer = metric_writers.SummaryWriter(str(tmp_path))
    writer.write_texts(2, {"config": "text"})  # the run resumes there
    writer.close()
    kept = {tag: {step: value for step, value in curve.items() if step <= 2} for tag, curve in expected.items()}
    assert read.event_scalars(UPath(tmp_path).iterdir(), warnings) == kept


def test_scalars_of_other_writers(tmp_path):
    """PyTorch's SummaryWriter writes numbers instead of tensors."""
    event = event_pb2.Event(step=3)
    event.summary.value.add(tag="train/loss", simple_value=1.5)
    with (tmp_path / "events").open("wb") as file:
        RecordWriter(file).write(event.SerializeToString())
    assert read.event_scalars([UPath(tmp_path / "events")], []) == {"train/loss": {3: 1.5}}


def test_incomplete_and_damaged_event_files(tmp_path):
    """Incomplete files are being written and need no warning."""
    workdir = make_run(tmp_path / "run", {"train/loss": dict.fromkeys(range(10), 1.0)})
    (file,) = workdir.glob("events*")
    data = file.read_bytes()
    for cut in (1, 20):
        file.write_bytes(data[:-cut])
        run = read.read_run(workdir)
        assert list(run.curves["train/loss"]) == list(range(9))
        assert not run.warnings
    file.write_bytes(data + bytes(100))
    run = read.read_run(workdir)
    assert list(run.curves["train/loss"]) == list(range(10))
    (warning,) = run.warnings
    assert f"{file.name} is damaged at byte {len(data)}" in warning
    assert warning in Parsed(page.run_page(run)).text
    event = len(data) // 2
    file.write_bytes(data[:event] + b"\xff" * 40 + data[event + 40 :])
    run = read.read_run(workdir)
    assert 0 < len(run.curves["train/loss"]) < 10
    assert "is damaged at byte" in run.warnings[0]


def test_incomplete_and_damaged_results(tmp_path):
    workdir = make_run(tmp_path / "run")
    file = workdir / "eval_val" / "results.jsonl"
    text = file.read_text()
    file.write_text(text + '{"step": 800, "val/bits')
    assert [record["step"] for record in read.read_results(file)] == [200, 400, 600]
    file.write_text(text + '{"step": 800, "val/loss": NaN}')  # complete but for the newline
    assert [record["step"] for record in read.read_results(file)] == [200, 400, 600, 800]
    lines = ('{"step": 800, "val/bits', "[1]", '{"step": 800, "val/loss": "1"}', '{"val/loss": 1}')
    for line, expected in zip(lines, ("object", "object", "numbers", "step"), strict=True):
        file.write_text(f"{text}{line}\n")
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:4 .*{expected}"):
            read.read_run(workdir)


def test_errors_name_the_workdir_or_file(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}/none .*config.gin"):
        page.write([f"{tmp_path}/none"])
    (tmp_path / "config.gin").write_text("")
    with pytest.raises(ValueError, match=f"^{tmp_path} .*train.log_steps"):
        page.write([str(tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"^{tmp_path}/empty/.*config.gin"):
        read.find_runs(f"{tmp_path}/empty/*")
    workdir = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=f"^--compare: {workdir} .*twice"):
        page.write([str(workdir), f"{workdir}/"], str(tmp_path / "out.html"))
    for text in ('{"device": ', "[]"):
        (workdir / "run.json").write_text(text)
        with pytest.raises(ValueError, match=f"^{workdir}/run.json is damaged"):
            page.write([str(workdir)])


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.one_of(st.floats(-10, 10), st.sampled_from([math.nan, math.inf, -math.inf])), min_size=1, max_size=300),
    st.integers(8, 60),
)
def test_downsampling_keeps_ends_and_extremes(values, limit):
    kept = charts.downsample(values, limit)
    assert len(kept) <= max(limit, 0)
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    finite = [value for value in values if math.isfinite(value)]
    drawn = [values[i] for i in kept if math.isfinite(values[i])]
    if finite:
        assert (min(drawn), max(drawn)) == (min(finite), max(finite))
    assert any(not math.isfinite(values[i]) for i in kept) == (len(finite) < len(values))


def test_a_long_curve_is_downsampled_with_a_note(tmp_path):
    values = {step: math.sin(step / 100) for step in range(1, 100_001)}
    values |= {54_321: 99.0, 65_432: math.inf}
    figure = charts.figure([charts.Line("train", values, "#000")], 100_000)
    (line,) = figure["lines"]
    assert len(line["x"]) <= charts.MAX_POINTS
    assert line["y"][line["x"].index(54_321)] == 99
    assert line["y"][line["x"].index(65_432)] == "inf"
    highest, drawn, not_finite = figure["notes"]
    for value, note in (
        ("99.000 (train, step 54,321)", highest),
        (f"{len(line['x']):,} of 100,000", drawn),
        ("1 of 100,000 values not finite (inf), first at step 65,432", not_finite),
    ):
        assert value in note


def test_values_that_are_not_finite_are_named(tmp_path):
    values = {1: 1.0, 2: math.nan, 3: 2.0, 4: -math.inf}
    workdir = make_run(tmp_path / "run", {"train/loss": values}, results=[{"step": 4, "val/loss": math.nan}])
    shown = parsed(workdir)
    train, val = shown.figures()[0]["lines"]
    assert train["y"] == [1, "NaN", 2, "-inf"]
    assert val["y"] == ["NaN"]
    assert "2 of 4 values not finite (-inf, NaN), first at step 2" in shown.text
    assert shown.rows("summary")[1] == ["val/loss", "NaN", "4", "", ""]


def test_far_values_are_out_of_view_unless_they_are_last():
    curve = {step: 3 + step % 7 for step in range(1, 100)}
    view = lambda far: charts.figure([charts.Line("a", curve | far, "#000")], 100)["view"]
    assert view({}) is None
    assert view({50: 20.0}) is None  # not far enough to flatten the rest
    low, high = view({1: 1000.0})
    assert low < 3 < 9 < high < 20
    low, high = view({1: 1000.0, 50: -1000.0})
    assert -10 < low < 3 < 9 < high < 20
    # The end of a run that diverges.
    assert view({100: 1000.0}) is None
    low, high = view({100: 1000.0, 50: -4000.0})
    assert -4000 < low < 3 < 1000 < high
    assert view(dict.fromkeys(curve, 1.0)) is None


def test_some_of_many_images_are_shown(tmp_path):
    workdir = make_run(tmp_path / "run", images=range(100, 10_100, 100))
    path = workdir / "eval_samples" / "grid" / "000010000.png"
    path.write_bytes(path.read_bytes()[:-20])  # a job is writing it
    shown = parsed(workdir)
    assert "40 of 100 steps" in shown.text
    assert "step 10,000: incomplete PNG" in shown.text
    steps = [int(image["alt"].split()[-1].replace(",", "")) for image in shown.images()]
    assert len(steps) == 39
    assert steps == sorted(steps)
    assert steps[0] == 100
    assert {b - a for a, b in itertools.pairwise(steps)} <= {200, 300}


@pytest.mark.parametrize(
    ("tag", "expected"), [("val/bits_per_dim", 1.0), ("probe/accuracy", 2.0), ("val/bits_per_dim_logdet", None)]
)
def test_the_best_value_of_a_metric(tag, expected):
    assert page.best([2.0, math.nan, 1.0, math.inf], tag) == expected
    assert page.best([math.nan], tag) is None


def test_bindings_of_a_gin_file():
    assert read.gin_bindings(CONFIG) == {
        "TOTAL_STEPS": "800",
        "Data.name": "'digits'",
        "Data.pp": "(\"decode | keep('image', \" \"'text')\")",
    }


def test_runs_side_by_side(tmp_path):
    a = make_run(tmp_path / "a")
    results = [{"step": 300, "val/bits_per_dim": 5.0, "fid/distance": 9.5}]
    config = CONFIG.replace("800", "1600") + "Data.extra = '<b>'\n"
    b = make_run(tmp_path / "b", {"train/loss": {1: 3.0, 2: 2.0}}, config, results)
    (b / "run.json").unlink()
    shown = Parsed(page.comparison_page([read.read_run(a), read.read_run(b)]))
    assert shown.rows("differing") == [
        ["binding", "a", "b"],
        ["Data.extra", "–", "'<b>'"],
        ["TOTAL_STEPS", "800", "1600"],
    ]
    last = shown.rows("last")
    assert last[0] == ["metric", "a", "b"]
    assert last[1] == ["val/bits_per_dim", "5.9321 at 600", "5.0000 at 300"]
    assert ["fid/distance", "–", "9.5000 at 300"] in last
    assert ["train/loss", "101.00 at 400", "2.0000 at 2"] in last
    assert ["Parameters", "1,288", "–"] in shown.rows("runs")
    titles = [plot["aria-label"].partition(":")[0] for plot in shown.plots()]
    figures = dict(zip(titles, shown.figures(), strict=True))
    assert [line["name"] for line in figures["train/loss"]["lines"]] == ["a", "b"]
    assert [line["name"] for line in figures["fid/distance"]["lines"]] == ["b"]
    assert [image["alt"] for image in shown.images()] == [
        "samples/grid, a, step 400",
        "samples/grid, b, step 400",
    ]
    c = make_run(tmp_path / "other" / "a")
    shown = Parsed(page.comparison_page([read.read_run(a), read.read_run(c)]))
    assert shown.rows("last")[0] == ["metric", str(a), str(c)]
    assert "Differences in configuration\nNone." in shown.text


def test_workdirs_may_be_urls(tmp_path):
    local = make_run(tmp_path / "digits")
    remote = UPath("memory://runs/digits")
    for path in local.rglob("*"):
        if path.is_file():
            copy = remote / str(path.relative_to(local))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    assert str(page.write(["memory://runs/digits/"])) == "memory://runs/digits/report.html"
    there, here = Parsed((remote / "report.html").read_text(encoding="utf-8")), parsed(local)
    assert there.figures() == here.figures()
    assert there.images() == here.images()
    assert there.rows("evaluation") == here.rows("evaluation")
    assert ("title", {}) in there.tags
    assert there.text.strip().startswith("digits")


def run_program(*flags):
    """Runs the program; returns its exit code and stderr."""
    args = [sys.executable, "-m", "jetformer.report", *flags]
    process = start(args)
    _, log = process.communicate(timeout=100)
    return process.returncode, log


@pytest.mark.slow
def test_the_program(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    code, log = run_program(f"--workdir={a}")
    assert code == 0, log
    assert log.rstrip().endswith(f"Open {a}/report.html")
    assert len(parsed(a).figures()) == 5
    out = tmp_path / "new" / "page.html"
    (tmp_path / "c").mkdir()  # a run before its first step, which is left out
    (tmp_path / "c" / "config.gin").write_text("")
    for compared in (f"{a},{b}", f"{tmp_path}/*"):
        code, log = run_program(f"--compare={compared}", f"--out={out}", "--metrics=train/loss")
        assert code == 0, log
        (figure,) = Parsed(out.read_text()).figures()
        assert [line["name"] for line in figure["lines"]] == ["a", "b"]
    assert f"{tmp_path}/c has no metrics" in log
    table = [line.split() for line in log.splitlines() if line.startswith(("run ", "a ", "b "))]
    assert table == [
        ["run", "step", "val/bits_per_dim", "val_ema/bits_per_dim"],
        ["a", "600", "5.9321", "5.2000"],
        ["b", "600", "5.9321", "5.2000"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], "--workdir.*--compare"),
        (["--workdir=a", "--compare=a,b"], "--workdir.*--compare"),
        (["--compare=a"], "--compare.*two"),
        (["--compare=a,b"], "--compare.*--out"),
        (["--workdir=/nowhere/run"], "/nowhere/run.*config.gin"),
    ],
)
def test_a_wrong_command_ends_in_one_line(flags, names):
    code, log = run_program(*flags)
    assert code == 1
    assert re.fullmatch(f"error: .*{names}.*\n", log)


@pytest.mark.slow
def test_a_page_needs_no_tensorflow(tmp_path):
    """TensorFlow's import would take longer than the page."""
    workdir = make_run(tmp_path / "run")
    code = f"from jetformer.report import page; page.write([{str(workdir)!r}]); import sys; "
    code += "assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def browse(path):
    """Opens a page in a browser; returns the document after its scripts have run, and their messages."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("chromium is not installed")
    args = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    args += [f"--user-data-dir={path.parent / 'browser'}", "--virtual-time-budget=10000", path.as_uri()]
    environment = os.environ | {"HOME": str(path.parent)}
    process = subprocess.run(args, capture_output=True, text=True, timeout=120, env=environment)
    return process.stdout, [line for line in process.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.parametrize("compare", [False, True])
def test_a_browser_draws_it(tmp_path, compare):
    """All curves, marks and images, without a message in the console."""
    steps = range(1, 3001)
    curve = {step: math.nan if step == 7 else 2 + 1 / step for step in steps}
    scalars = {"train/bits_per_dim": curve, "train/loss": {1: 5.0}, "<b>": {1: 1.0, 2: 2.0}, "grad_norm": {1: math.nan}}
    runs = [read.read_run(make_run(tmp_path / name, scalars)) for name in ("a", "b")[: 1 + compare]]
    file = tmp_path / "page.html"
    text = page.comparison_page(runs) if compare else page.run_page(runs[0])
    probe = """<script>
    document.getElementById("log").click();
    const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", {key}));
    Promise.all([...document.images].map(image => image.decode())).then(() => {
      const all = selector => [...document.querySelectorAll(selector)], body = document.body.dataset;
      body.images = [...document.images].filter(image => image.naturalWidth == 8).length;
      body.wide = all(".plot svg").every(svg => svg.clientWidth > 300 && svg.querySelectorAll("text.y").length > 1);
      for (const name of ["line", "dots", "marks"]) body[name] = all(`.plot path.${name}`).length;
      const plot = document.getElementById("plot-0");
      body.last = plot.ariaValueText;
      press(plot, "Home");
      press(plot, "ArrowRight");
      body.second = plot.ariaValueText;
      const slider = document.querySelector("input[type=range]");
      if (slider) {
        slider.value = 0;
        slider.dispatchEvent(new Event("input"));
        body.shown = all(".strip figure").filter(figure => !figure.hidden).map(figure => figure.textContent.trim());
        body.slider = slider.ariaValueText;
      }
    });</script></body>"""
    file.write_text(text.replace("</body>", probe), encoding="utf-8")
    document, complaints = browse(file)
    assert not complaints
    found = dict(re.findall(r' data-(\w+)="([^"]*)"', document[document.index("<body") :]))
    figures = Parsed(text).figures()
    assert len(figures) == (6 if compare else 4)
    finite = [[isinstance(value, float | int) for value in line["y"]] for f in figures for line in f["lines"]]
    assert int(found["line"]) == sum(map(any, finite))
    assert int(found["marks"]) == len(finite) - sum(map(all, finite))
    assert int(found["dots"]) >= 2 * (1 + compare)
    assert found["wide"] == "true"
    assert found["images"] == "2"
    shown = ["a", "b"] if compare else ["train", "val", "val_ema"]
    assert re.fullmatch("step [0-9,]+: " + ", ".join(f"{name} \\S+" for name in shown), found["last"])
    assert found["second"].startswith("step 2: ")
    if not compare:
        assert found["shown"] == found["slider"] == "step 200"


def test_the_first_charts():
    """Likelihood, the use of the mixture and of the flow's cap come before all others."""
    tags = [f"{group}/{name}" for group in ("train", "val") for name in ("bits_per_dim", "a", "flow_expansion_used")]
    tags += ["learning_rate", "val/effective_components"]
    run = read.Run("r", UPath("r"), {}, {}, {tag: {1: 0.5} for tag in tags}, {}, {}, [])
    first = ["bits_per_dim", "effective_components", "flow_expansion_used"]
    assert [name for _, name in charts.run_charts(run, tags)][:4] == [*first, "a"]
    compared = [tag.partition("/")[2] for _, tag in charts.comparison_charts([run, run], tags)]
    assert list(dict.fromkeys(compared))[:3] == first


def test_a_page_says_in_words_what_it_shows(tmp_path):
    """Charts and pictures have a text, and the keyboard reaches charts, tables, and all that scrolls."""
    text = page.run_page(read.read_run(make_run(tmp_path / "digits")))
    shown = Parsed(text)
    assert all(image["alt"] for image in shown.images())
    plots = shown.plots()
    assert plots[0]["aria-label"].startswith("bits_per_dim: train 44.000 at step 10 to 5.0000 at step 400; val 6.4321 ")
    scrolling = [a for tag, a in shown.tags if a.get("class") == "scroll" or tag == "pre"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in plots + scrolling)
    assert ("html", {"lang": "en"}) in shown.tags
    assert any(a.get("name") == "viewport" and "width=device-width" in a["content"] for _, a in shown.tags)
    assert len(text) < 200_000


@pytest.mark.parametrize("style", ["report/style.css", "sampling/gallery.css"])
def test_colours_have_contrast_in_light_and_dark(style):
    """4.5 for text and 3 for lines, as the WCAG ask for."""

    def luminance(colour):
        digits = "".join(2 * x for x in colour) if len(colour) == 3 else colour
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return linear[0] * 0.2126 + linear[1] * 0.7152 + linear[2] * 0.0722

    text = (pathlib.Path(read.__file__).parent.parent / style).read_text()
    light, dark = (dict(re.findall(r"--(\w+): #(\w+)", rule)) for rule in re.findall(":root {([^}]*)}", text))
    assert light.keys() == dark.keys()
    for colours in (light, dark):
        for name, colour in colours.items():
            low, high = sorted([luminance(colour), luminance(colours["background"])])
            least = (
                4.5 if name in ("text", "muted", "link") else 3 if name not in ("background", "raised", "line") else 1
            )
            assert (high + 0.05) / (low + 0.05) >= least, name


def test_parts_of_a_metric_are_lines_of_one_chart():
    """Such as layers and classes; likelihoods come first, and 5 before 10."""
    tags = ["probe/accuracy_10_shot/layer_1", "probe/accuracy_5_shot/layer_0", "probe/accuracy_5_shot/layer_10",
            "probe/accuracy_5_shot/layer_2", "shown/images", "shown/images/colour", "val/bits_per_dim"]  # fmt: skip
    curves = {tag: {1: 0.5, 2: 0.25} for tag in tags}
    records = [{"step": 2, **dict.fromkeys(tags, 0.25)}]
    run = read.Run("r", UPath("r"), {}, {}, curves, {"all": records}, {}, [])
    drawn = charts.run_charts(run, tags)
    names = {key: [line.name for line in lines] for key, lines in drawn.items()}
    assert names["probe", "accuracy_5_shot"] == ["layer_0", "layer_2", "layer_10"]
    assert names["shown", "images"] == ["all", "colour"]
    assert names["overview", "bits_per_dim"] == ["val"]
    lines = {"probe/accuracy_10_shot": {1: 0.5}, "probe/accuracy_5_shot": {1: 0.25}}
    whole = read.Run("r", UPath("r"), {}, {}, lines, {}, {}, [])
    assert list(charts.run_charts(whole, list(lines))) == [
        ("probe", "accuracy_5_shot"),
        ("probe", "accuracy_10_shot"),
    ]
    alone = charts.run_charts(run, ["probe/accuracy_10_shot/layer_1"])
    assert [*alone] == [("probe", "accuracy_10_shot/layer_1")]
    order = sorted(run.evaluation_tags(), key=charts.importance)
    assert order[:2] == ["val/bits_per_dim", "shown/images"]
    assert order.index("probe/accuracy_5_shot/layer_0") < order.index("probe/accuracy_10_shot/layer_1")
