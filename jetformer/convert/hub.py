"""Files of repositories on the Hugging Face Hub."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from upath import UPath

from jetformer import checkpoint
from jetformer.class_names import CLASSES_FILE

# The HTTP client's own error, which is raised without a network; versions of the library use different clients.
_ClientError = HfHubHTTPError.__bases__[0]


@contextmanager
def _named_errors(flag: str) -> Iterator[None]:
    """Turns errors of the client into a ValueError that names the flag."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError, OSError, RuntimeError, _ClientError) as error:  # RuntimeError: uploads
        raise ValueError(f"{flag}: {error}") from error


def fetch(repo: str, revision: str | None, name: str | None, suffixes: Sequence[str], flag: str) -> str:
    """Downloads a file and returns its local path.

    Args:
      repo: owner/name.
      revision: branch, tag or commit; None: the main branch.
      name: of the file; None: the only file with the first of `suffixes` that any file has.
      suffixes: see `name`.
      flag: that sets `name`, for messages.

    Raises:
      ValueError: if it cannot be downloaded, or several files match.
    """
    with _named_errors(f"--hf_repo={repo}"):
        if name is None:
            files = sorted(HfApi().list_repo_files(repo, revision=revision))
            found = next((f for suffix in suffixes if (f := [x for x in files if x.endswith(suffix)])), [])
            if len(found) != 1:
                has = ", ".join(found or files) or "no files"
                raise ValueError(
                    f"--hf_repo={repo}: expected one file {' or '.join(suffixes)}, found {has}: choose with {flag}"
                )
            (name,) = found
        return hf_hub_download(repo, name, revision=revision)


def fetch_all(repo: str, revision: str | None, patterns: Sequence[str]) -> UPath:
    """Downloads the files that match patterns and returns the local directory; see `fetch`."""
    with _named_errors(f"--hf_repo={repo}"):
        return UPath(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))


def fetch_run(repo: str, revision: str | None, step: int | str | None) -> UPath:
    """Downloads a run and returns its local workdir: configuration, tokenizer, names of classes and one checkpoint, or
    safetensors if the repository has no checkpoint.

    Args:
      repo, revision: see `fetch`.
      step: of the checkpoint, "best", or None for the newest.

    Raises:
      ValueError: if it cannot be downloaded.
    """
    if not isinstance(step, int):
        with _named_errors(f"--hf_repo={repo}"):
            files = [file.split("/") for file in HfApi().list_repo_files(repo, revision=revision)]
        steps = {int(f[1]) for f in files if len(f) == 3 and f[0] == "checkpoints" and f[2] == checkpoint.MARKER}
        if not steps:  # and without safetensors, loading the workdir says so
            return fetch_all(repo, revision, ["*.gin", "*.model", CLASSES_FILE, "*.safetensors"])
        if step == "best":  # 0 for none: loading the workdir says so
            step = checkpoint.best_of(fetch_all(repo, revision, [checkpoint.BEST_FILE]), steps) or 0
        else:
            step = max(steps)
    patterns = ["*.gin", "*.model", CLASSES_FILE, checkpoint.BEST_FILE, f"checkpoints/{step:09d}/*"]
    return fetch_all(repo, revision, patterns)


def push(directory: UPath, repo: str, message: str, private: bool) -> None:
    """Uploads a directory to a repository, which is created if it does not exist.

    Raises:
      ValueError: if the upload fails.
    """
    with _named_errors(f"--push_to={repo}"):
        api = HfApi()
        api.create_repo(repo, exist_ok=True, private=private)
        api.upload_folder(repo_id=repo, folder_path=str(directory), commit_message=message)
