"""Files of repositories on the Hugging Face Hub."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from upath import UPath


@contextmanager
def plain_errors(flag: str) -> Iterator[None]:
    """Turns what the client raises into a ValueError that names the flag."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Where there is no network, what the HTTP client raises, of which versions of the library have different ones.
    client_error = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (HfHubHTTPError, HFValidationError, OSError, RuntimeError, client_error) as error:  # RuntimeError: uploads
        raise ValueError(f"{flag}: {error}") from error


def fetch(repo: str, revision: str | None, name: str | None, suffixes: Sequence[str], flag: str) -> str:
    """Downloads a file.

    Args:
      repo: owner/name.
      revision: a branch, tag or commit; None: the main branch.
      name: of the file; None: the only one with one of `suffixes`.
      suffixes: those of the first count before those of the next.
      flag: that says which file, for messages.

    Returns:
      Where it is.

    Raises:
      ValueError: if it cannot be had.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with plain_errors(f"--hf_repo={repo}"):
        if name is None:
            files = sorted(HfApi().list_repo_files(repo, revision=revision))
            found = next((f for suffix in suffixes if (f := [x for x in files if x.endswith(suffix)])), [])
            if len(found) != 1:
                has = f"has several: {', '.join(found)}" if found else f"has none, but {', '.join(files) or 'no files'}"
                raise ValueError(f"of files {' or '.join(suffixes)} it {has}; say which with {flag}")
            (name,) = found
        return hf_hub_download(repo, name, revision=revision)


def fetch_all(repo: str, revision: str | None, patterns: Sequence[str]) -> UPath:
    """Downloads the files that match patterns, and returns the directory where they are; see `fetch`."""
    from huggingface_hub import snapshot_download

    with plain_errors(f"--hf_repo={repo}"):
        return UPath(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))


def push(directory: UPath, repo: str, message: str, private: bool) -> None:
    """Uploads a directory, to a repository that is made where there is none.

    Raises:
      ValueError: if it cannot be done.
    """
    from huggingface_hub import HfApi

    with plain_errors(f"--push_to={repo}"):
        api = HfApi()
        api.create_repo(repo, exist_ok=True, private=private)
        api.upload_folder(repo_id=repo, folder_path=str(directory), commit_message=message)
