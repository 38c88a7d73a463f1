"""Prints how fast each part runs on this machine, one row per measurement, each the median of --repeats repetitions.

    python benchmarks/throughput.py                           # everything; on two CPU cores about 10 minutes
    python benchmarks/throughput.py --only update buffer --accelerate eager compile
    python benchmarks/throughput.py --quick                   # rehearsal: tiny shapes, its numbers mean nothing

calibration  one float32 forward pass of the DrQ encoder on 256 observations: compares two machines
update       buffer.sample() and update() of every file in algos/ that learns from a TransitionBuffer
world        the same for both phases of every file that has a world model: --windows of 50 rows, 64 px
buffer       256 stacked obs and next_obs, 3-step returns, frames in the page cache (and on the GPU)
open         a set of 20,000 frames made ready, in a process of its own
render       one 84 px frame, physics not counted; EnvPool: whole environment steps on all cores

Paper shapes: batch 256, 84 px, 3 frames, 6 action dimensions; world models 64 windows, on a CPU 8 by default."""

import argparse
import importlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "algos"), str(ROOT / "data")]
from store import DatasetWriter  # noqa: E402

from common import (  # noqa: E402
    CPU_INFO,
    Dataset,
    EnvPool,
    SequenceBuffer,
    TransitionBuffer,
    UserError,
    accelerate,
    cores,
    gl_backend,
    make_env,
    one_line_errors,
    provenance,
)

# V-D4RL's released code, measured on 2 cores of an AMD EPYC (Zen 5) and nowhere else.
RELEASED = {"drq_bc": 1.70, "bc": 1.18, "cql": 4.53}  # seconds per update, float32
RELEASED_WORLD = {("offline_dv2", "model"): 2.35, ("offline_dv2", "agent"): 0.80}  # seconds per update, 8 x 50 rows
RELEASED_BATCH, RELEASED_OPEN, RELEASED_MEMORY = 5.4, 3.0, 1500.0  # ms; s and MB to load 20,000 frames
NOTE = """ratio: other code / measured; above 1 means less time or memory here.
*: V-D4RL's released code (updates in fp32), measured on 2 cores of an AMD EPYC (Zen 5) only: on any other hardware
   the ratio compares machines as much as code. Without *: dm_control, measured here and now."""
TASKS = ("walker-walk", "cheetah-run", "humanoid-walk")
SIZE, ACTION_DIM, EPISODE = 84, 6, 500  # pixels; frames of a synthetic episode, its reset frame included


@dataclass
class Args:
    repeats: int = 5  # repetitions of each measurement; the median is printed
    only: tuple[Literal["update", "world", "buffer", "open", "render"], ...] = (
        "update", "world", "buffer", "open", "render",
    )  # fmt: skip
    windows: int | None = None  # of a world model's batch; None: 8 on a CPU, 64 (the papers') on a GPU
    device: str = "auto"  # of updates and batches. auto: cuda if there is one, else cpu
    accelerate: tuple[Literal["eager", "compile"], ...] = ("eager",)  # of updates
    json: str | None = None  # also write the table to this file
    quick: bool = False  # batches of 16, 1,000 frames, short repetitions: checks that everything runs

    @property
    def batch_size(self) -> int:
        return 16 if self.quick else 256

    @property
    def duration(self) -> float:
        """Seconds one repetition lasts at least."""
        return 0.01 if self.quick else 1.0


class Table:
    """Prints each row as it comes; keeps them for --json."""

    LINE = "{:10}{:46}{:>10} {:10}{:>12}{:>12}{:>8}"

    def __init__(self, quick: bool):
        self.rows, self.quick = [], quick
        print(self.LINE.format("part", "what", "measured", "unit", "per second", "other code", "ratio"))

    def add(self, part: str, what: str, value: float, unit: str, rate=None, other: float | None = None, mark="*"):
        """other: the same number of other code, measured on RELEASED's machine (mark "*") or just now ("")."""
        ratio = other / value if other and value and not self.quick else None
        row = {"part": part, "what": what, "value": value, "unit": unit, "per_second": rate}
        self.rows.append(row | {"other": other, "other_measured_here": mark == "", "ratio": ratio})
        texts = f"{rate or 0:.4g}", f"{other or 0:.4g}{mark}", f"{ratio or 0:.2f}"
        cells = [text if number else "" for text, number in zip(texts, (rate, other, ratio))]
        print(self.LINE.format(part, what, f"{value:.3g}", unit, *cells), flush=True)


