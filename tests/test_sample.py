"""The sampling program: its files, samples that do not depend on each other, resuming, errors."""

import contextlib
import functools
import hashlib
import http.server
import json
import math
import pathlib
import re
import shutil
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
import torch
from PIL import Image
from upath import UPath

from jetformer import config, prng
from jetformer.data import preprocess
from jetformer.data.dataset import Data
from jetformer.data.pictures import MAX_PIXELS, read_pictures
from jetformer.experiment import Experiment
from jetformer.objectives import JetObjective
from jetformer.runtime import Runtime
from jetformer.state import load
from jetformer.trainer import train
from runs import bindings, start, torchrun
from trees import png_of_zeros

pytestmark = pytest.mark.slow

PROMPT = "a large red circle at the left on a black background"


def finished(workdir, gin_file, gin_bindings):
    config.parse([gin_file], gin_bindings)
    train(config.call(Experiment), UPath(workdir), Runtime(torch.device("cpu")))
    return workdir


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, shapes_dir):
    """A run of shapes.gin, too short to learn anything."""
    small = bindings(shapes_dir, train__total_steps=4, train__evaluators='{"val": @Likelihood()}', Jet__num_heads=2)
    return finished(tmp_path_factory.mktemp("captioned"), "experiments/shapes.gin", small)


@pytest.fixture(scope="module")
def classes(tmp_path_factory, data_dir):
    """A run of digits.gin, likewise."""
    small = bindings(data_dir, train__total_steps=4, train__evaluators='{"val": @Likelihood()}')
    return finished(tmp_path_factory.mktemp("classes"), "experiments/digits.gin", small)


@pytest.fixture(scope="module")
def flow(tmp_path_factory, data_dir):
    """A run of jet_digits_labelled.gin, likewise, with a learning rate that tells its labels apart."""
    flow = {"train__evaluators": "{}", "train__noise_scale": 0.0, "train__ema_decay": 0.0, "make_optimizer__lr": 0.03}
    small = bindings(data_dir, train__total_steps=4, **flow)
    return finished(tmp_path_factory.mktemp("flow"), "experiments/jet_digits_labelled.gin", small)


def sample(out, *flags, environment=None, processes=1):
    """Runs the program and returns its exit code, its log, and the records that it wrote."""
    args = [sys.executable, "-m", "jetformer.sample", "--device=cpu", f"--out={out}", *flags]
    process = start(args if processes == 1 else torchrun(args, processes), **environment or {})
    _, log = process.communicate(timeout=200)
    path = pathlib.Path(out) / "samples.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return process.returncode, log, records


def picture(out, record):
    with Image.open(out / record["file"]) as image:
        return np.asarray(image).astype(int)


def test_prompts(captioned, tmp_path):
    """Files, page and records; samples do not depend on other samples and on the batch size."""
    (tmp_path / "prompts.txt").write_text(f"a blue cross\n{PROMPT}\n")
    flags = [f"--workdir={captioned}", "--guidance_weight=1.5", "--guidance_schedule=linear"]
    out = tmp_path / "all"
    code, log, records = sample(out, *flags, f"--prompts={tmp_path}/prompts.txt", "--num_images=3", "--batch_size=4")
    assert code == 0, log
    assert [(r["prompt"], r["seed"]) for r in records] == [(p, s) for p in ("a blue cross", PROMPT) for s in (0, 1, 2)]
    assert records[0]["file"] == "images/a-blue-cross_0000.png"
    for record in records:
        assert picture(out, record).shape == (32, 32, 3)
        assert record["guidance"] == "density"
        assert record["guidance_weight"] == 1.5
        assert record["step"] == 4
        assert record["ema"]
        assert record["bits_per_dim"] == pytest.approx(-record["log_likelihood"] / (32 * 32 * 3 * np.log(2)))
    page = (out / "index.html").read_text()
    assert all(f'src="{record["file"]}"' in page for record in records)
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 3 * 128

    alone = tmp_path / "alone"
    code, log, ones = sample(alone, *flags, f"--prompt={PROMPT}", "--num_images=1", "--seed=2")
    assert code == 0, log
    (one,) = ones
    same = next(r for r in records if r["prompt"] == PROMPT and r["seed"] == 2)
    assert abs(picture(alone, one) - picture(out, same)).max() <= 1
    assert one["log_likelihood"] == pytest.approx(same["log_likelihood"], rel=1e-4)


