"""What a world model has learned, to look at: films of its images, its errors, its penalties, its promises.

    python benchmarks/inspect_world_model.py runs/offline_dv2/walker-walk/mixed-64px/seed0
    python benchmarks/inspect_world_model.py RUN --dataset datasets/made/walker-walk/medium-64px   # other windows

Works on a run of any file in algos/ that has a world model, finished or not, from its newest weights. Writes to
RUN/inspect/ (or --out):
    reconstruction.mp4   truth, what the decoder makes of the filtered states, their difference; one window per column
    open_loop.mp4        the same where images are known for the first --context rows only, then actions alone
    open_loop.png        every few rows of it, for a page
    report.json          all numbers that are printed:
        error of images and rewards of windows, filtered and open loop; R2 of the reward
        penalty on states that a random policy visits in the environment (V-D4RL Table 14 has walker-walk's)
        imagined beside real return: the actor's real episodes, and the model's account of the same actor from
        the same first states, over whole episodes and over --horizon steps from states on the way"""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "algos")]
from common import (  # noqa: E402
    EVAL_SEED,
    Dataset,
    EnvPool,
    SequenceBuffer,
    UserError,
    changed_code,
    evaluation_pool,
    newest_weights,
    one_line_errors,
    open_dataset,
)

TABLE_14 = {"random": (0.223, 0.040), "mixed": (0.226, 0.035), "medium": (0.341, 0.034), "medexp": (0.338, 0.034),
            "expert": (0.262, 0.020)}  # V-D4RL, walker-walk, states of a random policy: mean, deviation  # fmt: skip


@dataclass
class Args:
    run: str  # a run's folder
    out: str | None = None  # where to write; None: RUN/inspect
    dataset: str | None = None  # the path of another set for the windows; None: the run's own
    windows: int = 6  # columns of the films
    context: int = 5  # rows whose images the open loop may see
    batch: int = 64  # windows for the errors
    episodes: int = 5  # of the random policy, and of the actor; 0: no environment
    horizon: int = 15  # steps of the shorter comparison of imagined and real reward
    seed: int = 0  # of windows, random actions and latent draws
    device: str = "cpu"


def load(args: Args):
    """agent, its module, its args, the run's configuration."""
    path = Path(args.run)
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no config.json; give a run's folder") from None
    script = ROOT / "algos" / f"{config['algo']}.py"
    if not script.exists() or "class WorldModel" not in script.read_text():
        raise UserError(f"{path} is a run of {config['algo']}.py; there is no such file with a WorldModel in algos/")
    if changed_code(script, path):
        raise UserError(f"algos/{script.name} has changed since {path}; check out the commit {config['commit']}")
    module = importlib.import_module(config["algo"])
    known = module.Args.__dataclass_fields__
    run_args = module.Args(**{name: value for name, value in config["args"].items() if name in known})
    run_args.device, run_args.precision = args.device, "fp32"
    agent = module.Agent(run_args, config["dataset"]["action_dim"]).to(args.device)
    agent.load_state_dict(newest_weights(path))
    return agent.eval(), module, run_args, config


