"""The documents: every block of commands or code runs, and every link and every file they name exists.

An HTML comment above a block says how it runs. What the blocks of a page do is one session, in their order, in the
repository's root, with /tmp and /data elsewhere.

    <!-- run -->                              run the block
    <!-- run: PROGRAM ARGS... -->             from here on to the end of the page add ARGS to each call of PROGRAM,
                                              such as jetformer.main; several programs stand on lines of their own
    <!-- run: with NAME=VALUE -->             from here on to the end of the page set an environment variable
    <!-- run: on experiments/digits.gin -->   of a block of gin: parse it on top of this experiment
    <!-- run: write /tmp/FILE -->             write the block to this file
    <!-- not run: REASON -->

`python` is the interpreter of the tests, which starts programs from a process that has imported the large packages;
`pip` does nothing, since the packages are there.
"""

import dataclasses
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from runs import preloaded

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "experiments/README.md"]
BLOCK = re.compile(
    r"(?:^<!--\s*(?P<marker>(?:run|not run)\b.*?)\s*-->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
LANGUAGES = ("bash", "python", "gin")  # of what is run
SETTING = re.compile(
    r"with (?P<name>\w+)=(?P<value>\S*)|on (?P<on>\S+)|write (?P<write>\S+)|(?P<program>\w[\w.]*) (?P<args>.*)", re.S
)

identify = lambda path: path.relative_to(ROOT).as_posix()


@dataclasses.dataclass
class Block:
    """A block of a page: where it is, its language, its text, and the comment above it."""

    line: int
    language: str
    text: str
    marker: str | None

    @property
    def settings(self) -> list[re.Match]:
        lines = (self.marker or "").removeprefix("run").removeprefix(":").strip().splitlines()
        return [SETTING.fullmatch(line.strip()) for line in lines]


def blocks(page: pathlib.Path) -> list[Block]:
    """All blocks of a page that are of a language that can be run."""
    text = page.read_text()
    found = [
        Block(text.count("\n", 0, match.start("text")), match["language"], match["text"], match["marker"])
        for match in BLOCK.finditer(text)
    ]
    return [block for block in found if block.language in LANGUAGES]


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_every_block_says_how_it_runs_or_why_not(page):
    for block in blocks(page):
        assert block.marker, f"{page}:{block.line}: no comment 'run' or 'not run: …' above this block"
        if block.marker.startswith("not run"):
            assert re.fullmatch(r"not run: .+", block.marker, re.S), f"{page}:{block.line}: no reason"
        else:
            assert re.fullmatch(r"run(:\s.+)?", block.marker, re.S), f"{page}:{block.line}: {block.marker}"
            assert all(block.settings), f"{page}:{block.line}: {block.marker}"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A directory with `python` and `pip`, to put on the PATH."""
    directory = tmp_path_factory.mktemp("programs")
    start = " ".join(preloaded([sys.executable]))
    python = f"""#!/usr/bin/env bash
extra=()
[[ $1 != -m || ! -e $SETTINGS/$2 ]] || mapfile -t extra <"$SETTINGS/$2"
case "$1 $2" in
  "-m jetformer"* | "$SETTINGS"/*) exec {start} "$@" "${{extra[@]}}" ;;
  *) exec {sys.executable} "$@" "${{extra[@]}}" ;;
esac
"""
    for name, text in {"python": python, "pip": "#!/bin/sh\n"}.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    return directory


def photographs(directory: pathlib.Path) -> None:
    """Two classes of images to train on, and to validate with."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("daisy", "tulip"):
            (directory / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = generator.integers(256, size=(40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(directory / split / label / f"{i}.png")


def script(page: pathlib.Path, directory: pathlib.Path) -> str:
    """A page's blocks as one program for bash, whose files go to `directory`."""
    elsewhere = lambda text: re.sub(r"(?<![\w.])/(tmp|data)\b", lambda match: f"{directory}/{match[1]}", text)
    lines = ["set -euo pipefail"]
    settings = directory / "settings"
    settings.mkdir()
    for block in blocks(page):
        if block.marker.startswith("not run"):
            continue
        file = settings / f"line_{block.line}.{block.language}"
        file.write_text(elsewhere(block.text))
        do = f"{'source' if block.language == 'bash' else 'python'} {file}"
        lines.append(f"echo '>>> {page.name}, line {block.line}'")
        for setting in block.settings:
            if setting["name"]:
                lines.append(f"export {setting['name']}={setting['value']}")
            elif setting["program"]:
                args = map(shlex.quote, shlex.split(setting["args"]))
                lines.append(f"printf '%s\\n' {' '.join(args)} >{settings / setting['program']}")
            elif setting["write"]:
                do = f"cp {file} {elsewhere(setting['write'])}"
            else:
                parse = settings / f"parse_line_{block.line}.py"
                parse.write_text(
                    f"from jetformer import config, experiment\nconfig.parse({[setting['on'], str(file)]}, [])\n"
                )
                do = f"python {parse}"
        lines.append(do)
    return "\n".join(lines)


RUN = [page for page in PAGES if any(block.marker and block.marker.startswith("run") for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=identify)
def test_the_blocks_of_a_page_run(page, tmp_path, programs, shapes_dir):
    (tmp_path / "tmp").mkdir()
    photographs(tmp_path / "data" / "flowers")
    environ = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": str(programs / "python"),
        "SETTINGS": str(tmp_path / "settings"),
        "TFDS_DATA_DIR": shapes_dir,
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    text = script(page, tmp_path)
    with (tmp_path / "log").open("w") as log:
        code = subprocess.run(["bash", "-c", text], cwd=ROOT, env=environ, stdout=log, stderr=log).returncode
    assert code == 0, f"{page}: " + (tmp_path / "log").read_text()[-4000:]


# What documents name


def anchors(document: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=identify)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document}: {link}"
        assert not anchor or anchor in anchors(target), f"{document}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=identify)
def test_files_exist_that_are_named(document):
    """Paths below the repository's directories, also as patterns; and experiments by their names alone."""
    text = document.read_text()
    paths = re.findall(r"(?<![\w./…])((?:docs|experiments|jetformer|launch|tests|\.ci)/[\w./*-]*\w)", text)
    names = set(re.findall(r"`(\w+\.gin)`", text)) - {"config.gin", "operative_config.gin", "my_experiment.gin"}
    paths += [f"experiments/{name}" for name in names]
    for path in paths:
        assert any(ROOT.glob(path)), f"{document}: {path}"


def test_the_map_of_the_code_names_files_that_exist():
    (text,) = re.findall(r"^## Map of the code\n+```text\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    files = {
        path.name for directory in ("jetformer", "experiments", "launch") for path in (ROOT / directory).rglob("*.*")
    }
    files |= {path.name for path in ROOT.glob("*.*")}
    for name in re.findall(r"\w+\.(?:py|sh|bash|slurm|md)\b", text):
        assert name in files, name
    for name in re.findall(r"^ *(\w+)/ ", text, re.M):
        assert (ROOT / name).is_dir() or (ROOT / "jetformer" / name).is_dir(), name
