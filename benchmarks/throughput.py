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
import drq_bc  # noqa: E402
from store import DatasetWriter  # noqa: E402

import common  # noqa: E402
from common import Dataset, SequenceBuffer, TransitionBuffer, UserError  # noqa: E402

# V-D4RL's released code, measured on 2 cores of an AMD EPYC (Zen 5) and nowhere else.
RELEASED = {"drq_bc": 1.70, "bc": 1.18, "cql": 4.53}  # seconds per update, float32
RELEASED_WORLD = {("offline_dv2", "model"): 2.35, ("offline_dv2", "agent"): 0.80}  # seconds per update, 8 x 50 rows
RELEASED_BATCH, RELEASED_OPEN, RELEASED_MEMORY = 5.4, 3.0, 1500.0  # ms; s and MB to load 20,000 frames
NOTE = """ratio: other code / measured; above 1 means less time or memory here.
Other code: V-D4RL's released (updates in fp32), measured on 2 cores of an AMD EPYC (Zen 5) only: on any other hardware
the ratio compares machines as much as code. For rendering: dm_control's physics.render, measured here and now."""
TASKS = ("walker-walk", "cheetah-run", "humanoid-walk")
SIZE, ACTION_DIM, EPISODE = drq_bc.Args.image_size, 6, 500  # pixels; rows of a synthetic episode
PARTS = ("update", "world", "buffer", "open", "render")


@dataclass
class Args:
    repeats: common.Count = 5  # repetitions of each measurement; the median is printed
    only: tuple[Literal["update", "world", "buffer", "open", "render"], ...] = PARTS
    windows: common.Count | None = None  # of a world model's batch; None: 8 on a CPU, 64 (the papers') on a GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of updates and batches; auto: cuda if there is one
    precision: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")  # of updates; some CPUs emulate bf16, slowly
    accelerate: tuple[Literal["eager", "compile"], ...] = ("eager",)  # of updates
    json: str | None = None  # also write the table to this file
    quick: bool = False  # batches of 16, 1,000 frames, short repetitions: checks that everything runs

    @property
    def batch_size(self) -> int:
        return 16 if self.quick else 256


class Table:
    """Prints each row as it comes; keeps them for --json."""

    LINE = "{:10}{:46}{:>10} {:10}{:>12}{:>12}{:>8}"

    def __init__(self, quick: bool):
        self.rows, self.quick = [], quick
        print(self.LINE.format("part", "what", "measured", "unit", "per second", "other code", "ratio"))

    def add(self, part: str, what: str, value: float, unit: str, rate=None, other: float | None = None) -> None:
        """rate: so many per second; other: what other code needs, in the same unit."""
        ratio = other / value if other and not self.quick else None
        row = {"part": part, "what": what, "value": value, "unit": unit}
        self.rows.append(row | {"per_second": rate, "other": other, "ratio": ratio})
        cells = [f"{x:.{digits}g}" if x else "" for x, digits in ((rate, 4), (other, 4), (ratio, 3))]
        print(self.LINE.format(part, what, f"{value:.3g}", unit, *cells), flush=True)


