"""Pages about runs: what they show, that they load nothing, that a browser draws them, what is refused."""

import base64
import html.parser
import itertools
import json
import math
import os
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

from jetformer import report

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
    """Writes an event file as training does with CLU: scalars `{tag: {step: value}}` as tensors, among summaries of
    other kinds, after the configuration at the step that it goes on from."""
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


def make_run(directory, scalars=None, config=CONFIG, results=RESULTS, pictures=(200, 400)):
    """A workdir as training and evaluations leave it."""
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
    for step in pictures:
        grid = directory / "eval_samples" / "grid"
        grid.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 8, 3), step % 251, np.uint8)).save(grid / f"{step:09d}.png")
    return UPath(directory)


class Parsed(html.parser.HTMLParser):
    """A page: its tags with their attributes, the text outside of scripts, tables as lists of rows, the figures."""

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

    def pictures(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]


def parsed(workdir, metrics=None):
    return Parsed(report.page(report.read_run(workdir), metrics))


def test_a_page_has_what_is_known(tmp_path):
    workdir = make_run(tmp_path / "digits")
    page = parsed(workdir)
    assert page.rows("summary") == [
        ["evaluation", "last", "at step", "best", "at step"],
        ["val/bits_per_dim", "5.9321", "600", "5.4321", "400"],
        ["val_ema/bits_per_dim", "5.2000", "600", "5.2000", "600"],
    ]
    facts = ["600 of 800", "57.0 of 1,347 examples", "1,288", "2 CPU threads", "1,000 examples / s (median)", "2 min"]
    for fact in [*facts, "python 3.11.7, torch 2.13.0+cpu, jetformer 0.1", "digits", CONFIG]:
        assert fact in page.text
    assert page.rows("evaluation") == [
        ["step", "val/bits_per_dim", "val_ema/bits_per_dim", "seconds"],
        ["600", "5.9321", "5.2000", "1.5000"],
        ["400", "5.4321", "5.3000", "1.5000"],
        ["200", "6.4321", "6.3000", "1.2500"],
    ]
    assert ["decoder.blocks.0.norm", "96 × 3", "float32", "288"] in page.rows("parameters")
    assert "1,288 in 2 arrays" in page.text
    newest, oldest = page.pictures()
    assert (newest["alt"], oldest["alt"]) == ("samples/grid, step 400", "samples/grid, step 200")
    data = (workdir / "eval_samples" / "grid" / "000000400.png").read_bytes()
    assert base64.b64decode(newest["src"].removeprefix("data:image/png;base64,")) == data
    assert (newest["width"], newest["height"]) == ("320", "160")


def test_curves_of_a_quantity_are_in_one_chart(tmp_path):
    figures = parsed(make_run(tmp_path / "digits")).figures()
    names = [[trace["name"] for trace in figure["data"]] for figure in figures]
    assert names == [["train", "val", "val_ema"], ["train"], ["run"], ["run"], ["run"]]
    train, val, _ = figures[0]["data"]
    assert (train["x"][0], train["y"][0]) == (10, 44)
    assert (val["x"], val["y"]) == ([200, 400, 600], [6.4321, 5.4321, 5.9321])
    assert figures[0]["layout"]["yaxis"]["title"]["text"] == "bits per dim"
    assert len({trace["line"]["color"] for trace in figures[0]["data"]}) == 3


def test_metrics_are_chosen(tmp_path):
    workdir = make_run(tmp_path / "digits")
    (figure,) = parsed(workdir, ["val/bits_per_dim"]).figures()
    assert [trace["name"] for trace in figure["data"]] == ["val"]
    there = "learning_rate, train/bits_per_dim, train/loss, uptime, val/bits_per_dim, val_ema/bits_per_dim"
    with pytest.raises(ValueError, match=f"^--metrics: there is no 'val/bpd'; there are examples_per_sec, {there}$"):
        parsed(workdir, ["train/loss", "val/bpd"])