def test_it_resumes(captioned, tmp_path):
    flags = [f"--workdir={captioned}", f"--prompt={PROMPT}"]
    out = tmp_path / "out"
    code, log, first = sample(out, *flags, "--num_images=2")
    assert code == 0, log
    with (out / "samples.jsonl").open("a") as file:  # interrupted while writing
        file.write('{"prompt": "a large r')
    made = (out / first[0]["file"]).stat().st_mtime_ns
    code, log, records = sample(out, *flags, "--num_images=3")
    assert code == 0, log
    assert "2 of 3 samples" in log
    assert [record["seed"] for record in records] == [0, 1, 2]
    assert records[:2] == first
    assert (out / first[0]["file"]).stat().st_mtime_ns == made
    (out / "index.html").unlink()  # interrupted before writing the page
    code, log, again = sample(out, *flags, "--num_images=3")
    assert code == 0, log
    assert again == records
    assert (out / "index.html").exists()
    code, log, _ = sample(out, *flags, "--temperature=0.5")
    assert code == 1
    assert log.splitlines()[-1].startswith(f"error: {out} holds samples with temperature 1.0, not 0.5: ")


def test_captions_of_images(captioned, tmp_path):
    """Images that cannot be read are named and skipped; others are resized."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, size in (("a", (32, 32)), ("b", (50, 40))):
        Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:300])
    (folder / "d.png").write_text("no image")
    flags = [f"--workdir={captioned}", f"--images={folder}/*.png", "--task=caption", "--top_k=20", "--temperature=2"]
    code, log, records = sample(tmp_path / "out", *flags)
    assert code == 1
    assert log.splitlines()[-1].startswith("error: 2 of 4 images ")
    assert f"{folder}/c.png, {folder}/d.png" in log.splitlines()[-1]
    assert any(f"{folder}/b.png" in line and "40 × 50" in line and "32 × 32" in line for line in log.splitlines())
    assert [pathlib.Path(record["image"]).name for record in records] == ["a.png", "b.png"]
    for record in records:
        assert isinstance(record["text"], str)
        assert record["bits_per_token"] > 0
    assert "bits per token" in (tmp_path / "out" / "index.html").read_text()

    shutil.copy(folder / "b.png", folder / "a.png")  # another image of this name
    code, log, _ = sample(tmp_path / "out", *flags)
    assert code == 1
    assert f"error: {tmp_path}/out holds a sample of another {folder}/a.png, with image_sha256 " in log
    for good in ("a", "b"):
        (folder / f"{good}.png").unlink()
    code, log, records = sample(tmp_path / "none", *flags)
    assert code == 1
    assert "error: 2 of 2 images " in log
    assert not records


def test_images_have_the_pixels_of_training(tmp_path):
    """Greyscale of 16 bits, transparency, EXIF: by the op and by the program."""
    random = np.random.default_rng(0)
    ramp = np.arange(0, 1 << 16, 1 << 8, dtype=np.uint16).reshape(16, 16)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "grey.png": (Image.fromarray(ramp), {}),
        "jpeg.jpg": (Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)), {"exif": turned}),
        "clear.webp": (Image.fromarray(random.integers(0, 256, (16, 16, 4), np.uint8)), {"lossless": True}),
    }
    for name, (image, options) in files.items():
        image.save(tmp_path / name, **options)
    for channels, background in ((1, (255, 255, 255)), (3, (0, 90, 200))):
        images, unreadable = read_pictures(f"{tmp_path}/*", (16, 16, channels), background)
        assert not unreadable
        op = preprocess.parse(f"decode({channels}, background={background})")
        for name in files:
            given = images[str(tmp_path / name)]
            np.testing.assert_array_equal(given, op({"image": tf.io.read_file(f"{tmp_path}/{name}")})["image"])
        np.testing.assert_array_equal(images[f"{tmp_path}/grey.png"][..., 0], ramp >> 8)
    data = Data("folder:/images", pp="", pp_eval="decode(background=(0, 90, 200)) | keep('image')")
    assert data.background() == (0, 90, 200)


def test_a_decompression_bomb(captioned, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of_zeros(20_000, 20_000))
    flags = [f"--workdir={captioned}", f"--images={path}", "--task=caption"]
    code, log, records = sample(tmp_path / "out", *flags)
    assert code == 1
    assert not records
    assert any(str(path) in line and f"{MAX_PIXELS:,}" in line for line in log.splitlines())
    assert "Traceback" not in log


def test_completion_of_images(captioned, tmp_path):
    """The given rows are kept."""
    path = tmp_path / "a.png"
    given = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(given).save(path)
    flags = [f"--workdir={captioned}", f"--images={path}", "--task=complete", f"--prompt={PROMPT}"]
    code, log, records = sample(tmp_path / "out", *flags, "--num_images=2", "--rows=16")
    assert code == 0, log
    assert [(r["image"], r["prompt"], r["rows"]) for r in records] == [(str(path), PROMPT, 16)] * 2
    (original,) = {record["original"] for record in records}
    assert np.array_equal(picture(tmp_path / "out", {"file": original}), given)
    assert (tmp_path / "out" / "index.html").read_text().count('href="#border"') == 3
    a, b = (picture(tmp_path / "out", record) for record in records)
    assert np.array_equal(a[:16], given[:16])
    assert np.array_equal(b[:16], given[:16])
    assert abs(a - b).max() > 1
    code, log, _ = sample(tmp_path / "other", *flags, "--rows=15")
    assert code == 1
    assert "error: 15 rows: " in log
    assert "patch size 4 " in log


def test_classes(classes, tmp_path):
    """From a checkpoint by its path, without the moving average."""
    out = tmp_path / "out"
    checkpoint = classes / "checkpoints" / "000000004"
    code, log, records = sample(out, f"--checkpoint={checkpoint}", "--classes=3,7", "--num_images=2", "--noema")
    assert code == 0, log
    assert [(r["prompt"], r["seed"]) for r in records] == [(f"class {c}", s) for c in (3, 7) for s in (0, 1)]
    assert picture(out, records[0]).shape == (8, 8)
    assert not records[0]["ema"]
    assert records[0]["guidance"] == "none"


def test_paths_of_a_configuration_are_not_used(classes, tmp_path):
    """It may come from elsewhere: sampling neither reads nor writes what it names."""
    workdir = tmp_path / "run"
    shutil.copytree(classes, workdir)
    bound = ("Data.data_dir", "Fid.save_statistics", "PatchPCA.path", "train.init_from", "train.compilation_cache")
    with (workdir / "config.gin").open("a") as file:
        file.writelines(f"{name} = '{tmp_path}/elsewhere/of_{name}'\n" for name in bound)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    code, log, records = sample(tmp_path / "out", f"--workdir={workdir}", "--classes=1", "--num_images=1")
    assert code == 0, log
    assert len(records) == 1
    assert not (tmp_path / "elsewhere").exists()
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_several_processes_equal_one(classes, tmp_path):
    """Three batches on two processes, the last of them not full, when resuming too."""
    one_thread = {"OMP_NUM_THREADS": "1"}
    flags = [f"--workdir={classes}", "--classes=3,7", "--batch_size=2"]
    outs = tmp_path / "one", tmp_path / "two"
    code, log, expected = sample(outs[0], *flags, "--num_images=3", environment=one_thread)
    assert code == 0, log
    for count in 2, 3:
        code, log, records = sample(outs[1], *flags, f"--num_images={count}", environment=one_thread, processes=2)
        assert code == 0, log
    by_sample = lambda records: sorted(records, key=lambda r: (r["prompt"], r["seed"]))
    assert len(records) == 6
    for one, two in zip(by_sample(expected), by_sample(records), strict=True):
        assert two["log_likelihood"] == pytest.approx(one["log_likelihood"], rel=1e-5)
        assert abs(picture(outs[0], one) - picture(outs[1], two)).max() <= 1
    assert (outs[1] / "index.html").exists()

    code, log, _ = sample(outs[1], *flags, "--temperature=0.5", environment=one_thread, processes=2)
    assert code != 0
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, log
    assert "temperature" in lines[0]


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        ("classes", ["--classes=10"], r"class or token 10: .* 0 to 9"),
        ("classes", ["--classes=three"], "class 'three'.* 10, such as 0, 1, 2"),
        ("classes", ["--prompt=a"], "caption"),
        ("captioned", ["--prompt= "], "prompt"),
        ("captioned", ["--classes=1"], "on texts, not on classes"),
        ("captioned", ["--prompt=a", "--top_k=3"], r"--top_k .*\(image\)"),
        (
            "classes",
            ["--images=experiments/digits.png", "--task=complete", "--classes=1", "--temperature=0"],
            "temperatures 0.0 and 1.0: ",
        ),
        ("captioned", ["--task=caption"], "--images and --task "),
        ("classes", ["--images=experiments/digits.png", "--task=inpaint", "--classes=1"], "--mask"),
        (
            "classes",
            ["--images=experiments/digits.png", "--task=inpaint", "--mask=experiments/digits.png", "--classes=1"],
            r"mask has shape .*\[8, 8\]",
        ),
        ("captioned", ["--images=/nowhere/*.png", "--task=caption"], r"/nowhere/\*.png: "),
        ("captioned", ["--prompt=a", "--denoise"], "noise_min is 0"),
        ("captioned", ["--prompt=a", "--step=3"], "checkpoint of step 3, .* 4"),
        ("captioned", [], "--classes, --prompt, --prompts or --images"),
        (
            "captioned",
            ["--prompt=a", "--guidance=density", "--gin_bindings=JetFormerObjective.drop_labels_prob = 0.0"],
            "guidance density .*drop_labels_prob is 0",
        ),
        (
            "captioned",
            ["--prompt=a", "--gin_bindings=Decoder.depth = 2"],
            "Decoder.depth is 1, .* 2;",
        ),
    ],
)
def test_refusals(run, flags, message, tmp_path, request):
    workdir = request.getfixturevalue(run)
    code, log, records = sample(tmp_path / "out", f"--workdir={workdir}", *flags)
    assert code == 1
    assert log.splitlines()[-1].startswith("error: ")
    assert re.search(message, log.splitlines()[-1])
    assert not records


def test_an_order_that_is_not_trained_is_refused(captioned, tmp_path):
    flags = [f"--workdir={captioned}", "--gin_bindings=JetFormerObjective.text_prefix_prob = 1.0"]
    code, log, _ = sample(tmp_path / "out", *flags, "--images=experiments/digits.png", "--task=caption")
    assert code == 1
    assert "text_prefix_prob is 1.0" in log.splitlines()[-1]


def test_prompts_of_a_file(captioned, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\na blue cross\n")
    code, log, _ = sample(tmp_path / "out", f"--workdir={captioned}", f"--prompts={path}")
    assert code == 1
    assert f"error: --prompts: {path}:2 " in log


def test_a_long_prompt_is_truncated_with_a_warning(captioned, tmp_path):
    long = " and ".join(["a large red circle at the left"] * 9)
    code, log, records = sample(tmp_path / "out", f"--workdir={captioned}", f"--prompt={long}", "--num_images=1")
    assert code == 0, log
    assert "is too long " in log
    assert len(records) == 1


def test_texts_of_a_language_model(tmp_path, shapes_dir):
    """The captions of shapes as texts alone: training, and continuations of prompts."""
    small = bindings(
        shapes_dir,
        train__total_steps=4,
        train__noise_scale=0.0,
        train__autocast=None,
        train__evaluators='{"val": @Likelihood()}',
        Data__name='"shapes"',
        Data__eval_split='"validation"',
        Data__pp="\"first(inkey='captions', outkey='text') | caption('experiments/shapes.model', 40, pad='ignored') "
        "| keep('text', 'text_mask', 'text_loss')\"",
        LanguageModel__vocab_size=161,
        LanguageModel__bos_id=160,
    )
    workdir = finished(tmp_path / "run", "experiments/tinystories.gin", small)
    flags = [f"--workdir={workdir}", "--num_images=2"]
    code, log, records = sample(tmp_path / "out", *flags, "--prompt=a red", "--prompt=there is a")
    assert code == 0, log
    assert [(r["prompt"], r["seed"]) for r in records] == [(p, s) for p in ("a red", "there is a") for s in (0, 1)]
    assert all("file" not in record and record["bits_per_token"] > 0 for record in records)
    assert not (tmp_path / "out" / "grid.png").exists()
    assert "there is a" in (tmp_path / "out" / "index.html").read_text()
    code, log, records = sample(tmp_path / "free", *flags)
    assert code == 0, log
    assert [record["prompt"] for record in records] == ["", ""]


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves a folder as the repository `people/run` of the Hugging Face Hub, to any version of the client."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, *args, folder):
        self._folder = folder
        super().__init__(*args)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        prefix = f"/people/run/resolve/{self.COMMIT}/"
        files = {str(f.relative_to(self._folder)): f for f in self._folder.rglob("*") if f.is_file()}
        if path in ("/api/models/people/run", *(f"/api/models/people/run/revision/{r}" for r in ("main", "v1"))):
            body = {"id": "people/run", "sha": self.COMMIT, "siblings": [{"rfilename": f} for f in files]}
            self._answer(json.dumps(body).encode(), "application/json")
        elif path in (f"/api/models/people/run/tree/{r}" for r in ("main", "v1", self.COMMIT)):
            body = [
                {"type": "file", "path": name, "size": f.stat().st_size, "oid": _digest(f.read_bytes())}
                for name, f in files.items()
            ]
            self._answer(json.dumps(body).encode(), "application/json")
        elif path.startswith(prefix) and path.removeprefix(prefix) in files:
            self._answer(files[path.removeprefix(prefix)].read_bytes(), "application/octet-stream")
        else:
            self._answer(b'{"error": "Repository not found"}', "application/json", 404)

    def _answer(self, body, kind, status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{_digest(body)}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def serving(folder):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, folder=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_run_on_the_hugging_face_hub(captioned, tmp_path):
    """A workdir as a repository: the same samples as from the workdir itself."""
    repository = tmp_path / "repository"
    shutil.copytree(captioned, repository, ignore=shutil.ignore_patterns("events*"))
    ranking = [{"step": 2, "value": 5.0}, {"step": 4, "value": 6.0}]  # the best one is deleted
    (repository / "best.json").write_text(json.dumps({"ranking": ranking}))
    flags = [f"--prompt={PROMPT}", "--num_images=1"]
    with serving(repository) as url:
        environment = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        code, log, theirs = sample(
            *(tmp_path / "out", *flags, "--hf_repo=people/run", "--hf_revision=v1", "--step=best"),
            environment=environment,
        )
        assert code == 0, log
        code, log, _ = sample(tmp_path / "other", *flags, "--hf_repo=people/other", environment=environment)
        assert code == 1
        assert log.splitlines()[-1].startswith("error: --hf_repo=people/other: ")
    code, log, ours = sample(tmp_path / "ours", *flags, f"--workdir={captioned}")
    assert code == 0, log
    assert np.array_equal(picture(tmp_path / "out", theirs[0]), picture(tmp_path / "ours", ours[0]))


# A flow alone


def test_a_flow_at_two_temperatures(flow, tmp_path):
    """Latents are multiplied by the temperature; likelihoods are the objective's."""
    for temperature in (0.5, 1.0):
        out = tmp_path / str(temperature)
        code, log, records = sample(out, f"--workdir={flow}", "--num_images=3", f"--temperature={temperature}")
        assert code == 0, log
        assert [record["seed"] for record in records] == [0, 1, 2]
        _, state, _ = load(UPath(flow), [], [], Runtime(torch.device("cpu")))
        with state.averaged(), torch.no_grad():
            keys = torch.stack([prng.key(seed) for seed in range(3)])
            latents = temperature * prng.normal(keys, (8, 8, 1))
            x, _ = state.model.eval().inverse(latents)
            bits, _ = JetObjective.score(state.model, x)["bits_per_dim"]
        for record, image, expected in zip(records, x, bits, strict=True):
            pixels = ((image[..., 0] + 1) * 127.5).floor().clamp(0, 255).numpy()
            assert np.abs(picture(out, record) - pixels).max() <= 1
            assert record["bits_per_dim"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_flow_of_classes_resumes(flow, tmp_path):
    code, log, records = sample(tmp_path, f"--workdir={flow}", "--classes=3,7", "--num_images=2")
    assert code == 0, log
    assert [record["prompt"] for record in records] == ["class 3", "class 3", "class 7", "class 7"]
    assert (picture(tmp_path, records[0]) != picture(tmp_path, records[2])).any()
    code, log, _ = sample(tmp_path, f"--workdir={flow}", "--classes=3,7", "--num_images=3")
    assert code == 0, log
    assert "4 of 6 samples" in log


def test_a_flow_of_noisy_images(tmp_path, data_dir):
    """Its likelihoods have another name, and what was done shows in the records."""
    small = bindings(data_dir, train__total_steps=1, train__evaluators="{}", train__noise_scale=0.0, TarFlow__depth=2)
    workdir = finished(tmp_path / "run", "experiments/tarflow_digits_noisy.gin", small)
    flags = ["--classes=3,7", "--num_images=1", "--guidance_weight=2", "--denoise"]
    code, log, records = sample(tmp_path / "out", f"--workdir={workdir}", *flags)
    assert code == 0, log
    for record in records:
        assert (record["guidance"], record["guidance_weight"], record["denoise"]) == ("interp", 2.0, True)
        expected = -record["log_likelihood"] / (64 * math.log(2))
        assert record["noisy_bits_per_dim"] == pytest.approx(expected)
        assert "bits_per_dim" not in record


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes=10"], r"class or token 10: .* 0 to 9"),
        (["--prompt=a"], r"--prompt .*\(flow\)"),
        (["--top_k=3"], r"--top_k .*\(flow\)"),
        (["--guidance_candidates=3", "--guidance=resample"], r"--guidance_candidates .*\(flow\)"),
        (["--guidance_weight=1", "--classes=3"], r"LabelledFlow of a TarFlow"),
        (["--denoise"], "noise_std is 0"),
    ],
)
def test_flags_that_do_not_apply_to_a_flow(flow, tmp_path, flags, message):
    code, log, _ = sample(tmp_path, f"--workdir={flow}", *flags)
    assert code == 1
    assert re.search(message, log.splitlines()[-1])
