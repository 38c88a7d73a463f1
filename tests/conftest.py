"""What the tests share: paths, one thread, small sets, an environment of four steps, and main() in this process."""

import functools
import gc
import os
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
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

gc.freeze()  # what is imported is never garbage: collections take milliseconds


def run_python(*words, **kwargs) -> subprocess.CompletedProcess:
    """python <words> in the repository root; stdout and stderr as text. Does not raise for a status other than 0."""
    command = [sys.executable, *map(str, words)]
    kwargs = {"cwd": ROOT, "env": ENVIRONMENT, "timeout": 300} | kwargs
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


# ---- main() in this process ----


@functools.cache
def machine(provenance, device: str) -> dict:
    """What common.provenance says, asked once: it reads the metadata of all packages."""
    return provenance(device)


UPDATES = ("update", "update_model", "update_agent")  # methods of an Agent that make one gradient update


def run_main(module, words, methods=UPDATES, crash=None, update=None, pool=None):
    """`python algos/<module>.py <words>`, in this process. Returns the SystemExit, UserError, OSError or
    KeyboardInterrupt that ended it, else None.

    crash=n: it dies before the n-th call of one of Agent's `methods`. update(original, n, agent, *args) takes their
    place; pool that of common.EnvPool."""
    handlers, count = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}, 0

    def counted(original):
        def method(self, *args):
            nonlocal count
            count += 1
            if count == crash:
                raise KeyboardInterrupt
            return update(original, count, self, *args) if update else original(self, *args)

        return method

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in (module.__file__, *words)])
        patch.setattr(sys.modules["__main__"], "__file__", module.__file__, raising=False)
        known = functools.partial(machine, common.provenance)
        patch.setattr(common, "provenance", lambda device: known(device) | {"command": shlex.join(sys.argv)})
        patch.setattr(common, "EnvPool", pool or common.EnvPool)
        for name in methods:
            if hasattr(module.Agent, name):
                patch.setattr(module.Agent, name, counted(getattr(module.Agent, name)))
        try:
            module.main(common.parse_args(module.Args, module.TUNED, module.QUICK))
        except (SystemExit, common.UserError, OSError, KeyboardInterrupt) as error:
            error.__context__ = None
            return error.with_traceback(None)  # frames, also those of a cause, would hold the run's lock
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            gc.collect()


# ---- environments ----


class FourSteps(common.Env):
    """An environment without a simulator: episodes of four steps and two action dimensions. Frames and states are a
    function of the seed and of all actions, the reward of the last action's first dimension; above 1 it is terminal."""

    spec = {"action_dim": 2, "action_repeat": 2, "return_per_score": 10, "episode_steps": 4}

    def __init__(self, size: int, frame_stack: int):
        self.simulator, self.renderer, self.size, self.frame_stack = self, True, size, frame_stack

    def reset(self, seed: int, look=None):
        self.history = [np.random.default_rng(seed).uniform(-1, 1, 2)]
        self.frames = [self.frame()] * self.frame_stack
        return np.concatenate(self.frames), {"state": self.state()}

    def step(self, action: np.ndarray):
        self.history.append(np.asarray(action, np.float64))
        self.frames = [*self.frames[1:], self.frame()]
        terminal, info = bool(action[0] > 1), {"state": self.state(), "success": action[1] > 0}
        timeout = len(self.history) == 5 and not terminal
        return np.concatenate(self.frames), 1.0 + action[0], terminal, timeout, info

    def state(self) -> np.ndarray:
        return np.mean(self.history, 0).astype(np.float32)

    def frame(self) -> np.ndarray:
        rng = np.random.default_rng((self.state() * 1000 + 2000).astype(int))
        return rng.integers(0, 256, (3, self.size, self.size), np.uint8)


class FourStepsPool(common.EnvPool):
    """common.EnvPool over FourSteps, without processes."""

    def __init__(self, task, size, count, frame_stack=3, render="fast", workers=None, groups=None):
        self.groups, self.looks, self.count, self.spec = (
            {"score": [None] * count},
            [None] * count,
            count,
            FourSteps.spec,
        )
        self.envs = [FourSteps(size, frame_stack) for _ in range(count)]

    def call(self, function, arguments: list) -> list:
        function = getattr(FourSteps, function.__name__)
        return [words if words is None else function(env, *words) for env, words in zip(self.envs, arguments)]


@pytest.fixture(autouse=True)
def excepthook(monkeypatch):
    """parse_args replaces it; undone after each test."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


# ---- sets ----

SHORT = 20  # steps of an episode under the next fixture


@pytest.fixture
def short(monkeypatch):
    """Collected episodes have 20 steps, a recorded physics state every 5."""
    import collect
    import train_sac

    for module in (collect, train_sac):
        monkeypatch.setattr(module, "EPISODE", SHORT)
        monkeypatch.setattr(module, "STATE_EVERY", 5)


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory) -> Path:
    """walker-walk random, 84 px, two episodes, made on the spot as for training. Its data dir: tiny_set.parents[2]."""
    words = {"task": "walker-walk", "dataset": "random", "source": "made", "transitions": 1000, "data_seed": 0}
    words |= {"distraction": "none", "bodies": False, "data_dir": str(tmp_path_factory.mktemp("datasets"))}
    return common.open_dataset(Namespace(**words), 84).path


def synthetic_episode(first_row: int, length: int, size: int, action_dim: int, rng: np.random.Generator) -> tuple:
    """frames (T+1, S, S, 3), actions (T, A), rewards (T,). Red and green of a frame spell its global row
    (row % 256, row // 256), blue is noise, the same in no two frames and asymmetric."""
    frames = np.empty((length + 1, size, size, 3), np.uint8)
    rows = first_row + np.arange(length + 1)
    frames[..., 0], frames[..., 1] = (rows % 256)[:, None, None], (rows // 256)[:, None, None]
    frames[..., 2] = rng.integers(0, 256, frames.shape[:-1], np.uint8)
    return frames, rng.uniform(-1, 1, (length, action_dim)).astype(np.float32), rng.uniform(0, 2, length)


def write_set(path, lengths=(7, 5), size=12, action_dim=2, terminal_last=False, seed=0, task="own") -> Path:
    """A set of episodes of lengths[i] steps (lengths[i] + 1 rows) of synthetic_episode. The last one ends in a
    terminal where terminal_last; the others end by their time limit."""
    rng, row = np.random.default_rng(seed), 0
    with DatasetWriter(path, size, action_dim, task=task) as writer:
        for i, length in enumerate(lengths):
            terminal = terminal_last and i == len(lengths) - 1
            writer.add(*synthetic_episode(row, length, size, action_dim, rng), terminal=terminal)
            row += length + 1
    return Path(path)
