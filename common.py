"""What no paper describes: environments that render, data on disk, runs that survive a kill.

    environments   make_env, EnvPool                                       needs mujoco, dm_control
    data           open_dataset, DatasetWriter, TransitionBuffer,          needs numpy, torch
                   SequenceBuffer, OnlineSet
    runs           parse_args, start_run, Run, accelerate                  needs torch, tyro

The algorithm files import this one and nothing else of the project; a folder that holds one of them and this file
works (for manipulation tasks also manipulation.py). Networks, losses, schedules and augmentation are not here: papers
describe them."""

import argparse
import ast
import atexit
import contextlib
import csv
import ctypes
import ctypes.util
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import importlib.metadata
import io
import json
import math
import multiprocessing
import multiprocessing.util
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
import warnings
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if not (3, 11) <= sys.version_info[:2] <= (3, 12):  # dm_control depends on labmaze, which has no wheel beyond 3.12
    sys.exit(f"CleanPixels needs Python 3.11 or 3.12; this is {platform.python_version()}")


HERE = Path(__file__).resolve().parent


class UserError(ValueError):
    """Something the user can mend. Its message is one line that names the flag or file, and the fix."""


# ==== Environments ====

RENDER_QUALITY = {  # name -> (shadow map size, stacks per geometry); None leaves the model's own
    "fast": (1024, 8),  # about 2.3x the frames per second; at most 0.3 % of pixels differ by more than 8
    "reference": None,  # pixel for pixel what dm_control's physics.render gives
}
GL_PACKAGES = "apt-get install libegl1 libopengl0 libgl1-mesa-dri (EGL), or libosmesa6 (OSMesa)"


@functools.cache
def egl_works() -> bool:
    """Whether an EGL context can be made (Mesa's software device counts). Asked in a process of its own: PyOpenGL
    keeps the first platform it has tried."""
    probe = [sys.executable, "-c", "from mujoco.egl import GLContext; GLContext(8, 8).free()"]
    return subprocess.run(probe, env=os.environ | {"MUJOCO_GL": "off"}, capture_output=True).returncode == 0


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_gl() -> str:
    """The rendering backend: $MUJOCO_GL if set, else cgl on macOS, else EGL, else OSMesa.

    Raises UserError that names the Debian packages to install where neither works."""
    backend = os.environ.get("MUJOCO_GL", "").lower()
    if backend not in ("", "off"):
        return backend
    if sys.platform == "darwin":
        return "cgl"
    if egl_works():
        return "egl"
    if ctypes.util.find_library("OSMesa"):
        return "osmesa"
    raise UserError(f"no off-screen rendering: neither EGL nor OSMesa works here. Install one: {GL_PACKAGES}")


class Renderer:
    """One GL context and scene for the life of an environment (physics.render makes new ones each call).

    model, data: mujoco's. camera: number of one of the model's, or a free mujoco.MjvCamera. quality: a key of
    RENDER_QUALITY, applied to `model.vis` before the context is made."""

    def __init__(self, model, data, size: int, camera, quality: str):
        import mujoco

        self.mujoco, self.model, self.data, self.size = mujoco, model, data, size
        vis = model.vis
        vis.global_.offwidth = vis.global_.offheight = size
        if RENDER_QUALITY[quality] is not None:
            vis.quality.shadowsize, vis.quality.numstacks = RENDER_QUALITY[quality]
        self.context = importlib.import_module(f"mujoco.{choose_gl()}").GLContext(size, size)
        self.context.make_current()
        self.scene = mujoco.MjvScene(self.model, maxgeom=10_000)
        self.option, self.rect = mujoco.MjvOption(), mujoco.MjrRect(0, 0, size, size)
        self.camera = camera
        if isinstance(camera, int):
            self.camera = mujoco.MjvCamera()
            self.camera.fixedcamid, self.camera.type = camera, mujoco.mjtCamera.mjCAMERA_FIXED
        self.gpu = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self.gpu)
        self.pixels = np.empty((size, size, 3), np.uint8)
        self.close = weakref.finalize(self, self._free, self.context, self.gpu)  # also when dropped
        self.close.atexit = False
        atexit.register(self.close)  # and at exit, before the hook that mujoco.egl has just registered

    def render(self) -> np.ndarray:
        """The current state as a frame (3, S, S) uint8."""
        m = self.mujoco
        self.context.make_current()
        m.mjv_updateScene(
            self.model, self.data, self.option, None, self.camera, m.mjtCatBit.mjCAT_ALL.value, self.scene
        )
        m.mjr_render(self.rect, self.scene, self.gpu)
        m.mjr_readPixels(self.pixels, None, self.rect, self.gpu)
        return np.ascontiguousarray(self.pixels[::-1].transpose(2, 0, 1))  # GL's first row is the lowest

    @staticmethod
    def _free(context, gpu) -> None:
        context.make_current()  # else the objects of whichever context is current would be deleted
        gpu.free()
        context.free()


