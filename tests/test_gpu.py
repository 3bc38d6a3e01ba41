"""What a GPU would find, without one: the device meta stands for it, whose tensors have no contents."""
from conftest import SCRIPTS, preset

import common
import kit

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CASES = [(name, mode) for name, script in SCRIPTS.items() for mode, loss in script.LOSSES.items() if loss]
NETWORK = dict(shape=(3, 8, 8), classes=3, channels=8, blocks=1, attention=(4,), dropout=0.1)
MAY_MIX = ("aten::_to_copy", "aten::copy_", "aten::index.Tensor")  # an index may lie on the CPU


class OneDevice(TorchDispatchMode):
    """Refuses what a GPU refuses: an operation on tensors of two devices, numbers excepted."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = {v.device.type for v in tree_leaves((args, kwargs)) if torch.is_tensor(v) and v.ndim}
        assert len(found) < 2 or function.name() in MAY_MIX, f"{function.name()} on {found}"
        return function(*args, **(kwargs or {}))


class OnMeta(common.Draw):
    """Draws on the device meta, which has no generators."""

    def __init__(self, n):
        super().__init__(0, 0, 0, n)
        self.device = torch.device("meta")

    def _draw(self, function, *shape, host=False, **kw):
        drawn = super()._draw(function, *shape, host=True, **kw)
        return drawn if host else drawn.to("meta")


@pytest.mark.parametrize("name, mode", CASES)
def test_a_step_and_sampling_stay_on_one_device(name, mode, monkeypatch):
    """Each mode of each script on images: loss, gradients, samples."""
    script = SCRIPTS[name]
    cfg = preset(script, "folder", mode=mode, batch=6, conditional=True, image_size=8)
    with torch.device("meta"):
        net, teacher = (kit.networks.build(NETWORK) for _ in range(2))
        net.extra["fake"], net.extra["vsd_head"] = kit.networks.build(NETWORK), kit.layers.WeightHead(0.5)
        x0, y = torch.randn(6, 3, 8, 8), torch.randint(3, (6,))
    if name == "direct_cm":  # how many samples are still under way in solve(), meta cannot say
        monkeypatch.setattr(script, "solve", script.ode_step)
        monkeypatch.setattr(torch.Tensor, "any", lambda _: True)
    if name == "sct":  # nor which classes there are
        mean = script.posterior_mean(x0, torch.ones(6, device="meta"), [x0, x0])
        teacher = SimpleNamespace(denoise=lambda *_: mean)
    gen = OnMeta(6)
    with OneDevice():
        loss, _ = script.LOSSES[mode](net, net, teacher, x0, y, 3, cfg, gen)
        loss.backward()
        noise, nfe = 0.5 * gen.normal(3, 8, 8), getattr(cfg, "student_steps", 2)
        x = script.sample(net, noise, y, nfe, cfg, gen)
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert {v.device.type for v in (loss, x, *grads)} == {"meta"}


def test_two_devices_are_found():
    with OneDevice(), pytest.raises(AssertionError, match="aten::add"):
        torch.randn(3, device="meta") + torch.randn(3)
