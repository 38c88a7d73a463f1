"""moto.py: its equations against sums and loops, its filters, and runs killed offline, in an episode, and online."""

import functools
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import moto
import numpy as np
import offline_dv2 as dv2
import pytest
import scipy.stats
import torch
from conftest import ENVIRONMENT, ROOT, run_main, run_python, synthetic_episode, write_set

import common
from common import Dataset, DatasetWriter, OnlineSet, SequenceBuffer, UserError

SIZES = {"cnn_depth": 2, "stoch": 4, "classes": 3, "deter": 8, "hidden": 10, "units": 12, "ensemble": 3}
FLAGS = SIZES | {
    "batch_size": 2,
    "window": 5,
    "horizon": 4,
    "device": "cpu",
    "precision": "fp32",
    "accelerate": "eager",
}


def make_agent(action_dim=2, **flags) -> moto.Agent:
    torch.manual_seed(0)
    return moto.Agent(moto.Args(**(FLAGS | flags)), action_dim)


def make_batch(agent, count=2, rows=5, seed=0) -> common.Sequences:
    rng = torch.Generator().manual_seed(seed)
    is_first = torch.zeros(count, rows, dtype=torch.bool)
    is_first[:, 0] = True
    return common.Sequences(
        torch.randint(256, (count, rows, 3, 64, 64), generator=rng, dtype=torch.uint8),
        2 * torch.rand(count, rows, agent.action_dim, generator=rng) - 1,
        torch.rand(count, rows, generator=rng), torch.ones(count, rows), is_first,
        torch.arange(count * rows).view(count, rows),
    )  # fmt: skip


def states_of(agent, batch) -> moto.State:
    with torch.no_grad():
        return agent.filter(batch)


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- settings ----


@pytest.mark.parametrize(
    "task, dataset, expected",
    [
        ("metaworld-drawer-open", "demos", {"offline_steps": 1_000, "online_episodes": 1_000, "updates_per_episode": 20,
                                            "bc_filter": "success", "bc_success_reward": 1.0, "eval_episodes": 20}),
        ("kitchen-mixed", "mixed", {"offline_steps": 10_000, "online_episodes": 1_326, "updates_per_episode": 50,
                                    "bc_filter": "success", "bc_success_reward": 4.0, "eval_episodes": 20}),
        ("kitchen-partial", "partial", {"offline_steps": 10_000, "bc_success_reward": 3.0}),
        ("walker-walk", "mixed", {"offline_steps": None, "online_episodes": 0, "bc_filter": "return",
                                  "bc_quantile": 0.5, "eval_episodes": 10}),
    ],
)  # fmt: skip
def test_settings(task, dataset, expected):
    args = common.typed_args(moto.Args, moto.TUNED, moto.QUICK, ["--task", task, "--dataset", dataset])
    expected = expected | {"model_lr": 1e-4, "actor_lr": 8e-5, "critic_lr": 8e-5, "batch_size": 16, "bc_coef": 10.0,
                           "penalty_coef": 10.0, "penalty": "logit_std", "ensemble": 7}  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    if args.offline_steps:
        total = {"metaworld-drawer-open": 21_000, "kitchen-mixed": 76_300, "kitchen-partial": 76_300}[task]
        assert args.steps == total


@pytest.mark.parametrize(
    "task, dataset, expected",
    [("metaworld-drawer-open", "demos", (5_000, 1_000, 600, 40, 8e-5, 8e-5, 100, 10.0)),
     ("kitchen-mixed", "mixed", (None, 1_000, 600, 40, 8e-5, 8e-5, 100, 10.0)),
     ("walker-walk", "mixed", (30_000, 2_000, 600, 0, 3e-4, 1e-3, 10, 1.0))],
)  # fmt: skip
def test_quick_settings(task, dataset, expected):
    words = ["--task", task, "--dataset", dataset, "--quick"]
    args = common.typed_args(moto.Args, moto.TUNED, moto.QUICK, words)
    assert (args.transitions, args.offline_steps, args.model_first, args.online_episodes, args.actor_lr, args.critic_lr,
            args.target_every, args.penalty_coef) == expected  # fmt: skip
    typed = common.typed_args(moto.Args, moto.TUNED, moto.QUICK, [*words, "--online-episodes", "7"])
    assert typed.online_episodes == 7


@pytest.mark.parametrize("action_dim, expected", [(6, 974_001), (21, 980_001)])
def test_parameter_counts(action_dim, expected):
    agent = moto.Agent(moto.Args(device="cpu", precision="fp32"), action_dim)
    assert [count(net) for net in agent.critic.nets] == [expected, expected]
    twin = dv2.Agent(dv2.Args(device="cpu", precision="fp32"), action_dim)
    assert count(agent.model) == count(twin.model) and count(agent.actor) == count(twin.actor)
    dreamer = moto.Agent(moto.Args(device="cpu", precision="fp32", value="dreamer"), action_dim)
    assert [count(net) for net in dreamer.critic.nets] == [count(twin.critic)]
    assert all(torch.equal(a, b) for a, b in zip(agent.critic.parameters(), agent.critic_target.parameters()))
    assert not torch.equal(*(net[0][0].weight for net in agent.critic.nets))


# ---- values ----


def test_the_value_recursion_is_eq_5():
    """V^t as the paper has it: a mixture of the expansions of 1 .. H - t steps; Vhat mixes in that of none."""
    horizon, gamma, lam = 5, 0.9, 0.7
    reward, value = torch.randn(horizon, 3), torch.randn(horizon + 1, 3)  # reward[t] is r^{t+1}
    expanded, hat = moto.expand_values(reward, value, gamma, lam)
    for t in range(horizon):

        def steps(k, t=t):
            return sum(gamma ** (i - 1) * reward[t + i - 1] for i in range(1, k + 1)) + gamma**k * value[t + k]

        last = horizon - t
        explicit = (1 - lam) * sum(lam ** (k - 1) * steps(k) for k in range(1, last)) + lam ** (last - 1) * steps(last)
        torch.testing.assert_close(expanded[t], explicit)
        torch.testing.assert_close(hat[t], lam * explicit + (1 - lam) * value[t])


def test_the_limits_of_the_value_recursion():
    reward, value = torch.randn(3, 2), torch.randn(4, 2)
    expanded, hat = moto.expand_values(reward, value, 0.9, 1.0)
    torch.testing.assert_close(expanded[0], reward[0] + 0.9 * reward[1] + 0.81 * reward[2] + 0.729 * value[3])
    torch.testing.assert_close(hat, expanded)
    expanded, hat = moto.expand_values(reward, value, 0.9, 0.0)
    torch.testing.assert_close(expanded, reward + 0.9 * value[1:])
    torch.testing.assert_close(hat, value[:-1])


def test_the_advantage_of_the_data_against_loops():
    rows, horizon, gamma = 6, 3, 0.9
    reward, value, discount = torch.randn(2, rows), torch.randn(2, rows), torch.ones(2, rows)
    discount[1, 3] = 0  # a terminal: nothing after row 3 counts
    found = moto.data_advantage(reward, discount, value, gamma, horizon)
    assert found.shape == (2, rows - 1)
    for b in range(2):
        for t in range(rows - 1):
            total, factor, k = 0.0, 1.0, t
            while k < min(t + horizon, rows - 1):
                k += 1
                total += factor * reward[b, k].item()
                factor *= gamma * discount[b, k].item()
            assert found[b, t].item() == pytest.approx(
                total + factor * value[b, k].item() - value[b, t].item(), abs=1e-5
            )


