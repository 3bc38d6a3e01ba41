"""The run: resume, processes, accumulation, sampling, and every error a user can cause."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import scm

ROOT = Path(scm.__file__).parent
TOY = ["--channels", "16", "--blocks", "1", "--batch", "128", "--log_every", "1"]


def python(*words, launcher=(), timeout=240, **kw):
    command = [sys.executable, *launcher, *(str(w) for w in words)]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, **kw)


def same(a, b, exact=True):
    """Two state dicts are equal, bit for bit or to float tolerance."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if exact else torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6) for k in a)


def log(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def test_toy_learns(train):
    """A few hundred steps bring one-step samples nearer to the data, and every file of a run is there."""
    first = train("--steps", 1, "--out", "a", "--batch", 128)
    train("--steps", 150, "--out", "b", "--warmup", 50, "--log_every", 50)
    a, b = (json.loads(Path(out, "metrics.json").read_text()) for out in "ab")
    assert b["energy_distance"]["1"] < 0.5 * a["energy_distance"]["1"] and b["ode_error"] < a["ode_error"]
    assert b["energy_distance"]["ode"] < 0.002 and set(b) == {"energy_distance", "ode_error", "seconds", "steps"}
    assert {"config.json", "log.jsonl", "ckpt.pt", "metrics.json", "samples-000150.png"} == set(os.listdir("b"))
    assert {"step", "loss", "lr", "grad_norm", "seconds", "samples_per_s"} <= log("b")[0].keys()
    assert first["script"] == "scm" and first["step"] == 1


@pytest.mark.parametrize("mode", list(scm.LOSSES))
def test_every_mode_trains_on_images(mode, train, folder):
    """Ten steps of each objective on a small U-Net, bf16 torso, labels: finite losses, changed weights."""
    words = ["--dataset", "folder", "--data", folder, "--channels", 8, "--blocks", 1, "--attention", 4,
             "--batch", 8, "--log_every", 1, "--dtype", "bf16"]
    if mode != "diffusion":
        train(*words, "--mode", "diffusion", "--steps", 2, "--out", "teacher")
        words += ["--teacher", "teacher", "--dropout", 0.1]
    if mode in ("scd", "dscd"):
        words += ["--guidance_max", 2]
    before = train(*words, "--mode", mode, "--steps", 1, "--out", "start")["net"]
    ckpt = train(*words, "--mode", mode, "--steps", 8, "--out", "run")
    assert all(np.isfinite(line["loss"]) for line in log("run"))
    assert not same(before, ckpt["net"]) and not same(ckpt["net"], ckpt["ema"])


def test_student_starts_from_the_teachers_average(train, folder):
    """--teacher RUN gives the student the teacher's architecture and EMA weights, but a fresh weighting head."""
    words = ["--dataset", "folder", "--data", folder, "--batch", 8, "--steps", 1]
    ema = train(*words, "--mode", "diffusion", "--channels", 8, "--blocks", 1, "--out", "teacher")["ema"]
    cfg = common.parse_args(scm.Config, scm.PRESETS, scm.LOSSES, [str(w) for w in words] + ["--teacher", "teacher"])
    assert cfg.channels == 8 and cfg.blocks == 1
    data = common.dataset(cfg)
    net = common.network(cfg, data)
    head = net.cond.head_linear.weight.clone()
    common.load_init(net, cfg, data)
    state = net.state_dict()
    assert all(torch.equal(state[k], ema[k]) for k in state if ".head_" not in k)
    assert torch.equal(net.cond.head_linear.weight, head)


def test_resume_after_kill_is_bit_exact(train):
    """kill -9 in the middle, --resume: weights, average, optimizer and log equal the unbroken run's."""
    words = [*TOY, "--steps", "60", "--save_every", "7", "--mode", "sct"]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    child = subprocess.Popen([sys.executable, ROOT / "scm.py", *words, "--steps", "100000", "--out", "broken"], env=env,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, deadline = Path("broken/log.jsonl"), time.time() + 120
    while not (path.exists() and path.read_text().count("\n") > 25) and time.time() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    step = common.read_checkpoint("broken")["step"]
    assert 0 < step < 60 and step % 7 in (0, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    broken, whole = train("--resume", "--out", "broken", "--steps", 60), train(*words, "--out", "whole")
    torch.set_num_threads(threads)
    assert same(broken["net"], whole["net"]) and same(broken["ema"], whole["ema"])
    for a, b in zip(broken["optimizer"]["state"].values(), whole["optimizer"]["state"].values()):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert [line["loss"] for line in log("broken")] == [line["loss"] for line in log("whole")]


def test_two_processes_and_micro_batches_are_one_run(train):
    """torchrun with two gloo processes, and accumulation, take the steps of one process on the global batch."""
    words = [*TOY, "--steps", "5", "--mode", "sct", "--lr_cooldown", "0"]
    one = train(*words, "--out", "one")
    accumulated = train(*words, "--micro", 32, "--out", "micro")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = python(ROOT / "scm.py", *words, "--out", "two", "--micro", 32, launcher=launcher)
    assert result.returncode == 0, result.stderr[-2000:]
    two = common.read_checkpoint("two")
    assert same(one["net"], accumulated["net"], exact=False) and same(one["net"], two["net"], exact=False)
    losses = [[line["loss"] for line in log(out)] for out in ("one", "micro", "two")]
    assert np.allclose(losses[0], losses[1], rtol=1e-4) and np.allclose(losses[0], losses[2], rtol=1e-4)
    assert result.stdout.count("ODE error") == 1 and len(losses[2]) == 5  # rank 0 alone writes


def test_same_seed_same_weights(train):
    a, b, c = (train(*TOY, "--steps", 3, "--seed", seed, "--out", out) for seed, out in [(1, "a"), (1, "b"), (2, "c")])
    assert same(a["net"], b["net"]) and not same(a["net"], c["net"])


def test_non_finite_steps_are_skipped_and_then_end_the_run(train, monkeypatch, capsys):
    """One bad step leaves the weights alone; 50 running stop the run in words, the checkpoint intact."""
    real = scm.LOSSES["sct"]

    def broken(net, target, teacher, x0, y, step, cfg, gen):
        loss, info = real(net, target, teacher, x0, y, step, cfg, gen)
        return (loss * float("nan") if bad(step) else loss), info
    monkeypatch.setitem(scm.LOSSES, "sct", broken)
    bad = {2}.__contains__
    two = train(*TOY, "--mode", "sct", "--lr_cooldown", 0, "--steps", 2, "--out", "two")
    three = train(*TOY, "--mode", "sct", "--lr_cooldown", 0, "--steps", 3, "--out", "three")
    assert same(two["net"], three["net"]) and log("three")[-1]["skipped"] == 1
    bad = (lambda step: True)
    with pytest.raises(SystemExit) as error:
        train(*TOY, "--mode", "sct", "--steps", 100, "--out", "bad")
    assert error.value.code == 2 and "non-finite" in capsys.readouterr().err
    assert common.read_checkpoint("bad")["step"] == 1


def test_samples_do_not_depend_on_how_many(train, folder):
    """--sample 5 are the first five of --sample 9; .npz is ADM's format, and PNG a picture."""
    train("--dataset", "folder", "--data", folder, "--channels", 8, "--blocks", 1, "--batch", 8, "--steps", 1,
          "--mode", "sct", "--out", "run")
    arrays = []
    for n in (5, 9):
        result = python(ROOT / "scm.py", "--sample", n, "--nfe", 2, "--out", "run", "--save", f"{n}.npz")
        assert result.returncode == 0, result.stderr
        arrays.append(np.load(f"{n}.npz"))
    a, b = arrays
    assert a["arr_0"].shape == (5, 8, 8, 3) and a["arr_0"].dtype == np.uint8
    assert list(b["arr_1"]) == [0, 1, 2] * 3
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"][:5]).max() <= 1
    assert python(ROOT / "scm.py", "--sample", 4, "--label", 1, "--out", "run").returncode == 0
    assert Image.open("run/samples.png").size[0] > 8


def test_a_bad_flag_overwrites_nothing(train, capsys):
    """--overwrite keeps the old run until the new one's first step has worked; a teacher is never replaced."""
    train(*TOY, "--steps", 1, "--out", "run")
    before = {name: Path("run", name).read_bytes() for name in os.listdir("run")}
    with pytest.raises(SystemExit):
        train(*TOY, "--channels", 7, "--out", "run", "--overwrite")
    with pytest.raises(SystemExit):
        train(*TOY, "--mode", "scd", "--teacher", "run", "--out", "run", "--overwrite")
    with pytest.raises(RuntimeError):
        train(*TOY, "--label_dropout", 0.5, "--conditional", "--mode", "sct", "--batch", 128, "--micro", 64, "--out",
              "run", "--overwrite", script=Broken)
    assert before == {name: Path("run", name).read_bytes() for name in os.listdir("run")}


class Broken:
    """scm.py with a loss that raises."""
    Config, PRESETS, LOSSES = scm.Config, scm.PRESETS, scm.LOSSES

    @staticmethod
    def train(cfg):
        real, scm.LOSSES["sct"] = scm.LOSSES["sct"], lambda *args: (_ for _ in ()).throw(RuntimeError("broken"))
        try:
            scm.train(cfg)
        finally:
            scm.LOSSES["sct"] = real


CASES = {  # words -> a part of the one line on stderr
    "unknown flag": (["--speed", "3"], "the flags are --dataset"),
    "unknown mode": (["--mode", "cd"], "diffusion, scd, sct, dscd"),
    "unknown dataset": (["--dataset", "mnist"], "gmm, shapes, folder, cifar10"),
    "unknown choice": (["--tangent", "none"], "normalize"),
    "not a number": (["--lr", "fast"], "--lr"),
    "zero nfe": (["--nfe", "0"], "--nfe must be at least 1"),
    "zero steps": (["--steps", "0"], "--steps must be at least 1"),
    "micro": (["--batch", "100", "--micro", "32"], "multiple"),
    "missing checkpoint": (["--sample", "4", "--out", "nowhere"], "no checkpoint"),
    "nothing to resume": (["--resume", "--out", "nowhere"], "no checkpoint"),
    "missing teacher": (["--teacher", "nowhere"], "no checkpoint"),
    "no teacher": (["--teacher", ""], "--teacher RUN"),
    "exact teacher of images": (["--dataset", "shapes", "--teacher", "exact"], "gmm"),
    "no data": (["--dataset", "folder", "--mode", "sct"], "--data"),
    "data not there": (["--dataset", "folder", "--mode", "sct", "--data", "nowhere"], "nowhere"),
    "not the archive": (["--dataset", "cifar10", "--mode", "sct", "--data", __file__], "cifar-10-binary"),
    "save": (["--save", "x.gif"], ".png or a .npz"),
    "guidance": (["--guidance_max", "2"], "--conditional"),
    "out of range": (["--dropout", "1.5"], "--dropout must be at most"),
    "negative seed": (["--seed", "-1"], "--seed must be at least 0"),
    "odd channels": (["--channels", "7"], "--channels must be even"),
    "odd size": (["--dataset", "shapes", "--mode", "sct", "--image_size", "15"], "multiple of 2"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_2(case, capsys):
    words, text = CASES[case]
    with pytest.raises(SystemExit) as error:
        scm.main(words)
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(lines) == 1 and text in lines[0], lines


def fails(capsys, *words):
    """The one line that these words end in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        scm.main([str(w) for w in words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_bad_folders(folder, capsys):
    def line(path, *words):
        return fails(capsys, "--dataset", "folder", "--mode", "sct", "--data", path, "--out", "run", *words)
    Path("empty").mkdir()
    assert "no images" in line("empty")
    Image.new("RGB", (12, 8)).save(folder / "a" / "wide.png")
    assert "differ in size" in line(folder) and "--image_size" in line(folder)
    (folder / "a" / "wide.png").unlink()
    (folder / "b" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert "broken.png" in line(folder)
    Image.new("RGB", (12, 8)).save("empty/one.png")
    assert "not square" in line("empty")
    assert not Path("run").exists()  # nothing half-made is left


def test_bad_checkpoints(train, folder, capsys):
    train(*TOY, "--steps", 1, "--out", "toy")
    good = Path("toy/ckpt.pt").read_bytes()
    words = ["--sample", 4, "--out", "toy"]
    assert "no classes" in fails(capsys, *words, "--label", 3)
    assert "holds a run already" in fails(capsys, "--out", "toy")
    images = ["--dataset", "folder", "--data", folder, "--channels", 8, "--blocks", 1, "--batch", 8, "--steps", 1]
    assert "shape" in fails(capsys, *images, "--teacher", "toy", "--out", "x")
    train(*images, "--mode", "sct", "--out", "small")
    assert "the classes are 0..2" in fails(capsys, "--sample", 4, "--label", 3, "--out", "small")
    assert "architecture" in fails(capsys, *images, "--teacher", "small", "--blocks", 2,
                                   "--out", "x")
    assert Path("toy/ckpt.pt").read_bytes() == good
    Path("toy/ckpt.pt").write_bytes(good[:len(good) // 2])
    assert "truncated" in fails(capsys, *words)
    torch.save({"model": torch.zeros(1)}, "toy/ckpt.pt")
    assert "not written by" in fails(capsys, *words)
    ckpt = common.read_checkpoint("small")
    torch.save(ckpt | dict(script="cm"), "small/ckpt.pt")
    assert "cm.py" in fails(capsys, "--sample", 4, "--out", "small")


def test_loading_a_checkpoint_never_runs_code(capsys):
    """A pickle that would call a function is refused, and the function is not called."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("owned",)
    Path("run").mkdir()
    torch.save(dict(script="scm", config={}, options={}, net=Evil(), ema={}), "run/ckpt.pt")
    assert "no checkpoint" in fails(capsys, "--sample", 4, "--out", "run")
    assert not Path("owned").exists()


def test_a_full_disk_is_said_in_words_and_loses_nothing(tmp_path, capsys):
    """A write that fails half-way leaves the old file whole and no debris."""
    common.atomic_write("file", lambda file: file.write(b"old"))

    def full(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit) as error:
        common.atomic_write("file", full)
    assert error.value.code == 2 and "No space left" in capsys.readouterr().err
    assert Path("file").read_bytes() == b"old" and os.listdir() == ["file"]
