"""Save, restore and follow the checkpoints of a run.

    <workdir>/checkpoints/000012000/.metadata  __0_0.distcp  __1_0.distcp  …  COMPLETE

- torch.distributed.checkpoint (DCP) writes the files, every process its share, in a background
  thread and from a copy of the state, so training goes on meanwhile.
- `COMPLETE` is written last, by process 0, once all processes have finished. A directory without it
  is no checkpoint: whatever kills a run, what it leaves is whole or does not count. (A marker, not
  a renamed directory: object stores cannot rename one atomically.) Deleting starts with it.
- `COMPLETE` holds the size of every file, so a checkpoint that a disk or a copy has cut short is
  told from a whole one, and its XXH3 checksum, so a flipped bit is found. (Older checkpoints have
  no checksums.)
- best.json in the workdir ranks evaluated steps, see `evaluators.best`: the checkpoint of the first
  that is complete is the best one, and is not deleted.
- Nothing is unpickled but DCP's own metadata and what `torch.load(weights_only=True)` loads.
- A workdir is a local directory or any URL that fsspec opens (gs://…).
"""

import copy
import json
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, set_element
from torch.distributed.checkpoint.metadata import StorageMeta
from upath import UPath

__all__ = [
    *("Checkpointer", "age", "best", "check_compatible", "latest", "load_weights", "parts", "ranked", "restore"),
    *("split_path", "steps", "verify", "verify_checksums"),
]

MARKER = "COMPLETE"
BEST_FILE = "best.json"  # in the workdir
_CHUNK = 1 << 24  # bytes


class Checkpointer:
    """Saves the checkpoints of a run, one at a time, in the background.

    Of the complete checkpoints in `workdir` it keeps the newest `keep_last`, the best one, and those
    of every step that `keep_every` divides. With torch.distributed initialised every process makes one,
    calls `save` for the same steps with its part of the state, and `wait` before it ends. A
    `process_group` must have a CPU backend and no other use; without one it makes its own.
    `snapshot` copies a state to the CPU, and `planner` makes the planner that understands the copy;
    without them what DCP knows itself: tensors, DTensors and plain values.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep_last: int = 1,
        keep_every: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        snapshot: Callable[[Any], Any] | None = None,
        planner: Callable[[], dcp.SavePlanner] | None = None,
    ):
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; it must be 1 or more")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every is {keep_every}; it must be 1 or more steps, or None")
        if process_group is None and dist.is_available() and dist.is_initialized():
            # The background thread's collectives must not interleave with those of training.
            process_group = dist.new_group(backend="gloo")
        self._workdir = workdir
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._process_group = process_group
        self._snapshot = snapshot or _snapshot
        self._planner = planner or dcp.DefaultSavePlanner
        self._pending: Future | None = None
        self._saving = ""  # where to

    def save(self, step: int, state: dict[str, Any], *, info: dict[str, Any] | None = None) -> None:
        """Starts to save `state` as the checkpoint of `step`; returns once the values are copied.

        `state` is a dict, nested with string keys, of tensors (DTensors too) and plain Python
        values. `info` is a small dict kept in the marker, from where `verify` returns it. Waits for
        the previous save first, and raises what that raised.
        """
        self.wait()
        fs, root = _open(self._workdir)
        directory = _directory(root, step)
        if fs.exists(f"{directory}/{MARKER}"):
            raise ValueError(
                f"there is a complete checkpoint of step {step} already; delete "
                f"{_name(fs, directory)} to save this step again"
            )
        record = {"step": step, "torch": torch.__version__, "info": info or {}}
        json.dumps(record)  # an `info` that JSON cannot hold fails here, not in the background

        def finish(results):
            _commit(fs, directory, record, results)
            _prune(fs, root, step, self._keep_last, self._keep_every)

        _quiet()
        self._saving = _name(fs, directory)
        with _plain_errors():
            self._pending = dcp.async_save(
                state,
                storage_writer=_writer(fs, directory, finish, self._snapshot),
                planner=self._planner(),
                process_group=self._process_group,
            )

    def wait(self) -> None:
        """Blocks until the last save is complete on all processes, and raises what it raised.

        Raises:
          OSError: if the place cannot be written to (a full disk, a quota); complete checkpoints are as they were.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                with _plain_errors():
                    pending.result()
            except OSError as error:
                raise OSError(
                    f"the checkpoint in {self._saving} is not saved, complete ones are as they were: {error}"
                ) from error