def test_log_prob_against_scipy():
    policy = moto.TruncatedNormal(torch.tensor([[0.3, -0.9]]), torch.tensor([[0.2, 1.5]]))
    action = torch.tensor([[0.5, -1.0]])
    low, high, _ = policy.bounds()
    expected = scipy.stats.truncnorm.logpdf(action, low, high, policy.loc, policy.scale).sum()
    assert moto.truncated_log_prob(policy, action).item() == pytest.approx(expected, abs=1e-4)
    corner = moto.TruncatedNormal(torch.tensor([[1.0]]), torch.tensor([[0.1]]))
    assert torch.isfinite(moto.truncated_log_prob(corner, torch.tensor([[-1.0]]))).all()  # 20 deviations away


# ---- losses ----


def test_the_actor_loss_is_its_definition():
    agent = make_agent(penalty_coef=2.0, bc_coef=3.0, actor_ent=0.1)
    batch, keep = make_batch(agent), torch.tensor([[1.0] * 5, [0.0] * 5])
    start = states_of(agent, batch)
    torch.manual_seed(1)
    loss, rollout, metrics = agent.actor_loss(start, batch, keep)
    torch.manual_seed(1)
    states, policies, actions = agent.imagine(moto.State(*(part.flatten(0, 1) for part in start)))
    feats = [torch.cat([state.stoch, state.deter], -1) for state in states]
    assert len(states) == len(actions) == 5
    value = [
        torch.minimum(*(net(torch.cat(pair, -1))[:, 0] for net in agent.critic.nets)) for pair in zip(feats, actions)
    ]
    reward = [agent.model.reward(f)[:, 0] - 2.0 * agent.penalty(s) for f, s in zip(feats[1:], states[1:])]
    hat, hats = value[4], []
    for t in (3, 2, 1, 0):
        hat = 0.05 * value[t] + 0.95 * (reward[t] + 0.99 * hat)
        hats.append(hat)
    entropy = torch.stack([policy.entropy() for policy in policies[:4]])
    rollouts = -(torch.stack(hats).mean() + 0.1 * entropy.mean())
    log_prob = moto.truncated_log_prob(agent.actor(start.feat[0, :-1]), batch.action[0, 1:])  # window 1 is not kept
    imitation = -log_prob.sum() / 8
    torch.testing.assert_close(loss, rollouts + 3.0 * imitation)
    torch.testing.assert_close(metrics["bc/loss"], imitation.detach())
    assert metrics["bc/kept"] == 0.5
    feat, action, rewards = rollout
    torch.testing.assert_close(feat, torch.stack(feats).detach())
    torch.testing.assert_close(action, torch.stack(actions).detach())
    torch.testing.assert_close(rewards, torch.stack(reward).detach())
    assert not any(part.requires_grad for part in rollout)


def test_the_actors_gradient_is_that_of_eq_6():
    """From t = 0 on, through critics, rewards, penalty and dynamics; not through the input of the policy."""
    agent = make_agent(penalty_coef=2.0, bc_filter="none", actor_ent=0.1)
    batch, actor = make_batch(agent), [*agent.actor.parameters()]
    start = states_of(agent, batch)
    torch.manual_seed(1)
    found = torch.autograd.grad(agent.actor_loss(start, batch, torch.zeros(2, 5))[0], actor)
    torch.manual_seed(1)
    state, values, rewards, entropies = moto.State(*(part.flatten(0, 1) for part in start)), [], [], []
    for t in range(5):
        feat = torch.cat([state.stoch, state.deter], -1)
        policy = agent.actor(feat.detach())
        action = policy.sample("reference")
        values.append(torch.minimum(*(net(torch.cat([feat, action], -1))[:, 0] for net in agent.critic.nets)))
        entropies.append(policy.entropy())
        if t < 4:
            state = agent.model.rssm.imagine(state, action)
            feat = torch.cat([state.stoch, state.deter], -1)
            rewards.append(agent.model.reward(feat)[:, 0] - 2.0 * agent.penalty(state))
    total = 0.0
    for t in range(4):  # Vhat^t: a mixture of the expansions of 0, 1, ... steps

        def steps(k, t=t):
            return sum(0.99**i * rewards[t + i] for i in range(k)) + 0.99**k * values[t + k]

        last = 4 - t
        mixture = 0.05 * sum(0.95**k * steps(k) for k in range(last)) + 0.95**last * steps(last)
        total = total - (mixture + 0.1 * entropies[t]).mean() / 4
    torch.testing.assert_close(found, torch.autograd.grad(total, actor), rtol=1e-3, atol=1e-6)
    detached = make_agent(penalty_coef=2.0, bc_filter="none", actor_ent=0.1)  # the dynamics do carry a gradient
    imagine = detached.model.rssm.imagine
    detached.model.rssm.imagine = lambda state, action: imagine(state, action.detach())
    torch.manual_seed(1)
    other = torch.autograd.grad(detached.actor_loss(start, batch, torch.zeros(2, 5))[0], [*detached.actor.parameters()])
    assert max((a - b).abs().max() for a, b in zip(found, other)) > 1e-4


@pytest.mark.parametrize("data_target", ["v0", "vhat"])
def test_the_critic_loss_is_its_definition(data_target):
    agent = make_agent(data_target=data_target)
    for parameter in agent.critic_target.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = make_batch(agent)._replace(discount=torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]))
    feat, action = torch.randn(5, 10, agent.model.feat_dim), torch.rand(5, 10, 2) * 2 - 1
    reward = torch.randn(4, 10)
    loss, metrics = agent.critic_loss([feat, action, reward], batch)

    def q(critic, feat, action):
        return [net(torch.cat([feat, action], -1))[..., 0] for net in critic.nets]

    value = torch.minimum(*q(agent.critic_target, feat, action))
    expanded, hat = moto.expand_values(reward, value, 0.99, 0.95)
    model = sum(((expanded - own) ** 2).mean() for own in q(agent.critic, feat[:-1], action[:-1]))
    following = (value if data_target == "v0" else hat)[0].view(2, 5)
    data = torch.zeros(())
    for b in range(2):
        for j in range(4):
            target = batch.reward[b, j + 1] + 0.99 * batch.discount[b, j + 1] * following[b, j + 1]
            for own in q(agent.critic, feat[0].view(2, 5, -1)[b, j], batch.action[b, j + 1]):
                data = data + (target - own) ** 2 / 8
    torch.testing.assert_close(loss, model + data)
    torch.testing.assert_close(metrics["critic/data_loss"], data.detach())
    agent.minimize("critic", loss)
    assert all(parameter.grad is None for parameter in (*agent.actor.parameters(), *agent.critic_target.parameters()))