def test_nothing_is_loaded_and_text_stays_text(tmp_path):
    """Neither by the page's own tags nor by what a run calls its things."""
    evil = "</script><script src=http://example.org/x.js></script><b>bold"
    workdir = make_run(
        tmp_path / "a<b>&",
        {f"train/{evil}": {1: 1.0, 2: math.nan}, "train/</script>": {1: 2.0}},
        config=f"Data.name = '{evil}'\n",
        results=[{"step": 1, f"val/{evil}": 3.0}],
    )
    (workdir / "run.json").write_text(json.dumps({"device": evil, "versions": {evil: evil}}))
    runs = [report.read_run(workdir), report.read_run(make_run(tmp_path / "b"))]
    for text in (report.page(runs[0]), report.comparison(runs)):
        page = Parsed(text)
        assert evil in page.text
        assert "b" not in [tag for tag, _ in page.tags]
        assert {tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base")} == set()
        for _, attributes in page.tags:
            assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
            assert not {"href", "srcset", "onload", "onclick", "onerror"} & set(attributes)
        assert text.count("plotly.js v") == 1
        policies = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
        assert [policy.partition(";")[0] for policy in policies] == ["default-src 'none'"]
        assert [name for figure in page.figures() for name in (trace["name"] for trace in figure["data"])]
        assert "<" not in "".join(trace["name"] for figure in page.figures() for trace in figure["data"])


def test_of_a_resumed_run_what_was_written_last_counts(tmp_path):
    """By the time of writing: names of files say it only to the second, then by the process's number as text."""
    workdir = make_run(tmp_path / "run", {}, pictures=())
    first = {"train/loss": {10: 1.0, 20: 2.0, 30: 3.0}, "uptime": {10: 5.0, 20: 10.0, 30: 15.0}}
    write_events(workdir, first, "events.out.tfevents.1.host.999.0.v2", wall_time=5)
    second = {
        "train/loss": {30: 33.0, 40: 44.0},
        "uptime": {30: 4.0, 40: 8.0},
        "val/bits_per_dim": {200: 9.0, 100: 8.0},
    }
    write_events(workdir, second, "events.out.tfevents.1.host.1000.0.v2", wall_time=6, start=20)
    run = report.read_run(workdir)
    assert run.curves["train/loss"] == {10: 1.0, 20: 2.0, 30: 33.0, 40: 44.0}
    assert list(run.curves["train/loss"]) == [10, 20, 30, 40]
    assert report.duration(run.curves["uptime"]) == 18.0
    # What evaluators write down counts more.
    assert run.curves["val/bits_per_dim"] == {100: 8.0, 200: 6.4321, 400: 5.4321, 600: 5.9321}


def test_what_a_run_has_left_does_not_count(tmp_path):
    """Its last checkpoints were deleted, twice, and it has gone on from before with other settings."""
    workdir = make_run(tmp_path / "run", {"train/loss": {10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0}}, results=[], pictures=())
    again = {"train/loss": {30: 30.0, 40: 40.0, 50: 50.0}, "only/then": {50: 1.0}}
    write_events(workdir, again, "events.out.tfevents.1.host.2", wall_time=2, start=20)
    run = report.read_run(workdir)
    assert run.curves["train/loss"] == {10: 1.0, 20: 2.0, 30: 30.0, 40: 40.0, 50: 50.0}
    write_events(workdir, {}, "events.out.tfevents.1.host.3", wall_time=3, start=10)
    run = report.read_run(workdir)  # it has not come far yet
    assert run.curves == {"train/loss": {10: 1.0}}
    assert report.known_facts(run)["Steps"] == "10 of 800"
    write_events(workdir, {"train/loss": {20: 7.0, 40: 8.0}}, "events.out.tfevents.1.host.4", wall_time=4, start=10)
    assert report.read_run(workdir).curves == {"train/loss": {10: 1.0, 20: 7.0, 40: 8.0}}


def test_an_older_run_has_its_evaluations_in_the_event_files(tmp_path):
    write_events(tmp_path / "old", {"train/loss": {1: 2.0, 2: 1.0}, "val/loss": {2: 1.5}})
    (tmp_path / "old" / "config.gin").write_text("A.b = 1\n")
    page = parsed(UPath(tmp_path / "old"))
    assert page.rows("summary")[1:] == [["val/loss", "1.5000", "2", "1.5000", "2"]]
    assert page.rows("evaluation") == [["step", "val/loss"], ["2", "1.5000"]]
    assert "Samples" not in page.text
    assert "Parameters" not in page.text


@pytest.mark.slow  # imports TensorFlow
def test_event_files_of_clu_are_read_as_tensorboard_reads_them(tmp_path):
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
    notes = []
    assert report.event_scalars(UPath(tmp_path).iterdir(), notes) == expected
    assert not notes
    writer = metric_writers.SummaryWriter(str(tmp_path))
    writer.write_texts(2, {"config": "text"})  # the run goes on from there
    writer.close()
    left = {tag: {step: value for step, value in curve.items() if step <= 2} for tag, curve in expected.items()}
    assert report.event_scalars(UPath(tmp_path).iterdir(), notes) == left


def test_scalars_of_other_writers(tmp_path):
    """torch's SummaryWriter writes numbers, and no tensors."""
    event = event_pb2.Event(step=3)
    event.summary.value.add(tag="train/loss", simple_value=1.5)
    with (tmp_path / "events").open("wb") as file:
        RecordWriter(file).write(event.SerializeToString())
    assert report.event_scalars([UPath(tmp_path / "events")], []) == {"train/loss": {3: 1.5}}


def test_event_files_that_are_cut_off_or_damaged(tmp_path):
    """The one is being written and says nothing; of the other it is said."""
    workdir = make_run(tmp_path / "run", {"train/loss": dict.fromkeys(range(10), 1.0)})
    (file,) = workdir.glob("events*")
    data = file.read_bytes()
    for cut in (1, 20):
        file.write_bytes(data[:-cut])
        run = report.read_run(workdir)
        assert list(run.curves["train/loss"]) == list(range(9))
        assert not run.notes
    file.write_bytes(data + bytes(100))
    run = report.read_run(workdir)
    assert list(run.curves["train/loss"]) == list(range(10))
    note = f"{file.name} is damaged at byte {len(data)}: what follows is left out"
    assert run.notes == [note]
    assert note in Parsed(report.page(run)).text
    event = len(data) // 2
    file.write_bytes(data[:event] + b"\xff" * 40 + data[event + 40 :])
    run = report.read_run(workdir)
    assert 0 < len(run.curves["train/loss"]) < 10
    assert "is damaged at byte" in run.notes[0]


def test_results_that_are_cut_off_or_damaged(tmp_path):
    workdir = make_run(tmp_path / "run")
    file = workdir / "eval_val" / "results.jsonl"
    text = file.read_text()
    file.write_text(text + '{"step": 800, "val/bits')
    assert [record["step"] for record in report.read_results(file)] == [200, 400, 600]
    file.write_text(text + '{"step": 800, "val/loss": NaN}')  # whole, but for the end of the line
    assert [record["step"] for record in report.read_results(file)] == [200, 400, 600, 800]
    damaged = "is damaged: give a JSON object of numbers, or delete the line"
    for line, message in (
        ('{"step": 800, "val/bits', damaged),
        ("[1]", damaged),
        ('{"step": 800, "val/loss": "1"}', damaged),
        ('{"val/loss": 1}', "is damaged: it has no step; delete the line"),
    ):
        file.write_text(f"{text}{line}\n")
        with pytest.raises(ValueError, match=re.escape(f"{file}:4 {message}")):
            report.read_run(workdir)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}/none holds no run: it has no config.gin$"):
        report.write_report([f"{tmp_path}/none"])
    (tmp_path / "config.gin").write_text("")
    with pytest.raises(ValueError, match=f"^{tmp_path} has no metrics yet: look again after the first train.log_steps"):
        report.write_report([str(tmp_path)])
    workdir = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=f"^--compare: {workdir} is there twice$"):
        report.write_report([str(workdir), f"{workdir}/"], str(tmp_path / "out.html"))
    for text in ('{"device": ', "[]"):
        (workdir / "run.json").write_text(text)
        with pytest.raises(ValueError, match=f"^{workdir}/run.json is damaged: .*; without the file the page leaves"):
            report.write_report([str(workdir)])


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.one_of(st.floats(-10, 10), st.sampled_from([math.nan, math.inf, -math.inf])), min_size=1, max_size=300),
    st.integers(8, 60),
)
def test_thinning_keeps_ends_and_extremes(values, limit):
    kept = report.thinned(values, limit)
    assert len(kept) <= max(limit, 0)
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    finite = [value for value in values if math.isfinite(value)]
    there = [values[i] for i in kept if math.isfinite(values[i])]
    if finite:
        assert (min(there), max(there)) == (min(finite), max(finite))
    assert any(not math.isfinite(values[i]) for i in kept) == (len(finite) < len(values))


