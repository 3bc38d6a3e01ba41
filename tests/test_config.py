"""kit/config.py: flags and their rules, presets against the papers' tables, folders by convention."""
import cm
import direct_cm
import kit
import multistep_cm
import scm
import sct
from conftest import SCRIPTS, draw_pictures, fails, one_line, parsed

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

TINY = ["--channels", 16, "--blocks", 1, "--batch", 8, "--steps", 4, "--out", "run"]
# What a resume may change, because the result does not depend on it (--micro changes dropout alone), and what
# belongs to one call, in every script.
FREE = {"out", "steps", "data", "teacher", "keep_every", "log_every", "save_every", "sample_every", "micro",
        "compile", "checkpointing", "gif"}
CALL = {"export", "resume", "overwrite", "dry_run", "sample", "nfe", "label", "prompt", "save"}
PAPER = {  # sCM, App. G: dataset, mode, size -> what the paper's tables say
    ("imagenet64", "diffusion", "S"): dict(lr=1e-2, P_mean=-0.8, P_std=1.6, ema_sigma_rel=0.075, dropout=0.0),
    ("imagenet64", "diffusion", "XL"): dict(lr=7e-3, ema_sigma_rel=0.04, dropout=0.1, lr_ref=35_000),
    ("imagenet64", "scd", "M"): dict(lr=9e-5, P_mean=-1.0, P_std=1.6, steps=400_000, lr_ref=35_000,
                                     dropout=0.0),
    ("imagenet64", "sct", "L"): dict(lr=8e-5, dropout=0.45, eps=1e-11, beta2=0.99, ema_sigma_rel=0.05),
    ("imagenet512", "diffusion", "XXL"): dict(lr=6.5e-3, P_mean=-0.4, P_std=1.0, label_dropout=0.1,
                                              ema_sigma_rel=0.015),
    ("imagenet512", "scd", "XXL"): dict(lr=6.5e-5, P_mean=-0.8, P_std=1.6, steps=200_000, guidance_max=2.0,
                                        lr_ref=70_000),
    ("imagenet512", "sct", "S"): dict(lr=1e-4, steps=100_000, guidance_max=1.0, tangent_c=0.1, warmup=10_000,
                                      dropout=0.25, dropout_res=16),
    ("imagenet512", "dscd", "M"): dict(lr=9e-5, dropout=0.1, dropout_res=16, guidance_max=2.0),
}
IMAGENET = dict(batch=2048, channel_mult=(1, 2, 3, 4), blocks=3, channels=192)
TABLES = [  # the other papers' tables, and those of their code
    (cm, "cifar10 cd", dict(batch=512, lr=4e-4, optimizer="radam", steps=800_000, points=18, mu=0.0,
        dropout=0.0, ema_halflife=512 * math.log(0.5) / math.log(0.9999), metric="lpips", flip=True)),
    (cm, "cifar10 ct", dict(batch=512, lr=4e-4, intervals_start=2, intervals=150, mu=0.9, steps=800_000)),
    (cm, "cifar10 ctct", dict(batch=512, lr=5e-6, dropout=0.3, metric="l2", steps=400_000)),
    (cm, "cifar10 ict", dict(batch=1024, lr=1e-4, dropout=0.3, steps=400_000, sigmas=(80.0, 0.821), mu=0.0,
        ema_halflife=1024 * math.log(0.5) / math.log(0.99993), metric="huber", P_std=2.0)),
    (cm, "cifar10 diffusion", dict(batch=512, lr=1e-3, optimizer="adam", dropout=0.13, P_mean=-1.2, P_std=1.2,
        ema_halflife=5e5, lr_warmup=19_531, beta2=0.999)),
    (cm, "imagenet64 cd", dict(IMAGENET, lr=8e-6, steps=600_000, points=40, mu=0.95, metric="lpips_avg",
        flip=True, sigmas=(80.0, 1.382), dropout=0.0, optimizer="radam", dtype="fp16")),
    (cm, "imagenet64 ct", dict(lr=1e-4, steps=800_000, intervals_start=2, intervals=200, mu=0.95)),
    (cm, "imagenet64 ict", dict(IMAGENET, batch=4096, lr=1e-4, steps=800_000, dropout=0.2, dropout_res=0,
        ema_halflife=4096 * math.log(0.5) / math.log(0.99997), sigmas=(80.0, 1.526))),
    (cm, "imagenet64 diffusion", dict(IMAGENET, lr=1e-2, lr_ref=35_000, P_mean=-0.8, P_std=1.6, dropout=0.0,
        ema_sigma_rel=0.075, uncertainty=True, dtype="fp16", steps=2**19, beta2=0.99, lr_warmup=4883,
        optimizer="adam", mu=0.0)),
    (sct, "cifar10 ect", dict(batch=128, lr=1e-4, optimizer="radam", dropout=0.2, shrink=2.0, widening=8.0,
        widening_rate=1.0, stage_steps=25_000, steps=200_000, P_mean=-1.1, P_std=2.0, ema_halflife=128 *
        math.log(0.5) / math.log(0.9999), sigmas=(80.0, 0.821), delta=0.0, sigma_shift=0.003)),
    (sct, "cifar10 sct", dict(batch=128, huber_c=1e-8, sigma_shift=0.0, P_mean=-1.1, flip=False)),
    (sct, "imagenet64 ect", dict(IMAGENET, batch=128, lr=1e-3, lr_ref=2000, dropout=0.4, dropout_res=16,
        shrink=4.0, huber_c=0.06, weighting="snr", P_mean=-0.8, P_std=1.6, sigmas=(80.0, 1.526),
        steps=100_000, beta2=0.99, optimizer="adam", sigma_shift=0.0, flip=False)),
    (sct, "imagenet64 ect --size XL", dict(channels=384, lr=7e-4, dropout=0.5)),
    (sct, "imagenet64 diffusion --size M", dict(lr=9e-3, dropout=0.1, dropout_res=0, ema_sigma_rel=0.06,
        batch=2048, uncertainty=True, steps=2**20)),
    (multistep_cm, "imagenet64 cd", dict(batch=2048, steps=200_000, teacher_steps=(64, 1280), anneal=0.5,
        x_var_frac=0.75, huber_c=1e-4, dropout=0.2, dropout_res=16, noise_res=(32, 64, 64))),
    (multistep_cm, "imagenet64 diffusion", dict(dropout=0.2, dropout_res=16, lr=1e-2, lr_ref=35_000)),
    (multistep_cm, "imagenet64 cd --size L", dict(dropout=0.1, dropout_res=32, channels=320)),
    (multistep_cm, "imagenet128 ct", dict(dropout=0.1, dropout_res=16, noise_res=(32, 128, 128))),
    (multistep_cm, "imagenet128 ct --size L", dict(dropout=0.1, dropout_res=64, channels=256)),
    (direct_cm, "text cm", dict(lr=1e-4, intervals=100, guidance=9.0, batch=16, steps=250, clip=1.0, seed=24,
        optimizer="adamw", lora_rank=64, ema_halflife=0.0, ema_sigma_rel=0.0, image_size=1024, metric="l2",
        solver="ddim", sigma_d=1.0, first_label=1)),
]


