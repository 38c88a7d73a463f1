"""The commands of docs/your_own_idea.md, typed one after another."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_walk_throughs_link_and_paste_no_code(page):
    text = page.read_text()
    assert re.search(r"\[`[\w.]+`\]\(\.\./algos/\w+\.py#L\d+", text)
    assert not re.search(r"^\s*(def |class |import |self\.|return )", text, re.M)


@pytest.mark.slow
def test_the_commands_from_a_copied_file_to_the_comparison(tmp_path):
    """As they stand on the page, in a copy of the repository whose --quick runs are tiny."""
    for name in ("algos", "benchmarks", "data", "tests", "results", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("common.py", "report.py", "benchmark.sh", "pytest.ini", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    tiny = '{"transitions": 1000, "batch_size": 8, "steps": 4, "eval_every": 4, "eval_episodes": 1}'
    for file in (tmp_path / "algos").glob("*.py"):
        file.write_text(re.sub(r"^QUICK = \{[^}]*\}", f"QUICK = {tiny}", file.read_text(), flags=re.M))
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / "your_own_idea.md").read_text(), re.M | re.S)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 8 and commands[5].startswith("./benchmark.sh")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"} | {"PATH": path}
    outputs = {}
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, text=True, timeout=600,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        outputs[command] = done.stdout
    idea = (tmp_path / "algos" / "my_idea.py").read_text()
    assert "bc_loss = F.l1_loss(" in idea and idea.startswith('"""Based on: drq_bc.')
    changed = [line for line in outputs[commands[3]].splitlines() if line.startswith(">")]
    assert len(changed) == 2 and "F.l1_loss" in changed[1]  # the first line, and the loss
    assert "11 runs, 2 at a time; 1 finished before" in outputs[commands[5]]
    compared = outputs["python report.py --compare drq_bc my_idea"]
    assert len(re.findall(r"walker-walk med\w+-84px-1000 made 4 steps quick.*\(3\).*\(3\)   [+-]", compared)) == 4
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
    """Its tables: the end of the offline phase, the last five evaluations and their mean, of each seed; ablations."""
    lines = (ROOT / "docs" / "moto.md").read_text().splitlines()
    demos, first = "metaworld-drawer-open/*/", lines.index("| seed | offline | online | mean online |") + 2
    seeds = [int(line.split()[1]) for line in lines[first : lines.index("", first)]]
    assert seeds[:2] == [1, 2]
    for seed in seeds:
        rows = evaluations(f"{demos}seed{seed}")
        (end,) = [row for row in rows if row["step"] == 1_000]
        assert seed > 2 or sum(row["score"] for row in rows[-5:]) / 5 > end["score"]
        assert f"| {seed} | {cell(end)} | {', '.join(map(cell, rows[-5:]))} | {cell(*rows[-5:])} |" in lines
        late = {row["step"] for row in rows[-5:]}
        rows = evaluations(f"{demos}longer-seed{seed}")  # 2,000 offline updates, up to 1,000 the same run
        (end,) = [row for row in rows if row["step"] == 2_000]
        offline = cell(*[row for row in rows if row["step"] in late])
        online = ", ".join(map(cell, rows[-5:]))
        assert f"| {seed} | {offline} | {cell(end)} | {online} | {cell(*rows[-5:])} |" in lines
    ablations = {"": "seed1", "`--penalty none`": "no-penalty-seed1", "`--bc-filter none`": "no-imitation-seed1",
                 "`--penalty none --bc-filter none`": "neither-seed1",
                 "`--penalty none --bc-filter none --value dreamer`": "dreamer-seed1"}  # fmt: skip
    for flags, name in ablations.items():
        before, after = (row for row in evaluations(demos + name) if row["step"] in (1_000, 1_200))
        assert " ".join(f"| {flags} | {cell(before)} | {cell(after)} |".split()) in lines
    for seed in (1, 2):
        rows = [row for row in evaluations(f"walker-walk/*/seed{seed}") if row["step"] > 600]
        assert rows[-1]["score"] > 14.81 and rows[-2]["score"] > 14.81  # the set's mean
        assert " | ".join([f"| {seed}", *(f"{row['score']:.1f}" for row in rows)]) + " |" in lines