def seconds_per_call(function: Callable, args: Args, device: str) -> float:
    """Median over the repetitions; each makes as many calls as fill args.duration, after three to warm up."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    timed(5)  # the first allocate or compile
    calls = math.ceil(args.duration / timed(1))
    return statistics.median(timed(calls) for _ in range(args.repeats))


def alone(function: Callable, *arguments):
    """function(*arguments) in a fresh process, so that measurements share neither memory nor GL contexts."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_set(path: Path, frames: int, size: int = SIZE) -> None:
    """A set of noise: `frames` image rows, episodes of EPISODE rows."""
    rng = np.random.default_rng(0)
    with DatasetWriter(path, size, ACTION_DIM) as writer:
        for _ in range(frames // EPISODE):
            images = rng.integers(256, size=(EPISODE, size, size, 3), dtype=np.uint8)
            writer.add(images, rng.uniform(-1, 1, (EPISODE - 1, ACTION_DIM)), rng.uniform(size=EPISODE - 1))


# ==== Measurements ====


def has_bf16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 natively (emulation is slower than float32)."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability() >= (8, 0)
    return " avx512_bf16" in CPU_INFO or " amx_bf16" in CPU_INFO


def calibrate(args: Args) -> float:
    encoder = importlib.import_module("drq_bc").Encoder(9, SIZE).to(args.device)
    obs = torch.rand(256, 9, SIZE, SIZE, device=args.device) - 0.5
    with torch.no_grad():
        return seconds_per_call(lambda: encoder(obs), args, args.device)


def measure_update(table: Table, args: Args, dataset: Dataset) -> None:
    precisions = ("fp32", "bf16") if has_bf16(args.device) else ("fp32",)
    for file in sorted((ROOT / "algos").glob("*.py")):
        text = file.read_text()
        if "class Agent" not in text or "TransitionBuffer(" not in text:
            continue  # a world model learns from sequences, with an update of another form
        for precision in precisions:
            for how in args.accelerate:
                value = update_seconds(file.stem, "next_obs=False" not in text, precision, how, args, dataset)
                other = RELEASED.get(file.stem) if args.device == "cpu" else None
                table.add("update", f"{file.stem}, {precision}, {how}", value, "s/update", 1 / value, other)
    if "bf16" not in precisions:
        print("            (no bf16: this hardware only emulates it)")


def update_seconds(algo: str, next_obs: bool, precision: str, how: str, args: Args, dataset: Dataset) -> float:
    module = importlib.import_module(algo)
    run_args = module.Args(device=args.device, precision=precision, accelerate=how, batch_size=args.batch_size)
    returns = {name: getattr(run_args, name) for name in ("nstep", "gamma") if hasattr(run_args, name)}
    buffer = TransitionBuffer(dataset, args.batch_size, device=args.device, buffer_device="auto", next_obs=next_obs,
                              **returns)  # fmt: skip
    torch.compiler.reset()  # else the code of the agent before counts as a recompilation
    agent = module.Agent(run_args, buffer.obs_shape, buffer.action_dim).to(args.device)
    accelerate(agent, run_args)
    schedule = (module.noise_std(run_args, 0),) if hasattr(module, "noise_std") else ()
    return seconds_per_call(lambda: agent.update(buffer.sample(), *schedule), args, args.device)


def measure_world(table: Table, args: Args, dataset: Dataset) -> None:
    for file in sorted((ROOT / "algos").glob("*.py")):
        if "class WorldModel" not in file.read_text():
            continue
        for precision in ("fp32", "bf16") if has_bf16(args.device) else ("fp32",):
            for how in args.accelerate:
                for phase, value in world_seconds(file.stem, precision, how, args, dataset).items():
                    known = args.device == "cpu" and args.windows == 8 and not args.quick
                    other = RELEASED_WORLD.get((file.stem, phase)) if known else None
                    what = f"{file.stem} {phase}, {args.windows} x {5 if args.quick else 50}, {precision}, {how}"
                    unit = "s" if phase == "rollouts" else "s/update"
                    table.add("world", what, value, unit, 1 / value, other)


def world_seconds(algo: str, precision: str, how: str, args: Args, dataset: Dataset) -> dict[str, float]:
    """Seconds per update of each phase, batches included. LOMPO's rollouts, every 200 agent updates, are a line apart.
    MOTO has one update, of model and agent."""
    module = importlib.import_module(algo)
    small = {"window": 5, "cnn_depth": 4} if args.quick else {}
    run_args = module.Args(device=args.device, precision=precision, accelerate=how, batch_size=args.windows, **small)
    buffer = SequenceBuffer(dataset, args.windows, run_args.window, device=args.device, buffer_device="auto")
    torch.compiler.reset()
    agent = module.Agent(run_args, buffer.action_dim).to(args.device)
    accelerate(agent, run_args)
    if hasattr(agent, "update"):
        worth = torch.ones(args.windows, run_args.window).to(args.device)
        return {"update": seconds_per_call(lambda: agent.update(buffer.sample(), worth), args, args.device)}
    found = {"model": seconds_per_call(lambda: agent.update_model(buffer.sample()), args, args.device)}
    embeds = agent.embed_set(buffer)

    def from_windows():
        batch = buffer.sample(images=False)
        return agent.update_agent(batch, embeds[batch.row])

    if hasattr(module, "LatentBuffer"):
        latent = module.LatentBuffer(buffer, agent.model.feat_dim)
        module.refill(agent, latent, embeds, 0)

        def from_latents():
            return agent.update_agent(latent.sample(run_args.agent_batch_size))

        found["agent"] = seconds_per_call(from_latents, args, args.device)
        again = partial(module.refill, agent, latent, embeds, run_args.rollout_every)
        found["rollouts"] = seconds_per_call(again, args, args.device)
    else:
        found["agent"] = seconds_per_call(from_windows, args, args.device)
    return found


def measure_buffer(table: Table, args: Args, dataset: Dataset) -> None:
    plain = argparse.Namespace(device="cpu", precision="fp32", accelerate="eager")
    accelerate(None, plain)  # settings of the allocator, as in every run on a CPU
    for device in dict.fromkeys(("cpu", args.device)):
        buffer = TransitionBuffer(dataset, args.batch_size, nstep=3, device=device, buffer_device="auto")
        value = seconds_per_call(buffer.sample, args, device)
        other = RELEASED_BATCH if device == "cpu" else None
        table.add("buffer", f"{args.batch_size} transitions, {device}", value * 1e3, "ms/batch", 1 / value, other)


def measure_open(table: Table, args: Args, path: Path) -> None:
    for what, with_buffer in (("Dataset", False), ("Dataset and TransitionBuffer", True)):
        runs = [alone(open_cost, path, with_buffer) for _ in range(args.repeats)]
        seconds, memory = (statistics.median(column) for column in zip(*runs))
        table.add("open", what, seconds, "s", other=RELEASED_OPEN)
        table.add("open", f"{what}: resident memory", memory, "MB", other=RELEASED_MEMORY)


def open_cost(path: Path, with_buffer: bool) -> tuple[float, float]:
    """Seconds, and growth of resident memory in MB (mapped pages of the files that were read count too)."""
    before, start = resident_mb(), time.perf_counter()
    dataset = Dataset(path)
    kept = TransitionBuffer(dataset, 256, nstep=3) if with_buffer else dataset
    cost = time.perf_counter() - start, resident_mb() - before
    del kept
    return cost


def resident_mb() -> float:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except FileNotFoundError:
        raise UserError("--only open: resident memory is read from /proc, which only Linux has") from None


def measure_render(table: Table, args: Args) -> None:
    os.environ["LP_NUM_THREADS"] = "0"  # Mesa renders in the calling thread, as in EnvPool's workers
    for task in TASKS:
        plain = alone(render_seconds, task, "physics.render", args) * 1e3
        table.add("render", f"{task}, dm_control's physics.render", plain, "ms/frame", 1e3 / plain)
        for quality in ("reference", "fast"):
            value = alone(render_seconds, task, quality, args) * 1e3
            table.add("render", f"{task}, {quality}", value, "ms/frame", 1e3 / value, plain, mark="")
    for task in TASKS:
        value = alone(pool_seconds, task, args) * 1e3
        table.add("render", f"{task}, EnvPool, {cores()} workers, fast", value, "ms/frame", 1e3 / value)


def render_seconds(task: str, renderer: str, args: Args) -> float:
    """Seconds per frame: the median repetition's mean. The states are the same for each renderer."""
    if renderer == "physics.render":
        os.environ["MUJOCO_GL"] = gl_backend()  # dm_control reads it as it is imported
        from dm_control import suite

        env = suite.load(*task.split("-"), task_kwargs={"random": 0})
        env.reset()
        render = partial(env.physics.render, SIZE, SIZE, camera_id=0)
    else:
        ours = make_env(task, SIZE, frame_stack=1, render=renderer)
        ours.reset(seed=0)
        env, render = ours.simulator.env, ours.frame
    rng, repetitions = np.random.default_rng(0), []
    for _ in range(args.repeats + 1):  # the first warms up
        spent = []
        for _ in range(5 if args.quick else 100):
            env.step(rng.uniform(-1, 1, env.action_spec().shape))
            start = time.perf_counter()
            frame = render()
            spent.append(time.perf_counter() - start)
        assert frame.std() > 0, f"{task}, {renderer}: an empty frame"
        repetitions.append(statistics.mean(spent))
    return statistics.median(repetitions[1:])


def pool_seconds(task: str, args: Args) -> float:
    """Seconds per frame of an EnvPool with one environment per core: action repeat, rendering and pipes."""
    count = cores()
    pool, rng, repetitions = EnvPool(task, SIZE, count), np.random.default_rng(0), []
    actions = rng.uniform(-1, 1, (5 if args.quick else 100, count, pool.spec["action_dim"]))
    for repetition in range(args.repeats + 1):  # the first warms up
        pool.reset(repetition * count + np.arange(count))
        start = time.perf_counter()
        for action in actions:
            pool.step(action)
        assert not pool.done.any() and pool.obs.std() > 0
        repetitions.append((time.perf_counter() - start) / (len(actions) * count))
    pool.close()
    return statistics.median(repetitions[1:])


def main(args: Args) -> None:
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: at least 1")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)
    if args.windows is None:
        args.windows = 2 if args.quick else 64 if args.device.startswith("cuda") else 8
    torch.backends.cudnn.allow_tf32 = False  # of the calibration; accelerate() sets it for the updates
    machine = provenance(args.device)
    print(f"{machine['hardware']}; device {args.device}; "
          + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()))  # fmt: skip
    if args.quick:
        print("REHEARSAL (--quick): tiny shapes and few repetitions; compare none of these numbers")
    calibration = calibrate(args)
    print(f"calibration: {calibration * 1e3:.4g} ms per forward pass of the DrQ encoder, 256 observations, fp32\n")
    table = Table(args.quick)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise-84px"
        if set(args.only) - {"render", "world"}:
            write_set(path, 1_000 if args.quick else 20_000)
        if "update" in args.only:
            measure_update(table, args, Dataset(path))
        if "world" in args.only:
            small = Path(folder) / "noise-64px"
            write_set(small, 1_000 if args.quick else 5_000, size=64)
            measure_world(table, args, Dataset(small))
        if "buffer" in args.only:
            measure_buffer(table, args, Dataset(path))
        if "open" in args.only:
            measure_open(table, args, path)
    if "render" in args.only:
        measure_render(table, args)
    print(NOTE)
    if args.json:
        facts = machine | {name: getattr(args, name) for name in ("device", "quick", "repeats")}
        facts |= {"calibration_s": calibration, "rows": table.rows}
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    import tyro

    sys.excepthook = one_line_errors
    main(tyro.cli(Args))