@pytest.mark.parametrize("run", PAPER, ids="-".join)
def test_presets_are_the_papers(run):
    """Learning rates, noise, dropout, EMA, iterations; batch 2048 in half precision throughout."""
    dataset, mode, size = run
    cfg = parsed("--dataset", dataset, "--mode", mode, "--size", size)
    expected = PAPER[run] | dict(batch=2048, dtype="fp16", blocks=3, optimizer="adam")
    assert {name: getattr(cfg, name) for name in expected} == pytest.approx(expected)
    assert cfg.channel_mult == (1, 2, 3, 4) and cfg.attention == (16, 8) and cfg.conditional


@pytest.mark.parametrize("script, words, expected", TABLES, ids=[f"{s.__name__} {w}" for s, w, _ in TABLES])
def test_presets_are_the_other_papers(script, words, expected):
    """What the papers and their published code say; an EMA's decay as its half-life, to the digits of
    both."""
    dataset, mode, *size = words.split()
    cfg = parsed("--dataset", dataset, "--mode", mode, *size, script=script)
    assert {name: getattr(cfg, name) for name in expected} == {
        k: pytest.approx(v, rel=0.02) if isinstance(v, float) else v for k, v in expected.items()}


def test_fig_4_of_sct_is_one_command():
    """dt = t / 256 at every t and step (Sec. 5), with the flags that the preset names."""
    flags = "--steps 16000 --shrink 256 --widening 0 --stage_steps 16000".split()
    cfg = parsed("--dataset", "cifar10", "--mode", "sct", *flags, script=sct)
    assert all(flag in Path(sct.__file__).read_text() for flag in (" ".join(flags[:4]), " ".join(flags[4:])))
    t = torch.tensor([0.01, 1.0, 80.0]).double()
    for step in (0, 8000, 15_999):
        assert torch.allclose(t - sct.earlier(t, torch.zeros(3).double(), step, cfg), t / 256)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_method_first(script, capsys):
    """Every flag with its meaning, the method's before the shared ones, and no block of usage."""
    module = SCRIPTS[script]
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "usage:" not in text and all(mode in text for mode in module.LOSSES)
    assert all(f"--{name} " in text for name in module.Config.__dataclass_fields__)
    assert text.index("--mode ") < text.index("--dataset ")


@dataclasses.dataclass
class Uncommented(kit.Config):
    mode: str = kit.fixed("a")
    own: float = 1.0