def test_value_dreamer_is_offline_dv2():
    """Same weights, same draws: the losses of Offline DV2's second phase."""
    agent = make_agent(value="dreamer", penalty_coef=2.0, actor_ent=0.1)
    twin = dv2.Agent(dv2.Args(**(FLAGS | {"penalty": "logit_std", "penalty_coef": 2.0, "actor_ent": 0.1})), 2)
    twin.model.load_state_dict(agent.model.state_dict())
    twin.actor.load_state_dict(agent.actor.state_dict())
    for critic in (agent.critic_target, agent.critic):
        for parameter in critic.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    twin.critic.load_state_dict(agent.critic.nets[0].state_dict())
    twin.critic_target.load_state_dict(agent.critic_target.nets[0].state_dict())
    batch = make_batch(agent)
    start = states_of(agent, batch)
    torch.manual_seed(1)
    loss, rollout, metrics = agent.actor_loss(start, batch, torch.zeros(2, 5))
    torch.manual_seed(1)
    expected, feat, target, _ = twin.actor_loss(dv2.State(*(part.flatten(0, 1) for part in start)))
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(one, [*who.actor.parameters()], retain_graph=True)
                 for one, who in ((loss, agent), (expected, twin))]  # fmt: skip
    torch.testing.assert_close(*gradients)  # through the same dynamics, and not through the policy's input
    torch.testing.assert_close(agent.critic_loss(rollout, batch)[0], twin.critic_loss(feat, target)[0])


def test_the_model_loss_is_offline_dv2s():
    agent, twin = make_agent(), dv2.Agent(dv2.Args(**FLAGS), 2)
    twin.model.load_state_dict(agent.model.state_dict())
    batch = make_batch(agent)
    torch.manual_seed(1)
    loss, states, metrics = agent.model_loss(batch)
    torch.manual_seed(1)
    expected, theirs = twin.model_loss(batch)
    assert torch.equal(loss, expected) and metrics["model/kl"] == theirs["model/kl"]
    assert states.deter.shape == (2, 5, 8) and not states.stoch.requires_grad


@pytest.mark.parametrize(
    "flags",
    [{}, {"penalty": "none"}, {"value": "dreamer"}, {"bc_filter": "advantage"}, {"tau": 0.01},
     {"bc_filter": "advantage", "precision": "bf16"}],
)  # fmt: skip
def test_one_update_moves_all_networks(flags):
    agent = make_agent(**flags)
    before = {name: value.clone() for name, value in agent.state_dict().items() if isinstance(value, torch.Tensor)}
    metrics = agent.update(make_batch(agent), torch.ones(2, 5))
    agent.update_target(1)
    assert all(torch.isfinite(value) for value in metrics.values())
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, agent.state_dict()[name])}
    assert moved == {"model", "actor", "critic"} | ({"critic_target"} if "tau" in flags else set())
    agent.update_target(100)
    if "tau" not in flags:
        assert all(torch.equal(a, b) for a, b in zip(agent.critic.parameters(), agent.critic_target.parameters()))


def test_an_update_of_the_model_alone():
    """It moves the model as the same update of everything does, and nothing else."""
    agent, whole = make_agent(), make_agent()
    before = {name: value.clone() for name, value in agent.state_dict().items() if isinstance(value, torch.Tensor)}
    torch.manual_seed(1)
    metrics = agent.update_model(make_batch(agent))
    torch.manual_seed(1)
    expected = whole.update(make_batch(agent), torch.ones(2, 5))
    assert metrics.items() <= expected.items()
    assert all(torch.equal(a, b) for a, b in zip(agent.model.parameters(), whole.model.parameters()))
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, agent.state_dict()[name])}
    assert moved == {"model"}


def test_polyak_targets():
    agent = make_agent(tau=0.25)
    for parameter in agent.critic.parameters():
        torch.nn.init.ones_(parameter)
    old = [parameter.clone() for parameter in agent.critic_target.parameters()]
    agent.update_target(7)
    for parameter, before in zip(agent.critic_target.parameters(), old):
        torch.testing.assert_close(parameter, 0.75 * before + 0.25)


def test_windows_apart_for_the_agent():
    """--agent-batch-size: the actor's and critics' windows, and their f, are others than the model's."""
    agent = make_agent()
    other = make_batch(agent, count=3, seed=1)
    metrics = agent.update(make_batch(agent), torch.tensor([[0.0] * 5, [1.0] * 5, [1.0] * 5]), *other)
    assert metrics["bc/kept"].item() == pytest.approx(2 / 3)


def test_losses_and_gradients_in_bf16_are_near_those_in_fp32(monkeypatch):
    """Means and modes instead of samples, which would be others."""
    monkeypatch.setattr(moto.TruncatedNormal, "sample", lambda self, gradient: 0.9 * self.loc)
    found = []
    for precision in ("fp32", "bf16"):
        agent = make_agent(precision=precision, deter=32, hidden=32, units=32)
        shape = agent.args.stoch, agent.args.classes
        agent.model.rssm.sample = lambda logits, _=False, shape=shape: (
            logits.unflatten(-1, shape).softmax(-1).flatten(-2)
        )
        agent.model.rssm.draw_members = lambda count: torch.zeros(count, dtype=torch.int64)
        batch = make_batch(agent)
        start = states_of(agent, batch)
        with agent.autocast():
            actor_loss, rollout, actor_metrics = agent.actor_loss(start, batch, torch.ones(2, 5))
            critic_loss, critic_metrics = agent.critic_loss(rollout, batch)
        assert all(value.dtype == torch.float32 for value in (actor_metrics | critic_metrics).values())
        losses = {"actor": actor_loss, "critic": critic_loss}
        for name, value in losses.items():
            value.backward(inputs=agent.optimizers[name].params)
        gradients = [torch.cat([p.grad.flatten() for p in agent.optimizers[name].params]) for name in losses]
        found.append(([value.item() for value in losses.values()], gradients))
    (fp32, exact), (bf16, near) = found
    assert bf16 == pytest.approx(fp32, rel=0.05) and bf16 != fp32
    for one, two in zip(exact, near):
        assert one.norm() > 0 and (one - two).norm() < 0.1 * one.norm()


def test_imitation_alone_learns_the_data():
    """All else off, the actor comes to the actions of the windows it is to imitate."""
    agent = make_agent(penalty="none", bc_coef=1000.0, deter=32, hidden=32, units=32, actor_lr=1e-3)
    batch = make_batch(agent)
    batch = batch._replace(
        action=torch.where(torch.arange(2)[:, None, None] == 0, 0.5, -0.5).expand(2, 5, 2).contiguous()
    )
    start, keep = states_of(agent, batch), torch.tensor([[1.0] * 5, [0.0] * 5])
    for _ in range(200):
        agent.minimize("actor", agent.actor_loss(start, batch, keep)[0])
    assert (agent.actor(start.feat[0, :-1]).loc - 0.5).abs().max() < 0.1  # from the last row no action is taken


# ---- what is worth imitating ----


def reward_set(path: Path, rewards: list[list[float]]) -> Dataset:
    """Episodes of these rewards."""
    rng, row = np.random.default_rng(0), 0
    with DatasetWriter(path, 64, 2) as writer:
        for episode in rewards:
            frames, actions, _ = synthetic_episode(row, len(episode), 64, 2, rng)
            writer.add(frames, actions, np.array(episode))
            row += len(episode) + 1
    return Dataset(path)


