"""Saves, loads and lists the checkpoints of a run.

    <workdir>/checkpoints/000012000/.metadata  __0_0.distcp  __1_0.distcp  …  COMPLETE

- torch.distributed.checkpoint (DCP) writes the files, each process its shards, in a background thread and from a copy
  of the state, so training continues meanwhile.
- Process 0 writes `COMPLETE` last, once all processes have finished. A directory without it is no checkpoint, so a
  killed save leaves either a whole checkpoint or none. (A marker and not a renamed directory: object stores cannot
  rename one atomically.) A deletion starts with it.
- `COMPLETE` holds the size of every file, which reveals a truncated one, and its XXH3 checksum, which reveals a flipped
  bit. (Older checkpoints have no checksums.)
- best.json in the workdir ranks evaluated steps, see `evaluators.best`. The best checkpoint is that of the first ranked
  step that has one, and is not deleted.
- Nothing is unpickled but DCP's own metadata and what `torch.load(weights_only=True)` loads.
- A workdir is a local directory or any URL that fsspec opens (gs://…).
"""

import copy
import functools
import json
import os
import pickle
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from absl import logging
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, set_element
from torch.distributed.checkpoint.metadata import StorageMeta
from upath import UPath

MARKER = "COMPLETE"
BEST_FILE = "best.json"  # in the workdir
_CHUNK = 1 << 24  # bytes
_CACHED = 1 << 18  # bytes that stay in a CPU's cache from one use to the next


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
    """Returns the step of the newest complete checkpoint; None if there is none."""
    return max(steps(workdir), default=None)


