"""Careless and damaged input: each ends in one line that says what is wrong, with exit code 2."""
import cm
import direct_cm
import eval as evaluation
import multistep_cm
import scm
import sct
from conftest import draw_pictures

import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SMALL = ["--channels", "8", "--blocks", "1", "--batch", "8", "--steps", "4"]
LONG = "x" * 300


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two small runs, pictures, and everything that can be wrong with such files."""
    root = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        draw_pictures(Path("pictures"))
        data = ["--dataset", "folder", "--data", "pictures", "--mode", "sct"]
        scm.main([*SMALL, "--channels", "16", "--out", "toy", "--lr_cooldown", "0"])
        scm.main([*SMALL, *data, "--out", "run"])
        cm.main([*SMALL, "--dataset", "folder", "--data", "pictures", "--mode", "ct", "--out", "cm"])
        damage()
    return root


def damage():
    """Files that cannot be read, each in its own way."""
    ckpt = torch.load("run/ckpt.pt", weights_only=True)
    cut = {k: v[:1] if v.ndim else v for k, v in ckpt["ema"].items()}
    changes = dict(nokey=dict(step=None), noconfig=dict(config=3), nooptions=dict(options={}),
                   oldnames=dict(ema={"cond.linear.weight": torch.zeros(1)}), badshape=dict(ema=cut),
                   noscript=dict(script="mine"), module=dict(script="common"), itself=dict(script="eval"),
                   badtype=dict(config=ckpt["config"] | dict(seed="zero")), notime=dict(seconds=math.nan),
                   badextra=dict(extra="weak"))
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
    arrays = dict(strings=np.array([["a", "b"], ["c", "d"]]), nan=np.full((4, 2), np.nan),
                  odd=np.zeros((3, 4, 4)), points=np.zeros((3, 2)), one=np.zeros((1, 2)),
                  images=np.zeros((3, 8, 8, 3), np.uint8))
    for name, array in arrays.items():
        np.savez(f"{name}.npz", arr_0=array)
    np.savez("mu.npz", mu=np.zeros(3))
    with zipfile.ZipFile("raw.npz", "w") as archive:
        archive.writestr("arr_0", "no array")
    Path("flat").mkdir()
    shutil.copy("pictures/a/0.png", "flat/0.png")
    Path("broken.npz").write_bytes(b"PK nothing")
    for net in (Tuples(), Floats(), Nans(), Means()):
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


class Means(torch.nn.Module):
    def forward(self, x):
        return x.to(torch.float32).mean(3).mean(2)


FOLDER = ["--dataset", "folder", "--mode", "sct", "--data"]
EDIT = ["--out", "cm", "--label", "0", "--edit", "colorize", "--input"]
INCEPTION = ["run", "--features", "inception", "--weights", "means.pt", "--samples", "8"]
DAMAGED = dict(
    empty="no checkpoint", half="truncated", text="truncated", nokey="not written by",
    noconfig="not written by", nooptions="damaged", oldnames="another version", badshape="do not fit",
    badtype="--seed", noscript="mine.py", notime="not written by", badextra="not written by")
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
    (cm, ["--sigmas", "1,80"], "--sigmas"),
    (cm, ["--mode", "diffusion", "--search", "--out", "cm"], "cm was trained with --mode ct"),
    (cm, ["--edit", "sharpen"], "inpaint"), (cm, ["--edit", "colorize", "--out", "cm"], "--input"),
    (cm, ["--edit", "inpaint", "--input", "pictures/a/0.png", "--out", "cm"], "--mask"),
    (cm, [*EDIT, "alpha.png"], "RGBA"), (cm, [*EDIT, "file"], "cannot read"),
    (cm, [*EDIT, "no.png"], "cannot read"), (cm, [*EDIT, "wide/a/1.png"], "12x8"),
    (cm, [*EDIT, "pictures/a/0.png", "--sigma", "0.001"], "0.002"),
    (cm, [*EDIT, "pictures/a/0.png", "--patch", "3"], "--patch"), (cm, [*EDIT, LONG], "cannot read"),
    (sct, ["--shrink", "1"], "--shrink"), (sct, ["--huber_c", "0"], "--huber_c"),
    (sct, ["--phases", "0"], "at least 1"), (sct, ["--dataset", "shapes"], "--init"),
    (sct, ["--guidance", "2", "--guide", "label"], "--label_dropout"), (sct, ["--size", "XL"], "size"),
    (sct, ["--class_size", "5"], "--class_size"),
    (multistep_cm, ["--teacher_steps", "64"], "--teacher_steps"),
    (multistep_cm, ["--x_var_data", "--x_var_frac", "0"], "--x_var_frac"), (cm, ["--flip"], "gmm"),
    (cm, ["--metric", "lpips_avg"], "images"), (cm, ["--mode", "ctct", "--metric", "l1"], "--metric"),
    (direct_cm, ["--lora_rank", "0"], "--lora_rank"),
    (multistep_cm, ["--noise_res", "32,64"], "--noise_res"),
    (multistep_cm, ["--teacher_steps", "64,99999999999999999999"], "--teacher_steps"),
    (multistep_cm, ["--noise_res", "0,64,64"], "--noise_res"), (multistep_cm, ["--solver", "heun"], "heun"),
    (multistep_cm, ["--mode", "pd", "--pd_start", "12"], "--pd_start"),
    (multistep_cm, ["--guidance", "2"], "--conditional"), (direct_cm, ["--intervals", "300"], "1000"),
    (direct_cm, ["--intervals", "2"], "too few"), (direct_cm, ["--guidance", "9"], "--conditional"),
    (direct_cm, ["--hops", "3"], "no effect in --mode both"), (direct_cm, ["--mode", "other"], "both"),
    (direct_cm, ["--dataset", "text"], "--pretrained"),
    (sct, ["--dataset", "folder", "--data", "nowhere"], "--init"), (sct, ["--sigmas", "1,80"], "--sigmas"),
    (sct, ["--dataset", "shapes", "--teacher", "exact"], "--init"), (sct, ["--reference", "all"], "batch"),
    (multistep_cm, ["--teacher="], "teacher"), (multistep_cm, ["--student_steps", "0"], "at least 1"),
    (multistep_cm, ["--mode", "pd", "--pd_start", "2"], "--pd_start"),
    (multistep_cm, ["--teacher_steps", "64,inf"], "--teacher_steps"),
    (multistep_cm, ["--figure", "--dataset", "gmm"], "--figure"),
    (direct_cm, ["--teacher="], "--teacher"), (direct_cm, ["--hops", "-1"], "--hops"),
    (cm, ["--mode", "ctcd", "--teacher="], "--teacher"),
    (scm, ["--batch", "99999999999"], "--batch must be at most"), (scm, ["--batch", "0"], "--batch must be"),
    (scm, ["--resume", "auto", "--overwrite", "--out", "toy"], "one of them"),
    (scm, ["--flip", "auto"], "--flip"), (cm, ["--keep_every", "-1"], "--keep_every"),
    (direct_cm, ["--pretrained", "--image_size", "1"], "--pretrained"),
    (scm, ["--pretrained", "x", "--dataset", "gmm"], "--dataset text"),
    (scm, ["--teacher", "help"], "edm2-img512-s"), (scm, ["--channel_mult", "a,b"], "such as 1,2,2"),
    (scm, ["--init", "exact"], "--init is"), (scm, ["--mode", "scd", "--teacher", "none"], "--teacher is"),
    (scm, ["--nfe", "100000000000000000000"], "--nfe must be at most"),
    (scm, ["--blocks", "100000000000000000000"], "--blocks must be at most"),
    (sct, ["--huber_c", "1e300"], "--huber_c must be at most"), (scm, ["--label", "-7"], "--label must be"),
    (scm, ["--prompt", "a red fox"], "--pretrained"), (sct, ["--teacher", "toy"], "--init RUN"),
    # what does not go together
    (scm, ["--sample", "4", "--dry_run", "--out", "toy"], "one at a time"),
    (sct, ["--sigmas", "80", "--nfe", "2"], "--nfe 1"), (sct, ["--eta", "0.5"], "--phases"),
    (sct, ["--mode", "ect", "--reference", "dataset"], "no effect in --mode ect"),
    (multistep_cm, ["--mode", "ct", "--guidance", "2"], "no effect in --mode ct"),
    (direct_cm, ["--mode", "cm", "--hops", "101"], "--intervals 100"),
    (multistep_cm, ["--figure", "--dry_run"], "--figure"),
    (multistep_cm, ["--figure", "--mode", "diffusion", "--solver", "heun"], "--figure"),
    (multistep_cm, ["--figure", "--mode", "pd", "--student_steps", "3", "--pd_start", "3"], "--pd_start"),
    (scm, ["--sample", "4", "--out", "run", "--save", "pictures/x.png"], "would join"),
    (scm, ["--export", "pictures/x", "--out", "run"], "would join"),
    (evaluation, ["run", "--out", "pictures"], "would join"),
    (evaluation, ["run", "--reference", "wide", "--out", "wide/a"], "would join"),
    # files
    (scm, [*FOLDER, "pictures", "--init", "run", "--sigma_d", "1"], "--sigma_d 0.5"),
    (scm, [*FOLDER, "flat"], "--conditional false"), (scm, ["--out", "pictures"], "holds other files"),
    (scm, ["--dataset", "cifar10", "--mode", "sct", "--data", "labels.zip"], "--dataset folder"),
    (scm, ["--dry_run", "--out", "toy"], "holds a run already"),
    (scm, ["--export", "file", "--out", "toy"], "cannot write"),
    (evaluation, ["raw.npz"], "no samples"), (evaluation, ["run", "--image_size", "-1"], "--image_size"),
    (evaluation, ["run", "--samples", "8", "--nfe", "1", "--out", "file"], "no folder to write to"),
    (evaluation, ["module"], "which is none"), (evaluation, ["itself"], "which is none"),
    (scm, [*FOLDER, "nowhere"], "nowhere"), (scm, [*FOLDER, "noimages"], "no images"),
    (scm, [*FOLDER, "file"], "zip"), (scm, [*FOLDER, "broken.zip"], "zip"),
    (scm, [*FOLDER, "labels.zip"], "dataset.json"), (scm, [*FOLDER, LONG], LONG[:50]),
    (scm, [*FOLDER, "central.zip"], "central.zip"), (scm, [*FOLDER, "mixed"], "beside them"),
    (scm, [*FOLDER, "wide", "--conditional", "0"], "--image_size"),
    (scm, [*FOLDER, "sizes", "--conditional", "0"], "--image_size"),
    (scm, [*FOLDER, "wide"], "--conditional false"),
    (scm, [*FOLDER, "torn"], "1.png"), (scm, [*FOLDER, "float"], "8-bit"),
    (scm, ["--dataset", "folder", "--mode", "sct"], "--data"),
    (scm, ["--dataset", "cifar10", "--mode", "sct", "--data", "file"], "cifar-10-binary"),
    (scm, ["--dataset", "imagenet512", "--mode", "sct", "--data", "noimages", "--vae", "file"], "--vae"),
    (scm, ["--sample", "4", "--out", "nowhere"], "no checkpoint"),
    (scm, ["--resume", "--out", "nowhere"], "no checkpoint"),
    (cm, ["--mode", "ctct", "--weighting", "gap"], "pairs of times"),
    (scm, ["--teacher", "nowhere"], "no checkpoint"), (scm, ["--teacher", LONG], LONG[:50]),
    (scm, ["--out", LONG], LONG[:50]), (scm, ["--sample", "4", "--out", "run", "--label", "3"], "0..2"),
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
    (scm, ["--sample", "4", "--out", "out/scm"], "train it first"),
    (evaluation, ["nowhere"], "no checkpoint"), (evaluation, ["run", "nowhere"], "nowhere"),
    (evaluation, [], "runs"), (evaluation, ["run", "--nfe", "0"], "at least 1"),
    (evaluation, ["run", "--samples", "1"], "at least 2"), (evaluation, ["one.npz"], "at least 2"),
    (evaluation, ["broken.npz"], "cannot read"), (evaluation, ["odd.npz"], "no samples"),
    (evaluation, ["points.npz"], "points from a file"), (evaluation, ["images.npz"], "--reference"),
    (evaluation, ["points.npz", "--prompts", "nowhere"], "--prompts"),
    *[(evaluation, ["run", "--features", name], "TorchScript")
      for name in ("nowhere.pt", "text/ckpt.pt", ".")],
    (evaluation, ["run", "--features", "inception", "--weights", "x.pt"], "no feature network at x.pt"),
    (evaluation, ["run", "--features", "dinov2", "--weights", "/no/such"], "huggingface.co"),
    (evaluation, ["run", "--samples", "8", "--reference", "broken.npz"], "cannot read"),
    (evaluation, ["run", "--samples", "8", "--reference", "odd.npz"], "no samples"),
    (evaluation, ["run", "--reference", "nowhere.npz"], "nowhere.npz"),
    (evaluation, [*INCEPTION, "--reference", "mu.npz"], "sigma"),
    (evaluation, ["points.npz", "--reference", "teacher"], "names no teacher"),
]


@pytest.mark.parametrize(
    "script, words, text", CASES, ids=[f"{s.__name__} {' '.join(w)}"[:60] for s, w, _ in CASES])
def test_bad_input_is_one_line_and_exit_2(script, words, text, place, capsys, monkeypatch):
    """The words of CASES, and the line that they end in."""
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as error:
        script.main(words)
    lines = [line for line in capsys.readouterr().err.splitlines() if ": " in line and "it/s" not in line]
    assert error.value.code == 2 and len(lines) == 1 and text in lines[0], lines
