"""Makes a set: V-D4RL's recipe (arXiv:2206.04779 Section 4), rendered here instead of downloaded.

    python data/collect.py --task walker-walk --dataset medium              # 100K transitions, 84 px, 2.1 GB
    python data/collect.py --task cheetah-run --dataset medexp --size 64    # medium and expert, two folders
    python data/collect.py --task walker-walk --dataset mixed --stats-only  # the returns, without rendering
    python data/collect.py --task metaworld-drawer-open --dataset demos --size 64   # 10 demonstrations, for moto.py

random: uniform actions. medium, expert: actions sampled from the actors in data/policies/<task>/. medexp: both of
these, joined by hard links. mixed: the first transitions of the SAC replay, re-simulated from its recorded
actions; a full physics state every 50 steps keeps the last bits of another processor from adding up. demos:
successful episodes of Meta-World's scripted policies, as in MOTO (2401.03306), going on after success.
Every episode is a function of (set, seed, episode index) alone: not of --workers, --size or an interruption."""

import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "data")]
import store  # noqa: E402
from published import print_statistics, standard_transitions  # noqa: E402

import common  # noqa: E402
from common import BAR_SECONDS, Count, Dataset, EnvPool, UserError, Weight, Whole, check_ranges, cores  # noqa: E402

POLICIES = Path(__file__).resolve().parent / "policies"
PARTS = ("medium", "expert")  # of medexp
EPISODE, STATE_EVERY, GRID = 500, 50, 32767  # as in train_sac.py
DEMO_STEPS = 100  # of a Meta-World episode


@dataclass
class Args:
    task: str = "walker-walk"  # random: dm_control's or metaworld-*; demos: metaworld-*; else one of data/policies/
    dataset: Literal["random", "mixed", "medium", "medexp", "expert", "demos", "partial"] = "medium"
    size: Count = 84  # pixels per side: 84 for bc, drq_bc, cql; 64 for the world models
    transitions: Count | None = None  # None: the published size, 100,000 in most sets, 1,000 of demos
    seed: Whole = 0  # of initial states and sampled actions
    workers: Count | None = None  # processes; None: one per core
    render: Literal["fast", "reference"] = "fast"  # fast: 2.3x the frames per second, nearly the same pixels
    data_dir: str | None = None  # None: $CLEANPIXELS_DATA, else datasets/ beside common.py
    stats_only: bool = False  # run the physics alone and print the return statistics
    action_noise: Weight = 0.0  # of demos: standard deviation of Gaussian noise on the actions; a set of its own


def problem_of(args: Args) -> str:
    """Why there is no set of these flags, in one line; "" if it can be made."""
    name, what = args.dataset, f"--task {args.task} --dataset {args.dataset}"
    if args.task.startswith("kitchen-"):
        if args.task != f"kitchen-{name}" or name not in ("mixed", "partial") or args.transitions or args.seed:
            return f"{what}: there are kitchen-mixed mixed and kitchen-partial partial, whole and without a seed"
        words = ["python", "data/minari_kitchen.py", "--dataset", name, "--size", str(args.size)]
        words += ["--data-dir", args.data_dir] if args.data_dir else []
        return f"{what}: render Minari's set, which is fetched: {shlex.join(words)}"
    if name == "partial" or args.task.startswith("adroit-"):
        return f"{what}: no such set is made; record one with data/store.py, see data/README.md"
    if name == "demos" and not args.task.startswith("metaworld-"):
        return f"{what}: there are scripted policies for metaworld-<task> alone"
    if args.action_noise and name != "demos":
        return f"--action-noise {args.action_noise}: of --dataset demos alone"
    if name == "mixed" and args.seed:
        return f"--seed {args.seed}: mixed is one recorded replay; its seed cannot be chosen"
    parts, steps = PARTS if name == "medexp" else (name,), episode_length(args.task)
    shipped = [part for part in parts if part not in ("random", "demos")]
    if missing := [part for part in shipped if not policy_file(args.task, part).exists()]:
        there = ", ".join(f"{file.parent.name} {file.stem}" for file in sorted(POLICIES.glob("*/*.npz"))) or "none"
        train = f"random needs none; to train one: python data/train_sac.py --task {args.task}, then --export"
        return f"{what}: no {missing[0]} policy of this task is shipped (there are: {there}). {train}"
    if args.transitions is not None and args.transitions < steps * len(parts):
        return f"--transitions {args.transitions}: at least one episode of {steps}{' of each part' * (len(parts) - 1)}"
    return ""


