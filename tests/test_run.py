"""The run, in every script: training, resume, processes, accumulation, sampling, and the errors of a user."""
import cm
import common
import conftest
import direct_cm
import multistep_cm
import scm
import sct
from conftest import ROOT, draw_pictures, finish, one_line, run_here, torchrun

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

SCRIPTS = dict(cm=cm, direct_cm=direct_cm, multistep_cm=multistep_cm, sct=sct, scm=scm)
TOY = ["--channels", "16", "--blocks", "1", "--batch", "128", "--log_every", "1"]


def same(a, b, exact=True):
    """Two state dicts are equal, bit for bit or to float tolerance."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if exact else torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6) for k in a)


def same_optimizer(a, b):
    pairs = zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values())
    return all(torch.equal(x[k], y[k]) for x, y in pairs for k in x)


def files(out):
    return {path.name: path.read_bytes() for path in Path(out).glob("[!.]*")}


def log(out):
    """The lines of training; a report on the toy adds one with E."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def fails(capsys, *words):
    return one_line(capsys, scm.main, *words)


def test_toy_learns(train, monkeypatch):
    """A few hundred steps bring one-step samples nearer to the data, and every file of a run is there."""
    first = train("--steps", 1, "--out", "a", "--batch", 128)
    monkeypatch.setattr(common, "energy_distance", conftest.energy_distance)  # of all 5,000 points
    train("--steps", 150, "--out", "b", "--warmup", 50, "--log_every", 50)
    a, b = (json.loads(Path(out, "metrics.json").read_text()) for out in "ab")
    assert b["energy_distance"]["1"] < 0.5 * a["energy_distance"]["1"] and b["ode_error"] < a["ode_error"]
    assert b["energy_distance"]["ode"] < 0.002
    assert set(b) == {"energy_distance", "ode_error", "seconds", "steps"}
    assert {"config.json", "log.jsonl", "ckpt.pt", "metrics.json", "samples-000150.png"} == set(files("b"))
    assert {"step", "loss", "lr", "grad_norm", "seconds", "samples_per_s"} <= log("b")[0].keys()
    assert first["script"] == "scm" and first["step"] == 1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of pictures, and a short diffusion run on them."""
    path = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        pictures = draw_pictures(path / "pictures")
        run_here("--dataset", "folder", "--data", pictures, "--mode", "diffusion", "--channels", 8,
                 "--blocks", 1, "--attention", 4, "--batch", 8, "--steps", 2, "--out", "run")
    return pictures, path / "run"


@pytest.mark.parametrize("words", [
    "cm diffusion", "cm cd --metric huber", "cm ct --metric huber", "cm ict", "cm ctcd", "cm ctct",
    "direct_cm cm --guidance 2 --intervals 5", "direct_cm direct --guidance 2 --intervals 5",
    "multistep_cm diffusion", "multistep_cm ct --student_steps 2", "multistep_cm cd --student_steps 2",
    "multistep_cm pd --student_steps 2 --pd_start 4",
    "sct diffusion", "sct ect", "sct sct", "sct sct --reference dataset", "sct sct --phases 2",
    "scm diffusion --dtype bf16", "scm sct --dtype bf16", "scm scd --dtype bf16 --guidance_max 2",
    "scm dscd --dtype bf16 --guidance_max 2", "scm vsd --dtype fp16 --guidance_max 2",
    "scm scd+vsd --dtype bf16"])
def test_every_mode_trains_on_images(words, train, base):
    """From a short diffusion run, with labels and dropout: finite losses, weights that change, an average
    that trails them. sct.py logs the variance of its averaged target, at most that of a single one."""
    (script, mode, *flags), (pictures, teacher) = words.split(), base
    start = common.read_checkpoint(teacher)["ema"]
    ckpt = train("--dataset", "folder", "--data", pictures, "--batch", 8, "--steps", 4, "--log_every", 1,
                 "--teacher", teacher, "--dropout", 0.1, "--mode", mode, *flags, "--out", "run",
                 script=SCRIPTS[script])
    lines = log("run")
    assert len(lines) == 4 and all(np.isfinite(line["loss"]) for line in lines)
    assert any(not torch.equal(start[k], v) for k, v in ckpt["net"].items() if k in start)
    assert not same(ckpt["net"], ckpt["ema"])
    assert all(0 <= line["variance"] <= 1.001 for line in lines if (script, mode) == ("sct", "sct"))


def test_student_starts_from_the_teachers_average(train, folder):
    """--teacher RUN gives the student the teacher's architecture and EMA, but a fresh weighting head."""
    words = ["--dataset", "folder", "--data", str(folder), "--batch", "8", "--steps", "1"]
    small = ["--channels", 8, "--blocks", 1, "--seed", 1]
    ema = train(*words, *small, "--mode", "diffusion", "--out", "teacher")["ema"]
    cfg = common.parse_args(scm.Config, scm.PRESETS, scm.LOSSES, [*words, "--teacher", "teacher"])
    assert cfg.channels == 8 and cfg.blocks == 1
    net = common.network(cfg, common.dataset(cfg))
    state, fresh = net.state_dict(), common.build(net.options, cfg.seed).state_dict()
    assert all(torch.equal(state[k], ema[k]) for k in state if not k.startswith("head."))
    assert all(torch.equal(state[k], fresh[k]) for k in state if k.startswith("head."))
    assert not torch.equal(fresh["head.linear.weight"], ema["head.linear.weight"])


