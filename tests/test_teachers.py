"""kit/teachers.py: networks of diffusers and runs of ours as teachers, and what a student takes over."""
import cm
import common
import kit
import scm
from conftest import one_line, parsed

import copy
import inspect
import math
import os
import re
import textwrap
from pathlib import Path

import diffusers
import pytest
import torch

UNET = dict(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2)


def test_diffusers_unet_predicts_its_noise(train, folder):
    """At the time steps of its schedule, F is eps and x_0 of the scheduler's formula; cm.py distills it."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**UNET)
    scheduler = diffusers.DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02)
    net.save_pretrained("ddpm")
    scheduler.save_pretrained("ddpm")
    steps = torch.tensor([0, 10, 500, 999])
    z = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        eps = net(z, steps).sample
    abar = scheduler.alphas_cumprod[steps].double()
    noise = (1 - abar).sqrt()[:, None, None, None] * eps
    x_0 = (z - noise) / abar.sqrt()[:, None, None, None]  # without clipping
    x_t, t = common.to_trigflow(z.double(), abar.sqrt(), (1 - abar).sqrt(), 0.5)
    F = kit.load_net("ddpm")(x_t / 0.5, t)
    cos, sin = t.cos()[:, None, None, None], t.sin()[:, None, None, None]
    assert torch.allclose(F, (cos * 0.5 * eps - sin * x_0) / 0.5, atol=1e-3)
    assert kit.load_net("ddpm")(x_t, torch.full((4,), math.pi / 2).double()).isfinite().all()
    ckpt = train("--dataset", "folder", "--data", folder, "--batch", 8, "--steps", 1, "--channels", 8,
                 "--teacher", "ddpm", "--out", "cd", script=cm)
    assert ckpt["step"] == 1


@pytest.mark.parametrize("options, lost, word", [
    (dict(class_embed_type="timestep"), "", "labels"), (dict(out_channels=4), "", "outputs"),
    ({}, "diffusion_pytorch_model.safetensors", "damaged"), ({}, "scheduler_config.json", "complete")])
def test_other_diffusers_unets_are_refused_in_one_line(options, lost, word, capsys):
    """Labels that are no classes, further outputs, and folders that lack a file."""
    diffusers.UNet2DModel(**UNET, **options).save_pretrained("other")
    diffusers.DDPMScheduler(1000).save_pretrained("other")
    if lost:
        Path("other", lost).unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        kit.load_net("other")
    assert word in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_teachers_weights_are_kept_and_compiled(train, folder):
    """Of a run of ours, normalized once; with --compile its passes are compiled, too."""
    small = ["--channels", 8, "--channel_mult", "1,1", "--blocks", 1, "--attention", 4]
    train("--dataset", "folder", "--data", folder, "--mode", "diffusion", "--batch", 8, "--steps", 1, *small,
          "--out", "run")
    cfg = parsed("--dataset", "folder", "--data", folder, "--teacher", "run", "--compile")
    teacher = kit.load_teacher(cfg, kit.dataset(cfg), "cpu")
    plain = kit.load_net("run")
    frozen = [m for m in teacher.modules() if isinstance(m, kit.layers.MPConv)]
    assert all(m.frozen for m in frozen) and sum(m.kept is not None for m in frozen) > 10
    assert teacher._compiled_call_impl is not None and plain._compiled_call_impl is None
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    assert torch.equal(teacher.forward(x, t), plain(x, t)) and not copy.deepcopy(teacher)._compiled_call_impl


def test_the_documented_dit_teaches():
    """The class in Epsilon's docstring, on a tiny DiT: F is its eps in TrigFlow's coordinates, with and
    without labels; and scd distills it."""
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, num_embeds_ada_norm=10, norm_num_groups=4).eval()
    net.save_pretrained("dit/transformer")
    scheduler = diffusers.DDPMScheduler(1000)
    scheduler.save_pretrained("dit/scheduler")
    code, = re.findall(r"^ {4}class DiT.*", inspect.getdoc(kit.Epsilon), re.M | re.S)
    names = dict(common=common, kit=kit, torch=torch)
    exec(textwrap.dedent(code), names)  # our own docstring
    teacher = names["DiT"]("dit")
    step, y, z = torch.tensor([0, 400, 999]), torch.tensor([3, -1, 9]), torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        eps = net(z, step, class_labels=torch.tensor([3, 10, 9])).sample[:, :4].double()
        abar = scheduler.alphas_cumprod[step].double().view(3, 1, 1, 1)
        x_0 = (z - (1 - abar).sqrt() * eps) / abar.sqrt()
        F = teacher(z.double(), torch.atan(((1 - abar) / abar).sqrt()).flatten(), y)
    assert torch.allclose(F, abar.sqrt() * eps - (1 - abar).sqrt() * x_0, atol=1e-3, rtol=1e-3)
    cfg = scm.Config(sigma_d=1.0, warmup=0)
    student = kit.networks.build(dict(shape=(4, 8, 8), classes=10, channels=8, blocks=1, attention=(),
                                      sigma_d=1.0))
    loss, _ = scm.scd(student, student, teacher, z, y, 0, cfg, common.Draw(0, 0, 0, 3))
    assert loss.isfinite()


def test_student_starts_from_the_teachers_average(train, folder):
    """--teacher RUN gives the student the teacher's architecture and EMA, but a fresh weighting head."""
    words = ["--dataset", "folder", "--data", str(folder), "--batch", "8", "--steps", "1"]
    small = ["--channels", 8, "--blocks", 1, "--seed", 1]
    ema = train(*words, *small, "--mode", "diffusion", "--out", "teacher")["ema"]
    cfg = kit.parse_args(scm.Config, scm.PRESETS, scm.LOSSES, [*words, "--teacher", "teacher"])
    assert cfg.channels == 8 and cfg.blocks == 1
    net = kit.network(cfg, kit.dataset(cfg))
    state, fresh = net.state_dict(), kit.networks.build(net.options, cfg.seed).state_dict()
    assert all(torch.equal(state[k], ema[k]) for k in state if not k.startswith("head."))
    assert all(torch.equal(state[k], fresh[k]) for k in state if k.startswith("head."))
    assert not torch.equal(fresh["head.linear.weight"], ema["head.linear.weight"])


def test_a_checkpoint_of_another_version_is_named_as_such(train, capsys):
    """Weights of other names or sizes, as teacher, to sample from, and to resume."""
    small = ["--channels", 16, "--blocks", 1, "--batch", 128, "--steps", 1]
    ckpt = train("--mode", "diffusion", *small, "--out", "run")

    def old(state):
        return {"cond." + name: value for name, value in state.items()}
    for change in (dict(ema=old(ckpt["ema"])), dict(options=ckpt["options"] | dict(blocks=3))):
        torch.save(ckpt | change, "run/ckpt.pt")
        for words in (["--sample", 4, "--out", "run"], ["--teacher", "run", "--out", "x"]):
            assert "another version" in one_line(capsys, scm.main, *words)
    torch.save(ckpt | dict(net=old(ckpt["net"])), "run/ckpt.pt")
    assert "cannot be resumed" in one_line(capsys, scm.main, "--resume", "--out", "run")


def test_loading_a_checkpoint_never_runs_code(capsys):
    """A pickle that would call a function is refused, and the function is not called."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("owned",)
    Path("run").mkdir()
    torch.save(dict(script="scm", config={}, options={}, net=Evil(), ema={}), "run/ckpt.pt")
    assert "no checkpoint" in one_line(capsys, scm.main, "--sample", 4, "--out", "run")
    assert not Path("owned").exists()
