"""Networks that judge images: Inception, DINOv2 and others by features, CLIP and LAION's by scores."""
from kit.process import download, fail, reading

import functools
from pathlib import Path

import torch
import torch.nn.functional as tnf

INCEPTION = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
             "inception-2015-12-05.pt")
AESTHETIC = ("https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
             "sac+logos+ava1-l14-linearMSE.pth")


def feature_network(name, weights, device):
    """--features as a function: uint8 (B, 3, H, W) -> dict of features (B, d) and, if the network has them,
    class probabilities (B, K)."""
    if name == "pixels":
        return lambda x: dict(features=x.flatten(1).float() / 255)
    if name == "dinov2":
        from transformers import AutoModel
        net = pretrained(AutoModel, weights, "facebook/dinov2-large", "--weights").to(device).eval()
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1).to(device)

        def dinov2(x):  # the class token after the last norm, of images resized to 224
            x = tnf.interpolate(x.to(device) / 255, (224, 224), mode="bicubic", antialias=True)
            return dict(features=net((x - mean) / std).pooler_output.cpu())
        return dinov2
    path = Path(weights or "data/inception-2015-12-05.pt") if name == "inception" else Path(name)
    if name == "inception" and not weights:
        download(INCEPTION, path)
    with reading(f"{path} is no TorchScript module"):
        if not path.exists():
            fail(f"no feature network at {path}: give inception, dinov2, pixels or a TorchScript file")
        net = torch.jit.load(path, map_location=device).eval()

    def script(x):
        x, known = x.to(device), [argument.name for argument in net.forward.schema.arguments]
        if "return_features" not in known:
            return dict(features=net(x).flatten(1).cpu())
        # NVIDIA's Inception-v3. The inception score is defined without the bias of its last layer.
        plain = dict(no_output_bias=True) if "no_output_bias" in known else {}
        return dict(features=net(x, return_features=True).cpu(), probabilities=net(x, **plain).cpu())

    def checked(x):
        with reading(f"{path} does not turn uint8 images (B, 3, H, W) into features (B, d)"):
            found = script(x)
            if len(found["features"]) != len(x) or not found["features"].isfinite().all():
                raise ValueError("its features are not all finite, or not one row an image")
            return found
    return checked


@functools.cache
def lpips_network(device, pool):
    """The network of LPIPS, a distance of images (B, 3, H, W), with pooling layers of the given kind."""
    try:
        from lpips import LPIPS
    except ImportError:
        fail("LPIPS needs a package that is not in requirements.txt: pip install lpips")
    with reading("LPIPS needs VGG-16's weights, which torchvision downloads once"):
        net = LPIPS(net="vgg", verbose=False)
    for part in list(net.net.modules()):
        for name, layer in part.named_children():
            if isinstance(layer, torch.nn.MaxPool2d):
                setattr(part, name, pool(2))
    return net.to(device).requires_grad_(False)


def pretrained(kind, given, hub, flag):
    """A network of transformers from the folder or hub id given with flag, else from the hub."""
    with reading(f"cannot load {given or hub}: download https://huggingface.co/{hub} and give its folder "
                 f"with {flag}"):
        return kind.from_pretrained(given or hub)


def text_scores(clip, aesthetic, device):
    """--clip and --aesthetic as a function: uint8 images (B, 3, H, W) and B prompts -> dict of both scores,
    (B,) each."""
    from transformers import CLIPModel, CLIPProcessor
    clip, processor = (pretrained(kind, clip, "openai/clip-vit-large-patch14", "--clip")
                       for kind in (CLIPModel, CLIPProcessor))
    clip.to(device).eval()
    path = Path(aesthetic or "data/sac+logos+ava1-l14-linearMSE.pth")
    if not aesthetic:
        download(AESTHETIC, path)
    with reading(f"{path} is not LAION's aesthetic predictor, {AESTHETIC}"):
        state = torch.load(path, map_location=device, weights_only=True)
        layers = [(state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]) for i in (0, 2, 4, 6, 7)]

    def scores(x, prompts):
        inputs = processor(text=prompts, images=list(x), return_tensors="pt", padding=True, truncation=True)
        out = clip(**inputs.to(device))
        h = out.image_embeds                      # (B, 768), like the text's of unit length
        for weight, bias in layers:               # no nonlinearity between them
            h = h @ weight.T + bias
        cosine = (out.image_embeds * out.text_embeds).sum(1)
        return dict(clip_score=cosine.cpu(), aesthetic_score=h[:, 0].cpu())
    return scores