def steps(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps of the complete checkpoints, in ascending order."""
    fs, root = _open(workdir)
    return _complete(fs, root, _listed(fs, root))


def split_path(path: str) -> tuple[UPath, int | None]:
    """Splits the path of a checkpoint, WORKDIR/checkpoints/NUMBER, into workdir and step. Another path is returned as
    the workdir, with None."""
    directory = UPath(path.rstrip("/"))
    if directory.name.isdigit() and directory.parent.name == "checkpoints":
        return directory.parent.parent, int(directory.name)
    return directory, None


def latest(workdir: str | os.PathLike) -> int | None:
    """Returns the step of the newest complete checkpoint; None where there is none."""
    return max(steps(workdir), default=None)


def ranked(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps that best.json ranks, the best first, whether their checkpoints are there or not.

    Raises:
      ValueError: if the file is damaged.
    """
    fs, root = _open(workdir)
    return _ranked(fs, root)


def best(workdir: str | os.PathLike) -> int:
    """Returns the step of the best complete checkpoint.

    Raises:
      ValueError: if there is none.
    """
    complete = steps(workdir)
    step = next((step for step in ranked(workdir) if step in complete), None)
    if step is None:
        raise ValueError(
            f"{workdir} has no best checkpoint: its {BEST_FILE} names none of the steps {complete}; evaluate them with "
            'train.keep_best bound to a metric, as "val/bits_per_dim"'
        )
    return step


def age(workdir: str | os.PathLike, step: int) -> float:
    """For how many seconds, by this machine's clock, a checkpoint has been complete.

    Raises:
      OSError: if it is not.
    """
    fs, root = _open(workdir)
    return time.time() - fs.modified(f"{_directory(root, step)}/{MARKER}").timestamp()


def verify(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
    """Checks that the files of a checkpoint are there in full, and returns its marker.

    The marker has `step`, `torch` (the version that wrote it), `info` (what `Checkpointer.save` was
    given) and `sizes` (bytes by file).
    """
    fs, root = _open(workdir)
    directory = _directory(root, step)
    complete = steps(workdir)
    if step not in complete:
        raise ValueError(
            f"{_name(fs, root)} has no complete checkpoint of step {step}; it has those of steps {complete}"
        )
    rest = [s for s in complete if s != step]
    damaged = f"the checkpoint of step {step} is damaged"
    remedy = f"delete {_name(fs, directory)}; the run then " + (
        f"resumes from step {rest[-1]}" if rest else "starts from scratch"
    )
    try:
        record = json.loads(fs.cat_file(f"{directory}/{MARKER}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{damaged}: {MARKER} is not JSON; {remedy}") from error
    sizes = _sizes(fs, directory)
    for file, expected in record["sizes"].items():
        if file not in sizes:
            raise ValueError(f"{damaged}: {file} ({expected} bytes) is missing; {remedy}")
        if sizes[file] != expected:
            raise ValueError(f"{damaged}: {file} has {sizes[file]} bytes, not {expected}; {remedy}")
    return record


def verify_checksums(workdir: str | os.PathLike, step: int, index: int = 0, count: int = 1) -> None:
    """Reads the files of a checkpoint, or every `count`-th from `index` on, and compares their checksums with those
    that were computed when it was written.

    Raises:
      ValueError: if one differs.
    """
    record = verify(workdir, step)
    fs, root = _open(workdir)
    directory = _directory(root, step)
    for file, expected in sorted(record.get("checksums", {}).items())[index::count]:
        with fs.open(f"{directory}/{file}", "rb") as stream:
            checksum = xxhash.xxh3_64()
            while chunk := stream.read(_CHUNK):
                checksum.update(chunk)
        if checksum.hexdigest() != expected:
            raise ValueError(
                f"the checkpoint of step {step} is damaged: {_name(fs, directory)}/{file} is not as it was written "
                f"(XXH3 {checksum.hexdigest()}, not {expected}): delete the checkpoint to resume from an older one, or "
                "load it as it is with --noverify"
            )


def parts(workdir: str | os.PathLike, step: int) -> set[str]:
    """Returns the top-level names of what a checkpoint holds, as "model" and "ema"."""
    fs, root = _open(workdir)
    return {name.partition(".")[0] for name in _saved(fs, root, step)}


def check_compatible(workdir: str | os.PathLike, step: int, state: Mapping[str, Any]) -> None:
    """Verifies a checkpoint, and that it has the names, shapes and dtypes of `state`.

    `state` may be on the meta device. It may be a part: what the checkpoint has beyond it counts
    only under its own top-level names, so {"model": …} is compatible with a checkpoint that has the
    optimizer as well, and not with one of a deeper model.
    """
    verify(workdir, step)
    fs, root = _open(workdir)
    saved = _saved(fs, root, step)
    expected, _ = flatten_state_dict(dict(state))
    # DCP calls a value by the keys on the way to it, joined with dots.
    parts = tuple(f"{key}." for key in state)
    for name in (*expected, *(name for name in saved if name.startswith(parts))):
        theirs, ours = _describe(saved, name), _describe(expected, name)
        if theirs != ours:
            what, remedy = "architecture", "use another --workdir, or the config of that run"
            if name.startswith("optimizer."):
                what = "optimizer, or other frozen parameters"
                remedy = "bind make_optimizer's arguments as that run, or use another --workdir with train.init_from"
            raise ValueError(
                f"{os.fspath(workdir)} holds a run with another {what}: {name} is {theirs} in its checkpoint of step "
                f"{step} and {ours} in this run; {remedy}"
            )


def restore(
    workdir: str | os.PathLike, step: int, state: dict[str, Any], planner: dcp.LoadPlanner | None = None
) -> dict[str, Any]:
    """Loads a checkpoint into `state`, after `check_compatible`, and returns `state`.

    Tensors are filled in place; other values are replaced in their dicts. `state` may be a part of
    what was saved. Every process reads for itself what it lacks, in whatever sharding it has.
    `planner` knows how, where DCP does not. Raises a ValueError or OSError for what cannot be read.
    """
    check_compatible(workdir, step, state)
    fs, root = _open(workdir)
    _quiet()
    planner = planner or _LoadPlanner()
    with _reading(fs, root, step), _plain_errors():
        # no_dist: reading needs no agreement between processes, and without collectives a process
        # that fails says so at once instead of leaving the others to wait for it.
        dcp.load(state, storage_reader=_reader(fs, _directory(root, step)), planner=planner, no_dist=True)
    return state


def load_weights(workdir: str | os.PathLike, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Loads the model of a checkpoint into `tensors`, a model's state on the CPU, in place.

    What the checkpoint has a moving average of ("ema") is that, the rest is as trained ("model").

    Raises:
      ValueError: if the checkpoint is damaged, or one of the tensors is missing, too many or of another shape.
    """
    verify(workdir, step)
    fs, root = _open(workdir)
    saved = _saved(fs, root, step)
    theirs = {name.removeprefix("model."): "model" for name in saved if name.startswith("model.")}
    theirs |= {name.removeprefix("ema."): "ema" for name in saved if name.startswith("ema.")}
    for name in (*tensors, *(name for name in theirs if name not in tensors)):
        found, expected = _describe(saved, f"{theirs.get(name)}.{name}"), _describe(tensors, name)
        if found != expected:
            raise ValueError(
                f"the weights of step {step} of {os.fspath(workdir)} are another model's: {name} is {found} there, "
                f"{expected} here"
            )
    state = {part: {name: tensors[name] for name in theirs if theirs[name] == part} for part in set(theirs.values())}
    _quiet()
    with _reading(fs, root, step), _plain_errors():
        reader = _reader(fs, _directory(root, step))
        dcp.load(state, storage_reader=reader, planner=_LoadPlanner(), no_dist=True)


# Where things are. All but DCP's own reading and writing goes through fsspec.


def _open(workdir: str | os.PathLike) -> tuple[AbstractFileSystem, str]:
    fs, path = url_to_fs(str(workdir))
    fs.invalidate_cache()  # other processes write here too, and fsspec remembers listings
    return fs, f"{path.rstrip('/')}/checkpoints"


def _directory(root: str, step: int) -> str:
    return f"{root}/{step:09d}"


def _name(fs: AbstractFileSystem, path: str) -> str:
    """The path as a user types it, and as DCP wants it."""
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def _listed(fs: AbstractFileSystem, root: str) -> list[int]:
    """The steps that have a directory, complete or not, in ascending order."""
    if not fs.exists(root):
        return []
    names = (path.rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False))
    return sorted(int(name) for name in names if name.isdigit())


def _complete(fs: AbstractFileSystem, root: str, listed: list[int]) -> list[int]:
    return [step for step in listed if fs.exists(f"{_directory(root, step)}/{MARKER}")]


def _ranked(fs: AbstractFileSystem, root: str) -> list[int]:
    file = f"{root.rpartition('/')[0]}/{BEST_FILE}"
    if not fs.exists(file):
        return []
    try:
        return [entry["step"] for entry in json.loads(fs.cat_file(file))["ranking"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{_name(fs, file)} is damaged ({type(error).__name__}: {error}): delete it") from error


def _sizes(fs: AbstractFileSystem, directory: str) -> dict[str, int]:
    files = fs.find(directory, detail=True)
    return {path.removeprefix(f"{directory}/"): file["size"] for path, file in files.items()}


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Loads values that are no tensors (DCP's own unpickles them) only if they are plain."""

    def load_bytes(self, read_item, value):
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))


# What the metadata of a checkpoint consist of, besides plain values and dtypes.
_IN_METADATA = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles DCP's metadata, and nothing else: a pickle from elsewhere could run any program."""

    def find_class(self, module: str, name: str) -> Any:
        of_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not of_dtype and name not in _IN_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"its metadata name {module}.{name}, which no checkpoint has: not unpickled")
        return super().find_class(module, name)


def _reader(fs: AbstractFileSystem, directory: str) -> dcp.FileSystemReader:
    """DCP's reader for this storage, which does not unpickle what could run code."""

    class Reader(dcp.FileSystemReader if isinstance(fs, LocalFileSystem) else FsspecReader):
        def read_metadata(self, *args, **kwargs):
            with fs.open(f"{directory}/.metadata", "rb") as file:
                metadata = _MetadataUnpickler(file).load()
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(_name(fs, directory))


def _saved(fs: AbstractFileSystem, root: str, step: int) -> dict[str, Any]:
    """DCP's metadata of what a checkpoint holds, by name."""
    with _reading(fs, root, step):
        return _reader(fs, _directory(root, step)).read_metadata().state_dict_metadata


@contextmanager
def _reading(fs: AbstractFileSystem, root: str, step: int) -> Iterator[None]:
    """Says in a ValueError what cannot be read: of files that are damaged, or deleted meanwhile, DCP, pickle and zip
    raise errors of any type, assertions among them."""
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError):  # these say what they are
        raise
    except Exception as error:
        raise ValueError(
            f"the checkpoint of step {step} cannot be read, it is damaged or was deleted meanwhile "
            f"({' '.join(f'{type(error).__name__}: {error}'.split())}): if it is damaged, delete "
            f"{_name(fs, _directory(root, step))}"
        ) from error


