"""What the pages promise: their commands name real scripts and flags, their links and line counts hold."""

import functools
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, run_python

PAGES = ["README.md", "data/README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SCRIPTS = {path.name: path for folder in ("algos", "data", "benchmarks", ".") for path in (ROOT / folder).glob("*.py")}


def commands(page: str) -> list[list[str]]:
    """Words of every line or inline code of a page that calls a script of ours, comments and `python` left out."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    candidates = [line for block in blocks for line in re.split(r"\n|&&", block)]
    candidates += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = [shlex.split(candidate, comments=True) for candidate in candidates if ".py " in candidate]
    found = [words[1:] if words[0] == "python" else words for words in found]
    return [words for words in found if words[0].endswith(".py")]


@functools.cache
def help_of(script: Path, *subcommand: str) -> str:
    result = run_python(script, *subcommand, "--help")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("page", PAGES)
def test_every_command_names_a_script_and_flags_that_exist(page):
    assert len(commands(page)) >= 2
    for words in commands(page):
        called = words[0].replace("my_idea", "drq_bc")  # a copy that the reader makes
        script = SCRIPTS[Path(called).name]
        assert called == script.name or (ROOT / called).is_file(), words
        subcommand = words[1:2] if script.name == "vd4rl.py" else []
        known = set(re.findall(r"--[a-z0-9-]+", help_of(script, *subcommand)))
        typed = {word.split("=")[0] for word in words if word.startswith("--")}
        assert typed <= known | {"--help"}, words


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
    assert len(links) >= 1
    assert [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()] == []


def test_line_counts():
    counts = re.findall(r"\[(algos/\w+\.py)\].*\| (\d+) \|$", (ROOT / "README.md").read_text(), re.M)
    ours = [path for path in (ROOT / "algos").glob("*.py") if "Based on:" not in path.read_text()]
    assert {name for name, _ in counts} == {f"algos/{path.name}" for path in ours}
    for name, count in counts:
        assert len((ROOT / name).read_text().splitlines()) == int(count), name
