"""The conversion program: workdirs that the other programs take, the Hub both ways, errors."""

import base64
import contextlib
import functools
import json
import pathlib
import shutil
import sys
import threading
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from upath import UPath

from golden_files import DIRECTORY, Golden
from jetformer import checkpoint, config
from jetformer.experiment import Experiment
from jetformer.runtime import Runtime
from jetformer.state import load, restore
from jetformer.trainer import train
from runs import bindings, results, run, start
from test_convert import (
    JET_BINDINGS,
    JETFORMER_PT,
    JETFORMER_YAML,
    TARFLOW_BINDINGS,
    VERSIONED_PT,
    Malicious,
    check_jet,
    check_jetformer,
    check_tarflow,
    check_versioned,
    write_bv,
    write_tarflow,
)
from test_sample import Hub

pytestmark = pytest.mark.slow

PATCHES = ("train.model = @Patchify", "Patchify.image_shape = (8, 8, 3)", "Patchify.patch_size = 2")
CPU = Runtime(torch.device("cpu"))


def convert(*flags, environment=None, program="convert"):
    """Runs the program and returns its exit code and its log."""
    process = start([sys.executable, "-m", f"jetformer.{program}", *map(str, flags)], **environment or {})
    _, log = process.communicate(timeout=200)
    return process.returncode, log


def bound(*gin_bindings):
    return [f"--gin_bindings={binding}" for binding in gin_bindings]


def loaded(workdir):
    """The experiment and its state, as the other programs load them."""
    experiment, state, _ = load(UPath(workdir), [], [], CPU)
    state.runner.eval()
    return experiment, state


