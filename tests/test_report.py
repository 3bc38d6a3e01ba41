"""kit/report.py: the report at the end of training, and --sample."""
import conftest
import kit
import scm
from conftest import REPORT, files, log, same

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def test_toy_learns(train, monkeypatch):
    """A few hundred steps bring one-step samples nearer to the data, and every file of a run is there."""
    first = train("--steps", 1, "--out", "a", "--batch", 128)
    monkeypatch.setattr(REPORT, "energy_distance", conftest.energy_distance)  # of all 5,000 points
    train("--steps", 150, "--out", "b", "--warmup", 50, "--log_every", 50)
    a, b = (json.loads(Path(out, "metrics.json").read_text()) for out in "ab")
    assert b["energy_distance"]["1"] < 0.5 * a["energy_distance"]["1"] and b["ode_error"] < a["ode_error"]
    assert b["energy_distance"]["ode"] < 0.002
    assert set(b) == {"energy_distance", "ode_error", "seconds", "steps"}
    assert {"config.json", "log.jsonl", "ckpt.pt", "metrics.json", "samples-000150.png", "samples.gif"} == \
        set(files("b"))
    assert {"step", "loss", "lr", "grad_norm", "seconds", "samples_per_s"} <= log("b")[0].keys()
    assert first["script"] == "scm" and first["step"] == 1


TOY = ["--channels", 16, "--blocks", 1, "--batch", 64, "--steps", 20]


@pytest.fixture
def killed_at(monkeypatch):
    """killed_at(step): the next run is interrupted when it comes to this step."""
    real = scm.LOSSES["scd"]

    def kill(at):
        def loss(net, target, teacher, x0, y, step, cfg, gen):
            if step == at:
                monkeypatch.setitem(scm.LOSSES, "scd", real)
                raise KeyboardInterrupt
            return real(net, target, teacher, x0, y, step, cfg, gen)
        monkeypatch.setitem(scm.LOSSES, "scd", loss)
    return kill


def test_the_animation(train, killed_at):
    """samples.gif has a frame of the start and of each tenth, and is small. A run that was killed and resumed
    has the same, bit for bit. With --gif false there is none, and the weights are the same."""
    whole = train(*TOY, "--out", "whole")
    off = train(*TOY, "--out", "off", "--gif", "false")
    assert same(whole["net"], off["net"]) and not Path("off/samples.gif").exists()
    film, size = Image.open("whole/samples.gif"), Path("whole/samples.gif").stat().st_size
    assert film.n_frames == 11 and 10_000 < size < 1_000_000
    assert list(whole["frames"]) == list(range(0, 20, 2))  # the last one follows from the averaged weights
    killed_at(7)
    with pytest.raises(KeyboardInterrupt):
        train(*TOY, "--save_every", 6, "--out", "broken")
    assert list(kit.read_checkpoint("broken")["frames"]) == [0, 2, 4]
    train("--resume", "--out", "broken")
    assert files("broken")["samples.gif"] == files("whole")["samples.gif"]
    train(*TOY, "--out", "broken", "--overwrite", "--gif", "false")
    assert not Path("broken/samples.gif").exists()


def test_reports_while_training(train, killed_at):
    """--sample_every 4 of 20 steps: a picture and a line with E of each, no further frames of the animation.
    A run that was killed in step 11 and resumed from step 8 has each of them once, too."""
    words = [*TOY, "--sample_every", 4, "--save_every", 8]
    train(*words, "--out", "whole")
    killed_at(11)
    with pytest.raises(KeyboardInterrupt):
        train(*words, "--out", "broken")
    train("--resume", "--out", "broken")
    for out in ("whole", "broken"):
        pictures = [path.name for path in sorted(Path(out).glob("samples-*.png"))]
        assert pictures == [f"samples-{step:06d}.png" for step in (4, 8, 12, 16, 20)]
        lines = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines if "ode_error" in line] == [4, 8, 12, 16, 20]
        assert Image.open(f"{out}/samples.gif").n_frames == 11


def test_samples_do_not_depend_on_how_many(train, folder):
    """--sample 5 are the first five of --sample 9; .npz is ADM's format, and PNG a picture."""
    train("--dataset", "folder", "--data", folder, "--channels", 8, "--blocks", 1, "--batch", 8, "--steps", 1,
          "--mode", "sct", "--out", "run")
    for n in "59":
        scm.main(["--sample", n, "--nfe", "2", "--out", "run", "--save", f"{n}.npz"])
    a, b = np.load("5.npz"), np.load("9.npz")
    assert a["arr_0"].shape == (5, 8, 8, 3) and a["arr_0"].dtype == np.uint8
    assert list(b["arr_1"]) == [0, 1, 2] * 3
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"][:5]).max() <= 1
    scm.main(["--sample", "4", "--label", "1", "--out", "run"])
    assert Image.open("run/samples.png").size[0] > 8
