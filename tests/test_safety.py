"""Nothing lost, nothing silent: folders of others, full disks, kills and signals, divergence, fingerprints,
and a dataset of one's own."""
import cm
import common
import direct_cm
import eval as evaluation
import kit
import multistep_cm
import scm
import sct
from conftest import draw_pictures, files, forked, log, one_line, same

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SMALL_DIFFUSION = ["--mode", "diffusion", "--channels", 8, "--blocks", 1, "--attention", 4]
TOY = ["--mode", "sct", "--channels", 16, "--blocks", 1, "--batch", 64, "--lr_cooldown", 0, "--log_every", 1]


def wait_for(path, lines):
    deadline = time.time() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= lines) and time.time() < deadline:
        time.sleep(0.02)


# ---- folders
@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "unet/config.json"])
def test_a_folder_of_others_is_left_alone(name, capsys):
    """--out on a folder that holds files and no run: refused, also with --overwrite, and nothing changes."""
    path = Path("mine", name)
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    for flags in ([], ["--overwrite"], ["--dry_run"]):
        assert "holds other files" in one_line(capsys, scm.main, *TOY, "--out", "mine", *flags)
    assert path.read_text() == "precious" and [p.name for p in Path("mine").iterdir()] == [name.split("/")[0]]


def test_other_projects_checkpoints_and_pictures_are_left_alone(train, capsys):
    """A ckpt.pt of another project does not make a folder ours; in ours, only our own writer's names go; and
    --export and --out do not write among other files."""
    Path("nano").mkdir()
    torch.save(dict(model=1), "nano/ckpt.pt")
    assert "not written by" in one_line(capsys, scm.main, *TOY, "--out", "nano", "--overwrite")
    train(*TOY, "--steps", 1, "--out", "run")
    for name in ("samples-paper.png", "ckpt-best.pt"):
        Path("run", name).write_text("precious")
    train(*TOY, "--steps", 1, "--out", "run", "--overwrite")
    assert all(Path("run", name).exists() for name in ("samples-paper.png", "ckpt-best.pt"))
    before = files("run")
    for flags in (["--export", "run"], ["--export", "e", "--sample", 2], ["--export", ""]):
        assert "--export" in one_line(capsys, scm.main, *flags, "--out", "run")
    assert files("run") == before


def test_only_our_own_leftovers_are_removed(train):
    """Hidden files that look like temporary ones stay; those of a killed writer go."""
    train(*TOY, "--steps", 1, "--out", "run")
    for name in (".notes.2024.txt", ".env.1", f".ckpt.pt.123{kit.process.UNFINISHED}"):
        Path("run", name).write_text("x")
    train(*TOY, "--steps", 1, "--out", "run", "--overwrite")
    left = sorted(p.name for p in Path("run").glob(".*"))
    assert left == [".env.1", ".lock", ".notes.2024.txt"]


def test_a_lock_of_an_equal_process_number_is_not_ours(capsys):
    """Two containers on one volume may have the same process number."""
    Path("run").mkdir()
    with open("run/.lock", "a+") as other:  # another open file: what another container holds
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(f"process {os.getpid()} on {os.uname().nodename}")
        other.flush()
        assert "in use by" in one_line(capsys, scm.main, *TOY, "--out", "run")


def test_a_file_system_without_locks_is_said_and_used(monkeypatch, capsys):
    """ENOSYS is not taken for another run."""
    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", flock)
    scm.main([str(w) for w in [*TOY, "--steps", 1, "--out", "run"]])
    assert "cannot be locked" in capsys.readouterr().out and Path("run/metrics.json").exists()


@pytest.mark.parametrize("first", [True, False])
def test_overwriting_on_a_full_disk_loses_nothing(first, train, monkeypatch):
    """The new run replaces the old one as a whole, or not at all."""
    train(*TOY, "--steps", 2, "--out", "run")
    before = files("run")
    real = torch.save if first else json.dumps

    def full(*args, **kw):
        if first or args[0].get("steps") == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kw)
    monkeypatch.setattr(torch, "save", full)
    if not first:  # ckpt.pt is whole, config.json is not
        monkeypatch.setattr(torch, "save", torch.serialization.save)
        write = kit.process.write_together
        monkeypatch.setattr("kit.run.write_together", lambda parts: write(
            {p: full_disk if p.name == "config.json" else w for p, w in parts.items()}))
    with pytest.raises(SystemExit):
        train(*TOY, "--steps", 3, "--out", "run", "--overwrite")
    assert files("run") == before


