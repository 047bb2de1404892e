import pytest


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where this test run prepares data sets, once: never ~/tensorflow_datasets."""
    return tmp_path_factory.mktemp("tensorflow_datasets")