def test_filters_of_episodes(tmp_path):
    dataset = reward_set(tmp_path / "set", [[0, 0, 0], [1, 1], [0, 0, 1, 0], [0.5, 0.4]])
    buffer = SequenceBuffer(dataset, 2, 2)
    rows = [4, 3, 5, 3]

    def kept(**flags) -> list[float]:
        found = moto.worth_imitating(buffer, moto.Args(**flags))
        assert found.shape == (15,) and found.dtype == torch.float32
        parts = found.split(rows)
        assert all((part == part[0]).all() for part in parts)  # whole episodes
        return [part[0].item() for part in parts]

    assert kept(bc_filter="all") == [1, 1, 1, 1] and kept(bc_filter="none") == [0, 0, 0, 0]
    assert kept(bc_filter="success") == [0, 1, 1, 0]
    assert kept(bc_filter="success", bc_success_reward=0.5) == [0, 1, 1, 1]
    assert kept(bc_filter="return") == [0, 1, 1, 0]  # returns 0, 2, 1, 0.9; the median is 0.95
    assert kept(bc_filter="return", bc_quantile=0.0) == [0, 1, 1, 1]  # above the lowest
    assert kept(bc_filter="return", bc_quantile=1.0) == [0, 1, 0, 0]  # the best


def test_filters_of_online_episodes(tmp_path):
    """They count like those of the set, from the update after they were played; room for later ones counts 0."""
    buffer = SequenceBuffer(reward_set(tmp_path / "set", [[0, 0, 0], [1, 1]]), 2, 2,
                            online=OnlineSet(tmp_path / "online", 12, 64, 2))  # fmt: skip

    def worth(name: str) -> list[float]:
        return moto.worth_imitating(buffer, moto.Args(bc_filter=name)).tolist()

    assert worth("return") == [0] * 4 + [1] * 3 + [0] * 12  # returns 0, 2: above the median
    images, actions, *_ = episode_of(4, 9)
    buffer.add(images, actions, np.array([0, 1.0, 1, 1]), False)
    buffer.add(images[:3], actions[:2], np.zeros(2), False)
    assert worth("success") == [0] * 4 + [1] * 3 + [1] * 5 + [0] * 3 + [0] * 4
    assert worth("return") == [0] * 4 + [1] * 3 + [1] * 5 + [0] * 3 + [0] * 4  # 0, 2, 3, 0: the median is 1
    assert worth("all") == worth("advantage") == [1] * 15 + [0] * 4


# ---- the buffer that grows ----


def episode_of(length: int, value: int) -> tuple:
    images = np.full((length + 1, 3, 64, 64), value, np.uint8)
    return images, np.full((length, 2), value / 100, np.float32), np.full(length, value / 10), False


def test_the_buffer_grows(tmp_path):
    dataset = Dataset(write_set(tmp_path / "set", lengths=(7, 5), size=64))  # 8 + 6 rows
    online = OnlineSet(tmp_path / "online", 12, 64, 2)
    buffer = SequenceBuffer(dataset, 64, 4, online=online)
    assert buffer.num_rows == 26 and buffer.sample().row.max() == 13
    buffer.add(*episode_of(5, 50))
    buffer.add(*episode_of(2, 60))  # 3 rows: shorter than the window
    rows = torch.cat([buffer.sample().row for _ in range(40)])
    starts = rows[:, 0]
    share = (starts >= 14).float().mean().item()
    assert 0.28 < share < 0.39 and set(starts[starts >= 14].tolist()) == {14, 15, 16}  # one of three episodes
    batch = buffer.gather(torch.arange(14, 18)[None])
    assert (batch.image == 50).all() and torch.equal(batch.is_first[0], torch.tensor([True, False, False, False]))
    torch.testing.assert_close(batch.action[0, :, 0], torch.tensor([0.0, 0.5, 0.5, 0.5]))
    torch.testing.assert_close(batch.reward[0], torch.tensor([0.0, 5.0, 5.0, 5.0]))
    assert (batch.discount == 1).all()
    np.testing.assert_array_equal(np.load(tmp_path / "online" / "image.npy")[6:9], 60)
    assert_untouched(tmp_path / "set")


def assert_untouched(path: Path) -> None:
    """The set's files are, byte by byte, what meta.json says."""
    expected = json.loads((path / "meta.json").read_text())["sha256"]
    assert {name: common.sha256(path / f"{name}.npy") for name in expected} == expected


def test_a_buffer_continues_with_the_episodes_that_counted(tmp_path):
    dataset = Dataset(write_set(tmp_path / "set", lengths=(7, 5), size=64))
    buffer = SequenceBuffer(dataset, 8, 4, seed=3, online=OnlineSet(tmp_path / "online", 18, 64, 2))
    buffer.add(*episode_of(5, 50))
    state = buffer.state_dict()
    state = {"generator": state["generator"].clone(), "online": list(state["online"])}
    expected = buffer.sample()
    buffer.add(*episode_of(5, 99))  # after the checkpoint
    other = SequenceBuffer(dataset, 8, 4, seed=9, online=OnlineSet(tmp_path / "online", 18, 64, 2))
    other.load_state_dict(state)
    found = other.sample()
    assert all(torch.equal(one, two) for one, two in zip(found, expected)) and found.row.max() >= 14
    other.add(*episode_of(5, 60))
    assert (np.load(tmp_path / "online" / "image.npy")[6:12] == 60).all()  # over what came after the checkpoint
    assert other.lengths.tolist() == [8, 6, 6, 6]


def test_no_room_for_the_episodes(tmp_path):
    with pytest.raises(UserError, match="online.*what was complete before is kept"):
        OnlineSet(tmp_path / "online", 10**12, 64, 2).open()  # 12 petabytes


# ---- runs ----

SMALL = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", value)]
SMALL += ["--batch-size", 2, "--window", 5, "--horizon", 2, "--device", "cpu", "--log-every", 1, "--eval-every", 3]
SMALL += ["--eval-episodes", 1, "--episode-steps", 6, "--target-every", 2, "--task", "walker-walk"]
STEPS = ["--offline-steps", 3, "--online-episodes", 3, "--updates-per-episode", 2]


@pytest.fixture(scope="module")
def walker_set(tmp_path_factory) -> Path:
    """Not rendered: noise that claims to be walker-walk."""
    path, rng, row = tmp_path_factory.mktemp("data") / "noise", np.random.default_rng(0), 0
    with DatasetWriter(path, 64, 6, task="walker-walk", mujoco=common.versions()["mujoco"]) as writer:
        for length in (12, 9):
            writer.add(*synthetic_episode(row, length, 64, 6, rng))
            row += length + 1
    return path


@pytest.fixture
def train(walker_set, tmp_path):
    """train(*flags) is moto.py's command line, here: see run_main."""

    def call(*flags, crash=None, steps=STEPS, dataset=walker_set):
        words = ["--dataset", dataset, "--runs-dir", tmp_path / "runs", *SMALL, *steps, *flags]
        return run_main(moto, words, crash=crash)

    call.folder = lambda name="seed0": tmp_path / "runs" / "moto" / "walker-walk" / "noise" / name
    return call


def rows_of(run: Path, part: str) -> list[list[str]]:
    """A metrics file without its wall clock."""
    return [[line.split(",")[0], *line.split(",")[2:]] for line in (run / f"{part}.csv").read_text().splitlines()]


