"""What the papers claim, put to a fair test: one command a claim.

    python tests/claims.py                                    lists the claims
    python tests/claims.py toy                                every mode of every script on the 2-D ring
    python tests/claims.py figure                             what each method's loss compares, as a picture
    python tests/claims.py tangent                            trains what it compares, prints a table
    python tests/claims.py tangent-images --data CIFAR10 --features FEATURES.pt
    python tests/claims.py all --jobs 2                       everything; says how long it will take

Each row is a run on the toy, or for a claim that ends in -images on 16 x 16 pixels, from the README's teacher
in out/scm-folder-diffusion. Cells are the mean over the seeds (lowest-highest): of points the energy distance
to fresh data, of images the Frechet distance in the given features, and E. Finished runs in --out are kept,
and trained anew if their commands have changed. Charts need matplotlib.
"""
import argparse
import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
import eval as evaluation
import kit
import losses
import multistep_cm
from kit.process import end_at_sigterm, progress


@dataclass
class Claim:
    paper: str  # what it says, and where
    runs: dict  # name of a row: its command
    nfe: tuple = (1, 2)  # network evaluations of the columns, but for runs that are made for one number
    first: str = ""  # a run whose folder replaces {first} in the commands
    sampling: dict = field(default_factory=lambda: {"": {}})  # what sampling varies: a row for each
    chart: str = ""  # "training": tangent and E over its steps; "N": quality over N, a name's last word
    extra: str = ""  # flags for all runs
    columns: tuple = ()  # what else eval.py measures that the table shows, of the first NFE
    to_data: bool = False  # compare Direct CM's samples with the data, too, not with its teacher's
    noise: bool = False  # seeds are of the noise that samples start from, too


def grid(command, **choices):
    """Rows named by their choices: for name, flags in each of the choices, all combinations."""
    rows = {"": command}
    for options in choices.values():
        rows = {f"{name} {option}".strip(): f"{words} {flags}" for name, words in rows.items()
                for option, flags in options.items()}
    return rows


# The toy of each method at a third of its usual length or less, and images at a fifth to a half.
SCM = "scm.py --steps 1000 --warmup 0 --batch 256 --lr 2e-3 --lr_cooldown 0.7"
SCT = "sct.py --steps 1200 --stage_steps 60"
MULTISTEP = "multistep_cm.py --dataset gmm64 --init {first}"
MULTISTEP_TEACHER = "multistep_cm.py --dataset gmm64 --mode diffusion"
DIRECT = "direct_cm.py --weighting one --lr_cooldown 0 --ema_sigma_rel 0 --ema_halflife 0 --batch 128"
DIRECT_TOY = f"{DIRECT} --lr 1e-4 --teacher {{first}} --steps 50"
DIFFUSION = "scm.py --mode diffusion --steps 3000"
STRENGTHS = "scm.py --conditional true --guidance_max 2"
GUIDED = f"{DIFFUSION} --conditional true --label_dropout 0.1"
TEACHER = "out/scm-folder-diffusion"
SMALL = "--dataset folder --image_size 16"
IMAGES = f"{SMALL} --dtype bf16"
MODES = {"scd": "", "sct": "--mode sct"}
TANGENTS = {name: f"--tangent {name}" for name in ("raw", "clip", "normalize")}
TARGETS = {"ect": "--mode ect", "sct": "--mode sct", "sct, dataset": "--mode sct --reference dataset"}
FIXED_GAP = "sct.py --shrink 256 --widening 0 --first_stage 1 --stage_steps 100000"
STEPS = {str(k): f"--student_steps {k}" for k in (1, 2, 4, 8, 16)}
FEW = {k: STEPS[k] for k in ("1", "4")}
SOLVERS = {name: f"--solver {name}" for name in ("ddim", "addim")}
STUDENTS = {mode: f"--mode {mode}" for mode in ("cm", "direct")}

