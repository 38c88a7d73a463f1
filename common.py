"""What no paper describes: environments that render, data on disk, runs that survive a kill.

    environments   make_env, EnvPool
    data           open_dataset, TransitionBuffer, SequenceBuffer
    runs           parse_args, Run, accelerate

The algorithm files import this one and nothing else of the project: a folder that holds one of them and this file works
(manipulation tasks need manipulation.py beside it, other looks and bodies variations.py). Networks, losses, schedules
and augmentation are not here: papers describe them."""

import atexit
import concurrent.futures
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import hashlib
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import operator
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, NamedTuple
from unittest import mock

import filelock
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
CPU_INFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


class UserError(ValueError):
    """Something the user can mend. Its message is one line that names the flag or file, and the fix."""


# ==== Environments ====

MANIPULATION = ("metaworld-", "kitchen-", "adroit-")  # tasks of manipulation.py
RENDER_QUALITY = {  # name -> (shadow map size, stacks per geometry)
    "fast": (1024, 8),  # about 2.3x the frames per second; at most 0.3 % of pixels differ by more than 8
    "reference": None,  # the model's own: pixel for pixel what dm_control's physics.render gives
}
GL_OFF = ("", "off", "false", "0", "disable", "disabled")  # values of MUJOCO_GL that name no backend
GL_HELP = "EGL needs: apt-get install libegl1 libopengl0 libgl1-mesa-dri"


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gl_backend() -> str:
    """What renders: $MUJOCO_GL if it names a backend, else EGL (cgl on macOS)."""
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    if wanted not in GL_OFF:
        return wanted
    return "cgl" if sys.platform == "darwin" else "egl"


class DMCSimulator:
    """A dm_control task without its pictures; manipulation.py has others. episode_steps: in actions.
    return_per_score: 10, V-D4RL's score is a tenth of the return."""

    action_repeat, return_per_score, upside_down = 2, 10, False

    def __init__(self, task: str, body: str | None = None):
        from dm_control import suite

        domain, _, name = task.partition("-")
        if (domain, name) not in suite.ALL_TASKS:
            raise KeyError(", ".join(sorted("-".join(pair) for pair in suite.ALL_TASKS)))
        if body:
            from variations import load_body
        self.env = load_body(task, body) if body else suite.load(domain, name)
        self.model, self.data = self.env.physics.model.ptr, self.env.physics.data.ptr
        spec = self.env.action_spec()
        self.low, self.high, self.action_dim = spec.minimum, spec.maximum, spec.shape[0]
        if self.env._step_limit == math.inf:  # lqr-*, whose actions have no bounds either
            raise UserError(f"--task {task}: it has no end, so no episode of it can be made or scored")
        self.episode_steps = math.ceil(self.env._step_limit / self.action_repeat)
        self.camera = 2 if domain == "quadruped" else 0

    def reset(self, seed: int) -> np.ndarray:
        """Returns the state (D,) float32."""
        self.env.task._random = np.random.RandomState(seed)  # dm_control draws the initial state from it
        return self.state_of(self.env.reset())

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        """action (A,) in [-1, 1], scaled to the task's bounds. Returns state (D,), reward summed over the repeats, in
        [0, 2], terminal, over, success (never)."""
        action, reward = self.low + (action + 1) * (self.high - self.low) / 2, 0.0
        for _ in range(self.action_repeat):
            time_step = self.env.step(action)
            reward += time_step.reward
            if time_step.last():
                break
        terminal = time_step.last() and time_step.discount == 0.0
        return self.state_of(time_step), reward, terminal, time_step.last(), False

    @staticmethod
    def state_of(time_step) -> np.ndarray:
        return np.concatenate([np.ravel(part) for part in time_step.observation.values()]).astype(np.float32)


