"""The console script: `jetformer train …` is `python -m jetformer.main …`, and so on."""

import os
import runpy
import sys

PROGRAMS = {
    "train": ("jetformer.main", "train an experiment, or resume its run"),
    "evaluate": ("jetformer.evaluate", "evaluate the checkpoints of a run, also as they appear"),
    "sample": ("jetformer.sample", "sample images or texts from a trained model"),
    "report": ("jetformer.report", "write a run, or several, as a page"),
    "convert": ("jetformer.convert", "convert weights of other implementations, and runs to safetensors"),
    "benchmark": ("jetformer.benchmark", "measure a training step and sampling"),
    "inspect": ("jetformer.data.inspect", "draw the examples that an experiment trains on"),
}


def main() -> None:
    """Runs the program that the first argument names, with the other arguments."""
    command, *args = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h"):
        print("usage: jetformer COMMAND FLAGS…, and jetformer COMMAND --help\n")
        for name, (module, what) in PROGRAMS.items():
            print(f"  {name:10}{what} (python -m {module})")
        return
    if command not in PROGRAMS:
        sys.exit(f"error: there is no command {command!r}; expected one of {', '.join(PROGRAMS)}")
    sys.path[0] = os.getcwd()  # as `python -m`: a gin file may import a module from there
    sys.argv = [sys.argv[0], *args]
    runpy.run_module(PROGRAMS[command][0], run_name="__main__", alter_sys=True)
