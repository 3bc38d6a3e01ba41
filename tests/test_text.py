"""kit/text.py: text-to-image pipelines. A tiny random one of diffusers' own classes goes the way of SDXL."""
import common
import direct_cm
import eval as evaluation
import kit
import multistep_cm
import scm
from conftest import two_processes

import copy
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

SMALL = dict(block_out_channels=(32, 64), layers_per_block=1, sample_size=8, norm_num_groups=8,
             down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
             up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Folder of a StableDiffusionXLPipeline with random weights, 16 x 16 pixels, 8 x 8 latents."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sdxl")
    unet = diffusers.UNet2DConditionModel(
        **SMALL, cross_attention_dim=64, attention_head_dim=(2, 4), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=80)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=8,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, sample_size=16)
    words = ["<|startoftext|>", "<|endoftext|>"]
    words += [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    files = str(path / "vocab.json"), str(path / "merges.txt")
    tokenizer = transformers.CLIPTokenizer(*files, model_max_length=16)
    text = transformers.CLIPTextConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=1, hidden_size=32, intermediate_size=37,
        num_attention_heads=4, num_hidden_layers=2, vocab_size=len(words), max_position_embeddings=16,
        projection_dim=32)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = diffusers.EulerDiscreteScheduler(**betas)
    diffusers.StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=transformers.CLIPTextModel(text),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text)).save_pretrained(path)
    return str(path)


@pytest.fixture
def captioned(tmp_path):
    """Ten pictures with captions in .txt files."""
    images, labels = kit.toys.draw_shapes(scm.Config(image_size=20), 10)
    (tmp_path / "captioned").mkdir()
    for i, (image, label) in enumerate(zip(images, labels)):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "captioned" / f"{i}.png")
        word = ["disc", "triangle", "square", "pentagon"][label % 4]
        (tmp_path / "captioned" / f"{i}.txt").write_text(word)
    return tmp_path / "captioned"


@pytest.fixture
def words(pipeline, captioned):
    return ["--pretrained", pipeline, "--data", str(captioned), "--image_size", "16", "--batch", "8",
            "--micro", "4", "--intervals", "4", "--lora_rank", "4", "--log_every", "1", "--lr", "0.01"]


def config(words, *more):
    flags = ["--mode", "cm", *words, *more]
    return kit.parse_args(direct_cm.Config, direct_cm.PRESETS, direct_cm.LOSSES, flags)


def test_both_losses_train_and_diffusers_reads_the_adapters(words, pipeline):
    """LoRA alone is trained and the teacher stays; in a fresh pipeline the file gives the student's eps; and
    a picture is drawn."""
    cfg = config(words)
    data = kit.text.Captions(cfg, "cpu")
    teacher = data.teacher
    z, t, y = torch.randn(3, *data.shape), torch.tensor([1000, 500, 10]), torch.tensor([0, 5, -1])
    before = teacher.eps(z, t - 1, y).detach()
    direct_cm.main([*words, "--mode", "both", "--steps", "2", "--out", "run"])
    for mode in ("cm", "direct"):
        ckpt = kit.read_checkpoint(f"run/{mode}")
        assert all("lora" in name for name in ckpt["net"])
        assert any(v.abs().max() > 0 for name, v in ckpt["net"].items() if "lora_B" in name)
        student = teacher.sibling(adapted=True)
        student.load_state_dict(ckpt["net"])
        eps = student.eps(z, t - 1, y).detach()
        assert torch.equal(teacher.eps(z, t - 1, y), before) and not torch.allclose(eps, before, atol=1e-3)
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(pipeline)
        pipe.load_lora_weights(f"run/{mode}", weight_name="pytorch_lora_weights.safetensors")
        tables = kit.text.columns(teacher.text[:], "prompt", "pooled")
        prompts, pooled = (table[y] * (y >= 0).view(3, *[1] * (table.ndim - 1)) for table in tables)
        added = dict(text_embeds=pooled, time_ids=torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(3, 6))
        assert torch.allclose(pipe.unet(z, t, prompts, added_cond_kwargs=added).sample, eps, atol=1e-4)
    direct_cm.main(["--sample", "2", "--prompt", "a disc", "--nfe", "2", "--out", "run/cm"])
    assert Image.open("run/cm/samples.png").size[0] > 30


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_only_the_adapters_learn(words, dtype):
    """One step on the shared U-Net: gradients for LoRA alone, in float32; the teacher's eps stays, the
    student's moves."""
    cfg = config(words, "--dtype", dtype)
    data = kit.dataset(cfg)
    teacher, student = kit.load_teacher(cfg, data, "cpu"), kit.network(cfg, data)
    gen, z, t = common.Draw(0, 0, 0, 2), torch.randn(2, *data.shape), torch.tensor([1.4, 0.3])
    y = torch.tensor([1, 2])
    with torch.no_grad():
        before = teacher(z, t, y), student(z, t, y)
    x0, y0 = data.batch(gen)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    direct_cm.cm(student, student, teacher, x0, y0, 0, cfg, gen)[0].backward()
    learn = {name for name, p in student.named_parameters() if p.grad is not None}
    assert learn == {name for name, p in student.named_parameters() if "lora_" in name}
    assert all(p.dtype == torch.float32 for name, p in student.named_parameters() if name in learn)
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(teacher(z, t, y), before[0])
        assert not torch.allclose(student(z, t, y), before[1], atol=1e-3)


