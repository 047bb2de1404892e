"""The wheel, built from the source distribution and installed, works without the repository."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv

import pytest

from jetformer.report import page, read

pytest.importorskip("setuptools")

ROOT = pathlib.Path(__file__).parent.parent
ENVIRON = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
# Lists the packages of this environment after those of its own, where jetformer is.
BORROW = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})"


def build(kind: str, source: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Builds `kind`, "sdist" or "wheel", from a directory; returns the file."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    ended = subprocess.run([sys.executable, "-c", code], check=True, cwd=source, capture_output=True, text=True)
    return out / ended.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The directory of an environment's programs."""
    directory = tmp_path_factory.mktemp("install")
    clone = directory / "clone"
    for name in ("jetformer", "experiments"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    with tarfile.open(build("sdist", clone, directory)) as archive:
        archive.extractall(directory / "source", filter="data")
    (source,) = (directory / "source").iterdir()
    wheel = build("wheel", source, directory)
    venv.create(directory / "environment", with_pip=False)
    programs = directory / "environment" / "bin"
    install = [
        sys.executable,
        "-m",
        "pip",
        "-q",
        "--python",
        str(programs / "python"),
        "install",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, str(wheel)], check=True, env=ENVIRON)
    (site,) = (directory / "environment" / "lib").glob("python3*/site-packages")
    (site / "borrowed.pth").write_text(BORROW)
    return programs


def run(cwd, *args) -> None:
    ended = subprocess.run(args, cwd=cwd, env=ENVIRON, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.slow
def test_an_experiment_by_name(installed, tmp_path, data_dir):
    """It trains, and its pages have their templates, styles and scripts."""
    gin = [
        "TOTAL_STEPS = 1",
        "BATCH_SIZE = 4",
        "Jet.depth = 1",
        "train.evaluators = {}",
        f'Data.data_dir = "{data_dir}"',
    ]
    flags = ["--gin_file=digits.gin", "--workdir=run", "--device=cpu", *(f"--gin_bindings={line}" for line in gin)]
    run(tmp_path, installed / "jetformer", "train", *flags)
    workdir = tmp_path / "run"
    run(tmp_path, installed / "jetformer", "report", f"--workdir={workdir}")
    assert (workdir / "report.html").read_text(encoding="utf-8") == page.run_page(read.read_run(workdir))
    code = (
        "import pathlib; from jetformer.sampling.gallery import Gallery; "
        "gallery = Gallery(pathlib.Path('samples'), {}); gallery.add('a', 0, text='b'); gallery.finish()"
    )
    run(tmp_path, installed / "python", "-c", code)
    assert "prefers-color-scheme" in (tmp_path / "samples" / "index.html").read_text()


@pytest.mark.slow
def test_it_is_not_the_clone(installed, tmp_path):
    """The package and the files that experiments name are the environment's."""
    code = (
        "import sys, pathlib, jetformer; from jetformer.storage import find; "
        "assert pathlib.Path(jetformer.__file__).is_relative_to(sys.prefix); "
        "assert find('experiments/shapes.model').is_relative_to(sys.prefix); "
        "assert find('shapes_pca.npz').exists()"
    )
    run(tmp_path, installed / "python", "-c", code)
