"""What the papers claim, put to a fair test: one command a claim.

    python tests/claims.py                                    lists the claims
    python tests/claims.py tangent                            trains what it compares, prints a table
    python tests/claims.py tangent-images --data CIFAR10 --features FEATURES.pt

Each row is a run on the toy, or for a claim that ends in -images on 16 x 16 pixels, from the README's teacher
in out/scm-folder-diffusion. Cells are the mean over the seeds (lowest-highest): of points the energy distance
to fresh data, of images the Frechet distance in the given features, and E. Finished runs in --out are kept.
"""
import argparse
import concurrent.futures
import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import direct_cm
import eval as evaluation
import multistep_cm


@dataclass
class Claim:
    paper: str  # what it says, and where
    runs: dict  # name of a row: its command
    nfe: tuple = (1, 2)  # network evaluations of the columns; none stands for the run's own number of steps
    first: str = ""  # a run whose folder replaces {first} in the commands
    chart: str = ""  # "step" draws loss and E over training; "number" draws quality over a name's last word


def grid(command, **choices):
    """Rows named by their choices: for name, flags in each of the choices, all combinations."""
    rows = {"": command}
    for options in choices.values():
        rows = {f"{name} {option}".strip(): f"{words} {flags}" for name, words in rows.items()
                for option, flags in options.items()}
    return rows


# The toy of each method at a quarter to a half of its usual length, and images at a tenth.
SCM = "scm.py --steps 1000 --warmup 300 --batch 256 --tangent_c 0.1"
SCT = "sct.py --steps 1500 --stage_steps 75"
MULTISTEP = "multistep_cm.py --steps 1500"
DIRECT = "direct_cm.py --lr 1e-4 --lr_cooldown 0 --ema_sigma_rel 0 --ema_halflife 0 --batch 128"
TEACHER = "out/scm-folder-diffusion"
IMAGES = "--dataset folder --image_size 16 --dtype bf16"
TANGENTS = {name: f"--tangent {name}" for name in ("raw", "clip", "normalize")}
TARGETS = {"ect": "--mode ect", "sct": "--mode sct", "sct, dataset": "--mode sct --reference dataset"}
FIXED_GAP = "sct.py --shrink 256 --widening 0 --stage_steps 100000"
STEPS = {str(k): f"--student_steps {k}" for k in (1, 2, 4, 8, 16)}
STUDENTS = {mode: f"--mode {mode}" for mode in ("cm", "direct")}

