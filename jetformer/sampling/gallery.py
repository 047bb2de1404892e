"""Writes samples: PNGs, a line of JSON for each, a grid, and a page to browse them.

    <out>/images/a-red-circle_0003.png  …  samples.jsonl  grid.png  index.html

Texts without images have the lines and the page only. A sample counts once its line is written, so an interrupted
program resumes.
"""

import hashlib
import html
import itertools
import json
import pathlib
import re
import textwrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jetformer.data.pictures import decode_picture
from jetformer.sampling.grid import save_png

RECORDS_FILE, GRID_FILE, PAGE_FILE = "samples.jsonl", "grid.png", "index.html"

_TILE = 128  # minimum width of an image in the grid, in pixels
_GAP, _LINE = 4, 16
_MAX_ROWS, _MAX_COLUMNS = 40, 20

_UNITS = {"bits_per_dim": "bits per dim", "bits_per_token": "bits per token"}

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
h2 { font-size: 1rem; margin: 1.5rem 0 .5rem }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; color: #555 }
dd { margin: 0 }
.row { display: flex; flex-wrap: wrap; gap: .5rem }
figure { margin: 0; width: 144px }
figure.text { width: 30rem }
img { width: 144px; image-rendering: pixelated; display: block }
figcaption { font-size: .75rem; color: #555 }
"""


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
      key: name of the label in records, as "prompt".

    Raises:
      ValueError: if the directory holds samples with other settings.
    """

    def __init__(self, directory: pathlib.Path, settings: dict[str, Any], key: str = "prompt"):
        self._directory, self._settings, self._key = directory, settings, key
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

    def add(self, label: str, seed: int, image: np.ndarray | None = None, **known: Any) -> None:
        """Adds a sample: its image uint8 `[H, W, C]`, if any, and further values of its record."""
        record = {self._key: label, "seed": seed, **known, **self._settings}
        if image is not None:
            record["file"] = f"images/{slug(label)}_{seed:04d}.png"
            path = self._directory / record["file"]
            path.parent.mkdir(exist_ok=True)
            save_png(image, path)
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
            rows = {label: row[:_MAX_COLUMNS] for label, row in itertools.islice(rows.items(), _MAX_ROWS)}
            with (self._directory / GRID_FILE).open("wb") as file:
                self._grid(rows).save(file, "PNG")

    def _grid(self, rows: dict[str, list[dict[str, Any]]]) -> Image.Image:
        """Draws a row of images for each label, under the label."""
        images = {label: [self._tile(record) for record in row] for label, row in rows.items()}
        width, height = next(iter(images.values()))[0].size
        columns = max(map(len, images.values()))
        font = ImageFont.load_default()
        per_line = max(20, columns * (width + _GAP) // 7)
        captions = {label: _wrapped(_caption(label, row), per_line) for label, row in rows.items()}
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

    def _tile(self, record: dict[str, Any]) -> Image.Image:
        with (self._directory / record["file"]).open("rb") as file:
            image = Image.fromarray(decode_picture(file.read()))
        factor = max(1, _TILE // image.width)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)

    def _page(self, rows: dict[str, list[dict[str, Any]]]) -> str:
        escape = lambda x: html.escape(str(x))
        settings = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in self._settings.items())
        parts = []
        for label, row in rows.items():
            tiles = []
            for record in row:
                known = [f"seed {record['seed']}"]
                known += [f"{record[unit]:.3f} {name}" for unit, name in _UNITS.items() if unit in record]
                known += [record["text"]] if "text" in record else []
                caption = f"<figcaption>{'<br>'.join(map(escape, known))}</figcaption>"
                if "file" in record:
                    file = escape(record["file"])
                    picture = f'<a href="{file}"><img src="{file}" alt="{escape(label)}"></a>'
                    tiles.append(f"<figure>{picture}{caption}</figure>")
                else:
                    tiles.append(f'<figure class="text">{caption}</figure>')
            heading = escape(label) or "(no prompt)"
            parts.append(f'<h2>{heading}</h2>\n<div class="row">\n' + "\n".join(tiles) + "\n</div>")
        return (
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Samples</title>\n'
            f"<style>{_STYLE}</style>\n<h1>{len(self.records)} samples</h1>\n<dl>{settings}</dl>\n"
            + "\n".join(parts)
            + "\n</html>\n"
        )


def _caption(label: str, row: list[dict[str, Any]]) -> str:
    return " / ".join([label, *(record["text"] for record in row if "text" in record)])


def _wrapped(text: str, width: int) -> list[str]:
    """Returns lines of at most `width` characters, which PIL's font can draw."""
    return textwrap.wrap(text.encode("latin-1", "replace").decode("latin-1"), width) or [""]