class DMCEnv:
    """A dm_control task: action repeat 2, frames stacked oldest first, terminal apart from timeout.

    obs (3 * frame_stack, S, S) uint8, or the proprioceptive state (D,) float32 where size is None.
    action (A,) in [-1, 1], scaled to the task's own bounds. reward: sum over the repeats, in [0, 2].
    reset(seed) starts the episode that this seed names, whatever happened before. episode_steps: its length in
    actions, None for the task's own (500 in most)."""

    ACTION_REPEAT = 2

    def __init__(self, task: str, size: int | None, frame_stack: int, seed: int, render: str, episode_steps=None):
        from dm_control import suite

        domain, _, name = task.partition("-")
        if (domain, name) not in suite.ALL_TASKS:
            known = ", ".join(sorted("-".join(pair) for pair in suite.ALL_TASKS))
            raise UserError(f"--task {task}: no such dm_control task. There are: {known}")
        self.env = suite.load(domain, name, task_kwargs={"random": seed})
        self.physics, self.task, self.size, self.frame_stack = (self.env.physics, task, size, frame_stack)
        spec = self.env.action_spec()
        self.low, self.high, self.action_dim = spec.minimum, spec.maximum, spec.shape[0]
        self.episode_steps, self.steps, self.renderer = episode_steps, 0, None
        if size is not None:
            model, data = self.physics.model.ptr, self.physics.data.ptr
            self.renderer = Renderer(model, data, size, camera=2 if domain == "quadruped" else 0, quality=render)

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict]:
        """Returns obs and info {"state": (D,) float32}."""
        if seed is not None:
            self.env.task._random = np.random.RandomState(seed)  # dm_control draws the initial state from it
        observation, self.steps = self.env.reset().observation, 0
        self.frames = [self.renderer.render()] * self.frame_stack if self.renderer else []
        return self._observe(observation)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Returns obs, reward, terminal (no value beyond), timeout (only the clock ran out), info."""
        action = self.low + (np.asarray(action, np.float64) + 1) * (self.high - self.low) / 2
        reward = 0.0
        for _ in range(self.ACTION_REPEAT):
            time_step = self.env.step(action)
            reward += time_step.reward
            if time_step.last():
                break
        if self.renderer:
            self.frames = [*self.frames[1:], self.renderer.render()]
        obs, info = self._observe(time_step.observation)
        self.steps += 1
        terminal = time_step.last() and time_step.discount == 0.0
        over = time_step.last() or self.steps == self.episode_steps
        return obs, reward, terminal, over and not terminal, info

    def action_size(self) -> int:
        return self.action_dim

    def clock(self) -> tuple[int, int]:
        """Actions in an episode, simulation steps in an action."""
        steps = min(self.env._step_limit, self.ACTION_REPEAT * (self.episode_steps or math.inf))
        if math.isinf(steps):
            raise UserError("the task's episodes have no end of their own; give --episode-steps")
        return -(-int(steps) // self.ACTION_REPEAT), self.ACTION_REPEAT

    def get_state(self) -> np.ndarray:
        """Everything the next steps depend on (mjSTATE_INTEGRATION), (n,) float64."""
        import mujoco

        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(self.physics.model.ptr, kind))
        mujoco.mj_getState(self.physics.model.ptr, self.physics.data.ptr, state, kind)
        return state

    def set_state(self, state: np.ndarray) -> None:
        """Puts back a state of get_state(); the step count of the episode stays."""
        import mujoco

        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        mujoco.mj_setState(self.physics.model.ptr, self.physics.data.ptr, state, kind)
        mujoco.mj_step1(self.physics.model.ptr, self.physics.data.ptr)  # what dm_control computes after a step

    def close(self) -> None:
        if self.renderer:
            self.renderer.close()

    def _observe(self, observation) -> tuple[np.ndarray, dict]:
        state = np.concatenate([np.ravel(part) for part in observation.values()]).astype(np.float32)
        return (np.concatenate(self.frames) if self.renderer else state), {"state": state}


MANIPULATION = ("metaworld-", "kitchen-", "adroit-")  # tasks of manipulation.py


def make_env(task: str, size: int | None = 84, frame_stack: int = 3, seed: int = 0, render: str = "fast",
             episode_steps: int | None = None):  # fmt: skip
    """A seeded environment, DMCEnv's interface. task: "domain-task", or one of manipulation.py; size: pixels per side,
    None for states instead of frames; render: a key of RENDER_QUALITY; episode_steps: None for the task's own.
    Raises UserError for an unknown task, without GL, or without the packages of a manipulation task."""
    if size is None:
        os.environ.setdefault("MUJOCO_GL", "off")  # states only: importing mujoco needs no GL
    elif os.environ.get("MUJOCO_GL", "").lower() in ("", "off"):
        os.environ.pop("MUJOCO_GL", None)
        if sys.platform != "darwin":
            os.environ["MUJOCO_GL"] = choose_gl()
    if not task.startswith(MANIPULATION):
        return DMCEnv(task, size, frame_stack, seed, render, episode_steps)
    try:
        from manipulation import ManipulationEnv

        return ManipulationEnv(task, size, frame_stack, seed, render, episode_steps)
    except ModuleNotFoundError as error:
        how = "pip install -r requirements-manipulation.txt, in a full checkout"
        raise UserError(f"--task {task} needs {error.name}: {how}") from None


def _worker(connection, gl: str, kwargs: dict, count: int) -> None:
    """Serves `count` environments until the parent closes the pipe (or dies, which closes it too)."""
    os.setsid()  # Ctrl-C and signals to the group are the parent's to handle,
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and so is what schedulers send to every process of a job
    os.environ["MUJOCO_GL"] = gl
    envs = []
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            method, arguments = connection.recv()
            try:
                if not envs:
                    envs = [make_env(**kwargs) for _ in range(count)]
                pairs = zip(envs, arguments)
                connection.send((None, [a if a is None else getattr(env, method)(*a) for env, a in pairs]))
            except Exception as error:
                message = str(error) if isinstance(error, UserError) else traceback.format_exc()
                connection.send(((isinstance(error, UserError), message), None))
    for env in envs:
        env.close()


class EnvPool:
    """`count` environments spread over worker processes, stepped together.

    Workers are forked from a freshly executed server that imported this file and dm_control once; they neither
    import the calling script nor touch CUDA, render with LP_NUM_THREADS=0 (one thread each: two
    workers then scale by 2.0) and end with their parent, however it ends. An exception in a worker is raised
    here with its traceback. `done` (count,) bool marks finished episodes; those get reward 0 and keep their obs.
    `success` (count,) bool: whether the task, if it is one that says so, was solved at some step of the episode."""

    def __init__(self, task, size, count, frame_stack=3, render="fast", workers=None, episode_steps=None):
        workers = min(count, workers or cores())
        gl = "off" if size is None else choose_gl()
        kwargs = {"task": task, "size": size, "frame_stack": frame_stack, "render": render}
        kwargs["episode_steps"] = episode_steps
        shares = [count // workers + (i < count % workers) for i in range(workers)]
        self.bounds = np.cumsum([0, *shares])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["common", "mujoco", "dm_control.suite"])
        self.pipes, self.processes = [], []
        here = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        # MUJOCO_GL=off: the server must import dm_control without starting GL, each worker starts its own.
        with _for_workers(PYTHONPATH=here, MUJOCO_GL="off", LP_NUM_THREADS="0", OMP_NUM_THREADS="1"):
            for share in shares:
                pipe, theirs = context.Pipe()
                process = context.Process(target=_worker, args=(theirs, gl, kwargs, share), daemon=True)
                process.start()
                theirs.close()
                self.pipes.append(pipe)
                self.processes.append(process)
        self.task, self.count, self.done, self.success = task, count, np.ones(count, bool), np.zeros(count, bool)
        self.close = weakref.finalize(self, self._close, self.pipes, self.processes)
        multiprocessing.util.Finalize(None, self.close, exitpriority=1)  # before daemons get a SIGTERM and are joined

    def call(self, method: str, arguments: list) -> list:
        """env.method(*arguments[i]) in every environment i whose arguments are not None; results in order."""
        for i, pipe in enumerate(self.pipes):
            with contextlib.suppress(ConnectionError):  # a dead worker is noticed below
                pipe.send((method, arguments[self.bounds[i] : self.bounds[i + 1]]))
        results, failure = [], None
        for pipe in self.pipes:
            try:
                error, part = pipe.recv()
            except (EOFError, ConnectionError):
                error, part = (False, "an environment worker died (killed, or out of memory)"), None
            failure = failure or error
            results += part or []
        if failure:
            self.close()
            raise (UserError(failure[1]) if failure[0] else RuntimeError(f"in an environment worker:\n{failure[1]}"))
        return results

    def reset(self, seeds) -> np.ndarray:
        """Starts episode seeds[i] in environment i. Returns obs (count, C, S, S) uint8; infos in self.infos."""
        results = self.call("reset", [(int(seed),) for seed in seeds])
        self.obs, self.infos = np.stack([obs for obs, _ in results]), [info for _, info in results]
        self.done, self.success = np.zeros(self.count, bool), np.zeros(self.count, bool)
        return self.obs

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """actions (count, A). Returns obs (count, C, S, S), reward (count,), terminal (count,); sets `done`."""
        active = ~self.done
        results = self.call("step", [(action,) if on else None for action, on in zip(actions, active)])
        reward, terminal = np.zeros(self.count), np.zeros(self.count, bool)
        self.obs = self.obs.copy()
        for i in np.flatnonzero(active):
            self.obs[i], reward[i], terminal[i], timeout, self.infos[i] = results[i]
            self.done[i] = terminal[i] or timeout
            self.success[i] |= self.infos[i].get("success", False)
        return self.obs, reward, terminal

    def summary(self, returns: np.ndarray) -> dict:
        """What an evaluation logs: the score, which is the mean return, on dm_control a tenth of it as in V-D4RL; for
        manipulation the percentage of successes; returns (count,)."""
        if not self.task.startswith(MANIPULATION):
            return {"score": returns.mean() / 10, "return": returns.tolist()}
        success = 100 * self.success.sum() / self.count
        return {"score": returns.mean(), "success": success, "return": returns.tolist()}

    @staticmethod
    def describe(summary: dict) -> str:
        success = f", success {summary['success']:.0f} %" if "success" in summary else ""
        return f"score {summary['score']:.2f}{success}, returns {np.round(summary['return'], 1).tolist()}"

    @staticmethod
    def _close(pipes, processes) -> None:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(timeout=5)
            process.kill()  # one that hangs would ignore a SIGTERM


@contextlib.contextmanager
def _for_workers(**environment: str):
    """What processes started meanwhile see: these variables, and no running script (each would import it again)."""
    before, main = dict(os.environ), sys.modules["__main__"]
    os.environ.update(environment)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name in environment:
            os.environ.pop(name)
        os.environ.update(before)


# ==== Data ====
# A set is a folder: image.npy (N, 3, S, S) uint8, action.npy (N, A), reward.npy (N,), discount.npy (N,), all float32,
# episode.npy (E,) int64, the first row of each episode, and meta.json, written last: without it there is no set.
# Arrival rows: row t holds image t and the action, reward and discount that LED TO it; an episode's row 0 holds
# zeros. So a transition is (image[t], action[t+1], reward[t+1], discount[t+1], image[t+1]), and an episode of T
# steps has T+1 rows. discount is 0 after a terminal step, else 1 (a time limit is no terminal).

STANDARD_SETS = ("random", "mixed", "medium", "medexp", "expert")  # V-D4RL's
NAMED_SETS = (*STANDARD_SETS, "demos", "partial")  # and those of manipulation tasks
STANDARD_TRANSITIONS = {("cheetah-run", "mixed"): 200_000, ("humanoid-walk", "mixed"): 600_000}  # else as below
ARRAYS = {"image": np.uint8, "action": np.float32, "reward": np.float32, "discount": np.float32, "episode": np.int64}
HEADER = 128  # bytes before the rows of a .npy file
# --buffer-device auto holds the frames on the GPU if they fit in this share of its free memory; benchmark.sh says how
# many runs begin on one GPU at the same time
BUFFER_SHARE = 0.6 / int(os.environ.get("CLEANPIXELS_RUNS_PER_GPU", 1))


class Part:
    """One folder of arrays, memory-mapped. Raises UserError where sizes and counts do not fit meta.json."""

    def __init__(self, path: Path, meta: dict):
        self.path, self.meta = path, meta
        for name, dtype in ARRAYS.items():
            file = path / f"{name}.npy"
            try:
                array = np.load(file, mmap_mode="r")  # "c" would count against memory: no set larger than that
            except (OSError, EOFError, ValueError) as error:
                raise UserError(f"{file}: missing, truncated or no .npy file ({error}); make the set again") from None
            rows = meta["episodes"] if name == "episode" else meta["rows"]
            if array.dtype != dtype or len(array) != rows:
                raise UserError(
                    f"{file}: {len(array)} rows of {array.dtype}, meta.json says {rows} of {dtype.__name__}"
                )
            setattr(self, name, array)
        self.lengths = np.diff(np.append(self.episode, meta["rows"]))  # (E,) rows per episode, reset row included
        if self.episode[0] != 0 or self.lengths.min() < 2:
            raise UserError(f"{path}/episode.npy: first rows must start at 0 and rise by 2 or more")

    def check_values(self) -> None:
        """Actions in [-1, 1], rewards finite, discounts in [0, 1]; raises UserError that names the first bad row."""
        most = 4 if self.meta["task"].startswith("kitchen-") else 2
        bad = {
            "action": ~(np.abs(self.action) <= 1 + 1e-6).all(1),
            "reward": ~np.isfinite(self.reward)
            | (self.meta["source"] != "own") & ~((self.reward >= 0) & (self.reward <= most)),
            "discount": ~((self.discount >= 0) & (self.discount <= 1)),
        }
        for name, rows in bad.items():
            if rows.any():
                row = int(np.flatnonzero(rows)[0])
                raise UserError(
                    f"{self.path}/{name}.npy: row {row} is {getattr(self, name)[row]}, not finite or out of range"
                )


class Dataset:
    """An opened set: its parts (medexp lists two, any other set is its own only part) and what meta.json says."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.meta = read_meta(self.path)
        folders = [(self.path / part).resolve() for part in self.meta.get("parts", ["."])]
        self.parts = [Part(folder, read_meta(folder)) for folder in folders]
        first = self.parts[0].meta
        for part in self.parts:
            if any(part.meta[name] != first[name] for name in ("task", "size", "render")):
                raise UserError(
                    f"{self.path}: {part.path} has another task, size or render quality than the first part"
                )
        self.task, self.source, self.size = first["task"], first["source"], first["size"]
        self.render, self.mujoco = first["render"], first["mujoco"]
        self.action_dim = self.parts[0].action.shape[1]
        self.num_transitions = sum(part.meta["transitions"] for part in self.parts)
        returns = np.concatenate([episode_returns(part) for part in self.parts])
        self.num_episodes, self.mean_return = len(returns), float(returns.mean())
        digests = [part.meta["sha256"] for part in self.parts]
        self.hash = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]

    def rows(self) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """first row (E,) and number of rows (E,) of each episode, and action, reward, discount of all rows, checked;
        the parts one after another."""
        for part in self.parts:
            part.check_values()
        starts = np.cumsum([0, *(len(part.reward) for part in self.parts)])
        first = np.concatenate([part.episode + start for part, start in zip(self.parts, starts)])
        lengths = np.concatenate([part.lengths for part in self.parts])
        names = ("action", "reward", "discount")
        return first, lengths, [np.concatenate([getattr(part, name) for part in self.parts]) for name in names]

    def facts(self) -> dict:
        """What a run has to know of its data without opening it, for config.json."""
        hidden = ("path", "meta", "parts")
        return {"set": self.path.name} | {name: value for name, value in vars(self).items() if name not in hidden}