class UniformPolicy:
    """Actions uniform in [-1, 1]."""

    def __init__(self, action_dim: int):
        self.action_dim = action_dim

    def act(self, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(-1, 1, self.action_dim).astype(np.float32)


class SACPolicy:
    """The stochastic actor of train_sac.py in NumPy, one state at a time: the same bits in any batch."""

    def __init__(self, path: Path):
        with np.load(path) as arrays:
            self.scale = arrays["scale"]
            self.layers = [(arrays[f"W{i}"], arrays[f"b{i}"]) for i in range(3)]

    def act(self, state: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """state (D,) -> sampled action (A,) float32 on the 16-bit grid; the mean action where rng is None."""
        x = state / self.scale
        for i, (weight, bias) in enumerate(self.layers):
            x = x @ weight + bias
            x = np.maximum(x, 0) if i < 2 else x
        mean, log_std = np.split(x, 2)
        std = np.exp(-5 + 3.5 * (1 + np.tanh(log_std)))
        noise = rng.standard_normal(len(mean), np.float32) if rng else 0
        action = np.tanh(mean + std * noise)
        return np.rint(action * GRID).astype(np.float32) / np.float32(GRID)


class ScriptedPolicy:
    """Meta-World's own policy for a task, with Gaussian noise of deviation `noise` on its actions."""

    def __init__(self, task: str, noise: float):
        from metaworld.policies import ENV_POLICY_MAP

        warnings.filterwarnings("ignore", module="metaworld.policies")  # that it clips actions, as we do
        self.policy, self.noise = ENV_POLICY_MAP[f"{task.removeprefix('metaworld-')}-v3"](), noise

    def act(self, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        action = self.policy.get_action(state.astype(np.float64))
        if self.noise:
            action = action + self.noise * rng.standard_normal(len(action))
        return np.clip(action, -1, 1).astype(np.float32)


def policy_file(task: str, name: str) -> Path:
    return POLICIES / task / f"{name}.npz"


def rng_of(name: str, seed: int, episode: int) -> np.random.Generator:
    """The generator of one episode: its reset seed is its first draw, its actions are the rest."""
    return np.random.default_rng([zlib.crc32(name.encode()), seed, episode])


class Sampled:
    """Episodes of a policy that acts on states. chosen: the numbers of the episodes, which name their generators."""

    def __init__(self, policy, name: str, seed: int, chosen):
        self.policy, self.name, self.seed, self.chosen = policy, name, seed, chosen

    def start(self, pool: EnvPool, episodes: list[int]) -> None:
        self.rngs = [rng_of(self.name, self.seed, self.chosen[episode]) for episode in episodes]
        pool.reset([rng.integers(2**31) for rng in self.rngs])

    def actions(self, pool: EnvPool, episodes: list[int], t: int) -> np.ndarray:
        return np.stack([self.policy.act(info["state"], rng) for info, rng in zip(pool.infos, self.rngs)])


class Recorded:
    """Episodes of mixed.npz, evenly spaced; seed (E,), action (E, T, A) int16, physics (E, T / 50, n), ret (E,)."""

    def __init__(self, task: str, total: int):
        with np.load(policy_file(task, "mixed")) as arrays:
            self.seeds, self.grid, self.physics, self.ret = (arrays[k] for k in ("seed", "action", "physics", "ret"))
        if total > len(self.seeds):
            raise UserError(f"--transitions: the recorded replay holds {len(self.seeds) * EPISODE:,}")
        self.chosen = ((np.arange(total) + 0.5) * len(self.seeds) / total).astype(int)

    def start(self, pool: EnvPool, episodes: list[int]) -> None:
        pool.reset([self.seeds[self.chosen[episode]] for episode in episodes])

    def actions(self, pool: EnvPool, episodes: list[int], t: int) -> np.ndarray:
        if t % STATE_EVERY == 0:
            pool.call(set_state, [(self.physics[self.chosen[episode], t // STATE_EVERY],) for episode in episodes])
        return np.stack([self.grid[self.chosen[e], t] for e in episodes]).astype(np.float32) / np.float32(GRID)


def get_state(env) -> np.ndarray:
    """Everything that the next steps of an Env depend on, (n,) float64."""
    import mujoco

    kind, model = mujoco.mjtState.mjSTATE_INTEGRATION, env.simulator.model
    state = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, env.simulator.data, state, kind)
    return state


def set_state(env, state: np.ndarray) -> None:
    """Puts back a state of get_state(); the step count of the episode stays."""
    import mujoco

    kind, model = mujoco.mjtState.mjSTATE_INTEGRATION, env.simulator.model
    mujoco.mj_setState(model, env.simulator.data, state, kind)
    mujoco.mj_step1(model, env.simulator.data)  # what dm_control computes after a step


def source_of(args: Args, name: str, total: int, action_dim: int) -> Sampled | Recorded:
    if name == "mixed":
        return Recorded(args.task, total)
    if name == "demos":
        policy = ScriptedPolicy(args.task, args.action_noise)
        return Sampled(policy, name, args.seed, successful_episodes(args, policy, total))
    policy = UniformPolicy(action_dim) if name == "random" else SACPolicy(policy_file(args.task, name))
    return Sampled(policy, name, args.seed, range(total))


def successful_episodes(args: Args, policy: ScriptedPolicy, total: int) -> list[int]:
    """The first `total` episodes of a scripted policy that come to a success, found without rendering."""
    env, chosen, first, tried = common.make_env(args.task, size=None), [], [], 0
    while len(chosen) < total:
        rng = rng_of("demos", args.seed, tried)
        info, solved = env.reset(int(rng.integers(2**31)))[1], []
        for _ in range(DEMO_STEPS):
            info = env.step(policy.act(info["state"], rng))[-1]
            solved.append(info["success"])
        if any(solved):
            chosen.append(tried)
            first.append(solved.index(True) + 1)
        tried += 1
        if tried == 20 + 10 * total and len(chosen) < total:
            raise UserError(f"--task {args.task}: {len(chosen)} of {tried} scripted episodes succeed")
    print(f"{total} of the first {tried} scripted episodes succeed, first after {np.mean(first):.1f} actions")
    return chosen


def collect(args: Args, name: str, transitions: int, folder: Path) -> np.ndarray:
    """Makes one set, or under --stats-only its returns alone. Returns the episode returns (E,)."""
    steps = episode_length(args.task)
    total = -(-transitions // steps)
    if args.stats_only:
        return rollouts(args, name, total, None)
    if not (folder / "meta.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        needed = total * (steps + 1) * 3 * args.size**2 - sum(f.stat().st_size for f in folder.glob("*.npy"))
        sizes = f"{needed / 1e9:.2f} GB, the disk has {shutil.disk_usage(folder.parent).free / 1e9:.2f} GB free"
        print(f"{folder}: {total} episodes, {sizes}; {args.workers or cores()} workers")
        if needed > shutil.disk_usage(folder.parent).free:
            raise UserError(f"{folder} needs {sizes}; give another --data-dir or fewer --transitions")
        rollouts(args, name, total, folder)
    meta = Dataset(folder).meta
    if meta["render"] != args.render or meta.get("recipe") != recipe_of(args, name, total):
        raise UserError(f"{folder} was made with another --render or another policy; delete it to make it again")
    return np.array(meta["episode_returns"])


def episode_length(task: str) -> int:
    return DEMO_STEPS if task.startswith("metaworld-") else EPISODE


def recipe_of(args: Args, name: str, episodes: int) -> dict:
    shipped = name not in ("random", "demos")
    policy = zlib.crc32(policy_file(args.task, name).read_bytes()) if shipped else None
    recipe = {"seed": args.seed, "episodes": episodes, "action_repeat": 2, "policy": policy}
    if args.task.startswith("metaworld-"):
        from manipulation import METAWORLD_CAMERA

        recipe |= {"camera": {"corner2": list(METAWORLD_CAMERA), "rotated": 180}, "shadows": args.render == "reference"}
    if args.action_noise:
        recipe["action_noise"] = args.action_noise
    return recipe


def rollouts(args: Args, name: str, total: int, folder: Path | None) -> np.ndarray:
    """All episodes of a set, one per environment at a time; written in order where `folder` is given."""
    count = min(total, args.workers or cores())
    pool = EnvPool(args.task, args.size if folder else None, count, frame_stack=1, render=args.render)
    source = source_of(args, name, total, action_dim := pool.spec["action_dim"])
    if folder is None:
        returns = np.array([rewards.sum() for _, _, rewards in episodes_of(source, pool, range(total), args)])
    else:
        mujoco = importlib.metadata.version("mujoco")
        facts = {"render": args.render, "mujoco": mujoco, "recipe": recipe_of(args, name, total)}
        with store.DatasetWriter(folder, args.size, action_dim, args.task, "made", **facts) as writer:
            if writer.episodes:
                print(f"continuing after {writer.episodes} episodes")
            for episode in episodes_of(source, pool, range(total if writer.complete else writer.episodes, total), args):
                writer.add(*episode)
        returns = np.array(json.loads((folder / "meta.json").read_text())["episode_returns"])
    if isinstance(source, Recorded):
        error = np.abs(returns - source.ret[source.chosen])
        wrong = int((error > 0.1).sum())
        note = "DIFFER from the record (another processor rounds differently)" if wrong else "as recorded"
        print(f"re-simulated returns {note}; largest difference {error.max():.2f}, above 0.1 in {wrong} episodes")
    pool.close()
    return returns


def episodes_of(source, pool: EnvPool, episodes: range, args: Args):
    """Yields frames (T+1, S, S, 3), actions (T, A), rewards (T,) of each episode, in order."""
    steps, begun = episode_length(args.task), time.monotonic()
    with tqdm(total=len(episodes) * steps, unit="step", mininterval=BAR_SECONDS) as bar:
        for first in range(episodes.start, episodes.stop, pool.count):
            batch = list(range(first, min(first + pool.count, episodes.stop)))
            real = len(batch)
            batch += [batch[-1]] * (pool.count - real)  # the last round repeats an episode and drops it
            source.start(pool, batch)
            frames, actions, rewards = [pool.obs], [], []
            for t in range(steps):
                actions.append(source.actions(pool, batch, t))
                obs, reward, _ = pool.step(actions[-1])
                frames.append(obs)
                rewards.append(reward)
                if pool.done.any() and t < steps - 1:
                    raise UserError(f"--task {args.task}: episodes end before {steps} steps; no set is made of it")
                bar.update(real)
            for i in range(real):
                images = np.stack([obs[i] for obs in frames])
                images = images.transpose(0, 2, 3, 1) if images.ndim == 4 else None
                yield images, np.stack([a[i] for a in actions]), np.array([r[i] for r in rewards])
            if first == episodes.start and (left := len(episodes) - real):
                minutes = (time.monotonic() - begun) * left / real / 60
                bar.write(f"as fast as the first {real}: about {minutes:.1f} min for the other {left} episodes")


def join(path: Path, sets: list[Dataset]) -> None:
    """Writes the set of all episodes of `sets`. Their frames are linked, which takes no space, or else copied."""
    path.mkdir(parents=True, exist_ok=True)
    with store.take_lock(path / ".lock", wait=True), store.plain_errors(path):
        if (path / "meta.json").exists():  # another process has made it
            return
        for file in path.glob("*.npy"):
            file.unlink()
        for i, part in enumerate(sets):
            frames = (part.path / "image.npy").resolve(), path / f"image-{i}.npy"
            try:
                os.link(*frames)
            except OSError:  # another disk, or one that knows no links
                shutil.copyfile(*frames)
        names = {"action": "action", "reward": "reward", "discount": "discount", "episode": "first_rows"}
        rows = {name: [getattr(part, attribute) for part in sets] for name, attribute in names.items()}
        rows["episode"][1] = rows["episode"][1] + len(rows["reward"][0])
        for name, parts in rows.items():
            np.save(path / f"{name}.npy", np.concatenate(parts))
        recipe = {part.meta["name"]: part.meta["recipe"] for part in sets}
        store.write_meta(path, sets[0].meta | {"name": path.name, "recipe": recipe})


def main(args: Args) -> None:
    noise = f"-noise{args.action_noise:g}" if args.action_noise else ""
    check_ranges(args)
    if problem := problem_of(args):
        raise UserError(problem)

    def folder(name: str, transitions: int | None) -> Path:
        return store.set_folder(args.data_dir, "made", args.task, name + noise, args.size, transitions, args.seed)

    def make(name: str, transitions: int | None) -> np.ndarray:
        total = transitions or standard_transitions(args.task, name)
        return collect(args, name, total, folder(name, transitions))

    if args.dataset == "medexp":
        each = None if args.transitions is None else -(-args.transitions // 2)
        returns = np.concatenate([make(name, each) for name in PARTS])
        if not args.stats_only:
            join(folder("medexp", args.transitions), [Dataset(folder(name, each)) for name in PARTS])
    else:
        returns = make(args.dataset, args.transitions)
    print_statistics(args.task, args.dataset, store.return_statistics(returns), "made", len(returns))


if __name__ == "__main__":
    import tyro

    sys.excepthook = common.one_line_errors
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in order: workers end first
    main(tyro.cli(Args))