def same_runs(one: Path, two: Path) -> bool:
    for part in ("offline", "online", "episodes", "eval"):
        assert rows_of(one, part) == rows_of(two, part)
    ours, theirs = (torch.load(run / "weights.pt", weights_only=True) for run in (one, two))
    images = [np.load(run / "online" / "image.npy") for run in (one, two)]
    return np.array_equal(*images) and all(torch.equal(ours[n], theirs[n]) for n in ours if n != "_extra_state")


@pytest.fixture(scope="module")
def whole(walker_set, tmp_path_factory) -> Path:
    """The run that nothing interrupts."""
    runs = tmp_path_factory.mktemp("whole")
    assert run_main(moto, ["--dataset", walker_set, "--runs-dir", runs, *SMALL, *STEPS]) is None
    return runs / "moto" / "walker-walk" / "noise" / "seed0"


def test_a_run_of_both_phases(whole, walker_set):
    steps = {part: [int(row[0]) for row in rows_of(whole, part)[1:]] for part in ("offline", "online", "eval")}
    assert steps == {"offline": [1, 2, 3], "online": [4, 5, 6, 7, 8, 9], "eval": [3, 6, 9]}
    finished = json.loads((whole / "finished.json").read_text())
    assert (finished["steps"], finished["episodes"], finished["env_steps"]) == (9, 3, 36)  # 3 x 6 actions, repeat 2
    header, *rows = rows_of(whole, "eval")
    assert [row[header.index("env_steps")] for row in rows] == ["0", "24", "36"]
    images, actions = (np.load(whole / "online" / f"{name}.npy") for name in ("image", "action"))
    assert images.shape == (21, 3, 64, 64) and images.std() > 10
    assert (actions[[0, 7, 14]] == 0).all() and (np.abs(actions[1:7]) > 0).all()  # an episode's reset row
    assert (images[0] != images[7]).any()  # another episode begins in another state
    assert_untouched(walker_set)


def test_the_runs_own_episodes_are_a_set(train, whole):
    """Once the run has ended: of the episodes' rows alone, and one that a run can learn from."""
    dataset, episodes = Dataset(whole / "online"), rows_of(whole, "episodes")
    assert (dataset.task, dataset.num_episodes, dataset.num_transitions) == ("walker-walk", 3, 18)
    assert dataset.rows()[0].tolist() == [0, 7, 14] and len(dataset.parts[0].image) == 21
    scores = [float(row[episodes[0].index("score")]) for row in episodes[1:]]
    assert dataset.mean_return == pytest.approx(10 * np.mean(scores), rel=1e-5)
    assert train(dataset=whole / "online", steps=["--offline-steps", 1, "--eval-every", 0]) is None
    assert_untouched(whole / "online")


