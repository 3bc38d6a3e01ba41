"""Networks that predict eps or v; text-to-image pipelines with LoRA and captions."""
from common import like
from kit.data import autoencoder, decode, decode_latents, fingerprint, to_uint8
from kit.layers import DTYPES
from kit.process import fail, progress, reading, writing
from kit.store import open_store

import copy
import csv
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn


class Epsilon(nn.Module):
    """A network that predicts eps at the steps 0, 1, .. of a variance-preserving schedule, as F = net(x, t,
    y).

    Angles become steps along log(sigma / alpha). Beyond the first and last step it is called with those. What
    extends this says what eps(z, step, y) is, for z of the variance-preserving process. It may also be v =
    alpha eps - sigma x_0, if `prediction` says so, as diffusers calls it. So a DiT of diffusers teaches on
    its latents, with --sigma_d 1 and --teacher exact, if own_dataset's object has teacher = DiT(FOLDER):

        class DiT(kit.Epsilon):
            def __init__(self, path):
                from diffusers import DDPMScheduler, DiTTransformer2DModel
                betas = DDPMScheduler.from_pretrained(path, subfolder="scheduler").betas
                super().__init__(betas, sigma_d=1.0)
                self.net = DiTTransformer2DModel.from_pretrained(path, subfolder="transformer").eval()

            def eps(self, z, step, y):
                y = torch.where(y < 0, self.net.config.num_embeds_ada_norm, y)   # the label of none
                return self.net(z, step, class_labels=y).sample[:, :z.shape[1]]  # without variances"""

    def __init__(self, betas, sigma_d, prediction="epsilon"):
        super().__init__()
        if prediction not in ("epsilon", "v_prediction"):
            fail(f"a network that predicts {prediction}: only epsilon and v_prediction are known")
        self.sigma_d, self.prediction = sigma_d, prediction
        abar = (1 - betas.double()).cumprod(0)
        self.register_buffer("log_ratio", (1 / abar - 1).log() / 2, persistent=False)  # log(sigma / alpha)

    def forward(self, x, t, y=None, guidance=None):
        t = torch.minimum(t.double(), torch.atan(self.log_ratio[-1].exp() / self.sigma_d))
        ratio = self.sigma_d * t.tan()
        log = ratio.log().clamp(self.log_ratio[0], self.log_ratio[-1])
        i = torch.searchsorted(self.log_ratio, log).clamp(1, len(self.log_ratio) - 1)
        below, above = self.log_ratio[i - 1], self.log_ratio[i]
        step = (i - 1 + (log - below) / (above - below)).float()
        noisy = self.sigma_d * x / like(t.cos(), x)                                  # x_0 + ratio eps
        alpha = like((1 + ratio**2).rsqrt(), x)
        eps = self.eps((noisy * alpha).float(), step, y).to(x.dtype)
        if self.prediction == "v_prediction":  # alpha v + sigma z = eps, with sigma = ratio alpha
            eps = alpha * (eps + like(ratio, x) * noisy * alpha)
        return like(t.cos(), x) * eps - like(t.sin() / self.sigma_d, x) * (noisy - like(ratio, x) * eps)


LORA = ("to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,"
        "downsamplers.0.conv,upsamplers.0.conv,time_emb_proj").split(",")