class Env:
    """A simulator and its camera: frames stacked oldest first, terminal apart from timeout; see make_env.

    obs (3 * frame_stack, S, S) uint8, or the simulator's state (D,) float32 where size is None; action (A,) in [-1, 1].
    spec: action_dim, action_repeat, return_per_score, episode_steps, see DMCSimulator."""

    def __init__(self, simulator, size: int | None, frame_stack: int, render: str):
        self.simulator, self.frame_stack, self.renderer, self.distractor = simulator, frame_stack, None, None
        names = ("action_dim", "action_repeat", "return_per_score", "episode_steps")
        self.spec = {name: getattr(simulator, name) for name in names}
        if size is not None:
            import mujoco

            vis = simulator.model.vis
            vis.global_.offwidth = vis.global_.offheight = size
            if RENDER_QUALITY[render] is not None:
                vis.quality.shadowsize, vis.quality.numstacks = RENDER_QUALITY[render]
            gl = gl_backend()
            try:
                mujoco.gl_context.GLContext = importlib.import_module(f"mujoco.{gl}").GLContext
                self.renderer = mujoco.Renderer(simulator.model, size, size)
                atexit.register(self.renderer.close)  # while GL lives; sooner it can free objects of another renderer
            except Exception as error:  # whatever a GL library raises
                names = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM")
                known = ", ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))
                raise UserError(f"{gl} cannot render here ({error}). Set: {known or 'nothing'}. {GL_HELP}") from None

    def reset(self, seed: int, look=None) -> tuple[np.ndarray, dict]:
        """Starts the episode that the seed names, whatever was before, in a look of variations.py; None: plain. Returns
        obs and info {"state": (D,) float32}."""
        state = self.simulator.reset(seed)
        if look and self.renderer and not self.distractor:
            from variations import Distractor

            self.distractor = Distractor(self.simulator.model, self.simulator.data, self.renderer)
        if self.distractor:
            self.distractor.start(look)
        self.frames = [self.frame()] * self.frame_stack if self.renderer else [state]
        return np.concatenate(self.frames), {"state": state}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Returns obs, reward, terminal (no value beyond), timeout (only the clock ran out), info."""
        state, reward, terminal, over, success = self.simulator.step(np.asarray(action, np.float64))
        self.frames = [*self.frames[1:], self.frame() if self.renderer else state]
        info = {"state": state, "success": success}
        return np.concatenate(self.frames), reward, terminal, over and not terminal, info

    def frame(self) -> np.ndarray:
        """The current state as a picture (3, S, S) uint8."""
        if self.distractor:
            self.distractor.move()
        self.renderer.update_scene(self.simulator.data, self.simulator.camera)
        picture = self.renderer.render()  # (S, S, 3)
        picture = picture[::-1, ::-1] if self.simulator.upside_down else picture
        return np.ascontiguousarray(picture.transpose(2, 0, 1))


def make_env(task: str, size: int | None = 84, frame_stack: int = 3, render: str = "fast", body: str | None = None):
    """task: "domain-task" of dm_control, or one of manipulation.py; size: pixels per side, None for states instead of
    frames; render: a key of RENDER_QUALITY; body: a letter of variations.py. Raises UserError for an unknown task,
    without GL, or without packages."""
    try:
        with mock.patch.dict(os.environ, MUJOCO_GL="off"):  # importing mujoco or dm_control starts no GL: Env does
            if task.startswith(MANIPULATION):
                from manipulation import make_simulator

                simulator = make_simulator(task, render)
            else:
                simulator = DMCSimulator(task, body)
    except (ModuleNotFoundError, AttributeError) as error:  # no package, or a mujoco that dm_control does not know
        how = "pip install -r requirements.txt"
        if task.startswith(MANIPULATION):
            how = "manipulation.py beside common.py, and pip install -r requirements-manipulation.txt"
        raise UserError(f"--task {task} needs other packages ({error}): {how}") from None
    except KeyError as error:
        guess = difflib.get_close_matches(task, error.args[0].split(", "), 1, 0.8)
        meant = f" (meant {guess[0]}?)" if guess else ""
        raise UserError(f"--task {task}: no such task{meant}. There are: {error.args[0]}") from None
    return Env(simulator, size, frame_stack, render)


ENVS = []  # those of a worker process


def begin_worker(gl: str) -> None:
    """First in a new worker, which leaves Ctrl-C to its parent and ends with it, however it ends."""
    os.setsid()
    os.environ["MUJOCO_GL"] = gl
    wait = multiprocessing.parent_process().join
    threading.Thread(target=lambda: (wait(), os._exit(0)), daemon=True).start()


def in_worker(kwargs: list[dict], function, arguments: list) -> list:
    while len(ENVS) < len(arguments):
        ENVS.append(make_env(**kwargs[len(ENVS)]))
    return [None if words is None else function(env, *words) for env, words in zip(ENVS, arguments)]


class EnvPool:
    """`count` environments spread over worker processes, stepped together.

    Workers are forked from a server that has imported this file and dm_control once. They touch no CUDA, render with
    one thread each, and end with their parent, however it ends. An exception in a worker is raised here. After reset()
    and step(): obs (count, ...); infos; done (count,) bool, a finished episode gets reward 0 and keeps its obs; success
    (count,) bool, whether the task was solved at some step. spec: see Env. groups: in place of `count` plain ones, a
    body and a look of variations.py for each, under the name of the metric that they have in summary()."""

    def __init__(self, task, size, count, frame_stack=3, render="fast", workers=None, groups=None):
        self.groups = groups or {"score": [(None, None)] * count}
        bodies, self.looks = zip(*(scene for scenes in self.groups.values() for scene in scenes))
        self.count = count = len(bodies)
        self.parts = np.array_split(np.arange(count), min(count, workers or cores()))
        common = {"task": task, "size": size, "frame_stack": frame_stack, "render": render}
        self.kwargs = [common | {"body": body} for body in bodies]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["common", "mujoco", "dm_control.suite"])
        self.workers = [ProcessPoolExecutor(1, context, begin_worker, (gl_backend(),)) for _ in self.parts]
        # the server imports this common.py, whatever the current folder holds, and starts no GL: each worker does
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        variables = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "MUJOCO_GL": "off"}
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # server and workers inherit it: schedulers send
        try:  # SIGTERM to every process of a job, and it is for the parent to handle
            with mock.patch.dict(os.environ, variables | {"LP_NUM_THREADS": "0", "OMP_NUM_THREADS": "1"}):
                self.spec = self.call(operator.attrgetter("spec"), [()] * count)[0]  # makes them: mistakes show at once
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

    def call(self, function, arguments: list) -> list:
        """function(env, *arguments[i]) in every environment i whose arguments are not None; results in order."""
        try:
            each = [([self.kwargs[i] for i in part], function, [arguments[i] for i in part]) for part in self.parts]
            futures = [worker.submit(in_worker, *words) for worker, words in zip(self.workers, each)]
            while concurrent.futures.wait(futures, timeout=60).not_done:
                print("note: an environment worker has not answered for a minute", flush=True)
            return [result for future in futures for result in future.result()]
        except BrokenProcessPool:
            raise UserError("an environment worker died (killed, or out of memory)") from None
        except Exception:
            self.close()
            raise
        except KeyboardInterrupt:  # a worker that hangs would hold up the end
            for process in multiprocessing.active_children():
                process.kill()
            raise

    def reset(self, seeds) -> np.ndarray:
        """Starts episode seeds[i] in environment i, in looks[i]. Returns obs (count, C, S, S) uint8."""
        starts = [(int(seed), look) for seed, look in zip(seeds, self.looks)]
        obs, self.infos = zip(*self.call(Env.reset, starts))
        self.done, self.success = np.zeros(self.count, bool), np.zeros(self.count, bool)
        self.obs, self.infos = np.stack(obs), list(self.infos)
        return self.obs

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """actions (count, A). Returns obs (count, C, S, S), reward (count,), terminal (count,)."""
        results = self.call(Env.step, [None if done else (action,) for action, done in zip(actions, self.done)])
        reward, terminal = np.zeros(self.count), np.zeros(self.count, bool)
        self.obs = self.obs.copy()
        for i in np.flatnonzero(~self.done):
            self.obs[i], reward[i], terminal[i], timeout, self.infos[i] = results[i]
            self.done[i] = terminal[i] or timeout
            self.success[i] |= self.infos[i]["success"]
        return self.obs, reward, terminal

    def summary(self, returns: np.ndarray) -> dict:
        """What an evaluation logs: the score of each group, which is the mean of its returns, on dm_control a tenth of
        it as in V-D4RL; for manipulation also the percentage of successes; every return (count,)."""
        per_score, ends = self.spec["return_per_score"], np.cumsum([len(scenes) for scenes in self.groups.values()])
        scores = {name: part.mean() / per_score for name, part in zip(self.groups, np.split(returns, ends[:-1]))}
        success = {"success": 100 * self.success.sum() / self.count} if per_score == 1 else {}
        return scores | success | {"return": returns.tolist()}

    def close(self) -> None:
        for worker in getattr(self, "workers", ()):
            worker.shutdown()

    __del__ = close  # left to the interpreter's end, a pool may print a traceback: its thread is ending then, too


# ==== Data ====
# A set is a folder: image.npy (N, 3, S, S) uint8, action.npy (N, A), reward.npy (N,), discount.npy (N,), all float32,
# episode.npy (E,) int64, the first row of each episode, and meta.json, written last: without it there is no set.
# Arrival rows: row t holds image t and the action, reward and discount that LED TO it; an episode's row 0 holds
# zeros. So a transition is (image[t], action[t+1], reward[t+1], discount[t+1], image[t+1]), and an episode of T
# steps has T+1 rows. discount is 0 after a terminal step, else 1 (a time limit is no terminal). In place of image.npy
# medexp has image-0.npy and image-1.npy, links to the frames of medium and expert, which take no space.

STANDARD_SETS = ("random", "mixed", "medium", "medexp", "expert")  # V-D4RL's
NAMED_SETS = (*STANDARD_SETS, "ranexp", "demos", "partial")  # random and expert (D.3); of manipulation tasks
META = {"task": str, "source": str, "size": int, "render": str, "mujoco": str | None, "action_dim": int}  # of meta.json
ARRAYS = {"image": np.uint8, "action": np.float32, "reward": np.float32, "discount": np.float32, "episode": np.int64}


class Dataset:
    """A set, memory-mapped; META as attributes. Raises UserError where it is not whole.

    images: the image files in order; action (N, A), reward, discount (N,); first_rows, lengths (E,): of each episode,
    in rows, the reset row included."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.meta = json.loads((self.path / "meta.json").read_text())
            for name, kind in META.items():
                setattr(self, name, self.meta[name])
                if not isinstance(self.meta[name], kind) or name == "render" and self.render not in RENDER_QUALITY:
                    raise ValueError(f"meta.json: {name} {self.meta[name]!r}")
            files = sorted((file.stem for file in self.path.glob("image*.npy")), key=lambda name: (len(name), name))
            self.images = [self.array(name, 3, self.size, self.size) for name in files]
            self.action, self.reward = self.array("action", self.action_dim), self.array("reward")
            self.discount, self.first_rows = self.array("discount"), self.array("episode")
            rows = len(self.reward)
            if not rows == len(self.action) == len(self.discount) == sum(map(len, self.images)):
                raise ValueError("image, action, reward and discount must have as many rows")
            self.lengths = np.diff(np.append(self.first_rows, rows))
            if self.first_rows[0] != 0 or self.lengths.min() < 2:
                raise ValueError("episode.npy: first rows must start at 0 and rise by 2 or more")
            if not np.isin(np.cumsum([0, *map(len, self.images)][:-1]), self.first_rows).all():
                raise ValueError("an episode is spread over two image files")
            digests = json.dumps([self.meta["sha256"]], sort_keys=True)
        except (OSError, EOFError, LookupError, TypeError, ValueError) as error:
            problem = f"meta.json has no {error}" if isinstance(error, KeyError) else error
            how = "delete it and" if (self.path / "meta.json").exists() else "it is not finished:"
            raise UserError(f"{path} is no whole set ({problem}); {how} give the command that made it again") from None
        self.num_episodes, self.num_transitions = len(self.lengths), rows - len(self.lengths)
        self.mean_return = float(self.reward.sum(dtype=np.float64)) / self.num_episodes
        self.hash = hashlib.sha256(digests.encode()).hexdigest()[:16]

    def array(self, name: str, *shape: int) -> np.ndarray:
        """<name>.npy (n, *shape), memory-mapped. Raises ValueError for another shape or type."""
        array, dtype = np.load(self.path / f"{name}.npy", mmap_mode="r"), np.dtype(ARRAYS[name.partition("-")[0]])
        if array.shape[1:] != shape or array.dtype != dtype:  # "c" in place of "r" would count against memory
            raise ValueError(f"{name}.npy: {array.shape} {array.dtype}, expected {('n', *shape)} {dtype}")
        return array

    def facts(self) -> dict:
        """What a run has to know of its data without opening it, for config.json."""
        names = (*META, "num_episodes", "num_transitions", "mean_return", "hash")
        facts = {name: getattr(self, name) for name in names} | {"variation": self.meta.get("variation")}
        return {"set": self.path.name} | facts


