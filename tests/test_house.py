"""The text itself: the scripts have one shape, imports go downwards, kit knows no method, a copy of a script
is a script, and the README's commands and links are true."""
import kit
from conftest import ROOT, SCRIPTS

import ast
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BANNERS = ["imports", "Config", "PRESETS", "process: times and noise", "consistency function f", "loss",
           "sampler", "train", "extras", "main"]
# Of kit. Each imports those to its right.
FLOORS = ["reference", "report", "metrics", "features", "run", "config", "teachers", "edm", "text", "data",
          "store", "toys", "networks", "layers", "attention", "process", "common"]
MODES = {mode for script in SCRIPTS.values() for mode in script.LOSSES} - {"diffusion"}


def check_banners(root, script):
    found = re.findall(r"^# -{20,} (.*)$", (root / f"{script}.py").read_text(), re.M)
    assert found in (BANNERS, [name for name in BANNERS if name != "extras"])


def skeleton(root, script, name):
    """The lines of a function that are not tagged as the method's."""
    text = (root / f"{script}.py").read_text()
    found, = (node for node in ast.parse(text).body if getattr(node, "name", "") == name)
    lines = text.splitlines()[found.lineno - 1:found.end_lineno]
    return [line for line in lines if "# <- method" not in line]


def imports(path):
    """Names of the modules that a file imports, also inside of functions; kit's own without "kit."."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by a relative name"
            inside = {alias.name for alias in node.names} if node.module == "kit" else set()
            names |= {node.module} | inside
    return {name.removeprefix("kit.") for name in names}


def check_imports(root):
    for i, name in enumerate(FLOORS[:-1]):
        above = imports(root / "kit" / f"{name}.py") & {"kit", "eval", *SCRIPTS, *FLOORS[:i + 1]}
        assert not above, f"kit/{name}.py imports {above}"
    for script in SCRIPTS:
        others = imports(root / f"{script}.py") & {"eval", *SCRIPTS}
        assert not others, f"{script}.py imports {others}"
    assert {name.split(".")[0] for name in imports(root / "common.py")} <= {"torch", "numpy", "math"}


def check_kit(root):
    for path in [root / "kit" / f"{name}.py" for name in ("__init__", *FLOORS[:-1])]:
        text = path.read_text()
        named = re.findall(rf"\b({'|'.join(SCRIPTS)})\b", text)
        quoted = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)} & MODES
        assert not named and not quoted, (path, named, quoted)


@pytest.mark.parametrize("script", SCRIPTS)
def test_banners(script):
    """The same banners in the same order; `extras` only where there is something beside method and
    skeleton."""
    check_banners(ROOT, script)


@pytest.mark.parametrize("name", ["train", "main"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_train_and_main_are_the_same_text(script, name):
    """But for the lines of the method, each is one text in five files."""
    assert skeleton(ROOT, script, name) == skeleton(ROOT, "scm", name)


def test_imports_go_downwards():
    """A file of kit imports files below it, a script no other script, and common.py nothing of ours."""
    check_imports(ROOT)


def test_kit_knows_no_method():
    """No file of kit names a script, nor quotes a method's mode."""
    check_kit(ROOT)


REST = """
import kit, mine, eval
kit.toys.EXACT_STEPS = 32
mine.main("--sample 4 --out out/mine".split())
mine.main("--resume --steps 6 --out out/mine".split())
eval.main("out/mine --nfe 1 --samples 50".split())
"""


