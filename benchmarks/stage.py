"""Copies a standard set to a disk of this machine, then becomes the run that reads it. benchmark.sh --stage-dir starts
this; DIR may name variables, which are looked up here.

    python benchmarks/stage.py datasets/made/walker-walk/medium-84px '$TMPDIR' algos/bc.py --task walker-walk ...
"""

import os
import shutil
import sys
from pathlib import Path

import filelock


def stage(folder: Path, to: Path) -> None:
    """Copies the set to `to`/<source>/<task>/, whole or not at all. An equal copy stays."""
    target = to / folder.parent.parent.name / folder.parent.name / folder.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / f".{target.name}.lock"):  # other runs of this machine may copy it
        if target.exists():
            old = target / "meta.json"
            if old.exists() and old.read_bytes() == (folder / "meta.json").read_bytes():
                return
            if not (target / ".staged").exists():
                raise OSError(f"{target} is another set, and no copy that was made by this; stage elsewhere")
        partial = target.with_name(f"{target.name}.partial")
        for leftover in (partial, target):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(folder, partial, ignore=shutil.ignore_patterns(".lock"))
        (partial / ".staged").touch()
        partial.replace(target)


if __name__ == "__main__":
    to = os.path.abspath(os.path.expandvars(sys.argv[2]))
    if "$" in to:
        sys.exit(f"error: --stage-dir {sys.argv[2]}: it names a variable that is not set here")
    try:
        stage(Path(sys.argv[1]), Path(to))
    except OSError as error:
        sys.exit(f"error: --stage-dir {sys.argv[2]}: {error}")
    os.execv(sys.executable, [sys.executable, *sys.argv[3:], "--data-dir", to])