def seconds_per_call(function: Callable, args: Args, device: str) -> float:
    """Median over the repetitions; each makes as many calls as fill a second, after five to warm up."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    timed(5)  # the first allocate or compile
    calls = math.ceil((0.01 if args.quick else 1.0) / timed(1))
    return statistics.median(timed(calls) for _ in range(args.repeats))


def alone(function: Callable, *arguments):
    """function(*arguments) in a fresh process, so that measurements share neither memory nor GL contexts."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_set(path: Path, rows: int, size: int) -> Dataset:
    """A set of noise in episodes of EPISODE rows."""
    rng = np.random.default_rng(0)
    with DatasetWriter(path, size, ACTION_DIM) as writer:
        for _ in range(rows // EPISODE):
            images = rng.integers(256, size=(EPISODE, size, size, 3), dtype=np.uint8)
            writer.add(images, rng.uniform(-1, 1, (EPISODE - 1, ACTION_DIM)), rng.uniform(size=EPISODE - 1))
    return Dataset(path)


# ==== Measurements ====


def calibrate(args: Args) -> float:
    encoder = drq_bc.Encoder(9, SIZE, drq_bc.Args.encoder_width).to(args.device)
    obs = torch.rand(256, 9, SIZE, SIZE, device=args.device) - 0.5
    with torch.no_grad():
        return seconds_per_call(lambda: encoder(obs), args, args.device)


def algorithms(args: Args, mark: str):
    """Files of algos/ in whose text `mark` stands, each in every precision and acceleration: name, module, flags."""
    for file in sorted((ROOT / "algos").glob("*.py")):
        if "class Agent" not in (text := file.read_text()) or mark not in text:
            continue
        for precision in args.precision:
            for how in args.accelerate:
                torch.compiler.reset()  # else the code of the agent before counts as a recompilation
                module = importlib.import_module(file.stem)
                flags = module.Args(device=args.device, precision=precision, accelerate=how)
                yield file.stem, module, flags


def measure_update(table: Table, args: Args, dataset: Dataset) -> None:
    for name, module, flags in algorithms(args, "TransitionBuffer("):
        flags.batch_size = args.batch_size
        returns = {"next_obs": False}  # behaviour cloning
        if hasattr(flags, "nstep"):
            returns = {"nstep": flags.nstep, "gamma": flags.gamma}
        buffer = TransitionBuffer(dataset, args.batch_size, module.FRAME_STACK, device=args.device,
                                  buffer_device="auto", **returns)  # fmt: skip
        agent = module.Agent(flags, buffer.obs_shape, buffer.action_dim).to(args.device)
        common.accelerate(agent, flags)
        noise = module.noise_std(flags, 0)
        value = seconds_per_call(lambda: agent.update(buffer.sample(), noise), args, args.device)  # noqa: B023
        other = RELEASED.get(name) if args.device == "cpu" else None
        table.add("update", f"{name}, {flags.precision}, {flags.accelerate}", value, "s/update", 1 / value, other)


def measure_world(table: Table, args: Args, dataset: Dataset) -> None:
    for name, module, flags in algorithms(args, "class WorldModel"):
        flags.batch_size = args.windows
        if args.quick:
            flags.window, flags.cnn_depth = 5, 4
        for phase, value in world_seconds(module, flags, args, dataset).items():
            known = args.device == "cpu" and args.windows == 8 and not args.quick
            other = RELEASED_WORLD.get((name, phase)) if known else None
            what = f"{name} {phase}, {args.windows} x {flags.window}, {flags.precision}, {flags.accelerate}"
            table.add("world", what, value, "s" if phase == "rollouts" else "s/update", 1 / value, other)


def world_seconds(module, flags, args: Args, dataset: Dataset) -> dict[str, float]:
    """Seconds per update of each phase, batches included. LOMPO's rollouts, every 200 agent updates, are a line apart.
    MOTO has one update, of model and agent."""
    buffer = SequenceBuffer(dataset, args.windows, flags.window, device=args.device, buffer_device="auto")
    agent = module.Agent(flags, buffer.action_dim).to(args.device)
    common.accelerate(agent, flags)
    if hasattr(agent, "update"):
        worth = torch.ones(args.windows, flags.window, device=args.device)
        calls = {"update": lambda: agent.update(buffer.sample(), worth)}
    else:
        calls = {"model": lambda: agent.update_model(buffer.sample())}
        embeds = agent.embed_set(buffer)
        if hasattr(module, "LatentBuffer"):
            latent = module.LatentBuffer(buffer, agent.model.feat_dim)
            module.refill(agent, latent, embeds, 0)
            calls["agent"] = lambda: agent.update_agent(latent.sample(flags.agent_batch_size))
            calls["rollouts"] = lambda: module.refill(agent, latent, embeds, flags.rollout_every)
        else:

            def update_agent():
                batch = buffer.sample(images=False)
                agent.update_agent(batch, embeds[batch.row])

            calls["agent"] = update_agent
    return {phase: seconds_per_call(call, args, args.device) for phase, call in calls.items()}


def measure_buffer(table: Table, args: Args, dataset: Dataset) -> None:
    for device in dict.fromkeys(("cpu", args.device)):
        buffer = TransitionBuffer(dataset, args.batch_size, nstep=3, device=device, buffer_device="auto")
        value = seconds_per_call(buffer.sample, args, device)
        other = RELEASED_BATCH if device == "cpu" else None
        table.add("buffer", f"{args.batch_size} transitions, {device}", value * 1e3, "ms/batch", 1 / value, other)


def measure_open(table: Table, args: Args, path: Path) -> None:
    for what, with_buffer in (("Dataset", False), ("Dataset and TransitionBuffer", True)):
        costs = [alone(open_cost, path, with_buffer) for _ in range(args.repeats)]
        seconds, memory = (statistics.median(column) for column in zip(*costs))
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
            table.add("render", f"{task}, {quality}", value, "ms/frame", 1e3 / value, plain)
    for task in TASKS:
        value = alone(pool_seconds, task, args) * 1e3
        table.add("render", f"{task}, EnvPool, {common.cores()} workers, fast", value, "ms/frame", 1e3 / value)


def render_seconds(task: str, renderer: str, args: Args) -> float:
    """Seconds per frame: the median repetition's mean. The states are the same for each renderer."""
    if renderer == "physics.render":
        os.environ["MUJOCO_GL"] = common.gl_backend()
        simulator = common.DMCSimulator(task)  # without a camera of ours: no context but dm_control's own exists
        render = partial(simulator.env.physics.render, SIZE, SIZE, camera_id=0)
    else:
        env = common.make_env(task, SIZE, frame_stack=1, render=renderer)
        simulator, render = env.simulator, env.frame
    simulator.reset(seed=0)
    rng, repetitions = np.random.default_rng(0), []
    for _ in range(args.repeats + 1):  # the first warms up
        spent = []
        for _ in range(5 if args.quick else 100):
            if simulator.step(rng.uniform(-1, 1, simulator.action_dim))[3]:  # the episode is over
                simulator.reset(seed=0)
            start = time.perf_counter()
            frame = render()
            spent.append(time.perf_counter() - start)
        assert frame.std() > 0, f"{task}, {renderer}: an empty frame"
        repetitions.append(statistics.mean(spent))
    return statistics.median(repetitions[1:])


def pool_seconds(task: str, args: Args) -> float:
    """Seconds per frame of an EnvPool with one environment per core: action repeat, rendering and pipes."""
    count = common.cores()
    pool, rng, repetitions = common.EnvPool(task, SIZE, count), np.random.default_rng(0), []
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
    common.check_ranges(args)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise common.UserError("--device cuda: there is no CUDA device here")
    if args.json and not Path(args.json).parent.is_dir():  # it is written last
        raise common.UserError(f"--json {args.json}: there is no such folder")
    if args.windows is None:
        args.windows = 2 if args.quick else 64 if args.device == "cuda" else 8
    flags = drq_bc.Args(device=args.device, precision="fp32", accelerate="eager")
    common.accelerate(None, flags)  # torch's and the allocator's settings of every run
    facts = common.provenance(args.device)
    print(f"{facts['hardware']}; {torch.get_num_threads()} torch threads; device {args.device}; "
          + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))  # fmt: skip
    if args.quick:
        print("REHEARSAL (--quick): tiny shapes and few repetitions; compare none of these numbers")
    facts |= {"calibration_s": calibrate(args), "device": args.device, "quick": args.quick, "repeats": args.repeats}
    milliseconds = f"{facts['calibration_s'] * 1e3:.4g} ms"
    print(f"calibration: {milliseconds} per forward pass of the DrQ encoder, 256 observations, fp32\n")
    table = Table(args.quick)
    with tempfile.TemporaryDirectory() as folder:
        if {"update", "buffer", "open"} & {*args.only}:
            dataset = write_set(Path(folder, "noise-84px"), 1_000 if args.quick else 20_000, SIZE)
        if "update" in args.only:
            measure_update(table, args, dataset)
        if "world" in args.only:
            measure_world(table, args, write_set(Path(folder, "noise-64px"), 1_000 if args.quick else 5_000, 64))
        if "buffer" in args.only:
            measure_buffer(table, args, dataset)
        if "open" in args.only:
            measure_open(table, args, dataset.path)
    if "render" in args.only:
        measure_render(table, args)
    print(NOTE)
    if args.json:
        Path(args.json).write_text(json.dumps(facts | {"rows": table.rows}, indent=1) + "\n")


if __name__ == "__main__":
    import tyro

    sys.excepthook = common.one_line_errors
    main(tyro.cli(Args))
