"""kit/run.py: the run in every script. Training, resume, kill, processes, accumulation, averages, and the
forecast of memory."""
import eval as evaluation
import kit
import scm
import sct
from conftest import (
    ROOT,
    SCRIPTS,
    draw_pictures,
    files,
    finish,
    log,
    one_line,
    parsed,
    preset,
    run_here,
    same,
    same_optimizer,
    two_processes,
)

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

TOY = ["--channels", "16", "--blocks", "1", "--batch", "128", "--log_every", "1"]
PYTHON = [sys.executable, scm.__file__, "--channels", "16", "--batch", "32", "--log_every", "1"]


def test_a_compiled_run_is_the_eager_one(folder, monkeypatch):
    """--compile: one graph; the loss and all gradients of the first step, dropout masks included. Each kernel
    takes a second to compile, so the network is smaller than a command line could make it."""
    monkeypatch.setattr("torch._inductor.config.cpp.simdlen", 1)  # plain loops: no search for vector units
    cfg = preset(scm, "folder", data=str(folder), mode="sct", channels=8, channel_mult=(1,), blocks=0,
                 dropout=0.3, batch=8, steps=1, warmup=0, out="init")
    scm.train(cfg)
    init = kit.read_checkpoint("init")
    for name in ("net", "ema"):  # at first, the output is 0
        init[name]["out_gain"].fill_(1.0)
    torch.save(init, "init/ckpt.pt")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logs, gradients = [], []
    for compiled in (False, True):
        cfg = dataclasses.replace(cfg, init="init", compile=compiled, out=f"compiled-{compiled}")
        scm.train(cfg)
        logs.append(json.loads(Path(cfg.out, "log.jsonl").read_text()))
        state = kit.read_checkpoint(cfg.out)["optimizer"]["state"]
        gradients.append([v["exp_avg"] for v in state.values()])
    counts = torch._dynamo.utils.counters
    assert not counts["graph_break"] and counts["stats"]["unique_graphs"] == 1
    names = ("loss", "mse", "grad_norm")
    assert [logs[0][k] for k in names] == pytest.approx([logs[1][k] for k in names], rel=1e-4)
    assert len(gradients[0]) > 15
    for eager, found in zip(*gradients):
        assert torch.allclose(eager, found, atol=1e-5 * eager.abs().max())


def test_dry_run_allocates_nothing_and_checks(folder, capsys):
    """Parameters, FLOPs and memory are printed; no file is written; a missing teacher is found."""
    flags = ["--dataset", "folder", "--data", str(folder), "--dry_run"]
    scm.main([*flags, "--mode", "sct"])
    text = capsys.readouterr().out
    net = kit.network(parsed(*flags[:4]), kit.dataset(parsed(*flags[:4])))
    assert f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters" in text and "GFLOP" in text
    assert not Path("out").exists()
    assert "no checkpoint" in one_line(capsys, scm.main, *flags, "--teacher", "nowhere")


def test_flops_of_a_linear_layer(capsys):
    """2 x inputs x outputs for the MLP's matrices, by hand."""
    scm.main(["--dry_run", "--channels", "48", "--blocks", "1"])
    n = 48
    by_hand = 2 * sum(dict(first=2 * n, modulate=32 * 2 * n, inner=n * n, last=2 * n, time=64 * 32,
                           head=128).values())
    printed = float(capsys.readouterr().out.split("parameters; ")[1].split(" GFLOP")[0])
    assert printed * 1e9 == pytest.approx(by_hand, rel=0.1)


def children(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(word) for task in tasks for word in (task / "children").read_text().split()]


