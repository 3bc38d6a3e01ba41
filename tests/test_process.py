"""kit/process.py: files that are whole or not there, and the last words of a program."""
import kit
from conftest import ROOT, one_line

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_a_full_disk_is_said_in_words_and_loses_nothing(capsys):
    """A write that fails half-way leaves the old file whole and no debris."""
    kit.process.atomic_write("file", lambda file: file.write(b"old"))

    def full(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")
    assert "No space left" in one_line(capsys, lambda _: kit.process.atomic_write("file", full))
    assert Path("file").read_bytes() == b"old" and os.listdir() == ["file"]


def test_a_signal_in_the_middle_of_a_save_stays_a_signal():
    """torch.save turns what interrupts it into an error of its own; it is not taken for a full disk, and the
    old file stays."""
    class Interrupted:
        def __init__(self, file):
            self.file, self.count = file, 0

        def write(self, part):
            self.count += 1
            if self.count == 9:
                raise KeyboardInterrupt
            return self.file.write(part)

        def flush(self):
            self.file.flush()
    kit.process.atomic_write("file", lambda file: file.write(b"old"))
    state = {str(i): torch.zeros(1000) for i in range(9)}
    with pytest.raises(KeyboardInterrupt):
        kit.process.atomic_write("file", lambda file: torch.save(state, Interrupted(file)))
    assert Path("file").read_bytes() == b"old" and os.listdir() == ["file"]


MEMORY = "out of memory: lower --batch, --micro or --channels"


@pytest.mark.parametrize("raised, code, text", [
    ("MemoryError()", 2, MEMORY),
    ("torch.OutOfMemoryError('CUDA out of memory')", 2, MEMORY),
    ("KeyboardInterrupt()", -signal.SIGINT, "stopped"), ("ValueError('a bug')", 1, "ValueError: a bug"),
    ("BrokenPipeError()", 128 + signal.SIGPIPE, "")])
def test_last_words(raised, code, text):
    """A lack of memory and Ctrl-C end in one line, without a promise of --resume where nothing was saved, a
    closed pipe in none; a bug keeps its traceback."""
    words = [sys.executable, "-c", f"import kit, torch; raise {raised}"]
    done = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == code and done.stderr.strip().split("\n")[-1] == text
    assert ("Traceback" in done.stderr) == (code == 1)


def test_progress_without_a_terminal(capsys):
    """Lines instead of a bar that overwrites itself, and none for what takes less than their interval."""
    assert list(kit.process.progress(range(3))) == [0, 1, 2] and capsys.readouterr().err == ""
    list(kit.process.progress(range(3), every=0, desc="write"))
    printed = capsys.readouterr().err
    assert "\r" not in printed and "write: 100%" in printed.splitlines()[-1]


@pytest.mark.parametrize("code, exit_code, said", [
    ("import not_installed.part", 2, "the package not_installed is missing: pip install not_installed"),
    ("import kit.not_there", 1, "Traceback"), ("print('\\xfc')", 0, "")])
def test_end_of_a_program(code, exit_code, said):
    """A missing package is one line, a bug of ours keeps its traceback, and a terminal that cannot show a
    name is no reason to stop."""
    environment = os.environ | dict(PYTHONIOENCODING="ascii:strict")
    end = subprocess.run([sys.executable, "-c", f"import kit.process; {code}"], cwd=ROOT, env=environment,
                         capture_output=True, text=True)
    assert end.returncode == exit_code and said in end.stderr
