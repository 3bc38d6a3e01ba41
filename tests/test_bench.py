"""tests/bench.py gpu: the whole list of checks, in its tiny form for a machine without a GPU."""
import common

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(common.__file__).parent / "tests" / "bench.py"

NAMES = ["attention", "run", "profile", "xxl", "compile", "resume", "tangent", "jvp", "two_processes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, bench.py gpu is run by hand")
def test_the_list_runs_on_the_cpu():
    """It says that there is no CUDA, every check passes and leaves a figure, and the files say the same."""
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, BENCH, "gpu", "--out", "gpu"], capture_output=True, text=True,
                          env=environment)
    assert not done.returncode, done.stdout + done.stderr[-2000:]
    found = json.loads(Path("gpu/gpu.json").read_text())
    assert "no CUDA" in found["device"] and [row["check"] for row in found["checks"]] == NAMES
    assert all(row["passed"] and row["figure"] for row in found["checks"])
    assert Path("gpu/gpu.md").read_text().count("| pass |") == len(NAMES)
