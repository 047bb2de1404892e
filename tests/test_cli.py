"""The console script: each command is its program."""

import os
import re
import subprocess
import sys

import pytest

from jetformer.cli import PROGRAMS
from runs import start

SCRIPT = os.path.join(os.path.dirname(sys.executable), "jetformer")
SAME = "import sys; from jetformer.cli import main; sys.argv[0] = 'jetformer'; main()"


def run(args) -> tuple[int, str, str]:
    process = start(args)
    out, log = process.communicate(timeout=300)
    return process.returncode, out, log


def test_the_script_lists_the_commands():
    out = subprocess.run([SCRIPT], check=True, capture_output=True, text=True).stdout
    assert re.findall(r"^  (\w+) .*\(python -m (\S+)\)$", out, re.M) == [
        (k, module) for k, (module, _) in PROGRAMS.items()
    ]


def test_there_is_no_such_command():
    ended = subprocess.run([SCRIPT, "trian"], capture_output=True, text=True)
    assert ended.returncode == 1
    assert re.fullmatch(r"error: .*'trian'.*\btrain\b.*\n", ended.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("command", PROGRAMS)
def test_a_command_is_its_program(command):
    """It has the same flags, and ends in the same line without any."""
    by_name, by_module = [sys.executable, "-c", SAME, command], [sys.executable, "-m", PROGRAMS[command][0]]
    shown = [re.findall(r"^ +(--\S+):", run([*args, "--help"])[1], re.M) for args in (by_name, by_module)]
    assert shown[0] == shown[1]
    assert len(shown[0]) > 1
    assert run([*by_name, "surplus"])[::2] == run([*by_module, "surplus"])[::2]
