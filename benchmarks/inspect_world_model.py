"""What a world model has learned, to look at: films of its images, its errors, its penalties, its promises.

    python benchmarks/inspect_world_model.py runs/offline_dv2/walker-walk/mixed-64px/seed0
    python benchmarks/inspect_world_model.py RUN --dataset datasets/made/walker-walk/medium-64px   # other windows

Works on a run of any file in algos/ that has a world model: on the weights of a finished one, on the checkpoint of
another. Writes to RUN/inspect/ (or --out):
    reconstruction.mp4   truth, what the decoder makes of the filtered states, their difference; one window per column
    open_loop.mp4        the same where images are known for the first --context rows only, then actions alone
    translation.mp4      with --distraction: episodes of the actor that look so, and what the decoder makes of them, in
                         the looks that the model was trained on (V-D4RL's D.5)
    report.json          all numbers that are printed:
        error of images and rewards of windows, filtered and open loop; R2 of the reward
        penalty on states that a random policy visits in the environment (V-D4RL Table 14 has walker-walk's)
        imagined beside real return: the actor's real episodes, and the model's account of the same actor from
        the same first states, over whole episodes and over --horizon steps from states on the way

Dims: B windows or episodes, T rows, S pixels per side, A action, F feat."""

import hashlib
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "algos")]
import common  # noqa: E402
from common import EVAL_SEED, EnvPool, Sequences, UserError  # noqa: E402
from variations import SCALES, Look  # noqa: E402

TABLE_14 = {"random": (0.223, 0.040), "mixed": (0.226, 0.035), "medium": (0.341, 0.034), "medexp": (0.338, 0.034),
            "expert": (0.262, 0.020)}  # V-D4RL, walker-walk, states of a random policy: mean, deviation  # fmt: skip


@dataclass
class Args:
    run: str  # a run's folder
    out: str | None = None  # where to write; None: RUN/inspect
    dataset: str | None = None  # the path of another set for the windows; None: the run's own
    windows: common.Count = 6  # columns of the films
    context: common.Count = 5  # rows whose images the open loop may see
    batch: common.Count = 64  # windows for the errors
    episodes: common.Whole = 5  # of the random policy, and of the actor; 0: no environment
    distraction: Literal["none", *SCALES] = "none"  # a level: films the model under unseen draws of it
    horizon: common.Count = 15  # steps of the shorter comparison of imagined and real reward
    seed: common.Whole = 0  # of windows, random actions and latent draws
    device: Literal["cpu", "cuda"] = "cpu"


def load_agent(args: Args):
    """The agent, its file as a module, its flags, the run's configuration."""
    config = common.read(f"{args.run}/config.json")
    script = ROOT / "algos" / f"{config['algo']}.py"
    if not script.exists() or "class WorldModel" not in script.read_text():
        raise UserError(f"{args.run}: of {script.name}; there is no such file with a WorldModel in algos/")
    if hashlib.sha256(script.read_bytes()).hexdigest()[:12] != config["script"]:
        raise UserError(f"algos/{script.name} has changed since {args.run}; check out the commit {config['commit']}")
    module = importlib.import_module(config["algo"])
    flags = module.Args(**config["args"])
    flags.device, flags.precision = args.device, "fp32"
    agent = module.Agent(flags, config["dataset"]["action_dim"]).to(args.device)
    if Path(args.run, "finished.json").exists():
        agent.load_state_dict(common.read(f"{args.run}/weights.pt"))
    else:
        agent.load_state_dict(common.read(f"{args.run}/checkpoint.pt")["objects"]["agent"])
    return agent.eval(), module, flags, config


# ==== Windows ====


def filtered(agent, batch: Sequences):
    """States of windows, from all of their images. -> (B, T, ...)."""
    return agent.model.rssm.observe(agent.model.embed(batch.image), batch.action, batch.is_first)[0]


def open_loop(agent, batch: Sequences, context: int):
    """States of windows: filtered for the first `context` rows, then imagined under their actions. -> (B, T, ...)."""
    seen = filtered(agent, Sequences(*(part[:, :context] for part in batch)))
    kind = type(seen)  # the file's State
    rows = [kind(*(part[:, t] for part in seen)) for t in range(context)]
    for t in range(context, batch.action.shape[1]):
        rows.append(agent.model.rssm.imagine(rows[-1], batch.action[:, t]))  # action[t] leads to row t
    return kind(*(torch.stack(parts, 1) for parts in zip(*rows)))


