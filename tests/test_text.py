"""The text itself: banners, budgets, width, unused imports, and the README's commands."""
import ast
import re
import shlex
from pathlib import Path

import pytest

import common

ROOT = Path(common.__file__).parent
SCRIPTS = [p for p in ("cm", "direct_cm", "multistep_cm", "sct", "scm") if (ROOT / f"{p}.py").exists()]
BUDGET = dict(cm=432, multistep_cm=415, sct=371, scm=365, direct_cm=502, common=1827, eval=512)
BANNERS = ["imports", "Config", "PRESETS", "process: times and noise", "consistency function f", "loss", "sampler",
           "train", "main"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_banners(script):
    assert re.findall(r"^# -{20,} (.*)$", (ROOT / f"{script}.py").read_text(), re.M) == BANNERS


@pytest.mark.parametrize("name", [n for n in BUDGET if (ROOT / f"{n}.py").exists()])
def test_budgets(name):
    text = (ROOT / f"{name}.py").read_text()
    assert len(text.splitlines()) <= BUDGET[name]
    assert max(map(len, text.splitlines())) <= 110
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]), ids=lambda p: p.name)
def test_no_unused_imports(path):
    tree = ast.parse(path.read_text())
    names = {(a.asname or a.name).split(".")[0] for node in ast.walk(tree)
             if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert names <= used, names - used


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help(script, capsys):
    module = __import__(script)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--tangent" in text or script != "scm"
    assert all(mode in text for mode in module.LOSSES)


def train_block(script):
    """The text of train() without its lines of the method."""
    text = (ROOT / f"{script}.py").read_text()
    block = text[text.index("def train(cfg):"):].split("\n# ---")[0]
    return [line for line in block.splitlines() if "# <- method" not in line]


@pytest.mark.parametrize("script", SCRIPTS)
def test_train_is_the_same_text(script):
    assert train_block(script) == train_block("scm")


def shared_config(script):
    text = (ROOT / f"{script}.py").read_text()
    block = text[text.index("class Config:"):text.index("    # --- method")]
    return re.sub(r'mode: str = "\w+"', "mode: str", block)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shared_config_is_the_same_text(script):
    assert shared_config(script) == shared_config("scm")


def test_top_level():
    names = {p.name for p in ROOT.iterdir() if p.name[0] not in "._" and p.name not in ("out", "data")}
    assert names <= {"README.md", "requirements.txt", "tests", "common.py", "eval.py",
                     *(f"{s}.py" for s in ("cm", "direct_cm", "multistep_cm", "sct", "scm"))}


def readme_commands():
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(python|torchrun .*) ?\w+\.py", line)]


def test_readme_commands_run(folder, monkeypatch):
    """Every training and sampling command of the README, in order, cut to two steps and small networks."""
    commands = readme_commands()
    assert len(commands) >= 5
    for line in commands:
        picture = str(folder / "a" / "0.png")
        for name, file in (("PATH", str(folder)), ("IMAGE.png", picture), ("MASK.png", picture)):
            line = line.replace(name, file)
        words = shlex.split(line)
        script = next(w for w in words if w.endswith(".py"))
        if words[0] == "torchrun" or {"cifar10", "latents", "--help", "--prompt", "--toy"} & set(words):
            continue  # these have tests of their own, or need what is not here
        flags = words[words.index(script) + 1:]
        if script == "eval.py":
            flags = ["pixels" if w == "FEATURES.pt" else w for w in flags] + ["--samples", "20"]
        elif not {"--sample", "--edit", "--search", "--resume"} & set(flags):
            cut = dict(steps=2, batch=8, channels=8, blocks=1, image_size=8, seed=0, overwrite="true")
            names = [f"--{k}" for k in cut]
            flags = [w for i, w in enumerate(flags) if w not in names and (not i or flags[i - 1] not in names)]
            flags += [w for k, v in cut.items() for w in (f"--{k}", str(v)) if k != "channels" or "--teacher" not in flags]
        __import__(Path(script).stem).main(flags)


def test_readme_links_lead_to_what_they_name():
    """[`name`](file.py#L12): line 12 of file.py defines name."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 30
    for name, file, line in links:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"def {name}\(|{name} = ", text), (name, file, line)