def test_resume_after_kill_is_bit_exact(train):
    """kill -9 in the middle, --resume: weights, average, optimizer and log equal the unbroken run's."""
    words = [*TOY, "--steps", "60", "--save_every", "7", "--mode", "sct", "--lr_cooldown", "0"]
    command = [sys.executable, ROOT / "scm.py", *words, "--steps", "100000", "--out", "broken"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    assert same_optimizer(broken, whole)
    assert [line["loss"] for line in log("broken")] == [line["loss"] for line in log("whole")]


@pytest.mark.parametrize("words, part", [
    ("cm cd", "target"), ("cm cd --mu 0", ""), ("sct sct --stage_steps 2", "weak"),
    ("direct_cm direct", ""), ("scm scd+vsd", "")])
def test_resume_is_bit_exact_in_every_script(words, part, train):
    """Stopped and resumed, all that a checkpoint holds is the unbroken run's: also cm.py's average of mu > 0
    and sct.py's at half of training, which are no copies of the network. (For pd, see test_multistep.py.)"""
    (script, mode, *flags), run = words.split(), [*TOY, "--lr_cooldown", 0]
    script = SCRIPTS[script]
    whole = train(*run, *flags, "--mode", mode, "--steps", 8, "--out", "whole", script=script)
    real = script.LOSSES[mode]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def stops(*inputs):
            if inputs[5] == 6:
                raise KeyboardInterrupt
            return real(*inputs)
        patch.setitem(script.LOSSES, mode, stops)
        train(*run, *flags, "--mode", mode, "--steps", 8, "--save_every", 5, "--out", "parts", script=script)
    assert common.read_checkpoint("parts")["step"] == 5
    parts = train("--resume", "--out", "parts", script=script)
    assert all(same(whole[name], parts[name]) for name in {"net", "ema", "target"} | {part} - {""})
    assert same_optimizer(whole, parts) and len(log("parts")) == 8
    assert same(whole["net"], whole["target"]) == (part != "target")
    assert part != "weak" or not same(whole["ema"], whole["weak"])


@pytest.mark.parametrize("mode", ["sct", "scd+vsd"])
def test_two_processes_and_micro_batches_are_one_run(mode, train, capsys):
    """Two gloo processes, and accumulation, take the steps of one process on the global batch. A resume with
    another number of processes says that it is not bit for bit."""
    words = [*TOY, "--mode", mode, "--lr_cooldown", "0"]
    one = train(*words, "--steps", 5, "--out", "one")
    accumulated = train(*words, "--steps", 5, "--micro", 32, "--out", "micro")
    printed = finish(torchrun("scm", *words, "--steps", 5, "--out", "two", "--micro", 32))
    two = common.read_checkpoint("two")
    assert same(one["net"], accumulated["net"], exact=False) and same(one["net"], two["net"], exact=False)
    losses = [[line["loss"] for line in log(out)] for out in ("one", "micro", "two")]
    assert np.allclose(losses[0], losses[1], rtol=1e-4) and np.allclose(losses[0], losses[2], rtol=1e-4)
    assert printed.count("ODE error") == 1 and len(losses[2]) == 5  # rank 0 alone writes
    capsys.readouterr()
    more = train("--resume", "--steps", 8, "--out", "two")
    assert "not bit for bit" in capsys.readouterr().out and more["step"] == 8
    whole = train("--resume", "--steps", 8, "--out", "one")
    assert same(more["net"], whole["net"], exact=False)


def test_same_seed_same_weights(train):
    """And another seed gives others."""
    a, b, c = (train(*TOY, "--steps", 3, "--seed", seed, "--out", out)
               for seed, out in [(1, "a"), (1, "b"), (2, "c")])
    assert same(a["net"], b["net"]) and not same(a["net"], c["net"])


def test_non_finite_steps_are_skipped_and_then_end_the_run(train, monkeypatch, capsys):
    """One bad step leaves the weights alone; 50 running stop the run in words, the checkpoint intact."""
    real, words = scm.LOSSES["sct"], [*TOY, "--mode", "sct", "--lr_cooldown", 0]

    def broken(net, target, teacher, x0, y, step, cfg, gen):
        loss, info = real(net, target, teacher, x0, y, step, cfg, gen)
        return (loss * float("nan") if bad(step) else loss), info
    monkeypatch.setitem(scm.LOSSES, "sct", broken)
    bad = {2}.__contains__
    two, three = (train(*words, "--steps", n, "--out", n) for n in (2, 3))
    assert same(two["net"], three["net"]) and log("3")[-1]["skipped"] == 1
    bad = range(100).__contains__
    with pytest.raises(SystemExit) as error:
        train(*words, "--steps", 100, "--out", "bad")
    assert error.value.code == 2 and "non-finite" in capsys.readouterr().err
    assert common.read_checkpoint("bad")["step"] == 1


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


def test_a_bad_flag_overwrites_nothing(train, monkeypatch):
    """--overwrite keeps the old run until the new one's first step has worked; a teacher is not replaced."""
    train(*TOY, "--steps", 1, "--out", "run")
    before = files("run")
    with pytest.raises(SystemExit):
        train(*TOY, "--channels", 7, "--out", "run", "--overwrite")
    with pytest.raises(SystemExit):
        train(*TOY, "--mode", "scd", "--teacher", "run", "--out", "run", "--overwrite")

    def broken(*inputs):
        raise RuntimeError("broken")
    monkeypatch.setitem(scm.LOSSES, "sct", broken)
    with pytest.raises(RuntimeError):
        train(*TOY, "--mode", "sct", "--label_dropout", 0.5, "--conditional", "--out", "run", "--overwrite")
    assert before == files("run")


BAD = [  # script and words -> a part of the one line on stderr; most such cases are in test_input.py
    ("sct --dataset folder --data nowhere", "--init"), ("sct --sigmas 1,80", "--sigmas"),
    ("sct --dataset shapes --teacher exact", "--init"), ("sct --reference all", "batch"),
    ("multistep_cm --teacher=", "teacher"), ("multistep_cm --mode pd --pd_start 2", "--pd_start"),
    ("multistep_cm --teacher_steps 64,inf", "--teacher_steps"),
    ("multistep_cm --figure --dataset gmm", "--figure"), ("multistep_cm --student_steps 0", "at least 1"),
    ("direct_cm --teacher=", "--teacher"), ("direct_cm --hops -1", "--hops"),
    ("cm --mode ctcd --teacher=", "--teacher")]


@pytest.mark.parametrize("words, text", BAD)
def test_bad_input_is_one_line_and_exit_2(words, text, capsys):
    """Whatever a user can type wrong: one line that says what, and exit code 2."""
    script, *flags = words.split()
    assert text in one_line(capsys, SCRIPTS[script].main, *flags, "--steps", 1)


def test_a_checkpoint_of_another_version_is_named_as_such(train, capsys):
    """Weights of other names or sizes, as teacher, to sample from, and to resume."""
    ckpt = train(*TOY, "--steps", 1, "--out", "run")

    def old(state):
        return {"cond." + name: value for name, value in state.items()}
    for change in (dict(ema=old(ckpt["ema"])), dict(options=ckpt["options"] | dict(blocks=3))):
        torch.save(ckpt | change, "run/ckpt.pt")
        for words in (["--sample", 4, "--out", "run"], ["--teacher", "run", "--out", "x"]):
            assert "another version" in fails(capsys, *words)
    torch.save(ckpt | dict(net=old(ckpt["net"])), "run/ckpt.pt")
    assert "cannot be resumed" in fails(capsys, "--resume", "--out", "run")


def test_loading_a_checkpoint_never_runs_code(capsys):
    """A pickle that would call a function is refused, and the function is not called."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("owned",)
    Path("run").mkdir()
    torch.save(dict(script="scm", config={}, options={}, net=Evil(), ema={}), "run/ckpt.pt")
    assert "no checkpoint" in fails(capsys, "--sample", 4, "--out", "run")
    assert not Path("owned").exists()


def test_a_full_disk_is_said_in_words_and_loses_nothing(capsys):
    """A write that fails half-way leaves the old file whole and no debris."""
    common.atomic_write("file", lambda file: file.write(b"old"))

    def full(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")
    assert "No space left" in one_line(capsys, lambda _: common.atomic_write("file", full))
    assert Path("file").read_bytes() == b"old" and os.listdir() == ["file"]