def full_disk(file):
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- kills and signals
def test_killed_in_the_last_picture(train, monkeypatch):
    """--resume of a finished run makes the picture and the figures that a killed one lacks, and only then."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys.modules["kit.report"], "panels", interrupt)
        train(*TOY, "--steps", 3, "--out", "run")
    assert not Path("run/metrics.json").exists()
    train("--resume", "--out", "run")
    assert json.loads(Path("run/metrics.json").read_text())["steps"] == 3
    stamp = Path("run/metrics.json").stat().st_mtime_ns
    train("--resume", "--out", "run")
    assert Path("run/samples-000003.png").exists() and Path("run/metrics.json").stat().st_mtime_ns == stamp


def interrupt(*args, **kw):
    raise KeyboardInterrupt


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_saves_the_step(number, code, train):
    """The step ends and is saved, far from --save_every, and the run goes on bit for bit."""
    words = [str(w) for w in [*TOY, "--save_every", 10**6]]
    command = [sys.executable, scm.__file__, *words, "--steps", "1000000", "--out", "broken"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(Path("broken/log.jsonl"), 5)
    child.send_signal(number)
    _, text = child.communicate(timeout=60)
    step = kit.read_checkpoint("broken")["step"]
    assert child.returncode == code and "Traceback" not in text and "--resume" in text
    assert step >= 5 and len(log("broken")) == step
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    broken, whole = (train(*w, "--steps", step + 2, "--out", out) for w, out in (
        (["--resume"], "broken"), (words, "whole")))
    torch.set_num_threads(threads)
    assert same(broken["net"], whole["net"]) and same(broken["ema"], whole["ema"])


def test_the_last_checkpoint_is_from_before_the_loss_diverged(train, monkeypatch, capsys):
    """Finite but a million times what it was: said in the log, nothing is saved, and after 50 steps the run
    ends in words."""
    real = scm.LOSSES["sct"]

    def diverges(net, target, teacher, x0, y, step, cfg, gen):
        loss, info = real(net, target, teacher, x0, y, step, cfg, gen)
        return loss * 1e12 if step >= 7 else loss, info
    monkeypatch.setitem(scm.LOSSES, "sct", diverges)
    with pytest.raises(SystemExit):
        train(*TOY, "--steps", 100, "--save_every", 1, "--out", "run")
    assert "a million times" in capsys.readouterr().err and kit.read_checkpoint("run")["step"] == 7
    assert [line["diverging"] for line in log("run") if "diverging" in line][:3] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_learned_nothing_is_no_success(train, monkeypatch, capsys, steps):
    """Fewer than 50 losses that are not finite, up to the end, or weights that are not, end in one line."""
    def overflows(net):
        next(net.parameters()).data.fill_(math.inf)

    def not_a_number(net, *_):
        return next(net.parameters()).sum() * math.nan, {}
    causes = (vars(kit), "normalize_weights", overflows), (scm.LOSSES, "sct", not_a_number)
    for place, name, broken in causes:
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setitem(place, name, broken)
            train(*TOY, "--steps", steps, "--out", "run")
        assert "not finite" in capsys.readouterr().err and not Path("run/ckpt.pt").exists()


def test_every_nth_checkpoint_is_kept(train):
    """--keep_every: files beside the last one, which --out can sample."""
    train(*TOY, "--steps", 5, "--keep_every", 2, "--out", "run")
    assert [p.name for p in sorted(Path("run").glob("ckpt-*.pt"))] == ["ckpt-000002.pt", "ckpt-000004.pt"]
    assert kit.read_checkpoint("run/ckpt-000002.pt")["step"] == 2
    scm.main("--sample 8 --out run/ckpt-000004.pt --save x.npz".split())


def test_resume_auto_starts_or_goes_on(train):
    """One command for both."""
    for steps in (2, 4):
        assert train(*TOY, "--steps", steps, "--out", "run", "--resume", "auto")["step"] == steps


# ---- what a result was made from
@pytest.fixture
def student(folder, train):
    """A student of a teacher on pictures, one step each."""
    shared = ["--dataset", "folder", "--data", folder, "--batch", 8, "--lr_cooldown", 0, "--steps", 1]
    train(*shared, *SMALL_DIFFUSION, "--out", "teacher")
    train(*shared, "--teacher", "teacher", "--out", "run")
    return shared


def test_resume_knows_data_and_teacher_by_content(student, folder, train, capsys):
    """Copied data and a moved teacher are those of before; an added image, a changed one and a retrained
    teacher are not."""
    shutil.copytree(folder, "elsewhere", copy_function=shutil.copyfile)  # with new times
    shutil.rmtree(folder)
    Path("teacher").rename("master")
    train("--resume", "--out", "run", "--steps", 2, "--data", "elsewhere", "--teacher", "master")
    Image.new("RGB", (8, 8)).save("elsewhere/a/new.png")
    line = one_line(capsys, scm.main, "--resume", "--out", "run", "--steps", 3)
    assert "other data" in line and "--data" in line
    Path("elsewhere/a/new.png").unlink()
    first = Path("elsewhere/a/0.png")
    before = first.read_bytes()
    first.write_bytes(before[:-1] + b"?")  # as long as before
    assert "other data" in one_line(capsys, scm.main, "--resume", "--out", "run", "--steps", 3)
    first.write_bytes(before)
    again = [w if w != folder else "elsewhere" for w in student]
    train(*again, *SMALL_DIFFUSION, "--seed", 1, "--out", "master", "--overwrite")
    line = one_line(capsys, scm.main, "--resume", "--out", "run", "--steps", 3)
    assert "other teacher" in line and "--teacher" in line


def test_resume_needs_no_init(student, train):
    """What a run started from is long in its checkpoint."""
    train(*student, "--mode", "sct", "--init", "teacher", "--out", "tuned")
    Path("teacher").rename("gone")
    assert train("--resume", "--out", "tuned", "--steps", 2)["step"] == 2


def test_latents_are_known_by_their_pixels(folder, vae, capsys):
    """Other pixels under the same names are not taken for the same."""
    def latents():
        return kit.dataset(scm.Config(dataset="imagenet512", data=str(folder), vae=vae, image_size=16))
    latents()
    path = next(folder.rglob("*.png"))
    Image.new("RGB", (8, 8), "red").save(path)
    assert "made from other images" in one_line(capsys, lambda _: latents())


def test_processes_without_a_common_disk_are_told(folder, monkeypatch, capsys):
    """If rank 0 has found the store whole and this process has not, a line says what to do."""
    cfg = scm.Config(dataset="folder", data=str(folder))
    monkeypatch.setattr(kit.store, "agreed", lambda value: True)
    assert "common disk" in one_line(capsys, lambda _: kit.dataset(cfg))


def test_what_is_skipped_is_said(folder, capsys):
    """Hidden folders, leftovers of systems, images of other kinds; a pipe is not waited for; and a picture
    that a camera has turned is turned back."""
    (folder / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(folder / ".ipynb_checkpoints" / "0.png")
    Image.new("RGB", (8, 8)).save(folder / "a" / "x.tif")
    os.mkfifo(folder / "a" / "pipe.png")
    turned = Image.new("RGB", (8, 8))
    turned.putpixel((7, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    turned.save(folder / "a" / "turned.png", exif=exif)
    names, labels, read, classes = kit.data.list_images(folder)
    text = capsys.readouterr().out
    assert classes == ["a", "b", "c"] and len(names) == 25
    assert "1 hidden files" in text and "1 images of other kinds (.tif)" in text
    assert kit.data.decode("a/turned.png", read, 0)[0, 7, 7] == 255


# ---- leftovers of a launcher
def test_a_rank_without_a_world_is_none():
    """RANK=1 alone trains and saves; WORLD_SIZE alone is told how to start."""
    def run(*more, **variables):
        process = forked("scm", [*TOY, "--steps", 1, "--out", "run", *more], "printed", **variables)
        process.join(100)
        return process.exitcode
    assert run(RANK="1") == 0 and kit.read_checkpoint("run")["step"] == 1
    address = dict(WORLD_SIZE="2", RANK="5", MASTER_ADDR="127.0.0.1", MASTER_PORT="29777")
    for left in (dict(WORLD_SIZE="2"), address, address | dict(RANK="0", MASTER_PORT="x")):
        assert run("--overwrite", **left) == 2
        assert "torchrun" in Path("printed").read_text().strip().splitlines()[-1]
    assert run("--help", WORLD_SIZE="x") == 0


def test_closed_outputs():
    """Without stdout and stderr it trains all the same."""
    command = f"{sys.executable} {scm.__file__} {' '.join(map(str, TOY))} --steps 1 --out run"
    assert subprocess.run(f"{command} >&- 2>&-", shell=True).returncode == 0
    assert Path("run/metrics.json").exists()


# ---- evaluation
def test_images_of_unlike_sizes_are_not_compared(student, tmp_path, capsys):
    """Samples of 8 pixels and a reference of 16; and few samples for many features are said beside the
    figure."""
    big = draw_pictures(tmp_path / "big")
    for path in big.rglob("*.png"):
        Image.open(path).resize((16, 16)).save(path)
    words = ["run", "--nfe", "1", "--samples", "8"]
    torch.jit.script(Means()).save("means.pt")
    line = one_line(capsys, evaluation.main, *words, "--features", "means.pt", "--reference", big)
    assert "--image_size 8" in line
    evaluation.main([*words, "--reference", str(big), "--image_size", "8"])
    assert "8 samples for 192 features" in json.loads(Path("run/eval.json").read_text())[0]["note"]


class Means(torch.nn.Module):
    def forward(self, x):
        return x.to(torch.float32).mean(3).mean(2)


def test_a_reader_that_stops_early_loses_no_file(train):
    """eval.py RUN | true"""
    train(*TOY, "--steps", 1, "--out", "run")
    command = f"{sys.executable} {evaluation.__file__} run --nfe 1 --samples 20 | true"
    subprocess.run(command, shell=True, stderr=subprocess.DEVNULL)
    assert json.loads(Path("run/eval.json").read_text())


def test_a_run_with_a_dot_is_a_folder(train):
    """eval.py's files belong into it."""
    train(*TOY, "--steps", 1, "--out", "lr0.5")
    evaluation.main(["lr0.5", "--nfe", "1", "--samples", "20"])
    assert Path("lr0.5/eval.json").exists() and not Path("eval.json").exists()


