"""Measures the input pipeline on images that it makes; results are in experiments/README.md.

    python experiments/data_rate.py --dir=/tmp/data_rate

- `png`: a TFDS dataset of 32 × 32 PNGs, flipped and not resized;
- `jpeg`: one of 500 × 375 JPEGs to 256 pixels by resize_small and central_crop, in turn with
  `tf.io.decode_and_crop_jpeg` and one resize of the same records;
- `folder`: starting on a folder of 100,000 images, the first and the second time;
- `resume`: the first batch of step 100,000 of a dataset of a million examples.

Each prints wall-clock time and CPU time. On a busy machine, examples per two CPU seconds estimate what two free cores
would do.
"""

import io
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import app, flags
from PIL import Image

from jetformer.data.dataset import Data

flags.DEFINE_string("dir", None, "Where the data are made, once.", required=True)
flags.DEFINE_list("what", ["png", "jpeg", "folder", "resume"], "What to measure.")
flags.DEFINE_integer("rounds", 5, "How often; the median counts.")
FLAGS = flags.FLAGS

_PNGS, _JPEGS, _FILES, _MANY = 20_000, 1000, 100_000, 1_000_000
_BATCH = 256


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Blurred blocks with some noise, which compress as photographs do."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 8, (height, width, 3))
    return Image.fromarray((np.asarray(blocks) + noise).clip(0, 255).astype(np.uint8))


def encoded(seed: int, height: int, width: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture(seed, height, width).save(buffer, kind)
    return buffer.getvalue()


with tfds.core.registered.skip_registration():

    class Rate(tfds.core.GeneratorBasedBuilder):
        """Images, some of them many times."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("png", "jpeg", "many")]  # noqa: RUF012

        def _info(self):
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=10)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(self.builder_config.name)}

        def _generate_examples(self, name):
            count, size, kind = {
                "png": (_PNGS, (32, 32), "PNG"),
                "jpeg": (_JPEGS, (375, 500), "JPEG"),
                "many": (_MANY, (4, 4), "PNG"),
            }[name]
            images = [encoded(i, *size, kind) for i in range(min(count, 2000))]
            for i in range(count):
                yield i, {"image": io.BytesIO(images[i % len(images)]), "label": i % 10}


def prepare(name: str) -> str:
    Rate(config=name, data_dir=FLAGS.dir).download_and_prepare()
    return f"rate/{name}"


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(batches, count: int, batch_size: int) -> tuple[float, float]:
    """Examples a second, and a two processor seconds."""
    wall, processor = time.perf_counter(), processor_seconds()
    for _ in range(count):
        next(batches)
    examples = count * batch_size
    return examples / (time.perf_counter() - wall), 2 * examples / (processor_seconds() - processor)


def show(what: str, found: list[tuple[float, float]]) -> np.ndarray:
    wall, processor = np.median(found, axis=0)
    print(f"{what}: {wall:,.0f} examples/s, {processor:,.0f} in 2 processor seconds", flush=True)
    return np.array(found)


def png() -> None:
    pp = "decode | flip_lr | label_as_text | keep('image', 'text', 'text_mask', 'text_loss')"
    batches = Data(prepare("png"), pp, data_dir=FLAGS.dir).train_batches(batch_size=_BATCH, seed=0)
    measure(batches, 20, _BATCH)
    show("32 × 32 PNG, flipped", [measure(batches, 100, _BATCH) for _ in range(FLAGS.rounds)])


def jpeg() -> None:
    name = prepare("jpeg")
    pp = "decode | resize_small(256) | central_crop(256) | keep('image', 'label')"
    ours = Data(name, pp, shuffle_buffer_size=256, data_dir=FLAGS.dir).train_batches(batch_size=32, seed=0)
    builder = tfds.builder(name, data_dir=FLAGS.dir)
    files = [str(path) for path in builder.info.splits["train"].filepaths]

    def alone(record):
        example = tf.io.parse_single_example(record, {"image": tf.io.FixedLenFeature([], tf.string)})
        image = tf.io.decode_and_crop_jpeg(example["image"], [0, 62, 375, 375])
        return tf.cast(tf.image.resize(image, (256, 256), method="area"), tf.uint8)

    ds = tf.data.TFRecordDataset(files).repeat().map(alone, tf.data.AUTOTUNE).batch(32).prefetch(2)
    baseline = ds.as_numpy_iterator()
    for batches in (ours, baseline):
        measure(batches, 10, 32)
    pairs = [(measure(ours, 20, 32), measure(baseline, 20, 32)) for _ in range(FLAGS.rounds)]
    a = show("500 × 375 JPEG, resize_small(256) | central_crop(256)", [pair[0] for pair in pairs])
    b = show("the same by decode_and_crop_jpeg and resize alone", [pair[1] for pair in pairs])
    wall, processor = np.median(a / b, axis=0)
    print(f"share: {wall:.2f} of the wall clock's rate, {processor:.2f} of the processor's")


def folder() -> None:
    root = pathlib.Path(FLAGS.dir) / "folder"
    if not root.exists():
        image = encoded(0, 8, 8, "PNG")
        for i in range(_FILES):
            path = root / f"train/{i % 100:02d}/{i:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        time.sleep(3)  # a directory that has just changed is listed again
    for file in (pathlib.Path(FLAGS.dir) / "data/folder").glob("*.npz"):
        file.unlink()
    for what in ("first", "second"):
        start = (
            "import time; s = time.perf_counter(); p = time.process_time();"
            f"d = dataset.Data('folder:{root}', 'decode|keep(\"image\")', eval_split='train', "
            f"data_dir='{FLAGS.dir}/data');"
            f"d.prepare(); assert d.num_train_examples() == {_FILES};"
            "b = d.train_batches(batch_size=256, seed=0); t = time.perf_counter(); q = time.process_time();"
            "next(b); u = time.perf_counter();"
            "print(f'{t - s:.2f} s ({q - p:.2f} of the processor), first batch {u - t:.2f} s later')"
        )
        command = [sys.executable, "-c", f"from jetformer.data import dataset, pipeline; {start}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"{_FILES:,} files, the {what} time: {found.stdout.strip()}", flush=True)


def resume() -> None:
    name = prepare("many")
    start, processor = time.perf_counter(), processor_seconds()
    data = Data(name, "decode | flip_lr | keep('image', 'label')", data_dir=FLAGS.dir)
    batches = data.train_batches(batch_size=256, seed=0, start_step=100_000)
    next(batches)
    print(
        f"step 100,000 of {_MANY:,} examples: first batch after {time.perf_counter() - start:.1f} s, "
        f"{processor_seconds() - processor:.1f} s of the processor"
    )


def main(argv: list[str]) -> None:
    del argv
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for what in FLAGS.what:
        {"png": png, "jpeg": jpeg, "folder": folder, "resume": resume}[what]()
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    app.run(main)