def ranked(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps that best.json ranks, the best first, with or without a checkpoint.

    Raises:
      ValueError: if the file is damaged.
    """
    fs, root = _open(workdir)
    file = f"{root.rpartition('/')[0]}/{BEST_FILE}"
    if not fs.exists(file):
        return []
    try:
        return [entry["step"] for entry in json.loads(fs.cat_file(file))["ranking"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{_name(fs, file)} is damaged ({type(error).__name__}: {error}): delete it") from error


def best_of(workdir: str | os.PathLike, among: Collection[int]) -> int | None:
    """Returns the best of some steps by best.json; None if it ranks none of them.

    Raises:
      ValueError: if the file is damaged.
    """
    return next((step for step in ranked(workdir) if step in among), None)


def best(workdir: str | os.PathLike) -> int:
    """Returns the step of the best complete checkpoint.

    Raises:
      ValueError: if there is none, or best.json is damaged.
    """
    complete = steps(workdir)
    step = best_of(workdir, complete)
    if step is None:
        raise ValueError(
            f"{workdir} has no best checkpoint: its {BEST_FILE} ranks none of the steps {complete}; evaluate them with "
            'train.keep_best bound to a metric, as "val/bits_per_dim"'
        )
    return step


def find(workdir: str | os.PathLike, step: int | str | None = None) -> int:
    """Returns the step of a complete checkpoint.

    Args:
      workdir: the run's.
      step: of the checkpoint, or "best"; None: the newest.

    Raises:
      ValueError: if there is no such checkpoint.
    """
    if step == "best":
        return best(workdir)
    complete = steps(workdir)
    found = max(complete, default=None) if step is None else step
    if found not in complete:
        others = f", only of {', '.join(map(str, complete))} (see train.keep_last)" if complete else ""
        which = "" if step is None else f" of step {step}{others}"
        raise ValueError(f"{workdir} has no complete checkpoint{which}")
    return found


def age(workdir: str | os.PathLike, step: int) -> float:
    """Returns for how many seconds, by this machine's clock, a checkpoint has been complete.

    Raises:
      OSError: if it is not.
    """
    fs, root = _open(workdir)
    return time.time() - fs.modified(f"{_directory(root, step)}/{MARKER}").timestamp()


# Saving.


class Checkpointer:
    """Saves the checkpoints of a run, one at a time, in the background.

    Of the complete checkpoints in `workdir` it keeps the newest `keep_last`, the best one, and those of every step that
    `keep_every` divides. With torch.distributed initialized every process makes a Checkpointer, calls `save` for the
    same steps with its shards of the state, and calls `wait` before it ends.

    Args:
      workdir: of the run.
      keep_last: number of the newest checkpoints to keep.
      keep_every: also keep the checkpoints of its multiples; None: no others.
      snapshot: copies a state to the CPU; None: `_snapshot`, for tensors, DTensors and plain values.
      planner: makes the DCP planner that understands such a copy; None: DCP's own.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep_last: int = 1,
        keep_every: int | None = None,
        snapshot: Callable[[Any], Any] | None = None,
        planner: Callable[[], dcp.SavePlanner] | None = None,
    ):
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; it must be 1 or more")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every is {keep_every}; it must be 1 or more steps, or None")
        self._workdir, self._keep_last, self._keep_every = workdir, keep_last, keep_every
        self._snapshot, self._planner = snapshot or _snapshot, planner or dcp.DefaultSavePlanner
        # The background thread's collectives must not interleave with those of training.
        self._process_group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: Future | None = None
        self._saving = ""  # where to

    def save(self, step: int, state: dict[str, Any], *, info: dict[str, Any] | None = None) -> None:
        """Starts to save a checkpoint; returns once the values are copied. Waits for the previous save first.

        Args:
          step: of the checkpoint.
          state: nested dicts with string keys, of tensors (DTensors too) and plain Python values.
          info: a small dict that JSON can hold, kept in the marker, see `Checkpoint.info`.

        Raises:
          ValueError: if there is a complete checkpoint of this step.
          Exception: what the previous save raised, see `wait`.
        """
        self.wait()
        fs, root = _open(self._workdir)
        directory = _directory(root, step)
        if fs.exists(f"{directory}/{MARKER}"):
            raise ValueError(
                f"there is already a complete checkpoint of step {step}: delete {_name(fs, directory)} to save this "
                "step again"
            )
        record = {"step": step, "torch": torch.__version__, "info": info or {}}
        json.dumps(record)  # an `info` that JSON cannot hold fails here, not in the background

        def finish(results):
            _commit(fs, directory, record, results)
            self._prune(step)

        _ignore_warnings()
        self._saving = _name(fs, directory)
        with _unwrapped_errors():
            self._pending = dcp.async_save(
                state,
                storage_writer=_writer(fs, directory, finish, self._snapshot),
                planner=self._planner(),
                process_group=self._process_group,
            )

    def wait(self) -> None:
        """Waits until the last save is complete on all processes.

        Raises:
          OSError: if the storage cannot be written to (a full disk, a quota). Complete checkpoints are unchanged.
          Exception: whatever else the save raised.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                with _unwrapped_errors():
                    pending.result()
            except OSError as error:
                raise OSError(
                    f"the checkpoint in {self._saving} is not saved, complete ones are unchanged: {error}"
                ) from error

    def _prune(self, saved: int) -> None:
        """Deletes complete checkpoints that the rules do not keep, and what interrupted saves and deletions left."""
        fs, root = _open(self._workdir)
        listed = _listed(fs, root)
        complete = _complete(fs, root, listed)
        for step in listed:
            if step not in complete and step < saved:
                fs.rm(_directory(root, step), recursive=True)
        kept = {saved, *complete[-self._keep_last :]}
        if self._keep_every is not None:
            kept |= {step for step in complete if step % self._keep_every == 0}
        try:
            kept.add(best_of(self._workdir, complete))
        except ValueError as error:
            logging.warning("%s. Until then, or until an evaluation rewrites it, all checkpoints are kept", error)
            return
        for step in complete:
            if step not in kept:
                fs.rm_file(f"{_directory(root, step)}/{MARKER}")
                fs.rm(_directory(root, step), recursive=True)


def _snapshot(value: Any) -> Any:
    """Returns a copy on the CPU that shares no memory with the original. That of a GPU's tensors is complete when the
    device has been waited for.

    (DCP's BlockingAsyncStager shares scalar DTensors.)
    """
    if isinstance(value, Mapping):
        return {key: _snapshot(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_snapshot(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, non_blocking=value.is_cuda)  # then to pinned memory
    return copy.deepcopy(value)


def _writer(fs: AbstractFileSystem, directory: str, finish: Callable, snapshot: Callable) -> dcp.FileSystemWriter:
    """Returns DCP's writer for this storage, with our snapshot, checksums, and start and end of a save.

    Process 0 runs the start after all processes have planned and before any writes, and the end after all have written
    and before any returns. An error there, or while any process writes, is raised on all of them.
    """
    local = isinstance(fs, LocalFileSystem)

    class Writer(dcp.FileSystemWriter if local else FsspecWriter):
        def stage(self, state_dict):
            copied = snapshot(state_dict)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            return copied

        def write_data(self, plan, planner):
            checksums = {}
            plain = self.fs.create_stream

            @contextmanager
            def create_stream(path, mode):
                with plain(path, mode) as stream:
                    checked = _Checksum(stream)
                    try:
                        yield checked
                    except RuntimeError as error:  # PyTorch's zip writer hides a full disk's OSError
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
            # Deletes what an interrupted save left, but not the directory: the other processes have just seen it.
            for file in fs.find(directory):
                fs.rm_file(file)
            return super().prepare_global_plan(plans)

        def finish(self, metadata, results):
            super().finish(metadata, results)
            finish(results)

    # An object on a store is durable once closed; DCP would sync all disks of this machine instead. The snapshot is on
    # the CPU: there is nothing to copy ahead.
    return Writer(_name(fs, directory), sync_files=local, per_thread_copy_ahead=0)


class _Checksum:
    """Wraps a stream: hashes what is written to it, and keeps the error of a write that failed."""

    def __init__(self, stream):
        self._stream = stream
        self.hash = xxhash.xxh3_64()
        self.error: OSError | None = None

    def write(self, data) -> int:
        data = memoryview(data)
        try:
            for first in range(0, len(data), _CACHED):
                piece = data[first : first + _CACHED]
                self.hash.update(piece)
                self._stream.write(piece)
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def __getattr__(self, name):
        return getattr(self._stream, name)


class _Written(list):
    """DCP's list of what a process has written, which process 0 receives, with the checksums of the files."""

    def __init__(self, results: list, checksums: dict[str, str]):
        super().__init__(results)
        self.checksums = checksums


def _commit(fs: AbstractFileSystem, directory: str, record: dict[str, Any], results: list) -> None:
    """Writes the marker, after a check that this process sees all files."""
    fs.invalidate_cache()
    sizes = _sizes(fs, directory)
    for written in (result.storage_data for process in results for result in process):
        if sizes.get(written.relative_path, 0) < written.offset + written.length:
            raise ValueError(
                f"process 0 does not see all of {_name(fs, directory)}/{written.relative_path}, which another process "
                "has written: use a --workdir on storage that all processes share"
            )
    checksums = {".metadata": xxhash.xxh3_64_hexdigest(fs.cat_file(f"{directory}/.metadata"))}
    for written in results:
        checksums |= written.checksums
    marker = f"{directory}/{MARKER}"
    with fs.open(f"{marker}.tmp", "wb") as stream:
        stream.write(json.dumps({**record, "sizes": sizes, "checksums": checksums}, indent=2).encode())
        if isinstance(fs, LocalFileSystem):
            # Older checkpoints are deleted next: this one has to survive a power cut first.
            stream.flush()
            os.fsync(stream.fileno())
    fs.mv(f"{marker}.tmp", marker)


# Loading.


class Checkpoint:
    """Opens a complete checkpoint for reading, and checks that its files have their full sizes.

    Args:
      workdir: of the run.
      step: of the checkpoint.

    Attributes:
      info: what `Checkpointer.save` was given.

    Raises:
      ValueError: if there is no complete checkpoint of this step, or it is damaged.
    """

    def __init__(self, workdir: str | os.PathLike, step: int):
        self._workdir, self._step = workdir, step
        self._fs, root = _open(workdir)
        self._directory = _directory(root, step)
        complete = _complete(self._fs, root, _listed(self._fs, root))
        if step not in complete:
            raise ValueError(
                f"{_name(self._fs, root)} has no complete checkpoint of step {step}; it has those of steps {complete}"
            )
        rest = [other for other in complete if other != step]
        damaged = f"the checkpoint of step {step} is damaged"
        remedy = f"delete {_name(self._fs, self._directory)}; the run then " + (
            f"resumes from step {rest[-1]}" if rest else "starts from scratch"
        )
        try:
            record = json.loads(self._fs.cat_file(f"{self._directory}/{MARKER}"))
        except ValueError as error:
            raise ValueError(f"{damaged}: {MARKER} is not JSON; {remedy}") from error
        self.info, self._checksums = record["info"], record.get("checksums", {})
        found = _sizes(self._fs, self._directory)
        for file, expected in record["sizes"].items():
            if file not in found:
                raise ValueError(f"{damaged}: {file} ({expected} bytes) is missing; {remedy}")
            if found[file] != expected:
                raise ValueError(f"{damaged}: {file} has {found[file]} bytes, not {expected}; {remedy}")

    def verify_checksums(self, index: int = 0, count: int = 1) -> None:
        """Compares the checksums of the files, or of every `count`-th from `index` on, with those of the save.

        Raises:
          ValueError: if one differs.
        """
        for file, expected in sorted(self._checksums.items())[index::count]:
            checksum = xxhash.xxh3_64()
            with self._fs.open(f"{self._directory}/{file}", "rb") as stream:
                while chunk := stream.read(_CHUNK):
                    checksum.update(chunk)
            if checksum.hexdigest() != expected:
                raise ValueError(
                    f"the checkpoint of step {self._step} is damaged: {_name(self._fs, self._directory)}/{file} has "
                    f"changed since it was written (XXH3 {checksum.hexdigest()}, not {expected}): delete the "
                    "checkpoint to resume from an older one, or load it as it is with --noverify"
                )

    def parts(self) -> set[str]:
        """Returns the top-level names of the saved state, as "model" and "ema"."""
        return {name.partition(".")[0] for name in self._entries}

    def check_compatible(self, state: Mapping[str, Any]) -> None:
        """Checks that the checkpoint has the names, shapes and dtypes of a state.

        Args:
          state: may be on the meta device. It may be a part of what was saved: {"model": …} is compatible with a
            checkpoint that also has an optimizer, but not with one of a deeper model.

        Raises:
          ValueError: if they differ.
        """
        expected, _ = flatten_state_dict(dict(state))
        # DCP names a value by the keys on the way to it, joined with dots.
        parts = tuple(f"{key}." for key in state)
        for name in (*expected, *(name for name in self._entries if name.startswith(parts))):
            theirs, ours = _describe(self._entries, name), _describe(expected, name)
            if theirs != ours:
                what, remedy = "architecture", "use another --workdir, or the config of that run"
                if name.startswith("optimizer."):
                    what = "optimizer, or other frozen parameters"
                    remedy = (
                        "bind make_optimizer's arguments as in that run, or use another --workdir with train.init_from"
                    )
                raise ValueError(
                    f"{self._workdir} holds a run with another {what}: {name} is {theirs} in its checkpoint of step "
                    f"{self._step} and {ours} in this run; {remedy}"
                )

    def restore(self, state: dict[str, Any], planner: dcp.LoadPlanner | None = None) -> dict[str, Any]:
        """Loads the checkpoint into a state, after `check_compatible`. Each process reads the shards that it holds.

        Args:
          state: all of what was saved or a part, in any sharding. Tensors are filled in place, other values are
            replaced in their dicts.
          planner: DCP's planner for this state; None: for tensors, DTensors and plain values.

        Returns:
          The state.

        Raises:
          ValueError, OSError: if it is incompatible, or cannot be read.
        """
        self.check_compatible(state)
        self._load(state, planner or _LoadPlanner())
        return state

    def load_weights(self, tensors: Mapping[str, torch.Tensor], optional: Collection[str] = ()) -> None:
        """Loads the model: the moving average ("ema") of what has one, the rest as trained ("model").

        Args:
          tensors: a model's state on the CPU, filled in place.
          optional: names of tensors that stay as they are if the checkpoint has none of them.

        Raises:
          ValueError: if a tensor is missing, unknown or of another shape, or the checkpoint cannot be read.
        """
        theirs = {}
        for part in ("model", "ema"):  # the latter wins
            names = [name for name in self._entries if name.startswith(f"{part}.")]
            theirs |= {name.removeprefix(f"{part}."): part for name in names}
        if not theirs.keys() & set(optional):
            tensors = {name: tensor for name, tensor in tensors.items() if name not in optional}
        for name in dict.fromkeys([*tensors, *theirs]):  # in the model's order: the first is named
            found, expected = _describe(self._entries, f"{theirs.get(name)}.{name}"), _describe(tensors, name)
            if found != expected:
                raise ValueError(
                    f"the weights of step {self._step} of {self._workdir} are another model's: {name} is {found} "
                    f"there, {expected} here"
                )
        state = {part: {n: tensors[n] for n in theirs if theirs[n] == part} for part in set(theirs.values())}
        self._load(state, _LoadPlanner())

    @functools.cached_property
    def _entries(self) -> dict[str, Any]:
        """DCP's metadata of what was saved, by name."""
        with self._readable_errors():
            return _reader(self._fs, self._directory).read_metadata().state_dict_metadata

    def _load(self, state: dict[str, Any], planner: dcp.LoadPlanner) -> None:
        _ignore_warnings()
        with self._readable_errors(), _unwrapped_errors():
            # no_dist: reading needs no agreement between processes. Without collectives a process that fails raises at
            # once, instead of leaving the others to wait for it.
            dcp.load(state, storage_reader=_reader(self._fs, self._directory), planner=planner, no_dist=True)

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        """Raises a ValueError for files that cannot be read: if they are damaged, or were deleted meanwhile, DCP,
        pickle and zip raise errors of any type, assertions among them."""
        try:
            yield
        except (ValueError, OSError, torch.OutOfMemoryError):  # their messages suffice
            raise
        except Exception as error:
            raise ValueError(
                f"the checkpoint of step {self._step} cannot be read, it is damaged or was deleted meanwhile "
                f"({' '.join(f'{type(error).__name__}: {error}'.split())}): if it is damaged, delete "
                f"{_name(self._fs, self._directory)}"
            ) from error


def _describe(entries: Mapping[str, Any], name: str) -> str:
    """Returns dtype and shape of an entry, a value or DCP's metadata of one."""
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


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Loads values other than tensors only if they are plain; DCP's own planner unpickles them."""

    def load_bytes(self, read_item, value):
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))


