"""benchmark.sh --slurm: one job that makes the missing sets, behind it an array with a task per run. Both are
slurm_job.sh."""

import shlex
import subprocess
import sys
from pathlib import Path

from common import UserError

HERE = Path(__file__).resolve().parent
PYTHON = shlex.quote(sys.executable)


def submit(sets: list[str], rows: list, logs: Path, at_once: int | None, text: str) -> None:
    """sets: commands that make them; rows: run_all.py's; logs: a folder for what the jobs say of themselves; at_once:
    runs at a time; text: flags for sbatch, of both jobs."""
    after, lines = [], []
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--slurm-args={text}: {error}") from None
    logs.mkdir(parents=True, exist_ok=True)
    if sets:
        job = sbatch([*words, f"--output={logs}/sets-%j.log"], [make.replace("python", PYTHON, 1) for make in sets])
        after = [f"--dependency=afterany:{job}"]  # a run whose set could not be made says why
        print(f"job {job} makes {len(sets)} sets: {logs}/sets-{job}.log")
    for row in rows:
        row.log.parent.mkdir(parents=True, exist_ok=True)
        lines.append(f"{PYTHON} {shlex.join(row.words)} >> {shlex.quote(str(row.log))} 2>&1")
    array = f"--array=1-{len(rows)}" + (f"%{at_once}" if at_once else "")
    job = sbatch([*words, array, *after, f"--output={logs}/%A_%a.log"], lines)
    print(f"array {job}: {len(rows)} runs. squeue shows them, sacct how they ended, {logs}/{job}_*.log their commands. "
          "When it is over, the same command submits what is not finished")  # fmt: skip


def sbatch(words: list[str], lines: list[str]) -> str:
    """Submits a job that runs the lines. Returns its id. Raises UserError with what Slurm says."""
    flags = ["--parsable", "--job-name=cleanpixels", "--requeue", "--open-mode=append", "--signal=B:USR1@120"]
    try:
        done = subprocess.run(["sbatch", *flags, *words, HERE / "slurm_job.sh", *lines], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("--slurm: there is no sbatch on this machine") from None
    if done.returncode:
        raise UserError(f"--slurm, {len(lines)} commands: {done.stderr.strip()}")  # MaxArraySize may be 1001
    return done.stdout.strip().split(";")[0]
