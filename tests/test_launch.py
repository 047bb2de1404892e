"""The launch scripts against a simulated Google Cloud.

A fake gcloud records its arguments and runs remote commands here, with a home directory and a fake python for each
worker, so that the remote half of the scripts is executed too. The property: whatever fails halfway, all workers run
the same start of one program or none does, a run is never started twice, and the script ends either with the program's
success or with one line that says what to do.
"""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ["gcloud.bash", "launch/common.bash", "launch/tpu_pod.sh", "launch/eval_job.sh"]
SCRIPTS += ["launch/tpu_host.sh", "launch/gpu.sh"]
BINDINGS = """Jet.kinds = ("channels", 'spatial')  # $HOME `id` \\ "!" *"""
PYTHON = f"#!{sys.executable} -IS\n"

GCLOUD = (
    PYTHON
    + r"""
import json, os, pathlib, shutil, signal, subprocess, sys, time

cloud = pathlib.Path(os.environ["CLOUD"])
args = sys.argv[1:]
line = json.dumps(args)
with open(cloud / "calls", "a") as file:
    file.write(line + "\n")
state = (cloud / "state").read_text()
workers = int((cloud / "workers").read_text())
option = {a.split("=")[0]: a.partition("=")[2] for a in args if a.startswith("--")}

# A rule to fail: what the call contains, how many of them pass, how many fail, on how many workers it runs before.
first = None
rule_file = cloud / "fail"
if rule_file.exists():
    rule = json.loads(rule_file.read_text())
    if rule["match"] in line:
        if rule["skip"]:
            rule["skip"] -= 1
        elif rule["times"]:
            rule["times"] -= 1
            first = rule["first"]
        rule_file.write_text(json.dumps(rule))

def fail(message):
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(1)

def homes():
    return [cloud / f"home{w}" for w in range(workers)]

def end_machine(keep_disk=False):
    for home in homes():
        for pid in home.glob("jetformer_*/pid"):
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except (ProcessLookupError, ValueError):
                pass
        if not keep_disk:
            shutil.rmtree(home)
            home.mkdir()

def chosen():
    worker = option.get("--worker", "0")
    return list(range(workers)) if worker == "all" else [int(worker)]

if first == 0:
    fail("the connection broke")
verb = next(a for a in ("describe", "ssh", "scp", "create", "delete", "start", "list", "rm") if a in args)
queue = "queued-resources" in args
ready = "RUNNING" if "instances" in args else "READY"
if verb == "describe" and queue:
    if not (cloud / "queue").exists():
        fail("NOT_FOUND: no such request")
    print((cloud / "queue").read_text())
elif verb == "describe":
    states = state.split()
    if len(states) > 1:
        (cloud / "state").write_text(" ".join(states[1:]))
    if states[0] == "GONE":
        fail("NOT_FOUND: no such machine")
    state = ready if states[0] == "READY" else states[0]
    print(state + "\t" + ";".join(f"10.0.0.{w}" for w in range(workers)) if "Endpoints" in line else state)
elif verb == "create":
    (cloud / "state").write_text("READY")
elif verb == "start":
    end_machine(keep_disk=True)
    (cloud / "state").write_text("READY")
elif verb == "delete":
    end_machine()
    (cloud / "state").write_text("GONE")
elif verb in ("ssh", "scp") and state != "READY":
    fail(f"the machine is {state}")
elif verb == "scp":
    source, target = [a for a in args if not a.startswith("--")][-2:]
    for worker in chosen():
        shutil.copy(source, homes()[worker] / target.partition(":")[2])
elif verb == "ssh" and "--command" in option:
    processes = []
    for worker in chosen()[:first]:
        environ = os.environ | {"HOME": str(homes()[worker]), "WORKER": str(worker)}
        environ["PATH"] = f"{cloud}/remote:{environ['PATH']}"
        environ.pop("TORCH_TPU_TOPOLOGY", None)
        processes.append(subprocess.Popen(["/bin/sh", "-c", option["--command"]], env=environ, cwd="/"))
    code = max([p.wait() for p in processes], default=0)
    if first is not None:
        fail("the connection broke")
    sys.exit(code)
"""
)

