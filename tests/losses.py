"""What the loss of each method compares: `python tests/claims.py figure` draws it. Whatever is drawn was
computed by the scripts' own functions, on two Gaussians in 1-D, for a student that has just begun: like every
student that starts from its teacher, it is a copy of it.

All processes are drawn in TrigFlow's coordinates (see common.py), where they are the same."""
import cm
import common
import direct_cm
import kit
import multistep_cm
import scm
import sct

import functools
import math

import torch

SIGMA_D, TOP = 0.5, math.atan(80 / 0.5)  # TOP: the angle where paths begin
START, T = 0.45, 1.14  # the noise that the path of x_t begins with; the angle of x_t, or nearly
POINT, OTHER, PREDICTION, TARGET = "black", "#1f77d0", "#d62728", "#2a9d3a"  # one colour a role
DATA = "#d99a20"


class Plane:
    """From a script's coordinates, x = alpha x_0 + sigma eps at its own time t, to the figure's."""

    def __init__(self, alpha_sigma):
        self.alpha_sigma = alpha_sigma

    def scale_and_angle(self, t):
        ones = torch.ones(len(t), 1, dtype=torch.float64)
        return common.to_trigflow(ones, *(v.double() for v in self.alpha_sigma(t)), SIGMA_D)

    def place(self, x, t):
        """(angle, height) of a point (1, 1) at the time t (1,)."""
        scale, angle = self.scale_and_angle(t)
        return angle.item(), (x * scale).item()

    def choose(self, times, angle=T):
        """Of random times, (t, ...), each (B,), those with t nearest to an angle, each (1,)."""
        row = (self.scale_and_angle(times[0])[1] - angle).abs().argmin()
        return [t[row:row + 1] for t in times]

    def x_t(self, data, t):
        """The script's x_t (1, 1) on the exact path from START."""
        scale, angle = self.scale_and_angle(t)
        return torch.tensor([[path(data, START, down_to(angle.item()))[-1]]], dtype=torch.float64) / scale


EDM = Plane(lambda t: (torch.ones_like(t), t))
TRIGFLOW = Plane(lambda t: (t.cos(), SIGMA_D * t.sin()))


def gen(n):
    return common.Draw(0, 0, 0, n)


def down_to(angle):
    return torch.linspace(TOP, angle, 100, dtype=torch.float64)


def path(data, start, angles):
    """Heights of the exact ODE's path at falling angles, the first of which has `start`."""
    x, heights = torch.tensor([[start]], dtype=torch.float64), [start]
    for t, s in zip(angles[:-1], angles[1:]):
        x = common.solve(data, x, torch.linspace(float(t), float(s), 4, dtype=torch.float64))
        heights.append(x.item())
    return heights


# ---- drawing
def paths(at, data):
    angles = down_to(0)
    for start in torch.special.ndtri((torch.arange(18) + 0.5) / 18) * SIGMA_D:
        at.plot(angles, path(data, start.item(), angles), color="#dadada", lw=0.8, zorder=0)
    at.plot(angles, path(data, START, angles), color="#9a9a9a", lw=1.6, zorder=1)


def scene(at, data, name, title):
    """What all panels have: the ODE's paths, x_t's darker; at the right, the data's density; the title."""
    paths(at, data)
    x = torch.linspace(-1.1, 1.1, 300)
    p = torch.exp(-((x[:, None] - data.mean.flatten()) / data.std) ** 2 / 2).sum(1)
    at.fill_betweenx(x, -0.04, -0.04 - 0.16 * p, color=DATA, lw=0, alpha=0.5)
    at.set(xlim=(1.66, -0.24), ylim=(-0.8, 0.85), xticks=[], yticks=[])
    for side in ("top", "right", "left", "bottom"):
        at.spines[side].set_visible(False)
    at.text(0, 1.09, name, transform=at.transAxes, fontsize=11, weight="bold", family="monospace")
    at.text(0, 1.015, title, transform=at.transAxes, fontsize=10)
    at.text(TOP, -0.8, "noise", fontsize=9.5, color="#777777")
    at.text(-0.2, -0.8, "data", fontsize=9.5, color="#777777", ha="right")


def dot(at, place, colour, label="", shift=(0, 11), **style):
    at.plot(*place, **dict(marker="o", ms=6.5, color=colour, zorder=5, ls="") | style)
    at.annotate(label, place, shift, textcoords="offset points", color=colour, fontsize=12, ha="center",
                va="center", zorder=6)


def jump(at, here, there, colour, **style):
    """The way to a denoised point, along a DDIM step: an arc in these coordinates."""
    (t, x), (s, y) = here, there
    v = (math.cos(t - s) * x - y) / math.sin(t - s)
    u = torch.linspace(t, s, 50)
    style = dict(color=colour, lw=1.5, ls=(0, (4, 2)), zorder=3) | style
    at.plot(u, (t - u).cos() * x - (t - u).sin() * v, **style)


