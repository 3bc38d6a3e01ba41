"""Other people's networks: what --teacher, --init and --out may name, and what becomes of it."""
import cm
import common
import direct_cm
import kit
import multistep_cm
import scm
from conftest import one_line

import contextlib
import functools
import http.server
import json
import threading
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

UNET = dict(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"))


def save_unet(folder, scheduler, **options):
    """A pipeline's folder with a small random UNet2DModel."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**UNET | options)
    unet.save_pretrained(f"{folder}/unet")
    scheduler.save_pretrained(f"{folder}/scheduler")
    return unet.eval().requires_grad_(False)


@contextlib.contextmanager
def server(folder, cut=0):
    """The folder over HTTP on this machine; with `cut`, an answer ends so many bytes early."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def copyfile(self, source, file):
            blob = source.read()
            file.write(blob[:len(blob) - cut])
    one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{one.server_port}"
    one.shutdown()


@pytest.mark.parametrize("classes, steps", [(None, [0]), (5, [0]), (5, [22, 0])])
def test_openais_consistency_models_sample_as_in_diffusers(classes, steps):
    """The images of ConsistencyModelPipeline from the same noise, by `cm.py --sample --out FOLDER`."""
    scheduler = diffusers.CMStochasticIterativeScheduler()
    unet = save_unet("openai", scheduler, num_class_embeds=classes, resnet_time_scale_shift="scale_shift")
    pipe = diffusers.ConsistencyModelPipeline(unet, scheduler)
    words = ["--sample", "3", "--nfe", len(steps), "--out", "openai", "--save", "x.npz"]
    words += ["--sigmas", f"80,{common.karras(40)[22]:.9f}"] if len(steps) > 1 else []
    cm.main([str(w) for w in words + (["--label", 2] if classes else [])])
    gen = common.Draw(0, 0, 0, 3)
    noise = [gen.normal(3, 8, 8) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:  # the pipeline's fresh noise is ours
        patch.setattr("diffusers.schedulers.scheduling_consistency_models.randn_tensor",
                      lambda *args, **kw: noise[1])
        kw = dict(timesteps=[22, 0]) if len(steps) > 1 else dict(num_inference_steps=1)
        images = pipe(3, class_labels=[2] * 3 if classes else None, latents=noise[0], output_type="pt",
                      **kw).images
    expected = ((images * 2 - 1) * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.load("x.npz")["arr_0"].astype(int) - expected).max() <= 1


def test_openais_unconditional_models_edit():
    """--edit colorize by a network without labels."""
    save_unet("openai", diffusers.CMStochasticIterativeScheduler())
    Image.new("RGB", (8, 8), "red").save("a.png")
    cm.main("--edit colorize --input a.png --out openai --save e.png".split())
    assert Path("e.png").exists()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusers_unets_with_labels_variances_and_v(prediction):
    """F is that of the denoised sample by diffusers' own scheduler, at each of its steps."""
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, variance_type="learned")
    unet = save_unet("ddpm", scheduler, num_class_embeds=5, out_channels=6,
                     resnet_time_scale_shift="scale_shift")
    net = kit.load_net("ddpm")
    assert net.options == dict(shape=(3, 8, 8), classes=5)
    y, z = torch.tensor([1, 4]), torch.randn(2, 3, 8, 8)
    for step in (0, 300, 999):
        abar = scheduler.alphas_cumprod[step].double()
        angle = torch.atan2((1 - abar).sqrt(), 0.5 * abar.sqrt()).expand(2)
        x_t, t = common.to_trigflow(z.double(), abar.sqrt().expand(2), (1 - abar).sqrt().expand(2), 0.5)
        F = net(x_t / 0.5, t, y)
        x_0 = t.cos()[:, None, None, None] * x_t - t.sin()[:, None, None, None] * 0.5 * F
        out = unet(z, step, y).sample[:, :3]
        a, s = abar.sqrt(), (1 - abar).sqrt()
        expected = (z - s * out) / a if prediction == "epsilon" else a * z - s * out
        assert torch.allclose(angle, t) and torch.allclose(x_0, expected.double(), atol=1e-3, rtol=1e-3), step


def test_other_diffusion_models_are_sampled(capsys):
    """scm.py and cm.py solve the ODE of a UNet2DModel, with the same result; others say what they can."""
    scheduler = diffusers.DDPMScheduler()
    save_unet("ddpm", scheduler)
    for script in (scm, cm):
        script.main(f"--sample 4 --nfe 5 --out ddpm --save {script.__name__}.npz".split())
    a, b = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in ("scm", "cm"))
    assert a.shape == (4, 8, 8, 3) and np.abs(a - b).max() <= 1
    assert "the modes are cm, direct" in one_line(capsys, direct_cm.main, "--sample", 2, "--out", "ddpm")


@pytest.fixture
def run(folder, train):
    """A run on pictures, diffusion with dropped labels."""
    train("--dataset", "folder", "--data", folder, "--mode", "diffusion", "--channels", 8, "--blocks", 1,
          "--batch", 8, "--steps", 1, "--lr_cooldown", 0, "--out", "run")
    return ["--dataset", "folder", "--data", str(folder), "--batch", "8", "--steps", "1", "--out", "x"]


