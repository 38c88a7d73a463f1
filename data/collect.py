"""Makes a set: V-D4RL's recipe (arXiv:2206.04779 Section 4), rendered here instead of downloaded.

    python data/collect.py --task walker-walk --dataset medium              # 100K transitions, 84 px, 2.1 GB
    python data/collect.py --task cheetah-run --dataset medexp --size 64    # medium and expert, two folders
    python data/collect.py --task walker-walk --dataset mixed --stats-only  # the returns, without rendering
    python data/collect.py --task metaworld-drawer-open --dataset demos --size 64   # 10 demonstrations, for moto.py

random: uniform actions. medium, expert: actions sampled from the actors in data/policies/<task>/. medexp: both of
these, listed by a meta.json. mixed: the first transitions of the SAC replay, re-simulated from its recorded
actions; a full physics state every 50 steps keeps the last bits of another processor from adding up. demos:
successful episodes of Meta-World's scripted policies, as in MOTO (2401.03306), going on after success.
Every episode is a function of (set, seed, episode index) alone: not of --workers, --size or an interruption."""

import json
import os
import shutil
import sys
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))
from common import (  # noqa: E402
    DatasetWriter,
    EnvPool,
    UserError,
    cores,
    default_data_dir,
    lock_file,
    make_env,
    one_line_errors,
    progress_bar,
    read_meta,
    return_statistics,
    set_folder,
    standard_transitions,
    versions,
    write_atomically,
)

POLICIES = Path(__file__).resolve().parent / "policies"
PARTS = ("medium", "expert")  # of medexp
EPISODE, STATE_EVERY, GRID = 500, 50, 32767  # as in train_sac.py
DEMO_STEPS = 100  # of a Meta-World episode

# V-D4RL Table 5: mean, std, min, P25, median, P75, max of the episode returns.
TABLE_5 = {
    ("walker-walk", "random"): (42.3, 8.7, 30.0, 34.9, 41.3, 46.8, 74.6),
    ("walker-walk", "mixed"): (144.5, 155.9, 10.9, 44.3, 69.4, 162.4, 604.9),
    ("walker-walk", "medium"): (439.6, 48.4, 176.2, 423.1, 445.5, 466.7, 538.0),
    ("walker-walk", "medexp"): (704.1, 267.7, 176.2, 445.5, 538.0, 969.1, 990.6),
    ("walker-walk", "expert"): (969.8, 12.4, 909.2, 963.9, 969.1, 979.5, 990.6),
    ("cheetah-run", "random"): (6.6, 2.6, 1.1, 4.7, 6.3, 8.4, 16.3),
    ("cheetah-run", "mixed"): (191.2, 144.6, 2.5, 48.3, 191.9, 303.4, 473.8),
    ("cheetah-run", "medium"): (523.8, 25.5, 325.3, 509.1, 524.2, 538.3, 578.3),
    ("cheetah-run", "medexp"): (707.0, 184.9, 325.3, 524.2, 578.3, 894.1, 905.7),
    ("cheetah-run", "expert"): (891.1, 11.2, 843.0, 886.9, 894.2, 898.5, 905.7),
    ("humanoid-walk", "random"): (1.1, 0.8, 0.0, 0.5, 1.0, 1.5, 5.7),
    ("humanoid-walk", "mixed"): (275.7, 176.1, 0.0, 93.7, 341.7, 423.1, 529.0),
    ("humanoid-walk", "medium"): (573.0, 16.7, 526.5, 560.6, 572.9, 584.9, 609.4),
    ("humanoid-walk", "medexp"): (715.9, 146.1, 526.5, 572.9, 620.6, 877.4, 889.8),
    ("humanoid-walk", "expert"): (858.1, 42.4, 631.8, 846.4, 877.6, 885.5, 889.8),
}
# MOTO Table 1: mean return of the demonstrations, all of which succeed.
MOTO_TABLE_1 = {
    "metaworld-assembly": 36.0, "metaworld-bin-picking": 20.9, "metaworld-box-close": 25.3,
    "metaworld-coffee-push": 36.2, "metaworld-disassemble": 31.6, "metaworld-door-open": 15.2,
    "metaworld-drawer-open": 48.0, "metaworld-hammer": 63.3, "metaworld-plate-slide": 71.1,
    "metaworld-window-open": 60.5,
}  # fmt: skip


