"""What the tests of the world models share: the three files, small agents, windows of noise, one update of each phase.

Sizes are small and all different, so that no shape fits by accident. Images have 64 px, which the decoder fixes."""

import lompo
import moto
import numpy as np
import offline_dv2
import pytest
import torch
from conftest import DatasetWriter, FourStepsPool, run_main, synthetic_episode
from torch import Tensor, nn

import common

FILES = {"offline_dv2": offline_dv2, "lompo": lompo, "moto": moto}
EACH = pytest.mark.parametrize("algo", FILES)
TWO_PHASES = pytest.mark.parametrize("algo", ["offline_dv2", "lompo"])
PHASES = [("offline_dv2", "model"), ("offline_dv2", "agent"), ("lompo", "model"), ("lompo", "agent"),
          ("moto", "model"), ("moto", "all")]  # fmt: skip
SMALL = {"cnn_depth": 2, "stoch": 4, "deter": 8, "hidden": 10, "units": 12, "ensemble": 3, "batch_size": 2, "window": 5}
SMALL |= {"horizon": 3, "device": "cpu", "precision": "fp32", "accelerate": "eager"}
OF_ONE = {"offline_dv2": {"classes": 3}, "lompo": {"agent_batch_size": 8}, "moto": {"classes": 3}}
ACTION_DIM = 2


def make_args(algo: str, **flags):
    return FILES[algo].Args(**(SMALL | OF_ONE[algo] | flags))


def make_agent(algo: str, **flags):
    torch.manual_seed(0)
    return FILES[algo].Agent(make_args(algo, **flags), ACTION_DIM)


def uniform(name: int, *shape: int) -> Tensor:
    """In [0, 1), always the same for a name."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(name))


def make_batch(count=2, rows=5) -> common.Sequences:
    """Windows of noise."""
    is_first = torch.zeros(count, rows, dtype=torch.bool)
    is_first[:, 0] = True
    image, action = (256 * uniform(0, count, rows, 3, 64, 64)).byte(), 2 * uniform(1, count, rows, ACTION_DIM) - 1
    reward, row = uniform(2, count, rows), torch.arange(count * rows).view(count, rows)
    return common.Sequences(image, action, reward, torch.ones(count, rows), is_first, row)


def make_transitions(agent, count=8) -> lompo.Transitions:
    """The first half real, of penalty 0; the third one ends in a terminal."""
    feat, next_feat, action = (uniform(i, count, n) for i, n in enumerate((*[agent.model.feat_dim] * 2, ACTION_DIM)))
    reward, penalty, discount = uniform(3, count), uniform(4, count), torch.ones(count)
    penalty[: count // 2], discount[2] = 0, 0
    return lompo.Transitions(feat, action, reward, penalty, discount, next_feat)


def update(algo: str, phase: str, agent) -> dict:
    """One gradient step on noise, always the same. Returns the metrics."""
    batch = make_batch(rows=agent.args.window)
    if algo == "moto":
        return agent.update(batch, None if phase == "model" else uniform(6, 2, agent.args.window).round())
    if phase == "model":
        return agent.update_model(batch)
    if algo == "lompo":
        return agent.update_agent(make_transitions(agent))
    return agent.update_agent(batch, uniform(5, *batch.reward.shape, agent.model.encoder.embed_dim))


def without_draws(monkeypatch, algo: str, agent) -> None:
    """Means in place of draws, so that two ways of computing the same can be compared."""
    rssm = agent.model.rssm
    if algo == "lompo":
        monkeypatch.setattr(rssm, "sample", lambda normal: normal.mean)
    else:
        shape = agent.args.stoch, agent.args.classes
        monkeypatch.setattr(rssm, "sample", lambda logits: logits.unflatten(-1, shape).softmax(-1).flatten(-2))
        monkeypatch.setattr(FILES[algo].TruncatedNormal, "sample", lambda policy: 0.9 * policy.loc)
    monkeypatch.setattr(rssm, "draw_members", lambda count: torch.zeros(count, dtype=torch.int64))


def observed(agent, batch: common.Sequences):
    """States of windows (B, T, ...), filtered from their images."""
    with torch.no_grad():
        return agent.model.rssm.observe(agent.model.embed(batch.image), batch.action, batch.is_first)[0]


def copies(agent) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in agent.named_parameters()}


def moved(agent, before: dict[str, Tensor]) -> set[str]:
    """Parts of the agent of which some weight is no longer as in copies()."""
    return {name.split(".")[0] for name, value in agent.named_parameters() if not torch.equal(value, before[name])}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def weights_of(run) -> dict[str, Tensor]:
    found = torch.load(run / "weights.pt", weights_only=True)
    return {name: value for name, value in found.items() if name != "_extra_state"}


def rows_of(run, part: str) -> list[dict[str, float]]:
    """A metrics file without its wall clock."""
    header, *lines = (line.split(",") for line in (run / f"{part}.csv").read_text().splitlines())
    return [{k: float(v) for k, v in zip(header, line) if k != "wall_s"} for line in lines]


def noise_set(path, rewards: list[list[float]], task="own"):
    """A set of 64 px: an episode for each list of rewards."""
    rng, row = np.random.default_rng(0), 0
    with DatasetWriter(path, 64, ACTION_DIM, task=task) as writer:
        for episode in rewards:
            frames, actions, _ = synthetic_episode(row, len(episode), 64, ACTION_DIM, rng)
            writer.add(frames, actions, np.array(episode))
            row += len(episode) + 1
    return path


STEPS = {"offline_dv2": {"model_steps": 4, "agent_steps": 4, "target_every": 2, "eval_every": 4},
         "lompo": {"model_steps": 4, "agent_steps": 4, "rollout_every": 2, "eval_every": 4},
         "moto": {"model_first": 1, "offline_steps": 3, "online_episodes": 3, "updates_per_episode": 2,
                  "bc_filter": "all", "eval_every": 3}}  # fmt: skip


def train(algo: str, folder, tag: str, crash=None, pool=FourStepsPool, **flags):
    """The file's command line, here, in an environment of four steps. Returns what ended it (None: its end), and the
    run's folder."""
    if not (folder / "noise").exists():
        noise_set(folder / "noise", [[0.5] * 12, [1.5] * 9], task="walker-walk")
    own = {"dataset": folder / "noise", "runs_dir": folder, "tag": tag, "log_every": 1, "eval_episodes": 1}
    flags = SMALL | OF_ONE[algo] | STEPS[algo] | own | flags
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    return run_main(FILES[algo], words, crash=crash, pool=pool), folder / algo / "walker-walk/noise" / f"{tag}-seed0"
