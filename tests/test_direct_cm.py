"""direct_cm.py: SDXL's schedule, solvers, hops, the boundary, and the two students."""
import common
import conftest
import direct_cm
import eval as evaluation
import kit
from conftest import draw, one_line, preset, same

import functools
import json
import math
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

config = functools.partial(preset, direct_cm)
toy_net = functools.partial(conftest.toy_net, emb_scale=8.0, c_noise="log")


def test_schedule_and_ddim_are_diffusers(ring):
    """alphas_cumprod and a DDIM step from label t are DDIMScheduler's from t - 1 (SDXL's settings)."""
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    alpha, sigma = direct_cm.alpha_sigma(torch.arange(1, 1001))
    assert torch.allclose(alpha**2, scheduler.alphas_cumprod.double(), atol=1e-6)
    scheduler.set_timesteps(20)
    z, cfg = torch.randn(5, 2).double(), config(intervals=20)
    for t in (1000, 500, 50):                                                   # the last goes to the data
        label = torch.full((5,), t)
        _, eps = direct_cm.predict(ring[2], z, label, None, cfg)
        theirs = scheduler.step(eps, t - 1, z).prev_sample
        ours = direct_cm.ode_step(ring[2], z, label, label - 50, None, cfg)
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("solver, order", [("ddim", 1), ("euler", 1), ("heun", 2)])
def test_orders_of_convergence(solver, order, ring):
    """From label 1000 to 200 with the exact teacher, against 400 Heun steps; there the schedule is smooth."""
    z = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).double()
    t, s = torch.full((200,), 1000), torch.full((200,), 200)

    def solve(n, solver):
        return direct_cm.solve(ring[2], z, t, s, None, config(intervals=n, solver=solver))
    exact = solve(500, "heun")
    coarse, fine = (kit.metrics.rms(solve(n, solver), exact) for n in (25, 50))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


def test_boundary():
    """f(x, 0) = x exactly; at any other label of the grid f is x_0 to 1e-4."""
    net, z, cfg = toy_net(), torch.randn(4, 2).double(), config()
    assert torch.equal(direct_cm.f(net, z, torch.zeros(4, dtype=torch.int64), None, cfg), z)
    t = torch.full((4,), 10)
    x_0, _ = direct_cm.predict(net, z, t, None, cfg)
    assert torch.allclose(direct_cm.f(net, z, t, None, cfg), x_0, atol=1e-4)


def test_snr_weight_compares_the_networks_outputs(nets):
    """x_0 = cos(t) x_t - sin(t) sigma_d F, so with the weight 1 + SNR the square loss of Direct CM is that of
    F, times sigma_d^2, at every label."""
    net, z, cfg = nets(head=False)[0], torch.randn(4, 2).double(), config(weighting="snr")
    t = torch.tensor([10, 200, 600, 1000])
    x_t, angle = common.to_trigflow(z, *direct_cm.alpha_sigma(t), cfg.sigma_d)
    F, goal = net(x_t / cfg.sigma_d, angle), torch.randn(4, 2).double()
    z_0 = common.like(angle.cos(), x_t) * x_t - common.like(angle.sin(), x_t) * cfg.sigma_d * goal
    loss, _ = direct_cm.consistency(net, net, z, t, z_0, torch.zeros_like(t), None, cfg, draw(4))
    assert torch.allclose(loss, cfg.sigma_d**2 * (F - goal).square().mean(), rtol=1e-3)


