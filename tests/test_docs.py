"""What the pages promise: their commands parse, the flags they name exist, their links lead somewhere, and the commands
of docs/your_own_idea.md run."""

import csv
import dataclasses
import importlib
import os
import re
import shlex
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
FOREIGN = {"--check", "--index-url", "--help", "--partition", "--gres", "--time", "--cpus-per-task"}  # ruff's, Slurm's
EACH = pytest.mark.parametrize("page", PAGES)


def commands(text: str) -> list[list[str]]:
    """Words of every line or inline code that calls a script of ours with a flag, comments and `python` left out."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    candidates = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    candidates += [candidate.replace("\n", " ") for candidate in inline]
    ours = [shlex.split(line, comments=True) for line in candidates if re.search(r"\.(py|sh) .*-", line)]
    ours = [words[1:] if words[0] == "python" else words for words in ours]
    return [words for words in ours if Path(words[0]).name in SCRIPTS]


def problem_of(words: list[str], capsys) -> str:
    """What the script's parser says to a command; empty if it takes it."""
    script, words = SCRIPTS[Path(words[0]).name], [PLACEHOLDERS.get(word, word) for word in words[1:]]
    words = words[: words.index("--")] if "--" in words else words  # what follows is for another script
    try:
        if script.stem == "vd4rl":
            importlib.import_module(script.stem).main([words[0], "--help"])
        else:
            config = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalRequiredArgs)
            tyro.cli(importlib.import_module(script.stem).Args, args=words, config=config)
    except SystemExit as error:  # status 0: --help
        return capsys.readouterr().err if error.code else ""
    return ""


@EACH
def test_every_command_parses(page, capsys):
    for words in commands((ROOT / page).read_text()):
        assert Path(words[0]).name == words[0] or "my_idea" in words[0] or (ROOT / words[0]).is_file(), words
        assert problem_of(words, capsys) == "", words


@EACH
def test_flags_that_a_page_names_exist(page):
    """Those in a block or inline."""
    modules = [importlib.import_module(script.stem) for script in SCRIPTS.values() if script.name != "slurm.py"]
    fields = [field.name for module in modules if hasattr(module, "Args") for field in dataclasses.fields(module.Args)]
    code = "\n".join(re.findall(r"^```\n.*?^```|`[^`\n]+`", (ROOT / page).read_text(), re.M | re.S))
    named = {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", code)}
    assert named - FOREIGN - {f"--{name.replace('_', '-')}" for name in fields} == set()


@EACH
def test_links_lead_somewhere(page):
    for link in re.findall(r'(?:\]\(|src=")([^)#"]+)', (ROOT / page).read_text()):
        assert "://" in link or (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_the_commands_from_a_copied_file_to_the_comparison(tmp_path):
    """As they stand on the page, in a clean clone whose --quick runs are tiny; then benchmark.sh over all files."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    files = sorted((clone / "algos").glob("*.py"))
    for file in files:
        text, end = file.read_text(), 'if __name__ == "__main__":'
        phases = ("steps", "model_steps", "agent_steps", "offline_steps", "model_first")
        tiny = {name: 4 for name in phases if f"\n    {name}: " in text}
        tiny |= {"transitions": 1000, "batch_size": 2, "eval_every": 4, "eval_episodes": 1}
        file.write_text(text.replace(end, f'QUICK = {{("*", "*"): {tiny}}}\n{end}'))
    author = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", clone, *author, "commit", "-qam", "A shorter --quick"], check=True)
    env = {name: value for name, value in ENVIRONMENT.items() if name not in ("PYTHONPATH", "CLEANPIXELS_DATA")}
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `python` is this one
    outputs = {}

    def call(command: str) -> None:
        done = subprocess.run(command, shell=True, cwd=clone, env=env, text=True, timeout=600, capture_output=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        outputs[command] = done.stdout

    for block in re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / "your_own_idea.md").read_text(), re.M | re.S):
        for command in block.splitlines():
            call(command)
    (changed,) = (output for command, output in outputs.items() if command.startswith("diff"))
    assert len(re.findall("^> ", changed, re.M)) == 2 and "F.l1_loss" in changed  # the first line, and the loss
    compared = outputs["python report.py --compare drq_bc my_idea"]
    assert len(re.findall(r"^walker-walk .*\(3\).*\(3\)", compared, re.M)) == 4  # two sets, last score and late mean
    call(whole := "./benchmark.sh --quick --seeds 1 --jobs 2 --tasks walker-walk --datasets medexp")
    assert outputs[whole].splitlines()[-1] == f"{len(files) + 1} runs: {len(files) + 1} finished"
    with (clone / "report" / "table.csv").open() as file:
        table = [row for row in csv.DictReader(file) if re.fullmatch(r"medexp-\d\dpx-1000", row["dataset"])]
    seeds = {file.stem: "1" for file in files} | {"drq_bc": "3", "my_idea": "3"}
    assert {row["algo"]: row["seeds"] for row in table} == seeds, table
    assert (clone / "report" / "index.html").stat().st_size > 100_000