REMOTE_PYTHON = (
    PYTHON
    + r"""
import json, os, pathlib, shutil, signal, sys, time

cloud, worker = pathlib.Path(os.environ["CLOUD"]), os.environ["WORKER"]
args = sys.argv[1:]
if args[:2] == ["-m", "venv"]:
    bin = pathlib.Path(args[-1]) / "bin"
    if "--clear" in args:
        shutil.rmtree(args[-1], ignore_errors=True)
    bin.mkdir(parents=True)
    with open(cloud / f"venvs{worker}", "a") as file:
        file.write("{}\n")
    for name in ("python", "pip"):
        (bin / name).symlink_to(cloud / "remote" / "python3")
elif pathlib.Path(sys.argv[0]).name == "pip":
    assert pathlib.Path(args[3].partition("[")[0], "setup.cfg").exists(), args
    with open(cloud / f"pip{worker}", "a") as file:
        file.write(json.dumps(args) + "\n")
    sys.exit((cloud / "no_pip").exists())
elif args == ["-m", "torch.tpu.distributed"]:  # of torch_tpu 0.2.0
    hosts = os.environ["TPU_WORKER_HOSTNAMES"].split(",")
    print("libtpu not found.")
    print(f"WORLD_SIZE={4 * len(hosts)}")
    print(f"NODE_RANK={os.environ.get('NODE_RANK', 0)!r}")
    print(f"TORCH_TPU_TOPOLOGY={os.environ.get('TORCH_TPU_TOPOLOGY', '2,2,1')!r}")
    if len(hosts) > 1:
        print(f"NNODES='{len(hosts)}'", f"MASTER_ADDR='{hosts[0]}'", "MASTER_PORT='29500'", sep="\n")
else:
    signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(75)))
    with open(cloud / f"runs{worker}", "a+") as file:
        topology = os.environ.get("TORCH_TPU_TOPOLOGY")
        file.write(json.dumps({"args": args, "cwd": os.getcwd(), "pid": os.getpid(), "topology": topology}) + "\n")
        file.seek(0)
        number = len(file.readlines())
    plan = json.loads((cloud / "plan").read_text())
    plan = plan.get(worker, plan.get("all"))
    act = plan[min(number, len(plan)) - 1]
    print(f"worker {worker} run {number}: {act}", flush=True)
    if isinstance(act, int):
        sys.exit(act)
    if act == "vanish":
        os.killpg(0, signal.SIGKILL)
    if act == "preempt":
        (cloud / "state").write_text("PREEMPTED")
    if act == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(600):
        time.sleep(0.05)
        if (cloud / "end").exists():
            sys.exit(0)
"""
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, ("flock", "git", "setsid"))), reason="the workers are Linux machines"),
]


