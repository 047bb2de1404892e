import os

# Of several workers each has a core (`pytest -n`): with more threads than that they wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import jetformer  # noqa: F401  (before any test imports TensorFlow)


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws from PyTorch's global generator is the same in each run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where this test run prepares datasets, once: never ~/tensorflow_datasets."""
    return tmp_path_factory.mktemp("tensorflow_datasets")


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
    """Part of the dataset `shapes`, 40 scenes of each split; not in `data_dir`, where it would be taken for all."""
    import tensorflow_datasets as tfds

    from jetformer.data import sources

    directory = str(tmp_path_factory.mktemp("some_shapes"))
    few = tfds.download.DownloadConfig(max_examples_per_split=40)
    sources.builder("shapes", directory).download_and_prepare(download_config=few)
    return directory
