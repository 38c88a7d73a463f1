"""What the tests share: paths, one thread, a really rendered set, and a writer of small synthetic ones."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algos"), str(ROOT / "data")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # of child processes
torch.set_num_threads(1)

from store import DatasetWriter  # noqa: E402

import common  # noqa: E402


def run_python(*words, **kwargs) -> subprocess.CompletedProcess:
    """python <words> in the repository root; stdout and stderr as text. Does not raise for a status other than 0."""
    command = [sys.executable, *map(str, words)]
    kwargs = {"cwd": ROOT, "env": ENVIRONMENT, "timeout": 300} | kwargs
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def run_main(module, words, methods=("update",), crash=None, update=None):
    """`python algos/<module>.py <words>`, in this process. Returns the SystemExit, UserError or KeyboardInterrupt that
    ended it, else None.

    crash=n: it dies before the n-th call of one of Agent's `methods`. update(original, n, agent, *args) takes their
    place."""
    handlers, count = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}, 0

    def counted(original):
        def method(self, *args):
            nonlocal count
            count += 1
            if count == crash:
                raise KeyboardInterrupt
            return update(original, count, self, *args) if update else original(self, *args)

        return method

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "excepthook", sys.excepthook)  # parse_args replaces it
        patch.setattr(sys, "argv", [str(word) for word in (module.__file__, *words)])
        patch.setattr(sys.modules["__main__"], "__file__", module.__file__, raising=False)
        for name in methods:
            patch.setattr(module.Agent, name, counted(getattr(module.Agent, name)))
        try:
            module.main(common.parse_args(module.Args, module.TUNED, module.QUICK))
        except (SystemExit, common.UserError, KeyboardInterrupt) as error:
            error.__context__ = None
            return error.with_traceback(None)  # frames, also those of a cause, would hold the run's lock
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            gc.collect()


@pytest.fixture(autouse=True)
def users_backend():
    """Environments set MUJOCO_GL (off without frames, else the backend they found); undone after each test."""
    yield
    os.environ.pop("MUJOCO_GL", None)
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name == "MUJOCO_GL"})


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory) -> Path:
    """walker-walk random, 84 px, two episodes, made by the command line. Its data dir is tiny_set.parents[2]."""
    data_dir = tmp_path_factory.mktemp("datasets")
    flags = ["--task", "walker-walk", "--dataset", "random", "--transitions", 1000, "--size", 84]
    result = run_python("data/collect.py", *flags, "--data-dir", data_dir)
    assert result.returncode == 0, result.stderr
    return data_dir / "made" / "walker-walk" / "random-84px-1000"


def synthetic_episode(first_row: int, length: int, size: int, action_dim: int, rng: np.random.Generator) -> tuple:
    """frames (T+1, S, S, 3), actions (T, A), rewards (T,). Red and green of a frame spell its global row
    (row % 256, row // 256), blue is noise, the same in no two frames and asymmetric."""
    frames = np.empty((length + 1, size, size, 3), np.uint8)
    rows = first_row + np.arange(length + 1)
    frames[..., 0], frames[..., 1] = (rows % 256)[:, None, None], (rows // 256)[:, None, None]
    frames[..., 2] = rng.integers(0, 256, frames.shape[:-1], np.uint8)
    return frames, rng.uniform(-1, 1, (length, action_dim)).astype(np.float32), rng.uniform(0, 2, length)


def write_set(path, lengths=(7, 5), size=12, action_dim=2, terminal_last=False, seed=0) -> Path:
    """A set of episodes of lengths[i] steps (lengths[i] + 1 rows) of synthetic_episode. The last one ends in a
    terminal where terminal_last; the others end by their time limit."""
    rng, row = np.random.default_rng(seed), 0
    with DatasetWriter(path, size, action_dim) as writer:
        for i, length in enumerate(lengths):
            terminal = terminal_last and i == len(lengths) - 1
            writer.add(*synthetic_episode(row, length, size, action_dim, rng), terminal=terminal)
            row += length + 1
    return Path(path)
