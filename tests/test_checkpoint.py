"""A checkpoint equals what was saved bit for bit, is whole or absent, and is kept by the rules."""

import itertools
import json
import os
import pickle
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from fsspec.core import url_to_fs
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from jetformer import checkpoint
from jetformer.checkpoint import Checkpoint, Checkpointer

# A run would log a warning of DCP's with every save.
pytestmark = pytest.mark.filterwarnings("error")

fresh = itertools.count()


@pytest.fixture(params=["local", "file", "memory"])
def workdir(request, tmp_path):
    names = {"local": tmp_path, "file": f"file://{tmp_path}", "memory": f"memory://{next(fresh)}/w"}
    return names[request.param]


def a_state(seed=0):
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(5, 3, generator=g)
    return {
        "model": {
            "weight": torch.nn.Parameter(normal),
            "half": torch.randn(7, generator=g).bfloat16(),
            "transposed": torch.randn(4, 6, generator=g).t(),
            "view": torch.randn(10, generator=g)[3:5],
            "strange": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
            "scalar": torch.tensor(0.25 + seed),
            "empty": torch.empty(0, 4),
            "mask": torch.randn(9, generator=g) > 0,
        },
        "optimizer": {
            "state": {"weight": {"exp_avg": torch.randn(5, 3, generator=g), "step": 3 + seed}},
            "param_groups": [{"lr": 0.1 + seed, "betas": (0.9, 0.95), "name": f"group {seed}"}],
        },
        "moments": [torch.randn(2, generator=g), torch.randn(3, generator=g)],
        "step": 100 + seed,
    }


def leaves(state):
    """Names and bits of a state's values."""
    flat, _ = flatten_state_dict(state)
    return {
        name: (v.dtype, v.shape, v.detach().contiguous().view(-1).view(torch.uint8).tolist())
        if isinstance(v, torch.Tensor)
        else v
        for name, v in flat.items()
    }


def storage(workdir):
    """The file system of a workdir, and the path of its checkpoints there."""
    fs, path = url_to_fs(str(workdir))
    fs.invalidate_cache()
    return fs, f"{path}/checkpoints"


def directory(workdir, step):
    """A checkpoint's directory as a user types it."""
    return (
        f"{str(workdir).removeprefix('file://')}/checkpoints/{step:09d}"
        if "memory" not in str(workdir)
        else (f"memory:///{str(workdir).removeprefix('memory://')}/checkpoints/{step:09d}")
    )


def marker(workdir, step):
    fs, root = storage(workdir)
    return json.loads(fs.cat_file(f"{root}/{step:09d}/{checkpoint.MARKER}"))


def save(workdir, *steps, state=None, **rules):
    checkpointer = Checkpointer(workdir, **rules)
    for step in steps:
        checkpointer.save(step, {"w": torch.full((4,), float(step))} if state is None else state)
    checkpointer.wait()


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_restores_every_bit_in_place(workdir):
    state, target = a_state(0), a_state(1)
    save(workdir, 7, state=state)
    tensor = target["model"]["weight"]
    where = tensor.data_ptr()
    assert Checkpoint(workdir, 7).restore(target) is target
    assert leaves(target) == leaves(a_state(0))
    assert target["model"]["weight"] is tensor
    assert tensor.data_ptr() == where


def test_a_resumed_model_and_optimizer_take_the_same_next_step(tmp_path):
    def trainee(seed):
        torch.manual_seed(seed)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model, optimizer):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def state_of(model, optimizer):
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))

    first, second = trainee(0), trainee(1)
    step(*first)
    save(tmp_path, 1, state=state_of(*first))
    loaded = Checkpoint(tmp_path, 1).restore(state_of(*second))
    set_state_dict(*second, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    step(*first)
    step(*second)
    assert torch.equal(first[0].weight, second[0].weight)


def test_a_part_can_be_restored(tmp_path):
    save(tmp_path, 1, state=a_state(0))
    part = {"model": a_state(1)["model"]}
    Checkpoint(tmp_path, 1).restore(part)
    assert leaves(part) == leaves({"model": a_state(0)["model"]})


def test_training_continues_during_a_save(tmp_path, monkeypatch):
    may_write = threading.Event()
    write_data = dcp.FileSystemWriter.write_data

    def slow(self, *args):
        assert may_write.wait(timeout=20)
        return write_data(self, *args)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", slow)
    state = a_state(0)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state)
    with torch.no_grad():
        for tensor in (*state["model"].values(), *state["moments"]):
            tensor.zero_()
    state["optimizer"]["param_groups"][0]["lr"] = 5.0
    assert checkpoint.steps(tmp_path) == []
    may_write.set()
    checkpointer.wait()
    assert checkpoint.steps(tmp_path) == [1]
    assert leaves(Checkpoint(tmp_path, 1).restore(a_state(2))) == leaves(a_state(0))