# The classes and functions that a checkpoint's metadata name, besides dtypes.
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
    """Unpickles DCP's metadata, and nothing else: a foreign pickle could run any program."""

    def find_class(self, module: str, name: str) -> Any:
        of_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not of_dtype and name not in _IN_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"its metadata name {module}.{name}, which no checkpoint does: not unpickled")
        return super().find_class(module, name)


def _reader(fs: AbstractFileSystem, directory: str) -> dcp.FileSystemReader:
    """Returns DCP's reader for this storage, which unpickles nothing that could run a program."""

    class Reader(dcp.FileSystemReader if isinstance(fs, LocalFileSystem) else FsspecReader):
        def read_metadata(self, *args, **kwargs):
            with fs.open(f"{directory}/.metadata", "rb") as file:
                metadata = _MetadataUnpickler(file).load()
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(_name(fs, directory))


# Files. All but DCP's own reading and writing uses fsspec.


def _open(workdir: str | os.PathLike) -> tuple[AbstractFileSystem, str]:
    """Returns the file system of a workdir, and the path of its checkpoints there."""
    fs, path = url_to_fs(str(workdir))
    fs.invalidate_cache()  # fsspec caches listings, and other processes write here too
    return fs, f"{path.rstrip('/')}/checkpoints"


def _directory(root: str, step: int) -> str:
    return f"{root}/{step:09d}"


