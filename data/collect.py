"""Makes a set: V-D4RL's recipe (arXiv:2206.04779 Section 4), rendered here instead of downloaded.

    python data/collect.py --task walker-walk --dataset medium              # 100K transitions, 84 px, 2.1 GB
    python data/collect.py --task cheetah-run --dataset medexp --size 64    # medium and expert, two folders
    python data/collect.py --task walker-walk --dataset mixed --stats-only  # the returns, without rendering
    python data/collect.py --task metaworld-drawer-open --dataset demos --size 64   # 10 demonstrations, for moto.py
    python data/collect.py --task cheetah-run --dataset medexp --distraction low --shifted 50   # or --bodies

random: uniform actions. medium, expert: actions sampled from the actors in data/policies/<task>/. medexp, ranexp:
medium and expert, random and expert, joined by hard links. mixed: the first transitions of the SAC replay, re-simulated
from its recorded actions; a full physics state every 50 steps keeps rounding from adding up. demos:
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
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "data")]
import store  # noqa: E402
from collectors import GRID, POLICIES, SACPolicy, ScriptedPolicy, UniformPolicy, policy_file  # noqa: E402
from published import print_statistics, standard_transitions  # noqa: E402

import common  # noqa: E402
import variations  # noqa: E402
from common import BAR_SECONDS, Count, Dataset, EnvPool, UserError, Weight, Whole, check_ranges, cores  # noqa: E402

PARTS = {"medexp": ("medium", "expert"), "ranexp": ("random", "expert")}
EPISODE, STATE_EVERY, DEMO_STEPS = 500, 50, 100  # the first two as in train_sac.py; steps of a Meta-World episode


@dataclass
class Args:
    task: str = "walker-walk"  # random: dm_control's or metaworld-*; demos: metaworld-*; else one of data/policies/
    dataset: Literal["random", "mixed", "medium", "medexp", "expert", "ranexp", "demos", "partial"] = "medium"
    size: Count = 84  # pixels per side: 84 for bc, drq_bc, cql; 64 for the world models
    transitions: Count | None = None  # None: the published size, 100,000 in most sets, 1,000 of demos
    seed: Whole = 0  # of initial states and sampled actions
    workers: Count | None = None  # processes; None: one per core
    render: Literal["fast", "reference"] = "fast"  # fast: 2.3x the frames per second, nearly the same pixels
    data_dir: str | None = None  # None: $CLEANPIXELS_DATA, else datasets/ beside common.py
    stats_only: bool = False  # run the physics alone and print the return statistics
    distraction: Literal["none", "low", "moderate", "high"] = "none"  # of background, camera and colours
    shifted: Annotated[int, (0, 100)] = 100  # percent of the episodes that it shows in, evenly spaced
    redraw: Literal["never", "episode", "dynamic"] = "never"  # the same for all, anew for each, or moving within it
    backgrounds: str | None = None  # a folder in the layout of DAVIS 2017; None: stills that are made here
    bodies: bool = False  # bodies B, C, F and G in equal parts
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
    varied = args.distraction != "none" or args.bodies
    if varied and args.task not in variations.TASKS:
        return f"{what}: distractions and bodies are of {' and '.join(variations.TASKS)} alone"
    if args.bodies and (args.distraction != "none" or name == "mixed"):
        return "--bodies: not together with a --distraction, and the recorded replay of mixed is of one body"
    if not varied and (args.shifted != 100 or args.redraw != "never" or args.backgrounds):
        return "--shifted, --redraw and --backgrounds need a --distraction"
    if problem := variations.backgrounds_problem(args.backgrounds):
        return problem
    if name == "demos" and not args.task.startswith("metaworld-"):
        return f"{what}: there are scripted policies for metaworld-<task> alone"
    if args.action_noise and name != "demos":
        return f"--action-noise {args.action_noise}: of --dataset demos alone"
    if name == "mixed" and args.seed:
        return f"--seed {args.seed}: mixed is one recorded replay; its seed cannot be chosen"
    parts, steps = parts_of(args), episode_length(args.task)
    shipped = [part for part in parts if part[0] not in ("random", "demos")]
    if missing := [part for part in shipped if not policy_file(args.task, *part).exists()]:
        there = ", ".join(f"{file.parent.name} {file.stem}" for file in sorted(POLICIES.glob("*/*.npz"))) or "none"
        what_to_train = " --body ".join(filter(None, (args.task, missing[0][1])))
        train = f"random needs none; to train one: python data/train_sac.py --task {what_to_train}, then --export"
        return f"{what}: no {' '.join(filter(None, missing[0]))} policy is shipped (there are: {there}). {train}"
    if args.transitions is not None and args.transitions < steps * len(parts):
        return f"--transitions {args.transitions}: at least one episode of {steps} of each of its {len(parts)} parts"
    return ""


def parts_of(args: Args) -> list[tuple[str, str | None]]:
    """The sets that a set is joined of: name and body."""
    names, bodies = PARTS.get(args.dataset, [args.dataset]), variations.TRAIN_BODIES if args.bodies else [None]
    return [(name, body) for name in names for body in bodies]


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


def source_of(args: Args, name: str, body: str | None, total: int, action_dim: int) -> Sampled | Recorded:
    if name == "mixed":
        return Recorded(args.task, total)
    if name == "demos":
        policy = ScriptedPolicy(args.task, args.action_noise)
        return Sampled(policy, name, args.seed, successful_episodes(args, policy, total))
    policy = UniformPolicy(action_dim) if name == "random" else SACPolicy(policy_file(args.task, name, body))
    return Sampled(policy, name + (body or ""), args.seed, range(total))


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


def collect(args: Args, name: str, transitions: int, folder: Path, body: str | None = None) -> np.ndarray:
    """Makes one set, or under --stats-only its returns alone. Returns the episode returns (E,)."""
    steps = episode_length(args.task)
    total = -(-transitions // steps)
    if args.stats_only:
        return rollouts(args, name, total, None, body)
    if not (folder / "meta.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        needed = total * (steps + 1) * 3 * args.size**2 - sum(f.stat().st_size for f in folder.glob("*.npy"))
        sizes = f"{needed / 1e9:.2f} GB, the disk has {shutil.disk_usage(folder.parent).free / 1e9:.2f} GB free"
        print(f"{folder}: {total} episodes, {sizes}; {args.workers or cores()} workers")
        if needed > shutil.disk_usage(folder.parent).free:
            raise UserError(f"{folder} needs {sizes}; give another --data-dir or fewer --transitions")
        rollouts(args, name, total, folder, body)
    meta = Dataset(folder).meta
    wanted = args.render, recipe_of(args, name, total, body), variation_of(args, body)
    if (meta["render"], meta.get("recipe"), meta.get("variation")) != wanted:
        raise UserError(f"{folder} was made with another --render, policy or look; delete it to make it again")
    return np.array(meta["episode_returns"])


def episode_length(task: str) -> int:
    return DEMO_STEPS if task.startswith("metaworld-") else EPISODE


def variation_of(args: Args, body: str | None = None) -> dict | None:
    """What meta.json says of it, see variations.evaluation_groups; None: the task as it is."""
    if args.bodies:
        return {"body": body} if body else {"bodies": variations.TRAIN_BODIES}
    found = {"distraction": args.distraction, "shifted": args.shifted, "redraw": args.redraw}
    return found | {"backgrounds": args.backgrounds or variations.PROCEDURAL} if args.distraction != "none" else None


def recipe_of(args: Args, name: str, episodes: int, body: str | None) -> dict:
    shipped = name not in ("random", "demos")
    policy = zlib.crc32(policy_file(args.task, name, body).read_bytes()) if shipped else None
    recipe = {"seed": args.seed, "episodes": episodes, "action_repeat": 2, "policy": policy}
    if args.task.startswith("metaworld-"):
        from manipulation import METAWORLD_CAMERA

        recipe |= {"camera": {"corner2": list(METAWORLD_CAMERA), "rotated": 180}, "shadows": args.render == "reference"}
    if args.action_noise:
        recipe["action_noise"] = args.action_noise
    return recipe


def rollouts(args: Args, name: str, total: int, folder: Path | None, body: str | None) -> np.ndarray:
    """All episodes of a set, one per environment at a time; written in order where `folder` is given."""
    count = min(total, args.workers or cores())
    size, groups = args.size if folder else None, {"score": [(body, None)] * count}
    pool = EnvPool(args.task, size, count, frame_stack=1, render=args.render, groups=groups)
    source = source_of(args, name, body, total, action_dim := pool.spec["action_dim"])
    if folder is None:
        returns = np.array([rewards.sum() for _, _, rewards in episodes_of(source, pool, range(total), args)])
    else:
        facts = {"recipe": recipe_of(args, name, total, body), "variation": variation_of(args, body)}
        facts |= {"render": args.render, "mujoco": importlib.metadata.version("mujoco")}
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
    steps, begun, variation = episode_length(args.task), time.monotonic(), variation_of(args)
    with tqdm(total=len(episodes) * steps, unit="step", mininterval=BAR_SECONDS) as bar:
        for first in range(episodes.start, episodes.stop, pool.count):
            batch = list(range(first, min(first + pool.count, episodes.stop)))
            real = len(batch)
            batch += [batch[-1]] * (pool.count - real)  # the last round repeats an episode and drops it
            if args.distraction != "none":
                pool.looks = [variations.look_of(variation, episode) for episode in batch]
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


def join(path: Path, sets: list[Dataset], variation: dict | None = None) -> None:
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
        starts = np.cumsum([0, *(len(part.reward) for part in sets)])
        rows = {name: [getattr(part, name) for part in sets] for name in ("action", "reward", "discount")}
        rows["episode"] = [part.first_rows + start for part, start in zip(sets, starts)]
        for name, parts in rows.items():
            np.save(path / f"{name}.npy", np.concatenate(parts))
        meta = sets[0].meta | {"name": path.name, "recipe": {part.meta["name"]: part.meta["recipe"] for part in sets}}
        store.write_meta(path, meta | ({"variation": variation} if variation else {}))


def folder_of(args: Args, name: str, transitions: int | None, body: str | None = None) -> Path:
    """Where the set is, or that part of it."""
    name += f"-noise{args.action_noise:g}" if args.action_noise else ""
    flags = {"distraction": args.distraction, "shifted": args.shifted, "bodies": args.bodies and not body}
    path = store.set_folder(args.data_dir, "made", args.task, name, args.size, transitions, args.seed, **flags)
    more = ([args.redraw] if args.redraw != "never" else []) + ([f"body{body}"] if body else [])
    return path.with_name("-".join([path.name, *more, *(Path(folder).name for folder in [args.backgrounds] if folder)]))


def main(args: Args) -> None:
    check_ranges(args)
    if problem := problem_of(args):
        raise UserError(problem)
    parts, returns, folders = parts_of(args), [], []
    each = args.transitions and -(-args.transitions // len(parts))
    shown = replace(args, distraction="none", redraw="never", backgrounds=None) if args.shifted == 0 else args
    for name, body in parts:
        standard = standard_transitions(args.task, name) // (len(variations.TRAIN_BODIES) if body else 1)
        folders.append(folder_of(shown, name, each or (standard if body else None), body))
        returns.append(collect(shown, name, each or standard, folders[-1], body))
    whole, returns = folder_of(args, args.dataset, args.transitions), np.concatenate(returns)
    if whole not in folders and not args.stats_only:
        join(whole, [Dataset(folder) for folder in folders], variation_of(args))
    print_statistics(args.task, args.dataset, store.return_statistics(returns), "made", len(returns))


if __name__ == "__main__":
    import tyro

    sys.excepthook = common.one_line_errors
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in order: workers end first
    main(tyro.cli(Args))