@pytest.fixture
def sd15(pipeline):
    """Folder of a StableDiffusionPipeline: one text encoder, no pooled embeddings."""
    components = diffusers.StableDiffusionXLPipeline.from_pretrained(pipeline).components
    parts = {name: components[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    unet = diffusers.UNet2DConditionModel(**SMALL, cross_attention_dim=32)
    pipe = diffusers.StableDiffusionPipeline(unet=unet, safety_checker=None, feature_extractor=None, **parts)
    pipe.save_pretrained("sd15")
    return "sd15"


def test_stable_diffusion_15(sd15, words):
    """The same path on SD 1.5."""
    direct_cm.main([*words, "--pretrained", sd15, "--mode", "cm", "--steps", "2", "--out", "run"])
    direct_cm.main(["--sample", "2", "--prompt", "a disc", "--nfe", "2", "--out", "run"])
    assert Image.open("run/samples.png").size[0] > 30


def test_the_pipeline_behind_f_is_its_own_eps(words):
    """predict() through F and angles gives the U-Net's eps at the label itself, as the paper's code calls it,
    its x_0, and Imagen's guidance; y = -1 has zero embeddings, the others the caption's."""
    cfg = config(words)
    data = kit.text.Captions(cfg, "cpu")
    net, (prompts, pooled) = data.teacher, kit.text.columns(data.rows[:], "prompt", "pooled")
    z, t, y = torch.randn(3, *data.shape), torch.tensor([1000, 600, 10]), torch.tensor([3, 4, 9])
    size = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(3, 6)
    with torch.no_grad():
        plain, none = (net.unet(z, t, prompts[y] * k, added_cond_kwargs=dict(
            text_embeds=pooled[y] * k, time_ids=size)).sample for k in (1, 0))
        for w in (1.0, 9.0):
            x_0, eps = direct_cm.predict(net, z, t, y, cfg, w)
            expected = none + w * (plain - none)
            alpha, sigma = (v.view(3, 1, 1, 1) for v in direct_cm.alpha_sigma(t))
            assert torch.allclose(eps.float(), expected, atol=1e-4 * w, rtol=1e-4)
            assert torch.allclose(x_0.double(), (z - sigma * expected) / alpha, atol=1e-3 * w, rtol=1e-4)


def test_start_from_trained_adapters_and_other_pipelines(words, pipeline, capsys):
    """--init RUN starts from its adapters; a pipeline that predicts neither eps nor v, and --teacher, are
    refused. A copy is on the device of the original."""
    direct_cm.main([*words, "--out", "run", "--mode", "cm", "--steps", "1"])
    direct_cm.main([*words, "--out", "more", "--mode", "cm", "--steps", "1", "--lr", "0", "--init", "run"])
    a, b = (kit.read_checkpoint(out)["net"] for out in ("run", "more"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert copy.deepcopy(kit.dataset(config(words)).teacher.to("meta")).log_ratio.is_meta
    assert config(words).out == "out/direct_cm-text-cm"
    shutil.copytree(pipeline, "v")
    path = Path("v/scheduler/scheduler_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(prediction_type="sample")))
    for flags, text in ((["--pretrained", "v"], "sample"), (["--teacher", "run"], "--teacher")):
        with pytest.raises(SystemExit):
            kit.dataset(config([*words, *flags]))
        assert text in capsys.readouterr().err


def test_table_of_teacher_and_student(words, tmp_path, monkeypatch):
    """eval.py --reference teacher: a student with untrained adapters and one solver step is the teacher, so E
    and the distance are 0; with more steps they are not."""
    monkeypatch.setattr(evaluation, "text_scores", lambda clip, aesthetic, device: None)
    (tmp_path / "prompts.txt").write_text("a disc\na square\na pentagon\n")
    flags = ["run", "--prompts", "prompts.txt", "--reference", "teacher", "--clip", "none"]
    direct_cm.main([*words, "--out", "run", "--mode", "cm", "--steps", "1", "--lr", "0", "--guidance", "1"])
    ckpt = torch.load("run/ckpt.pt", weights_only=True)
    rows = {}
    for intervals in (1, 4):
        torch.save(ckpt | dict(config=ckpt["config"] | dict(intervals=intervals)), "run/ckpt.pt")
        evaluation.main([*flags, "--nfe", "1", "--batch", "2"])
        rows[intervals] = json.loads(Path("run/eval.json").read_text())
    assert [row["nfe"] for row in rows[1]] == ["teacher", 1] and rows[4][0]["ode_error"] == 0
    assert rows[1][1]["ode_error"] < 1e-4 and rows[1][1]["frechet_distance"] < 1e-6
    assert rows[4][1]["ode_error"] > 1e-3 and rows[4][1]["frechet_distance"] > 1e-6
    evaluation.main(["run", "--prompts", "prompts.txt", "--nfe", "1"])  # against the run's own images
    assert json.loads(Path("run/eval.json").read_text())[0]["frechet_distance"] > 0


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_multistep_distills_a_pipeline(kind, pipeline, captioned, request):
    """multistep_cm.py --pretrained: LoRA alone is trained; the run samples by prompt in as many steps as it
    has segments; guidance is the teacher's."""
    path = pipeline if kind == "sdxl" else request.getfixturevalue("sd15")
    multistep_cm.main(["--pretrained", path, "--data", str(captioned), "--image_size", "16", "--batch", "4",
                       "--micro", "2", "--steps", "2", "--lora_rank", "4", "--student_steps", "4",
                       "--teacher_steps", "8,8", "--lr", "0.01", "--out", "run"])
    ckpt = kit.read_checkpoint("run")
    assert ckpt["config"]["guidance"] == 1.5 and all("lora" in name for name in ckpt["net"])
    assert any(v.abs().max() > 0 for name, v in ckpt["net"].items() if "lora_B" in name)
    multistep_cm.main(["--sample", "2", "--prompt", "a disc", "--nfe", "4", "--out", "run"])
    assert Image.open("run/samples.png").size[0] > 30


def test_one_segment_of_a_pipeline_is_cm(words):
    """With one segment, DDIM from s to the data is f^- itself, so the target is the x that leads z_t
    there."""
    cfg = kit.parse_args(multistep_cm.Config, multistep_cm.PRESETS, multistep_cm.LOSSES, [
        "--dataset", "text", *words[:6], "--student_steps", "1", "--teacher_steps", "4,4"])
    data = kit.dataset(cfg)
    net, teacher, gen = kit.network(cfg, data), data.teacher, common.Draw(0, 0, 0, 4)
    x0, y = data.batch(gen)
    t, s, t_step = multistep_cm.times(gen, 0, cfg)
    z_t = multistep_cm.noisy(x0, t, gen, cfg)[0]
    with torch.no_grad():
        z_s = multistep_cm.ode_step(teacher, z_t, t, s, y, cfg, x0)
        goal = torch.where((s == 0).view(4, 1, 1, 1), z_s, multistep_cm.f(net, z_s, s, y, cfg))
        loss, _ = multistep_cm.consistency(net, net, z_t, t, z_s, s, y, cfg, gen, t_step)
        error = multistep_cm.f(net, z_t, t, y, cfg) - goal
    assert (t_step == 0).all() and torch.allclose(loss, multistep_cm.weighted(error, t, cfg), rtol=1e-4)


def test_dropped_captions_are_no_captions(words):
    """y = -1, from --label_dropout or None, is the network's output for zero embeddings, whatever stands
    beside it in the batch."""
    net = kit.dataset(config(words)).teacher
    x, t = torch.randn(2, *net.options["shape"]), torch.tensor([1.2, 0.4])
    with torch.no_grad():
        mixed, none, absent = (net(x, t, y) for y in (torch.tensor([3, -1]), torch.tensor([-1, -1]), None))
    assert torch.allclose(mixed[1], none[1], atol=1e-5) and torch.equal(none, absent)
    assert not torch.allclose(mixed[0], none[0], atol=1e-4)


def test_resume_and_two_processes(words, train):
    """A stopped and resumed run has the unbroken run's adapters, bit for bit; a run of two processes has them
    to float tolerance."""
    words = ["--mode", "cm", *words, "--lr", 1e-4]
    whole = train(*words, "--steps", 3, "--out", "whole", script=direct_cm)
    train(*words, "--steps", 2, "--out", "parts", script=direct_cm)
    parts = train("--resume", "--steps", 3, "--out", "parts", script=direct_cm)
    assert whole["net"].keys() == parts["net"].keys()
    assert all(torch.equal(whole["net"][k], parts["net"][k]) for k in whole["net"])
    two_processes("direct_cm", *words, "--steps", 3, "--out", "two")
    two = kit.read_checkpoint("two")
    assert all(torch.allclose(whole["net"][k], two["net"][k], atol=2e-5) for k in whole["net"])
    assert Path("two/pytorch_lora_weights.safetensors").exists()


def test_captions_from_tables(captioned):
    """metadata.jsonl and metadata.csv say the same as the .txt files."""
    cfg = direct_cm.Config(data=str(captioned))
    pairs = kit.text.read_captions(cfg)
    assert len(pairs) == 10
    rows = [dict(file_name=p.name, text=text) for p, text in pairs]
    lines = [f"{row['file_name']},{row['text']}" for row in rows]
    (captioned / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    assert kit.text.read_captions(cfg) == pairs
    (captioned / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert kit.text.read_captions(cfg) == pairs


def test_bad_input(words, captioned, capsys, folder):
    """Each ends with one line, which follows what diffusers may have said, and nothing is written."""
    def fails(text, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            direct_cm.main([*words, "--steps", "1", "--out", "run", *flags])
        lines = [line for line in capsys.readouterr().err.splitlines() if ": " in line]
        assert error.value.code == 2 and text in lines[-1], lines
    fails("SDXL pipeline", "--pretrained", str(folder))
    fails("--pretrained", "--pretrained", "", "--dataset", "text")
    fails("300", "--intervals", "300")
    fails("no checkpoint", "--sample", "2", "--out", "run")
    (captioned / "3.png").write_bytes(b"no image")
    fails("3.png")
    (captioned / "5.txt").unlink()
    fails("caption")
    assert not Path("run/config.json").exists() and np.all([p.exists() for p in captioned.glob("*.png")])


def test_eval_scores_images_and_text(words, pipeline, tmp_path):
    """eval.py draws an SDXL run from prompts, whatever the batch; CLIP's and LAION's scores by definition."""
    files = f"{pipeline}/vocab.json", f"{pipeline}/merges.txt"
    tokenizer = transformers.CLIPTokenizer(*files, model_max_length=16)
    sizes = dict(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2)
    text = sizes | dict(bos_token_id=0, eos_token_id=1, pad_token_id=1, vocab_size=len(tokenizer),
                        max_position_embeddings=16)
    vision = sizes | dict(image_size=16, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, projection_dim=16, vision_config=vision)
    clip = transformers.CLIPModel(config)
    crop = dict(height=16, width=16)
    shrink = transformers.CLIPImageProcessor(size=dict(shortest_edge=16), crop_size=crop)
    for part in (clip, transformers.CLIPProcessor(shrink, tokenizer)):
        part.save_pretrained("clip")
    shapes = {0: (8, 16), 2: (6, 8), 4: (5, 6), 6: (4, 5), 7: (1, 4)}
    state = {f"layers.{i}.weight": torch.randn(shape) for i, shape in shapes.items()}
    state |= {f"layers.{i}.bias": torch.randn(shape[0]) for i, shape in shapes.items()}
    torch.save(state, "laion.pth")
    (tmp_path / "prompts.txt").write_text("a disc\na square\n\na pentagon\n")
    direct_cm.main([*words, "--out", "xl", "--mode", "cm", "--steps", "1"])
    flags = ["xl", "--prompts", "prompts.txt", "--nfe", "2", "--clip", "clip", "--aesthetic", "laion.pth",
             "--write", "--reference", str(tmp_path / "captioned")]
    for batch in ("2", "3"):
        evaluation.main([*flags, "--batch", batch, "--out", f"batch{batch}"])
    a, b = (json.loads((tmp_path / f"batch{batch}" / "eval.json").read_text())[0] for batch in "23")
    images = torch.from_numpy(np.load("batch3/xl-2nfe.npz")["arr_0"]).permute(0, 3, 1, 2)
    inputs = shrink(images=list(images), return_tensors="pt")
    with torch.no_grad():
        seen = torch.nn.functional.normalize(clip.get_image_features(**inputs).pooler_output)
        read = [clip.get_text_features(torch.tensor([tokenizer(p).input_ids])).pooler_output
                for p in ("a disc", "a square", "a pentagon")]
        cosines = (seen * torch.nn.functional.normalize(torch.cat(read))).sum(1)
        layers = [torch.nn.Linear(*shape[::-1]) for shape in shapes.values()]
        for i, layer in zip(shapes, layers):
            layer.weight.data, layer.bias.data = state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]
        quality = torch.nn.Sequential(*layers)(seen)
    assert b["clip_score"] == pytest.approx(float(cosines.mean()), abs=1e-5) and b["n"] == 3
    assert b["aesthetic_score"] == pytest.approx(float(quality.mean()), rel=1e-4)
    assert a["clip_score"] == pytest.approx(b["clip_score"], abs=1e-3)


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_guided_eps_is_the_pipelines(kind, words, pipeline, request):
    """Guidance of 1, 1.5 and 9: eps from the embeddings that diffusers' own encode_prompt gives for a caption
    and for none, which are zeros for SDXL and the empty caption for SD 1.5."""
    path = pipeline if kind == "sdxl" else request.getfixturevalue("sd15")
    cfg = config([*words, "--pretrained", path])
    net = kit.dataset(cfg).teacher
    pipe = diffusers.DiffusionPipeline.from_pretrained(path)
    z, t, y = torch.randn(2, *net.options["shape"]), torch.tensor([900, 300]), torch.tensor([3, 5])
    captions = [Path(words[3], f"{i}.txt").read_text() for i in y]
    found = pipe.encode_prompt(captions, device="cpu", num_images_per_prompt=1,
                               do_classifier_free_guidance=True)
    added = [None, None]
    if kind == "sdxl":
        size = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(2, 6)
        added = [dict(text_embeds=pooled, time_ids=size) for pooled in found[2:]]
    with torch.no_grad():
        eps, none = (pipe.unet(z, t, prompt, added_cond_kwargs=more).sample
                     for prompt, more in zip(found, added))
        for w in (1.0, 1.5, 9.0):
            _, ours = direct_cm.predict(net, z, t, y, cfg, w)
            expected = none + w * (eps - none)
            assert (ours - expected).norm() < 1e-4 * w * expected.norm(), w


def test_the_file_beside_the_adapters_says_how_to_sample(words, pipeline):
    """The pipeline with the adapters, the scheduler and the timesteps of inference.json draws our latent."""
    direct_cm.main([*words, "--mode", "cm", "--steps", "2", "--first_label", "0", "--out", "run"])
    said = json.loads(Path("run/inference.json").read_text())
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(pipeline)
    pipe.load_lora_weights("run", weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = getattr(diffusers, said["scheduler"]).from_config(pipe.scheduler.config)
    net = kit.load_net("run")
    net.read(["a disc"])
    noise = torch.randn(1, *net.options["shape"], generator=torch.Generator().manual_seed(0))
    theirs = pipe("a disc", timesteps=said["timesteps"]["1"], guidance_scale=said["guidance_scale"],
                  height=16, width=16, latents=noise, output_type="latent").images
    ours = direct_cm.sample(net, noise, torch.tensor([0]), 1, config(words), None)
    assert (ours - theirs).norm() < 1e-2 * theirs.norm()