CLAIMS = {
    "tangent": Claim(
        "sCM, Fig. 5a: normalized or clipped tangents are better than raw ones",
        grid(SCM, mode={"scd": "", "sct": "--mode sct"}, tangent=TANGENTS), chart="step"),
    "tangent-images": Claim(
        "sCM, Fig. 5a and 5b: normalized or clipped tangents are better, and so is the adaptive weight",
        grid(f"scm.py {IMAGES} --mode sct --steps 120 --warmup 40", tangent=TANGENTS | {
            "normalize, no adaptive weight": "--weighting none"}), chart="step"),
    "weighting": Claim(
        "sCM, Fig. 5b: the adaptive weight is better than none",
        grid(SCM, mode={"scd": "", "sct": "--mode sct"},
             weight={"none": "--weighting none", "adaptive": "--weighting adaptive"}), chart="step"),
    "intervals": Claim(
        "sCM, Fig. 5c: discrete time is best at N = 1,024; continuous time beats every N",
        {"scd": SCM} | {f"dscd {N}": f"{SCM} --mode dscd --intervals {N}"
                        for N in (4, 16, 64, 256, 1024, 65536)}, chart="number"),
    "embedding": Claim(
        "sCM, Sec. 4.1: c_noise = t, positional embedding and double normalization make training stable",
        grid("scm.py --steps 800 --warmup 0 --batch 256 --tangent_c 0.1", choice={
            "the paper's": "", "c_noise log": "--c_noise log", "fourier, 16": "--emb fourier --emb_scale 16",
            "single norm": "--double_norm false",
            "all three": "--c_noise log --emb fourier --emb_scale 16 --double_norm false"},
            tangent={name: TANGENTS[name] for name in ("raw", "normalize")}), chart="step"),
    "warmup": Claim(
        "sCM, Sec. 4.2: the tangent's warm-up leaves quality as it is and may save spikes of the gradient",
        grid(SCM, tangent={name: TANGENTS[name] for name in ("raw", "normalize")},
             warmup={"at once": "--warmup 0", "over 300 steps": ""}), chart="step"),
    "average": Claim(
        "sCM uses an average for samples; Direct CM has none. After few steps, which is better?",
        grid("scm.py --batch 256 --warmup 100", steps={f"{n} steps": f"--steps {n}" for n in (150, 300, 600)},
             ema={"without average": "--ema_sigma_rel 0 --ema_halflife 0", "with": ""})),
    "ict": Claim(
        "iCT, Sec. 3.2: CT is better if its target is the live network, not an average",
        grid("cm.py --mode ct --steps 2000", mu={"average, mu = 0.9": "--mu 0.9", "live": "--mu 0"})),
    "targets": Claim(
        "SCT, Fig. 4: at a fixed gap of t / 256, averaged targets lower the FID from 5.61 to 4.56",
        grid(f"{FIXED_GAP} --steps 1500 --init {{first}}",
             distance={"smooth": "", "the paper's": "--huber 1e-8 --P_mean -1.1"}, target=TARGETS),
        first="sct.py --mode diffusion --steps 3000"),
    "targets-images": Claim(
        "SCT, Fig. 4: at a fixed gap of t / 256, averaged targets lower the FID from 5.61 to 4.56",
        grid(f"{FIXED_GAP} {IMAGES} --steps 200", target=TARGETS)),
    "tuning-images": Claim(
        "SCT, Table 2: FID of 1 / 2 steps 3.11 / 2.05 against ECT's 3.78 / 2.13",
        grid(f"sct.py {IMAGES} --steps 300 --stage_steps 40", target=TARGETS)),
    "phases": Claim(
        "SCT, Table 2: FID 1.95 in 4 phases and 1.86 in 8, against 2.05 in two steps of one phase",
        {"one phase, 2": SCT} | {f"phases, {k}": f"{SCT} --phases {k}" for k in (2, 4, 8)}, nfe=()),
    "eta": Claim(
        "SCT, Fig. 7: eta below 1 is better early in training; 0.9 stays better than 1",
        grid("sct.py --phases 4", steps={f"{n} steps": f"--steps {n} --stage_steps {n // 20}"
                                         for n in (300, 1500)},
             eta={f"eta = {v}": f"--eta {v}" for v in (1, 0.95, 0.9, 0.8)}), nfe=()),
    "guidance": Claim(
        "SCT, Fig. 6: guidance by a weaker version of the network, of about 1.2, lowers the FID",
        grid(SCT, guidance={f"guidance {v}": f"--guidance {v}" for v in (1, 1.2, 1.5)})),
    "segments": Claim(
        "Multistep CM, Table 1 (ImageNet-64, small): FID 4.3, 2.0, 1.7, 1.6, 1.5 of cd in 1 to 16 steps",
        grid(MULTISTEP, mode={mode: f"--mode {mode}" for mode in ("cd", "ct", "pd")}, steps=STEPS),
        nfe=(), chart="number"),
    "annealing": Claim(
        "Multistep CM, Table 2: 64 to 1,280 annealed teacher steps beat 128, 256 and 1,024 constant ones",
        grid(MULTISTEP, teacher={"annealed": "", **{str(n): f"--teacher_steps {n},{n}" for n in (128, 1024)}},
             steps={k: STEPS[k] for k in "14"}), nfe=()),
    "samplers": Claim(
        "Multistep CM, Sec. 3.2: aDDIM corrects the norm that DDIM loses, and is on par with Heun (Fig. 5)",
        {}),
    "samplers-images": Claim(
        "Multistep CM, Sec. 3.2, as above; the rows are the teacher, and its seed is one",
        grid(f"multistep_cm.py {IMAGES} --init {TEACHER} --mode diffusion --steps 1 --lr 1e-12",
             solver={"ddim": "--solver ddim", "addim": "--solver addim", "heun": "--solver heun",
                     "addim, x_var measured": "--solver addim --x_var_data true"}), nfe=(2, 4, 8, 16, 32)),
    "addim": Claim(
        "Multistep CM, Table 4: as a teacher, DDIM is better in 1 and 2 steps (3.91, 1.99 against aDDIM's "
        "4.35, 2.02), and aDDIM in 4 to 16 (1.68, 1.58, 1.54 against 1.77, 1.70, 1.72)",
        grid("multistep_cm.py --dataset gmm64", solver={s: f"--solver {s}" for s in ("ddim", "addim")},
             steps={k: STEPS[k] for k in ("1", "4", "16")}), nfe=(), chart="number"),
    "addim-images": Claim(
        "Multistep CM, Table 4, as above",
        grid(f"multistep_cm.py {IMAGES} --steps 150", solver={s: f"--solver {s}" for s in ("ddim", "addim")},
             steps={k: STEPS[k] for k in "4"}), nfe=()),
    "direct": Claim(
        "Direct CM, Fig. 3, 4: at every N and w, the Direct CM solves the ODE better and samples worse",
        grid(f"{DIRECT} --teacher {{first}} --steps 50", student=STUDENTS,
             setting={"N = 20": "--intervals 20", "N = 100": "--intervals 100",
                      **{f"N = 50, w = {w}": f"--intervals 50 --guidance {w}" for w in (1, 4, 8)}}),
        nfe=(1, 2, 4), first="scm.py --mode diffusion --steps 3000 --conditional true --label_dropout 0.1"),
    "direct-images": Claim(
        "Direct CM, Table 1: mean square E 0.25 against 0.29, FID 158.6 against 103.9 (DDIM, one step)",
        grid(f"{DIRECT} {IMAGES} --intervals 20 --steps 40", student=STUDENTS), nfe=(1, 2, 4)),
}