def read_meta(path: Path) -> dict:
    file = Path(path) / "meta.json"
    try:
        meta = json.loads(file.read_text())
        needed = (
            {"parts"}
            if "parts" in meta
            else {"task", "source", "size", "render", "mujoco", "rows", "episodes", "transitions", "sha256"}
        )
        if missing := needed - set(meta):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return meta
    except FileNotFoundError:
        state = "is an unfinished set (no meta.json)" if Path(path).is_dir() else "does not exist"
        raise UserError(f"{path} {state}; run data/collect.py again (it continues), or give --data-dir") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); make the set again") from None


def episode_returns(part) -> np.ndarray:
    """Undiscounted return of each episode, (E,) float64. The reset row's reward is 0."""
    return np.add.reduceat(part.reward.astype(np.float64), part.episode)


def return_statistics(returns: np.ndarray) -> dict[str, float]:
    """mean, std, min, quartiles and max, named as in V-D4RL's Table 5."""
    low, p25, median, p75, high = np.percentile(returns, [0, 25, 50, 75, 100])
    names = {"mean": np.mean(returns), "std": np.std(returns), "min": low, "p25": p25}
    names |= {"median": median, "p75": p75, "max": high}
    return {name: round(float(value), 2) for name, value in names.items()}


def default_data_dir() -> str:
    return os.environ.get("CLEANPIXELS_DATA") or str(HERE / "datasets")


def standard_transitions(task: str, name: str) -> int:
    """The size of the published set (V-D4RL Table 5; demos: MOTO's, arXiv:2401.03306 Appendix C.2)."""
    return STANDARD_TRANSITIONS.get((task, name), {"medexp": 200_000, "demos": 1_000}.get(name, 100_000))


def set_folder(data_dir, source, task, name, size, transitions=None, seed=0) -> Path:
    """datasets/<source>/<task>/<name>-<size>px[-<transitions>][-seed<s>]"""
    suffix = f"-{transitions}" if transitions not in (None, standard_transitions(task, name)) else ""
    suffix += f"-seed{seed}" if seed else ""
    return Path(data_dir) / source / task / f"{name}-{size}px{suffix}"


def open_dataset(args, size: int) -> Dataset:
    """The set that args.task, .dataset, .source, .data_dir, .transitions and .data_seed name.

    args.dataset: a standard name (at `size` pixels; made on the spot if it is missing) or the path of a set of any
    size. For a path, args.task becomes the set's own task. Raises UserError that lists what there is."""
    if args.dataset not in NAMED_SETS:
        if not Path(args.dataset).is_dir():
            raise UserError(
                f"--dataset {args.dataset}: neither one of {', '.join(NAMED_SETS)} nor a folder. "
                f"In --data-dir {args.data_dir} there are: {_known_sets(args.data_dir)}"
            )
        if args.transitions is not None:
            raise UserError(f"--transitions {args.transitions}: a set given by its path is used whole")
        dataset = Dataset(args.dataset)
        if dataset.task != args.task:
            print(f"--task: {dataset.path} was recorded on {dataset.task}, which is used")
            args.task = dataset.task
        return dataset
    if args.transitions is not None and args.source != "made":
        raise UserError(f"--transitions {args.transitions}: only made sets are cut; --source {args.source} is whole")
    transitions = args.transitions
    folder = set_folder(args.data_dir, args.source, args.task, args.dataset, size, transitions, args.data_seed)
    if not (folder / "meta.json").exists():
        _make_dataset(args, size, folder)
    dataset = Dataset(folder)
    published = standard_transitions(args.task, args.dataset)
    if args.source == "vd4rl" and dataset.num_transitions < published:
        print(f"warning: {folder} holds {dataset.num_transitions:,} of {published:,} published transitions; "
              "its scores do not compare with the published ones")  # fmt: skip
    return dataset


def _known_sets(data_dir: str) -> str:
    return ", ".join(sorted(str(meta.parent) for meta in Path(data_dir).glob("*/*/*/meta.json"))) or "none"


def collect_flags(args, size: int) -> list[str]:
    """What data/collect.py is told to make the standard set that `args` name."""
    flags = ["--task", args.task, "--dataset", args.dataset, "--size", str(size)]
    flags += ["--data-dir", str(Path(args.data_dir).resolve())]
    flags += ["--transitions", str(args.transitions)] if args.transitions is not None else []
    return flags + (["--seed", str(args.data_seed)] if args.data_seed else [])


def kitchen_problem(args, size: int) -> str:
    """Why a set of the kitchen is not made on the spot; "" for other tasks."""
    if not args.task.startswith("kitchen-"):
        return ""
    if args.dataset != args.task.removeprefix("kitchen-") or args.transitions or args.data_seed:
        return f"of {args.task} there is --dataset {args.task.removeprefix('kitchen-')}, and that whole"
    flags = f"--dataset {args.dataset} --size {size} --data-dir {Path(args.data_dir).resolve()}"
    return f"render Minari's set, which is fetched: python data/minari_kitchen.py {flags}"


def _make_dataset(args, size: int, folder: Path) -> None:
    collect, flags = HERE / "data" / "collect.py", collect_flags(args, size)
    if problem := kitchen_problem(args, size):
        raise UserError(f"{folder} does not exist; {problem}")
    if args.source != "made":
        raise UserError(f"{folder} does not exist; import the official files: python data/vd4rl.py import --help")
    if not collect.exists():
        raise UserError(
            f"{folder} does not exist (there are: {_known_sets(args.data_dir)}). Make it in a full checkout with "
            f"python data/collect.py {' '.join(flags)}, or point --data-dir to where it is"
        )
    print(f"{folder} is missing: making it. Interrupt at any time, the same command continues.", flush=True)
    status = subprocess.run([sys.executable, str(collect), *flags]).returncode
    if status == 1:
        raise SystemExit(1)  # it has said why
    if status:
        raise UserError(f"data/collect.py ended with status {status} (see above); {folder} is unfinished")