def standard_set(args, size: int) -> tuple[Path, list[str]]:
    """Folder of the standard set that `args` name, <data_dir>/<source>/<task>/<dataset>-<size>px[-<transitions>]
    [-seed<s>][-<distraction><shifted>][-bodies], and what makes it: the words behind python, from the repository's
    root."""
    suffix = f"-{args.transitions}" if args.transitions else ""
    suffix += f"-seed{args.data_seed}" if args.data_seed else ""
    suffix += f"-{args.distraction}{args.shifted}" if args.distraction != "none" else ""
    suffix += "-bodies" if args.bodies else ""
    flags = {"task": args.task, "dataset": args.dataset, "size": size, "data-dir": Path(args.data_dir).resolve()}
    flags |= {"transitions": args.transitions} if args.transitions else {}
    flags |= {"seed": args.data_seed} if args.data_seed else {}
    flags |= {"distraction": args.distraction, "shifted": args.shifted} if args.distraction != "none" else {}
    words = ["data/collect.py", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    words += ["--bodies"] if args.bodies else []
    return Path(args.data_dir) / args.source / args.task / f"{args.dataset}-{size}px{suffix}", words


def open_dataset(args, size: int) -> Dataset:
    """The set that args.task, .dataset, .source, .data_dir, .transitions and .data_seed name: a standard one at `size`
    pixels, made on the spot if it is missing, or the path of one of any size. Raises UserError that lists what there
    is."""
    if args.dataset not in NAMED_SETS:
        return Dataset(args.dataset)
    folder, words = standard_set(args, size)
    if not (folder / "meta.json").exists():
        how = shlex.join(["python", *words]) if args.source == "made" else "python data/vd4rl.py import --help"
        if args.source != "made" or not (HERE / words[0]).exists():
            there = ", ".join(sorted(str(meta.parent) for meta in Path(args.data_dir).glob("*/*/*/meta.json")))
            raise UserError(f"{folder} does not exist (there are: {there or 'none'}). In a full checkout: {how}")
        print(f"{folder} is missing: making it. Interrupt at any time, the same command continues.", flush=True)
        with subprocess.Popen([sys.executable, str(HERE / words[0]), *words[1:]]) as maker:
            before = signal.signal(signal.SIGTERM, lambda number, _: maker.send_signal(number))
        signal.signal(signal.SIGTERM, before)
        if status := maker.returncode:  # it has said why; -15: SIGTERM
            raise SystemExit(status if status > 0 else 128 - status)
    return Dataset(folder)


class Buffer:
    """What both samplers share: every image row of a set, in the memory map or on the GPU if they fit (buffer_device
    auto); and a generator, which checkpoints keep. Episodes of fewer rows than `flag` needs are not used."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, device, buffer_device, flag: str, needed: int):
        good = (np.abs(dataset.action) <= 1 + 1e-6).all(1) & np.isfinite(dataset.reward)
        good &= (dataset.discount >= 0) & (dataset.discount <= 1)
        if not good.all():
            raise UserError(f"{dataset.path}: row {good.argmin()} is not finite or out of range: data/vd4rl.py check")
        if (short := int((dataset.lengths < needed).sum())) == dataset.num_episodes:
            raise UserError(f"{dataset.path}: no episode is long enough for {flag}")
        if short:
            print(f"note: {short} of {dataset.num_episodes} episodes in {dataset.path} are too short for {flag}")
        self.batch_size, self.action_dim, self.device = batch_size, dataset.action_dim, torch.device(device)
        with warnings.catch_warnings(action="ignore"):  # torch notes that the map is read-only: nothing writes to it
            self.images = [torch.from_numpy(image) for image in dataset.images]
        self.on_gpu = self.device.type == "cuda" and buffer_device != "cpu"
        if self.on_gpu and buffer_device == "auto":  # benchmark.sh says how many runs begin on one GPU together
            room = 0.6 * torch.cuda.mem_get_info(self.device)[0] / int(os.environ.get("CLEANPIXELS_RUNS_PER_GPU", 1))
            self.on_gpu = sum(image.numel() for image in self.images) < room
        if self.on_gpu:
            self.images = [image.to(self.device) for image in self.images]
        self.generator = torch.Generator().manual_seed(seed)

    def frames(self, rows: Tensor) -> Tensor:
        """rows (n,) int64, grouped by image file, in the files' order -> (n, 3, S, S) uint8. Any other order is an
        IndexError: within its file a row would be negative, or beyond the end."""
        source = self.images[0]
        starts = np.cumsum([0, *map(len, self.images)]).tolist()
        cuts = [0, *(int((rows < start).sum()) for start in starts[1:-1]), len(rows)]  # between the files' rows
        rows = rows.to(source.device)
        out = torch.empty((len(rows), *source.shape[1:]), dtype=torch.uint8, device=source.device,
                          pin_memory=self.device.type == "cuda" and not self.on_gpu)  # fmt: skip
        for image, start, low, high in zip(self.images, starts, cuts[:-1], cuts[1:]):
            torch.index_select(image, 0, rows[low:high] - start, out=out[low:high])
        return out.to(self.device, non_blocking=True)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])


class Batch(NamedTuple):
    """obs, next_obs (B, 3 * frame_stack, S, S) uint8; action (B, A), reward and discount (B, 1) float32.

    reward: sum over k = 1..n of gamma^(k-1) reward[t+k], up to a terminal. discount: gamma^n, and 0 where a terminal
    lies inside."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_obs: Tensor | None


class TransitionBuffer(Buffer):
    """Uniform samples of n-step transitions, with replacement, from every complete window of a set.

    Frames are stored once and stacked as they are gathered: the rows before an episode's first are its first, so no
    stack and no window crosses episodes. A batch is sorted by row, to be read fast: a half of it is no random half."""

    def __init__(self, dataset: Dataset, batch_size: int, frame_stack: int = 3, nstep: int = 1, gamma: float = 0.99,
                 seed: int = 0, device="cpu", buffer_device: str = "cpu", next_obs: bool = True):  # fmt: skip
        super().__init__(dataset, batch_size, seed, device, buffer_device, f"--nstep {nstep}", nstep + 1)
        self.frame_stack, self.nstep, self.next_obs = frame_stack, nstep, next_obs
        self.obs_shape = (3 * frame_stack, dataset.size, dataset.size)
        windows = np.maximum(dataset.lengths - nstep, 0)  # T - n + 1 starts in T + 1 rows: all n rewards must exist
        offset = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)  # t within the episode
        rows = np.repeat(dataset.first_rows, windows) + offset  # obs of window w ends at image rows[w]
        # row:       t        t+1       t+2       t+3         arrival rows, n = 3
        # image:     obs                          next_obs
        # action:             action
        # reward:             r0   +  g r1   +  g^2 r2        later rewards only while no terminal came before
        total, factor = np.zeros(len(rows)), np.ones(len(rows))
        for k in range(1, nstep + 1):
            total += factor * dataset.reward[rows + k]
            factor *= gamma * dataset.discount[rows + k]
        columns = dataset.action[rows + 1], total[:, None].astype(np.float32), factor[:, None].astype(np.float32)
        self.action, self.reward, self.factor = (torch.from_numpy(column).to(self.device) for column in columns)
        self.rows, self.offset = torch.from_numpy(rows), torch.from_numpy(offset)

    def sample(self, index: Tensor | None = None) -> Batch:
        """index: windows (B,) int64, in rising order, in place of random ones."""
        if index is None:
            index = torch.randint(len(self.rows), (self.batch_size,), generator=self.generator).sort().values
        rows, offset, index = self.rows[index], self.offset[index], index.to(self.device)
        obs = self.stacked(rows, offset)
        next_obs = self.stacked(rows + self.nstep, offset + self.nstep) if self.next_obs else None
        return Batch(obs, self.action[index], self.reward[index], self.factor[index], next_obs)

    def stacked(self, rows: Tensor, offset: Tensor) -> Tensor:
        """rows (B,), the `offset`-th of their episodes -> frames (B, 3 * frame_stack, S, S) uint8, oldest first."""
        back = torch.arange(self.frame_stack - 1, -1, -1, device=rows.device)
        rows = rows[:, None] - torch.minimum(back, offset[:, None])
        return self.frames(rows.flatten()).view(len(rows), *self.obs_shape)


