"""What a process is said to have taken is what it took itself."""

import subprocess
import sys

from slimllm.utils import memory
from tests.conftest import ROOT

CODE = "from slimllm.utils import memory; print(memory.peak_memory()['cpu_bytes'])"


def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    """Some systems count it: a small run started by a large program would look large."""
    ballast = bytearray(2_000_000_000)
    for i in range(0, len(ballast), 4096):
        ballast[i] = 1
    own = memory.peak_memory()["cpu_bytes"]
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert own > 2e9 > 1.5e9 > int(done.stdout), done.stderr