def test_the_whole_path_at_tiny_size(tmp_path, vae):
    """Pictures -> latents -> diffusion -> scd with guidance -> two-step samples -> pixels -> eval, as on
    ImageNet-512 by the README's two lines: torchrun, two processes, folders by convention, with bfloat16 and
    accumulation. A process is killed in the encoding and one in training, which ends the job and is said. The
    same line, and --resume, go on."""
    pictures = draw_pictures(tmp_path / "pictures", 1200)  # 1,024 are rank 0's, in one file
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", scm.__file__,
           "--dataset", "imagenet512"]
    shared = ["--vae", "vae", "--dtype", "bf16", "--batch", "16", "--micro", "4", "--save_every", "2",
              "--log_every", "2"]
    small = ["--channels", "16", "--channel_mult", "1,2", "--blocks", "1", "--attention", "4"]
    teacher = [*run, "--data", str(pictures), "--mode", "diffusion", *shared, *small, "--image_size", "16",
               "--steps", "4"]
    job, store = subprocess.Popen(teacher, stderr=subprocess.DEVNULL), Path("data/imagenet512")
    while job.poll() is None and not (store / "rows-00001.npy").exists():
        time.sleep(0.002)
    os.kill(children(job.pid)[-1], signal.SIGKILL)
    job.wait()
    assert not (store / "rows-00000.npy").exists()
    assert not Path("out/scm-imagenet512-diffusion/ckpt.pt").exists()
    finish(teacher)
    assert (store / "rows-00000.npy").exists()
    student = [*run, *shared, "--warmup", "10"]
    job = subprocess.Popen([*student, "--steps", "100000"], stderr=subprocess.PIPE, text=True)
    log = Path("out/scm-imagenet512-scd/log.jsonl")
    while job.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.02)
    os.kill(children(job.pid)[-1], signal.SIGKILL)
    _, text = job.communicate(timeout=60)
    assert job.returncode and "SIGKILL" in text or "-9" in text
    last = kit.read_checkpoint(log.parent)["step"] + 4
    finish([*run, "--resume", "--steps", str(last)])
    ckpt = kit.read_checkpoint(log.parent)
    assert ckpt["config"]["teacher"] == "out/scm-imagenet512-diffusion"
    assert ckpt["step"] == last and ckpt["options"]["guidance"] and ckpt["options"]["shape"] == (4, 8, 8)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, last + 1, 2))
    assert all(np.isfinite(line["loss"]) for line in lines)
    scm.main("--sample 6 --nfe 2 --guidance 1.5 --dataset imagenet512 --save x.npz".split())
    found = np.load("x.npz")
    assert found["arr_0"].shape == (6, 16, 16, 3) and found["arr_1"].tolist() == [0, 1, 2] * 2
    evaluation.main([str(log.parent), "--nfe", "2", "--samples", "12", "--reference", str(pictures),
                     "--out", "e"])
    assert json.loads(Path("e/eval.json").read_text())[0]["frechet_distance"] > 0


