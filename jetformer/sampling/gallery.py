"""Writes samples: PNGs, a line of JSON for each, a grid, and a page to browse them.

    <out>/images/a-red-circle_0003.png  …  samples.jsonl  grid.png  index.html

Texts without images have the lines and the page only. Completed and inpainted images are beside their originals. A
sample counts once its line is written, so an interrupted program resumes.
"""

import hashlib
import itertools
import json
import pathlib
import re
import textwrap
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jetformer.data.pictures import decode_picture
from jetformer.sampling.grid import save_png

RECORDS_FILE, GRID_FILE, PAGE_FILE = "samples.jsonl", "grid.png", "index.html"

_TILE = 128  # minimum width of an image in the grid, in pixels
_GAP, _LINE = 4, 16
_MAX_ROWS, _MAX_COLUMNS = 40, 20

_UNITS = {
    "bits_per_dim": "bits per dim",
    "noisy_bits_per_dim": "bits per dim, of the noisy image",
    "bits_per_token": "bits per token",
}
_BORDER = "#e0006c"  # in the grid


def slug(label: str) -> str:
    """Returns a readable part of a file name, unique for each label."""
    words = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:80]
    if words.replace("-", " ") == label:
        return words
    return f"{words}-{hashlib.sha256(label.encode()).hexdigest()[:8]}".lstrip("-")