class TextToImage(Epsilon):
    """The U-Net of a text-to-image pipeline of diffusers, SDXL or Stable Diffusion 1.5, on its latents.
    Labels are indices of captions, rows of `text` (see text_encoder); the last row, -1, is what the pipeline
    takes for none.

    The U-Net is frozen but for LoRA adapters, which are what is trained and all that state_dict() holds. The
    teacher is the same U-Net without them."""

    def __init__(self, shape, pretrained, image_size, lora_rank, first_label, dtype, sigma_d, micro,
                 classes=0, text=None, unet=None, adapted=True):
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from peft import LoraConfig
        with reading(f"--pretrained {pretrained} is not a readable SDXL pipeline or SD 1.5"):
            scheduler = DDPMScheduler.from_pretrained(pretrained, subfolder="scheduler")
            if not unet:
                unet = UNet2DConditionModel.from_pretrained(
                    pretrained, subfolder="unet", torch_dtype=DTYPES[dtype])
                unet.requires_grad_(False).enable_gradient_checkpointing()
                unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=LORA))
        super().__init__(scheduler.betas, sigma_d, scheduler.config.prediction_type)
        for p in unet.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
        self.unet, self.adapted, self.text, self.precision = unet, adapted, text, DTYPES[dtype]
        self.extra = nn.ModuleDict()  # as of every network (see networks.build)
        self.options = dict(
            shape=shape, pretrained=pretrained, image_size=image_size, lora_rank=lora_rank,
            first_label=first_label, dtype=dtype, sigma_d=sigma_d, micro=micro, classes=classes)

    def sibling(self, adapted, unet=None):
        """The student (adapted) or the teacher on the same U-Net, or on a copy of it."""
        twin = TextToImage(**self.options, text=self.text, unet=unet or self.unet, adapted=adapted)
        return twin.to(self.log_ratio.device)

    def __deepcopy__(self, memo):
        """A copy with its own LoRA on the same frozen weights."""
        memo |= {id(p): p for p in self.unet.parameters() if not p.requires_grad}
        return self.sibling(self.adapted, copy.deepcopy(self.unet, memo))

    def read(self, captions):
        """Take these captions, [str], as labels 0, 1, .."""
        encode = text_encoder(self.options["pretrained"], self.log_ratio.device)
        self.text = encode([*captions, ""])
        self.options["classes"] = len(captions)

    def forward(self, x, t, y=None, guidance=None):
        n = self.options["micro"] or len(x)  # sampling takes no more at once than training
        y = torch.full_like(t, -1, dtype=torch.int64) if y is None else y
        parts = zip(x.split(n), t.split(n), y.split(n))
        return torch.cat([super(TextToImage, self).forward(*part) for part in parts])

    def eps(self, z, step, y):
        # DEPARTS: the authors of Direct CM resize bilinearly, crop at random, and tell SDXL each image's own
        # size and corner; here the crop is the centre, and SDXL is told of an image of just this size, with
        # and without a caption alike
        side = self.options["image_size"]
        prompts, pooled = (v.to(z) for v in columns(self.text[y.cpu().numpy()], "prompt", "pooled"))
        size = z.new_tensor([side, side, 0, 0, side, side]).expand(len(z), 6)
        added = dict(text_embeds=pooled, time_ids=size) if pooled.numel() else None  # SD 1.5 takes none
        self.unet.enable_adapters() if self.adapted else self.unet.disable_adapters()
        with torch.autocast(z.device.type, self.precision, enabled=self.precision != torch.float32):
            eps = self.unet(z, step + self.options["first_label"], prompts, added_cond_kwargs=added).sample
        self.unet.enable_adapters()
        return eps.float()

    def state_dict(self, **kw):
        from peft import get_peft_model_state_dict
        return get_peft_model_state_dict(self.unet)

    def load_state_dict(self, state):
        from peft import set_peft_model_state_dict
        set_peft_model_state_dict(self.unet, state)

    def export(self, folder, inference):
        """Write the adapters as pytorch_lora_weights.safetensors, for diffusers' load_lora_weights, and
        inference.json, what it takes to sample with them. There `ratios`, sigma / alpha of each step, become
        the timesteps of the pipeline's own schedule."""
        from diffusers import StableDiffusionXLPipeline
        def nearest(ratio):
            return int((self.log_ratio - math.log(ratio)).abs().argmin())
        ratios = inference.pop("ratios", {})
        inference["timesteps"] = {n: [nearest(ratio) for ratio in row] for n, row in ratios.items()}
        with writing(folder):
            StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=self.state_dict())
            Path(folder, "inference.json").write_text(json.dumps(inference, indent=1))


def text_encoder(pretrained, device):
    """A function: [str] -> rows (n,) with the fields `prompt`, embeddings (L, C) by a pipeline's text
    encoders, and `pooled` (P,), where P is 0 for SD 1.5. "" is what guidance compares with: the empty
    caption, or zeros where the pipeline's configuration says so, as SDXL's does."""
    from diffusers import DiffusionPipeline
    with reading(f"--pretrained {pretrained} is not a readable SDXL pipeline or SD 1.5"):
        pipe = DiffusionPipeline.from_pretrained(pretrained, unet=None, vae=None).to(device)
        if type(pipe).__name__ not in ("StableDiffusionXLPipeline", "StableDiffusionPipeline"):
            raise ValueError(f"it is a {type(pipe).__name__}")

    @torch.no_grad()
    def encode(captions):
        rows = []
        for caption in progress(captions, desc="read captions", leave=False):
            prompt, _, *pooled = pipe.encode_prompt(caption, device=device, num_images_per_prompt=1,
                                                    do_classifier_free_guidance=False)
            pooled = pooled[0][0] if pooled else prompt.new_zeros(0)
            rows.append(record(prompt=prompt[0].float().cpu().numpy(), pooled=pooled.float().cpu().numpy()))
            if not caption and pipe.config.get("force_zeros_for_empty_prompt"):
                rows[-1] = np.zeros_like(rows[-1])
        return np.stack(rows)
    return encode


def record(**fields):
    """Arrays as the named fields of one row, a numpy array without dimensions."""
    row = np.zeros((), [(name, value.dtype, value.shape) for name, value in fields.items()])
    for name, value in fields.items():
        row[name] = value
    return row


def columns(rows, *names):
    """Fields of rows as tensors."""
    return [torch.from_numpy(np.ascontiguousarray(rows[name])) for name in names]