CLAIMS = {
    "methods-images": Claim(
        "No paper's claim: all methods from one teacher, for 250 steps at their presets but for the batch",
        {run: f"{run.replace(' ', '.py --mode ')} {SMALL} --steps 250 --batch 64 {flags} {TEACHER}"
         for run, flags in {
            "scm scd": "--teacher", "scm sct": "--init", "cm cd": "--teacher", "cm ict": "--init",
            "sct ect": "--stage_steps 31 --init", "sct sct": "--stage_steps 31 --init",
            "multistep_cm cd": "--student_steps 4 --teacher", "direct_cm cm": "--intervals 20 --teacher",
            "direct_cm direct": "--intervals 20 --teacher"}.items()}, to_data=True),
    "tangent": Claim(
        'sCM, Fig. 5a: "either normalization or clipping leads to substantial improvements"',
        grid(SCM, mode=MODES, tangent=TANGENTS), chart="training"),
    "tangent-images": Claim(
        'sCM, Fig. 5a: "either normalization or clipping leads to substantial improvements"',
        grid(f"scm.py {IMAGES} --teacher {TEACHER} --steps 100 --lr 2e-3 --warmup 0", tangent=TANGENTS)),
    "weighting": Claim(
        'sCM, Fig. 5b: the adaptive weight "outperforms manually designed weighting functions"',
        grid(SCM, mode=MODES, weight={name: f"--weighting {name}" for name in ("none", "adaptive")})),
    "intervals": Claim(
        'sCM, Fig. 5c: quality "degrades once N becomes too large (after N>1024)"; continuous-time CMs '
        '"significantly outperform discrete-time CMs across all N\'s"',
        {"scd": SCM} | {f"dscd {N}": f"{SCM} --mode dscd --intervals {N}"
                        for N in (4, 16, 64, 256, 1024, 65536)}, chart="N"),
    "embedding": Claim(
        'sCM, Sec. 4.1: "large Fourier scales in Fourier embeddings cause instabilities" (Fig. 4), '
        'c_noise = t, and double normalization, without which training may diverge',
        grid(f"{SCM} --steps 600", choice={
            "the paper's": "", "c_noise log": "--c_noise log", "fourier, 16": "--emb fourier --emb_scale 16",
            "single norm": "--double_norm false",
            "all three": "--c_noise log --emb fourier --emb_scale 16 --double_norm false"},
            tangent={name: TANGENTS[name] for name in ("raw", "normalize")}), chart="training"),
    "warmup": Claim(
        'sCM, Sec. 4.2, on warm-up: "the tangent normalization [sic] does not affect sample quality but may '
        'reduce some gradient spikes"',
        grid(SCM, tangent={name: TANGENTS[name] for name in ("raw", "normalize")},
             warmup={"at once": "--warmup 0", "over 300 steps": "--warmup 300"}), extra="--log_every 1"),
    "vsd": Claim(
        "sCM, Fig. 7, as guidance grows: VSD raises precision and lowers recall, sCD stays with its teacher",
        grid(f"{STRENGTHS} --init {{first}} --steps 1500 --warmup 0 --lr 5e-4", mode={
            mode: f"--mode {mode}" for mode in ("scd", "scd+vsd", "vsd")}), first=STRENGTHS, nfe=(1,),
        sampling={f"guidance {v}": dict(guidance=v) for v in (1.0, 1.5, 2.0)},
        columns=("precision", "recall")),
    "ict": Claim(
        "iCT: CT is right only if its target has no average",
        grid("cm.py --mode ct --steps 1000", target={
            "average over the paper's share of the run": "", "the paper's mu(k) itself": "--mu_steps 0",
            "live": "--mu 0"})),
    "targets": Claim(
        'SCT, Fig. 4 (gap t / 256, all 50,000 images): "the 1-step FID dropping from 5.61 to 4.56"',
        grid(f"{FIXED_GAP} --steps 1000 --init {{first}}",
             distance={"smooth": "", "the paper's": "--huber_c 1e-8 --P_mean -1.1"}, target=TARGETS),
        first="sct.py --mode diffusion --steps 3000"),
    "targets-images": Claim(
        'SCT, Fig. 4 (gap t / 256, all 50,000 images): "the 1-step FID dropping from 5.61 to 4.56"',
        grid(f"{FIXED_GAP} {IMAGES} --init {TEACHER} --steps 150", target=TARGETS)),
    "tuning-images": Claim(
        "SCT, Table 2: FID 3.11 / 2.05 against ECT's 3.78 / 2.13; here the targets differ, and no more",
        grid(f"sct.py {IMAGES} --init {TEACHER} --steps 240 --stage_steps 30", target=TARGETS)),
    "phases": Claim(
        "SCT, Table 2: FID 1.95 in 4 phases and 1.86 in 8, against 2.05 in two steps of one phase",
        {"one phase": SCT} | {f"{k} phases": f"{SCT} --phases {k}" for k in (2, 4, 8)}, nfe=(2, 4, 8)),
    "eta": Claim(
        'SCT, Fig. 5: "a smaller eta at the beginning of training yields superior performance", and "better '
        'overall performance for eta = 0.9 compared to eta = 1.0"',
        grid("sct.py --phases 4 --stage_steps 60 --lr_cooldown 0",
             steps={f"{n} steps": f"--steps {n}" for n in (150, 300, 600, 1200)}), nfe=(),
        sampling={f"eta = {v}": dict(eta=v) for v in (1.0, 0.95, 0.9, 0.8)}),
    "guidance": Claim(
        'SCT, Fig. 6: guidance by a weaker self, of 1.2, "can significantly enhance the quality"',
        {"sct": SCT}, sampling={f"guidance {v}": dict(guidance=v) for v in (1.0, 1.2, 1.5, 2.2)}),
    "samplers": Claim(
        'Multistep CM, Sec. 3.2: aDDIM is "on par with the 2nd order Heun sampler on Imagenet64 and '
        'outperforms it on Imagenet128"', {}),
    "samplers-images": Claim(
        "Multistep CM, Sec. 3.2, as above. The rows are one teacher: Heun takes a step less than the column",
        {"teacher": f"multistep_cm.py {IMAGES} --init {TEACHER} --mode diffusion --steps 1 --lr 1e-12"},
        sampling={solver: dict(solver=solver) for solver in ("ddim", "addim", "heun")} | {
            "addim, x_var measured": dict(solver="addim", x_var_data=True)}, nfe=(4, 8, 16), noise=True),
    "segments": Claim(
        "Multistep CM, Table 1 (ImageNet-64, small, cd): FID 4.3, 2.0, 1.7, 1.6, 1.5 in 1 to 16 steps. "
        "Table 4: a DDIM teacher is better in 1 and 2 steps (3.91, 1.99 against aDDIM's 4.35, 2.02), an "
        "aDDIM teacher in 4 to 16 (1.68, 1.58, 1.54 against 1.77, 1.70, 1.72)",
        grid(MULTISTEP, solver=SOLVERS, steps=STEPS), nfe=(), chart="student steps",
        first=MULTISTEP_TEACHER),
    "annealing": Claim(
        "Multistep CM, Table 2 (1 and 4 steps): 64 to 1,280 annealed teacher steps 7.0, 2.3, constant "
        "ones of 128: 8.8, 5.0, of 256: 7.6, 3.5, of 1,024: 10.8, 2.6",
        grid(MULTISTEP, teacher={"annealed": "", **{
            f"constant {n:,}": f"--teacher_steps {n},{n}" for n in (128, 1024)}}, steps=FEW), nfe=(),
        first=MULTISTEP_TEACHER),
    "pd": Claim(
        'Multistep CM, Sec. 5.1: "a 4-step PD model attains an FID of 2.4 whereas CD achieves 1.7"',
        grid(MULTISTEP, mode={"cd": "", "pd": "--mode pd"},
             steps={k: STEPS[k] for k in ("1", "2", "4", "8")}), nfe=(), first=MULTISTEP_TEACHER),
    "addim-images": Claim(
        "Multistep CM, Table 4, as for segments",
        grid(f"multistep_cm.py {IMAGES} --teacher {TEACHER} --steps 80", solver=SOLVERS, steps=FEW), nfe=()),
    "direct": Claim(
        'Direct CM, Table 1: "Direct CMs solve the PF ODE more accurately, yet CMs produce higher quality '
        'images"; here at the toy\'s preset',
        {mode: f"direct_cm.py {flags}" for mode, flags in STUDENTS.items()}, nfe=(1, 2, 4)),
    "direct-intervals": Claim(
        'Direct CM, Fig. 3 (one step): at every N, "Direct CMs solve the PF ODE more accurately, yet CMs '
        'produce higher quality images"',
        grid(DIRECT_TOY, student=STUDENTS, N={str(N): f"--intervals {N}" for N in (20, 50, 100)}),
        nfe=(1, 2, 4), first=DIFFUSION, chart="N"),
    "direct-guidance": Claim(
        "Direct CM, Fig. 4 (one step): the same at every strength of guidance w, with N = 50",
        grid(f"{DIRECT_TOY} --intervals 50", student=STUDENTS, w={
            str(w): f"--guidance {w}" for w in (1, 4, 8)}), nfe=(1, 2, 4), first=GUIDED, chart="w"),
    "direct-hops": Claim(
        "No paper's claim: what lies between a CM and a Direct CM, with the toy's weight and times (N = 100)",
        {f"{n} hops": f"direct_cm.py --mode cm --hops {n} --steps 1000" for n in (1, 3, 10, 30)} | {
            "direct": "direct_cm.py --mode direct --steps 1000"}),
    "direct-images": Claim(
        "Direct CM, Table 1 (DDIM, one step): E 0.25 against CM's 0.29, FID 158.6 against 103.9",
        grid(f"{DIRECT} {IMAGES} --lr 1e-3 --teacher {TEACHER} --intervals 20 --steps 80", student=STUDENTS),
        nfe=(1, 2, 4)),
}