class Store(Hub):
    """Also serves single files, and accepts the upload of `people/run` into the folder."""

    def do_GET(self):
        self.path = self.path.replace("/resolve/main/", f"/resolve/{self.COMMIT}/")
        super().do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            answer = {"url": f"{url}/people/run", "name": "people/run"}
        elif self.path == "/api/validate-yaml":
            assert yaml.safe_load(json.loads(body)["content"].split("---\n")[1])["library_name"] == "jetformer"
            answer = {"errors": [], "warnings": []}
        elif self.path == "/api/models/people/run/preupload/main":
            modes = {
                file["path"]: "lfs" if "safetensors" in file["path"] else "regular"
                for file in json.loads(body)["files"]
            }
            answer = {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
        elif self.path == "/people/run.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            upload = lambda oid: {"upload": {"href": f"{url}/lfs/{oid}", "header": {}}}
            answer = {"transfer": "basic", "objects": [{**x, "actions": upload(x["oid"])} for x in objects]}
        elif self.path == "/api/models/people/run/commit/main":
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    (self._folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
                elif entry["key"] == "lfsFile":
                    (self._folder / f"lfs-{value['oid']}").rename(self._folder / value["path"])
            answer = {"success": True, "commitOid": self.COMMIT, "commitUrl": f"{url}/people/run/commit/{self.COMMIT}"}
        else:
            answer = None
        self.command = "GET"  # the base answers others without a body
        status = 404 if answer is None else 200
        self._answer(json.dumps(answer or {"error": "Repository not found"}).encode(), "application/json", status)

    def do_PUT(self):
        self.command, oid = "GET", pathlib.PurePath(self.path).name
        (self._folder / f"lfs-{oid}").write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(b"{}", "application/json")


@contextlib.contextmanager
def storing(folder):
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Store, folder=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def jet_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("jet_pytorch") / "jet.safetensors"
    save_file(Golden(DIRECTORY / "convert_jet_pytorch.npz").tensors("params"), file)
    return file


@pytest.fixture(scope="module")
def jetformer(tmp_path_factory, data_dir):
    """The golden JetFormer of alexojica/JetFormer, converted, with digits in colour as its data."""
    out = tmp_path_factory.mktemp("jetformer") / "run"
    pp = "decode(channels=3) | resize(16) | label_as_text | keep('image', 'text', 'text_mask', 'text_loss')"
    data = (f'Data.data_dir = "{data_dir}"', 'Data.name = "digits"', 'Data.eval_split = "validation[:20]"')
    code, log = convert(
        *(
            "--from=jetformer_pytorch",
            f"--path={JETFORMER_PT}",
            f"--yaml={JETFORMER_YAML}",
            "--step=30",
            f"--out={out}",
        ),
        *bound(*data, f'Data.pp_eval = "{pp}"', "Samples.num_images = 1", "Samples.num_round_trips = 2"),
    )
    assert code == 0, log
    return out


def test_jetformer_pytorch(jetformer, tmp_path):
    """It has the golden file's outputs, can be sampled, and is evaluated by a job that ends on its own."""
    experiment, state = loaded(jetformer)
    check_jetformer(state.model)
    assert experiment.steps() == 30
    assert state.ema is None
    code, log = convert(
        *(f"--workdir={jetformer}", "--classes=3", "--num_images=1", f"--out={tmp_path}", "--device=cpu"),
        program="sample",
    )
    assert code == 0, log
    (record,) = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert record["step"] == 30
    with Image.open(tmp_path / record["file"]) as image:
        assert image.size == (16, 16)
    code, log = convert(f"--workdir={jetformer}", "--device=cpu", program="evaluate")
    assert code == 0, log
    (record,) = results(jetformer, "val")
    assert record["step"] == 30
    assert 4 < record["val/bits_per_dim"] < 40


def test_format_6_from_the_hub_to_safetensors_and_back(tmp_path):
    """It has the golden file's outputs on each way, and can be sampled; format 5 makes the same workdir."""
    repository = tmp_path / "repository"
    repository.mkdir()
    shutil.copy(VERSIONED_PT[6], repository / "jetformer.pt")
    content = torch.load(VERSIONED_PT[6], weights_only=True)
    (repository / "config.yaml").write_text(yaml.safe_dump(content["config"]))
    (repository / "samples.png").touch()
    with storing(repository) as (_, url):
        environment = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        flags = ("--from=jetformer_pytorch", "--hf_repo=people/run", f"--out={tmp_path}/six")
        code, log = convert(*flags, environment=environment)
        assert code == 0, log
    for flags in (
        ("--from=jetformer_pytorch", f"--path={VERSIONED_PT[5]}", f"--out={tmp_path}/five"),
        ("--to=safetensors", f"--workdir={tmp_path}/six", f"--out={tmp_path}/shared"),
        ("--from=safetensors", f"--path={tmp_path}/shared", f"--out={tmp_path}/again"),
    ):
        code, log = convert(*flags)
        assert code == 0, log
    for name in ("six", "five", "again"):
        assert checkpoint.latest(tmp_path / name) == 30
        _, state = loaded(tmp_path / name)
        assert state.ema is None
        check_versioned(state.model)
    configs = [(tmp_path / name / "config.gin").read_text() for name in ("six", "five", "again")]
    assert configs[0] == configs[1] == configs[2]
    code, log = convert(
        *(f"--workdir={tmp_path}/six", "--classes=3", "--num_images=1", f"--out={tmp_path}/samples", "--device=cpu"),
        *("--guidance_weight=2", "--temperature=0.7"),
        program="sample",
    )
    assert code == 0, log
    (record,) = map(json.loads, (tmp_path / "samples" / "samples.jsonl").read_text().splitlines())
    assert record["step"] == 30


def test_jet_pytorch_from_the_hub(jet_file, tmp_path):
    """It has the golden file's outputs; each hyperparameter that the weights do not determine must be given."""
    repository = tmp_path / "repository"
    repository.mkdir()
    shutil.copy(jet_file, repository)
    (repository / "README.md").write_text("…")
    out = tmp_path / "out"
    with storing(repository) as (_, url):
        environment = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        flags = ["--from=jet_pytorch", "--hf_repo=people/run", f"--out={out}"]
        code, log = convert(*flags, *bound(JET_BINDINGS[0]), environment=environment)
        assert code == 1
        last = log.splitlines()[-1]
        assert last.startswith("error: ")
        assert last.endswith("3 channel and 3 spatial couplings: give --gin_bindings='Jet.kinds = …'")
        assert not out.exists()
        code, log = convert(*flags, *bound(*JET_BINDINGS), environment=environment)
        assert code == 0, log
        assert "Jet.scale_factor = 2.0, the package's default" in log
        (repository / "other.safetensors").touch()
        code, log = convert(*flags[:2], f"--out={tmp_path}/other", environment=environment)
        assert code == 1
        assert "found jet.safetensors, other.safetensors: choose with --hf_file" in log.splitlines()[-1]
    experiment, state = loaded(out)
    check_jet(state.model)
    assert experiment.steps() == 1
    code, log = convert(
        *(f"--workdir={out}", "--num_images=2", f"--out={tmp_path}/samples", "--device=cpu"), program="sample"
    )
    assert code == 0, log
    assert len((tmp_path / "samples" / "samples.jsonl").read_text().splitlines()) == 2
    config.parse([str(out / "config.gin")], ['Jet.gelu = "tanh"'])
    with pytest.raises(ValueError, match=r"Jet.gelu is 'exact', .* 'tanh'"):
        restore(UPath(out), state)


@pytest.mark.parametrize("name", ["tarflow_unconditional", "tarflow_class_conditional"])
def test_ml_tarflow(name, tmp_path):
    """It has the golden file's outputs and can be sampled."""
    path = write_tarflow(tmp_path / "x.pth", name)
    flags = ["--from=ml_tarflow", f"--path={path}", f"--out={tmp_path}/out", "--step=9"]
    code, log = convert(*flags)
    assert code == 1
    assert log.splitlines()[-1].endswith("the number of attention heads: give --gin_bindings='TarFlow.num_heads = …'")
    code, log = convert(*flags, *bound(*TARFLOW_BINDINGS))
    assert code == 0, log
    experiment, state = loaded(tmp_path / "out")
    check_tarflow(state.model, name)
    assert experiment.steps() == 9
    code, log = convert(
        *(f"--workdir={tmp_path}/out", "--num_images=2", f"--out={tmp_path}/samples", "--device=cpu"), program="sample"
    )
    assert code == 0, log
    assert len((tmp_path / "samples" / "samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("form", ["npz", "bv"])
def test_big_vision(form, tmp_path, data_dir):
    """Parameters in a training state, for an experiment of this package."""
    file = Golden(DIRECTORY / "jet_channels.npz")
    x, expected = file.tensors("in")["x"], file.tensors("out")
    state = {f"params/{name}": value for name, value in file.numpy("params").items()}
    state["opt/0/count"] = np.array(3)
    if form == "npz":
        path = tmp_path / "checkpoint.npz"
        np.savez(path, **state)
    else:
        path = tmp_path / "checkpoint.bv"
        write_bv(f"{path}-000000009", state)
        (tmp_path / "checkpoint.bv-LAST").write_text("000000009")
    architecture = {"input_shape": tuple(x.shape[1:])} | file.config
    code, log = convert(
        *("--from=big_vision", f"--path={path}", "--gin_file=experiments/jet_digits.gin", f"--out={tmp_path}/out"),
        *bound(*(f"Jet.{name} = {tuple(v) if isinstance(v, list) else v!r}" for name, v in architecture.items())),
    )
    assert code == 0, log
    assert "train.ema_decay is set to 0" in log
    assert checkpoint.latest(tmp_path / "out") == (9 if form == "bv" else 1)
    _, state = loaded(tmp_path / "out")
    with torch.no_grad():
        z, logdet = state.model(x)
    torch.testing.assert_close(z, expected["z"], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(logdet, expected["logdet"], rtol=0, atol=1e-3)


def test_a_run_to_the_hub_and_back(tmp_path, shapes_dir):
    """The same parameters, moving average, tokenizer, step and experiment; the card has its metrics."""
    small = bindings(shapes_dir, train__total_steps=4, train__evaluators='{"val": @Likelihood()}', Jet__num_heads=2)
    config.parse(["experiments/shapes.gin"], small)
    train(config.call(Experiment), UPath(tmp_path / "run"), CPU)
    (tmp_path / "run" / "best.json").write_text('{"ranking": [{"step": 4}]}')
    repository = tmp_path / "repository"
    repository.mkdir()
    with storing(repository) as (server, url):
        environment = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_TOKEN": "hf_x", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        code, log = convert(
            *("--to=safetensors", f"--workdir={tmp_path}/run", f"--out={tmp_path}/shared", "--push_to=people/run"),
            *("--step=best", "--private", "--license=mit"),
            environment=environment,
        )
        assert code == 0, log
        assert (
            server.created.get("private") or server.created.get("visibility") == "private"
        )  # an old client, a new one
        files = {"README.md", "config.gin", "model.safetensors", "ema.safetensors", "tokenizer.model", "classes.json"}
        for directory in (tmp_path / "shared", repository):
            assert {path.name for path in directory.iterdir()} == files
        # All by the umask.
        assert len({(tmp_path / "shared" / file).stat().st_mode for file in files}) == 1
        code, log = convert(
            "--from=safetensors", "--hf_repo=people/run", f"--out={tmp_path}/again", environment=environment
        )
        assert code == 0, log
    ours, theirs = (loaded(tmp_path / name) for name in ("run", "again"))
    assert theirs[0].steps() == 4
    assert checkpoint.latest(tmp_path / "again") == 4
    for part in ("model", "ema"):
        expected, found = (state.tensors()[part] for _, state in (ours, theirs))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], x) for name, x in expected.items())
    for name in ("config.gin", "tokenizer.model", "classes.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    header = yaml.safe_load((repository / "README.md").read_text().split("---\n")[1])
    metrics = {metric["name"]: metric["value"] for metric in header["model-index"][0]["results"][0]["metrics"]}
    assert metrics["val/bits_per_dim"] == results(tmp_path / "run", "val")[-1]["val/bits_per_dim"]
    assert (header["license"], header["pipeline_tag"]) == ("mit", "text-to-image")


def test_links_to_private_files_are_not_copied(tmp_path, data_dir):
    """A workdir or a directory from elsewhere may hold links, whose targets must not get into what is shared."""
    run(tmp_path / "run", data_dir, train__total_steps=1, train__evaluators="{}")
    private = tmp_path / "private"
    private.write_text("my secret\n")
    code, log = convert("--to=safetensors", f"--workdir={tmp_path}/run", f"--out={tmp_path}/shared")
    assert code == 0, log
    for source, to in (("run", ["--to=safetensors", "--workdir"]), ("shared", ["--from=safetensors", "--path"])):
        for name in ("tokenizer.model", "classes.json"):
            directory = tmp_path / f"{source}_{name}"
            shutil.copytree(tmp_path / source, directory)
            (directory / name).unlink(missing_ok=True)
            (directory / name).symlink_to(private)
            out = tmp_path / f"{source}_{name}_out"
            code, log = convert(to[0], f"{to[1]}={directory}", f"--out={out}")
            assert code == 1
            assert str(directory / name) in log.splitlines()[-1]
            assert "my secret" not in log
            assert not out.exists()


def test_refusals(tmp_path, jet_file, jetformer):
    """One line and exit code 1; nothing is written or unpickled."""
    marker = tmp_path / "marker"
    torch.save({"model": Malicious(marker)}, tmp_path / "x.pt")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    save_file({"w": torch.zeros(1)}, foreign / "model.safetensors", metadata={"step": "1"})
    (foreign / "config.gin").write_text(
        f"from __gin__ import dynamic_registration\nimport os\ntrain.data = @os.mkdir()\nos.mkdir.path = '{marker}'\n"
    )
    content = torch.load(VERSIONED_PT[6], weights_only=True)
    torch.save(content | {"format_version": 7}, tmp_path / "seven.pt")
    del content["model_state_dict"]["flow.couplings.3.net.posemb"]
    torch.save(content, tmp_path / "incomplete.pt")
    out = f"--out={tmp_path}/out"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    big_vision = ["--from=big_vision", "--gin_file=experiments/jet_digits.gin", out]
    for flags, message in (
        (["--from=keras", out], "--from=keras: expected one of big_vision, jet_pytorch, "),
        (["--from=jet_pytorch", "--path=/nowhere.pt", out], "/nowhere.pt"),
        ([*big_vision, "--path=/nowhere.npz"], "/nowhere.npz"),
        (["--from=jet_pytorch", "--hf_repo=people/run", out], "--hf_repo=people/run: "),
        (["--from=jet_pytorch", f"--path={tmp_path}/x.pt", out], "more than tensors"),
        (["--from=ml_tarflow", f"--path={tmp_path}/x.pt", out], "more than tensors"),
        (["--from=ml_tarflow", f"--path={JETFORMER_PT}", out], f"{JETFORMER_PT} is not a state dict"),
        ([*big_vision, f"--path={DIRECTORY}/jet_mixed.npz"], "[12, 12], but Jet needs [4, 4]"),
        (["--from=jet_pytorch", f"--path={jet_file}", f"--out={jetformer}"], f"--out={jetformer}"),
        (["--from=jetformer_pytorch", f"--path={tmp_path}/seven.pt", out], "format_version 7: expected 5, 6 or none"),
        (
            ["--from=jetformer_pytorch", f"--path={tmp_path}/incomplete.pt", out],
            "flow.couplings.3.net.posemb is missing: JetFormer needs it with shape [1, 16, 8]",
        ),
        (["--from=safetensors", f"--path={foreign}", out], "imports __gin__.dynamic_registration"),
        (
            ["--from=jet_pytorch", f"--path={jet_file}", out, *bound(*JET_BINDINGS, *PATCHES)],
            "--from=jet_pytorch needs a Jet, but train.model is a Patchify",
        ),
    ):
        code, log = convert(*flags, environment=offline)
        assert code == 1, flags
        assert log.splitlines()[-1].startswith("error: "), log
        assert "Traceback" not in log
        assert message in log.splitlines()[-1]
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [],
            "expected --from=FORMAT, one of big_vision, jet_pytorch, jetformer_pytorch, ml_tarflow, safetensors, or ",
        ),
        (["--from=jet_pytorch", "--path=x"], "give --out, the workdir to write"),
        (["--from=jet_pytorch", "--path=x", "--out=y", "--yaml=z"], "--yaml does not apply to --from=jet_pytorch"),
        (["--to=safetensors", "--workdir=x"], "give --out, --push_to, or both"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    code, log = convert(*flags)
    assert code == 1
    assert log.splitlines()[-1].startswith(f"error: {message}")