class Sequences(NamedTuple):
    """image (B, T, 3, S, S) uint8 or None; action (B, T, A), reward, discount (B, T) float32; is_first (B, T) bool;
    row (B, T) int64, of the set.

    Arrival rows: action[:, t] led to image[:, t], which came with reward[:, t] and discount[:, t]. is_first: a window's
    first row, before which nothing is known, and an episode's, where action and reward are 0. Sorted by row."""

    image: Tensor | None
    action: Tensor
    reward: Tensor
    discount: Tensor
    is_first: Tensor
    row: Tensor


class SequenceBuffer(Buffer):
    """Windows of `length` rows that lie in one episode: an episode drawn uniformly, then one of its starts, with
    replacement. Every row of an episode that is long enough is in some window, the last one too.
    action (N, A), reward, discount, is_first (N,): of all rows; lengths (E,): rows per episode."""

    def __init__(self, dataset: Dataset, batch_size: int, length: int, seed: int = 0, device="cpu",
                 buffer_device: str = "cpu"):  # fmt: skip
        super().__init__(dataset, batch_size, seed, device, buffer_device, f"--window {length}", length)
        self.length = length
        columns = dataset.action, dataset.reward, dataset.discount
        self.action, self.reward, self.discount = (torch.tensor(column).to(self.device) for column in columns)
        self.is_first = torch.zeros(len(self.reward), dtype=torch.bool, device=self.device)
        self.is_first[torch.tensor(dataset.first_rows)] = True
        self.set_lengths(torch.from_numpy(dataset.lengths))

    def set_lengths(self, lengths: Tensor) -> None:
        """Rows of every episode (E,), one after another: what is drawn from."""
        usable = lengths >= self.length
        self.lengths, self.first_rows = lengths, (lengths.cumsum(0) - lengths)[usable]
        self.starts = lengths[usable] - self.length + 1  # per episode

    def sample(self, images: bool = True, row: Tensor | None = None) -> Sequences:
        """images=False leaves them out, for what is computed from `row` instead. row: windows (B, T) int64, each within
        an episode, in rising order, in place of random ones."""
        if row is None:
            episode = torch.randint(len(self.starts), (self.batch_size,), generator=self.generator)
            part = torch.rand(self.batch_size, generator=self.generator, dtype=torch.float64)
            start = self.first_rows[episode] + (part * self.starts[episode]).long()
            row = start.sort().values[:, None] + torch.arange(self.length)
        image = self.frames(row.flatten()).unflatten(0, row.shape) if images else None
        row = row.to(self.device)
        is_first = self.is_first[row]  # a copy
        is_first[:, 0] = True
        return Sequences(image, self.action[row], self.reward[row], self.discount[row], is_first, row)


