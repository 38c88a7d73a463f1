"""The model-free files against definitions. What the released code has too, networks, losses and steps, is in
test_released.py."""

import math
import shutil

import bc
import cql
import drq_bc
import numpy as np
import pytest
import torch
from conftest import FourStepsPool
from scipy.special import logsumexp
from torch import nn

import common

FILES = {"bc": bc, "drq_bc": drq_bc, "cql": cql}
EACH = pytest.mark.parametrize("module", FILES.values(), ids=FILES)
CRITICS = pytest.mark.parametrize("module", [drq_bc, cql], ids=["drq_bc", "cql"])
SMALL = {"device": "cpu", "precision": "fp32", "accelerate": "eager", "feature_dim": 8, "hidden_dim": 16}
HALF = torch.tensor(0.5)  # the noise's deviation


def make_agent(module, size=21, action_dim=2, **flags):
    torch.manual_seed(0)
    return module.Agent(module.Args(**(SMALL | flags)), (9, size, size), action_dim)


def make_batch(size=21, action_dim=2, count=4, seed=0) -> common.Batch:
    """Random frames; the last transition of the batch is terminal (discount 0)."""
    rng = np.random.default_rng(seed)
    frames = [torch.from_numpy(rng.integers(0, 256, (count, 9, size, size), np.uint8)) for _ in range(2)]
    action, reward = rng.uniform(-1, 1, (count, action_dim)), rng.uniform(0, 2, (count, 1))
    discount = np.full((count, 1), 0.99**3)
    discount[-1] = 0
    action, reward, discount = (torch.from_numpy(x.astype(np.float32)) for x in (action, reward, discount))
    return common.Batch(frames[0], action, reward, discount, frames[1])


# ---- sizes and beginnings ----


@EACH
def test_defaults_are_the_papers(module):
    expected = {"lr": 1e-4, "batch_size": 256, "feature_dim": 50, "hidden_dim": 1024, "noise_clip": 0.3}
    expected |= {} if module is bc else {"nstep": 3, "gamma": 0.99, "tau": 0.01}
    assert {name: getattr(module.Args(), name) for name in expected} == expected