def measure(out, nfe, claim, args, tools):
    """{column: value} of a finished run. Direct CM's are the paper's: against the solver's samples."""
    ckpt = common.read_checkpoint(out)
    if ckpt["script"] == "direct_cm" and ckpt["config"]["dataset"] == "gmm":
        cfg = common.make_config(direct_cm.Config, ckpt["config"])
        E, *distances = direct_cm.compare(cfg, [out])[Path(out).name]
        return {f"{n} NFE": d for n, d in zip((1, 2, 4), distances)} | dict(E=E)
    row = {}
    for (_, n), (values, _) in evaluation.evaluate(out, nfe, args, tools, "cpu").items():
        if n != "teacher":
            quality = values.get("energy_distance", values.get("frechet_distance"))
            row["quality" if not claim.nfe else f"{n} NFE"] = quality
        if "ode_error" in values:
            row.setdefault("E", values["ode_error"])
    return row


def own_steps(name, words):
    """The number of network evaluations of a run that is made for one."""
    for flag in ("--student_steps", "--phases"):
        if flag in words:
            return int(words[words.index(flag) + 1])
    return int(name.split()[-1])


def training(folder, key):
    """Rows (step, value, lowest, highest) of log.jsonl over the seeds."""
    logs = [[json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()] for out in folder]
    values = {}
    for line in sum(logs, []):
        if key in line:
            values.setdefault(line["step"], []).append(line[key])
    return [(step, sum(v) / len(v), min(v), max(v)) for step, v in sorted(values.items())]


def draw(name, claim, folders, cells, path):
    """The claim's chart: over training, or over the number that ends a row's name. A row without one is a
    level line."""
    pictures = {}
    if claim.chart == "step":
        for key in ("grad_norm", "ode_error"):
            lines = {row: training(folder, key) for row, folder in folders.items()}
            title = f"{key.replace('ode_error', 'E')} over training steps"
            pictures[title] = common.chart(lines, "y", (520, 300))
    else:
        for key in dict.fromkeys(key for columns in cells.values() for key in columns):
            numbered = {row: int(row.split()[-1]) for row in cells if row.split()[-1].isdigit()}
            ends, lines = sorted(numbered.values()), {}
            for row, columns in cells.items():
                v, label = columns[key], row.rsplit(" ", 1)[0] if row in numbered else row
                for x in [numbered[row]] if row in numbered else (ends[0], ends[-1]):
                    lines.setdefault(label, []).append((x, sum(v) / len(v), min(v), max(v)))
            pictures[f"{key} over {name}"] = common.chart(lines, "xy")
    common.panels(pictures, path)


