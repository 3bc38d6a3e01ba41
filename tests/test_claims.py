"""tests/claims.py: its commands are what the scripts take, and a claim runs to its table and chart."""
import common
import eval as evaluation

import shutil
from pathlib import Path

import claims
import numpy as np
import pytest


def main_of(command, out):
    """evaluation.train_once without a process of its own."""
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
        cfg = common.parse_args(module.Config, module.PRESETS, module.LOSSES, flags)
        assert cfg.teacher or not cfg.distills()
    shutil.rmtree("out", ignore_errors=True)


@pytest.mark.parametrize("name, rows, columns", [("ict", 2, 3), ("intervals", 7, 3), ("guidance", 4, 3)])
def test_a_claim_ends_in_a_table(name, rows, columns, monkeypatch, capsys):
    """One row a run, a column for each number of steps and one for E; and the chart, if the claim has one."""
    monkeypatch.setattr(evaluation, "train_once", main_of)
    claims.main([name, "--seeds", "1", "--steps", "2", "--samples", "50", "--out", "claims"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + rows and all(line.count("|") == columns + 2 for line in table)
    assert Path("claims", name, "chart.png").exists() == bool(claims.CLAIMS[name].chart)


def test_a_straight_line_of_a_chart():
    """y = 1 / x is straight and falling between logarithmic axes: every point lies on the line between the
    two ends, within two pixels."""
    x = 10.0 ** np.arange(0, 4)
    picture = np.asarray(common.chart({"": [(v, 1 / v, 1 / v, 1 / v) for v in x]}, "xy")).astype(int)
    rows, columns = np.nonzero((picture[:, :, 2] - picture[:, :, 0] > 80) & (picture[:, :, 0] < 80))
    share = (columns - columns.min()) / np.ptp(columns)
    assert np.ptp(columns) > 300 and np.abs(rows - rows.min() - share * np.ptp(rows)).max() <= 2 + 1


def test_ticks_are_round_and_within_the_range():
    for low, high, log in ((0, 1500, False), (0.0213, 0.34, True), (4, 65_536, True), (-3, 2, False),
                           (0.256, 0.299, True)):
        found = common.ticks(low, high, log)
        assert 2 <= len(found) <= 12 and all(low <= v <= high and float(f"{v:.2g}") == v for v in found)