# Writing.


def _writer(fs: AbstractFileSystem, directory: str, finish: Callable, snapshot: Callable) -> dcp.FileSystemWriter:
    """DCP's writer for this storage, with our copy, start and end of a save.

    Process 0 runs the start and the end inside DCP's own exchanges: after all processes have
    planned and before any writes; after all have written and before any returns. What is raised
    there, or in the writing of any process, is raised on all of them.
    """
    local = isinstance(fs, LocalFileSystem)

    class Writer(dcp.FileSystemWriter if local else FsspecWriter):
        def stage(self, state_dict):
            return snapshot(state_dict)

        def write_data(self, plan, planner):
            checksums = {}
            plain = self.fs.create_stream

            @contextmanager
            def create_stream(path, mode):
                with plain(path, mode) as stream:
                    checked = _Checksum(stream)
                    try:
                        yield checked
                    except RuntimeError as error:  # of a full disk PyTorch's zip writer says that positions differ
                        raise (checked.error or error) from None
                checksums[os.path.basename(path)] = checked.hash.hexdigest()

            self.fs.create_stream = create_stream
            try:
                results = super().write_data(plan, planner).wait()
            finally:
                self.fs.create_stream = plain
            written = torch.futures.Future()
            written.set_result(_Written(results, checksums))
            return written

        def prepare_global_plan(self, plans):
            # What an interrupted save left. The directory stays: the others have just seen it.
            for file in fs.find(directory):
                fs.rm_file(file)
            return super().prepare_global_plan(plans)

        def finish(self, metadata, results):
            super().finish(metadata, results)
            finish(results)

    # An object on a store is durable once closed; DCP would sync all disks of this machine instead.
    # What it writes is on the CPU already: there is nothing to copy ahead.
    return Writer(_name(fs, directory), sync_files=local, per_thread_copy_ahead=0)


