"""tests/claims.py: its commands are what the scripts take, finished runs are kept, and a claim runs to its
table and chart."""
import kit
from conftest import SCRIPTS

import os
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


@pytest.mark.parametrize("name, rows, columns", [("ict", 3, 3), ("intervals", 7, 3), ("guidance", 4, 3),
                                                 ("annealing", 6, 2)])
def test_a_claim_ends_in_a_table(name, rows, columns, monkeypatch, capsys):
    """One row a run, a column for each number of steps and one for E; and the chart, if the claim has one."""
    if claims.CLAIMS[name].chart:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(claims, "train_once", main_of)
    claims.main([name, "--seeds", "1", "--steps", "2", "--samples", "50", "--out", "claims"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + rows and all(line.count("|") == columns + 2 for line in table)
    assert Path("claims", name, "chart.png").exists() == bool(claims.CLAIMS[name].chart)


def test_finished_runs_are_kept():
    """The same command, however it is spaced, trains nothing; another one does."""
    command = "scm.py --mode diffusion  --steps 1 --batch 8 --channels 16 --blocks 1 --log_every"
    trained = []
    for steps in (" 1", "  1", " 2"):
        ckpt = Path(claims.train_once(command + steps, "run"), "ckpt.pt")
        trained.append(ckpt.stat().st_mtime_ns)
    assert trained[0] == trained[1] < trained[2]


def test_a_run_is_stale_once_what_it_starts_from_is_trained_anew():
    """A student that is older than its teacher's checkpoint is not kept."""
    command = "scm.py --teacher ./teacher"
    for path in ("teacher/ckpt.pt", "run/ckpt.pt", "run/log.jsonl", "run/command.txt"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(command)
    assert claims.finished(command, "run")
    os.utime("teacher/ckpt.pt", (2**32, 2**32))
    assert not claims.finished(command, "run")


def test_a_claim_that_fails_does_not_end_the_others(monkeypatch, capsys):
    """The ones after it are told, and at the end those that are not done, with exit code 2."""
    def fails(command, out):
        kit.fail("no disk")
    monkeypatch.setattr(claims, "train_once", fails)
    words = ["guidance", "figure", "--seeds", "1", "--out", "claims"]
    monkeypatch.setattr(claims.losses, "draw", lambda path: None)
    with pytest.raises(SystemExit) as stop:
        claims.main(words)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and "losses.png" in printed.out
    assert printed.err.splitlines()[-1].endswith("guidance")


def test_the_toy_table(monkeypatch, capsys):
    """A row a mode, that of the exact ODE last, with a range for E and for each number of steps: 1, 2 and 4
    of students, 35 of diffusion. And the picture, with a panel a mode."""
    monkeypatch.setattr(claims, "train_once", main_of)
    monkeypatch.setattr(claims, "TOY", dict(scm=("diffusion", "scd"), multistep_cm=("ct",)))
    drawn = []
    panels = kit.panels
    monkeypatch.setattr(kit, "panels", lambda columns, *rest: panels(columns, *rest) or drawn.extend(columns))
    claims.main(["toy", "--seeds", "1", "--steps", "2", "--samples", "50", "--out", "claims"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == ["scm", "scm", "multistep_cm", "exact ODE"]
    assert [line.count("(") for line in lines[2:5]] == [2, 4, 4] and Path("claims/toy/eval.png").exists()
    assert drawn == ["scm.py diffusion, 35 NFE", "scm.py scd, 1 NFE", "multistep_cm.py ct, 4 NFE"]


def test_the_figure_of_the_losses(capsys):
    """`figure` draws a panel for each script, from the script's own functions, into --out."""
    pytest.importorskip("matplotlib")
    claims.main(["figure", "--out", "claims"])
    assert {panel.__name__.rsplit("_", 1)[0] for panel in claims.losses.PANELS[1:]} == \
        {name.removesuffix("_cm") for name in SCRIPTS}
    assert 50_000 < Path("claims/losses.png").stat().st_size < 300_000
    assert "losses.png" in capsys.readouterr().out
