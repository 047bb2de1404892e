"""Starts Python programs by forking a process that has imported torch and TensorFlow, which otherwise takes seconds.

python preloaded.py DIRECTORY ARGS...    like `python ARGS...` for `-m MODULE ...`, `-c CODE ...` and `FILE ...`

The servers that fork, one for the CPU, one for XLA and one for each further process of torchrun (whose hash seeds
differ, as those of real processes), are started when they are first needed. They end with the process whose id is the
name of DIRECTORY, and delete the directory it is in. Signals reach the program; it ends with the process that was
started for it.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

MODULES = (
    "jetformer",  # before TensorFlow
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "tensorflow_datasets",
    "clu.metric_writers",
    "pydantic",
    "sklearn.cluster",
    "sklearn.linear_model",
)
FORWARDED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


def client(directory: str, args: list[str]) -> int:
    """Runs a program in a fork of a server, and returns its exit code."""
    address = os.path.join(
        directory, f"{'xla' if 'PJRT_DEVICE' in os.environ else ''}{os.environ.get('LOCAL_RANK', 0)}"
    )
    with open(os.path.join(directory, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(address):
            start_server(address)
    request = {
        "args": args,
        "directory": os.getcwd(),
        "environ": dict(os.environ),
        "ignored": [signum for signum in FORWARDED if signal.getsignal(signum) == signal.SIG_IGN],
    }
    message = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        socket.send_fds(connection, [len(message).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(message)
        process = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")

        def forward(signum, frame):
            del frame
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signum)

        for signum in FORWARDED:
            signal.signal(signum, forward)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        code = os.waitstatus_to_exitcode(int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big"))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def start_server(address: str) -> None:
    """Returns once the server listens."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(f"{address}.log", "w") as log:
        command = [sys.executable, __file__, "--serve", address]
        server = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    while not os.path.exists(address):
        if server.poll() is not None:
            sys.exit(f"error: the server has ended: see {address}.log")
        time.sleep(0.05)


def serve(address: str) -> None:
    """Forks a process for each request."""
    before_tensorflow = ["torch_xla"] if "PJRT_DEVICE" in os.environ else []
    for module in (*before_tensorflow, *MODULES):
        importlib.import_module(module)
    gc.freeze()  # a collection in a fork would copy the memory of all objects
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    owner = os.pidfd_open(int(os.path.basename(os.path.dirname(address))))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{address}.new")
        server.listen()
        os.rename(f"{address}.new", address)
        while True:
            ready, _, _ = select.select([server, owner], [], [])
            if owner in ready:
                return shutil.rmtree(os.path.dirname(os.path.dirname(address)), ignore_errors=True)
            connection, _ = server.accept()
            if not os.fork():
                server.close()
                return keep(connection)
            connection.close()


def keep(connection: socket.socket) -> None:
    """Runs a program in a further process, and tells the client how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(connection, 4, 3)
    request = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    process = os.fork()
    if not process:
        connection.close()
        return run(request, files)
    for file in files:
        os.close(file)
    connection.sendall(process.to_bytes(4, "big"))
    ready, _, _ = select.select([os.pidfd_open(process), connection], [], [])
    if connection in ready:  # the client was killed
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(status.to_bytes(4, "big"))
    os._exit(0)


def run(request: dict, files: list[int]) -> None:
    """Runs a program as `__main__` in this process, and ends it as the interpreter does, but for the seconds that
    freeing all objects takes."""
    code = 0
    try:
        run_program(request, files)
    except KeyboardInterrupt:
        code = -signal.SIGINT
        sys.excepthook(*sys.exc_info())
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            code = error.code or 0
        else:
            code = 1
            print(error.code, file=sys.stderr)
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def run_program(request: dict, files: list[int]) -> None:
    import torch

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for signum in FORWARDED:
        default = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
        signal.signal(signum, signal.SIG_IGN if signum in request["ignored"] else default)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environ"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()))  # OpenMP has read the server's
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]  # it reads variables when it is imported
    args = request["args"]
    if args[0] == "-m":
        sys.argv = args[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    elif args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        sys.path[0] = ""
        module = type(sys)("__main__")
        sys.modules["__main__"] = module
        exec(compile(args[1], "<string>", "exec"), module.__dict__)
    else:
        sys.argv = args
        sys.path[0] = os.path.dirname(os.path.abspath(args[0]))
        runpy.run_path(args[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        sys.exit(client(sys.argv[1], sys.argv[2:]))