@EACH
def test_initialisation_is_orthogonal_with_zero_biases(module):
    agent = make_agent(module)
    layers = [layer for layer in agent.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == (4 + 4 if module is bc else 4 + 4 + 2 * 7)
    for layer in layers:
        gain = 2.0 if isinstance(layer, nn.Conv2d) else 1.0  # squared: W W^T = gain^2 I
        weight = layer.weight.detach().flatten(1).double()
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
        expected = gain * torch.eye(len(weight), dtype=torch.float64)
        torch.testing.assert_close(weight @ weight.T, expected, atol=1e-5, rtol=0)
        assert not layer.bias.any()


# ---- augmentation, pixels, noise ----


def crops(obs: torch.Tensor, pad: int = 4) -> torch.Tensor:
    """All (2 pad + 1)^2 integer crops of the border-repeated image, which is what DrQ-v2's grid_sample gives.
    obs (C, S, S) -> (K, C, S, S), dy slowest."""
    size, offsets = obs.shape[-1], range(2 * pad + 1)
    padded = np.pad(obs.numpy(), ((0, 0), (pad, pad), (pad, pad)), mode="edge")
    return torch.from_numpy(np.stack([padded[:, dy : dy + size, dx : dx + size] for dy in offsets for dx in offsets]))


@EACH
def test_random_shift_is_one_of_the_81_crops_and_uniform(module):
    torch.manual_seed(0)
    total, size = 4050, 15
    obs = make_batch(size, count=1).obs  # noise: no two of its crops are equal
    before = obs.clone()
    shifted = module.random_shift(obs.repeat(total, 1, 1, 1))  # each image on its own
    assert shifted.shape == (total, 9, size, size) and shifted.dtype == torch.uint8 and torch.equal(obs, before)
    every = crops(obs[0]).flatten(1)  # all nine channels: the stacked frames must have moved together
    counts = torch.stack([(shifted.flatten(1) == crop).all(1).sum() for crop in every]).float()
    assert counts.sum() == total and counts.min() > 0
    chi2 = ((counts - 50) ** 2 / 50).sum().item()
    assert chi2 < 80 + 5 * (2 * 80) ** 0.5  # 80 degrees of freedom
    assert not torch.equal(make_agent(module, size).augment(obs), obs)  # it is on by default


@EACH
def test_noise_schedule(module):
    steps = [0, 50_000, 100_000, 125_000, 250_000, 10**6]
    stds = [module.noise_std(module.Args(device="cpu"), step) for step in steps]
    assert all(std.shape == () and std.dtype == torch.float32 for std in stds)
    assert [std.item() for std in stds] == pytest.approx([1.0, 0.82, 0.64, 0.55, 0.1, 0.1], abs=1e-6)


@EACH
def test_noisy_actions_stay_in_range_and_gradients_pass_where_they_are_clamped(module):
    agent = make_agent(module)
    edge = agent.noisy(torch.tensor([[0.999, -0.999]]).repeat(1000, 1), torch.tensor(1.0))
    assert 1 - 2e-6 < edge.abs().max() < 1
    mean = torch.tensor([[-0.9999, 0.0, 0.9999], [1.5, -1.5, 0.3]], requires_grad=True)
    action = agent.noisy(mean, torch.tensor(1.0))
    (gradient,) = torch.autograd.grad(action.sum(), mean)
    assert (action.detach() != mean).any() and torch.equal(gradient, torch.ones_like(mean))


# ---- losses of settings that the released code has not ----


@EACH
def test_act_is_the_mean_action_without_augmentation(module):
    agent, obs = make_agent(module), make_batch().obs
    state = torch.get_rng_state()
    action = agent.act(obs)
    assert torch.equal(torch.get_rng_state(), state) and not action.requires_grad  # evaluation draws nothing
    torch.testing.assert_close(action, agent.actor(agent.encoder(module.scale_pixels(obs))))


def test_bc_deterministic_clones_the_mean_and_values_the_noisy_action():
    agent, batch = make_agent(drq_bc, augment="none", bc_deterministic=True), make_batch()
    embed = agent.encoder(drq_bc.scale_pixels(batch.obs)).detach()
    torch.manual_seed(7)
    loss, _ = agent.actor_loss(embed, batch, HALF)
    torch.manual_seed(7)
    mean = agent.actor(embed)
    q = torch.minimum(*agent.critic(embed, agent.noisy(mean, HALF)))
    expected = (mean - batch.action).square().mean() - 2.5 * q.mean() / q.abs().mean()
    assert q.abs().mean() > 1e-2  # the floor of the normaliser is not in play
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("importance", [False, True])
def test_cql_with_uniform_actions_alone(importance):
    """Paper's text. log sum exp of Q(z, a_k), each less the log of the density 1 / 4 where it is divided out."""
    agent = make_agent(cql, augment="none", cql_alpha=3.0, cql_actions="uniform", importance_sample=importance)
    batch = make_batch()
    torch.manual_seed(5)
    torch.randn(4, 2)  # the next action's noise
    uniform = torch.rand(10, 4, 2) * 2 - 1
    torch.manual_seed(5)
    loss, embed, metrics = agent.critic_loss(batch, HALF)
    values, data, term = agent.critic(embed, uniform), agent.critic(embed, batch.action), 0
    for q, q_data in zip(values, data):
        values_of_j = q.detach().numpy() + importance * math.log(4)
        term += np.mean(logsumexp(values_of_j, axis=0) - q_data.detach().numpy())
    assert metrics["critic/conservative"].item() == pytest.approx(term, rel=1e-4, abs=1e-5)
    assert loss.item() == pytest.approx(metrics["critic/td_loss"].item() + 3.0 * term, rel=1e-4)
    for head in (agent.critic.q1, agent.critic.q2):
        nn.init.zeros_(head[-1].weight)
    _, _, metrics = agent.critic_loss(batch, HALF)  # equal values: the logarithm of their number, for both critics
    assert metrics["critic/conservative"].item() == pytest.approx(2 * math.log(40 if importance else 10), rel=1e-6)


# ---- updates ----


@CRITICS
def test_the_target_begins_as_a_copy_and_no_gradient_is_left_over(module):
    agent, batch = make_agent(module), make_batch()
    for target, critic in zip(agent.critic_target.parameters(), agent.critic.parameters(), strict=True):
        assert torch.equal(target, critic) and target is not critic and not target.requires_grad
    agent.update(batch, HALF)
    loss, embed, _ = agent.critic_loss(batch, HALF)
    critics = [*agent.encoder.parameters(), *agent.critic.parameters()]
    expected = torch.autograd.grad(loss, critics, retain_graph=True)
    agent.minimize("critic", loss)
    agent.minimize("actor", agent.actor_loss(embed, batch, HALF)[0])  # adds nothing to the critics'
    assert not embed.requires_grad
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(critics, expected))