# ---- a dataset of one's own
class Own:
    """Random samples of a shape, scaled like the data of the contract."""

    def __init__(self, shape, classes, conditional):
        self.shape, self.classes, self.conditional = shape, classes, conditional

    def batch(self, gen):
        y = gen.index(max(self.classes, 1))
        x0 = (0.5 * gen.normal(*self.shape)).clamp(-1, 1)
        return x0, y if self.conditional else None


@pytest.mark.parametrize("script", [scm, cm, sct, multistep_cm, direct_cm], ids=lambda s: s.__name__)
@pytest.mark.parametrize("shape", [(3,), (1, 8, 8), (3, 8, 16), (4, 8, 8)], ids=str)
def test_a_dataset_of_ones_own(script, shape, monkeypatch):
    """Config.own_dataset, as a copy of a script would define it: points, gray pixels, pixels that are no
    square, latents; trained, drawn, sampled and evaluated."""
    for one in (script, scm):
        monkeypatch.setattr(one.Config, "own_dataset", lambda cfg, device: Own(shape, 2, cfg.conditional))
    shared = "--channels 8 --blocks 1 --attention 4 --batch 8 --steps 1 --conditional"
    mode = {cm: "ct", sct: "ect", multistep_cm: "ct", scm: "sct", direct_cm: "cm"}[script]
    words = f"{shared} --mode {mode} --init none --out run"
    if script is direct_cm:
        scm.main(f"{shared} --mode diffusion --init none --out teacher".split())
        words = f"{shared} --mode cm --teacher teacher --intervals 4 --out run"
    script.main(words.split())
    nfe = "4" if script is multistep_cm else "1"
    script.main(f"--sample 4 --nfe {nfe} --out run --save x.png".split())
    monkeypatch.setattr(evaluation, "KEEP", 64)
    evaluation.main(["run", "--nfe", nfe, "--samples", "8"])
    assert Path("run/metrics.json").exists() and Image.open("x.png").size[0] > 8
    row = json.loads(Path("run/eval.json").read_text())[0]
    assert math.isfinite(row["energy_distance" if len(shape) == 1 else "frechet_distance"])