class _Checksum:
    """A stream that is written to, with the hash of what was written and the error of the write that failed."""

    def __init__(self, stream):
        self._stream = stream
        self.hash = xxhash.xxh3_64()
        self.error: OSError | None = None

    def write(self, data) -> int:
        self.hash.update(data)
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name):
        return getattr(self._stream, name)


class _Written(list):
    """What DCP knows of what a process has written, with the files' checksums: it comes to process 0 with it."""

    def __init__(self, results: list, checksums: dict[str, str]):
        super().__init__(results)
        self.checksums = checksums


def _snapshot(value: Any) -> Any:
    """A copy on the CPU, which training does not touch.

    DCP's BlockingAsyncStager does as much, but shares scalar DTensors with the original.
    """
    if isinstance(value, Mapping):
        return {key: _snapshot(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_snapshot(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return copy.deepcopy(value)


def _commit(fs: AbstractFileSystem, directory: str, record: dict[str, Any], results: list) -> None:
    fs.invalidate_cache()
    sizes = _sizes(fs, directory)
    for written in (result.storage_data for process in results for result in process):
        if sizes.get(written.relative_path, 0) < written.offset + written.length:
            raise ValueError(
                f"process 0 does not see all of {_name(fs, directory)}/{written.relative_path}, "
                "which is written; use a --workdir on storage that all processes share"
            )
    checksums = {".metadata": xxhash.xxh3_64_hexdigest(fs.cat_file(f"{directory}/.metadata"))}
    for written in results:
        checksums |= written.checksums
    marker = f"{directory}/{MARKER}"
    with fs.open(f"{marker}.tmp", "wb") as stream:
        stream.write(json.dumps({**record, "sizes": sizes, "checksums": checksums}, indent=2).encode())
        if isinstance(fs, LocalFileSystem):
            # Older checkpoints go next, and must not go before this one would survive a power cut.
            stream.flush()
            os.fsync(stream.fileno())
    fs.mv(f"{marker}.tmp", marker)


def _prune(fs: AbstractFileSystem, root: str, saved: int, keep_last: int, keep_every: int | None) -> None:
    """Deletes complete checkpoints that the rules do not keep, and older incomplete ones."""
    listed = _listed(fs, root)
    complete = _complete(fs, root, listed)
    kept = {saved, *complete[-keep_last:]}
    kept.add(next((step for step in _ranked(fs, root) if step in complete), saved))
    if keep_every is not None:
        kept |= {step for step in complete if step % keep_every == 0}
    for step in listed:
        directory = _directory(root, step)
        if step in complete and step not in kept:
            fs.rm_file(f"{directory}/{MARKER}")
            fs.rm(directory, recursive=True)
        elif step not in complete and step < saved:
            # Left by a save or a deletion that was interrupted.
            fs.rm(directory, recursive=True)


# DCP's manners.


def _describe(entries: Mapping[str, Any], name: str) -> str:
    """What is compared of an entry, a value or DCP's metadata of one."""
    if name not in entries:
        return "absent"
    entry = entries[name]
    if isinstance(entry, dcp.TensorStorageMetadata):
        dtype, shape = entry.properties.dtype, entry.size
    elif isinstance(entry, torch.Tensor):
        dtype, shape = entry.dtype, entry.shape
    else:
        return "no tensor"
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raises the error that DCP has wrapped in a BaseException, which `except Exception` misses."""
    try:
        yield
    except dcp.CheckpointException as wrapper:
        error, _ = next(iter(wrapper.failures.values()))
        raise error from wrapper


def _quiet() -> None:
    """Silences what DCP says of single-process saves, its own code, and leftovers we remove."""
    for message in (
        "torch.distributed is (disabled|unavailable)",
        "TypedStorage is deprecated",
        "Detected an existing checkpoint",
        "The function definition for SavePlanner.set_up_planner",  # of torch_xla's
    ):
        # Not catch_warnings, which is not safe next to the background thread.
        warnings.filterwarnings("ignore", message=message)