def measure(out, nfe, args, claim, seed):
    """{column: value} of a finished run. What Direct CM samples is compared, as in the paper, with what its
    teacher samples."""
    direct = kit.read_checkpoint(out)["script"] == "direct_cm" and not claim.to_data
    options = argparse.Namespace(**vars(args.eval) | dict(reference="teacher" if direct else None, seed=seed))
    found, row = evaluation.evaluate(out, nfe, options, args.tools, "cpu"), {}
    for (_, n), (values, _) in found.items():
        if n != "teacher":
            row[f"{n} NFE"] = values.get("energy_distance", values.get("frechet_distance"))
            for name, key in {"E": "ode_error", **dict(zip(claim.columns, claim.columns))}.items():
                if key in values:
                    row.setdefault(name, values[key])
    gradients = [value for step, value, _, _ in training([out], "grad_norm") if step > 50]  # not the start
    if len(gradients) > 500:  # every step was logged
        row["largest gradient over the median"] = max(gradients) / sorted(gradients)[len(gradients) // 2]
    return row


def own_steps(words):
    """The number of network evaluations that a run is made for, or ()."""
    flags = [flag for flag in ("--student_steps", "--phases") if flag in words]
    return tuple(int(words[words.index(flag) + 1]) for flag in flags)


def training(folder, key):
    """Rows (step, value, lowest, highest) of log.jsonl over the seeds."""
    with kit.reading(f"a log.jsonl in {folder} is damaged: delete its folder"):
        logs = [[json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
                for out in folder]
    values = {}
    for line in sum(logs, []):
        if math.isfinite(line.get(key, math.inf)):
            values.setdefault(line["step"], []).append(line[key])
    return [(step, sum(v) / len(v), min(v), max(v)) for step, v in sorted(values.items())
            if len(v) == len(logs)]


def draw(claim, folders, cells, path):
    """The claim's chart: over training, or over the number that ends a row's name. A row without one is a
    level line. Shaded is the range of the seeds."""
    charts = {}
    if claim.chart == "training":
        for key, title in (("tangent_rms", "RMS of the tangent"), ("ode_error", "E")):
            lines = {row: line for row, folder in folders.items() if (line := training(folder, key))}
            charts[f"{title} over training steps"] = lines
    else:
        titles = {"1 NFE": "distance in one step", "E": "E"} if claim.nfe else {"quality": "distance"}
        for key, title in titles.items():
            numbered = {row: int(row.split()[-1]) for row in cells if row.split()[-1].isdigit()}
            ends, lines = sorted(numbered.values()), {}
            for row, columns in cells.items():
                v, label = columns.get(key), row.rsplit(" ", 1)[0] if row in numbered else row
                if not v:  # a run that stopped
                    continue
                for x in [numbered[row]] if row in numbered else (ends[0], ends[-1]):
                    lines.setdefault(label, []).append((x, sum(v) / len(v), min(v), max(v)))
            charts[f"{title} over {claim.chart}"] = lines
    try:
        import matplotlib
    except ImportError:
        kit.fail("charts need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    form = dict(figsize=(6 * len(charts), 3.4), layout="constrained", squeeze=False)
    figure, (axes,) = pyplot.subplots(1, len(charts), **form)
    for (title, lines), at in zip(charts.items(), axes):
        for label, line in lines.items():
            x, mean, low, high = zip(*line)
            at.plot(x, mean, label=label)
            at.fill_between(x, low, high, alpha=0.2)
        at.set(title=title, yscale="log", xscale="linear" if claim.chart == "training" else "log")
        at.grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


CHILDREN = []  # started and perhaps still at work


def spread(values, digits):
    """Mean (lowest-highest)."""
    return f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def finished(command, out):
    """Whether OUT holds this command's run, whole: the command was written after the checkpoint and log, and
    after whatever run it starts from."""
    kept, words = Path(out, "command.txt"), shlex.split(command)
    origins = [run for flag, run in zip(words, words[1:]) if flag in ("--init", "--teacher") and "/" in run]
    with contextlib.suppress(OSError, ValueError):
        times = [path.stat().st_mtime for path in (
            Path(out, "log.jsonl"), *(Path(run, "ckpt.pt") for run in (out, *origins)))]
        return shlex.split(kept.read_text()) == words and max(times) <= kept.stat().st_mtime
    return False


@contextlib.contextmanager
def workers(count):
    """Threads that start runs. Whatever ends the claim ends its runs, too, which save their step."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in CHILDREN:
                child.terminate()
            raise


def train_once(command, out):
    """Run `SCRIPT.py FLAGS --out OUT` in a process of its own, on one thread. OUT keeps the command, and is
    left alone if it is the same."""
    if not finished(command, out):
        script, *flags = shlex.split(command)
        command = [sys.executable, str(ROOT / script), *flags, "--out", out, "--overwrite"]
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
        with subprocess.Popen(command, **quiet) as child:
            CHILDREN.append(child)
            _, text = child.communicate()
        if child.returncode:
            said = [line for line in text.splitlines() if line.strip() and not re.search(r"\d+%\|", line)]
            kit.fail(f"{shlex.join(command)} stopped: {(said or [f'exit code {child.returncode}'])[-1]}")
        Path(out, "command.txt").write_text(shlex.join([script, *flags]))
    return out


def minutes(jobs, args):
    """How long runs take that are not finished, about: on a core of a plain machine 25 ms a step of points,
    1.2 s of images, and 10 s for the start and the report."""
    total = 0
    for command, out in jobs:
        script, *flags = shlex.split(command)
        module, given = __import__(script[:-3]), dict(zip(flags, flags[1:]))
        name, mode = given.get("--dataset", "gmm"), given.get("--mode", module.Config.mode)
        steps = int(given.get("--steps") or kit.config.preset(module.PRESETS, name, mode).get("steps", 4000))
        if not finished(command, out):
            total += 10 + steps * (1.2 if name == "folder" else 0.025)
    return math.ceil(total / 60 / args.jobs)


TOY = dict(scm=("diffusion", "scd", "sct", "dscd", "vsd", "scd+vsd"), cm=("cd", "ct", "ict", "ctcd", "ctct"),
           sct=("ect", "sct"), multistep_cm=("cd", "ct", "pd"), direct_cm=("cm", "direct"))


def nfes(script, mode):
    return (35,) if mode == "diffusion" else (1, 2, 4)


def toy_jobs(args):
    """The runs of the toy (script, mode, seed, steps of multistep_cm.py or 0), and for each its command and
    folder."""
    def job(script, mode, seed, k):
        command = f"{script}.py --mode {mode} --seed {seed}" + (f" --student_steps {k}" if k else "")
        command += f" --init {shlex.quote(args.out)}/toy/scm-scd-{seed}" if "vsd" in mode else ""
        if args.steps:
            stage = f" --stage_steps {max(1, args.steps // 20)}" if script == "sct" else ""
            command += f" --steps {args.steps}{stage}"
        return command, f"{args.out}/toy/{script}-{mode}{f'-{k}' if k else ''}-{seed}"
    runs = [(script, mode, seed, k) for seed in range(args.seeds) for script in TOY for mode in TOY[script]
            for k in (nfes(script, mode) if script == "multistep_cm" else (0,))]
    return runs, [job(*run) for run in runs]


def toy(_, args):
    """Every mode of every script on the ring, at its preset. Students are sampled in 1, 2 and 4 evaluations,
    diffusion in 35. A run of multistep_cm.py is made for one number of steps, so there is one for each.
    Writes toy/eval.png, with a panel for each mode, in the fewest evaluations or, of multistep_cm.py, the
    preset's. E, the shares of the ring's modes (lowest-highest) and the seconds are those of the panels."""
    def shown(script, mode):
        return multistep_cm.Config.student_steps if script == "multistep_cm" else nfes(script, mode)[0]

    root = Path(args.out, "toy")
    runs, jobs = toy_jobs(args)
    with workers(args.jobs) as pool, progress(total=len(runs), desc="toy") as bar:
        for later in (False, True):  # vsd goes on from a finished scd
            for _ in pool.map(train_once, *zip(*(job for job in jobs if ("--init" in job[0]) == later))):
                bar.update()
    outs = [out for _, out in jobs]
    found, sheet = {}, {}
    for (script, mode, _, k), out in progress(zip(runs, outs), total=len(runs), desc="sample"):
        own = evaluation.evaluate(out, (k,) if k else nfes(script, mode), args.eval, args.tools, "cpu")
        for (_, nfe), (row, picture) in own.items():
            found.setdefault((script, mode), []).append(row)
            if nfe == shown(script, mode):
                sheet.setdefault(f"{script}.py {mode}, {nfe} NFE", picture)  # that of the first seed
    rows = []
    for (script, mode), mine in found.items():
        line = dict(method=script, mode=mode)
        for nfe in (1, 2, 4, 35):
            values = [row["energy_distance"] for row in mine if row["nfe"] == nfe]
            line[f"energy distance, {nfe} NFE"] = spread(values, 5) if values else ""
        mine = [row for row in mine if row["nfe"] == shown(script, mode)]
        shares = sum((row["mode_shares"] for row in mine), [])
        rows.append(line | {"E": spread([row["ode_error"] for row in mine], 4),
                            "modes": f"{min(shares):.3f}-{max(shares):.3f}",
                            "seconds": min(row["seconds"] for row in mine)})
    floor = max(row.get("exact_ode", 0) for mine in found.values() for row in mine)  # the same in all rows
    rows.append({"method": "exact ODE", "energy distance, 1 NFE": f"{floor:.5f}"})
    print(evaluation.table(rows), flush=True)
    kit.panels(sheet, root / "eval.png", 4)


def figure(_, args):
    """What the loss of each method compares, of which no paper claims anything."""
    losses.draw(f"{args.out}/losses.png")
    print(f"wrote {args.out}/losses.png")


def samplers(_, args):
    """The exact teacher's own samples, in 2-D and in 64-D. The seeds are of noise and data."""
    solvers = "ddim", "addim", "addim, x_var measured", "heun"
    for dataset in ("gmm", "gmm64"):
        cells = {}
        for steps, seed in itertools.product((2, 4, 8, 16, 32, 64), range(args.seeds)):
            flags = f"--dataset {dataset} --seed {seed} --out out/none".split()
            cfg = kit.parse_args(multistep_cm.Config, multistep_cm.PRESETS, multistep_cm.LOSSES, flags)
            teacher, gen = kit.dataset(cfg), common.Draw(12345 + seed, 0, 0, args.samples)
            noise = cfg.sigma_d * gen.normal(*teacher.shape)
            fresh, _ = teacher.batch(common.Draw(seed, 2**32, 0, args.samples))
            for solver in solvers if steps > 2 else solvers[:3]:  # Heun takes one evaluation less, here one
                way = replace(cfg, mode="diffusion", solver=solver.split(",")[0])
                sample = multistep_cm.sample
                if solver.endswith("measured"):
                    sample = multistep_cm.measured(teacher, teacher, steps, way)
                row = cells.setdefault(f"{dataset}, {solver}", {})
                x = sample(teacher, noise, None, steps, way, gen)
                row.setdefault(f"{steps} steps", []).append(kit.distance(x, fresh))
        show("samplers", cells)


def show(name, cells):
    print(f"\n{CLAIMS[name].paper}\n")
    digits = 3 if name.endswith("-images") else 5
    rows = [{name: row} | {column: spread(v, digits) for column, v in columns.items()}
            for row, columns in cells.items()]
    print(evaluation.table(rows), flush=True)


def variant(out, changes):
    """A copy of a run, in a folder of its own, whose stored flags are changed: for sampling."""
    path = f"{out}, {', '.join(f'{k} {v}' for k, v in changes.items())}"
    ckpt = kit.read_checkpoint(out)
    Path(path).mkdir(exist_ok=True)
    torch.save(ckpt | dict(config=ckpt["config"] | changes), Path(path, "ckpt.pt"))
    Path(path, "log.jsonl").write_bytes(Path(out, "log.jsonl").read_bytes())
    return path


def jobs_of(name, args):
    """The first run of a claim, or None, and the others by row and seed: commands and folders."""
    claim, root, jobs = CLAIMS[name], Path(args.out, name), {}
    extra = f" {claim.extra}" + f" --data {shlex.quote(args.data)}" * name.endswith("-images")
    extra += f" --steps {args.steps}" if args.steps else ""
    first = (claim.first + extra, str(root / "first")) if claim.first else None
    for seed in range(args.seeds):
        for row, command in claim.runs.items():
            words = command.format(first=shlex.quote(str(root / "first"))) + extra + f" --seed {seed}"
            if claim.chart == "training":
                steps = int(words.split("--steps ")[-1].split()[0])
                words += f" --log_every 10 --sample_every {max(1, steps // 5)}"
            jobs[row, seed] = words, str(root / f"{row}-{seed}")
    return first, jobs


def run(name, args):
    """Train, measure, print."""
    claim, root = CLAIMS[name], Path(args.out, name)
    first, jobs = jobs_of(name, args)
    if first:
        train_once(*first)

    def train(job):
        try:
            return train_once(*job)
        except SystemExit:  # the script has said why, such as a loss that is not finite
            return ""
    with workers(args.jobs) as pool:
        outs = list(progress(pool.map(train, jobs.values()), total=len(jobs), desc=name))
    if not any(outs):
        kit.fail(f"{name}: no run came to its end; the lines above say why")
    cells, folders = {}, {}
    for ((row, seed), (words, _)), out in zip(jobs.items(), outs):
        for label, changes in claim.sampling.items():
            at = variant(out, changes) if changes and out else out
            own = own_steps(shlex.split(words))
            nfe = own or claim.nfe
            values = {"stopped": 1} if not out else measure(at, nfe, args, claim, seed * claim.noise)
            if not claim.nfe and own and out:
                values = {"quality": values.pop(f"{own[0]} NFE")} | values
            for column, value in values.items():
                cells.setdefault(f"{row} {label}".strip(), {}).setdefault(column, []).append(value)
        if out:
            folders.setdefault(row, []).append(out)
    (root / "cells.json").write_text(json.dumps(cells, indent=1))
    show(name, cells)
    if claim.chart:
        draw(claim, folders, cells, root / "chart.png")
        print(f"\nwrote {root}/chart.png")


def main(argv=None):
    parser = argparse.ArgumentParser("claims.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="claims, toy, figure or all; none lists the claims")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread [1]")
    parser.add_argument("--data", default="data/cifar10", help="class folders of images [data/cifar10]")
    parser.add_argument("--features", default="pixels", help="as of eval.py [pixels]")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=0, help="steps of every run, to try it out")
    parser.add_argument("--out", default="out/claims")
    parser.error = kit.fail
    args = parser.parse_args(argv)
    if min(args.seeds, args.jobs, args.samples - 1, args.steps + 1) < 1:
        kit.fail("--seeds and --jobs must be at least 1, --samples at least 2, --steps at least 0")
    everything = "figure", "toy", *CLAIMS
    for name in args.names:
        if name not in (*everything, "all"):
            kit.fail(f"unknown claim {name!r}; the claims are all, {', '.join(everything)}")
    if "all" in args.names:
        args.names = everything
    if any(name.endswith("-images") for name in args.names) and not Path(TEACHER, "ckpt.pt").exists():
        kit.fail(f"claims on images start from a teacher in {TEACHER}: make it with python scm.py --mode "
                 f"diffusion {IMAGES} --data {args.data}")
    jobs = toy_jobs(args)[1] if "toy" in args.names else []
    for name in set(args.names) & set(CLAIMS):
        first, others = jobs_of(name, args)
        jobs += [first] * bool(first) + list(others.values())
    if jobs:
        print(f"{len(jobs)} runs, about {minutes(jobs, args)} minutes for what is not finished", flush=True)
    if not args.names:
        return print("\n".join(f"{name:18}{claim.paper}" for name, claim in CLAIMS.items()), flush=True)
    args.eval = evaluation.parse_args(["x", "--features", args.features, "--samples", str(args.samples)])
    args.tools = evaluation.make_tools(args.eval, torch.device("cpu"))
    with kit.reading(f"--out {args.out} is no folder to write to"):
        Path(args.out).mkdir(parents=True, exist_ok=True)
    end_at_sigterm()
    failed = []
    try:
        for name in args.names:
            try:
                dict(toy=toy, figure=figure, samplers=samplers).get(name, run)(name, args)
            except SystemExit as stop:  # the others go on, but not after a signal
                if stop.code != 2:
                    raise
                failed.append(name)
    except (KeyboardInterrupt, SystemExit):
        for child in CHILDREN:  # they save their step and end
            child.terminate()
        raise
    if failed:
        kit.fail(f"not done, as said above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