@pytest.mark.parametrize("change, word", [
    (dict(shape=[2]), "shape"), (dict(classes=None), "classes"),
    (dict(shape=(3, 15, 15)), "halved"),
    (dict(batch=lambda gen: (torch.zeros(3, 3), None)), "x0"), (dict(batch=lambda gen: 3), "batch"),
    (dict(batch=lambda gen: (torch.zeros(2, 2), None)), "x0"),
    (dict(batch=lambda gen: ([0], [1])), "tensors"),
    (dict(batch=lambda gen: (torch.full((3, 2), math.nan), None)), "finite"),
    (dict(batch=lambda gen: (torch.zeros(3, 2), None)), "labels"), (dict(shape=(0,)), "shape"),
    *[(dict(batch=lambda gen, y=y: (torch.zeros(3, 2), torch.tensor([0, 1, y]))), "labels")
      for y in (7, -5)]])
def test_a_dataset_that_breaks_the_contract_is_told(change, word, capsys, monkeypatch):
    """At the start, in one line."""
    data = Own((2,), 2, True)
    vars(data).update(change)
    monkeypatch.setattr(scm.Config, "own_dataset", lambda cfg, device: data)
    line = one_line(capsys, scm.main, *TOY, "--conditional", "--init", "none", "--steps", 1, "--out", "x")
    assert word in line