def test_a_long_curve_is_thinned_and_that_is_said(tmp_path):
    values = {step: math.sin(step / 100) for step in range(1, 100_001)}
    values |= {54_321: 99.0, 65_432: math.inf}
    figure = report.figure(None, [report.Line("train", values, "#000")], 100_000)
    trace, marks = figure["data"]
    assert len(trace["x"]) <= report.MAX_POINTS
    assert trace["y"][trace["x"].index(54_321)] == 99
    assert trace["y"][trace["x"].index(65_432)] is None
    assert (marks["x"], marks["text"]) == ([65_432], ["inf"])
    assert figure["notes"] == [
        "Highest: 99.000 (train, step 54,321), out of view; double-click shows all.",
        f"train: {len(trace['x']):,} of 100,000 points are drawn, all extremes among them.",
        "train: 1 of 100,000 values not finite (inf), first at step 65,432; marked ×.",
    ]


def test_values_that_are_not_finite_are_marked(tmp_path):
    """A value between two of them still shows."""
    values = {1: 1.0, 2: math.nan, 3: 2.0, 4: -math.inf}
    workdir = make_run(tmp_path / "run", {"train/loss": values}, results=[{"step": 4, "val/loss": math.nan}])
    page = parsed(workdir)
    train, marks, val, val_marks = page.figures()[0]["data"]
    assert train["y"] == [1, None, 2, None]
    assert train["mode"] == "lines+markers"
    assert (marks["x"], marks["text"], val_marks["text"]) == ([2, 4], ["NaN", "-inf"], ["NaN"])
    assert val["y"] == [None]
    assert "train: 2 of 4 values not finite (-inf, NaN), first at step 2; marked ×." in page.text
    assert page.rows("summary")[1] == ["val/loss", "NaN", "4", "", ""]


