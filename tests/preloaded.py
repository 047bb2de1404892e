"""Starts Python programs by forking a process that has imported torch and TensorFlow, which otherwise takes seconds.

python preloaded.py --serve SOCKET    the server: one program at a time
python preloaded.py SOCKET ARGS...    the client: like `python ARGS...` for `-m MODULE ...` and `FILE ...`
"""

import json
import os
import runpy
import socket
import sys


def client(address: str, args: list[str]) -> int:
    """Returns the program's exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        request = json.dumps({"args": args, "directory": os.getcwd(), "environ": dict(os.environ)}).encode()
        socket.send_fds(connection, [len(request).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(request)
        return int.from_bytes(connection.recv(1), "big")


def serve(address: str) -> None:
    """Forks a process for each request; returns in these processes, once the program has ended."""
    import jetformer  # noqa: F401, I001 (before TensorFlow)
    import torch.distributed.checkpoint  # noqa: F401
    import clu.metric_writers  # noqa: F401
    import plotly.graph_objects  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import tensorflow_datasets  # noqa: F401

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            connection, _ = server.accept()
            with connection:
                size, files, _, _ = socket.recv_fds(connection, 4, 3)
                request = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
                process = os.fork()
                if not process:
                    break
                for file in files:
                    os.close(file)
                code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                connection.sendall(bytes([code % 256]))
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environ"])
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    run(request["args"])


def run(args: list[str]) -> None:
    """Runs a program as `__main__` in this process."""
    if args[0] == "-m":
        sys.argv = args[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = args
        sys.path[0] = os.path.dirname(os.path.abspath(args[0]))
        runpy.run_path(args[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        sys.exit(client(sys.argv[1], sys.argv[2:]))
