"""The files of samples, for labels from an untrusted source."""

import numpy as np
import pytest

from jetformer.sampling.gallery import Gallery


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
