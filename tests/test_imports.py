"""The import graph of the package: no circle, and dependencies point one way."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

import jetformer

ROOT = pathlib.Path(jetformer.__file__).parent

# From the top to the bottom: a module imports none of the layers above its own.
LAYERS = (
    {"main", "evaluate", "sample", "benchmark", "fit_pca", "convert.__main__", "report.__main__", "data.inspect"},
    {"trained", "sample_files", "plan"},
    {"trainer"},
    {"state", "run_files"},
    {"experiment"},
    {"loops.torch_loop", "loops.xla_loop"},
    {"loops.base"},
    {"objectives"},
    {"models.jetformer", "models.language_model", "models.labelled"},
    {"models.jet", "models.tarflow", "models.decoder", "models.mixture", "models.vit", "models.patches"}
    | {"models.invertible"},
    {"models.attention", "models.initializers", "models.activations", "prng", "storage", "ranges"},
)


def name_of(file: pathlib.Path) -> str:
    """Returns the name of a module without the package's: "loops.base"; "" for the package itself."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in ROOT.rglob("*.py")}


def imported(name: str) -> set[str]:
    """Returns what a module imports of the package, wherever in the file, also for type checking only."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jetformer":
            base = node.module.removeprefix("jetformer").removeprefix(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}".removeprefix(".")
                found.add(whole if whole in FILES else base)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "jetformer"]
            found |= {name.removeprefix("jetformer").removeprefix(".") for name in names}
    return found - {name}


GRAPH = {name: imported(name) for name in FILES}


def reachable(name: str) -> set[str]:
    found, new = set(), {name}
    while new:
        found |= new
        new = set().union(*(GRAPH[module] for module in new)) - found
    return found - {name}


def test_there_is_no_circle():
    tuple(graphlib.TopologicalSorter(GRAPH).static_order())


def test_dependencies_point_downwards():
    above = set()
    for layer in LAYERS:
        for module in layer & GRAPH.keys():
            assert not reachable(module) & above, module
        above |= layer


def test_the_layers_exist():
    assert set().union(*LAYERS) <= GRAPH.keys()


@pytest.mark.slow
@pytest.mark.parametrize("program", ["benchmark", "sample_files"])
def test_programs_import_no_tensorflow(program):
    """`runtime.initialize` has to import torch_xla before it."""
    code = f"import sys, jetformer.{program}; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