def _name(fs: AbstractFileSystem, path: str) -> str:
    """Returns a path as users type it, and as DCP expects it."""
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def _listed(fs: AbstractFileSystem, root: str) -> list[int]:
    """Returns the steps that have a directory, complete or not, in ascending order."""
    if not fs.exists(root):
        return []
    names = (path.rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False))
    return sorted(int(name) for name in names if name.isdigit())


def _complete(fs: AbstractFileSystem, root: str, listed: list[int]) -> list[int]:
    return [step for step in listed if fs.exists(f"{_directory(root, step)}/{MARKER}")]


def _sizes(fs: AbstractFileSystem, directory: str) -> dict[str, int]:
    """Returns the bytes of each file."""
    return {path.removeprefix(f"{directory}/"): f["size"] for path, f in fs.find(directory, detail=True).items()}


@contextmanager
def _unwrapped_errors() -> Iterator[None]:
    """Raises the error that DCP has wrapped in a BaseException, which `except Exception` misses."""
    try:
        yield
    except dcp.CheckpointException as wrapper:
        error, _ = next(iter(wrapper.failures.values()))
        raise error from wrapper


def _ignore_warnings() -> None:
    """Ignores DCP's warnings of single-process saves, of its own code, and of leftovers that we remove."""
    for message in (
        "torch.distributed is (disabled|unavailable)",
        "TypedStorage is deprecated",
        "Detected an existing checkpoint",
        "The function definition for SavePlanner.set_up_planner",  # of torch_xla's
    ):
        # Not catch_warnings, which is not safe next to the background thread.
        warnings.filterwarnings("ignore", message=message)