def some_updates(module, **flags) -> tuple[nn.Module, list[dict]]:
    """The agent after three updates on as many batches, and their metrics."""
    agent = make_agent(module, **flags)
    common.accelerate(agent, agent.args)
    torch.manual_seed(1)
    metrics = [agent.update(make_batch(seed=k), HALF) for k in range(3)]
    return agent, [{name: value.item() for name, value in row.items()} for row in metrics]


@EACH
def test_bf16_stays_close_to_fp32(module):
    """bfloat16 keeps 8 bits: losses agree to 3 %. DrQ+BC's actor loss is coarser, for lam divides by mean|Q|, which is
    small in a new network: lam is held as 1 / lam, to which it is proportional. Adam moves a weight by at most about lr
    a step, so weights part by at most 3 * 2 lr."""
    (agent, rows), (other, others) = some_updates(module), some_updates(module, precision="bf16")
    for row, expected in zip(rows, others):
        for name, value in row.items():
            close = {"rel": 0.03, "abs": 0.2 if module is drq_bc and name == "actor/loss" else 0.01}
            power = -1 if name == "actor/lam" else 1
            assert value**power == pytest.approx(expected[name] ** power, **close)
    assert rows != others  # autocast was on
    for now, then in zip(agent.parameters(), other.parameters()):
        assert then.dtype == torch.float32
        torch.testing.assert_close(now, then, rtol=0, atol=3 * 2 * 1e-4)


@pytest.mark.slow
@EACH
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs g++")
def test_compiled_losses_equal_eager(module):
    from torch._inductor import config

    agent, rows = some_updates(module)
    with config.patch(fallback_random=True):  # eager's random numbers, else there is nothing to compare
        compiled, others = some_updates(module, accelerate="compile")
    for row, expected in zip(rows, others):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for now, then in zip(agent.parameters(), compiled.parameters()):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-4)


@EACH
def test_evaluate_plays_the_mean_action_on_its_own_seeds(module):
    agent, pool, seen = make_agent(module), FourStepsPool("", 21, 3), []

    def step(actions):
        seen.append((pool.obs, actions, agent.training))
        obs, reward, terminal = common.EnvPool.step(pool, actions)
        pool.done[0] |= len(seen) == 2  # the first episode is shorter
        return obs, reward, terminal

    pool.step, state = step, torch.get_rng_state()
    metrics, frames = module.evaluate(agent, pool, agent.args)
    assert torch.equal(torch.get_rng_state(), state)
    starts = [np.random.default_rng(1_000_000 + i).uniform(-1, 1, 2) for i in range(3)]
    np.testing.assert_array_equal([env.history[0] for env in pool.envs], starts)
    rewards = np.stack([1 + actions[:, 0].astype(np.float64) for _, actions, _ in seen])
    rewards[2:, 0] = 0
    np.testing.assert_allclose(metrics["return"], rewards.sum(0), rtol=1e-6)
    assert metrics["score"] == pytest.approx(rewards.sum(0).mean() / 10)
    for (obs, actions, training), frame in zip(seen, frames, strict=True):
        np.testing.assert_array_equal(actions, agent.act(torch.from_numpy(obs)).numpy())
        np.testing.assert_array_equal(frame, obs[0, -3:])  # the newest one
        assert not training and agent.training  # a dropout or batch norm of yours rests meanwhile