def arrow(at, here, there, colour, style="->", **more):
    properties = dict(arrowstyle=style, color=colour, lw=2, shrinkA=0, shrinkB=0) | more
    at.annotate("", there, here, arrowprops=properties, zorder=6)


def loss(at, prediction, target, gap=0.06):
    """The arrow between what the loss compares."""
    angle = prediction[0] - gap
    arrow(at, (angle, prediction[1]), (angle, target[1]), "#7b2d8b", "<->")
    at.annotate("loss", (angle, (prediction[1] + target[1]) / 2), (8, 0), textcoords="offset points",
                color="#7b2d8b", fontsize=10.5, va="center", weight="bold", zorder=6)


# ---- the panels
def goal(at, data):
    scene(at, data, "the goal", "from anywhere on a path, $f$ jumps to the path's end")
    angles = down_to(0)
    heights = path(data, START, angles)
    end = 0.0, heights[-1]
    for k in (3, 28, 53, 78):
        here = angles[k].item(), heights[k]
        jump(at, here, end, PREDICTION)
        dot(at, here, POINT, "$x_t$" if k == 3 else "")
    dot(at, end, PREDICTION, "$f(x_t)$", (-12, 14))


def cm_cd(at, data):
    scene(at, data, "cm.py cd", "$f(x_t)$ shall equal $f(x_s)$, a solver step nearer to the data")
    cfg = cm.Config(dataset="gmm1d", mode="cd", points=18)
    t, s = EDM.choose(cm.times(gen(4096), 0, cfg))
    x_t = EDM.x_t(data, t)
    x_s = cm.ode_step(data, x_t, t, s, None, cfg)
    prediction, target = ((0.0, cm.f(data, *v, None, cfg).item()) for v in ((x_t, t), (x_s, s)))
    pair(at, EDM.place(x_t, t), EDM.place(x_s, s), prediction, target)


def pair(at, here, other, prediction, target, names=True, gap=0.06):
    """x_t and x_s, where f takes them, and the loss."""
    jump(at, here, prediction, PREDICTION)
    jump(at, other, target, TARGET)
    dot(at, here, POINT, "$x_t$" * names)
    dot(at, other, OTHER, "$x_s$" * names)
    dot(at, prediction, PREDICTION, "$f(x_t)$" * names, (-22, -11))
    dot(at, target, TARGET, "$f(x_s)$" * names, (26, 9))
    if names:
        loss(at, prediction, target, gap)


def scm_scd(at, data):
    scene(at, data, "scm.py scd", "the same as $s$ → $t$: along the path, $f$ shall not change")
    cfg = scm.Config(dataset="gmm1d", mode="scd", warmup=0)
    t = torch.tensor([T], dtype=torch.float64)
    x_t = TRIGFLOW.x_t(data, t)
    slope = scm.velocity(data, x_t, t, None, None, cfg)
    _, g = scm.tangent(data, x_t, t, None, None, slope, 0, cfg, gen(1))
    df = g / t.cos()  # over dt
    here, prediction, h = (T, x_t.item()), (0.0, scm.f(data, x_t, t, None, cfg).item()), -0.28
    there, target = (T + h, x_t.item() + h * slope.item()), (0.0, prediction[1] + h * df.item())
    jump(at, here, prediction, PREDICTION)
    dot(at, here, POINT, "$x_t$")
    arrow(at, here, there, OTHER)
    at.annotate("$dx_t$", there, (2, 10), textcoords="offset points", color=OTHER, fontsize=12, ha="center")
    dot(at, prediction, PREDICTION, "$f(x_t)$", (-20, -12))
    arrow(at, prediction, target, TARGET)
    at.annotate("$df$", target, (-14, -2), textcoords="offset points", color=TARGET, fontsize=12, ha="center")
    loss(at, prediction, target)


def sct_sct(at, data):
    scene(at, data, "sct.py sct", "no teacher: $x_s$ lies on the way to $x^*$, an average of data")
    cfg = sct.Config(dataset="gmm1d", mode="sct", batch=16)
    t, s, edge = EDM.choose(sct.times(gen(4096), 2000, cfg))
    x_t = EDM.x_t(data, t)
    batch = data.batch(gen(cfg.batch))[0]
    x_star, _ = sct.ReferenceSet(data, cfg).denoise(x_t, t, None, batch, 0)
    x_s = sct.ode_step(x_star, x_t, t, s)
    here, star = EDM.place(x_t, t), (0.0, x_star.item())
    weight = torch.softmax(-(x_t - batch).square().flatten() / (2 * t**2), 0)  # Eq. 13
    for x_i, w in zip(batch.flatten().tolist(), weight.tolist()):
        jump(at, here, (0.0, x_i), DATA, lw=0.8, ls="-", alpha=min(1, 6 * w), zorder=2)
        dot(at, (0.0, x_i), DATA, ms=4)
    jump(at, here, star, DATA, ls="-", lw=1.8)
    dot(at, star, DATA, "$x^*$", (4, -13), marker="D")
    prediction, target = ((0.0, sct.f(data, *v, None, cfg).item()) for v in ((x_t, t), (x_s, s)))
    pair(at, here, EDM.place(x_s, s), prediction, target)