def samplers(args):
    """The exact teacher's own samples, in 2-D and in 64-D. The seeds are of noise and data."""
    for dataset in ("gmm", "gmm64"):
        cells = {}
        for steps in (2, 4, 8, 16, 32, 64):
            for seed in range(args.seeds):
                flags = f"--dataset {dataset} --student_steps {steps} --seed {seed} --out out/none"
                cfg = common.parse_args(multistep_cm.Config, multistep_cm.PRESETS, multistep_cm.LOSSES,
                                        flags.split())
                with contextlib.redirect_stdout(None):
                    rows = multistep_cm.compare(cfg, common.dataset(cfg))
                for name, distance in rows.items():
                    cells.setdefault(name, {}).setdefault(f"{steps} steps", []).append(distance)
        show(dataset, cells)


def show(name, cells):
    print(f"\n{CLAIMS[name].paper if name in CLAIMS else 'samplers'}\n")
    print(evaluation.table([{name: row} | {column: evaluation.spread(v, 4) for column, v in columns.items()}
                            for row, columns in cells.items()]))


def run(name, args):
    """Train, measure, print."""
    claim, root = CLAIMS[name], Path(args.out, name)
    extra = f" --data {args.data}" if name.endswith("-images") else ""
    extra += f" --steps {args.steps}" if args.steps else ""
    first = evaluation.train_once(claim.first + extra, str(root / "first")) if claim.first else ""
    curves = " --log_every 10 --sample_every {}" if claim.chart == "step" else ""
    jobs = {}
    for seed in range(args.seeds):
        for row, command in claim.runs.items():
            words = command.format(first=first) + extra + f" --seed {seed}"
            steps = int(words.split("--steps ")[-1].split()[0]) if "--steps" in words else 0
            words += curves.format(max(1, steps // 10)) if "images" not in name else ""
            jobs[row, seed] = words, str(root / f"{row.replace(' ', '_').replace('/', '-')}-{seed}")
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(evaluation.train_once, *job) for job in jobs.values()]
        for job in tqdm(concurrent.futures.as_completed(waiting), total=len(jobs), desc=name, disable=None):
            job.result()
    cells, folders = {}, {}
    for (row, _), (words, out) in jobs.items():
        nfe, kept = claim.nfe or (own_steps(row, words.split()),), Path(out, "claim.json")
        if not kept.exists():
            values = measure(out, nfe, claim, args.eval, args.tools)
            kept.write_text(json.dumps(values))
        for column, value in json.loads(kept.read_text()).items():
            cells.setdefault(row, {}).setdefault(column, []).append(value)
        folders.setdefault(row, []).append(out)
    show(name, cells)
    if claim.chart:
        draw(name, claim, folders, cells, root / "chart.png")
        print(f"\nwrote {root}/chart.png")


def main(argv=None):
    parser = argparse.ArgumentParser("claims.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="claims, or none for a list of them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread [1]")
    parser.add_argument("--data", default="data/cifar10", help="class folders of images [data/cifar10]")
    parser.add_argument("--features", default="pixels", help="as of eval.py [pixels]")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=0, help="steps of every run, to try it out")
    parser.add_argument("--out", default="out/claims")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in CLAIMS:
            common.fail(f"unknown claim {name!r}; the claims are {', '.join(CLAIMS)}")
    args.eval = evaluation.parse_args(["x", "--features", args.features, "--samples", str(args.samples)])
    features = evaluation.feature_network(args.features, None, torch.device("cpu"))
    args.tools = SimpleNamespace(features=features, references={}, solved={}, prompts=None, scores=None)
    for name in args.names:
        samplers(args) if name == "samplers" else run(name, args)
    if not args.names:
        print("\n".join(f"{name:18}{claim.paper}" for name, claim in CLAIMS.items()))


if __name__ == "__main__":
    main()