def test_a_kill_between_its_episodes_and_the_end_of_a_run(train, whole, monkeypatch):
    """They are a set then, until the resumed run goes on in them."""
    original = common.Run._finish

    def finish(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(common.Run, "_finish", finish)
    assert isinstance(train(), KeyboardInterrupt)
    monkeypatch.setattr(common.Run, "_finish", original)
    online = train.folder() / "online"
    assert Dataset(online).num_episodes == 3
    assert isinstance(train(crash=3), KeyboardInterrupt)  # before update 9, from the checkpoint of update 6
    assert not (online / "meta.json").exists()
    assert train() is None
    assert same_runs(train.folder(), whole)
    assert_untouched(online)
    assert Dataset(online).hash == Dataset(whole / "online").hash


def test_online_episodes_are_what_the_environment_gives(whole):
    """Played again, the actions of the run's own episodes lead to their images and rewards, row for row."""
    env = common.make_env("walker-walk", 64, 1)
    image, action, reward = (np.load(whole / "online" / f"{name}.npy") for name in ("image", "action", "reward"))
    for number, first in enumerate((0, 7, 14)):
        np.testing.assert_array_equal(env.reset(moto.ONLINE_SEED + number)[0], image[first])
        for row in range(first + 1, first + 7):
            obs, paid, *_ = env.step(action[row])
            np.testing.assert_array_equal(obs, image[row])
            assert np.float32(paid) == reward[row]
    env.close()


def test_playing_is_filtering(monkeypatch):
    """The states in which an online episode's actions are chosen are those that its rows have in a window."""
    agent, states = make_agent(), []
    explore = agent.explore

    def recorded(obs, action, state):
        chosen, state = explore(obs, action, state)
        states.append(state.feat)
        return chosen, state

    monkeypatch.setattr(agent, "explore", recorded)
    monkeypatch.setattr(moto.TruncatedNormal, "sample", lambda policy, *_: policy.loc)  # no draws but the filter's
    pool = common.EnvPool("reacher-easy", 64, 1, 1, episode_steps=6)
    torch.manual_seed(3)
    images, actions, rewards, terminal = moto.online_episode(agent, pool, agent.args, 0)
    pool.close()
    rows = common.arrival_rows(images, actions, rewards, terminal)
    rows = {name: torch.from_numpy(np.float32(rows[name]))[None] for name in ("action", "reward", "discount")}
    first = torch.tensor([[True] + [False] * 6])
    torch.manual_seed(3)
    batch = common.Sequences(torch.from_numpy(images)[None], *rows.values(), first, first.long())
    torch.testing.assert_close(states_of(agent, batch).feat[0, :-1], torch.cat(states))
    assert actions.std() > 1e-4  # each in a state of its own


def test_online_episodes_are_logged(whole):
    header, *rows = rows_of(whole, "episodes")
    assert header == ["step", "score", "return_0", "episodes", "env_steps"]  # and no success: it is dm_control
    assert [(row[0], *row[3:]) for row in rows] == [("4", "1", "12"), ("6", "2", "24"), ("8", "3", "36")]
    returns = np.load(whole / "online" / "reward.npy").reshape(3, 7).sum(1)
    assert [float(row[2]) for row in rows] == pytest.approx(returns.tolist(), rel=1e-5)
    assert [float(row[1]) for row in rows] == pytest.approx((returns / 10).tolist(), rel=1e-5)


@pytest.mark.parametrize("crash", [2, 4, 6, 7, 8, 9])  # checkpoints: 3, the offline end, and 6, amid updates
def test_a_killed_run_continues_bit_by_bit(train, whole, crash):
    assert isinstance(train(crash=crash), KeyboardInterrupt)
    assert train() is None
    assert same_runs(train.folder(), whole)


def test_killed_in_the_middle_of_an_episode(train, whole, monkeypatch):
    original, calls = common.EnvPool.step, 0

    def step(self, actions):
        nonlocal calls
        calls += 1
        if calls == 28:  # evaluation 1-6, episode 7-12, episode 13-18, evaluation 19-24, the fourth step of an episode
            assert self.count == 1
            raise KeyboardInterrupt
        return original(self, actions)

    with monkeypatch.context() as patch:
        patch.setattr(common.EnvPool, "step", step)
        assert isinstance(train(), KeyboardInterrupt)
    assert train() is None
    assert same_runs(train.folder(), whole)


@pytest.mark.parametrize("phase", ["offline", "online"])
def test_kill_9(walker_set, tmp_path, capsys, phase):
    """The process as a whole, in the midst of a phase."""
    words = ["--dataset", walker_set, *SMALL, "--offline-steps", 24, "--online-episodes", 6]
    words += ["--updates-per-episode", 4, "--eval-every", 4, "--runs-dir"]
    run, whole = (tmp_path / name / "moto" / "walker-walk" / "noise" / "seed0" for name in ("killed", "whole"))
    command = [sys.executable, ROOT / "algos" / "moto.py", *words, tmp_path / "killed"]
    process = subprocess.Popen([*map(str, command)], env=ENVIRONMENT, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    first, last = {"offline": (8, 20), "online": (28, 44)}[phase]

    def newest() -> int:
        return max((int(path.name[11:]) for path in run.glob("checkpoint-0*")), default=0)

    deadline = time.monotonic() + 120
    while newest() < first and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert first <= newest() <= last
    assert run_main(moto, [*words, tmp_path / "killed"]) is None
    assert f"continuing {run} at step " in capsys.readouterr().out
    assert run_main(moto, [*words, tmp_path / "whole"]) is None
    assert same_runs(run, whole)


@pytest.mark.parametrize(
    "task, actions", [("metaworld-drawer-open", 4), ("kitchen-mixed", 9), ("kitchen-partial", 9), ("adroit-pen", 24)]
)
def test_manipulation(tmp_path, capsys, task, actions):
    """Noise that claims to be of these tasks: both phases, a kill, --evaluate by the run's own copies."""
    rng, row = np.random.default_rng(0), 0
    with DatasetWriter(tmp_path / "mine", 64, actions, task=task, mujoco=common.versions()["mujoco"]) as writer:
        for length in (8, 7):
            frames, acted, _ = synthetic_episode(row, length, 64, actions, rng)
            writer.add(frames, acted, np.arange(length) % 4)
            row += length + 1
    words = ["--dataset", tmp_path / "mine", "--runs-dir", tmp_path, *SMALL, *STEPS]
    assert isinstance(run_main(moto, words, crash=8), KeyboardInterrupt)
    assert run_main(moto, words) is None
    unsolved = "note: no episode counts as solved, none is imitated: the highest reward is 3, --bc-success-reward 4"
    assert (unsolved in capsys.readouterr().out) == (task == "kitchen-mixed")  # partial: three objects are enough
    run = tmp_path / "moto" / task / "mine" / "seed0"
    finished = json.loads((run / "finished.json").read_text())
    assert finished["success_last"] in (0, 100) and finished["episodes"] == 3
    assert finished["env_steps"] == 3 * 6 * (2 if task.startswith("metaworld") else 1)  # action repeat
    for part in ("eval", "episodes"):
        assert "success" in rows_of(run, part)[0]
    for name in ("moto.py", "common.py", "manipulation.py"):
        assert (run / name).exists()
    done = run_python(run / "moto.py", "--evaluate", run, "--device", "cpu", "--eval-episodes", 2, cwd=tmp_path)
    assert done.returncode == 0 and re.search(r"^score \S+, success \d+ %, returns \[.*, .*\]$", done.stdout, re.M)


def test_a_changed_environment_is_a_warning(tmp_path):
    """manipulation.py is code of a run like common.py."""
    folder, run = tmp_path / "code", tmp_path / "runs" / "moto" / "metaworld-drawer-open" / "mine" / "seed0"
    folder.mkdir()
    for name in ("algos/moto.py", "common.py", "manipulation.py"):
        shutil.copy(ROOT / name, folder)
    with DatasetWriter(tmp_path / "mine", 64, 4, task="metaworld-drawer-open") as writer:
        writer.add(*synthetic_episode(0, 8, 64, 4, np.random.default_rng(0)))
    words = [folder / "moto.py", "--dataset", tmp_path / "mine", "--runs-dir", tmp_path / "runs", *SMALL]
    words += ["--offline-steps", 2, "--online-episodes", 1, "--updates-per-episode", 1, "--eval-every", 0]
    assert run_python(*words).returncode == 0
    first = json.loads((run / "config.json").read_text())["commit"]
    assert first.startswith("sha256:")
    with open(folder / "manipulation.py", "a") as file:
        file.write("\nCHANGED = True\n")
    again = run_python(*words)
    assert again.returncode == 0 and f"warning: manipulation.py has changed since {run} began" in again.stdout
    assert run_python(*words, "--overwrite").returncode == 0
    assert json.loads((run / "config.json").read_text())["commit"] != first


def test_beginning_online_from_another_run(train, whole, walker_set, tmp_path, monkeypatch):
    error = train("--offline-from", whole)
    assert isinstance(error, UserError) and "--tag" in str(error)
    assert train("--offline-from", whole, "--tag", "on") is None
    run = train.folder("on-seed0")
    assert not (run / "offline.csv").exists() and len(rows_of(run, "online")) == 7
    header, first, *_ = rows_of(run, "eval")
    assert first[0] == first[header.index("env_steps")] == "0"  # the value that the online phase begins from
    assert first[1:] == rows_of(whole, "eval")[1][1:]  # is that of the other run's offline end: it is the same agent
    assert isinstance(train("--offline-from", whole, "--tag", "again", crash=1), KeyboardInterrupt)
    assert train("--offline-from", whole, "--tag", "again") is None
    assert rows_of(train.folder("again-seed0"), "eval") == rows_of(run, "eval")  # that first value stands there once
    assert train("--seed", 1) is None
    other = train.folder("seed1")
    assert isinstance(train("--offline-from", other, "--tag", "two", crash=1), KeyboardInterrupt)
    assert train("--offline-from", whole, "--tag", "two") is None  # nothing had begun: it may have another donor
    assert rows_of(train.folder("two-seed0"), "eval") == rows_of(run, "eval")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    words = ["--dataset", walker_set, "--runs-dir", tmp_path / "runs", *SMALL, *STEPS, "--offline-from", whole]
    args = common.typed_args(moto.Args, moto.TUNED, moto.QUICK, [str(word) for word in [*words, "--tag", "on"]])
    state_of = importlib.import_module("run_all").state_of
    assert state_of(run, args, ROOT / "algos" / "moto.py", None) == "finished"  # its offline steps are the donor's
    args.actor_lr = 1.0
    assert state_of(run, args, ROOT / "algos" / "moto.py", None) == "new"
    error = train("--offline-from", whole, "--tag", "none", "--online-episodes", 0)
    assert isinstance(error, UserError) and "also give --online-episodes" in str(error)
    error = train("--offline-from", whole, "--tag", "wide", "--units", 14)
    assert isinstance(error, UserError) and "--units 12, here 14" in str(error)
    assert isinstance(train("--tag", "short", crash=2), KeyboardInterrupt)
    shutil.copy(whole / "offline.pt", train.folder("short-seed0"))  # of a run that ended before a checkpoint
    assert isinstance(train("--tag", "short", crash=2), KeyboardInterrupt)
    error = train("--offline-from", train.folder("short-seed0"), "--tag", "none")
    assert isinstance(error, UserError) and "has not finished its offline phase of 3 updates" in str(error)
    assert not train.folder("none-seed0").exists()


@pytest.mark.parametrize("donor", ["none", "itself"])
def test_a_wrong_donor_overwrites_nothing(train, whole, donor):
    assert train("--tag", "on") is None
    before = sorted(path.name for path in train.folder("on-seed0").iterdir())
    error = train("--offline-from", train.folder({"none": "x-seed0", "itself": "on-seed0"}[donor]), "--tag", "on",
                  "--overwrite")  # fmt: skip
    message = {"none": "there is no config.json", "itself": "is this run itself; give this one another --tag"}[donor]
    assert isinstance(error, UserError) and message in str(error)
    assert sorted(path.name for path in train.folder("on-seed0").iterdir()) == before
    assert (train.folder("on-seed0") / "weights.pt").exists()


def test_a_run_that_has_begun_needs_its_donor_no_more(train, tmp_path, whole):
    donor = tmp_path / "donor"
    shutil.copytree(whole, donor)
    assert isinstance(train("--offline-from", donor, "--tag", "on", crash=4), KeyboardInterrupt)
    shutil.rmtree(donor)
    assert train("--offline-from", donor, "--tag", "on") is None


def test_optimisers_come_along(train, whole, monkeypatch):
    seen, original = [], moto.Agent.update

    def update(self, *args):
        seen.append([self.optimizers[name].state["count"].item() for name in ("model", "actor", "critic")])
        return original(self, *args)

    monkeypatch.setattr(moto.Agent, "update", update)
    assert train("--offline-from", whole, "--tag", "on") is None
    assert seen[0] == [3, 3, 3]


def test_offline_alone_and_more_episodes_later(train, tmp_path):
    assert isinstance(train(crash=3, steps=["--offline-steps", 4, "--eval-every", 2]), KeyboardInterrupt)
    error = train(steps=["--offline-steps", 4, "--eval-every", 2, "--online-episodes", 1])  # it has no room for them
    assert isinstance(error, UserError) and "--online-episodes 0 -> 1" in str(error)
    assert train(steps=["--offline-steps", 4, "--eval-every", 2]) is None  # from the checkpoint of update 2
    run = train.folder()
    assert train("--runs-dir", tmp_path / "whole", steps=["--offline-steps", 4, "--eval-every", 2]) is None
    other = tmp_path / "whole" / "moto" / "walker-walk" / "noise" / "seed0"
    assert all(rows_of(run, part) == rows_of(other, part) for part in ("offline", "eval"))
    ours, theirs = (torch.load(folder / "weights.pt", weights_only=True) for folder in (run, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "_extra_state")
    assert not (run / "online").exists() and "env_steps" not in rows_of(run, "eval")[0]
    assert isinstance(train("--tag", "more", crash=6), KeyboardInterrupt)
    more = ["--offline-steps", 3, "--online-episodes", 4, "--updates-per-episode", 2]
    assert train("--tag", "more", steps=more) is None
    assert len(rows_of(train.folder("more-seed0"), "online")) == 9


def test_the_model_alone_first(train, walker_set, tmp_path):
    """A phase of its own, in which a run can be stopped and goes on bit by bit; the online phase has none."""
    steps = ["--offline-steps", 4, "--model-first", 2, "--eval-every", 1, "--online-episodes", 1]
    words = ["--dataset", walker_set, "--runs-dir", tmp_path / "runs", *SMALL, *steps, "--updates-per-episode", 1]
    both = ("update", "update_model")
    assert isinstance(run_main(moto, words, both, crash=2), KeyboardInterrupt)
    assert run_main(moto, words, both) is None
    run = train.folder()
    found = {part: [int(row[0]) for row in rows_of(run, part)[1:]] for part in ("model", "offline", "online")}
    assert found == {"model": [1, 2], "offline": [3, 4], "online": [5]}
    whole = [tmp_path / "whole" if word == tmp_path / "runs" else word for word in words]
    assert run_main(moto, whole) is None
    other = tmp_path / "whole" / run.relative_to(tmp_path / "runs")
    assert same_runs(run, other) and rows_of(run, "model") == rows_of(other, "model")
    assert train("--offline-from", run, "--tag", "on", "--model-first", 2) is None  # its donor's, not its own
    assert not (train.folder("on-seed0") / "model.csv").exists()
    error = train("--model-first", 4, "--tag", "never")
    assert isinstance(error, UserError) and "--offline-steps 3: fewer than --model-first 4" in str(error)


@pytest.mark.parametrize(
    "flags, missing",
    [([], set()), (["--penalty", "none"], {"imag/penalty"}), (["--bc-filter", "none"], {"bc/kept"}),
     (["--penalty", "none", "--bc-filter", "none"], {"imag/penalty", "bc/kept"}),
     (["--penalty", "none", "--bc-filter", "none", "--value", "dreamer"],
      {"imag/penalty", "bc/kept", "critic/q_data"})],
)  # fmt: skip
def test_the_ablations_of_figure_3_run(train, flags, missing):
    """missing: what an ablation takes away is 0, or not in the metrics, in both phases; the rest is there."""
    steps = ["--offline-steps", 1, "--online-episodes", 1, "--updates-per-episode", 1]
    assert train("--bc-filter", "all", *flags, "--eval-every", 0, steps=steps) is None
    for phase in ("offline", "online"):
        names, values = rows_of(train.folder(), phase)
        found = dict(zip(names, map(float, values)))
        assert {name for name in ("imag/penalty", "bc/kept", "critic/q_data") if not found.get(name)} == missing


def test_a_run_with_windows_apart_for_the_agent(train, whole):
    """The model learns from the same windows, the actor from others."""
    steps = ["--offline-steps", 1, "--online-episodes", 1, "--updates-per-episode", 1]
    assert train("--agent-batch-size", 3, "--eval-every", 0, steps=steps) is None
    found, expected = (dict(zip(*rows_of(run, "offline")[:2])) for run in (train.folder(), whole))
    assert found["model/loss"] == expected["model/loss"] and found["imag/value"] != expected["imag/value"]


def test_the_runs_own_episodes_are_gone(train):
    assert isinstance(train(crash=8), KeyboardInterrupt)
    (train.folder() / "online" / "image.npy").unlink()  # most of the bytes; what is made in its place is black
    for _ in range(2):  # the first try makes nothing that the second would take for episodes
        error = train()
        assert isinstance(error, UserError) and "online is gone" in str(error)
    shutil.rmtree(train.folder() / "online")
    for _ in range(2):
        error = train()
        assert isinstance(error, UserError) and "online is gone" in str(error)


def test_a_set_given_by_its_path_has_its_own_tasks_settings(walker_set, tmp_path):
    args = common.typed_args(moto.Args, moto.TUNED, moto.QUICK, ["--dataset", str(walker_set)])
    assert (args.task, args.bc_filter, args.online_episodes, args.eval_episodes) == ("walker-walk", "return", 0, 10)
    own = write_set(tmp_path / "robot", size=64)
    args = common.typed_args(moto.Args, moto.TUNED, moto.QUICK, ["--dataset", str(own)])
    assert (args.task, args.bc_filter, args.online_episodes) == ("own", "return", 0)


def test_evaluating_a_run_takes_its_own_number_of_episodes(whole, tmp_path):
    args = common.typed_args(moto.Args, moto.TUNED, moto.QUICK, ["--evaluate", str(whole)])
    assert args.eval_episodes == 1  # neither 20, of the default task, nor walker-walk's 10
    args = common.typed_args(moto.Args, moto.TUNED, moto.QUICK, ["--evaluate", str(whole), "--eval-episodes", "3"])
    assert args.eval_episodes == 3


def test_what_cannot_be(train, tmp_path):
    own = write_set(tmp_path / "robot", size=64, lengths=(9, 9))
    error = train(dataset=own)
    assert isinstance(error, UserError) and "names no task to collect in" in str(error)
    error = train("--window", 8)
    assert isinstance(error, UserError) and "online episodes have 7 rows, --window 8 needs as many" in str(error)
    error = train("--bc-quantile", 50)
    assert isinstance(error, UserError) and "--bc-quantile 50.0: from 0 to 1" in str(error)
    error = train("--window", 1)
    assert isinstance(error, UserError) and "--window 1: at least 2" in str(error)
    error = train("--value", "dreamer", "--bc-filter", "advantage")
    assert isinstance(error, UserError) and "--bc-filter advantage needs --value expansion" in str(error)
    error = train(steps=["--offline-steps", 0])
    assert isinstance(error, UserError) and "there is nothing to do" in str(error)
    error = train("--value", "dreamer", "--horizon", 1)
    assert isinstance(error, UserError) and "--horizon 1: at least 2" in str(error)
    error = train("--online-episodes", -1)
    assert isinstance(error, UserError) and "--online-episodes -1: at least 0" in str(error)

    error = train(dataset=write_set(tmp_path / "small"))
    assert isinstance(error, UserError) and "has images of 12 px; the decoder gives 64" in str(error)
    with DatasetWriter(tmp_path / "other", 64, 2, task="walker-walk") as writer:
        writer.add(*synthetic_episode(0, 9, 64, 2, np.random.default_rng(0)))
    error = train("--eval-every", 0, dataset=tmp_path / "other")
    assert isinstance(error, UserError) and "2 action dimensions, walker-walk 6" in str(error)


def test_a_set_that_cannot_be_used_takes_no_room(train):
    """Nothing is reserved for episodes that are not played, and nothing of an older run is lost."""
    assert train() is None
    error = train("--window", 14, "--episode-steps", 20, "--overwrite")
    assert isinstance(error, UserError) and "its longest episode has 13 rows, --window 14" in str(error)
    assert Dataset(train.folder() / "online").num_episodes == 3
    error = train("--accelerate", "graph", "--overwrite")
    assert isinstance(error, UserError) and "--accelerate graph" in str(error)
    assert Dataset(train.folder() / "online").num_episodes == 3
    shutil.rmtree(train.folder())
    error = train("--window", 14, "--episode-steps", 20)
    assert isinstance(error, UserError) and "its longest episode has 13 rows, --window 14" in str(error)
    assert not (train.folder() / "online").exists()


def test_one_update_per_transition_unless_told(train):
    assert train(steps=["--eval-every", 0]) is None
    assert json.loads((train.folder() / "finished.json").read_text())["steps"] == 21  # 12 + 9 transitions


def test_an_action_that_is_not_finite(train, monkeypatch):
    original = moto.Agent.explore

    def explore(self, *args):
        action, state = original(self, *args)
        return action * math.nan, state

    monkeypatch.setattr(moto.Agent, "explore", explore)
    error = train()
    assert isinstance(error, UserError) and "online episode 0: the actor's action is not finite" in str(error)


def test_an_episode_ends_where_the_task_ends_it():
    """--episode-steps beyond that reserves no more rows."""
    for task, asked, actions in (
        ("walker-walk", 6, 6),
        ("walker-walk", 1_000, 500),
        ("walker-walk", None, 500),
        ("lqr-lqr_2_1", 6, 6),
    ):
        env = common.make_env(task, None, episode_steps=asked)
        assert env.clock() == (actions, 2)
        env.close()
    env = common.make_env("lqr-lqr_2_1", None)
    with pytest.raises(UserError, match="no end of their own; give --episode-steps"):
        env.clock()
    env.close()


def test_a_loss_that_is_not_finite(train, monkeypatch):
    original = moto.Agent.critic_loss

    def broken(self, rollout, batch):
        loss, metrics = original(self, rollout, batch)
        return loss, metrics | {"critic/data_loss": torch.tensor(math.nan)}

    monkeypatch.setattr(moto.Agent, "critic_loss", broken)
    error = train()
    assert isinstance(error, UserError) and "critic/data_loss not finite at step 1" in str(error)


def test_a_run_can_be_inspected(whole, walker_set, tmp_path):
    words = [ROOT / "benchmarks" / "inspect_world_model.py", whole, "--batch", 4, "--windows", 2, "--context", 2]
    result = run_python(*words, "--episodes", 1, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["trained_on"] and report["penalty_random_policy"]["mean"] > 0 and "return" in report


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("agent_batch_size", [None, 3])
def test_a_cuda_graph_goes_on_drawing_and_learning(agent_batch_size):
    """Three warm-ups, which are eager code, the capture with its replay, two replays."""
    found = {}
    for accelerate in ("eager", "graph"):
        agent = make_agent(device="cuda", accelerate=accelerate, agent_batch_size=agent_batch_size).to("cuda")
        update, losses = common.accelerate(agent, "update", agent.args), []
        torch.manual_seed(1)
        for seed in range(6):
            batch = common.Sequences(*(part.to("cuda") for part in make_batch(agent, seed=seed)))
            other = [part.to("cuda") for part in make_batch(agent, 3, seed=10 + seed)] if agent_batch_size else []
            keep = torch.ones(3 if other else 2, 5, device="cuda")
            losses.append({name: value.item() for name, value in update(batch, keep, *other).items()})
        found[accelerate] = losses
    for graphed, eager in zip(found["graph"][:3], found["eager"]):
        assert graphed == pytest.approx(eager, rel=1e-3, abs=1e-5)
    values = [metrics["critic/loss"] for metrics in found["graph"]]
    assert len(set(values)) == 6 and np.isfinite(values).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("buffer_device", ["cpu", "cuda"])
def test_online_episodes_reach_the_gpu(tmp_path, buffer_device):
    dataset, found = Dataset(write_set(tmp_path / "set", lengths=(9, 7), size=64)), []
    for device in ("cpu", "cuda"):
        online = OnlineSet(tmp_path / device, 24, 64, 2)
        buffer = SequenceBuffer(dataset, 8, 4, 0, device, "cpu" if device == "cpu" else buffer_device, online=online)
        for seed in range(2):
            images, actions, rewards, _ = synthetic_episode(20, 6, 64, 2, np.random.default_rng(seed))
            buffer.add(images.transpose(0, 3, 1, 2), actions, rewards, False)
        found.append(buffer.sample(count=40))
    assert found[0].row.max() >= 18  # some are of the run's own
    for one, two in zip(*found):
        assert two.device.type == "cuda" and torch.equal(one, two.cpu())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs g++")
def test_compiled_losses_equal_eager_ones():
    """Where nothing is drawn: modes instead of samples."""
    found = []
    for accelerate in ("eager", "compile"):
        agent = make_agent(window=3, horizon=2, ensemble=1, accelerate=accelerate)
        mode = functools.partial(moto.RSSM.sample, agent.model.rssm, mode=True)
        agent.model.rssm.sample = lambda logits, _=False, mode=mode: mode(logits)
        update = common.accelerate(agent, "update", agent.args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moto.TruncatedNormal, "sample", lambda self, gradient: 0.9 * self.loc)
            found.append([update(make_batch(agent, rows=3), torch.ones(2, 3)) for _ in range(2)])
    for one, two in zip(*found):
        for name in one:
            assert one[name].item() == pytest.approx(two[name].item(), rel=1e-3, abs=1e-5), name