class Gallery:
    """Samples in a directory, in rows by label.

    Args:
      directory: created if it does not exist.
      settings: common to all samples, and part of each record.
      key: name of the label in records: "prompt", or "image" if labels are paths of images.
      sampled: bool `[H, W]`, the pixels that are sampled, if others are given: grid and page show the border.

    Raises:
      ValueError: if the directory holds samples with other settings.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        settings: dict[str, Any],
        key: str = "prompt",
        sampled: np.ndarray | None = None,
    ):
        self._directory, self._settings, self._key, self._sampled = directory, settings, key, sampled
        directory.mkdir(parents=True, exist_ok=True)
        self._file = directory / RECORDS_FILE
        self.records: list[dict[str, Any]] = []
        text = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        # The last line may be incomplete; its sample is drawn again.
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._file.write_text(whole, encoding="utf-8")
        for line in whole.split("\n")[:-1]:
            record = json.loads(line)
            for name, value in settings.items():
                if record.get(name) != value:
                    raise ValueError(
                        f"{directory} holds samples with {name} {record.get(name)}, not {value}: use another --out"
                    )
            self.records.append(record)
        self._done = {(record[key], record["seed"]): record for record in self.records}

    def has(self, label: str, seed: int, **known: Any) -> bool:
        """Returns whether a sample exists.

        Raises:
          ValueError: if its record has another value for one in `known`.
        """
        record = self._done.get((label, seed))
        for name, value in known.items():
            if record is not None and record.get(name) != value:
                raise ValueError(
                    f"{self._directory} holds a sample of another {label}, with {name} {record.get(name)}, not "
                    f"{value}: use another --out"
                )
        return record is not None

    def add(
        self,
        label: str,
        seed: int,
        image: np.ndarray | None = None,
        original: np.ndarray | None = None,
        **known: Any,
    ) -> None:
        """Adds a sample: its image and the one it was made from, uint8 `[H, W, C]`, if any, and further values of its
        record."""
        record = {self._key: label, "seed": seed, **known, **self._settings}
        for name, picture, suffix in (("file", image, f"{seed:04d}"), ("original", original, "original")):
            if picture is not None:
                record[name] = f"images/{slug(label)}_{suffix}.png"
                path = self._directory / record[name]
                path.parent.mkdir(exist_ok=True)
                save_png(picture, path)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.records.append(record)
        self._done[label, seed] = record

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Returns records by label, ordered by seed."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for record in self.records:
            rows.setdefault(record[self._key], []).append(record)
        return {label: sorted(row, key=lambda record: record["seed"]) for label, row in rows.items()}

    def finish(self) -> None:
        """Writes the page of all samples, and the grid of the first rows and columns."""
        rows = self.rows()
        (self._directory / PAGE_FILE).write_text(self._page(rows), encoding="utf-8")
        if "file" in self.records[0]:
            rows = dict(itertools.islice(rows.items(), _MAX_ROWS))
            with (self._directory / GRID_FILE).open("wb") as file:
                self._grid(rows).save(file, "PNG")

    def _grid(self, rows: dict[str, list[dict[str, Any]]]) -> Image.Image:
        """Draws a row of images for each label, under the label."""
        images = {label: self._tiles(row) for label, row in rows.items()}
        width, height = next(iter(images.values()))[0].size
        columns = max(map(len, images.values()))
        font = ImageFont.load_default()
        per_line = max(20, columns * (width + _GAP) // 7)
        captions = {label: _wrapped(_caption(self._name(label), row), per_line) for label, row in rows.items()}
        total = sum(len(lines) * _LINE + height + 2 * _GAP for lines in captions.values())
        grid = Image.new("RGB", (max(columns * (width + _GAP) + _GAP, 160), total), "white")
        draw = ImageDraw.Draw(grid)
        y = _GAP
        for label, lines in captions.items():
            for line in lines:
                draw.text((_GAP, y), line, fill="black", font=font)
                y += _LINE
            for i, image in enumerate(images[label]):
                grid.paste(image, (_GAP + i * (width + _GAP), y))
            y += height + 2 * _GAP
        return grid

    def _tiles(self, row: list[dict[str, Any]]) -> list[Image.Image]:
        """Returns the original, if there is one, and samples, enlarged, with the border of the sampled pixels."""
        files = [row[0]["original"]] if "original" in row[0] else []
        tiles = []
        for file in [*files, *(record["file"] for record in row)][:_MAX_COLUMNS]:
            image = Image.fromarray(decode_picture((self._directory / file).read_bytes()))
            factor = max(1, _TILE // image.width)
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
            if self._sampled is not None:
                draw = ImageDraw.Draw(image)
                for segment in border(self._sampled):
                    draw.line([factor * x for x in segment], fill=_BORDER, width=2)
            tiles.append(image)
        return tiles

    def _name(self, label: str) -> str:
        """Returns the name of a row: of images their file's."""
        return (label.rpartition("/")[2] if self._key == "image" else label) or "(no prompt)"

    def _page(self, rows: dict[str, list[dict[str, Any]]]) -> str:
        loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
        environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
        count = len(self.records)
        title = f"{count:,} sample{'s' if count > 1 else ''}"
        content = {"title": title, "settings": self._settings, "rows": rows, "name_of": self._name}
        if self._sampled is not None:
            height, width = self._sampled.shape
            lines = "".join(f"M{x} {y}L{x_end} {y_end}" for x, y, x_end, y_end in border(self._sampled))
            content |= {"height": height, "width": width, "border": lines}
        return environment.get_template("gallery.html.j2").render(**content, units=_UNITS)


def border(mask: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Returns the lines between pixels under a mask bool `[H, W]` and others: ends x, y, x, y of each, in pixels."""
    lines = [(x, y + 1, x + 1, y + 1) for y, x in np.argwhere(mask[1:] != mask[:-1]).tolist()]
    return lines + [(x + 1, y, x + 1, y + 1) for y, x in np.argwhere(mask[:, 1:] != mask[:, :-1]).tolist()]


def _caption(name: str, row: list[dict[str, Any]]) -> str:
    return " / ".join([name, *(record["text"] for record in row if "text" in record)])


def _wrapped(text: str, width: int) -> list[str]:
    """Returns lines of at most `width` characters, which PIL's font can draw."""
    return textwrap.wrap(text.encode("latin-1", "replace").decode("latin-1"), width) or [""]
