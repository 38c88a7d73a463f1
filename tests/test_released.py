"""Five algorithms against what the released code of V-D4RL computes, recorded in float64: golden/README.md says how.

Same weights, batch and draws, all given by formulas; hence the same losses, gradients and, in the first three, steps.
The world models' step is left out: recorded is TensorFlow's Adam, which adds eps in another place than torch's."""

import json
import math
import zlib
from functools import partial
from pathlib import Path

import bc
import cql
import drq_bc
import lompo
import numpy as np
import offline_dv2
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
MODEL_FREE, WORLD = (json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("model_free", "world_models"))
FLAGS = {"device": "cpu", "precision": "fp32"}


def draw(name: str, shape, kind: str = "standard_normal") -> Tensor:
    return torch.from_numpy(getattr(np.random.RandomState(zlib.crc32(name.encode())), kind)(tuple(shape)))


@pytest.fixture
def draws(monkeypatch):
    """Makes float32 mean double and torch's random functions return what waits in draws[their name], in its order."""
    waiting = {name: [] for name in ("rand", "rand_like", "randn", "randn_like", "randint")}
    to, lambda_return, doubled = Tensor.to, offline_dv2.lambda_return, {torch.float32: torch.float64}

    def recorded(name, original, *words, **flags):
        like = original(*words, **flags)  # its shape and type; a vector that waits is shared by all rows
        return torch.as_tensor(waiting[name].pop(0), dtype=like.dtype).expand_as(like)

    for name in waiting:
        monkeypatch.setattr(torch, name, partial(recorded, name, getattr(torch, name)))
    monkeypatch.setattr(Tensor, "to", lambda x, *words, **flags: to(x, *(doubled.get(w, w) for w in words), **flags))
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    # trap: theirs normalises imagined rewards, which changes them by this much
    monkeypatch.setattr(offline_dv2, "lambda_return", lambda r, *rest: lambda_return(r / (1 + 1e-8), *rest))
    torch.set_default_dtype(torch.float64)
    yield waiting
    torch.set_default_dtype(torch.float32)


# ---- bc, drq_bc, cql ----

CRITIC = {"critic_loss": "critic/loss", "critic_q1": "critic/q"}
CQL = {"cql_alpha": MODEL_FREE["cql_alpha"], "cql_samples": 4}
MODEL_FREE_CASES = {  # file, flags, metrics: released name -> ours
    "bc": (bc, {"bc_noise": True}, {"actor_bc_loss": "actor/loss"}),
    "drq_bc": (drq_bc, {"bc_alpha": MODEL_FREE["bc_weight"]}, CRITIC | {"actor_bc_loss": "actor/bc_loss"}),
    "cql": (cql, CQL, CRITIC | {"actor_loss": "actor/loss"}),
    "cql_importance": (cql, CQL | {"importance_sample": True}, CRITIC | {"actor_loss": "actor/loss"}),
}
NOISE = {bc: ["actor"], drq_bc: ["next", "actor"], cql: ["next", "near_next", "near", "actor"]}  # in the order drawn


def released_name(ours: str) -> str:
    """encoder.convs.1.bias -> encoder.convnet.2.bias, critic.q1.0.bias -> critic.Q1.0.bias."""
    for i in range(4):
        ours = ours.replace(f"convs.{i}", f"convnet.{2 * i}")
    return ours.replace(".q", ".Q")


def model_free(case: str, draws: dict) -> tuple[dict, dict]:
    """Found and recorded numbers of one update."""
    file, flags, names = MODEL_FREE_CASES[case]
    flags = FLAGS | {"augment": "none", "lr": MODEL_FREE["lr"], "noise_clip": MODEL_FREE["clip"]} | flags
    agent = file.Agent(file.Args(**flags), (9, 84, 84), 3)
    weights = {released_name(name): weight for name, weight in agent.named_parameters()}
    for name, weight in weights.items():
        value = draw(name, weight.shape)
        value = value / math.sqrt(value[0].numel()) if value.ndim > 1 else 0.1 * value
        if name.endswith("trunk.0.weight"):  # theirs reads channels, rows, columns; ours rows, columns, channels
            value = value.unflatten(1, (32, 35, 35)).permute(0, 2, 3, 1).flatten(1)
        weight.data.copy_(value + name.endswith("trunk.1.weight"))  # a LayerNorm's lies around 1
    obs, next_obs = (127 + 60 * draw(f"batch.{name}", (6, 9, 84, 84)) for name in ("obs", "next_obs"))
    action, reward = draw("batch.action", (6, 3)).tanh(), (1.5 + draw("batch.reward", (6, 1))).type(torch.float32)
    discount = torch.tensor([0.0, *[0.99**3] * 5])[:, None]  # the first one is terminal
    batch = file.Batch(obs.clamp(0, 255).byte(), action, reward.double(), discount, next_obs.clamp(0, 255).byte())
    draws["randn_like"] += [draw(f"noise.{name}", (4, 6, 3) if "near" in name else (6, 3)) for name in NOISE[file]]
    if file is cql:
        draws["rand"] += [(draw("noise.uniform", (4, 6, 3)).tanh() + 1) / 2]
    metrics = agent.update(batch, torch.tensor(MODEL_FREE["std"]))
    found = {"metrics": {name: metrics[ours] for name, ours in names.items()}}
    if file is drq_bc:
        found["metrics"]["actor_loss"] = -metrics["actor/q"]  # theirs is logged before its weight and BC's term
    found["grad_norm"] = {name: weight.grad.norm() for name, weight in weights.items() if weight.requires_grad}
    found["after_one_step"] = {name: weight.norm() for name, weight in weights.items()}
    return found, MODEL_FREE[case]