def multistep_cd(at, data):
    scene(at, data, "multistep_cm.py cd", "as in cm.py, but $f$ jumps to the end of its segment only")
    cfg = multistep_cm.Config(dataset="gmm1d", mode="cd", student_steps=4, teacher_steps=(16, 16),
                              solver="ddim")
    plane = Plane(functools.partial(multistep_cm.alpha_sigma, cfg=cfg))
    t, s, t_step = plane.choose(multistep_cm.times(gen(4096), 0, cfg), 1.0)
    z_t = plane.x_t(data, t)  # the loss compares the x that lead where this panel compares
    z_s = multistep_cm.ode_step(data, z_t, t, s, None, cfg, None)
    ends = [multistep_cm.ddim(multistep_cm.f(data, z, u, None, cfg), z, u, t_step, cfg)
            for z, u in ((z_t, t), (z_s, s))]
    prediction, target = (plane.place(end, t_step) for end in ends)
    near = at.inset_axes([0.03, 0.07, 0.72, 0.45], xlim=(1.06, 0.5), ylim=(0.43, 0.51), xticks=[], yticks=[])
    at.indicate_inset_zoom(near, edgecolor="#555555")
    paths(near, data)
    for axes in (at, near):
        for i in range(1, cfg.student_steps):
            _, angle = plane.scale_and_angle(torch.tensor([i / cfg.student_steps]))
            axes.axvline(angle.item(), color="#777777", lw=1, ls=":", zorder=0)
        places = plane.place(z_t, t), plane.place(z_s, s), prediction, target
        pair(axes, *places, names=axes is near, gap=0.02)
    at.text(0.66, 0.72, "the segments' ends", color="#777777", fontsize=9.5)


def direct_direct(at, data):
    scene(at, data, "direct_cm.py direct", "$f(x_t)$ shall equal the path's end, after all solver steps")
    cfg = direct_cm.Config(dataset="gmm1d", mode="direct", intervals=20)
    plane = Plane(direct_cm.alpha_sigma)
    t, _ = plane.choose(direct_cm.times(gen(4096), 0, cfg))
    z, now = plane.x_t(data, t), t
    here, prediction = plane.place(z, t), (0.0, direct_cm.f(data, z, t, None, cfg).item())
    while now > 0:
        s = now - 1000 // cfg.intervals
        z = direct_cm.solve(data, z, now, s, None, cfg)
        before, now = plane.place(z, s), s
        if now > 0:
            dot(at, before, OTHER, ms=4)
    target = 0.0, z.item()
    jump(at, here, prediction, PREDICTION)
    dot(at, here, POINT, "$x_t$")
    dot(at, prediction, PREDICTION, "$f(x_t)$", (-22, -11))
    dot(at, target, TARGET, "path's end", (-16, 13))
    at.annotate("solver steps", (0.75, 0.5), (0, 9), textcoords="offset points", color=OTHER, fontsize=10.5,
                ha="center")
    loss(at, prediction, target)


PANELS = [goal, cm_cd, scm_scd, sct_sct, multistep_cd, direct_direct]


def draw(path):
    """All panels, and a legend, into a PNG."""
    try:
        import matplotlib
    except ImportError:
        kit.fail("the figure needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    data = kit.dataset(cm.Config(dataset="gmm1d", sigma_d=SIGMA_D))
    sheet, axes = pyplot.subplots(2, 3, figsize=(13, 7.2), layout="constrained")
    for panel, at in zip(PANELS, axes.flatten()):
        panel(at, data)
    roles = {"$x_t$, a noisy sample": POINT, "another point, with less noise": OTHER,
             "where $f$ takes $x_t$": PREDICTION, "the target": TARGET}
    handles = [pyplot.Line2D([], [], color=colour, marker="o", ls="", label=role)
               for role, colour in roles.items()]
    handles += [pyplot.Line2D([], [], color="#9a9a9a", lw=1.6, label="the ODE's path through $x_t$")]
    sheet.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=11)
    sheet.savefig(path, dpi=110)
    pyplot.close(sheet)