def test_a_field_needs_no_comment():
    """A flag without a comment has no words of help, and works."""
    cfg = kit.parse_args(Uncommented, {"gmm": {}}, {"a": None}, ["--own", "2"])
    assert (cfg.mode, cfg.own) == ("a", 2.0)


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_takes_everything_from_the_stored_run(script, train, capsys):
    """Every flag of the method and the training, but those that cannot change the result, is refused in one
    line that names both values; config.json stays."""
    script = SCRIPTS[script]
    train(*TINY, *{cm: ["--mu", 0.9], direct_cm: ["--mode", "cm"]}.get(script, []), script=script)
    before, tried = config_of("run"), 0
    for field in dataclasses.fields(script.Config):
        if field.name not in FREE and field.metadata.get("change") != "call":
            words = another(field, before[field.name])
            line = one_line(capsys, script.main, "--resume", "--out", "run", f"--{field.name}", words)
            assert f"--{field.name} " in line and "it cannot become" in line, line
            tried += 1
    assert tried > 35 and config_of("run") == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_run_keeps_and_what_a_resume_may_change(script):
    """A run keeps all flags but those of one call. A resume may change what cannot change the result."""
    change = {f.name: f.metadata.get("change") for f in dataclasses.fields(SCRIPTS[script].Config)}
    assert {name for name, when in change.items() if when == "resume"} == FREE
    assert {name for name, when in change.items() if when == "call"} >= CALL
    assert set(change.values()) <= {"call", "resume", "never", "sampling", None}


def test_sampling_cannot_change_what_was_trained(train, capsys):
    """With --sample, a flag of the network, of the data or the mode is refused; one of the sampler is
    taken."""
    train(*TINY, "--mode", "sct")
    for flags in (["--mode", "diffusion"], ["--channels", 32], ["--sigma_d", 1], ["--conditional"]):
        line = one_line(capsys, scm.main, "--sample", 2, "--out", "run", *flags)
        assert f"trained with {flags[0]} " in line and "cannot become" in line
    scm.main(["--sample", "2", "--out", "run", "--mid_t", "0.9", "--seed", "5"])
    assert config_of("run")["mid_t"] == 1.1


@pytest.mark.parametrize("script", ["scm", "sct", "multistep_cm"])
def test_resume_keeps_the_steps_of_a_schedule(script, train, capsys):
    """The cooldown of the toy's preset, and sct's average at half of training, depend on --steps."""
    train(*TINY, script=SCRIPTS[script])
    line = one_line(capsys, SCRIPTS[script].main, "--resume", "--out", "run", "--steps", 9)
    assert "--steps 4: it cannot become 9" in line


def test_resume_may_change_what_cannot_change_the_result(train):
    """More steps where no schedule depends on them, another rhythm of the log; config.json tells."""
    train(*TINY, "--lr_cooldown", 0)
    train("--resume", "--out", "run", "--steps", 6, "--log_every", 3, "--save_every", 2, "--checkpointing")
    assert kit.read_checkpoint("run")["step"] == config_of("run")["steps"] == 6
    assert config_of("run")["log_every"] == 3


@pytest.mark.parametrize("script", [cm, sct])
def test_noise_levels_are_as_many_evaluations(script, capsys):
    """--sigmas names them all, and another --nfe is refused."""
    def nfe(*words):
        return kit.parse_args(script.Config, script.PRESETS, script.LOSSES, list(words)).nfe
    assert nfe("--sigmas", "80,5,1") == nfe("--sigmas", "80,5,1", "--nfe", "3") == 3
    for words in (["--sigmas", "80,5,1", "--nfe", "2"], ["--sigmas", "80", "--nfe", "2"]):
        assert "--nfe" in fails(capsys, nfe, *words)


def test_folders_by_convention(capsys, monkeypatch):
    """out/SCRIPT for the toy's default, out/SCRIPT-DATASET-MODE for the rest; the teacher, or what tuning
    starts from, is out/SCRIPT-DATASET-diffusion, or the only one of another script. A line says so; without
    one, the line names the command that makes it. --init none and modes from random weights take none."""
    def parse(script, *words):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
        return kit.parse_args(script.Config, script.PRESETS, script.LOSSES, list(words))
    assert [parse(s).out for s in (scm, direct_cm)] == ["out/scm", "out/direct_cm"]
    assert parse(scm, "--mode", "sct").out == "out/scm-gmm-sct"
    assert parse(multistep_cm, "--dataset", "gmm1d").out == "out/multistep_cm-gmm1d-cd"
    for script in (scm, direct_cm):
        line = fails(capsys, parse, script, "--dataset", "shapes")
        assert "python scm.py --dataset shapes --mode diffusion" in line
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
    assert "--data PATH" in fails(capsys, kit.dataset, cfg)
    draw_pictures(tmp_path / "data" / "imagenet64")
    assert len(kit.dataset(cfg).rows) == 24
    draw_pictures(tmp_path / "data" / "cifar10", 12)
    assert "32 x 32" in fails(capsys, kit.dataset, cm.Config(dataset="cifar10", image_size=16))
    assert len(kit.dataset(cm.Config(dataset="cifar10")).rows) == 12