def test_the_marker_describes_the_checkpoint(workdir):
    checkpointer = Checkpointer(workdir)
    checkpointer.save(12000, {"w": torch.ones(3)}, info={"examples": 5})
    checkpointer.wait()
    record = marker(workdir, 12000)
    assert record["step"] == 12000
    assert record["torch"] == torch.__version__
    assert Checkpoint(workdir, 12000).info == record["info"] == {"examples": 5}
    assert set(record["sizes"]) == {".metadata", "__0_0.distcp"}


def test_info_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        Checkpointer(tmp_path).save(1, {"w": torch.ones(3)}, info={"x": torch.ones(1)})
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_a_truncated_file_is_named(workdir, file):
    save(workdir, 1, 2, keep_last=2)
    fs, root = storage(workdir)
    path = f"{root}/000000002/{file}"
    content = fs.cat_file(path)
    fs.pipe_file(path, content[:-1])
    with pytest.raises(ValueError, match=rf"{file} .*\b{len(content) - 1} bytes, not {len(content)}\b") as error:
        Checkpoint(workdir, 2)
    message = one_line(error)
    assert directory(workdir, 2) in message
    assert "step 1" in message
    Checkpoint(workdir, 1)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_a_flipped_bit_is_found(workdir, file):
    save(workdir, 2)
    Checkpoint(workdir, 2).verify_checksums()
    fs, root = storage(workdir)
    path = f"{root}/000000002/{file}"
    content = bytearray(fs.cat_file(path))
    content[len(content) // 2] ^= 16
    fs.pipe_file(path, bytes(content))
    with pytest.raises(ValueError, match="XXH3") as error:
        Checkpoint(workdir, 2).verify_checksums()
    assert file in one_line(error)
    # If two processes share the files, one of them finds it.
    found = 0
    for index in range(2):
        try:
            Checkpoint(workdir, 2).verify_checksums(index, 2)
        except ValueError:
            found += 1
    assert found == 1


def test_an_older_checkpoint_without_checksums(workdir):
    save(workdir, 2)
    fs, root = storage(workdir)
    record = marker(workdir, 2)
    del record["checksums"]
    fs.pipe_file(f"{root}/000000002/COMPLETE", json.dumps(record).encode())
    Checkpoint(workdir, 2).verify_checksums()
    assert Checkpoint(workdir, 2).restore({"w": torch.zeros(4)})["w"].tolist() == [2.0] * 4


class Malicious:
    """Runs a program when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_a_checkpoint_runs_no_program(tmp_path):
    save(tmp_path, 1)
    metadata = tmp_path / "checkpoints" / "000000001" / ".metadata"
    size = metadata.stat().st_size
    ours = "torch.distributed.checkpoint.metadata"  # which names more than its own classes
    for pickled, named in (
        (pickle.dumps(Malicious(tmp_path / "ran")), "mkdir"),
        *((f"c{ours}\n{name}\n.".encode(), name) for name in ("dataclass", "field", "os", "torch")),
    ):
        metadata.write_bytes(pickled.ljust(size, b"\0"))
        with pytest.raises(ValueError, match=named) as error:
            Checkpoint(tmp_path, 1).restore({"w": torch.zeros(4)})
        assert "not unpickled" in one_line(error)
    # A value that is not a tensor.
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(2, {"w": Malicious(tmp_path / "ran")})
    checkpointer.wait()
    with pytest.raises(ValueError, match="damaged") as error:
        Checkpoint(tmp_path, 2).restore({"w": "plain"})
    one_line(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_an_unreadable_file_of_the_right_size(workdir, file):
    save(workdir, 2)
    fs, root = storage(workdir)
    path = f"{root}/000000002/{file}"
    fs.pipe_file(path, bytes(len(fs.cat_file(path))))
    with pytest.raises(ValueError, match="step 2 cannot be read") as error:
        Checkpoint(workdir, 2).restore({"w": torch.zeros(4)})
    assert f"delete {directory(workdir, 2)}" in one_line(error)


def test_a_checkpoint_deleted_while_it_is_read(workdir, monkeypatch):
    save(workdir, 2)
    fs, root = storage(workdir)
    check = Checkpoint.check_compatible

    def delete_then(*args):
        check(*args)
        fs.rm(f"{root}/000000002", recursive=True)

    monkeypatch.setattr(Checkpoint, "check_compatible", delete_then)
    with pytest.raises((ValueError, OSError)) as error:
        Checkpoint(workdir, 2).restore({"w": torch.zeros(4)})
    one_line(error)


def test_a_missing_file_is_named(workdir):
    save(workdir, 3)
    fs, root = storage(workdir)
    fs.rm_file(f"{root}/000000003/__0_0.distcp")
    with pytest.raises(ValueError, match=r"__0_0\.distcp .* is missing") as error:
        Checkpoint(workdir, 3)
    assert "from scratch" in one_line(error)


def test_a_broken_marker_is_named(workdir):
    save(workdir, 3)
    fs, root = storage(workdir)
    fs.pipe_file(f"{root}/000000003/COMPLETE", b"{")
    with pytest.raises(ValueError, match="COMPLETE is not JSON") as error:
        Checkpoint(workdir, 3)
    one_line(error)


def test_an_incomplete_checkpoint_does_not_count(workdir):
    assert checkpoint.steps(workdir) == []
    assert checkpoint.latest(workdir) is None
    save(workdir, 1)
    fs, root = storage(workdir)
    fs.makedirs(f"{root}/000000002")
    fs.pipe_file(f"{root}/000000002/.metadata", b"half a checkpoint")
    fs.pipe_file(f"{root}/000000002/__9_0.distcp", b"of more processes")
    assert checkpoint.steps(workdir) == [1]
    assert checkpoint.latest(workdir) == 1
    with pytest.raises(ValueError, match="step 2") as error:
        Checkpoint(workdir, 2)
    assert "[1]" in one_line(error)

    save(workdir, 2)
    assert checkpoint.steps(workdir) == [2]
    assert set(marker(workdir, 2)["sizes"]) == {".metadata", "__0_0.distcp"}
    assert not fs.exists(f"{root}/000000002/__9_0.distcp")
    state = Checkpoint(workdir, 2).restore({"w": torch.zeros(4)})
    assert state["w"].tolist() == [2.0] * 4


def test_a_complete_checkpoint_is_not_overwritten(workdir):
    save(workdir, 1)
    with pytest.raises(ValueError, match="000000001 to save this step again") as error:
        save(workdir, 1, state={"w": torch.zeros(4)})
    one_line(error)
    assert Checkpoint(workdir, 1).restore({"w": torch.zeros(4)})["w"].tolist() == [1.0] * 4


@settings(max_examples=25, deadline=None)
@given(
    saved=st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True).map(sorted),
    keep_last=st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 10),
    leftover=st.integers(0, 40),
)
def test_keeps_the_last_and_every_kth(saved, keep_last, keep_every, leftover):
    workdir = f"memory://{next(fresh)}"
    fs, root = storage(workdir)
    if leftover not in saved:
        fs.pipe_file(f"{root}/{leftover:09d}/.metadata", b"interrupted")
    for n, step in enumerate(saved, 1):
        save(workdir, step, keep_last=keep_last, keep_every=keep_every)
        every = [s for s in saved[:n] if keep_every and s % keep_every == 0]
        assert checkpoint.steps(workdir) == sorted({*every, *saved[:n][-keep_last:]})
    # Older incomplete ones are deleted.
    is_there = fs.exists(f"{root}/{leftover:09d}/.metadata")
    assert is_there == (leftover in checkpoint.steps(workdir) or leftover > saved[-1])


def test_keeps_the_checkpoint_it_just_saved(workdir):
    save(workdir, 100)
    save(workdir, 50)
    assert checkpoint.steps(workdir) == [50, 100]


def rank(workdir, *steps):
    """Writes best.json as an evaluation does; the best step first."""
    fs, root = storage(workdir)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root.rpartition('/')[0]}/best.json", json.dumps({"ranking": [{"step": s} for s in steps]}).encode())


def test_keeps_the_best(workdir):
    """That of the first ranked step that has a checkpoint; 9 has none."""
    save(workdir, 1)
    with pytest.raises(ValueError, match=r"best\.json.*\[1\].*train\.keep_best") as error:
        checkpoint.best(workdir)
    one_line(error)
    rank(workdir, 9, 1)
    save(workdir, 2, 3)
    assert checkpoint.steps(workdir) == [1, 3]
    assert checkpoint.best(workdir) == 1
    rank(workdir, 9, 3, 1)
    assert checkpoint.best(workdir) == 3
    save(workdir, 4, 5)
    assert checkpoint.steps(workdir) == [3, 5]


@pytest.mark.parametrize("content", [b"{", b"{}", b"[1]", b"\xff"])
def test_a_damaged_ranking_is_named_and_fails_no_save(tmp_path, content, caplog):
    """Any checkpoint may be the best: none is deleted until the file is whole."""
    save(tmp_path, 1)
    (tmp_path / "best.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"best\.json") as error:
        checkpoint.best(tmp_path)
    one_line(error)
    save(tmp_path, 2, 3)
    assert checkpoint.steps(tmp_path) == [1, 2, 3]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert all("best.json" in warning for warning in warnings)
    rank(tmp_path, 2)
    save(tmp_path, 4)
    assert checkpoint.steps(tmp_path) == [2, 4]


@pytest.mark.parametrize("rules", [{"keep_last": 0}, {"keep_every": 0}])
def test_rules_that_keep_nothing_are_refused(tmp_path, rules):
    with pytest.raises(ValueError, match="1 or more") as error:
        Checkpointer(tmp_path, **rules)
    one_line(error)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"w": torch.empty(3, 2)}, "model.w is float32[2, 3] in its checkpoint of step 5 and "
                                   "float32[3, 2] in this run"),
        ({"w": torch.empty(2, 3).half()}, "and float16[2, 3] in this run"),
        ({"w": 1.0}, "and no tensor in this run"),
        ({"deeper": torch.empty(2)}, "model.deeper is absent in its checkpoint"),
        ({"b": None}, "model.b is float32[3] in its checkpoint of step 5 and absent in this run"),
    ],
)  # fmt: skip
def test_another_architecture_is_one_line(workdir, change, says):
    model = {"w": torch.ones(2, 3), "b": torch.ones(3)}
    save(workdir, 5, state={"model": model, "optimizer": {"m": torch.ones(2)}})
    other = {name: value for name, value in {**model, **change}.items() if value is not None}
    for state in ({"model": other}, {"model": meta(other)}):
        with pytest.raises(ValueError, match="another architecture") as error:
            Checkpoint(workdir, 5).check_compatible(state)
        assert says in one_line(error)
        assert f"{workdir} holds" in str(error.value)
        assert "use another --workdir, or the config of that run" in str(error.value)
    with pytest.raises(ValueError, match="another architecture"):
        Checkpoint(workdir, 5).restore({"model": other})


def meta(state):
    return {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in state.items()}


def test_the_same_architecture_is_compatible(workdir):
    save(workdir, 5, state=a_state(0))
    Checkpoint(workdir, 5).check_compatible(a_state(1))
    Checkpoint(workdir, 5).check_compatible({"model": meta(a_state(1)["model"])})


@pytest.mark.parametrize("where", ["write_data", "finish"])
def test_the_error_of_a_save_is_raised(tmp_path, monkeypatch, where):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    checkpointer = Checkpointer(tmp_path)
    for surfaces in (checkpointer.wait, lambda: checkpointer.save(2, {"w": torch.ones(4)})):
        with monkeypatch.context() as patch:
            patch.setattr(dcp.FileSystemWriter, where, full)
            checkpointer.save(1, {"w": torch.ones(4)})
            with pytest.raises(OSError, match="No space left"):
                surfaces()
        assert checkpoint.steps(tmp_path) == []
    # It is raised once, and does not affect the next save.
    checkpointer.wait()
    checkpointer.save(1, {"w": torch.ones(4)})
    checkpointer.wait()
    assert checkpoint.steps(tmp_path) == [1]


def test_a_deleted_checkpoint_is_incomplete_first(monkeypatch):
    workdir = f"memory://{next(fresh)}"
    save(workdir, 1)
    fs, root = storage(workdir)

    rm = MemoryFileSystem.rm

    def killed(self, path, **kwargs):
        if path == f"{root}/000000001":
            assert checkpoint.steps(workdir) == [2]
            raise OSError("killed")
        rm(self, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "rm", killed)
        with pytest.raises(OSError, match="killed"):
            save(workdir, 2)
    assert fs.exists(f"{root}/000000001/.metadata")
    save(workdir, 3)
    assert not fs.exists(f"{root}/000000001")


def finish_then(action):
    """Has DCP call `action` after all its files are written."""
    finish = dcp.FileSystemWriter.finish

    def finish_and_act(self, *args):
        finish(self, *args)
        action()

    dcp.FileSystemWriter.finish = finish_and_act


def kill_during_save(workdir, where):
    """Saves step 1, and kills itself while saving step 2."""
    checkpointer = Checkpointer(workdir)
    checkpointer.save(1, a_state(1))
    checkpointer.wait()

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "after the files":
        finish_then(die)
    else:
        torch.save = die  # DCP writes each tensor with it
    checkpointer.save(2, a_state(2))
    checkpointer.wait()


def test_a_killed_save_leaves_the_previous_checkpoint(tmp_path):
    places = ["among the files", "after the files"]
    context = mp.get_context("spawn")
    children = [context.Process(target=kill_during_save, args=(tmp_path / p, p)) for p in places]
    for child in children:
        child.start()
    for child, place in zip(children, places, strict=True):
        child.join(timeout=60)
        assert child.exitcode == -signal.SIGKILL
        workdir = tmp_path / place
        left = workdir / "checkpoints" / "000000002"
        assert (left / "__0_0.distcp").exists()
        assert (left / ".metadata").exists() == (place == "after the files")
        assert checkpoint.steps(workdir) == [1]
        assert leaves(Checkpoint(workdir, 1).restore(a_state(0))) == leaves(a_state(1))
        save(workdir, 2, state=a_state(2))
        assert checkpoint.steps(workdir) == [2]
        assert leaves(Checkpoint(workdir, 2).restore(a_state(0))) == leaves(a_state(2))


def two_processes(rank, workdir):
    dist.init_process_group("gloo", init_method=f"file://{workdir}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def sharded(tensor, placement):
        return distribute_tensor(tensor, mesh, [placement])

    def state(scale):
        return {
            "replicated": scale * torch.arange(50_000.0),
            "sharded": sharded(scale * torch.arange(7.0), Shard(0)),
            "scalar": sharded(torch.tensor(scale), Replicate()),
            "step": int(scale),
        }

    write_data = dcp.FileSystemWriter.write_data

    def slow(self, *args):
        time.sleep(0.5 * rank)
        written = write_data(self, *args)
        assert checkpoint.latest(workdir) != 2
        return written

    def broken(self, *args):
        if rank == 1:
            raise OSError("no space left on process 1")
        return write_data(self, *args)

    checkpointer = Checkpointer(workdir, keep_last=2)
    checkpointer.save(1, state(1.0))
    dcp.FileSystemWriter.write_data = slow
    two = state(2.0)
    checkpointer.save(2, two)
    for value in two.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    for _ in range(20):  # meanwhile collectives of training
        one = torch.ones(3)
        dist.all_reduce(one)
        assert one.tolist() == [2.0] * 3
    checkpointer.wait()
    assert checkpoint.steps(workdir) == [1, 2]

    dcp.FileSystemWriter.write_data = broken
    checkpointer.save(3, state(3.0))
    with pytest.raises(OSError, match="process 1"):
        checkpointer.wait()

    restored = Checkpoint(workdir, 2).restore(state(0.0))
    assert torch.equal(restored["replicated"], 2 * torch.arange(50_000.0))
    assert torch.equal(restored["sharded"].full_tensor(), 2 * torch.arange(7.0))
    assert restored["scalar"].full_tensor().item() == 2.0
    assert restored["step"] == 2
    dist.destroy_process_group()


def test_two_processes_write_one_checkpoint(tmp_path):
    mp.spawn(two_processes, args=(str(tmp_path),), nprocs=2)
    assert checkpoint.steps(tmp_path) == [1, 2]
    sizes = marker(tmp_path, 2)["sizes"]
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(sizes)
    assert sum(sizes.values()) < 1.5 * 4 * 50_000  # a replicated tensor is saved once
    # One process reads what two have written.
    state = {"sharded": torch.zeros(7), "scalar": torch.tensor(0.0), "step": 0}
    Checkpoint(tmp_path, 2).restore(state)
    assert state["sharded"].tolist() == [2.0 * i for i in range(7)]
    assert state["scalar"].item() == 2.0
    assert state["step"] == 2


def test_files_must_be_visible_to_process_0(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp.FileSystemWriter, "finish", dcp.FileSystemWriter.finish)  # restored after the test
    finish_then((tmp_path / "checkpoints/000000001/__0_0.distcp").unlink)
    with pytest.raises(ValueError, match="storage that all processes share") as error:
        save(tmp_path, 1)
    one_line(error)
    assert checkpoint.steps(tmp_path) == []


def test_the_marker_is_plain_json(tmp_path):
    save(tmp_path, 1)
    record = json.loads((tmp_path / "checkpoints/000000001/COMPLETE").read_text())
    assert sorted(record) == ["checksums", "info", "sizes", "step", "torch"]