def test_a_url_is_fetched_once_and_whole(run, capsys, train):
    """--teacher URL: the weights of the file, kept in data/teachers, where they are read again without
    network. An answer that ends early leaves nothing."""
    with server(".", cut=100) as url:
        line = one_line(capsys, scm.main, *run, "--teacher", f"{url}/run/ckpt.pt")
        assert "damaged" in line and "put it at data/teachers/" in line
        assert not list(Path("data/teachers").glob("*"))
    with server(".") as url:
        train(*run, "--teacher", f"{url}/run/ckpt.pt")
    again = kit.read_checkpoint(f"{url}/run/ckpt.pt")
    assert all(torch.equal(v, again["ema"][k]) for k, v in kit.read_checkpoint("run")["ema"].items())
    assert "cannot download" in one_line(capsys, scm.main, *run, "--teacher", f"{url}/other.pkl")


def test_names_are_listed_and_lead_to_nvidia(capsys, monkeypatch):
    """`help` and an unknown word say what there is; a name is fetched from its URL."""
    assert "edm2-img512-s" in one_line(capsys, scm.main, "--teacher", "help")
    assert "edm2-img512-s" in one_line(capsys, scm.main, "--teacher", "edm2-img512-q")
    seen = []
    monkeypatch.setattr(kit.teachers, "download", lambda url, path: seen.append((url, str(path))))
    assert kit.teachers.find("edm2-img64-m") == Path(seen[0][1])
    assert seen[0][0].endswith("/edm2/posthoc-reconstructions/edm2-img64-m-2147483-0.060.pkl")


def test_no_guidance_from_a_teacher_that_never_dropped_labels(run, capsys, train):
    """One check for all scripts; nor by the model itself. And a student is no diffusion teacher."""
    small = ["--mode", "diffusion", "--channels", 8, "--blocks", 1]
    train(*run[:-2], *small, "--label_dropout", 0, "--out", "all")
    for script, words in ((scm, ["--guidance_max", 2]), (multistep_cm, ["--guidance", 2]),
                          (direct_cm, ["--guidance", 2, "--mode", "cm"]), (scm, ["--label_dropout", 0.1])):
        line = one_line(capsys, script.main, *run, "--teacher", "all", *words)
        assert "never trained without label" in line and "--label_dropout 0.1" in line
    assert "--label_dropout" in one_line(capsys, scm.main, "--sample", 2, "--guidance", 2, "--out", "all")
    train(*run[:-2], "--teacher", "run", "--out", "student")
    for script in (scm, cm):
        line = one_line(capsys, script.main, *run, "--teacher", "student")
        assert "no diffusion model" in line and "--init" in line
    train(*run, "--teacher", "run", "--guidance_max", 2)


def test_classes_are_compared_by_name(run, capsys, train, folder):
    """A student, --init and --resume of data whose class folders have other names or another order."""
    assert kit.read_checkpoint("run")["made_from"]["classes"] == ["a", "b", "c"]
    folder.rename(folder.with_name("other"))
    other = folder.with_name("other")
    (other / "c").rename(other / "0")
    words = [str(other) if w == str(folder) else w for w in run]
    for flag in ("--teacher", "--init"):
        mode = ["--mode", "sct"] if flag == "--init" else []
        line = one_line(capsys, scm.main, *words, *mode, flag, "run")
        assert "a, b, c" in line and "0, a, b" in line
    assert "0, a, b" in one_line(capsys, scm.main, "--resume", "--out", "run", "--data", other, "--steps", 2)


def test_edms_ramp_up():
    """The half-life is at most 5 % of the samples seen: after 300 steps of 32 with a half-life of 500,000 the
    average is of the last few, and without it of the start."""
    for rampup, low, high in ((0.05, 0.85, 1.0), (0.0, 0.0, 0.02)):
        cfg, average = scm.Config(ema_sigma_rel=0.0, ema_halflife=5e5, ema_rampup=rampup, batch=32), 0.0
        for step in range(1, 301):
            beta = common.ema_beta(step, cfg)
            average = beta * average + (1 - beta) * step / 300
        assert low < average < high
    assert kit.config.preset(cm.PRESETS, "cifar10", "diffusion")["ema_rampup"] == 0.05
    assert "ema_rampup" not in kit.config.preset(cm.PRESETS, "cifar10", "cd")


def test_another_projects_model_is_not_replaced(run, capsys):
    """transformers' files have the names of ours."""
    Path("hf").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("hf", name).write_text("{}")
    assert "other files" in one_line(capsys, scm.main, "--export", "hf", "--out", "run")
    assert Path("hf", "model.safetensors").read_text() == "{}"


def test_export_is_the_network(run):
    """--export: safetensors and the options of kit.networks.build give the samples' network."""
    scm.main(["--export", "e", "--out", "run"])
    net = kit.networks.build(json.loads(Path("e/config.json").read_text())["options"])
    net.load_state_dict(load_file("e/model.safetensors"))
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 1.2]), torch.tensor([0, 2])
    assert torch.equal(net.eval()(x, t, y), kit.load_net("run")(x, t, y))


def test_torch_export(run):
    """torch.export of the averaged network computes what it computes."""
    net = kit.load_net("run")
    at = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 1.2]), torch.tensor([0, 2])
    assert torch.allclose(torch.export.export(net, at).module()(*at), net(*at), atol=1e-6)


def test_onnx(run):
    """ONNX Runtime computes what the averaged network computes."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime
    net = kit.load_net("run")
    at = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 1.2]), torch.tensor([0, 2])
    torch.onnx.export(net, at, dynamo=True, verbose=False).save("net.onnx")
    session = onnxruntime.InferenceSession("net.onnx")
    F, = session.run(None, {i.name: v.numpy() for i, v in zip(session.get_inputs(), at)})
    assert np.allclose(F, net(*at).numpy(), atol=1e-5)
