"""Renders Minari's state-only Franka Kitchen sets, as MOTO does with the same demonstrations (arXiv:2401.03306 App. C).

    python data/minari_kitchen.py --dataset mixed       # microwave, kettle, light switch, slide cabinet
    python data/minari_kitchen.py --dataset partial     # microwave, kettle, bottom burner, light switch

Minari's own client fetches the set (needs requirements-manipulation.txt and a network, or $MINARI_DATASETS_PATH). The
recorded states are rendered, the actions kept, clipped to [-1, 1]. A step's reward is counted anew: how many of the
four objects are in place in the state it led to. Minari's and D4RL's two names mean each other's objects (their mixed
has the bottom burner). The set goes to made/kitchen-<dataset>/<dataset>-64px; interrupt at any time."""

import importlib.metadata
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "data")]
from store import DatasetWriter, return_statistics, set_folder  # noqa: E402

from common import BAR_SECONDS, Count, Env, EnvPool, UserError, check_ranges, cores, one_line_errors  # noqa: E402

STATE, ACTION = 59, 9


@dataclass
class Args:
    dataset: Literal["mixed", "partial"] = "mixed"
    minari_id: str | None = None  # None: D4RL/kitchen/<dataset>-v2
    size: Count = 64  # pixels per side
    workers: Count | None = None  # processes; None: one per core
    render: Literal["fast", "reference"] = "fast"  # fast: no shadows, 10 times the frames per second
    data_dir: str | None = None  # None: $CLEANPIXELS_DATA, else datasets/ beside common.py
    stats_only: bool = False  # print episodes, returns and successes without rendering


def load_minari(name: str):
    try:
        import minari
    except ModuleNotFoundError:
        raise UserError("minari is missing: pip install -r requirements-manipulation.txt") from None
    try:
        return minari.load_dataset(name, download=True)
    except Exception as error:  # it raises many kinds: no network, no such set, no permission
        raise UserError(f"--minari-id {name}: Minari cannot load it ({type(error).__name__}: {error})") from None


def episode_of(task: str, episode) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """states (T+1, 59), actions (T, 9) in [-1, 1], rewards (T,)."""
    from manipulation import objects_in_place

    states, actions = np.asarray(episode.observations["observation"]), np.asarray(episode.actions)
    if states.shape != (len(actions) + 1, STATE) or actions.shape[1:] != (ACTION,):
        raise UserError(f"episode {episode.id}: no kitchen's states {states.shape} and actions {actions.shape}")
    return states, np.clip(actions, -1, 1), objects_in_place(task, states[1:])


def film(env: Env, states: np.ndarray) -> np.ndarray:
    """Frames of the kitchen in recorded states (n, 59). -> (n, 3, S, S) uint8."""
    from manipulation import split_kitchen

    frames = []
    for qpos, qvel in zip(*split_kitchen(states)):
        env.simulator.env.robot_env.set_state(qpos, qvel)
        frames.append(env.frame())
    return np.stack(frames)


def print_statistics(task: str, rewards: list[np.ndarray]) -> None:
    returns, best = np.array([r.sum() for r in rewards]), np.array([r.max() for r in rewards])
    statistics = ", ".join(f"{name} {value:.1f}" for name, value in return_statistics(returns).items())
    print(f"{task}: {len(rewards)} episodes, {sum(map(len, rewards)):,} transitions; returns {statistics}")
    counts = ", ".join(f"{n}: {(best == n).sum()}" for n in range(5))
    print(f"most objects in place at once, mean over episodes: {best.mean():.2f}; episodes by that number: {counts}")
    print(f"{100 * (best == 4).mean():.1f} % solve the task")
    print("MOTO's Appendix C.2: 563 episodes, 128,569 transitions; returns mean 261.1; 3.98 objects")


def main(args: Args) -> None:
    check_ranges(args)
    task = f"kitchen-{args.dataset}"
    folder = set_folder(args.data_dir, "made", task, args.dataset, args.size)
    name = args.minari_id or f"D4RL/kitchen/{args.dataset}-v2"
    found = [episode_of(task, episode) for episode in load_minari(name).iterate_episodes()]
    if not args.stats_only:
        print(folder)
        render(args, task, name, found, folder)
    print_statistics(task, [rewards for _, _, rewards in found])


def render(args: Args, task: str, name: str, found: list, folder: Path) -> None:
    from manipulation import KITCHEN_CAMERA

    recipe = {"minari": name, "camera": KITCHEN_CAMERA, "shadows": args.render == "reference", "action_repeat": 1}
    facts = {"render": args.render, "mujoco": importlib.metadata.version("mujoco"), "recipe": recipe}
    with DatasetWriter(folder, args.size, ACTION, task, "made", **facts) as writer:
        if writer.complete:
            meta = json.loads((folder / "meta.json").read_text())
            if meta["render"] != args.render or meta["recipe"] != json.loads(json.dumps(recipe)):
                raise UserError(f"{folder} was made with another --render or --minari-id; delete it to make it again")
            return
        pool = EnvPool(task, args.size, args.workers or cores(), frame_stack=1, render=args.render)
        rest = found[writer.episodes :]
        bar = tqdm(total=sum(len(states) for states, _, _ in rest), unit="frame", mininterval=BAR_SECONDS)
        for first in range(0, len(rest), pool.count):
            batch = rest[first : first + pool.count]
            calls = [(states,) for states, _, _ in batch] + [None] * (pool.count - len(batch))
            for frames, (_, actions, rewards) in zip(pool.call(film, calls), batch):
                writer.add(frames.transpose(0, 2, 3, 1), actions, rewards)
                bar.update(len(frames))
        bar.close()
    pool.close()


if __name__ == "__main__":
    import tyro

    sys.excepthook = one_line_errors
    main(tyro.cli(Args))