# ---- offline_dv2, lompo ----

METRICS = {
    "image": "model/image_loss", "reward": "model/reward_loss", "total": "model/loss", "grad_norm": "model/grad_norm",
    "post_entropy": "model/post_entropy", "prior_entropy": "model/prior_entropy", "actor_entropy": "actor/entropy",
    "actor": "actor/loss", "actor_grad_norm": "actor/grad_norm", "critic_grad_norm": "critic/grad_norm",
}  # fmt: skip
DV2 = METRICS | {"kl_value": "model/kl", "critic_without_constant": "critic/loss"}
LOMPO = METRICS | {"kl": "model/kl", "critic": "critic/loss", "q1_mean": "critic/q"}


def pieces(row: dict, ours: dict, value: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Where in our tensors the parts of one of theirs lie, and these parts."""
    if "embed_rows" in row:  # theirs reads rows, columns, channels; ours channels, rows, columns
        first, *image = row["embed_rows"]
        value = torch.cat([value[:first], value[first:].unflatten(0, image).permute(2, 0, 1, 3).flatten(0, 2)])
    if "thirds" in row:  # a GRU's gates
        value = torch.cat([value.chunk(3, -1)[i] for i in row["thirds"]], -1)
    if isinstance(row["ours"], list):
        return [(ours[name], part) for name, part in zip(row["ours"], value)]
    return [(ours[row["ours"]][row.get("index", ...)], value.permute(row["axes"]) if "axes" in row else value)]


def pair(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """Norm, and inner product with a probe, which sees signs and permutations. parts: values with their probes."""
    norm = torch.cat([value.flatten() for value, _ in parts]).norm()
    return torch.stack([norm, sum((value * probe).sum() for value, probe in parts)])


def pairs(place: str, arrays: dict) -> dict:
    return {name: pair((value, draw(f"probe/{place}/{name}", value.shape))) for name, value in arrays.items()}


def filtered(agent, file, kind: str, is_first: list) -> tuple:
    """A batch of windows, its embeddings and flat states, and what was found on the way."""
    image = (127 + 60 * draw("batch/image", (2, 6, 64, 64, 3))).clamp(0, 255).byte().movedim(-1, 2)
    action, reward = draw("batch/action", (2, 6, 3)).tanh(), 1 + 0.7 * draw("batch/reward", (2, 6))
    batch = file.Sequences(image, action, reward, discount=None, is_first=torch.tensor(is_first) > 0, row=None)
    embed = agent.model.embed(image).detach()
    states, _ = agent.model.rssm.observe(embed, batch.action, batch.is_first)
    start = file.State(*(part.detach().flatten(0, 1) for part in states))
    arrays = {"deter": start.deter, "image_mean": agent.model.decoder(start.feat).movedim(1, -1)}
    action, state, actions = torch.zeros(2, 3), None, {}
    for t in range(3):
        action, state = agent.act(image[:, t], action, state)
        actions[t] = action
    return batch, embed, start, {"forward": pairs(kind, arrays), "policy_actions": actions}


def imagination(agent, case: dict, draws: dict) -> tuple[dict, dict]:
    """What filtering and imagination give, and the metrics of an update of agent and model."""
    shapes = {"post": (2, 6, 4, 1), "policy": (3, 2, 4, 1), "imagine": (3, 12, 4, 1), "actor": (3, 12, 3)}
    noise = {name: draw(f"dv2/draw/{name}", shape, "random_sample") for name, shape in shapes.items()}
    post, imagine = noise["post"].transpose(0, 1), [x for step in zip(noise["actor"], noise["imagine"]) for x in step]
    draws["rand_like"] += [*post, *noise["policy"], *imagine, *imagine, *post, *imagine, *post]
    draws["randint"] += [[member] for member in case["imagine_members"]] * 3 + [case["members"]]
    batch, embed, start, found = filtered(agent, offline_dv2, "dv2", [[1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0]])
    states, policies = agent.imagine(start)
    feat = torch.stack([state.feat for state in states])
    arrays = {"feat": feat, "reward_mean": agent.model.reward(feat), "target_value": agent.critic_target(feat)}
    arrays["actor_entropy"] = torch.stack([policy.entropy() for policy in policies])
    arrays["mean_disagreement"] = torch.stack([agent.penalty(state) for state in states])
    found |= {"imagined": pairs("dv2/imagined", arrays), "lambda_targets": dict(enumerate(agent.actor_loss(start)[2]))}
    return found, agent.update_agent(batch, embed) | agent.update_model(batch)


def rollouts(agent, case: dict, draws: dict) -> tuple[dict, dict]:
    """What filtering and rollouts give, and the metrics of an update of agent and model."""
    shapes = {"post": (6, 2, 4), "policy": (3, 2, 4), "rollout": (3, 12, 4)}
    if case["shared_noise"]:  # one vector for all rows of a batch
        shapes = {f"{name}/shared": shape[::2] for name, shape in shapes.items()}
    post, policy, rollout = ([*draw(f"lompo/draw/{name}", shape)] for name, shape in shapes.items())
    draws["randn_like"] += post + policy + post + rollout + post
    draws["randn"] += [*draw("lompo/draw/action", (3, 12, 3))]
    draws["randint"] += [[member] for member in case["rollout_members"]] + [case["members"]]
    batch, embed, _, found = filtered(agent, lompo, "lompo", [[0] * 6] * 2)  # their model knows no first rows
    imagined = agent.rollout(None, batch, embed)
    arrays = {name: getattr(imagined, name) for name in ("feat", "action", "next_feat")}
    penalised = imagined.reward - case["penalty_coef"] * imagined.penalty
    arrays |= {"reward_none": imagined.reward, "reward_log_prob_std": penalised}
    found["rollout"] = pairs("lompo/rollout", arrays)
    shapes = {"feat": (8, 16), "next_feat": (8, 16), "action": (8, 3), "penalty": (8,), "reward": (8,)}
    values = {name: draw(f"lompo/batch/{name}", shape) for name, shape in shapes.items()}
    values |= {"action": values["action"].tanh(), "reward": case["reward_scale"] * values["reward"]}
    values["penalty"], values["discount"] = values["penalty"].abs(), torch.tensor([1.0, 1, 0, 1, 1, 0, 1, 1])
    values["penalty"][:4] = 0  # the first half is real
    return found, agent.update_agent(lompo.Transitions(**values)) | agent.update_model(batch)


def world_model(file, second_phase, names: dict, case: str, draws: dict) -> tuple[dict, dict]:
    """Found and recorded numbers of filtering, imagination and one update."""
    kind = {offline_dv2: "dv2", lompo: "lompo"}[file]
    theirs, rows = WORLD["cases"][kind][case], WORLD["names"][kind]
    flags = FLAGS | WORLD["flags"][kind] | {"penalty_coef": theirs["penalty_coef"]}
    agent = file.Agent(file.Args(**flags), 3)
    weights = dict(agent.named_parameters())
    for name, row in rows.items():
        value = draw(f"{kind}/{name}", row["shape"])
        if name.endswith("kernel"):
            outputs = value.shape[-2 if name.startswith("decode") and value.ndim == 4 else -1]
            value = value * math.sqrt(outputs / value.numel())
        else:
            value = 1 + 0.2 * value if name.endswith("gamma") else 0.1 * value
        value = value * math.prod(factor for key, factor in theirs["factors"].items() if key in name)
        for ours, part in pieces(row, weights, value):
            ours.data.copy_(part)
    found, metrics = second_phase(agent, theirs, draws)
    for part in ("losses", "agent_losses"):
        found[part] = {name: metrics[ours] for name, ours in names.items() if name in theirs[part]}
    gradients = {name: weight.grad for name, weight in weights.items()}
    for part in ("model", "actor", "critic"):
        found[part], norm = {}, metrics[f"{part}/grad_norm"].item()
        for name in theirs[part]:
            probe = draw(f"probe/{kind}/{name}", rows[name]["shape"])
            clipped = pair(*pieces(rows[name], gradients, probe))
            found[part][name] = clipped * max(1, (norm + 1e-6) / 100)  # as it was before the clip
    return found, theirs


CASES = {case: partial(model_free, case) for case in MODEL_FREE_CASES}
CASES |= {f"offline_dv2 {key}": partial(world_model, offline_dv2, imagination, DV2, key) for key in ("above", "below")}
CASES |= {f"lompo {key}": partial(world_model, lompo, rollouts, LOMPO, key) for key in ("shared", "own")}


@pytest.mark.parametrize("case", CASES)
def test_the_released_codes_numbers(case, draws):
    """Of every entry the difference relative to its largest recorded number, absolute where that is 0."""
    found, recorded = CASES[case](draws)
    assert not any(draws.values())  # every draw was used
    worst, count = {}, 0
    for section, entries in found.items():
        for name, value in entries.items():
            value, wanted = value.detach().numpy(), np.array(recorded[section][name])
            wanted = wanted[:2] if value.shape == (2,) else wanted  # two more numbers may follow, of the step
            assert value.shape == wanted.shape, (section, name)
            worst[section, name] = np.abs(value - wanted).max() / (np.abs(wanted).max() or 1)
            count += value.size
    print(f"\n{case}: worst relative difference {np.max([*worst.values()]):.1e} over {count} numbers")
    assert not {entry: difference for entry, difference in worst.items() if not difference <= 1e-9}