def test_a_copy_of_a_script_is_a_script():
    """`cp scm.py mine.py` and one more line in it: it trains, samples, resumes, and eval.py knows it. The
    same line in scm.py itself leaves all checks of this file green."""
    root = Path("copy").absolute()
    root.mkdir()
    for file in ("common.py", "eval.py", *(f"{script}.py" for script in SCRIPTS)):
        shutil.copy(ROOT / file, root)
    shutil.copytree(ROOT / "kit", root / "kit", ignore=shutil.ignore_patterns("__pycache__"))
    text, line = (root / "scm.py").read_text(), "    mse = error.square().flatten(1).mean(1)\n"
    assert text.count(line) == 1
    for file in ("mine.py", "scm.py"):
        more = line + "    mse = mse + error.abs().flatten(1).mean(1)\n"
        (root / file).write_text(text.replace(line, more))
    flags = "--steps 4 --batch 32 --channels 16 --blocks 1 --lr_cooldown 0 --save_every 2".split()
    for command in (["mine.py", *flags], ["-c", REST]):
        done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True)
        assert not done.returncode, done.stderr[-2000:]
    assert (root / "out/mine/samples.png").exists()
    row, = json.loads((root / "out/mine/eval.json").read_text())
    assert row["method"] == "mine" and row["samples_seen"] == 6 * 32
    for script in SCRIPTS:
        check_banners(root, script)
        for name in ("train", "main"):
            assert skeleton(root, script, name) == skeleton(root, "scm", name)
    check_imports(root)
    check_kit(root)


def readme_commands():
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = [part.split("#")[0].strip() for b in blocks for line in b.replace("\\\n", " ").splitlines()
             for part in line.split("&&")]
    return [line for line in lines if re.match(r"(python|torchrun .*) ?\w+\.py", line)]


def test_readme_commands_run(folder):
    """Every training and sampling command of the README, in order, cut to two steps and small networks; and
    the code that loads what one of them has exported."""
    commands = readme_commands()
    assert len(commands) >= 5
    cut = dict(steps=2, batch=8, channels=8, blocks=1, image_size=8, seed=0, overwrite="true")
    for line in commands:
        picture = str(folder / "a" / "0.png")
        for name, file in (("PATH", str(folder)), ("IMAGE.png", picture), ("MASK.png", picture)):
            line = line.replace(name, file)
        words = shlex.split(line)
        script = next(w for w in words if w.endswith(".py"))
        if words[0] == "torchrun" or {"cifar10", "--help", "--prompt"} & set(words):
            continue  # these have tests of their own, or need what is not here
        flags = words[words.index(script) + 1:]
        if script == "eval.py":
            flags = ["pixels" if w == "FEATURES.pt" else w for w in flags] + ["--samples", "20"]
        elif not {"--sample", "--edit", "--search", "--resume", "--export"} & set(flags):
            names = [f"--{k}" for k in cut]
            flags = [w for before, w in zip(["", *flags], flags) if not {w, before} & set(names)]
            flags += [w for k, v in cut.items() for w in (f"--{k}", str(v))
                      if k != "channels" or "--teacher" not in flags]
        __import__(Path(script).stem).main(flags)
    code, = re.findall(r"^ {4}import json.*", inspect.getdoc(kit.export), re.M | re.S)
    names = {}
    exec(textwrap.dedent(code), names)  # our own docstring, on what the README's command has exported
    assert names["x_0"].shape == (1000, 2) and names["x_0"].isfinite().all()


def test_the_readmes_method_learns():
    """The code that is sCM whole, cut to a fifth: its samples are three times nearer to the data than
    noise."""
    text = (ROOT / "README.md").read_text()
    code, = re.findall(r"^```python\n(import torch\nimport common.*?)^```", text, re.M | re.S)
    names = {}
    exec(code.replace("range(3000)", "range(600)"), names)  # our own README
    fresh, _ = names["data"].batch(names["common"].Draw(1, 0, 0, 1000))
    far, near = (names["kit"].distance(x.detach(), fresh) for x in (0.5 * names["noise"], names["samples"]))
    assert names["step"] == 599 and near < far / 3


def test_readme_links_lead_to_what_they_name():
    """[`file.py: name`](file.py): the file defines that name at its top level."""
    links = re.findall(r"\[`([\w/]+\.py): (\w+)`\]\(([\w/]+\.py)\)", (ROOT / "README.md").read_text())
    assert links
    for said, name, file in links:
        defined = re.search(rf"^(def {name}\(|class {name}\b|{name} = )", (ROOT / file).read_text(), re.M)
        assert said == file and defined, (said, name, file)