@pytest.mark.parametrize("mode", ["diffusion", "sct"])
def test_half_precision_trains(train, folder, mode):
    """float16 torso, float32 weights: loss scaling leaves gradients that move the weights and stay finite."""
    ckpt = train("--dataset", "folder", "--data", folder, "--mode", mode, "--dtype", "fp16", "--steps", 3,
                 "--batch", 8, "--channels", 8, "--blocks", 1, "--out", "half")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in ckpt["net"].values())
    last = json.loads(Path("half/log.jsonl").read_text().splitlines()[-1])
    assert ckpt["scaler"]["scale"] > 0 and last["skipped"] < 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of pictures, and a short diffusion run on them."""
    path = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        pictures = draw_pictures(path / "pictures")
        run_here("--dataset", "folder", "--data", pictures, "--mode", "diffusion", "--channels", 8,
                 "--blocks", 1, "--attention", 4, "--batch", 8, "--steps", 2, "--out", "run")
    return pictures, path / "run"


@pytest.mark.parametrize("words", [
    "cm diffusion", "cm cd --metric huber", "cm ct --metric huber", "cm ict", "cm ctcd", "cm ctct",
    "direct_cm cm --guidance 2 --intervals 5", "direct_cm direct --guidance 2 --intervals 5",
    "multistep_cm diffusion", "multistep_cm ct --student_steps 2", "multistep_cm cd --student_steps 2",
    "multistep_cm pd --student_steps 2 --pd_start 4",
    "sct diffusion", "sct ect", "sct sct", "sct sct --reference dataset", "sct sct --phases 2",
    "scm diffusion --dtype bf16", "scm sct --dtype bf16", "scm scd --dtype bf16 --guidance_max 2",
    "scm dscd --dtype bf16 --guidance_max 2",
    "scm vsd --init run --dtype fp16 --guidance_max 2", "scm scd+vsd --init run --dtype bf16"])
def test_every_mode_trains_on_images(words, train, base):
    """From a short diffusion run, with labels and dropout: finite losses, weights that change, an average
    that trails them. sct.py logs over how many samples its target averages."""
    (script, mode, *flags), (pictures, teacher) = words.split(), base
    flags = [str(teacher) if word == "run" else word for word in flags]
    start = kit.read_checkpoint(teacher)["ema"]
    source = "--init" if mode in ("ct", "ict") and script == "cm" else "--teacher"
    ckpt = train("--dataset", "folder", "--data", pictures, "--batch", 8, "--steps", 4, "--log_every", 1,
                 source, teacher, "--dropout", 0.1, "--mode", mode, *flags, "--out", "run",
                 script=SCRIPTS[script])
    lines = log("run")
    assert len(lines) == 4 and all(np.isfinite(line["loss"]) for line in lines)
    assert any(not torch.equal(start[k], v) for k, v in ckpt["net"].items() if k in start)
    assert not same(ckpt["net"], ckpt["ema"])
    assert all(0.999 <= line["averaged"] <= 24.001 for line in lines if (script, mode) == ("sct", "sct"))


def test_resume_after_kill_is_bit_exact(train):
    """kill -9 in the middle, --resume: weights, average, optimizer and log equal the unbroken run's."""
    words = [*TOY, "--steps", "60", "--save_every", "7", "--mode", "sct", "--lr_cooldown", "0"]
    command = [sys.executable, ROOT / "scm.py", *words, "--steps", "100000", "--out", "broken"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, deadline = Path("broken/log.jsonl"), time.time() + 120
    while not (path.exists() and path.read_text().count("\n") > 25) and time.time() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    step = kit.read_checkpoint("broken")["step"]
    assert 0 < step < 60 and step % 7 in (0, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    broken, whole = train("--resume", "--out", "broken", "--steps", 60), train(*words, "--out", "whole")
    torch.set_num_threads(threads)
    assert same(broken["net"], whole["net"]) and same(broken["ema"], whole["ema"])
    assert same_optimizer(broken, whole)
    assert [line["loss"] for line in log("broken")] == [line["loss"] for line in log("whole")]


def test_points_train_on_one_thread(train):
    """However many there were before, so that the same seed gives the same weights."""
    torch.set_num_threads(2)
    train(*TOY, "--steps", 1, "--out", "run")
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("words, average", [
    ("cm cd", True), ("cm cd --mu 0", False), ("sct sct --stage_steps 2", False),
    ("direct_cm direct", False), ("scm scd+vsd --init none --fake_first 0.25", False)])
def test_resume_is_bit_exact_in_every_script(words, average, train):
    """Stopped and resumed, all that a checkpoint holds is the unbroken run's: also cm.py's average of mu > 0
    and sct.py's at half of training, which are no copies of the network. (pd: test_multistep_cm.py.)"""
    (script, mode, *flags), run = words.split(), [*TOY, "--lr_cooldown", 0]
    script = SCRIPTS[script]
    whole = train(*run, *flags, "--mode", mode, "--steps", 8, "--out", "whole", script=script)
    real = script.LOSSES[mode]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def stops(*inputs):
            if inputs[5] == 6:
                raise KeyboardInterrupt
            return real(*inputs)
        patch.setitem(script.LOSSES, mode, stops)
        train(*run, *flags, "--mode", mode, "--steps", 8, "--save_every", 5, "--out", "parts", script=script)
    assert kit.read_checkpoint("parts")["step"] == 5
    parts = train("--resume", "--out", "parts", script=script)
    assert all(same(whole[name], parts[name]) for name in ("net", "ema", "target"))
    assert same_optimizer(whole, parts) and len(log("parts")) == 8
    assert same(whole["net"], whole["target"]) != average
    weak = {name: v for name, v in whole["ema"].items() if name.startswith("extra.weak.")}
    assert bool(weak) == (script is sct)
    assert not weak or not all(torch.equal(v, whole["ema"][name[11:]]) for name, v in weak.items())


@pytest.mark.parametrize("mode", ["sct", "scd+vsd --init none --fake_first 0"])
def test_two_processes_and_micro_batches_are_one_run(mode, train, capsys):
    """Two gloo processes, and accumulation, take the steps of one process on the global batch. A resume with
    another number of processes says that it is not bit for bit."""
    words = [*TOY, "--mode", *mode.split(), "--lr_cooldown", "0"]
    one = train(*words, "--steps", 5, "--out", "one")
    accumulated = train(*words, "--steps", 5, "--micro", 32, "--out", "micro")
    printed = two_processes("scm", *words, "--steps", 5, "--out", "two", "--micro", 32)
    two = kit.read_checkpoint("two")
    assert same(one["net"], accumulated["net"], exact=False) and same(one["net"], two["net"], exact=False)
    losses = [[line["loss"] for line in log(out)] for out in ("one", "micro", "two")]
    assert np.allclose(losses[0], losses[1], rtol=1e-4) and np.allclose(losses[0], losses[2], rtol=1e-4)
    assert printed.count("ODE error") == 1 and len(losses[2]) == 5  # rank 0 alone writes
    capsys.readouterr()
    more = train("--resume", "--steps", 8, "--out", "two")
    assert "not bit for bit" in capsys.readouterr().out and more["step"] == 8
    whole = train("--resume", "--steps", 8, "--out", "one")
    assert same(more["net"], whole["net"], exact=False)


def test_same_seed_same_weights(train):
    """And another seed gives others."""
    a, b, c = (train(*TOY, "--steps", 3, "--seed", seed, "--out", out)
               for seed, out in [(1, "a"), (1, "b"), (2, "c")])
    assert same(a["net"], b["net"]) and not same(a["net"], c["net"])


def test_non_finite_steps_are_skipped_and_then_end_the_run(train, monkeypatch, capsys):
    """One bad step leaves the weights alone; 50 running stop the run in words, the checkpoint intact."""
    real, words = scm.LOSSES["sct"], [*TOY, "--mode", "sct", "--lr_cooldown", 0]

    def broken(net, target, teacher, x0, y, step, cfg, gen):
        loss, info = real(net, target, teacher, x0, y, step, cfg, gen)
        return (loss * float("nan") if bad(step) else loss), info
    monkeypatch.setitem(scm.LOSSES, "sct", broken)
    bad = {2}.__contains__
    two, three = (train(*words, "--steps", n, "--out", n) for n in (2, 3))
    assert same(two["net"], three["net"]) and log("3")[-1]["skipped"] == 1
    bad = range(1, 100).__contains__
    with pytest.raises(SystemExit) as error:
        train(*words, "--steps", 100, "--out", "bad")
    assert error.value.code == 2 and "non-finite" in capsys.readouterr().err
    assert kit.read_checkpoint("bad")["step"] == 1


def test_a_bad_flag_overwrites_nothing(train, monkeypatch):
    """--overwrite keeps the old run until the new one's first step has worked; a teacher is not replaced."""
    train(*TOY, "--steps", 1, "--out", "run")
    before = files("run")
    with pytest.raises(SystemExit):
        train(*TOY, "--channels", 7, "--out", "run", "--overwrite")
    for teacher in ("run", "run/ckpt.pt"):
        with pytest.raises(SystemExit):
            train(*TOY, "--mode", "scd", "--teacher", teacher, "--out", "run", "--overwrite")

    def broken(*inputs):
        raise RuntimeError("broken")
    monkeypatch.setitem(scm.LOSSES, "sct", broken)
    with pytest.raises(RuntimeError):
        train(*TOY, "--mode", "sct", "--label_dropout", 0.5, "--conditional", "--out", "run", "--overwrite")
    assert before == files("run")


def test_ctrl_c_promises_a_resume_where_there_is_one(train, monkeypatch):
    """The hint that Ctrl-C ends in is empty until the run has a checkpoint, and then names its folder."""
    hints = kit.process.HINTS
    monkeypatch.setitem(hints, "stopped", "")

    def stops(*inputs):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(scm.LOSSES, "scd", stops)
        train(*TOY, "--out", "run")
    assert hints["stopped"] == ""
    train(*TOY, "--steps", 1, "--out", "run")
    assert hints["stopped"] == "; --resume goes on from the checkpoint in run"


def wait_for(path, lines=3):
    deadline = time.time() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") > lines) and time.time() < deadline:
        time.sleep(0.02)


def test_one_run_at_a_time_and_sigterm(tmp_path):
    """A second run in the same folder is told who holds it. SIGTERM leaves a whole checkpoint, a line, and
    143; the next run removes what killed writers have left, and drops a line of zeros from the log."""
    log, out = tmp_path / "run" / "log.jsonl", ["--out", "run"]
    first = subprocess.Popen([*PYTHON, *out, "--steps", "100000", "--lr_cooldown", "0", "--save_every", "2"],
                             stderr=subprocess.PIPE, text=True)
    wait_for(log)
    second = subprocess.run([*PYTHON, *out, "--overwrite"], capture_output=True, text=True)
    assert second.returncode == 2 and f"in use by process {first.pid} " in second.stderr
    first.send_signal(signal.SIGTERM)
    _, text = first.communicate(timeout=60)
    assert first.returncode == 143 and text.count("SIGTERM") == 1 and "Traceback" not in text
    step = kit.read_checkpoint("run")["step"]
    (tmp_path / "run" / f".ckpt.pt.123{kit.process.UNFINISHED}").write_bytes(b"half a checkpoint")
    with open(log, "ab") as file:
        file.write(b"\0" * 20 + b"\n")
    scm.main(["--resume", *out, "--steps", str(step + 2)])
    assert not (tmp_path / "run" / f".ckpt.pt.123{kit.process.UNFINISHED}").exists()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, step + 3))


