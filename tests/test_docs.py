"""What the pages promise: their commands parse, their links lead somewhere, flags in their text exist, and numbers are
those of the curves; the commands of docs/your_own_idea.md run."""

import csv
import dataclasses
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from conftest import ENVIRONMENT, ROOT

PAGES = ["README.md", "CONTRIBUTING.md", "data/README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*"))]
SCRIPTS = {path.name: path for folder in ("algos", "data", "benchmarks", ".") for path in (ROOT / folder).glob("*.py")}
SCRIPTS |= {"benchmark.sh": ROOT / "benchmarks" / "run_all.py", "my_idea.py": ROOT / "algos" / "drq_bc.py"}
OTHERS = {
    "--docs",
    "--upright",
    "--guided",
    "--cpus-per-task",
    "--gres",
    "--no-install-recommends",
}  # not of our scripts


def module_of(script: Path):
    """In the package `benchmarks` or by its file's name: the folders are on the path."""
    return importlib.import_module(f"benchmarks.{script.stem}" if script.parent.name == "benchmarks" else script.stem)


def commands(text: str) -> list[list[str]]:
    """Words of every line or inline code that calls a script of ours, comments and `python` left out."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    candidates = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    candidates += [candidate.replace("\n", " ") for candidate in inline]
    found = [shlex.split(candidate, comments=True) for candidate in candidates if re.search(r"\.(py|sh) -", candidate)]
    found = [words[1:] if words[0] == "python" else words for words in found]
    return [words for words in found if Path(words[0]).name in SCRIPTS]


def problem_of(words: list[str], capsys) -> str:
    """What the script's parser says to a command; empty if it takes it."""
    script, words = (
        SCRIPTS[Path(words[0]).name],
        [word.replace("N", "1") if word == "N" else word for word in words[1:]],
    )
    try:
        if script.stem == "run_all":
            words = [word for word in words if word != "--help"]
            module_of(script).parse(words)
        elif script.stem == "vd4rl":
            module_of(script).main([words[0], "--help"])
        elif words != ["--help"]:
            config = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalRequiredArgs)
            tyro.cli(module_of(script).Args, args=words, config=config)
    except SystemExit as error:
        return capsys.readouterr().err if error.code else ""
    return ""


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page, capsys):
    for words in commands((ROOT / page).read_text()):
        assert Path(words[0]).name == words[0] or "my_idea" in words[0] or (ROOT / words[0]).is_file(), words
        assert problem_of(words, capsys) == "", words


def flags_of(text: str) -> set[str]:
    return {flag.replace("_", "-") for flag in re.findall(r"`[^`\n]*?(--[a-z][a-z0-9_-]+)", text)}


def known_flags() -> set[str]:
    found = set(OTHERS)
    for script in SCRIPTS.values():
        if hasattr(module := module_of(script), "Args"):
            found |= {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(module.Args)}
        found |= set(re.findall(r"--[a-z0-9-]+", module.__doc__ or ""))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_a_page_names_exist(page):
    assert flags_of((ROOT / page).read_text()) <= known_flags()


def dead_links(page: Path, text: str) -> list[str]:
    links = re.findall(r'(?:\]\(|src=")([^)#"]+)', text)
    return [link for link in links if "://" not in link and not page.parent.joinpath(link).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert dead_links(ROOT / page, (ROOT / page).read_text()) == []


def test_what_is_wrong_is_found(capsys):
    text = "```\npython algos/bc.py --lr much  # a comment\n./benchmark.sh --sedes 3\n```\nand `cql.py --quik`, [x](gone.md)"
    found = commands(text)
    assert [words[0] for words in found] == ["algos/bc.py", "./benchmark.sh", "cql.py"]
    assert all(problem_of(words, capsys) for words in found)
    assert not flags_of(text) <= known_flags() and dead_links(ROOT / "README.md", text) == ["gone.md"]


@pytest.mark.slow
def test_the_commands_from_a_copied_file_to_the_comparison(tmp_path):
    """As they stand on the page, in a copy of the repository whose --quick runs are tiny."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    tiny = '{("*", "*"): {"transitions": 1000, "batch_size": 8, "steps": 4, "eval_every": 4, "eval_episodes": 1}}'
    file = tmp_path / "algos" / "drq_bc.py"
    text, count = re.subn(r"^QUICK = .*$", f"QUICK = {tiny}", file.read_text(), flags=re.M)
    file.write_text(text)
    assert count == 1
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / "your_own_idea.md").read_text(), re.M | re.S)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"} | {"PATH": path}
    kwargs = {"shell": True, "cwd": tmp_path, "env": env, "text": True, "timeout": 600, "stderr": subprocess.STDOUT}
    outputs = {}
    for command in [line for block in blocks for line in block.splitlines()]:
        done = subprocess.run(command, stdout=subprocess.PIPE, **kwargs)
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        outputs[command] = done.stdout
    (changed,) = (output for command, output in outputs.items() if command.startswith("diff"))
    assert len(re.findall("^> ", changed, re.M)) == 2 and "F.l1_loss" in changed  # the first line, and the loss
    assert len(list((tmp_path / "runs/quick").rglob("finished.json"))) == 12
    compared = outputs["python report.py --compare drq_bc my_idea"]
    assert len(re.findall(r"^walker-walk .*\(3\).*\(3\)", compared, re.M)) >= 2
    assert (tmp_path / "report" / "index.html").exists()


def evaluations(name: str) -> list[dict]:
    (path,) = (ROOT / "results/curves/quick/moto").glob(f"{name}.csv")
    with path.open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def cell(*rows: dict) -> str:
    """Mean return and success of some evaluations, as the page has them."""
    score, success = (sum(row[name] for row in rows) / len(rows) for name in ("score", "success"))
    return f"{score:.1f} ({success:.0f} %)"


def test_the_curves_that_the_page_of_moto_speaks_of():
    """Its tables of drawer-open: the end of the offline phase, the last five evaluations and their mean; ablations."""
    lines, demos = (ROOT / "docs" / "moto.md").read_text().splitlines(), "metaworld-drawer-open/*/"
    for seed in (1, 2, 3):
        rows = evaluations(f"{demos}seed{seed}")
        (end,) = (row for row in rows if row["step"] == 1_000)
        assert f"| {seed} | {cell(end)} | {', '.join(map(cell, rows[-5:]))} | {cell(*rows[-5:])} |" in lines
        late = {row["step"] for row in rows[-5:]}
        rows = evaluations(f"{demos}longer-seed{seed}")  # 2,000 offline updates, up to 1,000 the same run
        (end,) = (row for row in rows if row["step"] == 2_000)
        offline = cell(*[row for row in rows if row["step"] in late])
        online = ", ".join(map(cell, rows[-5:]))
        assert f"| {seed} | {offline} | {cell(end)} | {online} | {cell(*rows[-5:])} |" in lines
    for name in ("seed1", "no-penalty-seed1", "no-imitation-seed1", "neither-seed1", "dreamer-seed1"):
        before, after = (row for row in evaluations(demos + name) if row["step"] in (1_000, 1_200))
        assert any(line.endswith(f"| {cell(before)} | {cell(after)} |") for line in lines)