@dataclass
class Args:
    task: str = "walker-walk"  # random: dm_control's or metaworld-*; demos: metaworld-*; else one of data/policies/
    dataset: Literal["random", "mixed", "medium", "medexp", "expert", "demos"] = "medium"
    size: int = 84  # pixels per side: 84 for bc, drq_bc, cql; 64 for the world models
    transitions: int | None = None  # None: the published size, 100,000 in most sets, 1,000 of demos
    seed: int = 0  # of initial states and sampled actions
    workers: int | None = None  # processes; None: one per core
    render: Literal["fast", "reference"] = "fast"  # fast: 2.3x the frames per second, nearly the same pixels
    data_dir: str | None = None  # None: $CLEANPIXELS_DATA, else datasets/ beside common.py
    stats_only: bool = False  # run the physics alone and print the return statistics
    action_noise: float = 0.0  # of demos: standard deviation of Gaussian noise on the actions; a set of its own


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


def policy_file(task: str, name: str) -> Path:
    path = POLICIES / task / f"{name}.npz"
    if not path.exists():
        files = sorted(POLICIES.glob("*/*.npz"))
        there = ", ".join(f"{file.parent.name} {file.stem}" for file in files) or "none"
        raise UserError(
            f"--dataset {name}: no policy is shipped for {task} (there are policies for {there}). random needs none; "
            f"train one with python data/train_sac.py --task {task}, then --export"
        )
    return path


def rng_of(name: str, seed: int, episode: int) -> np.random.Generator:
    """The generator of one episode: its reset seed is its first draw, its actions are the rest."""
    return np.random.default_rng([zlib.crc32(name.encode()), seed, episode])


class Sampled:
    """Episodes of a policy that acts on states."""

    def __init__(self, args: Args, name: str, total: int, pool: EnvPool):
        action_dim = pool.call("action_size", [()] * pool.count)[0]
        self.policy = UniformPolicy(action_dim) if name == "random" else SACPolicy(policy_file(args.task, name))
        self.name, self.seed, self.action_dim = name, args.seed, action_dim

    def start(self, pool: EnvPool, episodes: list[int]) -> None:
        self.rngs = [rng_of(self.name, self.seed, episode) for episode in episodes]
        pool.reset([rng.integers(2**31) for rng in self.rngs])

    def actions(self, pool: EnvPool, episodes: list[int], t: int) -> np.ndarray:
        return np.stack([self.policy.act(info["state"], rng) for info, rng in zip(pool.infos, self.rngs)])