class Captions:
    """The images of --data as latents of --pretrained's autoencoder, with their captions, which are encoded
    once and kept in data/cache. x0 has the scale of the pipeline's latents, so sigma_d is 1. The teacher is
    the pipeline's own U-Net."""
    # DEPARTS: Direct CM samples latents anew each time; here they are the posterior's means, computed once

    def __init__(self, cfg, device):
        if not (cfg.pretrained and cfg.data):
            fail("--dataset text needs --pretrained PATH_OR_HUB_ID and --data FOLDER")
        if cfg.teacher != "exact" or cfg.flip or not cfg.image_size:
            fail("--pretrained is the teacher and needs an --image_size: give no --teacher, and no --flip")
        self.cfg, pairs = cfg, read_captions(cfg)
        captions = [caption for _, caption in pairs]
        names = [os.path.relpath(path, cfg.data) for path, _ in pairs]
        self.fingerprint = fingerprint(Path(cfg.data), names, captions)
        about = dict(sources=self.fingerprint, pretrained=cfg.pretrained, vae=cfg.vae,
                     image_size=cfg.image_size, half=cfg.dtype == "fp16")
        folder = Path("data/cache", f"text-{hashlib.sha1(repr(about).encode()).hexdigest()[:16]}")
        self.rows, *_ = open_store(folder, lambda: self.prepare(pairs, device), about, batch=16)
        self.classes, self.shape = len(pairs), self.rows[:1]["latent"].shape[1:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.teacher = TextToImage(
                self.shape, cfg.pretrained, cfg.image_size, cfg.lora_rank, cfg.first_label, cfg.dtype,
                cfg.sigma_d, cfg.micro, self.classes, self.rows, adapted=False).to(device)

    def prepare(self, pairs, device):
        """What open_store wants. A row has `latent`, and `prompt` and `pooled` in the U-Net's precision; the
        last one, without an image, is for no caption."""
        cfg = self.cfg
        encode_text, vae = text_encoder(cfg.pretrained, device), autoencoder(cfg, device)
        kind = np.float16 if cfg.dtype == "fp16" else np.float32  # numpy has no bfloat16

        def latent(path):
            x = torch.from_numpy(decode(path, Path.read_bytes, cfg.image_size).copy())[None].to(device)
            with torch.no_grad(), reading(f"--image_size {cfg.image_size} does not suit the autoencoder"):
                mean = vae.encode(x.float() / 127.5 - 1).latent_dist.mean
            return mean[0].cpu().numpy() * np.float32(vae.config.scaling_factor)

        def encode(part):
            rows = []
            for (path, _), text in zip(part, encode_text([caption for _, caption in part])):
                image = latent(path or pairs[0][0]) * bool(path)
                rows.append(record(latent=image, prompt=text["prompt"].astype(kind),
                                   pooled=text["pooled"].astype(kind)))
            return np.stack(rows)
        rows = [*pairs, (None, "")]
        return rows, np.zeros(len(rows), int), encode, []

    def batch(self, gen):
        """x0 (B, 4, h, w), and y (B,), the index of the caption."""
        y = gen.index(self.classes, "cpu")
        latents, = columns(self.rows[y.numpy()], "latent")
        return latents.to(gen.device), gen.labels(y, self.cfg).to(gen.device)

    def student(self):
        """The network to train: the teacher with adapters."""
        return self.teacher.sibling(adapted=True).train()

    @staticmethod
    @torch.no_grad()
    def pixels(x, cfg):
        """x0 (B, 4, h, w) -> pixels (B, 3, H, W) uint8."""
        vae = autoencoder(cfg, x.device)
        scale = 1 / vae.config.get("scaling_factor", 1)
        return to_uint8(decode_latents(x.float() * (scale / cfg.sigma_d), vae))

    def to_pixels(self, x):
        return self.pixels(x, self.cfg)


def read_captions(cfg):
    """[(image path, caption)] of --data: metadata.jsonl or .csv (file_name, text), or a .txt beside each
    image."""
    root = Path(cfg.data)
    with reading(f"--data {root}: every image needs a caption, in metadata.jsonl or metadata.csv "
                 "(file_name, text), or in a .txt of its name"):
        if (root / "metadata.jsonl").exists():
            rows = map(json.loads, (root / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
        elif (root / "metadata.csv").exists():
            rows = csv.DictReader((root / "metadata.csv").read_text(encoding="utf-8").splitlines())
        else:
            images = (p for p in root.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
            rows = (dict(file_name=path.relative_to(root), text=path.with_suffix(".txt").read_text("utf-8"))
                    for path in sorted(images))
        pairs = [(root / row["file_name"], row["text"].strip()) for row in rows]
    return pairs or fail(f"--data {root}: no images with captions in it")