def test_the_first_view_leaves_out_far_values_but_no_last_one():
    curve = {step: 3 + step % 7 for step in range(1, 100)}
    view = lambda far: report.figure(None, [report.Line("a", curve | far, "#000")], 100)["view"]
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


def test_of_many_pictures_some_are_shown(tmp_path):
    workdir = make_run(tmp_path / "run", pictures=range(100, 10_100, 100))
    path = workdir / "eval_samples" / "grid" / "000010000.png"
    path.write_bytes(path.read_bytes()[:-20])  # a job is writing it
    page = parsed(workdir)
    assert "40 of 100 steps are shown, evenly spaced." in page.text
    assert "step 10,000: not a whole PNG" in page.text
    steps = [int(picture["alt"].split()[-1].replace(",", "")) for picture in page.pictures()]
    assert len(steps) == 39
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == 100
    assert {a - b for a, b in itertools.pairwise(steps)} <= {200, 300}


@pytest.mark.parametrize(
    ("tag", "expected"), [("val/bits_per_dim", 1.0), ("probe/accuracy", 2.0), ("val/bits_per_dim_logdet", None)]
)
def test_which_value_is_best(tag, expected):
    assert report.best([2.0, math.nan, 1.0, math.inf], tag) == expected
    assert report.best([math.nan], tag) is None


def test_bindings_of_a_gin_file():
    assert report.bindings(CONFIG) == {
        "TOTAL_STEPS": "800",
        "Data.name": "'digits'",
        "Data.pp": "(\"decode | keep('image', \" \"'text')\")",
    }


