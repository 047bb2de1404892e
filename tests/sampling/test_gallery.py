"""The files of samples, for labels from an untrusted source."""

import re

import numpy as np
import pytest
from PIL import Image

from jetformer.sampling.gallery import Gallery, border


@pytest.mark.parametrize(
    "label", ["../../outside", "/etc/passwd", "a\x00b\n", "..", "<script>alert(1)</script>", "é" * 300]
)
def test_labels_are_neither_paths_nor_html(tmp_path, label):
    out = tmp_path / "a" / "out"
    gallery = Gallery(out, {"run": "<i>run</i>"})
    gallery.add(label, 0, np.zeros((4, 4, 3), np.uint8), text="<b>bold</b>")
    gallery.finish()
    (record,) = Gallery(out, {"run": "<i>run</i>"}).records
    assert record["prompt"] == label
    assert (out / record["file"]).resolve().parent == (out / "images").resolve()
    files = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {("a", "out")}
    page = (out / "index.html").read_text()
    assert not any(tag in page for tag in ("<script>", "<b>", "<i>"))


def test_labels_have_files_of_their_own(tmp_path):
    gallery = Gallery(tmp_path, {})
    labels = ["a circle", "A circle", "a-circle", "a circle!", "", "-", "a" * 100, "a" * 101]
    for label in labels:
        gallery.add(label, 0, np.zeros((4, 4, 3), np.uint8))
    assert len({record["file"] for record in gallery.records}) == len(labels)


def test_captions_are_beside_their_picture_named_by_its_file(tmp_path):
    gallery = Gallery(tmp_path, {}, key="image")
    for seed in range(2):
        gallery.add("/data/a/beach.png", seed, np.zeros((4, 4, 3), np.uint8), text=f"caption {seed}")
    gallery.finish()
    page = (tmp_path / "index.html").read_text()
    assert re.findall("<h2>(.*)</h2>", page) == ["beach.png"]
    assert re.findall("<blockquote>(.*)</blockquote>", page) == ["caption 0", "caption 1"]
    assert re.findall('alt="(.*?)"', page) == ["beach.png"]  # one picture


def test_originals_come_first_and_the_border_is_drawn_over_pictures_not_into_them(tmp_path):
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    gallery = Gallery(tmp_path, {}, key="image", sampled=mask)
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
    for seed in range(2):
        gallery.add("b.png", seed, images[seed], original=images[2])
    gallery.finish()
    page = (tmp_path / "index.html").read_text()
    files = re.findall('<img src="(.*?)"', page)
    for file, image in zip(files, images[[2, 0, 1]], strict=True):
        with Image.open(tmp_path / file) as saved:
            np.testing.assert_array_equal(np.asarray(saved), image)
    assert re.findall('alt="(.*?)"', page) == ["b.png, original", "b.png, seed 0", "b.png, seed 1"]
    assert page.count('href="#border"') == 3
    assert page.count('viewBox="0 0 6 4"') == 3
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width >= 3 * 128
    alone = Gallery(tmp_path / "alone", {})
    alone.add("b", 0, images[0])
    alone.finish()
    assert "#border" not in (tmp_path / "alone" / "index.html").read_text()


def test_the_border_of_a_mask():
    """It separates each pair of adjacent pixels of which one is under the mask."""
    mask = np.random.default_rng(0).random((5, 7)) < 0.5
    lines = border(mask)
    expected = set()
    for y in range(5):
        for x in range(7):
            if x and mask[y, x] != mask[y, x - 1]:
                expected.add((x, y, x, y + 1))
            if y and mask[y, x] != mask[y - 1, x]:
                expected.add((x, y, x + 1, y))
    assert set(lines) == expected
    assert len(lines) == len(expected)
    assert border(np.arange(4)[:, None] >= [2, 2]) == [(0, 2, 1, 2), (1, 2, 2, 2)]


def test_a_page_is_for_people_with_other_screens_and_tools(tmp_path):
    """Its language, width and pictures are declared; it follows the system's colours."""
    gallery = Gallery(tmp_path, {})
    gallery.add("", 0, np.zeros((4, 4, 3), np.uint8))
    gallery.finish()
    page = (tmp_path / "index.html").read_text()
    for part in ('<html lang="en">', "width=device-width", "prefers-color-scheme: dark", "<main>", "<h1>1 sample</h1>"):
        assert part in page
    assert all(re.findall('alt="(.*?)"', page))
