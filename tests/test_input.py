"""Careless and hostile input: each ends in one line that says what is wrong, with exit code 2, and nothing is
lost. Also what a run shares with others: its folder, its log, and the signals that end it."""
import cm
import common
import direct_cm
import eval as evaluation
import multistep_cm
import scm
import sct
from conftest import draw_pictures

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(common.__file__).parent
SMALL = ["--channels", "8", "--blocks", "1", "--batch", "8", "--steps", "4"]
LONG = "x" * 300


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two small runs, pictures, and everything that can be wrong with such files."""
    root = tmp_path_factory.mktemp("place")
    with contextlib.chdir(root) if hasattr(contextlib, "chdir") else moved(root):
        images, _ = common.draw_shapes(scm.Config(image_size=8), 12)
        for i, image in enumerate(images):
            Path("pictures", "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(f"pictures/{'ab'[i % 2]}/{i}.png")
        data = ["--dataset", "folder", "--data", "pictures", "--mode", "sct"]
        scm.main([*SMALL, "--channels", "16", "--out", "toy", "--lr_cooldown", "0"])
        scm.main([*SMALL, *data, "--out", "run"])
        cm.main([*SMALL, "--dataset", "folder", "--data", "pictures", "--mode", "ct", "--out", "cm"])
        damage()
    return root


@contextlib.contextmanager
def moved(path):
    before = os.getcwd()
    os.chdir(path)
    yield
    os.chdir(before)


def damage():
    """Files that cannot be read, each in its own way."""
    ckpt = torch.load("run/ckpt.pt", weights_only=True)
    cut = {k: v[:1] if v.ndim else v for k, v in ckpt["ema"].items()}
    changes = dict(nokey=dict(step=None), noconfig=dict(config=3), nooptions=dict(options={}),
                   oldnames=dict(ema={"cond.linear.weight": torch.zeros(1)}), badshape=dict(ema=cut),
                   noscript=dict(script="mine"), badtype=dict(config=ckpt["config"] | dict(seed="zero")))
    for name, change in changes.items():
        Path(name).mkdir()
        torch.save(ckpt | change, f"{name}/ckpt.pt")
    for name in ("empty", "half", "text"):
        Path(name).mkdir()
    Path("empty/ckpt.pt").touch()
    Path("half/ckpt.pt").write_bytes(Path("run/ckpt.pt").read_bytes()[:999])
    Path("text/ckpt.pt").write_text("hello")
    Path("file").write_text("not a folder")
    Path("broken.zip").write_bytes(b"PK\x03\x04 damaged")
    Path("x.pkl").write_bytes(b"\x80\x04 nothing")
    with zipfile.ZipFile("labels.zip", "w") as archive:
        archive.write("pictures/a/0.png", "0.png")
        archive.writestr("dataset.json", json.dumps(dict(labels=[["0.png", "cat"]])))
    with zipfile.ZipFile("central.zip", "w") as archive:
        archive.write("pictures/a/0.png", "a/0.png")
    whole = Path("central.zip").read_bytes()
    Path("central.zip").write_bytes(whole[:-30] + b"\0" * 30)
    for name in ("noimages", "mixed/a", "wide/a", "torn/a", "float/a", "sizes/a"):
        Path(name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("mixed/1.png"), Image.new("RGB", (8, 8)).save("mixed/a/1.png")
    Image.new("RGB", (12, 8)).save("wide/a/1.png"), Image.new("F", (8, 8)).save("float/a/1.tiff")
    shutil.copy("float/a/1.tiff", "float/a/1.png")
    Path("torn/a/1.png").write_bytes(Path("pictures/a/0.png").read_bytes()[:60])
    Image.new("RGB", (8, 8)).save("sizes/a/1.png"), Image.new("RGB", (16, 16)).save("sizes/a/2.png")
    Image.new("RGBA", (8, 8)).save("alpha.png")
    np.savez("strings.npz", arr_0=np.array([["a", "b"], ["c", "d"]]))
    np.savez("nan.npz", arr_0=np.full((4, 2), np.nan))
    for net in (Tuples(), Floats(), Nans()):
        torch.jit.script(net).save(f"{type(net).__name__.lower()}.pt")


class Tuples(torch.nn.Module):
    def forward(self, x):
        return x, x


class Floats(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1) @ torch.ones(192, 4)


class Nans(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1) / torch.zeros(1)


FOLDER = ["--dataset", "folder", "--mode", "sct", "--data"]
EDIT = ["--out", "cm", "--edit", "colorize", "--input"]
DAMAGED = dict(
    empty="no checkpoint", half="truncated", text="truncated", nokey="not written by",
    noconfig="not written by", nooptions="damaged", oldnames="another version", badshape="do not fit",
    badtype="--seed", noscript="mine.py")
CASES = [  # script, words, what the line says
    (scm, ["--speed", "3"], "the flags are --dataset"), (scm, ["--mode", "cd"], "diffusion, scd, sct, dscd"),
    (scm, ["--dataset", "mnist"], "gmm, shapes, folder, cifar10"), (scm, ["--tangent", "none"], "normalize"),
    (scm, ["--lr", "fast"], "--lr"), (scm, ["--lr", "nan"], "--lr"), (scm, ["--lr", "inf"], "--lr"),
    (scm, ["--P_mean", "nan"], "--P_mean"), (scm, ["--tangent_c", "-1"], "--tangent_c"),
    (scm, ["--nfe", "0"], "--nfe must be"), (scm, ["--steps", "0"], "--steps must be"),
    (scm, ["--batch", "100", "--micro", "32"], "multiple"), (scm, ["--teacher", ""], "there is none in"),
    (scm, ["--dataset", "shapes", "--teacher", "exact"], "gmm"),
    (scm, ["--save", "x.gif"], ".png or a .npz"), (scm, ["--guidance_max", "2"], "--conditional"),
    (scm, ["--guidance_max", "0.5"], "--guidance_max"), (scm, ["--dropout", "1.5"], "at most"),
    (scm, ["--seed", "-1"], "--seed must be"), (scm, ["--channels", "7"], "--channels must be even"),
    (scm, ["--channel_mult", "0"], "--channel_mult"),
    (scm, ["--dataset", "shapes", "--mode", "sct", "--image_size", "15"], "multiple of 2"),
    (scm, ["--dataset", "shapes", "--mode", "sct", "--arch", "ddpmpp"], "--arch ddpmpp"),
    (scm, ["--label", "3"], "--sample"), (scm, ["--resume", "--overwrite", "--out", "toy"], "one of them"),
    (scm, ["--sigma_d", "0"], "--sigma_d"), (scm, ["--conditional", "maybe"], "true or false"),
    (cm, ["--mu", "1.5"], "--mu must be at most 1"), (cm, ["--points", "1"], "--points"),
    (cm, ["--sigmas", "1,80"], "--sigmas"), (cm, ["--mode", "diffusion", "--search", "--out", "cm"], "cm"),
    (cm, ["--edit", "sharpen"], "inpaint"), (cm, ["--edit", "colorize", "--out", "cm"], "--input"),
    (cm, ["--edit", "inpaint", "--input", "pictures/a/0.png", "--out", "cm"], "--mask"),
    (cm, [*EDIT, "alpha.png"], "RGBA"), (cm, [*EDIT, "file"], "cannot read"),
    (cm, [*EDIT, "no.png"], "cannot read"), (cm, [*EDIT, "wide/a/1.png"], "12x8"),
    (cm, [*EDIT, "pictures/a/0.png", "--sigma", "0.001"], "0.002"),
    (cm, [*EDIT, "pictures/a/0.png", "--patch", "3"], "--patch"), (cm, [*EDIT, LONG], "cannot read"),
    (sct, ["--shrink", "1"], "--shrink"), (sct, ["--huber", "0"], "--huber"),
    (sct, ["--phases", "0"], "at least 1"), (sct, ["--dataset", "shapes"], "--init"),
    (sct, ["--guidance", "2", "--guide", "label"], "--label_dropout"), (sct, ["--size", "XL"], "size"),
    (sct, ["--class_size", "5"], "--class_size"),
    (multistep_cm, ["--teacher_steps", "64"], "--teacher_steps"),
    (multistep_cm, ["--x_var_data", "--x_var_frac", "0"], "--x_var_frac"), (cm, ["--flip"], "gmm"),
    (cm, ["--metric", "lpips_avg"], "images"), (direct_cm, ["--lora_rank", "0"], "--lora_rank"),
    (multistep_cm, ["--noise_res", "32,64"], "--noise_res"),
    (multistep_cm, ["--teacher_steps", "64,99999999999999999999"], "--teacher_steps"),
    (multistep_cm, ["--noise_res", "0,64,64"], "--noise_res"), (multistep_cm, ["--solver", "heun"], "heun"),
    (multistep_cm, ["--mode", "pd", "--pd_start", "12"], "--pd_start"),
    (multistep_cm, ["--guidance", "2"], "--conditional"), (direct_cm, ["--intervals", "300"], "1000"),
    (direct_cm, ["--intervals", "2"], "too few"), (direct_cm, ["--guidance", "9"], "--conditional"),
    (direct_cm, ["--hops", "3"], "--mode cm"), (direct_cm, ["--loss", "other"], "both"),
    (direct_cm, ["--dataset", "text"], "--pretrained"),
    # files
    (scm, [*FOLDER, "nowhere"], "nowhere"), (scm, [*FOLDER, "noimages"], "no images"),
    (scm, [*FOLDER, "file"], "zip"), (scm, [*FOLDER, "broken.zip"], "zip"),
    (scm, [*FOLDER, "labels.zip"], "dataset.json"), (scm, [*FOLDER, LONG], LONG[:50]),
    (scm, [*FOLDER, "central.zip"], "central.zip"), (scm, [*FOLDER, "mixed"], "beside them"),
    (scm, [*FOLDER, "wide"], "--image_size"), (scm, [*FOLDER, "sizes"], "--image_size"),
    (scm, [*FOLDER, "torn"], "1.png"), (scm, [*FOLDER, "float"], "8-bit"),
    (scm, ["--dataset", "folder", "--mode", "sct"], "--data"),
    (scm, ["--dataset", "cifar10", "--mode", "sct", "--data", "file"], "cifar-10-binary"),
    (scm, ["--dataset", "imagenet512", "--mode", "sct", "--data", "noimages", "--vae", "file"], "--vae"),
    (scm, ["--sample", "4", "--out", "nowhere"], "no checkpoint"),
    (scm, ["--resume", "--out", "nowhere"], "no checkpoint"),
    (scm, ["--teacher", "nowhere"], "no checkpoint"), (scm, ["--teacher", LONG], LONG[:50]),
    (scm, ["--out", LONG], LONG[:50]), (scm, ["--sample", "4", "--out", "run", "--label", "3"], "0..1"),
    (scm, ["--out", "file"], "file"), (scm, ["--out", "toy"], "holds a run already"),
    (scm, ["--sample", "4", "--out", "toy", "--label", "3"], "no classes"),
    *[(scm, ["--sample", "4", "--out", name], word) for name, word in DAMAGED.items()],
    (scm, ["--sample", "4", "--out", "cm"], "cm.py"),
    (scm, ["--mode", "scd", "--teacher", "x.pkl"], "x.pkl"),
    (scm, [*FOLDER, "pictures", "--teacher", "toy", "--batch", "8"], "shape"),
    (scm, [*FOLDER, "pictures", "--init", "run", "--batch", "8", "--blocks", "2"], "architecture"),
    (evaluation, ["noscript"], "unknown script"), (evaluation, ["strings.npz"], "strings.npz"),
    (evaluation, ["nan.npz"], "nan.npz"), (evaluation, [LONG], LONG[:50]),
    (evaluation, ["half"], "truncated"),
    *[(evaluation, ["run", "--samples", "4", "--features", name], name)
      for name in ("tuples.pt", "floats.pt", "nans.pt")],
    (evaluation, ["run", "--reference", LONG], LONG[:50]),
    (evaluation, ["run", "--features", LONG], LONG[:50]),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_bad_input_is_one_line_and_exit_2(case, place, capsys, monkeypatch):
    """The words of CASES, and the line that they end in."""
    monkeypatch.chdir(place)
    script, words, text = CASES[case]
    with pytest.raises(SystemExit) as error:
        script.main(words)
    lines = [line for line in capsys.readouterr().err.splitlines() if ": " in line and "it/s" not in line]
    assert error.value.code == 2 and len(lines) == 1 and text in lines[0], lines


def config_of(out):
    return json.loads(Path(out, "config.json").read_text())


def another(field, value):
    """Words for a value that a flag of this type may have, other than the stored one."""
    if get_args(field.type):
        return next(choice for choice in get_args(field.type) if choice not in ("", value))
    if field.type is bool:
        return str(not value)
    return {int: lambda: str(value + 2), float: lambda: str(value + 0.125), tuple: lambda: "3,2",
            str: lambda: "other"}[field.type]()


@pytest.mark.parametrize("script", [scm, cm, sct, multistep_cm, direct_cm], ids=lambda s: s.__name__)
def test_resume_takes_everything_from_the_stored_run(script, place, capsys, monkeypatch):
    """Every flag of the method and the training, but those that cannot change the result, is refused in one
    line that names both values; config.json stays."""
    monkeypatch.chdir(place)
    out, extra = f"{script.__name__}-toy", {cm: ["--mu", "0.9"], direct_cm: ["--mode", "cm"]}.get(script, [])
    script.main([*SMALL, "--channels", "16", "--out", out, *extra])
    before, tried = config_of(out), 0
    for field in dataclasses.fields(script.Config):
        if field.name in common.RESUMABLE:
            continue
        value = before[field.name]
        words = another(field, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            script.main(["--resume", "--out", out, f"--{field.name}", words])
        line = capsys.readouterr().err.strip()
        name = "dataset" if field.name == "figure" else field.name  # which implies another
        assert error.value.code == 2 and "\n" not in line, line
        assert f"--{name} " in line and "it cannot become" in line, line
        tried += 1
    assert tried > 35 and config_of(out) == before


@pytest.mark.parametrize("script", [scm, sct, multistep_cm], ids=lambda script: script.__name__)
def test_resume_keeps_the_steps_of_a_schedule(script, place, capsys, monkeypatch):
    """The cooldown of the toy's preset, and sct's average at half of training, depend on --steps."""
    monkeypatch.chdir(place)
    script.main([*SMALL, "--channels", "16", "--out", f"{script.__name__}-steps"])
    with pytest.raises(SystemExit):
        script.main(["--resume", "--out", f"{script.__name__}-steps", "--steps", "9"])
    assert "--steps 4: it cannot become 9" in capsys.readouterr().err


def test_resume_may_change_what_cannot_change_the_result(place, capsys, monkeypatch):
    """More steps where no schedule depends on them, another rhythm of the log; config.json tells."""
    monkeypatch.chdir(place)
    scm.main(["--resume", "--out", "toy", "--steps", "6", "--log_every", "3", "--save_every", "2",
              "--checkpointing"])
    assert common.read_checkpoint("toy")["step"] == config_of("toy")["steps"] == 6
    assert config_of("toy")["log_every"] == 3


PYTHON = [sys.executable, scm.__file__, "--channels", "16", "--batch", "32", "--log_every", "1"]


def wait_for(path, lines=3):
    deadline = time.time() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") > lines) and time.time() < deadline:
        time.sleep(0.02)


def test_one_run_at_a_time_and_sigterm(tmp_path):
    """A second run in the same folder is told who holds it. SIGTERM leaves a whole checkpoint, a line, and
    143; the next run removes what killed writers have left, and drops a line of zeros from the log."""
    log, out = tmp_path / "run" / "log.jsonl", ["--out", "run"]
    first = subprocess.Popen([*PYTHON, *out, "--steps", "100000", "--lr_cooldown", "0", "--save_every", "2"],
                             stderr=subprocess.PIPE, text=True)
    wait_for(log)
    second = subprocess.run([*PYTHON, *out, "--overwrite"], capture_output=True, text=True)
    assert second.returncode == 2 and f"in use by process {first.pid} " in second.stderr
    first.send_signal(signal.SIGTERM)
    _, text = first.communicate(timeout=60)
    assert first.returncode == 143 and text.count("SIGTERM") == 1 and "Traceback" not in text
    step = common.read_checkpoint("run")["step"]
    (tmp_path / "run" / ".ckpt.pt.123").write_bytes(b"half a checkpoint")
    with open(log, "ab") as file:
        file.write(b"\0" * 20 + b"\n")
    scm.main(["--resume", *out, "--steps", str(step + 2)])
    assert not (tmp_path / "run" / ".ckpt.pt.123").exists()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, step + 3))


def test_links_to_folders_are_followed_and_loops_end(place, tmp_path):
    """A class folder may be a symbolic link; one that leads back up is left out."""
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(place / "pictures" / "a")
    (tmp_path / "linked" / "b").symlink_to(place / "pictures" / "b")
    (tmp_path / "linked" / "loop").symlink_to(tmp_path / "linked")
    names, labels, _ = common.list_images(tmp_path / "linked")
    assert len(names) == 12 and labels.tolist() == [0] * 6 + [1] * 6
    os.chdir(place / "pictures")
    assert len(common.list_images(Path("."))[0]) == 12


MEMORY = "out of memory: lower --batch, --micro or --channels"


@pytest.mark.parametrize("raised, code, text", [
    ("MemoryError()", 2, MEMORY),
    ("torch.OutOfMemoryError('CUDA out of memory')", 2, MEMORY),
    ("KeyboardInterrupt()", -signal.SIGINT, "stopped"), ("ValueError('a bug')", 1, "ValueError: a bug")])
def test_last_words(raised, code, text):
    """A lack of memory and Ctrl-C end in one line, without a promise of --resume where nothing was saved; a
    bug keeps its traceback."""
    words = [sys.executable, "-c", f"import common, torch; raise {raised}"]
    done = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == code and done.stderr.strip().splitlines()[-1] == text
    assert ("Traceback" in done.stderr) == (code == 1)


def test_folders_by_convention(place, capsys, monkeypatch, tmp_path):
    """out/SCRIPT for the toy's default, out/SCRIPT-DATASET-MODE for the rest; the teacher, or what tuning
    starts from, is out/SCRIPT-DATASET-diffusion, or the only one of another script. A line says so; without
    one, the line names the command that makes it. --init none and modes from random weights take none."""
    def parse(script, *words):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
        modes = script.LOSSES | ({"both": None} if script is direct_cm else {})
        return common.parse_args(script.Config, script.PRESETS, modes, list(words))
    monkeypatch.chdir(tmp_path)
    assert [parse(s).out for s in (scm, direct_cm)] == ["out/scm", "out/direct_cm"]
    assert parse(scm, "--mode", "sct").out == "out/scm-gmm-sct"
    assert parse(multistep_cm, "--dataset", "gmm1d").out == "out/multistep_cm-gmm1d-cd"
    for script in (scm, direct_cm):
        with pytest.raises(SystemExit):
            parse(script, "--dataset", "shapes")
        assert "python scm.py --dataset shapes --mode diffusion" in capsys.readouterr().err
    small = ["--channels", "8", "--blocks", "1", "--steps", "1", "--batch", "4", "--image_size", "8"]
    scm.main(["--dataset", "shapes", "--mode", "diffusion", *small])
    capsys.readouterr()
    path = "out/scm-shapes-diffusion"
    for script, mode, name in ((scm, "scd", "teacher"), (scm, "sct", "init"), (cm, "cd", "teacher"),
                               (sct, "sct", "init"), (direct_cm, "cm", "teacher")):
        cfg = parse(script, "--dataset", "shapes", "--mode", mode)
        assert getattr(cfg, name) == path and cfg.channels == 8
        assert cfg.out == f"out/{script.__name__}-shapes-{mode}"
        assert f"--{name} {path}, as none was given" in capsys.readouterr().out
    assert parse(cm, "--dataset", "shapes", "--mode", "ict").channels == 32
    assert parse(scm, "--dataset", "shapes", "--mode", "sct", "--init", "none").channels == 32
    scm.main(["--dataset", "shapes", *small[4:-2]])
    scm.main(["--sample", "2", "--dataset", "shapes"])
    assert Path("out/scm-shapes-scd/samples.png").exists()


def test_data_by_convention(capsys, tmp_path):
    """data/imagenet64 and data/cifar10, folders or a zip; what is missing is said."""
    cfg = cm.Config(dataset="imagenet64", image_size=8)
    with pytest.raises(SystemExit):
        common.dataset(cfg)
    assert "--data PATH" in capsys.readouterr().err
    draw_pictures(tmp_path / "data" / "imagenet64")
    assert len(common.dataset(cfg).rows) == 24
    draw_pictures(tmp_path / "data" / "cifar10", 12)
    with pytest.raises(SystemExit):
        common.dataset(cm.Config(dataset="cifar10", image_size=16))
    assert len(common.dataset(cm.Config(dataset="cifar10")).rows) == 12


def test_micro_is_the_largest_that_fits(monkeypatch):
    """A divisor of the share: all of it in much memory, 1 in too little; between, the estimate fits and the
    next divisor would not. Lack of memory names the next lower one."""
    net = common.build(dict(shape=(3, 16, 16), channels=16, blocks=1))
    parameters, _, fixed, sample = common.estimate(net.options, False)
    base = 12 * parameters + fixed
    assert common.largest_micro(net, 96, base + 10**12) == 96 and common.largest_micro(net, 96, 0) == 1
    assert common.largest_micro(net, 96, base + int(1.33 * 47 * sample)) == 32
    run = common.Run.__new__(common.Run)
    run.cfg, run.device, run.micro = scm.Config(batch=96, micro=24), torch.device("cpu"), 0
    run.split(net)
    assert run.rows[1] == (24, 48) and len(run.rows) == 4 and common.Run.lower_micro == 16
    run.cfg.micro, run.micro = 0, 20  # what a GPU of an earlier sitting chose for another share
    run.split(net)
    assert run.rows[1] == (16, 32) and run.micro == 16
    net.checkpointing = True
    half = common.largest_micro(net, 96, base + int(1.33 * 96 * common.estimate(net.options, True)[3]))
    net.fake = net
    assert common.largest_micro(net, 96, 2 * base) < half < 96