def test_runs_beside_each_other(tmp_path):
    a = make_run(tmp_path / "a")
    results = [{"step": 300, "val/bits_per_dim": 5.0, "fid/distance": 9.5}]
    config = CONFIG.replace("800", "1600") + "Data.extra = '<b>'\n"
    b = make_run(tmp_path / "b", {"train/loss": {1: 3.0, 2: 2.0}}, config, results)
    (b / "run.json").unlink()
    page = Parsed(report.comparison([report.read_run(a), report.read_run(b)]))
    assert page.rows("differing") == [
        ["binding", "a", "b"],
        ["Data.extra", "–", "'<b>'"],
        ["TOTAL_STEPS", "800", "1600"],
    ]
    finals = page.rows("finals")
    assert finals[0] == ["metric", "a", "b"]
    assert finals[1] == ["val/bits_per_dim", "5.9321 at 600", "5.0000 at 300"]
    assert ["fid/distance", "–", "9.5000 at 300"] in finals
    assert ["train/loss", "101.00 at 400", "2.0000 at 2"] in finals
    assert ["Parameters", "1,288", "–"] in page.rows("runs")
    titles = re.findall(r"<figcaption>(\S+)</figcaption>", report.comparison([report.read_run(a), report.read_run(b)]))
    figures = dict(zip(titles, page.figures(), strict=False))
    assert [trace["name"] for trace in figures["train/loss"]["data"]] == ["a", "b"]
    assert [trace["name"] for trace in figures["fid/distance"]["data"]] == ["b"]
    assert [picture["alt"] for picture in page.pictures()] == [
        "samples/grid, a, step 400",
        "samples/grid, b, step 400",
    ]
    c = make_run(tmp_path / "other" / "a")
    page = Parsed(report.comparison([report.read_run(a), report.read_run(c)]))
    assert page.rows("finals")[0] == ["metric", str(a), str(c)]
    assert "What differs in their configurations\nNothing." in page.text


def test_workdirs_may_be_urls(tmp_path):
    local = make_run(tmp_path / "digits")
    remote = UPath("memory://runs/digits")
    for path in local.rglob("*"):
        if path.is_file():
            copy = remote / str(path.relative_to(local))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    assert str(report.write_report(["memory://runs/digits/"])) == "memory://runs/digits/report.html"
    there, here = Parsed((remote / "report.html").read_text(encoding="utf-8")), parsed(local)
    assert there.figures() == here.figures()
    assert there.pictures() == here.pictures()
    assert there.rows("evaluation") == here.rows("evaluation")
    assert ("title", {}) in there.tags
    assert there.text.strip().startswith("digits")


def run_program(*flags):
    """Runs the program; its exit code and what it said."""
    args = [sys.executable, "-m", "jetformer.report", *flags]
    process = subprocess.run(args, capture_output=True, text=True, timeout=100)
    return process.returncode, process.stderr


@pytest.mark.slow
def test_the_program(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    code, log = run_program(f"--workdir={a}")
    assert code == 0, log
    assert log.rstrip().endswith(f"Open {a}/report.html")
    assert len(parsed(a).figures()) == 5
    out = tmp_path / "new" / "page.html"
    code, log = run_program(f"--compare={a},{b}", f"--out={out}", "--metrics=train/loss")
    assert code == 0, log
    (figure,) = Parsed(out.read_text()).figures()
    assert [trace["name"] for trace in figure["data"]] == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --workdir and --compare"),
        (["--workdir=a", "--compare=a,b"], "give one of --workdir and --compare"),
        (["--compare=a"], "--compare: give two workdirs or more, as DIR1,DIR2"),
        (["--compare=a,b"], "--compare needs an --out, the page to write"),
        (["--workdir=/nowhere/run"], "/nowhere/run holds no run: it has no config.gin"),
    ],
)
def test_refusals(flags, message):
    assert run_program(*flags) == (1, f"error: {message}\n")