def write(path: pathlib.Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


# Google Cloud's metadata.
CURL = """#!/bin/sh
case "$*" in
  *agent-worker-number) echo $WORKER ;;
  *worker-network-endpoints) seq -f 'pod:id:10.0.0.%g' -s , 0 $(($(cat $CLOUD/workers) - 1)) ;;
  *) exit 22 ;;
esac
"""


class Cloud:
    """A cloud with one machine, the workstation's checkout, and a record of all calls."""

    def __init__(self, path: pathlib.Path, repository: pathlib.Path):
        self.path, self.repository = path, repository
        (path / "bin").mkdir()
        (path / "remote").mkdir()
        write(path / "bin" / "gcloud", GCLOUD)
        write(path / "remote" / "python3", REMOTE_PYTHON)
        write(path / "remote" / "curl", CURL)
        self.set("state", "READY")
        self.workers(2)
        self.plan(all=[0])
        # Of the caller's environment only what a shell needs.
        self.environ = {
            "PATH": f"{path}/bin:{os.environ['PATH']}",
            "HOME": str(path),
            "CLOUD": str(path),
            "LOG_DIR": str(path / "logs"),
            "PROJECT": "my-project",
            "ZONE": "us-west4-a",
            "TPU_NAME": "pod",
            "WORKDIR": "gs://my-bucket/run",
            "POLL_SECONDS": "0.1",
            "RESTART_PAUSE": "0.1",
            "GRACE_SECONDS": "0",
            "STOP_SECONDS": "5",
            "MAX_FAILURES": "1",
        }

    def path_without_gcloud(self) -> str:
        """A PATH with the Unix tools that the scripts need, and without gcloud."""
        tools = self.path / "tools"
        tools.mkdir(exist_ok=True)
        names = "bash cat cksum cmp cut date dirname git grep head mkdir rm sed sleep tail tr"
        for name in names.split(" "):
            if not (tools / name).exists():
                (tools / name).symlink_to(shutil.which(name))
        return str(tools)

    def set(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)

    def workers(self, count: int) -> None:
        self.set("workers", str(count))
        for worker in range(count):
            (self.path / f"home{worker}").mkdir(exist_ok=True)

    def plan(self, **acts: list) -> None:
        """Sets what the program does, per worker or on all: one act per start; the last repeats."""
        self.set("plan", json.dumps({name.removeprefix("w"): act for name, act in acts.items()}))

    def fail(self, match: str, skip: int = 0, times: int = 1000, first: int = 0) -> None:
        self.set("fail", json.dumps({"match": match, "skip": skip, "times": times, "first": first}))

    def repair(self) -> None:
        (self.path / "fail").unlink()

    def _lines(self, name: str) -> list:
        path = self.path / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def calls(self, *words: str) -> list[list[str]]:
        return [call for call in self._lines("calls") if all(word in call for word in words)]

    def runs(self, worker: int) -> list[dict]:
        return self._lines(f"runs{worker}")

    def alive(self) -> list[int]:
        """The workers on which the program runs."""
        found = []
        for worker in range(8):
            for run in self.runs(worker):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    # Z: it has ended, and nobody has read its exit code yet.
                    if pathlib.Path(f"/proc/{run['pid']}/stat").read_text().rpartition(") ")[2][0] != "Z":
                        found.append(worker)
        return found

    def start(self, *args: str, script: str = "launch/tpu_pod.sh", **environ: str) -> subprocess.Popen:
        environ = {k: v for k, v in (self.environ | environ).items() if v is not None}
        return subprocess.Popen(
            ["bash", str(self.repository / script), *args],
            env=environ,
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def launch(self, *args: str, **kwargs: str) -> subprocess.CompletedProcess:
        process = self.start(*args, **kwargs)
        out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def train(self, *args: str, **kwargs: str) -> subprocess.CompletedProcess:
        return self.launch("--gin_file=experiments/imagenet64.gin", *args, **kwargs)

    def bash(self, script: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", f"source {shlex.quote(str(self.repository / 'gcloud.bash'))}\n{script}"],
            env=self.environ | environ,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=30,
        )


def error_of(result: subprocess.CompletedProcess) -> str:
    """Returns the one-line error of a failing script."""
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, result
    assert lines[-1] == errors[0]
    return errors[0]


def wait_for(condition, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkout with the scripts, with a space in its path."""
    path = tmp_path_factory.mktemp("check out")
    for name in [*SCRIPTS, "setup.cfg", "experiments/imagenet64.gin"]:
        (path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, path / name)
    git = ["git", "-C", str(path), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    return path


@pytest.fixture
def cloud(tmp_path: pathlib.Path, repository: pathlib.Path):
    cloud = Cloud(tmp_path, repository)
    yield cloud
    for pid in tmp_path.glob("home*/jetformer_*/pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


# Training, from start to end


def test_a_run_from_start_to_end(cloud):
    cloud.workers(3)
    result = cloud.train(f"--gin_bindings={BINDINGS}", "--gin_bindings=Jet.depth = 8")
    assert result.returncode == 0, result
    for worker in range(3):
        (run,) = cloud.runs(worker)
        assert run["args"] == [
            "-m",
            "jetformer.main",
            "--workdir=gs://my-bucket/run",
            "--device=xla",
            "--gin_file=experiments/imagenet64.gin",
            f"--gin_bindings={BINDINGS}",
            "--gin_bindings=Jet.depth = 8",
        ]
        assert pathlib.Path(run["cwd"], "experiments/imagenet64.gin").exists()
        (log,) = cloud.path.glob(f"logs/pod/*/worker-{worker}.log")
        assert f"worker {worker} run 1: 0" in log.read_text()
        assert "exit code 0" in log.read_text()
        (pip,) = cloud._lines(f"pip{worker}")
        assert pip[-2:] == ["-f", "https://storage.googleapis.com/libtpu-releases/index.html"]
        assert pip[3] == "jetformer_train/source[tpu,gcs]"
    assert "worker 0 run 1: 0" in result.stdout
    assert "worker 1 run 1" not in result.stdout
    assert not list(cloud.path.glob("logs/pod/*.[0-9]*[0-9]"))  # no scraps
    assert all("--project=my-project" in call and "--zone=us-west4-a" in call for call in cloud.calls())


@pytest.mark.parametrize("hosts", [1, 3])
def test_the_native_runtime_starts_a_process_for_each_device(cloud, hosts):
    cloud.workers(hosts)
    topology = {"TORCH_TPU_TOPOLOGY": "6,2,1"} if hosts > 1 else {}
    result = cloud.train(f"--gin_bindings={BINDINGS}", RUNTIME="native", REMOTE_PYTHON="python3", **topology)
    assert result.returncode == 0, result
    for worker in range(hosts):
        (run,) = cloud.runs(worker)
        nodes = [f"--node-rank={worker}", "--master-addr=10.0.0.0", "--master-port=29500"]
        assert run["args"] == [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=4",
            f"--nnodes={hosts}",
            *(nodes if hosts > 1 else ["--standalone"]),
            "--max-restarts=0",
            "-m",
            "jetformer.main",
            "--device=tpu",
            "--workdir=gs://my-bucket/run",
            "--gin_file=experiments/imagenet64.gin",
            f"--gin_bindings={BINDINGS}",
        ]
        assert run["topology"] == ("6,2,1" if hosts > 1 else "2,2,1")
        (pip,) = cloud._lines(f"pip{worker}")
        assert pip[3:] == ["jetformer_train/source[tpu-native,gcs]"]


def test_the_native_runtime_needs_the_topology_of_several_hosts(cloud):
    assert cloud.train(RUNTIME="native", REMOTE_PYTHON="python3").returncode == 1
    (log,) = cloud.path.glob("logs/pod/*/worker-1.log")
    assert re.search("error: .*TORCH_TPU_TOPOLOGY", log.read_text())
    assert not cloud.runs(1)


def test_the_runtimes_share_no_environment(cloud):
    cloud.workers(1)
    native = {"RUNTIME": "native", "REMOTE_PYTHON": "python3"}
    for environ, made in (({}, 1), ({}, 1), (native, 2), (native, 2), ({}, 3)):
        assert cloud.train(**environ).returncode == 0
        assert len(cloud._lines("venvs0")) == made


def test_stop_ends_the_native_runtime(cloud):
    """Also if it does not end by itself: torchrun is not in the process group of the job."""
    cloud.plan(w0=["run"], w1=["stubborn"])
    environ = {"RUNTIME": "native", "REMOTE_PYTHON": "python3", "TORCH_TPU_TOPOLOGY": "4,2,1"}
    watching = cloud.start("--gin_file=a.gin", **environ)
    wait_for(lambda: cloud.alive() == [0, 1])
    assert cloud.launch("--stop", STOP_SECONDS="1", **environ).returncode == 0
    out, err = watching.communicate(timeout=30)
    assert watching.returncode == 0, err
    assert "stopped by request" in out
    assert not cloud.alive()


def test_the_output_of_a_dry_run_runs_the_job(cloud):
    result = cloud.train(f"--gin_bindings={BINDINGS}", "--dry_run", PATH=cloud.path_without_gcloud())
    assert result.returncode == 0, result
    assert not cloud.calls()
    assert not (cloud.path / "logs").exists()
    assert "restart" not in result.stderr
    pasted = subprocess.run(
        ["bash", "-euc", result.stdout], env=cloud.environ, capture_output=True, text=True, timeout=30
    )
    assert pasted.returncode == 0, pasted
    assert [len(cloud.runs(worker)) for worker in range(2)] == [1, 1]
    assert cloud.runs(1)[0]["args"][-1] == f"--gin_bindings={BINDINGS}"
    done = cloud.calls()
    # The script itself makes these calls in this order, and polls more often.
    cloud.set("calls", "")
    assert cloud.train(f"--gin_bindings={BINDINGS}").returncode == 0
    anonymous = lambda calls: [re.sub(r"\d{8}-\d{6}-\d+-\d+", "START", json.dumps(call)) for call in calls]
    calls = anonymous(cloud.calls())
    # Streaming runs beside polling.
    assert set(anonymous(done)) <= set(calls)
    order = [call for call in anonymous(done) if "remote_stream" not in call]
    assert [calls.index(call) for call in order] == sorted(calls.index(call) for call in order)


def test_a_dry_run_prints_the_commands_after_a_preemption(cloud):
    kinds = {"spot": "tpu-vm create pod", "queue": "queued-resources create pod"}
    for provisioning, command in kinds.items():
        result = cloud.train(DRY_RUN="1", PROVISIONING=provisioning, ACCELERATOR_TYPE="a", RUNTIME_VERSION="b")
        assert f"gcloud compute tpus {command} " in result.stdout
        assert ("--spot" in result.stdout) == (provisioning == "spot")
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("script", "variable"),
    [(script, name) for script in ("tpu_pod.sh", "eval_job.sh") for name in ("PROJECT", "ZONE", "WORKDIR")]
    + [("tpu_pod.sh", name) for name in ("TPU_NAME", "ACCELERATOR_TYPE", "RUNTIME_VERSION")]
    + [("eval_job.sh", name) for name in ("EVAL_NAME", "EVAL_MACHINE", "ACCELERATOR_TYPE", "RUNTIME_VERSION")],
)
def test_a_missing_variable_is_named(cloud, script, variable):
    full = {"EVAL_NAME": "eval", "EVAL_MACHINE": "tpu", "PROVISIONING": "spot"}
    full |= {"ACCELERATOR_TYPE": "v5litepod-16", "RUNTIME_VERSION": "v"}
    result = cloud.train(script=f"launch/{script}", **(full | {variable: ""}))
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {variable} is not set; set it with: export {variable}=")
    assert result.stderr.count("\n") == 1
    assert not cloud.calls()
    assert not (cloud.path / "logs").exists()


@pytest.mark.parametrize(
    ("args", "environ", "words"),
    [
        ([], {}, "--gin_file="),
        (["--gin_file=a", "--workdir=b"], {}, "WORKDIR"),
        (["--gin_file=a"], {"RUNTIME": "jax"}, "RUNTIME=jax"),
        (["--gin_file=a", "--device=cpu"], {}, "--device"),
        (["--gin_file=a"], {"PROVISIONING": "spott"}, "PROVISIONING"),
    ],
)
def test_invalid_arguments_are_refused_before_any_call(cloud, args, environ, words):
    result = cloud.launch(*args, **({"ACCELERATOR_TYPE": "a", "RUNTIME_VERSION": "b"} | environ))
    assert result.returncode == 2
    assert words in error_of(result)
    assert not cloud.calls()


def test_a_missing_gcloud_is_named(cloud):
    result = cloud.train(PATH=cloud.path_without_gcloud())
    assert result.returncode == 2
    assert "gcloud" in error_of(result)


def test_uncommitted_files_are_named(cloud, repository):
    extra = repository / "mine.gin"
    extra.write_text("")
    try:
        result = cloud.train("--dry_run")
    finally:
        extra.unlink()
    assert re.search(r"^warning: .* mine\.gin", result.stderr, re.M)


# Interruptions


def test_exit_code_75_restarts_all_workers_together(cloud):
    cloud.plan(w0=["run", 0], w1=[75, 0])
    result = cloud.train()
    assert result.returncode == 0, result
    assert [len(cloud.runs(worker)) for worker in range(2)] == [2, 2]
    assert cloud.runs(0)[0]["args"] == cloud.runs(0)[1]["args"]
    first, second = sorted(cloud.path.glob("logs/pod/*/worker-1.log"))
    assert "run 1: 75" in first.read_text()
    assert "run 2: 0" in second.read_text()
    assert len(cloud.calls("scp")) == 1  # the same VM, the same source


def test_a_host_that_restarts_is_an_interruption_too(cloud):
    cloud.plan(w0=[134, 0], w1=["vanish", 0])  # 134: a worker may die of it when another is gone
    assert cloud.train(GRACE_SECONDS="5").returncode == 0
    assert [len(cloud.runs(worker)) for worker in range(2)] == [2, 2]


def test_restarts_are_bounded(cloud):
    cloud.workers(1)
    cloud.plan(all=[75])
    result = cloud.train(MAX_RESTARTS="1")
    assert result.returncode == 1
    assert "MAX_RESTARTS" in error_of(result)
    assert len(cloud.runs(0)) == 2


def test_another_exit_code_stops_all_and_names_the_log(cloud):
    cloud.plan(w0=["run"], w1=[3])
    result = cloud.train()
    assert result.returncode == 1
    error = error_of(result)
    assert re.search(r"worker 1 of pod .*\b3\b", error)
    assert "run 1: 3" in pathlib.Path(error.rpartition(" ")[2]).read_text()
    assert not cloud.alive()
    assert [len(cloud.runs(worker)) for worker in range(2)] == [1, 1]
    # Once fixed, the same command starts again.
    cloud.plan(all=[0])
    assert cloud.train().returncode == 0


def test_a_preempted_vm_on_demand_ends_the_script(cloud):
    cloud.workers(1)
    cloud.plan(all=["preempt"])
    result = cloud.train()
    assert result.returncode == 1
    assert "pod is PREEMPTED" in error_of(result)
    assert not cloud.calls("delete")


@pytest.mark.parametrize("provisioning", ["spot", "queue_spot"])
def test_a_preempted_vm_is_created_again_as_it_was(cloud, provisioning):
    cloud.plan(w0=["preempt", 0], w1=["run", 0])
    cloud.environ |= {"ACCELERATOR_TYPE": "v5litepod-16", "RUNTIME_VERSION": "v2-alpha-tpuv5-lite"}
    result = cloud.train(PROVISIONING=provisioning)
    assert result.returncode == 0, result
    assert [len(cloud.runs(worker)) for worker in range(2)] == [2, 2]
    assert [len(cloud._lines(f"pip{worker}")) for worker in range(2)] == [2, 2]  # installed again
    (create,) = cloud.calls("create")
    assert "--spot" in create
    assert ("queued-resources" in create) == provisioning.startswith("queue")
    verbs = [call[3] for call in cloud.calls() if call[3] in ("create", "delete")]
    assert verbs == ["delete", "create"]


def test_creating_again_is_bounded(cloud):
    cloud.workers(1)
    cloud.plan(all=["preempt"])
    cloud.fail('"create"')
    environ = {"ACCELERATOR_TYPE": "a", "RUNTIME_VERSION": "b", "PROVISIONING": "spot", "MAX_RESTARTS": "2"}
    result = cloud.train(**environ)
    assert result.returncode == 1
    assert "MAX_RESTARTS" in error_of(result)
    assert len(cloud.calls("create")) == 2


def test_a_machine_that_never_existed_is_not_created(cloud):
    cloud.set("state", "GONE")
    result = cloud.train(ACCELERATOR_TYPE="a", RUNTIME_VERSION="b", PROVISIONING="spot")
    assert result.returncode == 1
    assert "pod in us-west4-a of my-project" in error_of(result)
    assert not cloud.calls("create")


def test_waits_for_a_machine_in_the_queue(cloud):
    cloud.workers(1)
    cloud.set("state", "GONE CREATING READY")
    cloud.set("queue", "WAITING_FOR_RESOURCES")
    result = cloud.train(ACCELERATOR_TYPE="a", RUNTIME_VERSION="b", PROVISIONING="queue_spot")
    assert result.returncode == 0, result
    assert "pod is in the queue: WAITING_FOR_RESOURCES" in result.stdout


# Failures halfway

STEPS = {
    "describe": "describe",
    "status": "remote_status",
    "stop old processes": "remote_stop",
    "copy the source": "scp",
    "install": "remote_install",
    "start": "remote_start",
}


@pytest.mark.parametrize("step", STEPS)
def test_after_a_failure_of_gcloud_the_same_command_resumes(cloud, step):
    cloud.fail(STEPS[step], first=1 if "remote" in STEPS[step] else 0)  # it succeeds on one of the two workers
    result = cloud.train()
    assert result.returncode == 1
    assert f"step '{step}' failed" in error_of(result)
    assert "the connection broke" in error_of(result)
    cloud.repair()
    result = cloud.train()
    assert result.returncode == 0, result
    assert len(cloud.runs(1)) == 1


def test_a_partial_start_is_undone_before_the_next(cloud):
    cloud.plan(w0=["run", 0], w1=[0])
    cloud.fail("remote_start", first=1)
    assert cloud.train(MAX_FAILURES="0").returncode == 1
    wait_for(lambda: cloud.alive() == [0])  # a program says so itself, once it runs
    cloud.repair()
    result = cloud.train()
    assert result.returncode == 0, result
    assert "not all workers run the same start" in result.stdout
    assert [len(cloud.runs(worker)) for worker in range(2)] == [2, 1]


@pytest.mark.parametrize("step", ["describe", "start"])
def test_a_transient_failure_is_retried(cloud, step):
    cloud.fail(STEPS[step], times=1)
    assert cloud.train().returncode == 0
    assert [len(cloud.runs(worker)) for worker in range(2)] == [1, 1]


def test_a_failed_installation_is_not_retried(cloud):
    cloud.set("no_pip", "")
    result = cloud.train()
    assert result.returncode == 1
    assert re.search(r"step 'install' failed on worker \d of pod: .*install\.log", error_of(result))
    assert len(cloud._lines("pip0")) == 1
    assert not cloud.runs(0)


# Attaching, stopping


def test_the_run_outlives_the_script_which_attaches_again(cloud):
    cloud.plan(all=["run"])
    args = ["--gin_file=experiments/imagenet64.gin"]
    first = cloud.start(*args)
    wait_for(lambda: cloud.calls("--worker=0"))
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=30)
    assert first.returncode == 130
    assert "--stop" in out
    wait_for(lambda: cloud.alive() == [0, 1])  # a program says so itself, once it runs
    # Another command leaves it alone.
    result = cloud.launch(*args, "--gin_bindings=Jet.depth = 1")
    assert result.returncode == 1
    assert re.search(r"^error: pod .*--stop$", error_of(result))
    # The same one attaches, and sees it to its end.
    second = cloud.start(*args)
    wait_for(lambda: len(cloud.calls("--worker=0")) == 2)
    cloud.set("end", "")
    out, err = second.communicate(timeout=30)
    assert second.returncode == 0, err
    assert "attached" in out
    assert "worker 0 run 1: run" in out
    assert [len(cloud.runs(worker)) for worker in range(2)] == [1, 1]
    assert len(cloud.calls("scp")) == 1


def test_a_broken_stream_is_resumed(cloud):
    cloud.plan(all=["run"])
    cloud.fail("remote_stream", times=1)
    process = cloud.start("--gin_file=a.gin")
    wait_for(lambda: len(cloud.calls("--worker=0")) == 2)
    cloud.set("end", "")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "worker 0 run 1: run" in out


def test_stop_ends_the_run_and_the_script_that_watches_it(cloud):
    cloud.plan(w0=["run"], w1=["stubborn"])
    watching = cloud.start("--gin_file=a.gin")
    wait_for(lambda: cloud.calls("--worker=0"))
    assert cloud.launch("--stop", STOP_SECONDS="1").returncode == 0
    out, err = watching.communicate(timeout=30)
    assert watching.returncode == 0, err
    assert "stopped by request" in out
    assert not cloud.alive()
    (log,) = cloud.path.glob("logs/pod/*/worker-0.log")
    assert "saved" in log.read_text()
    assert len(cloud.runs(0)) == 1


def test_a_worker_starts_no_second_program_beside_the_first(cloud):
    cloud.workers(1)
    cloud.plan(all=["run"])
    process = cloud.start("--gin_file=a.gin")
    wait_for(lambda: cloud.calls("--worker=0"))
    (start,) = [call for call in cloud.calls("--worker=all") if "remote_start" in call[-1]]
    gcloud = lambda call: subprocess.run(["gcloud", *call], env=cloud.environ, capture_output=True, text=True)
    again = gcloud(start)
    assert again.stdout == "launch: 0 ok\n"  # gcloud repeats a broken call: that is no second start
    other = gcloud([re.sub(r"\d{8}-\d{6}-\d+-\d+", "other", a).replace("--wait 10", "--wait 0") for a in start])
    assert other.stdout.startswith("launch: 0 failed")
    assert len(cloud.runs(0)) == 1
    cloud.set("end", "")
    process.communicate(timeout=30)
    assert process.returncode == 0


# Evaluation


@pytest.mark.parametrize(("machine", "device"), [("tpu", "xla"), ("vm", "auto")])
def test_an_evaluation_on_another_machine(cloud, machine, device):
    cloud.workers(1)
    cloud.plan(all=[75, 0])
    result = cloud.launch(script="launch/eval_job.sh", EVAL_NAME="eval", EVAL_MACHINE=machine)
    assert result.returncode == 0, result
    assert len(cloud.runs(0)) == 2
    args = cloud.runs(0)[0]["args"]
    assert args == ["-m", "jetformer.evaluate", "--workdir=gs://my-bucket/run", f"--device={device}"]
    assert len(list(cloud.path.glob("logs/eval/*/worker-0.log"))) == 2
    assert all("pod" not in call for call in cloud.calls())
    tpu = [call[1] == "tpus" for call in cloud.calls()]
    assert all(tpu) if machine == "tpu" else not any(tpu)


def test_an_evaluation_on_several_hosts_is_refused(cloud):
    result = cloud.launch(script="launch/eval_job.sh", EVAL_NAME="eval", EVAL_MACHINE="tpu")
    assert result.returncode == 1
    assert "eval has 2 hosts" in error_of(result)


def test_a_preempted_vm_is_started_again(cloud):
    cloud.workers(1)
    cloud.plan(all=["preempt", 0])
    environ = {"EVAL_NAME": "eval", "EVAL_MACHINE": "vm"}
    result = cloud.launch(script="launch/eval_job.sh", PROVISIONING="spot", **environ)
    assert result.returncode == 0, result
    assert cloud.calls("instances", "start", "eval")
    assert len(cloud.runs(0)) == 2


# gcloud.bash

PLACE = ["--zone=us-west4-a", "--project=my-project"]
KIND = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]
QUEUED = ["--node-id=pod", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
TPU = ["compute", "tpus", "tpu-vm"]
QUEUE = ["compute", "tpus", "queued-resources"]
FUNCTIONS = {
    "tpu_create": [*TPU, "create", "pod", *PLACE, *KIND],
    "tpu_create_spot": [*TPU, "create", "pod", *PLACE, *KIND, "--spot"],
    "tpu_queue": [*QUEUE, "create", "pod", *PLACE, *QUEUED],
    "tpu_queue_spot": [*QUEUE, "create", "pod", *PLACE, *QUEUED, "--spot"],
    "tpu_list": [*TPU, "list", *PLACE],
    "tpu_queue_list": [*QUEUE, "list", *PLACE],
    "tpu_ssh": [*TPU, "ssh", "pod", *PLACE],
    "tpu_delete": [*TPU, "delete", "pod", *PLACE, "--quiet"],
    "tpu_queue_delete": [*QUEUE, "delete", "pod", *PLACE, "--force", "--quiet"],
    "bucket_create": [
        *["storage", "buckets", "create", "gs://my-bucket", "--project=my-project", "--location=us-west4"],
        "--uniform-bucket-level-access",
    ],
    "bucket_list": ["storage", "buckets", "list", "--project=my-project", "--format=value(name,location)"],
    "bucket_delete": ["storage", "rm", "--recursive", "gs://my-bucket", "--project=my-project"],
}
VARIABLES = {
    "ACCELERATOR_TYPE": "v5litepod-16",
    "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
    "BUCKET": "my-bucket",
    "LOCATION": "us-west4",
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_of_gcloud_bash(cloud, function):
    yes = "--yes" if "delete" in function else ""
    dry = [cloud.bash(f"{function} --dry_run", **VARIABLES), cloud.bash(function, DRY_RUN="1", **VARIABLES)]
    assert not cloud.calls()
    result = cloud.bash(f"{function} {yes} '--labels=a=b c'", **VARIABLES)
    assert result.returncode == 0, result
    assert cloud.calls() == [[*FUNCTIONS[function], "--labels=a=b c"]]
    assert [shlex.split(result.stdout) for result in dry] == [["gcloud", *FUNCTIONS[function]]] * 2


@pytest.mark.parametrize("function", [*FUNCTIONS, "tpu_watch"])
def test_a_function_names_its_missing_variable(cloud, function):
    result = cloud.bash(f"PROJECT=; {function}; echo still here: $?", **VARIABLES)
    assert result.stdout == "still here: 2\n"
    assert result.stderr.startswith("error: PROJECT is not set; set it with: export PROJECT=")
    assert result.stderr.count("\n") == 1
    assert not cloud.calls()


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if "delete" in name])
def test_deletion_asks(cloud, function):
    for answer in ("", "n\n"):
        result = cloud.bash(function, stdin=answer, **VARIABLES)
        assert result.returncode == 1
        assert result.stderr.endswith("nothing was deleted\n")
        assert not cloud.calls()
    assert cloud.bash(function, stdin="y\n", **VARIABLES).returncode == 0
    assert len(cloud.calls()) == 1


def test_tpu_watch_ends_when_the_tpu_is_ready_or_will_not_be(cloud):
    cloud.set("state", "GONE GONE CREATING READY")
    cloud.set("queue", "WAITING_FOR_RESOURCES")
    result = cloud.bash("tpu_watch", WATCH_SECONDS="0.05")
    assert [line.partition(" pod: ")[2] for line in result.stdout.splitlines()] == [
        "queue: WAITING_FOR_RESOURCES",
        "CREATING",
        "READY",
    ]
    assert result.returncode == 0
    cloud.set("state", "PREEMPTED")
    assert cloud.bash("tpu_watch", WATCH_SECONDS="0.05").returncode == 1


def test_sourcing_changes_no_option_of_the_shell_and_a_failure_does_not_end_it(cloud):
    options = "{ shopt -p; set +o; } >"
    script = f"{options}1; PATH={cloud.path_without_gcloud()}; tpu_list; tpu_ssh; {options}2; cmp 1 2 && echo same"
    source = f"cd {cloud.path}; {{ shopt -p; set +o; }} >0; source '{cloud.repository}/gcloud.bash'; {script}; cmp 0 1"
    result = subprocess.run(["bash", "-c", source], env=cloud.environ, capture_output=True, text=True)
    assert result.stdout == "same\n"
    assert result.returncode == 0
    assert result.stderr.count("error: gcloud ") == 2


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_printed_commands_read_back_as_they_were(cloud, shell):
    words = [BINDINGS, "", "a b", "it's", "two\nlines", "--x=(1, 2)", "&\\&", "~", "plain-1.0/x,y:z@%+="]
    quoted = cloud.bash("_gcloud_quote " + " ".join(map(shlex.quote, words))).stdout
    script = f"{PYTHON[2:].strip()} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' {quoted}"
    assert json.loads(subprocess.run([shell, "-c", script], capture_output=True, check=True).stdout) == words


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, check=True)


def test_lines_are_at_most_120_characters():
    for name in SCRIPTS:
        assert max(map(len, (ROOT / name).read_text().splitlines())) <= 120