# ==== Runs ====

Count = Annotated[int, (1, math.inf)]  # types of flags: the number, and the smallest and largest it may be
Whole = Annotated[int, (0, 2**31)]
Weight = Annotated[float, (0, math.inf)]
Rate = Annotated[float, (1e-9, 1)]
Share = Annotated[float, (0, 1)]

FREE_FLAGS = {"data_dir", "runs_dir", "log_every", "buffer_device", "overwrite", "evaluate"}  # may differ on resume
EVALUATE_FLAGS = FREE_FLAGS | {"eval_episodes", "device", "precision"}  # beside --evaluate
READ = {"config.json": {"algo": str, "script": str, "args": dict, "typed": dict, "dataset": dict, "resumed": list},
        "checkpoint.pt": {"step": int, "wall_s": float, "objects": dict, "sizes": dict}}  # fmt: skip
EVAL_SEED = 1_000_000  # evaluation episode i starts from seed EVAL_SEED + i, in every run and at every step
CHECKPOINT_SECONDS = 300.0
for name in ("stdout", "stderr"):
    if getattr(sys, name) is None:  # whoever started this process closed it
        setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
with contextlib.suppress(AttributeError):  # a notebook's stdout has no such method
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what the terminal's encoding does not
BAR_SECONDS = 1 if sys.stderr.isatty() else 30  # between lines of a progress bar


