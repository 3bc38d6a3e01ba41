"""kit/report.py: the report at the end of training, and --sample."""
import conftest
import scm
from conftest import REPORT, files, log

import json
from pathlib import Path

import numpy as np
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
    assert {"config.json", "log.jsonl", "ckpt.pt", "metrics.json", "samples-000150.png"} == set(files("b"))
    assert {"step", "loss", "lr", "grad_norm", "seconds", "samples_per_s"} <= log("b")[0].keys()
    assert first["script"] == "scm" and first["step"] == 1


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