def frames_of(image: Tensor) -> np.ndarray:
    """(B, T, 3, S, S) in [-0.5, 0.5] -> (T, S, B S, 3) uint8: windows side by side."""
    image = ((image + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return np.concatenate(list(image.permute(0, 1, 3, 4, 2).numpy()), axis=2)


def film(truth: Tensor, model: Tensor) -> np.ndarray:
    """Rows: truth, model, difference around grey. -> (T, 3 S, B S, 3) uint8."""
    return np.concatenate([frames_of(truth), frames_of(model), frames_of((model - truth) / 2)], axis=1)


def write_film(path: Path, frames: np.ndarray) -> None:
    import imageio.v2 as imageio

    with imageio.get_writer(path, fps=10, macro_block_size=1) as video:
        for frame in frames:
            video.append_data(frame.repeat(2, 0).repeat(2, 1))


@torch.no_grad()
def errors(agent, batch, context: int) -> dict:
    """Of images (root mean square per value, in 255ths) and rewards, filtered, and open loop after `context` rows."""
    found = {}
    truth = batch.image.float().div(255).sub(0.5)
    for name in ("filtered", "open_loop"):
        states = agent.filter(batch) if name == "filtered" else agent.roll(batch, context)
        rows = slice(1 if name == "filtered" else context, None)
        image = agent.model.decode(states.feat)[:, rows]
        reward = agent.model.reward(states.feat).squeeze(-1)[:, rows]
        real = batch.reward[:, rows]
        residual = (reward - real).square().mean()
        found[name] = {"image_rmse_255": 255 * (image - truth[:, rows]).square().mean().sqrt().item(),
                       "reward_rmse": residual.sqrt().item(),
                       "reward_r2": 1 - (residual / real.var(correction=0).clamp_min(1e-8)).item()}  # fmt: skip
    return found


@torch.no_grad()
def episodes(agent, pool: EnvPool, policy, seed: int) -> tuple[list, np.ndarray]:
    """Filters the images of whole episodes. policy(state) -> (B, A). Returns T states, rewards (T, B)."""
    obs, states, rewards = pool.reset(seed + np.arange(pool.count)), [], []
    action, state = torch.zeros(pool.count, agent.action_dim), None
    while not pool.done.all():
        _, state = agent.act(torch.from_numpy(obs).to(agent.args.device), action.to(agent.args.device), state)
        states.append(state)
        action = policy(state).cpu()
        obs, reward, _ = pool.step(action.numpy())
        rewards.append(reward)
    return states, np.stack(rewards)


def mode(agent, state) -> Tensor:
    policy = agent.actor(state.feat)
    return getattr(policy, "loc", policy)  # a distribution's mode, or a deterministic actor's action


@torch.no_grad()
def imagined_reward(agent, state, steps: int) -> Tensor:
    """Sum of the rewards that the model predicts for the actor's mode over so many steps. -> (M,)."""
    total = torch.zeros(len(state.deter), device=state.deter.device)
    for _ in range(steps):
        state = agent.model.rssm.imagine(state, mode(agent, state))
        total += agent.model.reward(state.feat).squeeze(-1)
    return total


def statistics(values) -> dict:
    values = np.asarray(values, np.float64)
    return {"mean": float(values.mean()), "std": float(values.std())}


def main(args: Args) -> None:
    agent, module, run_args, config = load(args)
    torch.manual_seed(args.seed)
    dataset = Dataset(args.dataset) if args.dataset else open_dataset(run_args, size=module.SIZE)
    if dataset.size != module.SIZE or dataset.action_dim != agent.action_dim:
        raise UserError(
            f"--dataset {dataset.path}: {dataset.size} px and {dataset.action_dim} actions do not fit the run"
        )
    out = Path(args.out or Path(args.run) / "inspect")
    out.mkdir(parents=True, exist_ok=True)
    if not 1 <= args.context < run_args.window:
        raise UserError(
            f"--context {args.context}: from 1 to {run_args.window - 1}, fewer rows than the run's --window"
        )
    buffer = SequenceBuffer(dataset, max(args.batch, args.windows), run_args.window, args.seed, args.device,
                            force_first=getattr(run_args, "mask_first_action", True))  # fmt: skip
    batch = buffer.sample()
    trained_on = dataset.hash == config["dataset"]["hash"]
    report = {"run": args.run, "windows_of": dataset.path.name, "trained_on": trained_on}
    report["errors"] = errors(agent, batch, args.context)
    print(f"windows of {dataset.path}, which the model was trained on" if trained_on else f"windows of {dataset.path}")
    for name, values in report["errors"].items():
        print(f"  {name:10s} " + ", ".join(f"{key} {value:.3g}" for key, value in values.items()))
    few = type(batch)(*(part[torch.linspace(0, len(part) - 1, args.windows).long()] for part in batch))
    truth = few.image.float().div(255).sub(0.5)
    for name, images in (("reconstruction", agent.reconstruct(few)), ("open_loop", agent.open_loop(few, args.context))):
        frames = film(truth, images)
        write_film(out / f"{name}.mp4", frames)
    import imageio.v2 as imageio

    shown = np.linspace(0, len(frames) - 1, 8).round().astype(int)  # one window, eight of its rows
    imageio.imwrite(out / "open_loop.png", np.concatenate([frames[t][:, : module.SIZE] for t in shown], axis=1))
    if args.episodes:
        run_args.eval_episodes, run_args.eval_every = args.episodes, None
        pool = evaluation_pool(run_args, config["dataset"], 1)
        report |= in_the_environment(args, agent, pool, config)
    (out / "report.json").write_text(json.dumps(report, indent=1))
    print(f"films and report.json in {out}")


def in_the_environment(args: Args, agent, pool: EnvPool, config: dict) -> dict:
    generator = torch.Generator().manual_seed(args.seed)
    uniform = lambda _: 2 * torch.rand(pool.count, agent.action_dim, generator=generator) - 1  # noqa: E731
    states, _ = episodes(agent, pool, uniform, EVAL_SEED)
    with torch.no_grad():
        penalties = torch.stack([agent.penalty(state) for state in states]).cpu()
    report = {"penalty_random_policy": statistics(penalties)}
    found = report["penalty_random_policy"]
    print(f"penalty on a random policy's states: {found['mean']:.3f} +- {found['std']:.3f}")
    published = TABLE_14.get(config["args"]["dataset"]) if config["args"]["task"] == "walker-walk" else None
    if published and config["args"].get("penalty") == "mean_disagreement":
        print(f"  V-D4RL's Table 14, for Offline DV2 trained in full: {published[0]} +- {published[1]}")
    torch.manual_seed(EVAL_SEED)  # the draws of --evaluate, hence its returns
    states, rewards = episodes(agent, pool, lambda state: mode(agent, state), EVAL_SEED)
    steps = len(rewards)
    whole = imagined_reward(agent, states[0], steps).cpu().numpy()
    report["return"] = {"real": statistics(rewards.sum(0)), "imagined": statistics(whole)}
    horizon = min(args.horizon, steps)
    starts = range(0, steps - horizon + 1, max(1, (steps - horizon) // 20))
    pairs = np.array([
        (real, promised)
        for t in starts
        for real, promised in zip(rewards[t : t + horizon].sum(0), imagined_reward(agent, states[t], horizon).cpu())
    ])  # fmt: skip
    report[f"reward_over_{horizon}_steps"] = {"real": statistics(pairs[:, 0]), "imagined": statistics(pairs[:, 1]),
                                              "correlation": float(np.corrcoef(pairs.T)[0, 1])}  # fmt: skip
    for name in ("return", f"reward_over_{horizon}_steps"):
        real, imagined = report[name]["real"], report[name]["imagined"]
        print(f"{name}: real {real['mean']:.1f} +- {real['std']:.1f}, "
              f"imagined {imagined['mean']:.1f} +- {imagined['std']:.1f}")  # fmt: skip
    return report


if __name__ == "__main__":
    import tyro

    sys.excepthook = one_line_errors
    main(tyro.cli(Args, config=(tyro.conf.PositionalRequiredArgs,)))
