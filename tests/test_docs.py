"""What the pages promise: their commands parse, the flags they name exist, their links lead somewhere, and the commands
of docs/your_own_idea.md run."""

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

sys.path.append(str(ROOT / "benchmarks"))
PAGES = ["README.md", "CONTRIBUTING.md", "data/README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*"))]
SCRIPTS = {path.name: path for folder in ("algos", "data", "benchmarks", ".") for path in (ROOT / folder).glob("*.py")}
SCRIPTS |= {"benchmark.sh": ROOT / "benchmarks" / "run_all.py", "my_idea.py": ROOT / "algos" / "drq_bc.py"}
PLACEHOLDERS = {"N": "1", "TASK": "walker-walk", "SET": "expert"}
FOREIGN = {
    "--check",
    "--index-url",
    "--help",
    "--partition",
    "--gres",
    "--time",
    "--cpus-per-task",
}  # ruff's, pip's ...
EACH = pytest.mark.parametrize("page", PAGES)


def commands(text: str) -> list[list[str]]:
    """Words of every line or inline code that calls a script of ours with a flag, comments and `python` left out."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    candidates = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    candidates += [candidate.replace("\n", " ") for candidate in inline]
    found = [
        shlex.split(candidate, comments=True) for candidate in candidates if re.search(r"\.(py|sh) .*-", candidate)
    ]
    found = [words[1:] if words[0] == "python" else words for words in found]
    return [words for words in found if Path(words[0]).name in SCRIPTS]


def module_of(script: Path):
    return importlib.import_module(script.stem)


def problem_of(words: list[str], capsys) -> str:
    """What the script's parser says to a command; empty if it takes it."""
    script, words = SCRIPTS[Path(words[0]).name], [PLACEHOLDERS.get(word, word) for word in words[1:]]
    words = words[: words.index("--")] if "--" in words else words  # what follows is for another script
    try:
        if script.stem == "vd4rl":
            module_of(script).main([words[0], "--help"])
        else:
            config = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalRequiredArgs)
            tyro.cli(module_of(script).Args, args=words, config=config)
    except SystemExit as error:  # status 0: --help
        return capsys.readouterr().err if error.code else ""
    return ""


def flags_of(text: str) -> set[str]:
    """Flags that code names: in a block or inline."""
    code = re.findall(r"^```\n.*?^```|`[^`\n]+`", text, re.M | re.S)
    return {flag.replace("_", "-") for part in code for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", part)}


def known_flags() -> set[str]:
    found = set(FOREIGN)
    for module in (module_of(script) for script in SCRIPTS.values() if script.name != "slurm.py"):
        if hasattr(module, "Args"):
            found |= {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(module.Args)}
    return found


def dead_links(page: Path, text: str) -> list[str]:
    links = re.findall(r'(?:\]\(|src=")([^)#"]+)', text)
    return [link for link in links if "://" not in link and not page.parent.joinpath(link).exists()]


@EACH
def test_every_command_parses(page, capsys):
    for words in commands((ROOT / page).read_text()):
        assert Path(words[0]).name == words[0] or "my_idea" in words[0] or (ROOT / words[0]).is_file(), words
        assert problem_of(words, capsys) == "", words


@EACH
def test_flags_that_a_page_names_exist(page):
    assert flags_of((ROOT / page).read_text()) - known_flags() == set()


@EACH
def test_links_lead_somewhere(page):
    assert dead_links(ROOT / page, (ROOT / page).read_text()) == []


def test_what_is_wrong_is_found(capsys):
    text = "```\npython algos/bc.py --lr much  # high\n./benchmark.sh --sedes 3\n```\nand `cql.py --quik`, [x](gone.md)"
    found = commands(text)
    assert [words[0] for words in found] == ["algos/bc.py", "./benchmark.sh", "cql.py"]
    assert all(problem_of(words, capsys) for words in found)
    assert flags_of(text) - known_flags() == {"--sedes", "--quik"}
    assert dead_links(ROOT / "README.md", text) == ["gone.md"]


@pytest.mark.slow
def test_the_commands_from_a_copied_file_to_the_comparison(tmp_path):
    """As they stand on the page, in a copy of the repository whose --quick runs are tiny."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).exists(), listed.splitlines()):
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
    outputs = {}
    for command in [line for block in blocks for line in block.splitlines()]:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, text=True, timeout=600, capture_output=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        outputs[command] = done.stdout
    (changed,) = (output for command, output in outputs.items() if command.startswith("diff"))
    assert len(re.findall("^> ", changed, re.M)) == 2 and "F.l1_loss" in changed  # the first line, and the loss
    assert len(list((tmp_path / "runs" / "quick").rglob("finished.json"))) == 12
    compared = outputs["python report.py --compare drq_bc my_idea"]
    assert len(re.findall(r"^walker-walk .*\(3\).*\(3\)", compared, re.M)) == 4  # two sets, last score and late mean
    assert (tmp_path / "report" / "index.html").exists()
