"""tests/claims.py: its commands are what the scripts take, and a claim runs to its table and chart."""
import kit

import shutil
from pathlib import Path

import claims
import pytest


def main_of(command, out):
    """claims.train_once without a process of its own."""
    script, *flags = command.split()
    __import__(script[:-3]).main([*flags, "--out", out, "--overwrite"])
    return out


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_commands(name, folder):
    """The script of each row takes the row's flags, and no two rows of a claim are the same run."""
    teacher = "--dataset folder --image_size 16 --mode diffusion --channels 8 --steps 1 --data"
    claim = claims.CLAIMS[name]
    if name.endswith("-images"):
        main_of(f"scm.py {teacher} {folder}", claims.TEACHER)
    first = main_of(f"{claim.first} --steps 1", "first") if claim.first else ""
    commands = [command.format(first=first) for command in claim.runs.values()]
    assert len(set(commands)) == len(commands)
    for command in commands:
        script, *flags = command.split()
        module = __import__(script[:-3])
        flags += ["--data", str(folder)] * ("folder" in flags)
        cfg = kit.parse_args(module.Config, module.PRESETS, module.LOSSES, flags)
        assert cfg.teacher or not cfg.distills()
    shutil.rmtree("out", ignore_errors=True)


@pytest.mark.parametrize("name, rows, columns", [("ict", 2, 3), ("intervals", 7, 3), ("guidance", 4, 3)])
def test_a_claim_ends_in_a_table(name, rows, columns, monkeypatch, capsys):
    """One row a run, a column for each number of steps and one for E; and the chart, if the claim has one."""
    if claims.CLAIMS[name].chart:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(claims, "train_once", main_of)
    claims.main([name, "--seeds", "1", "--steps", "2", "--samples", "50", "--out", "claims"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + rows and all(line.count("|") == columns + 2 for line in table)
    assert Path("claims", name, "chart.png").exists() == bool(claims.CLAIMS[name].chart)


def test_the_toy_table(monkeypatch, capsys):
    """A row a mode with a range for each number of steps, that of the exact ODE last; and the picture."""
    monkeypatch.setattr(claims, "train_once", main_of)
    monkeypatch.setattr(claims, "TOY", dict(scm=("diffusion", "scd"), multistep_cm=("ct",)))
    claims.main(["toy", "--seeds", "1", "--steps", "2", "--samples", "50", "--out", "claims"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == ["scm", "scm", "multistep_cm", "exact ODE"]
    assert all(line.count("(") == 4 for line in lines[2:5]) and Path("claims/toy/eval.png").exists()