class DatasetWriter:
    """Writes a set, one whole episode at a time; an interrupted writer continues with its next episode.

        with DatasetWriter("datasets/own/robot", size=84, action_dim=7) as writer:
            for episode in episodes[writer.episodes :]:  # 0 at first; later, what an interrupted run still lacks
                writer.add(frames, actions, rewards, terminal=False)

    task: the task of make_env to evaluate in, rendered in `render` quality; "own": none. mujoco: the version that
    rendered the frames, if one did. recipe: whatever tells one set from another; an unfinished set with another is
    begun anew.

    The set counts once the `with` block ends without an exception. `writer.episodes` says how many episodes an
    earlier, interrupted writer of the same recipe has left. Raises UserError for a bad episode (nothing of it is
    written), a full or read-only disk, and waits for another process that writes the same set."""

    def __init__(self, path, size: int, action_dim: int, task: str = "own", source: str = "own", render: str = "fast",
                 mujoco: str | None = None, recipe: dict | None = None):  # fmt: skip
        self.path = Path(path)
        self.meta = {"task": task, "source": source, "name": self.path.name, "size": size, "action_dim": action_dim,
                     "render": render, "mujoco": mujoco, "recipe": recipe or {}}  # fmt: skip
        shapes = {"image": (3, size, size), "action": (action_dim,), "reward": (), "discount": ()}
        self.rows = {name: (shape, np.dtype(ARRAYS[name])) for name, shape in shapes.items()}
        self.boundaries, self.files, self.progress = [0], {}, None

    def __enter__(self):
        with _plain_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock_file(self.path / ".lock", wait=f"another process is writing {self.path}; waiting for it")
            self.complete = (self.path / "meta.json").exists()  # the process that was waited for has made it
            if self.complete:
                return self
            recipe, progress = self.path / "recipe.json", self.path / "progress.bin"
            if recipe.exists() and json.loads(recipe.read_text()) == json.loads(json.dumps(self.meta)):
                self.boundaries = (np.fromfile(progress, np.int64).tolist() if progress.exists() else []) or [0]
            else:
                progress.unlink(missing_ok=True)
                write_atomically(recipe, json.dumps(self.meta))
            for name, (shape, dtype) in self.rows.items():  # cut off what an interrupted episode left
                file = open(os.open(self.path / f"{name}.npy", os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115
                self.files[name] = file
                end = HEADER + self.boundaries[-1] * int(np.prod(shape)) * dtype.itemsize
                if self.episodes and file.seek(0, os.SEEK_END) < end:
                    raise UserError(f"{self.path}/{name}.npy is shorter than progress.bin says; delete {self.path}")
                file.truncate(end)
                file.seek(end)
            if not progress.exists():
                np.array([0], np.int64).tofile(progress)
            self.progress = open(progress, "r+b")  # noqa: SIM115
            self.progress.seek(8 * len(self.boundaries))
        return self

    @property
    def episodes(self) -> int:
        return len(self.boundaries) - 1

    def add(self, frames, actions, rewards, terminal: bool = False) -> None:
        """frames (T+1, S, S, 3) uint8; actions (T, A) in [-1, 1], action t leads from frame t to frame t+1;
        rewards (T,); terminal: whether the last step ended the episode for good (not by a time limit)."""
        if self.complete:
            raise UserError(f"{self.path} is finished; delete it to make it anew, or give another path")
        frames, actions, rewards = np.asarray(frames), np.asarray(actions), np.asarray(rewards)
        size, (action_dim,) = self.meta["size"], self.rows["action"][0]
        expected = {"frames": (len(actions) + 1, size, size, 3), "actions": (len(actions), action_dim)}
        expected["rewards"] = (len(actions),)
        for name, array in {"frames": frames, "actions": actions, "rewards": rewards}.items():
            if array.shape != expected[name] or len(actions) == 0:
                raise UserError(f"episode {self.episodes}: {name} {array.shape}, expected {expected[name]}")
        if frames.dtype != np.uint8:
            raise UserError(f"episode {self.episodes}: frames are {frames.dtype}, expected uint8 in 0..255")
        if not (np.abs(actions) <= 1 + 1e-6).all() or not np.isfinite(rewards).all():
            raise UserError(f"episode {self.episodes}: actions must lie in [-1, 1] and rewards be finite")
        arrival = arrival_rows(frames.transpose(0, 3, 1, 2), actions, rewards, terminal)
        with _plain_errors(self.path):
            for name, rows in arrival.items():
                self.files[name].write(np.ascontiguousarray(rows, self.rows[name][1]).data)
                self.files[name].flush()
            self.progress.write(np.int64(self.boundaries[-1] + len(frames)).tobytes())  # last: now the episode counts
            self.progress.flush()
        self.boundaries.append(self.boundaries[-1] + len(frames))

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None and not self.complete:
                with _plain_errors(self.path):
                    self._finish()
        finally:
            for file in filter(None, [*self.files.values(), self.progress, self.lock]):
                with contextlib.suppress(OSError):  # flushing what a full disk refused
                    file.close()

    def _finish(self) -> None:
        if not self.episodes:
            raise UserError(f"{self.path}: no episode was added, so there is no set")
        for name, (shape, dtype) in self.rows.items():
            _write_header(self.files[name], dtype, (self.boundaries[-1], *shape))
            self.files[name].flush()
        np.save(self.path / "episode.npy", np.array(self.boundaries[:-1], np.int64))
        for name in ARRAYS:
            with open(self.path / f"{name}.npy", "r+b") as file:
                os.fsync(file.fileno())
        write_meta(self.path, self.meta)
        for leftover in ("recipe.json", "progress.bin"):
            (self.path / leftover).unlink()


def arrival_rows(images: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminal: bool) -> dict:
    """An episode of T steps as T+1 rows. images (T+1, 3, S, S), actions (T, A), rewards (T,)."""
    return {
        "image": images,
        "action": np.concatenate([np.zeros_like(actions[:1]), actions]),
        "reward": np.concatenate([[0.0], rewards]),
        "discount": np.concatenate([np.ones(len(actions)), [0.0 if terminal else 1.0]]),
    }


class OnlineSet:
    """Episodes that a run collects, in its folder: arrays as in a set. open() takes the space of `rows` rows at once.
    lengths: rows of the episodes that count; what lies beyond them is overwritten. Once the run has ended: a set like
    any other."""

    def __init__(self, path: Path, rows: int, size: int, action_dim: int):
        self.path, self.rows, self.lengths = path, rows, []
        self.shapes = {"image": (3, size, size), "action": (action_dim,), "reward": (), "discount": ()}
        self.sizes, self.found = {}, 0  # bytes of the files and rows in all of them before open()

    def open(self) -> None:
        """Raises UserError where the disk has no room."""
        found = []
        reserve = getattr(os, "posix_fallocate", lambda handle, _, size: os.truncate(handle, size))  # macOS has none
        with _plain_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "meta.json").unlink(missing_ok=True)  # left by a kill between finish() and the run's end
            for name, shape in self.shapes.items():
                dtype = np.dtype(ARRAYS[name])
                with open(os.open(self.path / f"{name}.npy", os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                    row_bytes = int(np.prod(shape)) * dtype.itemsize
                    self.sizes[name] = file.seek(0, os.SEEK_END)
                    found.append(max(self.sizes[name] - HEADER, 0) // row_bytes)
                    _write_header(file, dtype, (self.rows, *shape))
                    file.flush()
                    reserve(file.fileno(), 0, HEADER + self.rows * row_bytes)
                setattr(self, name, np.load(self.path / f"{name}.npy", mmap_mode="r+"))
        self.found = min(found)

    def give_back(self) -> None:
        """Leaves the files as long as they were before: blank rows in place of lost ones would pass for episodes."""
        for name, size in self.sizes.items():
            os.truncate(self.path / f"{name}.npy", size)

    def add(self, images: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminal: bool) -> None:
        """One episode: images (T+1, 3, S, S) uint8, actions (T, A), rewards (T,)."""
        first, count = sum(self.lengths), len(images)
        for name, rows in arrival_rows(images, actions, rewards, terminal).items():
            array = getattr(self, name)
            array[first : first + count] = rows
            array.flush()
        self.lengths.append(count)

    def finish(self, task: str, render: str) -> None:
        """Cuts the files to the episodes that count and makes them a set; nothing can be added after it."""
        ends = np.cumsum(self.lengths)
        with _plain_errors(self.path):
            for name in self.shapes:
                array = getattr(self, name)
                with open(self.path / f"{name}.npy", "r+b") as file:
                    _write_header(file, array.dtype, (int(ends[-1]), *array.shape[1:]))
                    file.truncate(HEADER + int(ends[-1]) * array[0].nbytes)
            np.save(self.path / "episode.npy", ends - self.lengths)
            meta = {"task": task, "source": "own", "name": self.path.name, "size": self.image.shape[-1], "recipe": {}}
            meta |= {"action_dim": self.action.shape[1], "render": render, "mujoco": versions().get("mujoco")}
            write_meta(self.path, meta)


def write_meta(path: Path, meta: dict) -> None:
    """Counts, hashes and return statistics of the arrays in `path`, written atomically as its meta.json."""
    arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    part = types.SimpleNamespace(**arrays)
    rows, episodes = len(part.reward), len(part.episode)
    counts = {"format": 1, "rows": rows, "episodes": episodes, "transitions": rows - episodes}
    returns = episode_returns(part)
    meta |= counts | {"returns": return_statistics(returns), "episode_returns": returns.round(3).tolist()}
    meta["versions"] = versions()
    meta["sha256"] = {name: sha256(path / f"{name}.npy") for name in ARRAYS}
    write_atomically(path / "meta.json", json.dumps(meta, indent=1))


def _write_header(file, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """The .npy header, 128 bytes for any number of rows: numpy leaves room for the first axis to grow."""
    file.seek(0)
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
    assert file.tell() == HEADER


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def lock_file(path: Path, wait: str | None = None):
    """An exclusive flock that dies with its process. Where it is held: says `wait` and waits, or raises UserError."""
    file = open(path, "a+")  # noqa: SIM115
    for pause in (0.2, 0.0):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(pause)  # benchmark.sh looks at a lock by taking it for an instant
    else:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        if wait is None:
            raise UserError(f"{path.parent} is in use by process {holder}") from None
        print(f"{wait} (process {holder})", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


@contextlib.contextmanager
def _plain_errors(path: Path):
    """A full, read-only or forbidden disk as one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; what was complete before is kept") from None


class Batch(NamedTuple):
    """obs, next_obs (B, 3 * frame_stack, S, S) uint8; action (B, A), reward and discount (B, 1) float32.

    reward: sum over k = 1..n of gamma^(k-1) reward[t+k], up to a terminal. discount: gamma^n, and 0 where a terminal
    lies inside. Sorted by row of the set: a half of the batch is no random half."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_obs: Tensor | None


class Frames:
    """Every image row of a set, its parts one after another, then of an online set: in the memory map, or on the GPU
    if they fit."""

    def __init__(self, dataset: Dataset, device: torch.device, buffer_device: str, online: OnlineSet | None = None):
        self.device = device
        with warnings.catch_warnings(action="ignore"):  # torch notes that the map is read-only: nothing writes to it
            self.images = [torch.from_numpy(part.image) for part in (*dataset.parts, *([online] if online else []))]
        self.bounds = np.cumsum([0, *(len(image) for image in self.images)]).tolist()  # first global row of each part
        self.on_gpu = self._fits(buffer_device)
        if self.on_gpu:
            frames = torch.empty((self.bounds[-1], *self.images[0].shape[1:]), dtype=torch.uint8, device=device)
            for image, start in zip(self.images, self.bounds):
                frames[start : start + len(image)].copy_(image)
            self.images = [frames]
            self.bounds = [0, self.bounds[-1]]

    def _fits(self, buffer_device: str) -> bool:
        if self.device.type != "cuda" or buffer_device == "cpu":
            return False
        needed = sum(image.numel() for image in self.images)
        return buffer_device == "cuda" or needed < BUFFER_SHARE * torch.cuda.mem_get_info(self.device)[0]

    def gather(self, rows: Tensor) -> Tensor:
        """rows (n,) int64, those of each part together and in the order of the parts -> (n, 3, S, S) uint8."""
        source = self.images[0]
        out = torch.empty((len(rows), *source.shape[1:]), dtype=torch.uint8, device=source.device,
                          pin_memory=self.device.type == "cuda" and not self.on_gpu)  # fmt: skip
        cuts = [0, *(int((rows < start).sum()) for start in self.bounds[1:-1]), len(rows)]
        for image, start, low, high in zip(self.images, self.bounds, cuts[:-1], cuts[1:]):
            torch.index_select(image, 0, rows[low:high] - start, out=out[low:high])
        return out.to(self.device, non_blocking=True)

    def refresh(self, first: int, images: np.ndarray) -> None:
        """Rows from `first` on have become `images` in the memory map."""
        if self.on_gpu:
            self.images[0][first : first + len(images)] = torch.from_numpy(images).to(self.device)


class TransitionBuffer:
    """Uniform samples of n-step transitions, with replacement, from every complete window of a set.

    Frames are stored once and stacked as they are gathered: the rows before an episode's first are its first, so
    no stack and no window crosses episodes. A batch comes sorted by row (its order carries no meaning, memory
    likes it). The frames stay in the memory map, or are held on the GPU as uint8 (buffer_device)."""

    def __init__(self, dataset: Dataset, batch_size: int, frame_stack: int = 3, nstep: int = 1, gamma: float = 0.99,
                 seed: int = 0, device="cpu", buffer_device: str = "cpu", next_obs: bool = True):  # fmt: skip
        self.batch_size, self.frame_stack, self.nstep = batch_size, frame_stack, nstep
        self.device, self.next_obs = torch.device(device), next_obs
        self.frames = Frames(dataset, self.device, buffer_device)
        self.action_dim, self.obs_shape = (dataset.action_dim, (3 * frame_stack, dataset.size, dataset.size))
        first_rows, lengths, columns = dataset.rows()
        action, reward, discount = columns
        steps = lengths - 1  # T per episode
        windows = np.maximum(steps - nstep + 1, 0)  # T - n + 1 starts: all n rewards must exist
        if not windows.any():
            raise UserError(f"{dataset.path}: no episode is as long as --nstep {nstep}")
        if short := int((windows == 0).sum()):
            print(f"note: {short} episodes of {dataset.path} are shorter than --nstep {nstep} and go unused")
        offset = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)  # t within the episode
        rows = np.repeat(first_rows, windows) + offset  # obs of window w ends at image rows[w]
        self.rows, self.offset = torch.from_numpy(rows), torch.from_numpy(offset)
        # row:       t        t+1       t+2       t+3         arrival rows, n = 3
        # image:     obs                          next_obs
        # action:             action
        # reward:             r0   +  g r1   +  g^2 r2        later rewards only while no terminal came before
        total, factor = np.zeros(len(rows)), np.ones(len(rows))
        for k in range(1, nstep + 1):
            total += factor * reward[rows + k]
            factor *= gamma * discount[rows + k]
        columns = action[rows + 1], total[:, None], factor[:, None]
        self.action, self.reward, self.factor = (
            torch.from_numpy(c.astype(np.float32)).to(self.device) for c in columns
        )
        self.generator = torch.Generator().manual_seed(seed)
        if self.frames.on_gpu:
            self.rows, self.offset = self.rows.to(self.device), self.offset.to(self.device)

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self) -> Batch:
        index = torch.randint(len(self), (self.batch_size,), generator=self.generator).sort().values
        return self.gather(index.pin_memory() if self.device.type == "cuda" else index)  # pinned: the host runs ahead

    def gather(self, index: Tensor) -> Batch:
        """The transitions of windows `index` (B,) int64, in rising order."""
        on_device = index.to(self.device, non_blocking=True)
        index = on_device if self.frames.on_gpu else index
        rows, offset = self.rows[index], self.offset[index]
        back = torch.arange(self.frame_stack - 1, -1, -1, device=rows.device)  # oldest frame first
        obs = self._frames(rows[:, None] - torch.minimum(back, offset[:, None]))
        next_obs = None
        if self.next_obs:
            next_obs = self._frames((rows + self.nstep)[:, None] - torch.minimum(back, offset[:, None] + self.nstep))
        return Batch(obs, self.action[on_device], self.reward[on_device], self.factor[on_device], next_obs)

    def _frames(self, rows: Tensor) -> Tensor:
        """rows (B, F) of image rows -> stacked frames (B, 3 F, S, S) uint8: a view of the gathered rows."""
        return self.frames.gather(rows.flatten()).view(len(rows), *self.obs_shape)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])


class Sequences(NamedTuple):
    """image (B, T, 3, S, S) uint8 or None; action (B, T, A), reward, discount (B, T) float32; is_first (B, T) bool;
    row (B, T) int64, of the set.

    Arrival rows: action[:, t] led to image[:, t], which came with reward[:, t] and discount[:, t]; in an episode's
    first row action and reward are 0. Sorted by row of the set: a half of the batch is no random half."""

    image: Tensor | None
    action: Tensor
    reward: Tensor
    discount: Tensor
    is_first: Tensor
    row: Tensor


class SequenceBuffer:
    """Windows of `length` rows that lie in one episode: an episode drawn uniformly, then one of its starts, with
    replacement. Every row of an episode that is long enough is in some window, the last one too.

    force_first: is_first also on a window's own first row, so that no unknown past and no action that led there
    counts; without it an episode's first row alone has it. online: where add() puts further episodes; they come after
    the set's, num_rows counts the room for them. Frames are held as in TransitionBuffer."""

    def __init__(self, dataset: Dataset, batch_size: int, length: int, seed: int = 0, device="cpu",
                 buffer_device: str = "cpu", force_first: bool = True, online: OnlineSet | None = None):  # fmt: skip
        self.batch_size, self.length, self.force_first, self.online = batch_size, length, force_first, online
        self.device = torch.device(device)
        first_rows, lengths, columns = dataset.rows()
        if lengths.max() < length:
            raise UserError(
                f"{dataset.path}: its longest episode has {lengths.max()} rows, --window {length} needs as many"
            )
        if short := int((lengths < length).sum()):
            print(f"note: {short} episodes of {dataset.path} are shorter than --window {length} and are in no window")
        if online:
            online.open()
        self.frames = Frames(dataset, self.device, buffer_device, online)
        self.action_dim, self.num_rows = dataset.action_dim, self.frames.bounds[-1]
        self.action, self.reward, self.discount = (
            torch.zeros(self.num_rows, *column.shape[1:], device=self.device) for column in columns
        )
        self.is_first = torch.zeros(self.num_rows, dtype=torch.bool, device=self.device)
        self.lengths = torch.zeros(0, dtype=torch.int64)  # rows of every episode
        self._append(torch.from_numpy(lengths), columns)
        self.generator = torch.Generator().manual_seed(seed)

    def _append(self, lengths: Tensor, columns) -> None:
        """Episodes of so many rows, and the action, reward and discount of these rows."""
        start, count = int(self.lengths.sum()), int(lengths.sum())
        for ours, column in zip((self.action, self.reward, self.discount), columns):
            ours[start : start + count] = torch.from_numpy(column.astype(np.float32)).to(self.device)
        self.is_first[(start + lengths.cumsum(0) - lengths).to(self.device)] = True
        self.lengths = torch.cat([self.lengths, lengths])
        usable = self.lengths >= self.length
        self.first_rows = (self.lengths.cumsum(0) - self.lengths)[usable]
        self.starts = self.lengths[usable] - self.length + 1  # per episode

    def add(self, images: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminal: bool) -> None:
        """One episode for the online set: images (T+1, 3, S, S) uint8, actions (T, A), rewards (T,)."""
        self.online.add(images, actions, rewards, terminal)
        self._read(len(self.online.lengths) - 1)

    def _read(self, episode: int) -> None:
        """Takes in an episode of the online set."""
        count, first = self.online.lengths[episode], sum(self.online.lengths[:episode])
        rows = slice(first, first + count)
        self.frames.refresh(int(self.lengths.sum()), self.online.image[rows])
        columns = (getattr(self.online, name)[rows] for name in ("action", "reward", "discount"))
        self._append(torch.tensor([count]), columns)

    def sample(self, images: bool = True, count: int | None = None) -> Sequences:
        """`count` windows, None: batch_size. images=False leaves them out, for what is computed from `row` instead."""
        count = count or self.batch_size
        episode = torch.randint(len(self.starts), (count,), generator=self.generator)
        part = torch.rand(count, generator=self.generator, dtype=torch.float64)
        start = self.first_rows[episode] + (part * self.starts[episode]).long()
        row = start.sort().values[:, None] + torch.arange(self.length)
        return self.gather(row.pin_memory() if self.device.type == "cuda" else row, images)

    def gather(self, row: Tensor, images: bool = True) -> Sequences:
        """The windows of rows `row` (B, T) int64, each within an episode, in rising order."""
        on_device = row.to(self.device, non_blocking=True)
        is_first = self.is_first[on_device]  # a copy
        is_first[:, 0] |= self.force_first
        image = None
        if images:
            image = self.frames.gather((on_device if self.frames.on_gpu else row).flatten())
            image = image.view(*row.shape, *image.shape[1:])
        columns = (column[on_device] for column in (self.action, self.reward, self.discount))
        return Sequences(image, *columns, is_first, on_device)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()} | ({"online": self.online.lengths} if self.online else {})

    def load_state_dict(self, state: dict) -> None:
        """Into a new buffer: takes in those episodes of the online set that counted then."""
        self.generator.set_state(state["generator"])
        if self.online:
            self.online.lengths = list(state["online"])
            if sum(self.online.lengths) > self.online.found:
                self.online.give_back()
                raise UserError(
                    f"{self.online.path} is gone, and with it the run's own episodes; --overwrite begins anew"
                )
            for episode in range(len(self.online.lengths)):
                self._read(episode)


# ==== Runs ====

FREE_FLAGS = {"data_dir", "runs_dir", "log_every", "buffer_device", "overwrite", "evaluate"}  # may differ on resume
GROWING_FLAGS = {"steps", "agent_steps", "online_episodes"}  # may grow on resume
AT_LEAST_1 = ("steps", "batch_size", "log_every", "eval_episodes", "nstep", "window", "horizon", "ensemble",
              "target_every", "rollout_every", "updates_per_episode", "episode_steps", "transitions",
              "cql_samples")  # fmt: skip
LEAST = dict.fromkeys(AT_LEAST_1, 1) | {"agent_batch_size": 2}  # flag -> smallest; half of lompo's batch is imagined
LEAST |= dict.fromkeys(
    ("model_steps", "agent_steps", "offline_steps", "model_first", "online_episodes", "eval_every", "seed"), 0
)
EVAL_SEED = 1_000_000  # evaluation episode i starts from seed EVAL_SEED + i, in every run and at every step
CHECKPOINT_SECONDS = 300.0


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for name in ("mujoco", "dm_control", "metaworld", "gymnasium", "gymnasium-robotics"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    used = torch.get_num_threads()
    return (f"{used} of " if used < cores() else "") + f"{cores()} cores of {name}"


def has_bf16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 natively (emulation is slower than float32)."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability() >= (8, 0)
    with contextlib.suppress(OSError):
        return any(flag in Path("/proc/cpuinfo").read_text() for flag in (" avx512_bf16", " amx_bf16"))
    return False


def parse_args(args_class, tuned: dict, quick: dict):
    """The command line as an `args_class`, see typed_args. Resolves --device, --precision and --accelerate auto.

    From here on a UserError ends the process with its one line and status 1."""
    sys.excepthook = one_line_errors
    args = typed_args(args_class, tuned, quick)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise UserError(f"--device {args.device}: auto, cpu, cuda or cuda:N")
    if args.device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"--device {args.device}: there is no CUDA device here; --device cpu")
        torch.cuda.set_device(args.device if ":" in args.device else 0)
    for name, least in LEAST.items():
        if (number := vars(args).get(name)) is not None and number < least:
            raise UserError(f"--{name.replace('_', '-')} {number}: at least {least}")
    if args.accelerate == "auto":
        args.accelerate = "eager"  # until compile and graph are measured to be faster and equal
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(args.device) else "fp32"
    keys = _tuned_keys(args.task, args.dataset)
    for name in sorted({name for values in tuned.values() for name in values}):
        if not any(name in tuned.get(key, {}) for key in keys) and not getattr(args, "evaluate", None):
            row = f"{args.task} {args.dataset} has no value of its own for"
            print(f"note: {row} --{name.replace('_', '-')}; it is {getattr(args, name)}")
    return args


def typed_args(args_class, tuned: dict, quick: dict, argv: list[str] | None = None):
    """The words of a command line (default: this process's) as an `args_class`. Defaults: the class, then the most
    exact entry of `tuned` for (task, dataset), then under --quick `quick` and its entries for (task, dataset); what the
    user typed wins."""
    import tyro

    defaults = args_class()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what decides on the other defaults
    first.add_argument("--task", nargs="?", default=defaults.task)
    first.add_argument("--dataset", nargs="?", default=defaults.dataset)
    first.add_argument("--source", nargs="?", default="made")
    first.add_argument("--quick", action="store_true")
    first.add_argument("--evaluate", nargs="?")
    typed, _ = first.parse_known_args(argv)
    evaluated = {}
    if typed.evaluate and (config := Path(typed.evaluate) / "config.json").exists():  # as the run evaluated itself
        run = json.loads(config.read_text())["args"]
        typed.task, typed.dataset = run["task"], run["dataset"]
        evaluated = {"eval_episodes": run["eval_episodes"]}
    elif typed.dataset and (Path(typed.dataset) / "meta.json").exists():
        typed.task = Dataset(typed.dataset).task  # whatever was typed, see open_dataset
    merged: dict[str, Any] = {"task": typed.task or defaults.task}
    if merged["task"].startswith(MANIPULATION):
        merged["eval_episodes"] = 20  # a rate of success needs more of them
    keys = _tuned_keys(merged["task"], typed.dataset)
    for key in keys:
        merged |= tuned.get(key, {})
    if typed.quick:
        merged |= {name: value for name, value in quick.items() if isinstance(name, str)}
        for key in keys:
            merged |= quick.get(key, {})
    merged |= evaluated
    whole = typed.dataset not in NAMED_SETS or typed.source != "made" or merged["task"].startswith("kitchen-")
    if whole:  # only sets that are made here can be cut
        merged.pop("transitions", None)
    default = dataclasses.replace(defaults, **merged)
    args = tyro.cli(args_class, args=argv, default=default, config=(tyro.conf.FlagCreatePairsOff,))
    args.data_dir, args.runs_dir = (args.data_dir or default_data_dir(), args.runs_dir or str(HERE / "runs"))
    return args


def _tuned_keys(task: str, dataset: str) -> tuple:
    suite = task.partition("-")[0] + "-*"  # metaworld-*
    return ("*", "*"), ("*", dataset), (suite, "*"), (task, "*"), (task, dataset)


def one_line_errors(kind, error, trace) -> None:
    if issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def evaluation_pool(args, facts: dict, frame_stack: int = 3) -> EnvPool | None:
    """The environments to evaluate in, rendered as the data was; None where --eval-every is 0.

    facts: Dataset.facts(). Warns where the data was rendered by another mujoco than the one installed."""
    if args.eval_every == 0:
        return None
    if facts["task"] == "own":
        mend = "" if getattr(args, "evaluate", None) else "; train on it with --eval-every 0"
        raise UserError(f"{facts['set']} names no task to evaluate in{mend}")
    installed = versions().get("mujoco")
    if facts["source"] == "vd4rl" and facts["task"].startswith(("walker", "cheetah")):
        print(
            "note: the official sets were rendered before MuJoCo 3.2.0, which changed the pixels of walker and cheetah "
            "(mean difference 1.6 and 2.1 of 255): frames rendered here differ that much from the data"
        )
    elif facts["mujoco"] not in (installed, None):
        print(f"warning: the data was rendered with mujoco {facts['mujoco']}, here mujoco {installed} renders")
    steps = getattr(args, "episode_steps", None)
    pool = EnvPool(facts["task"], facts["size"], args.eval_episodes, frame_stack, facts["render"], episode_steps=steps)
    action_dim = pool.call("action_size", [()] * pool.count)[0]  # makes them now: mistakes show before training
    if action_dim != facts["action_dim"]:
        dims = f"{facts['set']} has {facts['action_dim']} action dimensions, {facts['task']} {action_dim}"
        raise UserError(f"{dims}; --eval-every 0 trains without the environment")
    return pool


def start_run(args, dataset: Dataset, model_flags: tuple[str, ...] = ()) -> "Run":
    """Opens runs/[quick/]<algo>/<task>/<set>[-vd4rl]/[<tag>-]seed<k>: lock, config.json, a copy of the script.

    The same command continues what is there. model_flags: those that must be alike where a new run begins from
    another's networks (--model-from, --offline-from). Raises UserError where that one does not fit, where the folder
    holds a run with other flags or data, where another process runs in it, where no updates are asked for, and
    SystemExit(0) where it is finished."""
    if args.steps == 0:
        raise UserError("no updates are asked for: there is nothing to do")
    script = Path(sys.modules["__main__"].__file__).resolve()
    path = run_folder(args, script.stem, dataset.path.name, dataset.source)
    if args.overwrite or not has_begun(path):  # a run that has begun needs the other no more
        check_donor(args, dataset, model_flags, path)
    return Run(path, args, dataset.facts(), script)


def has_begun(run: Path) -> bool:
    """Whether a run folder holds something to go on from."""
    return any(run.glob("checkpoint-*")) or (run / "finished.json").exists()


def run_folder(args, algo: str, set_name: str, source: str) -> Path:
    """runs/[quick/]<algo>/<task>/<set>[-vd4rl]/[<tag>-]seed<k>"""
    base = Path(args.runs_dir) / "quick" if args.quick else Path(args.runs_dir)
    official, tag = "-vd4rl" if source == "vd4rl" else "", f"{args.tag}-" if args.tag else ""
    return base / algo / args.task / f"{set_name}{official}" / f"{tag}seed{args.seed}"


def late_mean(values: list[float]) -> float:
    """Mean of the last max(2, 10 %) evaluations."""
    return float(np.mean(values[-max(2, round(len(values) / 10)) :]))


def changed_code(script: Path, run: Path) -> bool:
    """Whether a script differs from the copy that a run keeps, in more than comments and layout."""
    copy = run / script.name
    return copy.exists() and ast.dump(ast.parse(copy.read_text())) != ast.dump(ast.parse(script.read_text()))


class Run:
    """A run folder: config, metrics, checkpoints, resume. Seeds torch and NumPy; holds the folder's lock."""

    def __init__(self, path: Path, args, facts: dict, script: Path):
        self.path, self.args, self.facts = path, args, facts
        with _plain_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self.lock = lock_file(path / ".lock")
        self.script, self.code = script, [script, HERE / "common.py"]
        self.code += [HERE / "manipulation.py"] if args.task.startswith(MANIPULATION) else []
        if not args.overwrite:
            self._check_config(script)
        if (path / "finished.json").exists() and not args.overwrite:
            summary = json.loads((path / "finished.json").read_text())
            if args.steps > summary["steps"]:
                raise UserError(
                    f"{path} finished at {summary['steps']} steps and keeps weights only; --tag or --overwrite"
                )
            print(f"{path} is finished: {json.dumps(summary)}")
            raise SystemExit(0)
        if args.eval_every is None:
            args.eval_every = -(-args.steps // 20)
        torch.manual_seed(args.seed)
        np.random.seed(args.seed)
        self.stop_signal, self.last_checked, self.last_saved, self.wall = (0, -1, time.monotonic(), 0.0)
        self.bar, self.watched = None, None

    def _write_config(self) -> None:
        """config.json and copies of the code; what began a run stays, what went on with it is listed beside it."""
        here = {"command": shlex.join(sys.argv), "commit": commit_of(*self.code), "versions": versions()}
        here["hardware"] = hardware(self.args.device)
        with _plain_errors(self.path):
            if self.args.overwrite:  # only now: whatever can be wrong with the command has been found
                used = {".lock"} | ({"online"} if getattr(self.args, "online_episodes", 0) else set())  # this run's own
                entries = [entry for entry in self.path.iterdir() if entry.name not in used]
                for entry in sorted(entries, key=lambda entry: entry.name == "config.json"):  # that one last
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if self._checkpoints():
                config = json.loads((self.path / "config.json").read_text())
                config["resumed"].append(here)
            else:
                config = {"algo": self.script.stem, **here, "resumed": []}
                for file in self.code:
                    write_atomically(self.path / file.name, file.read_text())
            config |= {"args": dataclasses.asdict(self.args), "dataset": self.facts}
            write_atomically(self.path / "config.json", json.dumps(config, indent=1, default=str))

    def _check_config(self, script: Path) -> None:
        file = self.path / "config.json"
        if not file.exists() or not has_begun(self.path):
            return  # it ended before its first checkpoint: there is nothing that other flags could spoil
        if changed_code(script, self.path):
            raise UserError(f"{script.name} has changed since {self.path} began (diff it with the copy there). "
                            "Give the new one a --tag, or --overwrite")  # fmt: skip
        for imported in self.code[1:]:
            if changed_code(imported, self.path):
                print(f"warning: {imported.name} has changed since {self.path} began (diff it with the copy there)")
        old = json.loads(file.read_text())
        if self.args.eval_every is None:
            self.args.eval_every = old["args"]["eval_every"]
        new = json.loads(json.dumps(dataclasses.asdict(self.args), default=str))
        pairs = {name: (old["args"].get(name), value) for name, value in new.items() if name not in FREE_FLAGS}
        grown = {name for name in GROWING_FLAGS & pairs.keys() if pairs[name][1] > pairs[name][0] > 0}
        changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in grown}
        if old["dataset"]["hash"] != self.facts["hash"]:
            changed["dataset hash"] = (old["dataset"]["hash"], self.facts["hash"])
        if changed:
            text = ", ".join(f"--{name.replace('_', '-')} {was} -> {now}" for name, (was, now) in changed.items())
            from_0 = changed.get("online_episodes", (1,))[0] == 0  # there is no room kept for any
            other = f"; or --offline-from {self.path} and a --tag" if from_0 else ""
            raise UserError(
                f"{self.path} holds a run with other flags: {text}. Give this one a --tag, or --overwrite{other}"
            )

    # ---- loop ----

    def log_due(self, step: int, metrics: dict[str, Tensor]) -> bool:
        """Also moves the progress bar and looks at every update's metrics, () each: call it once a step.

        Raises UserError that names the metrics which were not finite, and the first step at which one was not."""
        self._tick(step)
        self._watch(step, metrics)
        due = step % self.args.log_every == 0 or self._save_due(step)
        if due:
            self._require_finite_metrics()
            self.last_checked = step
        return due

    def _watch(self, step: int, metrics: dict[str, Tensor]) -> None:
        """Keeps the metrics of this update, or of the first that were not finite: on the device, nothing waits."""
        names, values = [*metrics, "step"], torch.stack([value.float() for value in metrics.values()])
        values = torch.cat([values, values.new_full((1,), step)])
        if self.watched and self.watched[0] != names:  # another phase begins
            self._require_finite_metrics()
        elif self.watched:
            before = self.watched[1]
            values = torch.where(before.isfinite().all(), values, before)
        self.watched = names, values

    def _require_finite_metrics(self) -> None:
        (*values, step), names = self.watched[1].tolist(), self.watched[0]
        if bad := [name for name, value in zip(names, values) if not np.isfinite(value)]:
            self._not_finite(f"{', '.join(bad)} not finite", int(step))

    def _not_finite(self, what: str, step: int) -> None:
        kept = ", ".join(entry.name for entry in self._checkpoints()) or "no checkpoint"
        raise UserError(f"{what} at step {step}; {self.path} keeps {kept}")

    def eval_due(self, step: int) -> bool:
        """20 times a run, and at its end. Where --eval-every is 0 these are checkpoints alone."""
        every = self.args.eval_every or -(-self.args.steps // 20)
        return step % every == 0 or step == self.args.steps

    def checkpoint_due(self, step: int) -> bool:
        """At every evaluation, every 5 minutes, and when asked to stop; only right after metrics were seen finite."""
        return self.last_checked == step and self._save_due(step)

    def _save_due(self, step: int) -> bool:
        late = time.monotonic() - self.last_saved > CHECKPOINT_SECONDS
        return self.eval_due(step) or late or bool(self.stop_signal)

    def log(self, part: str, step: int, metrics: dict[str, Any]) -> None:
        """Appends a row to <part>.csv and TensorBoard. A list spreads over numbered columns.

        Raises UserError that names the first metric which is not finite."""
        row = {"step": step, "wall_s": round(self.wall_s(), 1)}
        for name, value in metrics.items():
            row |= {f"{name}_{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        for name, value in row.items():
            if not np.isfinite(value):
                self._not_finite(f"{name} is {value}", step)
        with _plain_errors(self.path):
            file = self.path / f"{part}.csv"
            new = not file.exists()
            if not new:
                with open(file, newline="") as handle:
                    if next(csv.reader(handle)) != list(row):
                        raise UserError(
                            f"{file} has other columns: log the same metrics every time, or --tag a new run"
                        )
            with open(file, "a", newline="") as handle:
                writer = csv.DictWriter(handle, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)
        if self.tensorboard:
            for name, value in row.items():
                self.tensorboard.add_scalar(name if "/" in name else f"{part}/{name}", value, step)
        if part == "eval":
            success = f", success {row['success']:.0f} %" if "success" in row else ""
            self.bar.write(f"step {step}: score {row['score']:.1f}{success}")
        elif losses := {name: f"{value:.3g}" for name, value in row.items() if name.endswith("loss")}:
            self.bar.set_postfix(losses, refresh=False)

    def wall_s(self) -> float:
        """Seconds this run has taken, over all its resumes, evaluation included."""
        return self.wall + time.monotonic() - self.begun

    # ---- checkpoints ----

    def load_checkpoint(self, **objects) -> int:
        """Begins the run, or restores the newest whole checkpoint into `objects` and cuts later metrics. Returns its
        step, 0 if none."""
        self._write_config()
        step = 0
        for folder in reversed(self._checkpoints()):
            if not is_whole(folder):
                print(f"warning: {folder} is damaged; falling back to the one before")
                shutil.rmtree(folder)
                continue
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            for name, thing in objects.items():
                thing.load_state_dict(state["objects"][name])
            _restore_generators(state["generators"])
            step, self.wall = state["step"], state["wall_s"]
            print(f"continuing {self.path} at step {step}")
            break
        for file in self.path.glob("*.csv"):
            with open(file, newline="") as handle:
                header, *rows = list(csv.reader(handle)) or [[]]
            kept = [row for row in rows if len(row) == len(header) and int(row[0]) <= step]
            if kept and step:  # without a checkpoint the rows may be of other flags
                write_atomically(file, "".join(",".join(row) + "\n" for row in [header, *kept]))
            else:
                file.unlink()  # its header may be cut, too
        if not step:  # of a run that ended before its first checkpoint, perhaps with other flags
            (self.path / "offline.pt").unlink(missing_ok=True)
        self._open_displays(step)
        self.begun, self.first_step = time.monotonic(), step
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        return step

    def save_checkpoint(self, step: int, **objects) -> None:
        """Writes state_dict() of all `objects` and every generator; the one before stays until this one is whole.

        At the last step it ends the run: weights.pt and finished.json instead. After SIGTERM or Ctrl-C it raises
        SystemExit. Raises UserError, and keeps the checkpoints there are, where a weight is not finite."""
        state = {"step": step, "wall_s": self.wall_s(), "objects": {k: v.state_dict() for k, v in objects.items()}}
        state["generators"] = _generators()
        _require_finite(state["objects"], f"step {step}: ")
        with _plain_errors(self.path):
            if step == self.args.steps:
                return self._finish(step, state["objects"]["agent"])
            temporary = self.path / "checkpoint.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write_atomically(temporary / "sha256", _save(state, temporary / "state.pt"))
            _fsync_folder(temporary)
            target = self.path / f"checkpoint-{step:09d}"
            temporary.rename(target)
            _fsync_folder(self.path)
            for old in self._checkpoints()[:-2]:
                shutil.rmtree(old)
        self.last_saved = time.monotonic()
        if self.stop_signal:
            self.bar.close()
            words = "the same command without --overwrite" if self.args.overwrite else "the same command"
            print(f"stopped at step {step} with a checkpoint; {words} continues")
            raise SystemExit(128 + self.stop_signal)

    def save_offline(self, agent) -> None:
        """Keeps the agent as the offline phase leaves it, optimisers included, for another run's --offline-from."""
        _require_finite(agent.state_dict(), "the offline phase's end: agent")
        with _plain_errors(self.path):
            _save(agent.state_dict(), self.path / "offline.tmp")
            (self.path / "offline.tmp").replace(self.path / "offline.pt")

    def _finish(self, step: int, agent: dict) -> None:
        _save(
            {k: v for k, v in agent.items() if not k.endswith("_extra_state")} | {"_extra_state": {}},
            self.path / "weights.pt",
        )
        summary = {"steps": step, "wall_s": round(self.wall_s(), 1)}
        if (self.path / "eval.csv").exists():
            with open(self.path / "eval.csv", newline="") as handle:
                rows = list(csv.DictReader(handle))
            for name in ("score", "success") if "success" in rows[0] else ("score",):
                values = [float(row[name]) for row in rows]
                summary |= {f"{name}_last": round(values[-1], 2), f"{name}_late_mean": round(late_mean(values), 2)}
            summary |= {name: int(rows[-1][name]) for name in ("env_steps", "episodes") if name in rows[0]}
        write_atomically(self.path / "finished.json", json.dumps(summary))
        for old in self._checkpoints():
            shutil.rmtree(old)
        self.bar.close()
        print(f"finished: {json.dumps(summary)}\nin {self.path}")

    def _checkpoints(self) -> list[Path]:
        return sorted(self.path.glob("checkpoint-*"))

    def _on_signal(self, number: int, _) -> None:
        self.stop_signal = number
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers repeat it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nstopping after this update, with a checkpoint (Ctrl-C: at once)\n")  # print may be mid-line

    # ---- what people see ----

    def _open_displays(self, step: int) -> None:
        self.tensorboard = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.path / "tensorboard", purge_step=step + 1)
        except ImportError:
            print("note: tensorboard is not installed; metrics go to CSV alone")
        self.bar = progress_bar(self.args.steps, step, "update")

    def _tick(self, step: int) -> None:
        self.bar.update(1)
        done = step - self.first_step
        if done == 20 and self.args.device == "cpu" and not self.args.quick:
            hours = (time.monotonic() - self.begun) / done * (self.args.steps - step) / 3600
            if hours > 1:
                self.bar.write(f"note: the full run takes {hours:.1f} hours on this CPU, evaluation not counted; "
                               "--quick is a small setting that shows learning")  # fmt: skip


def progress_bar(total: int | None, initial: int, unit: str):
    """tqdm, a line every 30 s where nobody watches; where it is not installed a stand-in that says so."""
    try:
        from tqdm import tqdm
    except ImportError:
        print("note: tqdm is not installed; no progress bar")
        nothing = dict.fromkeys(("update", "close", "set_postfix"), lambda *_, **__: None)
        return types.SimpleNamespace(write=print, **nothing)
    every = 1 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True, mininterval=every)


def save_video(path: Path, frames: list[np.ndarray]) -> None:
    """frames: T arrays (3, S, S) uint8, played at 20 per second, 4 times enlarged. Says so where it cannot write."""
    try:
        import imageio.v2 as imageio

        with imageio.get_writer(path, fps=20, macro_block_size=1) as video:
            for frame in frames:
                video.append_data(frame.transpose(1, 2, 0).repeat(4, 0).repeat(4, 1))
        print(f"video: {path}")
    except Exception as error:  # imageio raises ValueError or RuntimeError where its ffmpeg is missing
        print(f"note: {path.name} was not written ({error})")


def load_run(args):
    """What --evaluate RUN needs: the run's args (but this command's device and episodes), its data's facts, weights."""
    path = Path(args.evaluate)
    try:
        config = json.loads((path / "config.json").read_text())
        weights = torch.load(path / "weights.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"--evaluate {path}: {Path(error.filename).name} is missing; is the run finished?") from None
    script = Path(sys.modules["__main__"].__file__)
    if not (path / script.name).exists():  # the copy that every run keeps
        raise UserError(f"--evaluate {path} is a run of {config['algo']}.py, not of {script.name}")
    if changed_code(script, path):
        raise UserError(
            f"{script.name} has changed since {path}; evaluate with the copy there: "
            f"python {path / script.name} --evaluate {path}"
        )
    kept = {name: value for name, value in config["args"].items() if hasattr(args, name)}
    kept |= {name: getattr(args, name) for name in ("device", "precision", "eval_episodes", "evaluate")}
    kept["eval_every"] = None  # 0 would mean: no environment
    if getattr(args, "eval_state_mode", False):
        kept["eval_state_mode"] = True
    return dataclasses.replace(args, **kept), config["dataset"], weights


def newest_weights(path: Path) -> dict:
    """The agent's state of a run, finished or not. Raises UserError where there is none that is whole."""
    if (path / "finished.json").exists():
        return torch.load(path / "weights.pt", map_location="cpu", weights_only=True)
    for folder in sorted(path.glob("checkpoint-*"), reverse=True):
        if is_whole(folder):
            return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)["objects"]["agent"]
    raise UserError(f"{path} is not finished and holds no whole checkpoint")


def is_whole(checkpoint: Path) -> bool:
    try:
        return sha256(checkpoint / "state.pt") == (checkpoint / "sha256").read_text()
    except FileNotFoundError:
        return False


def check_donor(args, dataset: Dataset, flags: tuple[str, ...], run: Path) -> None:
    """What --model-from RUN and --offline-from RUN need, before a run in folder `run` begins.

    Raises UserError where RUN has not finished the phase that is asked for, where one of `flags`, the task or the
    action size is another than here, or where it is this run itself."""
    for name, phase in (("model_from", "model_steps"), ("offline_from", "offline_steps")):
        if not (value := getattr(args, name, None)):
            continue
        path, flag = Path(value), f"--{name.replace('_', '-')} {value}"
        if path.resolve() == run.resolve():
            raise UserError(f"{flag} is this run itself; give this one another --tag")
        try:
            config = json.loads((path / "config.json").read_text())
        except FileNotFoundError:
            raise UserError(f"{flag}: there is no config.json; give a run's folder") from None
        there, here = config["args"], dataclasses.asdict(args)
        pairs = {f"--{key.replace('_', '-')}": (there.get(key), here[key]) for key in flags}
        size = config["dataset"]["action_dim"], dataset.action_dim
        pairs |= {"task": (there["task"], args.task), "action_dim": size}
        if changed := ", ".join(f"{key} {old}, here {new}" for key, (old, new) in pairs.items() if old != new):
            raise UserError(f"{flag} has {changed}")
        if name == "offline_from" and there.get("offline_from"):
            raise UserError(f"{flag} had no offline phase of its own; give {there['offline_from']}")
        if name == "offline_from":
            done = (path / "offline.pt").exists()
        else:
            steps = [int(folder.name[11:]) for folder in path.glob("checkpoint-*") if is_whole(folder)]
            enough = there.get(phase, math.inf)  # moto's model goes on learning to the end
            done = (path / "finished.json").exists() or max(steps, default=-1) >= enough
        if not done:
            words = "offline phase" if name == "offline_from" else "first phase"
            count = f" of {there[phase]} updates" if phase in there else ", the whole run"
            raise UserError(f"{flag} has not finished its {words}{count}")
        if config["dataset"]["hash"] != dataset.hash:
            print(f"note: the model of {flag} was trained on other data, {config['dataset']['set']}")


def load_model(model, args, prefix: str = "model.") -> None:
    """--model-from RUN: the part `prefix` of the newest weights of a run. Raises UserError where they do not fit."""
    weights = newest_weights(Path(args.model_from))
    part = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    _load(model, part, f"--model-from {args.model_from}")


def load_offline(agent, args) -> None:
    """--offline-from RUN: the agent as the offline phase of a run left it, optimisers included, see Run.save_offline.
    Raises UserError where it does not fit."""
    weights = torch.load(Path(args.offline_from) / "offline.pt", map_location="cpu", weights_only=True)
    _load(agent, weights, f"--offline-from {args.offline_from}")


def _load(module, weights: dict, flag: str) -> None:
    """Weights of another run, perhaps of another script. Raises UserError that names the first that do not fit."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:  # torch's message: a heading, then a line per kind of misfit
        raise UserError(f"{flag} has other networks: {str(error).splitlines()[1].strip()[:200]}") from None


def keep_freed_memory() -> None:
    """glibc returns large freed blocks to the kernel, and every update pays for their page faults again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def accelerate(agent, name: str, args):
    """The method `name` of `agent` in the form that --accelerate asks for; all compute the same (compile
    draws its random numbers from another stream).

    eager: as it stands. compile: the methods in agent.LOSSES under torch.compile. graph: the whole method as one CUDA
    graph (static inputs; outputs are cloned)."""
    if args.device == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # the shapes never change
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"  # else fp32 would round what convolutions multiply
    if args.accelerate == "compile":
        for loss in agent.LOSSES:
            if loss not in vars(agent):  # a second method of the same agent shares them
                setattr(agent, loss, torch.compile(getattr(agent, loss), fullgraph=True, dynamic=False))
    if args.accelerate != "graph":
        return getattr(agent, name)
    if not args.device.startswith("cuda"):
        raise UserError("--accelerate graph needs --device cuda")
    return CudaGraph(getattr(agent, name))


class CudaGraph:
    """method(batch, *tensors) as one CUDA graph.

    The first three calls run it as it stands, on a side stream as torch asks of a warm-up: optimiser state must exist
    before the capture, or every replay would zero it. The fourth call captures, which computes nothing, and replays."""

    WARM_UP = 3

    def __init__(self, method):
        self.method, self.calls, self.stream = method, 0, torch.cuda.Stream()

    def __call__(self, batch: NamedTuple, *tensors: Tensor):
        self.calls += 1
        if self.calls <= self.WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                metrics = self.method(batch, *tensors)
            torch.cuda.current_stream().wait_stream(self.stream)
            return metrics
        if self.calls == self.WARM_UP + 1:
            self.batch = type(batch)(*(None if value is None else value.clone() for value in batch))
            self.tensors = [value.clone() for value in tensors]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.metrics = self.method(self.batch, *self.tensors)
        for static, value in zip([*self.batch, *self.tensors], [*batch, *tensors]):
            if value is not None:
                static.copy_(value)
        self.graph.replay()
        return {name: value.clone() for name, value in self.metrics.items()}  # the next replay overwrites them


def _require_finite(state, where: str) -> None:
    if isinstance(state, dict):
        for key, value in state.items():
            _require_finite(value, f"{where}.{key}")
    elif isinstance(state, Tensor) and state.is_floating_point() and not torch.isfinite(state).all():
        raise UserError(f"{where} holds a value that is not finite; the checkpoint before it is kept")


def _generators() -> dict:
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest]}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_generators(state: dict) -> None:
    kind, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _save(state, path: Path) -> str:
    """Serialised in memory first, so that a full disk is an OSError. Returns the sha256."""
    content = io.BytesIO()
    torch.save(state, content)
    with open(path, "wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content.getbuffer()).hexdigest()


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def commit_of(*files: Path) -> str:
    """The git commit (-dirty where one of these files has changed), or outside a repository their sha256."""
    git = ["git", "-C", str(files[0].parent)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", *map(str, files)], capture_output=True, text=True
        ).stdout.strip()
        return commit[:12] + ("-dirty" if dirty else "")
    return "sha256:" + hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