def one_line_errors(kind, error, trace) -> None:
    """sys.excepthook: what a user can mend ends the process with one line."""
    if isinstance(error, OSError):
        error = UserError(f"{error.filename or kind.__name__}: {error.strerror or error}")
    known = "state_dict|out of memory|allocate memory|home directory"  # other networks, a large batch, a ~nobody
    if isinstance(error, RuntimeError) and re.search(known, str(error)):
        error = UserError(" ".join(str(error).split())[:300])
    if isinstance(error, UserError | KeyboardInterrupt):
        print(f"error: {error}" if isinstance(error, UserError) else "interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def parse_args(args_class, tuned: dict, quick: dict):
    """The command line as an `args_class`, see typed_args, with device and precision found out. From here on a
    UserError ends the process with its one line."""
    sys.excepthook = one_line_errors
    args, cuda = typed_args(args_class, tuned, quick), torch.cuda.is_available()
    if args.device == "auto":
        args.device = "cuda" if cuda else "cpu"
    if args.device == "cuda" and not cuda or args.buffer_device == "cuda" and args.device == "cpu":
        raise UserError(f"--device {args.device} --buffer-device {args.buffer_device}: there is no CUDA device here")
    if args.precision == "auto":  # bf16 where it is native: emulation is slower than fp32
        native = " avx512_bf16" in CPU_INFO or " amx_bf16" in CPU_INFO
        native = torch.cuda.get_device_capability() >= (8, 0) if args.device == "cuda" else native
        args.precision = "bf16" if native else "fp32"
    return args


def typed_args(args_class, tuned: dict, quick: dict, argv: list[str] | None = None):
    """A command line (default: this process's) as an `args_class`; a copy of it as it is now is its .typed.

    Defaults: the class, then `tuned` and under --quick also `quick`: (task, dataset) -> flags, the more exact key
    later; what the user typed wins. Under --evaluate RUN: the run's own flags. Raises UserError for a bad one."""
    import tyro

    config, merged = (tyro.conf.FlagCreatePairsOff,), {}
    first, _ = tyro.cli(args_class, args=argv, config=config, add_help=False, return_unknown_args=True)
    own = first.dataset not in NAMED_SETS and not first.evaluate
    if first.evaluate == "":
        raise UserError("--evaluate: no folder is named")
    if own and not (first.dataset and Path(first.dataset).is_dir()):
        raise UserError(f"--dataset {first.dataset}: neither one of {', '.join(NAMED_SETS)} nor a folder")
    task = Dataset(first.dataset).task if own else first.task
    suite = task.partition("-")[0] + "-*"  # metaworld-*
    for table in (tuned, quick) if first.quick else (tuned,):
        for key in (("*", "*"), ("*", first.dataset), (suite, "*"), (task, "*"), (task, first.dataset)):
            merged |= table.get(key, {})
    if own or first.source != "made" or task.startswith("kitchen-"):
        merged.pop("transitions", None)  # such sets are used whole
    if first.evaluate:
        run, algo = read(f"{first.evaluate}/config.json"), Path(sys.modules[args_class.__module__].__file__).stem
        if run["algo"] != algo:
            raise UserError(f"--evaluate {first.evaluate} is a run of {run['algo']}.py, not of {algo}.py")
        merged = {name: run["args"].get(name, value) for name, value in dataclasses.asdict(args_class()).items()}
        merged |= {"device": "auto", "precision": "auto", "buffer_device": "auto"}
    default, text = dataclasses.replace(args_class(), **merged), sys.modules[args_class.__module__].__doc__
    args = tyro.cli(args_class, args=argv, default=default, config=config, description=text)
    check_ranges(args)
    idle = [name for name in merged if getattr(args, name) != merged[name] and name not in EVALUATE_FLAGS]
    if first.evaluate and idle:
        raise UserError(f"--evaluate: --{idle[0].replace('_', '-')} would change nothing, the run's own flags count")
    args.eval_every = None if first.evaluate else args.eval_every
    for flag, name in {"tag": args.tag, "task": task}.items():  # they become folders
        if not re.fullmatch(r"([\w-][\w.-]*)?", name):
            raise UserError(f"--{flag} {name}: letters, digits, - and _")
    if args.shifted != 100 and args.distraction == "none":
        raise UserError(f"--shifted {args.shifted}: needs a --distraction")
    made = args.transitions or args.data_seed or args.bodies or args.distraction != "none"
    if made and (own or args.source != "made"):
        flags = "--transitions, --data-seed, --distraction, --shifted, --bodies"
        raise UserError(f"{flags}: only standard sets that are made here have these")
    if own and first.task not in (task, args_class().task):
        raise UserError(f"--task {first.task}: {first.dataset} is of task {task}")
    if own:
        args.task, args.dataset = task, str(Path(args.dataset).resolve())
    args.data_dir = str(Path(args.data_dir or os.environ.get("CLEANPIXELS_DATA") or HERE / "datasets").expanduser())
    args.runs_dir = str(Path(args.runs_dir or HERE / "runs").expanduser())
    args.typed = dataclasses.asdict(args)
    return args


def check_ranges(args) -> None:
    """Raises UserError for a number out of the range that its flag's type names: Count, Share ..."""
    for name, hint in typing.get_type_hints(type(args), include_extras=True).items():
        for kind in (hint, *typing.get_args(hint)):
            for low, high in getattr(kind, "__metadata__", ()):
                if (value := getattr(args, name)) is not None and not low <= value <= high:
                    raise UserError(f"--{name.replace('_', '-')} {value}: from {low} to {high}")


def evaluation_pool(args, facts: dict, frame_stack: int = 3) -> EnvPool | None:
    """The environments to evaluate in, rendered as the data was; None where --eval-every is 0. facts: of a Dataset."""
    if args.eval_every == 0:
        return None
    wanted = f"{facts['set']} is of task {facts['task']} with {facts['action_dim']} action dimensions"
    if facts["task"] == "own":
        raise UserError(f"{wanted}: there is none to evaluate in; train with --eval-every 0")
    groups = None
    if facts.get("variation"):
        try:
            from variations import evaluation_groups

            groups = evaluation_groups(facts["variation"], args.eval_episodes)
        except (ImportError, ValueError) as error:  # a folder of backgrounds is gone
            raise UserError(f"{wanted}, with {facts['variation']}: {error}; --eval-every 0 trains without") from None
        print(f"evaluation: {', '.join(groups)}; the data: {facts['variation']}")
    pool = EnvPool(facts["task"], facts["size"], args.eval_episodes, frame_stack, facts["render"], groups=groups)
    if pool.spec["action_dim"] != facts["action_dim"]:
        raise UserError(f"{wanted}, not {pool.spec['action_dim']}; train with --eval-every 0")
    if facts["mujoco"] not in (None, importlib.metadata.version("mujoco")):
        print(f"warning: the data was rendered with mujoco {facts['mujoco']}, another than is installed here")
    return pool


def run_folder(args, algo: str, set_name: str, source: str) -> Path:
    """<runs_dir>/[quick/]<algo>/<task>/<set>[-vd4rl]/[<tag>-]seed<k>"""
    base = Path(args.runs_dir, "quick") if args.quick else Path(args.runs_dir)
    official, tag = "-vd4rl" if source == "vd4rl" else "", f"{args.tag}-" if args.tag else ""
    return base / algo / args.task / f"{set_name}{official}" / f"{tag}seed{args.seed}"


class Run:
    """A run's folder: lock, configuration, copies of the code, metrics, checkpoint. Seeds torch's generator, which
    weights and losses draw from; a buffer has its own.

    The same command continues what is there. Raises UserError where that has other flags, data or code, or where
    another process runs in it; SystemExit(0) where it is finished. log_due, eval_due, checkpoint_due: see advance()."""

    def __init__(self, args, dataset: Dataset):
        script = Path(sys.modules["__main__"].__file__).resolve()
        self.args, self.code, self.stop_signal = args, [script, HERE / "common.py"], 0
        if args.task.startswith(MANIPULATION):
            self.code.append(HERE / "manipulation.py")
        if dataset.facts()["variation"]:
            self.code.append(HERE / "variations.py")
        self.path = run_folder(args, script.stem, dataset.path.name, dataset.source)
        self.config = {"algo": script.stem, "script": hashlib.sha256(script.read_bytes()).hexdigest()[:12]}
        self.config |= {"dataset": dataset.facts(), "typed": args.typed, "resumed": []}
        if args.steps == 0:
            raise UserError("no updates are asked for: there is nothing to do")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.path / ".lock")
        try:
            self.lock.acquire(timeout=0.3)  # benchmark.sh looks at a lock by taking it for an instant
        except filelock.Timeout:
            raise UserError(f"{self.path} is in use by another process") from None
        self.checkpoint = self.path / "checkpoint.pt"
        finished = (self.path / "finished.json").exists() and not args.overwrite
        self.resumes = self.checkpoint.exists() and not args.overwrite
        if finished or self.resumes:
            self.compare(read(self.path / "config.json"), finished)
        if finished:
            print(f"{self.path} is finished; --evaluate it, or --overwrite")
            raise SystemExit(0)
        torch.manual_seed(args.seed)

    def compare(self, old: dict, finished: bool) -> None:
        """Raises UserError where this command is not the one that began the run. --steps may grow until it is over.
        --precision auto keeps the run's own."""
        if self.args.typed["precision"] == "auto":
            self.args.precision = old["args"].get("precision")
        flags = {name: value for name, value in dataclasses.asdict(self.args).items() if name not in FREE_FLAGS}
        pairs = {f"--{name.replace('_', '-')}": (old["args"].get(name), value) for name, value in flags.items()}
        if "steps" in flags and not finished and old["args"].get("steps", 0) < self.args.steps:
            del pairs["--steps"]
        pairs["data"] = old["dataset"].get("hash"), self.config["dataset"]["hash"]
        pairs[f"{self.code[0].name} (diff it with the copy there)"] = old["script"], self.config["script"]
        if changed := [f"{name} {was} -> {now}" for name, (was, now) in pairs.items() if was != now]:
            listed = ", ".join(changed)
            raise UserError(f"{self.path} holds another run: {listed}. Give this one a --tag, or --overwrite")

    def begin(self, **objects) -> int:
        """Begins the run, or puts its checkpoint back into `objects` and cuts the metrics that came after it. Returns
        the step, 0 for a new run. From here on SIGTERM and Ctrl-C ask for a checkpoint."""
        saved, here = {"step": 0, "wall_s": 0.0, "sizes": {}}, provenance(self.args.device)
        config = self.config | here
        if self.args.overwrite:  # not earlier: most of what can be wrong with a command has shown by now
            for pattern in ("finished.json", "*.pt", "*.csv", "*.mp4"):
                for file in self.path.glob(pattern):
                    file.unlink()
        if self.resumes:
            saved, config = read(self.checkpoint), read(self.path / "config.json")
            config["resumed"].append(here)
            for name, thing in objects.items():
                thing.load_state_dict(saved["objects"][name])
            torch.set_rng_state(saved["torch"])
            if "cuda" in saved and self.args.device == "cuda":
                torch.cuda.set_rng_state(saved["cuda"])
            print(f"continuing {self.path} at step {saved['step']}")
        for file in self.path.glob("*.csv"):
            size = min(saved["sizes"].get(file.name, 0), file.stat().st_size)  # smaller: after a power cut
            os.truncate(file, size) if size else file.unlink()
        if not self.resumes:
            for file in self.code:
                write_atomically(self.path / file.name, file.read_bytes())
        config["args"] = dataclasses.asdict(self.args)
        write_atomically(self.path / "config.json", json.dumps(config, indent=1).encode())
        self.saved, self.columns = time.monotonic(), {}
        self.begun = self.saved - saved["wall_s"]  # as if all had been one process
        self.bar = tqdm(total=self.args.steps, initial=saved["step"], unit="update", mininterval=BAR_SECONDS)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self.on_signal)
        return saved["step"]

    def on_signal(self, number: int, _) -> None:
        self.stop_signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        text = b"\nstopping after this update or evaluation, with a checkpoint (Ctrl-C: at once)\n"
        os.write(2, text)  # print may be mid-line

    def advance(self, step: int) -> None:
        """Once after every update: moves the progress bar and decides what is due. Evaluations: 20 a run, and at its
        end. Checkpoints: at every evaluation (also where --eval-every is 0), every five minutes, when asked to stop.
        Metrics: every --log-every, and before every checkpoint: none is written after one that is not finite."""
        self.bar.set_description(None, refresh=False)
        self.bar.update(1)
        every = self.args.eval_every or -(-self.args.steps // 20)
        self.eval_due = step % every == 0 or step == self.args.steps
        late = time.monotonic() - self.saved > CHECKPOINT_SECONDS
        self.checkpoint_due = self.eval_due or late or bool(self.stop_signal)
        self.log_due = self.checkpoint_due or step % self.args.log_every == 0
        if self.eval_due and self.args.eval_every != 0:
            self.bar.set_description("evaluating")
            self.bar.last_print_n, self.bar.last_print_t = step, time.time()

    def log(self, part: str, step: int, metrics: dict) -> None:
        """Appends a row to <part>.csv; a list spreads over numbered columns. Raises UserError that names metrics which
        are not finite."""
        row = {"step": step, "wall_s": round(time.monotonic() - self.begun, 1)}
        for name, value in metrics.items():
            row |= {f"{name}_{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        if bad := [name for name, value in row.items() if not math.isfinite(value)]:
            raise UserError(f"{', '.join(bad)} not finite at step {step}; {self.path} keeps the checkpoint before")
        if self.columns.setdefault(part, list(row)) != list(row):
            raise UserError(f"{self.path}/{part}.csv has other columns: log the same metrics every time")
        with open(self.path / f"{part}.csv", "a", newline="") as file:
            csv.writer(file).writerows([row, row.values()] if file.tell() == 0 else [row.values()])
        if part == "eval":
            self.bar.unpause()  # its updates per second leave evaluations out
            success = f", success {row['success']:.0f} %" if "success" in row else ""
            self.bar.write(f"step {step}: score {row['score']:.1f}{success}")
        else:
            self.bar.set_postfix({n: f"{v:.3g}" for n, v in row.items() if n.endswith("loss")}, refresh=False)

    def save_checkpoint(self, step: int, **objects) -> None:
        """Writes state_dict() of all `objects`, torch's generators and the sizes of the CSV files, whole or not at all.

        At the last step it ends the run: weights.pt and finished.json instead. After SIGTERM or Ctrl-C it raises
        SystemExit."""
        states, wall_s = {k: thing.state_dict() for k, thing in objects.items()}, time.monotonic() - self.begun
        if step == self.args.steps:
            summary = json.dumps({"steps": step, "wall_s": round(wall_s, 1)})
            weights = {name: value for name, value in states["agent"].items() if torch.is_tensor(value)}
            weights["_extra_state"] = {}  # no optimisers
            write_atomically(self.path / "weights.pt", weights)
            write_atomically(self.path / "finished.json", summary.encode())
            self.checkpoint.unlink(missing_ok=True)
            self.bar.close()
            print(f"finished: {summary}\nin {self.path}")
            return
        state = {"step": step, "wall_s": wall_s, "objects": states, "torch": torch.get_rng_state()}
        state["sizes"] = {file.name: file.stat().st_size for file in self.path.glob("*.csv")}
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state()
        write_atomically(self.checkpoint, state)
        self.saved = time.monotonic()
        if self.stop_signal:
            self.bar.close()
            print(f"stopped at step {step} with a checkpoint; the same command (without --overwrite) continues")
            raise SystemExit(128 + self.stop_signal)


def load_run(args) -> tuple[dict, dict]:
    """Facts of the data, and weights, of the finished run that --evaluate names; its flags are `args` already."""
    return read(f"{args.evaluate}/config.json")["dataset"], read(f"{args.evaluate}/weights.pt")


def read(file: str | Path) -> dict:
    """A config.json, or what torch.save wrote, with what READ names. Raises UserError that names the file."""
    try:
        weights = Path(file).suffix == ".pt"
        content = torch.load(file, "cpu", weights_only=True) if weights else json.loads(Path(file).read_text())
        return content | {name: kind(content[name]) for name, kind in READ.get(Path(file).name, {}).items()}
    except Exception as error:  # pickle, zip, torch and JSON errors have no base class in common
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{file} is missing or damaged ({problem}): an unfinished run, or a folder to delete") from None


def accelerate(agent, args) -> None:
    """--accelerate compile: the methods named in agent.LOSSES under torch.compile, which draws its random numbers from
    another stream. Either way: settings of torch and of the allocator that change no number beyond rounding."""
    if args.device == "cpu" and sys.platform == "linux":  # glibc: keep large freed blocks, else every update pays for
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # their page faults. M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    torch.backends.cudnn.benchmark = True  # the shapes never change
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"  # else fp32 would round what convolutions multiply
    if args.accelerate == "compile":
        for loss in agent.LOSSES:
            setattr(agent, loss, torch.compile(getattr(agent, loss), fullgraph=True, dynamic=False))


def save_video(path: Path, frames: list[np.ndarray]) -> None:
    """frames: T arrays (3, S, S) uint8, played at 20 per second, 4 times enlarged. Says so where it cannot write."""
    try:
        import imageio.v2 as imageio

        large = [frame.transpose(1, 2, 0).repeat(4, 0).repeat(4, 1) for frame in frames]
        imageio.mimwrite(path, large, fps=20, macro_block_size=1)
        print(f"video: {path}")
    except Exception as error:  # imageio raises ValueError or RuntimeError where its ffmpeg is missing
        print(f"note: {path.name} was not written ({error})")


def write_atomically(path: Path, content) -> None:
    """Bytes, or what torch.save takes, to a file: whole or not at all. Raises UserError that names the file."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's, of a full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = getattr(error, "strerror", "not written, perhaps the disk is full")
        raise UserError(f"{path}: {reason}; what was complete before is kept") from None


def provenance(device: str) -> dict:
    """Command, commit (-dirty: a file has changed; empty outside a repository), versions and hardware."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    names = {"torch", "numpy", "mujoco", "dm_control", "metaworld", "gymnasium-robotics"}
    versions = {it.name: it.version for it in importlib.metadata.distributions() if it.name in names}
    cpu = re.search(r"model name\s*: (.*)|$", CPU_INFO)[1] or platform.machine()
    hardware = f"{torch.get_num_threads()} of {cores()} cores of {cpu}"
    hardware = torch.cuda.get_device_name() if device == "cuda" else hardware
    versions |= {"python": platform.python_version()}
    return {"command": shlex.join(sys.argv), "commit": commit, "versions": versions, "hardware": hardware}