@pytest.mark.slow
def test_a_page_needs_no_tensorflow(tmp_path):
    """Whose import takes longer than all the rest."""
    workdir = make_run(tmp_path / "run")
    code = f"from jetformer import report; report.write_report([{str(workdir)!r}]); import sys; "
    code += "assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def browse(path):
    """A page's document after its scripts have run, and what they complained about, in a real browser."""
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
    """All curves, marks and pictures, with nothing to complain about."""
    steps = range(1, 3001)
    curve = {step: math.nan if step == 7 else 2 + 1 / step for step in steps}
    scalars = {"train/bits_per_dim": curve, "train/loss": {1: 5.0}, "<b>": {1: 1.0, 2: 2.0}, "grad_norm": {1: math.nan}}
    runs = [report.read_run(make_run(tmp_path / name, scalars)) for name in ("a", "b")[: 1 + compare]]
    page = tmp_path / "page.html"
    text = report.comparison(runs) if compare else report.page(runs[0])
    probe = """<script>
    document.getElementById("log").click();
    Promise.all([...document.images].map(image => image.decode())).then(() => {
      document.body.dataset.images = [...document.images].filter(image => image.naturalWidth == 8).length;
      document.body.dataset.axes = plots.map(plot => plot._fullLayout.yaxis.type).join();
      document.body.dataset.sizes = plots.map(plot => plot.querySelector(".main-svg").clientWidth > 300).join();
      // Over which of a chart's parts its toolbar is.
      document.body.dataset.covered = plots.map(plot => {
        const toolbar = plot.querySelector(".modebar").getBoundingClientRect();
        return [...plot.querySelectorAll(".legend, .nsewdrag, .xtitle")].filter(part => {
          const box = part.getBoundingClientRect();
          return box.bottom > toolbar.top && box.top < toolbar.bottom && box.right > toolbar.left;
        }).map(part => part.classList).join("+");
      }).join("");
      document.body.dataset.tools = [...plots[0].querySelectorAll(".modebar-btn")].map(b => b.dataset.title).join();
    });</script></body>"""
    page.write_text(text.replace("</body>", probe), encoding="utf-8")
    document, said = browse(page)
    assert not said
    figures = Parsed(text).figures()
    assert len(figures) == (6 if compare else 4)
    traces = sum(len(figure["data"]) for figure in figures)
    assert len(re.findall(r'<g class="trace scatter ', document)) == traces
    assert len(re.findall(r'class="js-line"', document)) >= 2 * (1 + compare)
    found = dict(re.findall(r'data-(images|axes|sizes|covered|tools)="([^"]*)"', document))
    assert found["covered"] == ""
    assert found["tools"].lower() == "download plot as a png,zoom,pan,reset axes"  # none that uploads anything
    assert found["images"] == "2"
    assert found["axes"].split(",") == ["log"] * len(figures)
    assert found["sizes"].split(",") == ["true"] * len(figures)


def test_parts_of_an_evaluation_are_lines_of_one_chart():
    """As accuracies of layers and classes; likelihoods come first, and 5 before 10."""
    tags = ["probe/accuracy_10_shot/layer_1", "probe/accuracy_5_shot/layer_0", "probe/accuracy_5_shot/layer_10",
            "probe/accuracy_5_shot/layer_2", "shown/images", "shown/images/colour", "val/bits_per_dim"]  # fmt: skip
    curves = {tag: {1: 0.5, 2: 0.25} for tag in tags}
    records = [{"step": 2, **dict.fromkeys(tags, 0.25)}]
    run = report.Run("r", report.UPath("r"), {}, {}, curves, {"all": records}, {}, [])
    charts = report.run_charts(run, tags)
    names = {key: [line.name for line in lines] for key, lines in charts.items()}
    assert names["probe", "accuracy_5_shot"] == ["layer_0", "layer_2", "layer_10"]
    assert names["shown", "images"] == ["all", "colour"]
    assert names["val", "bits_per_dim"] == ["val"]
    lines = {"probe/accuracy_10_shot": {1: 0.5}, "probe/accuracy_5_shot": {1: 0.25}}
    of_wholes = report.Run("r", report.UPath("r"), {}, {}, lines, {}, {}, [])
    assert list(report.run_charts(of_wholes, list(lines))) == [
        ("probe", "accuracy_5_shot"),
        ("probe", "accuracy_10_shot"),
    ]
    alone = report.run_charts(run, ["probe/accuracy_10_shot/layer_1"])
    assert [*alone] == [("probe", "accuracy_10_shot/layer_1")]
    order = run.evaluation_tags()
    assert order[:2] == ["val/bits_per_dim", "shown/images"]
    assert order.index("probe/accuracy_5_shot/layer_0") < order.index("probe/accuracy_10_shot/layer_1")