def test_direct_target_is_a_plain_solve(ring):
    """Each sample's target, solved alone from its own t, is that of the batch, and no sample is fed to the
    teacher after it has arrived."""
    teacher, cfg, fed = ring[2], config(intervals=20), []

    def counting(x, t, y):
        fed.append(len(x))
        return teacher(x, t, y)
    t, z = 50 * torch.tensor([20, 1, 7, 13]), torch.randn(4, 2).double()
    together = direct_cm.solve(counting, z, t, torch.zeros_like(t), None, cfg)
    assert sum(fed) == (t // 50).sum()                                          # not 4 x 20
    for i in range(4):
        alone, label = z[i:i + 1], t[i:i + 1]
        while label > 0:
            alone = direct_cm.ode_step(teacher, alone, label, label - 50, None, cfg)
            label = label - 50
        assert torch.allclose(alone[0], together[i], atol=1e-12)


def test_hops_span_cm_and_direct(ring):
    """One hop is CM's loss, N hops Direct CM's; between, s is n steps down."""
    net, x0 = toy_net(), torch.randn(64, 2).double()

    def loss(function, **values):
        return function(net, net, ring[2], x0, None, 0, config(intervals=20, **values), draw())[0].item()

    assert loss(direct_cm.cm) == loss(direct_cm.cm, hops=1) != loss(direct_cm.direct)
    assert loss(direct_cm.direct) == loss(direct_cm.cm, hops=20) == loss(direct_cm.cm, hops=99)
    t, s = direct_cm.times(draw(), 0, config(intervals=20, hops=5))
    assert torch.equal(s, (t - 250).clamp(min=0)) and set(t.tolist()) <= set(range(50, 1001, 50))


def test_guidance(ring):
    """Imagen's form on eps; w = 1 is the conditional teacher."""
    z, t, y, cfg = torch.randn(8, 2).double(), torch.full((8,), 400), torch.arange(8), config()
    plain, none = (direct_cm.predict(ring[2], z, t, v, cfg)[1] for v in (y, torch.full_like(y, -1)))
    assert torch.allclose(direct_cm.predict(ring[2], z, t, y, cfg, 9.0)[1], none + 9 * (plain - none))
    assert torch.equal(direct_cm.predict(ring[2], z, t, y, cfg, 1.0)[1], plain)


def test_metrics():
    """Mean square, and the pseudo-Huber of each element, by hand."""
    a, b = torch.zeros(2, 3), torch.tensor([[0.5] * 3, [1.0] * 3])
    assert direct_cm.METRICS["l2"](a, b).tolist() == [0.25, 1.0]
    expected = [(v + 1e-6) ** 0.5 - 1e-3 for v in (0.25, 1)]
    assert direct_cm.METRICS["huber"](a, b).tolist() == pytest.approx(expected)


def test_sampling_labels():
    """n = 1: 1000; n = 4: 1000, 750, 500, 250 (the paper's scheduler)."""
    seen, net = [], toy_net()

    def spy(x, t, y):
        seen.append(t[0].item())
        return net(x, t, y)

    direct_cm.sample(spy, torch.randn(3, 2).double(), None, 4, config(), draw(3))
    alpha, sigma = direct_cm.alpha_sigma(torch.tensor([1000, 750, 500, 250]))
    assert torch.allclose(torch.tensor(seen).double(), torch.atan2(sigma, alpha * config().sigma_d))


def test_both_students_share_their_draws(train, capsys):
    """--mode both: each of two runs is the run of its mode alone, and a line says how to compare them;
    neither is overwritten by a second call."""
    words = ["--channels", "16", "--blocks", "1", "--batch", "64", "--intervals", "10", "--lr_cooldown", "0"]
    direct_cm.main([*words, "--mode", "both", "--steps", "2", "--out", "run"])
    assert "python eval.py run/cm run/direct --reference teacher" in capsys.readouterr().out
    for mode in ("cm", "direct"):
        alone = train(*words, "--mode", mode, "--steps", 2, "--out", mode, script=direct_cm)
        assert same(alone["net"], kit.read_checkpoint(f"run/{mode}")["net"])
    assert "--overwrite" in one_line(capsys, direct_cm.main, *words, "--steps", "2", "--out", "run")


def test_error_of_the_solver_itself_is_zero(train, monkeypatch):
    """A student that solves the ODE as the teacher's solver does has E = 0 in the table of eval.py
    --reference teacher, which gives the teacher a row of its own."""
    train("--channels", 16, "--blocks", 1, "--batch", 64, "--steps", 1, "--mode", "cm", "--intervals", 10,
          "--out", "run", script=direct_cm)
    teacher = kit.dataset(config())

    def solution(net, z, t, y, cfg):
        return direct_cm.solve(teacher, z, t, torch.zeros_like(t), y, cfg)
    monkeypatch.setattr(direct_cm, "f", solution)
    evaluation.main(["run", "--reference", "teacher", "--nfe", "1", "--samples", "200", "--out", "table"])
    rows = json.loads(Path("table/eval.json").read_text())
    assert [row["nfe"] for row in rows] == ["teacher", 1] and rows[1]["ode_error"] < 1e-6
    assert rows[1]["energy_distance"] == pytest.approx(rows[0]["energy_distance"])


def test_solution_is_the_solvers(ring):
    """What eval.py compares with: from noise at label 1000 by the run's own solver, all N steps, guided."""
    cfg, y = config(intervals=5, conditional=True, guidance=3.0), torch.arange(8)
    noise = cfg.sigma_d * torch.randn(8, 2).double()
    z = noise / cfg.sigma_d
    for label in range(1000, 0, -200):
        t = torch.full((8,), label)
        z = direct_cm.ode_step(ring[2], z, t, t - 200, y, cfg)
    assert torch.allclose(direct_cm.solution(ring[2], noise, y, cfg), z, atol=1e-12)


def test_both_students_go_on_by_one_command():
    """--resume auto starts the two, goes on with what a kill has left, and leaves what is finished alone."""
    words = "--channels 16 --blocks 1 --batch 64 --steps 3 --intervals 4 --resume auto --out pair".split()
    real = direct_cm.LOSSES["direct"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def stops(*inputs):
            if inputs[5] == 2:
                raise KeyboardInterrupt
            return real(*inputs)
        patch.setitem(direct_cm.LOSSES, "direct", stops)
        direct_cm.main(words)
    first = kit.read_checkpoint("pair/cm")
    assert first["step"] == 3 and kit.read_checkpoint("pair/direct")["step"] == 1
    direct_cm.main(words)
    assert kit.read_checkpoint("pair/direct")["step"] == 3
    assert kit.read_checkpoint("pair/cm")["seconds"] == first["seconds"]


def test_flags_beside_resume_reach_both_students():
    """A longer run, and data that moved, are each student's; one that had not begun has the other's flags."""
    words = "--channels 16 --blocks 1 --batch 64 --steps 1 --intervals 4 --lr_cooldown 0 --out pair".split()
    direct_cm.main(words)
    direct_cm.main("--resume --steps 2 --out pair".split())
    kept = [kit.read_checkpoint(f"pair/{mode}") for mode in ("cm", "direct")]
    assert [ckpt["step"] for ckpt in kept] == [2, 2]
    for i, mode in enumerate(("cm", "direct")):
        shutil.rmtree(f"pair/{mode}")
        direct_cm.main("--resume --out pair".split())
        assert same(kit.read_checkpoint(f"pair/{mode}")["net"], kept[i]["net"])


def test_neither_student_is_trained_if_one_may_not_be(capsys):
    """--overwrite with a start that lies in the second student's folder leaves the first one as it was; and
    --dry_run looks at the folders of the students."""
    words = "--channels 16 --blocks 1 --batch 64 --steps 1 --intervals 4 --out pair".split()
    direct_cm.main(words)
    before = Path("pair/cm/ckpt.pt").read_bytes()
    line = one_line(capsys, direct_cm.main, *words, "--overwrite", "--init", "pair/direct")
    assert "would replace pair/direct" in line and Path("pair/cm/ckpt.pt").read_bytes() == before
    assert "holds a run already" in one_line(capsys, direct_cm.main, *words, "--dry_run")