def test_sampling_adapts_to_the_memory(train, monkeypatch):
    """Half as many at once after each lack of memory; the samples are the same."""
    train(*TOY, "--steps", 1, "--out", "run")
    real, sizes = scm.sample, []

    def small(net, noise, *args):
        sizes.append(len(noise))
        if len(noise) > 100:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return real(net, noise, *args)
    scm.main("--sample 300 --out run --save a.npz".split())
    monkeypatch.setattr(scm, "sample", small)
    scm.main("--sample 300 --out run --save b.npz".split())
    assert sizes[0] == 300 and sizes[-1] <= 100
    assert np.allclose(np.load("a.npz")["arr_0"], np.load("b.npz")["arr_0"], atol=1e-6)


def test_edits_ask_for_a_class(folder, train, capsys):
    """A conditional network is not taken to edit class 0."""
    train("--dataset", "folder", "--data", folder, "--mode", "ct", "--channels", 8, "--blocks", 1,
          "--batch", 8, "--steps", 1, "--out", "run", script=cm)
    picture = next(folder.rglob("*.png"))
    line = one_line(capsys, cm.main, "--edit", "colorize", "--input", picture, "--out", "run")
    assert "--label 0..2" in line
    cm.main(f"--edit colorize --input {picture} --out run --label 1 --save e.png".split())


def test_latents_are_not_clipped():
    """cm.py's sampler clips pixels to [-1, 1], and latents not."""
    def net(x, t, y):
        return -3 * torch.ones_like(x)
    noise = torch.zeros(1, 4, 2, 2)
    for space, most in (("", 1.0), ("signed", 1.4)):
        x = cm.sample(net, noise, None, 1, cm.Config(space=space), common.Draw(0, 0, 0, 1))
        assert x.max() == pytest.approx(most) if space == "" else x.max() > 1.4