def held(options, n, checkpointing):
    """Bytes that PyTorch's profiler sees a forward and a backward pass of n samples hold, at most."""
    net = kit.networks.build(options)
    net.checkpointing = checkpointing
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    with torch.profiler.profile(profile_memory=True) as profile:
        net(torch.randn(n, *options["shape"]), torch.rand(n)).sum().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]))


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    reason="without AVX512, convolutions in bfloat16 on a CPU hold more than on a GPU"))])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_forecast_is_what_a_step_holds(dtype, checkpointing):
    """Within 5 % for each sample. What is for all of them together is that of the weights in other forms."""
    options = dict(shape=(4, 16, 16), channels=32, blocks=1, attention=(8,), dtype=dtype, dropout=0.1)
    parameters, _, fixed, sample = kit.run.estimate(options, checkpointing)
    eight, sixteen = (held(options, n, checkpointing) for n in (8, 16))
    assert sample == pytest.approx((sixteen - eight) / 8, rel=0.05)
    assert fixed == pytest.approx(2 * eight - sixteen, abs=parameters)


def test_micro_is_the_largest_that_fits(monkeypatch):
    """A divisor of the share: all of it in much memory, 1 in too little; between, the estimate fits and the
    next divisor would not. Lack of memory names the next lower one."""
    monkeypatch.setitem(kit.process.HINTS, "memory", "")
    net = kit.networks.build(dict(shape=(3, 16, 16), channels=16, blocks=1))
    parameters, _, fixed, sample = kit.run.estimate(net.options, False)
    base = 12 * parameters + fixed
    assert kit.run.largest_micro(net, 96, base + 10**12) == 96 and kit.run.largest_micro(net, 96, 0) == 1
    assert kit.run.largest_micro(net, 96, base + int(1.33 * 47 * sample)) == 32
    assert kit.run.largest_micro(net, 96, base + int(1.33 * 47 * sample), checkpointing=True) > 32
    run = kit.Run.__new__(kit.Run)
    run.cfg, run.device, run.micro = scm.Config(batch=96, micro=24), torch.device("cpu"), 0
    run.split(net)
    assert run.rows[1] == (24, 48) and len(run.rows) == 4
    assert kit.process.HINTS["memory"] == "--micro 16, or --checkpointing"
    net.extra["another"] = kit.networks.build(net.options)
    assert kit.run.largest_micro(net, 96, base + int(1.33 * 47 * sample)) < 32
    net.extra.clear()
    # on a GPU: nothing is computed twice as long as enough samples fit at once
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    run.device = torch.device("cuda")
    monkeypatch.setattr(torch, "tensor", lambda v, device=None, real=torch.tensor: real(v))
    for room, micro, checkpointing in ((30, 24, False), (12, 32, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (base + int(1.33 * room * sample), 0))
        run.cfg.micro, run.micro, net.checkpointing = 0, 0, False
        run.split(net)
        assert (run.micro, net.checkpointing) == (micro, checkpointing)
    run.micro = 20  # what an earlier sitting chose for another share
    run.split(net)
    assert run.rows[1] == (16, 32) and run.micro == 16


def test_following_places_are_those_of_the_loop():
    """Micro-batch after micro-batch, step after step, to the end; none for what a report draws."""
    run = kit.Run.__new__(kit.Run)
    run.cfg, run.rows = scm.Config(steps=3), [(8, 12), (12, 16)]
    place, seen = (5, 0, 8, 12), []
    while place:
        seen.append(place)
        place = run.following(*place)
    assert seen == [(5, step, *rows) for step in range(3) for rows in run.rows]
    assert run.following(5, 2**32, 8, 12) is None and run.following(5, 1, 0, 4) is None


TINY = ["--channels", 8, "--channel_mult", "1,1", "--blocks", 1, "--attention", 4, "--image_size", 8]
ENDS = dict(cm=["--mode", "cd", "--metric", "l2"], direct_cm=["--mode", "both", "--intervals", 20],
            multistep_cm=["--mode", "diffusion", "--x_var_data"], sct=["--reference", "dataset"], scm=[])


@pytest.mark.parametrize("name", ENDS)
def test_two_processes_come_to_the_end(name, folder, train):
    """Two processes make the cache of a folder, train, and end with rank 0's report and samples, in which no
    step waits for the other process. So does --sample, also where it needs data that are not there yet."""
    train("--dataset", "folder", "--data", folder, "--mode", "diffusion", "--steps", 1, *TINY, "--batch", 4,
          "--label_dropout", 0.1, "--out", "teacher")
    shutil.rmtree("data")
    source = "--init" if name in ("sct", "multistep_cm") else "--teacher"
    words = ["--dataset", "folder", "--data", folder, "--steps", 2, "--batch", 4, *ENDS[name]]
    printed = two_processes(name, *words, source, "teacher", "--out", "two")
    runs = [Path("two/cm"), Path("two/direct")] if name == "direct_cm" else [Path("two")]
    assert printed.count("2 steps, ") == len(runs)
    assert all((out / "samples-000002.png").exists() for out in runs)
    shutil.rmtree("data")
    two_processes(name, "--sample", 2, "--out", runs[0], "--save", "some.png")
    assert Path("some.png").exists()


def test_training_waits_as_usual_and_preparations_wait_long():
    """A lost process ends the training after PyTorch's own timeout, not after the day of a download."""
    Path("wait.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
from kit.process import PATIENT, RANK, barrier, gathered, start_processes
start_processes()
groups = dist.group.WORLD, PATIENT["group"]
own, long = (g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups)
assert own <= 1800 and long == 24 * 3600, (own, long)
barrier()
assert gathered(RANK) == (None if RANK else [0, 1])
del groups
""")
    finish([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "wait.py"])