def decode(agent, feat: Tensor) -> Tensor:
    """feat (B, T, F) -> image (B, T, 3, S, S) in about [-0.5, 0.5]."""
    return agent.model.decoder(feat.flatten(0, 1)).unflatten(0, feat.shape[:2])


def scaled(image: Tensor) -> Tensor:
    """uint8 -> the decoder's scale."""
    return image.float().div(255).sub(0.5)


def errors(agent, feat: Tensor, batch: Sequences, first: int) -> dict[str, float]:
    """Of images (root mean square per value, in 255ths) and of rewards, in rows `first` and later of windows whose
    states have these feat (B, T, F)."""
    difference = (decode(agent, feat) - scaled(batch.image))[:, first:]
    real = batch.reward[:, first:]
    residual = (agent.model.reward(feat).squeeze(-1)[:, first:] - real).square().mean()
    return {
        "image_rmse_255": 255 * difference.square().mean().sqrt().item(),
        "reward_rmse": residual.sqrt().item(),
        "reward_r2": 1 - (residual / real.var(correction=0).clamp_min(1e-8)).item(),
    }


def film(truth: Tensor, model: Tensor) -> np.ndarray:
    """Truth, model, difference around grey, each with its windows side by side. Images (B, T, 3, S, S) in
    [-0.5, 0.5] -> frames (T, 3 S, B S, 3) uint8."""

    def side_by_side(image: Tensor) -> np.ndarray:
        image = ((image + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        return np.concatenate(list(image.permute(0, 1, 3, 4, 2).numpy()), axis=2)  # (T, S, B S, 3)

    return np.concatenate([side_by_side(image) for image in (truth, model, (model - truth) / 2)], axis=1)


def write_film(path: Path, frames: np.ndarray) -> None:
    import imageio.v2 as imageio

    imageio.mimwrite(path, frames.repeat(2, 1).repeat(2, 2), fps=10, macro_block_size=1)


def on_windows(args: Args, agent, batch: Sequences, out: Path) -> dict:
    """Errors on a batch of windows, and films of some of them."""
    report, shown = {}, torch.linspace(0, len(batch.reward) - 1, args.windows).long()
    parts = (("filtered", "reconstruction", filtered(agent, batch), 1),  # row 0 knows no past
             ("open_loop", "open_loop", open_loop(agent, batch, args.context), args.context))  # fmt: skip
    for name, film_name, states, first in parts:
        report[name] = errors(agent, states.feat, batch, first)
        print(f"  {name:10s} " + ", ".join(f"{key} {value:.3g}" for key, value in report[name].items()))
        write_film(out / f"{film_name}.mp4", film(scaled(batch.image[shown]), decode(agent, states.feat[shown])))
    return report


# ==== In the environment ====


def mode(agent, state) -> Tensor:
    policy = agent.actor(state.feat)
    return getattr(policy, "loc", policy)  # of a distribution, or a deterministic actor's action


def play(agent, pool: EnvPool, policy) -> tuple[list, np.ndarray, Tensor]:
    """Filters the images of whole episodes. policy(state) -> (B, A). Returns T states (B, ...), rewards (T, B), images
    (B, T, 3, S, S)."""
    obs, device, states, rewards, images = pool.reset(EVAL_SEED + np.arange(pool.count)), agent.args.device, [], [], []
    action, state = torch.zeros(pool.count, agent.action_dim), None
    while not pool.done.all():
        images.append(torch.from_numpy(obs))
        _, state = agent.act(torch.from_numpy(obs).to(device), action.to(device), state)
        action = policy(state).cpu()
        obs, reward, _ = pool.step(action.numpy())
        states.append(state)
        rewards.append(reward)
    return states, np.stack(rewards), torch.stack(images, 1)


def translate(args: Args, agent, config: dict) -> np.ndarray:
    """A film of the first 100 steps of --windows episodes under the --distraction, and of their latent states."""
    looks = [(None, Look(args.distraction, "test", i)) for i in range(args.windows)]
    facts = config["dataset"]
    pool = EnvPool(facts["task"], facts["size"], args.windows, 1, facts["render"], groups={"score": looks})
    states, _, images = play(agent, pool, lambda state: mode(agent, state))
    feat = torch.stack([state.feat for state in states[:100]], 1)
    return film(scaled(images[:, :100]), decode(agent, feat).cpu())


def imagined_reward(agent, state, steps: int) -> Tensor:
    """Sum of the rewards that the model predicts for the actor's mode over so many steps. (B, ...) -> (B,)."""
    total = torch.zeros(len(state.feat), device=state.feat.device)
    for _ in range(steps):
        state = agent.model.rssm.imagine(state, mode(agent, state))
        total += agent.model.reward(state.feat).squeeze(-1)
    return total


def statistics(values) -> dict[str, float]:
    values = np.asarray(values, np.float64)
    return {"mean": float(values.mean()), "std": float(values.std())}


def in_the_environment(args: Args, agent, pool: EnvPool, config: dict) -> dict:
    """Penalties on a random policy's states; the actor's returns, real and imagined."""
    generator = torch.Generator().manual_seed(args.seed)

    def uniform(state) -> Tensor:
        return 2 * torch.rand(pool.count, agent.action_dim, generator=generator) - 1

    states, *_ = play(agent, pool, uniform)
    penalty = statistics(torch.stack([agent.penalty(state) for state in states]).cpu())
    report = {"penalty_random_policy": penalty}
    print(f"penalty on a random policy's states: {penalty['mean']:.3f} +- {penalty['std']:.3f}")
    published = TABLE_14.get(config["args"]["dataset"])
    if published and config["algo"] == "offline_dv2" and config["args"]["task"] == "walker-walk":
        print(f"  V-D4RL's Table 14, of a model trained in full: {published[0]} +- {published[1]}")
    torch.manual_seed(EVAL_SEED)  # the draws of --evaluate, hence its returns
    states, rewards, _ = play(agent, pool, lambda state: mode(agent, state))
    steps, horizon = len(rewards), min(args.horizon, len(rewards))
    whole = imagined_reward(agent, states[0], steps).cpu()
    report["return"] = {"real": statistics(rewards.sum(0)), "imagined": statistics(whole)}
    starts = range(0, steps - horizon + 1, max(1, (steps - horizon) // 20))
    real = np.concatenate([rewards[t : t + horizon].sum(0) for t in starts])
    imagined = torch.cat([imagined_reward(agent, states[t], horizon) for t in starts]).cpu().numpy()
    short = {"real": statistics(real), "imagined": statistics(imagined)}
    report[f"reward_over_{horizon}_steps"] = short | {"correlation": float(np.corrcoef(real, imagined)[0, 1])}
    for name in ("return", f"reward_over_{horizon}_steps"):
        words = [f"{kind} {sums['mean']:.1f} +- {sums['std']:.1f}" for kind, sums in list(report[name].items())[:2]]
        print(f"{name}: {', '.join(words)}")
    return report


@torch.no_grad()
def main(args: Args) -> None:
    common.check_ranges(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here")
    agent, module, flags, config = load_agent(args)
    if args.episodes and config["dataset"]["task"] == "own":
        raise UserError(f"--episodes {args.episodes}: the run's set is of no task to act in; give --episodes 0")
    torch.manual_seed(args.seed)
    dataset = common.Dataset(args.dataset) if args.dataset else common.open_dataset(flags, module.SIZE)
    found, needed = (dataset.size, dataset.action_dim), (module.SIZE, agent.action_dim)
    if found != needed:
        what = "has {} px and {} actions, the run needs {} and {}".format(*found, *needed)
        raise UserError(f"--dataset {dataset.path} {what}; name another set, or leave it out for the run's own")
    if args.context >= flags.window:
        raise UserError(f"--context {args.context}: must be less than the run's --window {flags.window}")
    out = Path(args.out or Path(args.run) / "inspect")
    out.mkdir(parents=True, exist_ok=True)
    batch = common.SequenceBuffer(dataset, max(args.batch, args.windows), flags.window, args.seed, args.device).sample()
    trained_on = dataset.hash == config["dataset"]["hash"]
    report = {"run": args.run, "windows_of": dataset.path.name, "trained_on": trained_on}
    print(f"windows of {dataset.path}" + (", which the model was trained on" if trained_on else ""))
    report["errors"] = on_windows(args, agent, batch, out)
    if args.episodes:
        flags.eval_episodes, flags.eval_every = args.episodes, None
        pool = common.evaluation_pool(flags, config["dataset"] | {"variation": None}, 1)
        report |= in_the_environment(args, agent, pool, config)
    if args.distraction != "none":
        write_film(out / "translation.mp4", translate(args, agent, config))
    (out / "report.json").write_text(json.dumps(report, indent=1))
    print(f"films and report.json in {out}")


if __name__ == "__main__":
    import tyro

    sys.excepthook = common.one_line_errors
    main(tyro.cli(Args, config=(tyro.conf.PositionalRequiredArgs,)))