class Demonstrated:
    """Those episodes of a scripted policy that come to a success. Which ones, the physics alone has shown before."""

    def __init__(self, args: Args, name: str, total: int, pool: EnvPool):
        if not args.task.startswith("metaworld-"):
            raise UserError(f"--dataset demos: there are scripted policies for metaworld-<task>, not for {args.task}")
        self.action_dim = pool.call("action_size", [()] * pool.count)[0]
        from metaworld.policies import ENV_POLICY_MAP

        warnings.filterwarnings("ignore", module="metaworld.policies")  # that it clips actions, as we do
        self.policy = ENV_POLICY_MAP[f"{args.task.removeprefix('metaworld-')}-v3"]()
        self.name, self.seed, self.noise = name, args.seed, args.action_noise
        env, self.chosen, first, tried = make_env(args.task, size=None), [], [], 0
        while len(self.chosen) < total:
            rng = rng_of(name, args.seed, tried)
            info, solved = env.reset(int(rng.integers(2**31)))[1], []
            for _ in range(DEMO_STEPS):
                info = env.step(self.act(info["state"], rng))[-1]
                solved.append(info["success"])
            if any(solved):
                self.chosen.append(tried)
                first.append(solved.index(True) + 1)
            tried += 1
            if tried == 20 + 10 * total and len(self.chosen) < total:
                raise UserError(f"--task {args.task}: {len(self.chosen)} of {tried} scripted episodes succeed")
        print(f"{total} of the first {tried} scripted episodes succeed, first after {np.mean(first):.1f} actions")

    def act(self, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        action = self.policy.get_action(state.astype(np.float64))
        if self.noise:
            action = action + self.noise * rng.standard_normal(len(action))
        return np.clip(action, -1, 1).astype(np.float32)

    def start(self, pool: EnvPool, episodes: list[int]) -> None:
        self.rngs = [rng_of(self.name, self.seed, self.chosen[e]) for e in episodes]
        pool.reset([int(rng.integers(2**31)) for rng in self.rngs])

    def actions(self, pool: EnvPool, episodes: list[int], t: int) -> np.ndarray:
        return np.stack([self.act(info["state"], rng) for info, rng in zip(pool.infos, self.rngs)])


class Recorded:
    """Episodes of mixed.npz: seed (E,), action (E, T, A) int16, physics (E, T / 50, n), ret (E,)."""

    def __init__(self, args: Args, name: str, total: int, pool: EnvPool):
        if args.seed:
            raise UserError("--seed: mixed is one recorded replay; its seed cannot be chosen")
        with np.load(policy_file(args.task, name)) as arrays:
            self.seeds, self.grid, self.physics, self.ret = (arrays[k] for k in ("seed", "action", "physics", "ret"))
        count = len(self.seeds)
        if total > count:
            raise UserError(f"--transitions: the recorded replay holds {count * EPISODE:,}")
        # evenly spaced; all of them if total = count
        self.chosen = ((np.arange(total) + 0.5) * count / total).astype(int)
        self.action_dim = self.grid.shape[-1]

    def start(self, pool: EnvPool, episodes: list[int]) -> None:
        pool.reset([self.seeds[self.chosen[e]] for e in episodes])

    def actions(self, pool: EnvPool, episodes: list[int], t: int) -> np.ndarray:
        if t % STATE_EVERY == 0:
            pool.call("set_state", [(self.physics[self.chosen[e], t // STATE_EVERY],) for e in episodes])
        return np.stack([self.grid[self.chosen[e], t] for e in episodes]).astype(np.float32) / np.float32(GRID)


def collect(args: Args, name: str, transitions: int, folder: Path) -> np.ndarray:
    """Makes one set, or under --stats-only its returns alone. Returns the episode returns (E,)."""
    total = -(-transitions // episode_length(args.task))
    if args.stats_only:
        return rollouts(args, name, total, None)
    if not (folder / "meta.json").exists():
        steps = episode_length(args.task)
        needed = total * (steps + 1) * 3 * args.size**2
        workers = args.workers or cores()
        print(f"{folder}: {total} episodes, {needed / 1e9:.2f} GB, {workers} workers; "
              f"about {total * steps / 130 / workers / 60:.0f} min without a GPU")  # fmt: skip
        folder.parent.mkdir(parents=True, exist_ok=True)
        missing = needed - sum(f.stat().st_size for f in folder.glob("*.npy"))
        free = shutil.disk_usage(folder.parent).free
        if missing > free:
            sizes = f"{missing / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free"
            raise UserError(f"{folder} needs {sizes}; give another --data-dir or fewer --transitions")
        rollouts(args, name, total, folder)
    meta = read_meta(folder)
    if meta["render"] != args.render or meta["recipe"] != recipe_of(args, name, total):
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
    workers = args.workers or cores()
    pool = EnvPool(args.task, args.size if folder else None, min(total, workers), frame_stack=1, render=args.render)
    source = {"mixed": Recorded, "demos": Demonstrated}.get(name, Sampled)(args, name, total, pool)
    if folder is None:
        returns = np.array([rewards.sum() for _, _, rewards in episodes_of(source, pool, range(total), args)])
    else:
        facts = {"render": args.render, "mujoco": versions()["mujoco"], "recipe": recipe_of(args, name, total)}
        with DatasetWriter(folder, args.size, source.action_dim, args.task, "made", **facts) as writer:
            if not writer.complete:
                if writer.episodes:
                    print(f"continuing after {writer.episodes} episodes")
                for frames, actions, rewards in episodes_of(source, pool, range(writer.episodes, total), args):
                    writer.add(frames, actions, rewards)
        returns = np.array(read_meta(folder)["episode_returns"])
    if isinstance(source, Recorded):
        error = np.abs(returns - source.ret[source.chosen])
        wrong = int((error > 0.1).sum())
        note = "DIFFER from the record (another processor rounds differently)" if wrong else "as recorded"
        print(f"re-simulated returns {note}; largest difference {error.max():.2f}, above 0.1 in {wrong} episodes")
    pool.close()
    return returns


def episodes_of(source, pool: EnvPool, episodes: range, args: Args):
    """Yields frames (T+1, S, S, 3), actions (T, A), rewards (T,) of each episode, in order."""
    steps = episode_length(args.task)
    bar = progress_bar(len(episodes) * steps, 0, "step")
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
                raise UserError(
                    f"--task {args.task}: its episodes end before {steps} steps; no set is made of such tasks"
                )
            bar.update(real)
        for i in range(real):
            images = np.stack([obs[i] for obs in frames])
            images = images.transpose(0, 2, 3, 1) if images.ndim == 4 else None
            yield images, np.stack([a[i] for a in actions]), np.array([r[i] for r in rewards])
    bar.close()


def print_statistics(task: str, name: str, returns: np.ndarray) -> None:
    ours = return_statistics(returns)
    published = "MOTO's Table 1" if task in MOTO_TABLE_1 else "V-D4RL's Table 5"
    print(f"{task} {name}: {len(returns)} episodes, returns beside {published}")
    print("        " + "".join(f"{key:>8}" for key in ours))
    print("   made " + "".join(f"{value:8.1f}" for value in ours.values()))
    if (task, name) in TABLE_5:
        print("  paper " + "".join(f"{value:8.1f}" for value in TABLE_5[task, name]))
    if name == "demos" and task in MOTO_TABLE_1:
        print(f"  paper {MOTO_TABLE_1[task]:8.1f}")


def main(args: Args) -> None:
    args.data_dir = args.data_dir or default_data_dir()
    start = time.time()
    least = episode_length(args.task) * (2 if args.dataset == "medexp" else 1)
    if args.transitions is not None and args.transitions < least:
        each = " of each part" if args.dataset == "medexp" else ""
        raise UserError(f"--transitions {args.transitions}: at least one episode of {episode_length(args.task)}{each}")

    if args.action_noise < 0 or args.action_noise and args.dataset != "demos":
        raise UserError(f"--action-noise {args.action_noise}: 0 or more, and of --dataset demos alone")
    noise = f"-noise{args.action_noise:g}" if args.action_noise else ""

    def folder(name, transitions):
        return set_folder(args.data_dir, "made", args.task, name + noise, args.size, transitions, args.seed)

    if args.dataset == "medexp":
        each = None if args.transitions is None else args.transitions // 2
        returns = np.concatenate(
            [collect(args, name, each or standard_transitions(args.task, name), folder(name, each)) for name in PARTS]
        )
        if not args.stats_only:
            path = folder("medexp", args.transitions)
            path.mkdir(parents=True, exist_ok=True)
            with lock_file(path / ".lock", wait=f"another process is writing {path}; waiting for it"):
                parts = [os.path.relpath(folder(name, each), path) for name in PARTS]
                meta = {"format": 1, "name": "medexp", "parts": parts, "returns": return_statistics(returns)}
                write_atomically(path / "meta.json", json.dumps(meta, indent=1))
    else:
        transitions = args.transitions or standard_transitions(args.task, args.dataset)
        returns = collect(args, args.dataset, transitions, folder(args.dataset, args.transitions))
    print_statistics(args.task, args.dataset, returns)
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    import tyro

    sys.excepthook = one_line_errors
    main(tyro.cli(Args))
