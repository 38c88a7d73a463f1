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
import torch.nn.functional as F
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


def copy_of(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(module: nn.Module, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(now, then) for now, then in zip(module.parameters(), before))


# ---- sizes and beginnings ----


@EACH
@pytest.mark.parametrize("size, embed_dim", [(84, 39_200), (64, 20_000), (15, 32)])
def test_sizes_follow_from_the_image(module, size, embed_dim):
    with torch.device("meta"):  # sizes alone, no memory and no initialisation
        encoder, obs = module.Encoder(9, size), torch.empty(2, 9, size, size)
    assert encoder(obs).shape == (2, encoder.embed_dim) == (2, embed_dim)
    with pytest.raises(common.UserError, match="14 px"):
        module.Encoder(9, 14)


@EACH
def test_defaults_are_the_papers(module):
    expected = {"batch_size": 256, "lr": 1e-4, "feature_dim": 50, "hidden_dim": 1024, "steps": None, "augment": "shift"}
    expected |= {"noise_start": 1.0, "noise_end": 0.1, "noise_steps": 250_000, "noise_clip": 0.3, "eval_episodes": 10}
    expected |= {} if module is bc else {"nstep": 3, "gamma": 0.99, "tau": 0.01}
    expected |= {
        bc: {"bc_noise": False},
        drq_bc: {"bc_alpha": 2.5, "bc_deterministic": False},
        cql: {"cql_alpha": 1.0, "cql_actions": "full", "cql_samples": 10, "importance_sample": False},
    }[module]
    args = module.Args()
    assert {name: getattr(args, name) for name in expected} == expected


def test_cqls_tuned_is_table_10():
    table = {"random": (0.5, 0.5), "mixed": (0.5, 0.5), "medium": (2, 10), "medexp": (2, 1), "expert": (5, 20)}
    tasks = ("walker-walk", "cheetah-run")
    expected = {(task, name): {"cql_alpha": row[i]} for name, row in table.items() for i, task in enumerate(tasks)}
    assert expected == cql.TUNED


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


@EACH
def test_optimisers(module):
    agent = make_agent(module)
    parts = {"actor": ["encoder", "actor"]} if module is bc else {"critic": ["encoder", "critic"], "actor": ["actor"]}
    assert list(agent.optimizers) == list(parts)
    for name, optimizer in agent.optimizers.items():
        (group,) = optimizer.param_groups
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad")}
        assert settings == {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
        expected = [id(p) for part in parts[name] for p in getattr(agent, part).parameters()]
        assert sorted(id(p) for p in group["params"]) == sorted(expected)


# ---- augmentation, pixels, noise ----


def crops(obs: torch.Tensor, pad: int = 4) -> torch.Tensor:
    """All (2 pad + 1)^2 integer crops of the border-repeated image. obs (C, S, S) -> (K, C, S, S), dy slowest."""
    size, offsets = obs.shape[-1], range(2 * pad + 1)
    padded = np.pad(obs.numpy(), ((0, 0), (pad, pad), (pad, pad)), mode="edge")
    return torch.from_numpy(np.stack([padded[:, dy : dy + size, dx : dx + size] for dy in offsets for dx in offsets]))


def test_crops_equal_the_grid_sample_form_of_drqv2_for_every_shift():
    size, pad = 13, 4
    obs = make_batch(size).obs[:1]
    padded, wide = F.pad(obs.float(), (pad,) * 4, mode="replicate"), size + 2 * pad
    expected = crops(obs[0])
    for k, (dy, dx) in enumerate((dy, dx) for dy in range(9) for dx in range(9)):
        # align_corners=False: the centre of pixel p of W lies at (2 p + 1) / W - 1
        y, x = ((2 * (torch.arange(size) + shift) + 1) / wide - 1 for shift in (dy, dx))
        grid = torch.stack([x.expand(size, size), y[:, None].expand(size, size)], -1)[None]
        sampled = F.grid_sample(padded, grid, padding_mode="zeros", align_corners=False)
        torch.testing.assert_close(sampled[0], expected[k].float(), atol=0.02, rtol=0)  # of 255: float rounding


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


@EACH
def test_augment_flag_and_scale_pixels(module):
    obs = make_batch().obs
    assert make_agent(module, augment="none").augment(obs) is obs
    assert not torch.equal(make_agent(module, augment="shift").augment(obs), obs)
    obs = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    scaled = module.scale_pixels(obs)
    torch.testing.assert_close(scaled, torch.tensor([[[[-0.5, -0.3], [-0.1, 0.5]]]]), atol=1e-7, rtol=0)
    assert obs.flatten().tolist() == [0, 51, 102, 255]


@EACH
def test_noise_schedule(module):
    steps = [0, 50_000, 100_000, 125_000, 250_000, 10**6]
    stds = [module.noise_std(module.Args(device="cpu"), step) for step in steps]
    assert all(std.shape == () and std.dtype == torch.float32 for std in stds)
    assert [std.item() for std in stds] == pytest.approx([1.0, 0.82, 0.64, 0.55, 0.1, 0.1], abs=1e-6)


@EACH
def test_noise_is_clipped_and_actions_stay_in_range(module):
    agent, mean = make_agent(module), torch.zeros(2000, 2)
    noise = agent.noisy(mean, torch.tensor(100.0))  # so wide that nearly every draw is clipped
    assert noise.abs().max().item() == pytest.approx(0.3, abs=1e-6) and (noise.abs() > 0.2999).float().mean() > 0.99
    torch.manual_seed(0)
    draws = torch.randn(2000, 2)
    torch.manual_seed(0)
    torch.testing.assert_close(agent.noisy(mean, torch.tensor(0.2)), (0.2 * draws).clamp(-0.3, 0.3))
    edge = agent.noisy(torch.tensor([[0.999, -0.999]]).repeat(1000, 1), torch.tensor(1.0))
    assert edge.max() < 1 and edge.min() > -1
    assert edge.abs().max().item() == pytest.approx(1 - 1e-6, abs=2e-7)
    mean = torch.tensor([[-0.9999, 0.0, 0.9999], [1.5, -1.5, 0.3]], requires_grad=True)
    action = agent.noisy(mean, torch.tensor(1.0))
    (gradient,) = torch.autograd.grad(action.sum(), mean)
    assert (action.detach() != mean).any() and torch.equal(gradient, torch.ones_like(mean))  # also where clamped


# ---- losses of settings that the released code has not ----


@EACH
def test_act_is_the_mean_action_without_augmentation(module):
    agent, obs = make_agent(module), make_batch().obs
    state = torch.get_rng_state()
    action = agent.act(obs)
    assert torch.equal(torch.get_rng_state(), state) and not action.requires_grad  # evaluation draws nothing
    torch.testing.assert_close(action, agent.actor(agent.encoder(module.scale_pixels(obs))))


def test_bc_loss_is_the_mean_squared_distance_of_the_mean_action():
    agent, batch = make_agent(bc, augment="none"), make_batch()
    loss, metrics = agent.actor_loss(batch, HALF)
    expected = (agent.act(batch.obs) - batch.action).square().mean()  # over batch and action dimensions
    assert loss.item() == metrics["actor/loss"].item() == pytest.approx(expected.item(), rel=1e-5)


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


def test_lam_has_a_floor_where_q_is_zero():
    agent, batch = make_agent(drq_bc), make_batch()
    for q in (agent.critic.q1, agent.critic.q2):
        nn.init.zeros_(q[-1].weight)
    embed = agent.encoder(drq_bc.scale_pixels(batch.obs)).detach()
    loss, metrics = agent.actor_loss(embed, batch, HALF)
    assert loss.item() == pytest.approx(metrics["actor/bc_loss"].item())
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in agent.actor.parameters())


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
def test_each_step_moves_its_own_weights_alone(module):
    agent, batch = make_agent(module), make_batch()
    parts = {name: getattr(agent, name) for name in ("encoder", "actor", "critic", "critic_target")}
    assert same(agent.critic_target, copy_of(agent.critic))  # begins as a copy, not as the same memory
    assert not any(parameter.requires_grad for parameter in agent.critic_target.parameters())

    def moved_by(name, loss):
        before = {part: copy_of(module) for part, module in parts.items()}
        agent.minimize(name, loss)
        return {part for part, module in parts.items() if not same(module, before[part])}

    loss, embed, _ = agent.critic_loss(batch, HALF)
    assert not embed.requires_grad
    assert moved_by("critic", loss) == {"encoder", "critic"}
    critics = [*agent.encoder.parameters(), *agent.critic.parameters()]
    assert all(parameter.grad.abs().sum() > 0 for parameter in critics)
    assert all(parameter.grad is None for parameter in agent.actor.parameters())
    gradients = [parameter.grad.clone() for parameter in critics]
    loss, _ = agent.actor_loss(embed, batch, HALF)
    assert moved_by("actor", loss) == {"actor"}
    for parameter, before in zip(critics, gradients):
        assert torch.equal(parameter.grad, before)  # the actor's loss added nothing
    agent.minimize("critic", agent.critic_loss(batch, HALF)[0])
    assert not any(torch.equal(p.grad, before) for p, before in zip(critics, gradients))  # and none is left over


@EACH
def test_minimize_reaches_every_group_of_an_optimiser(module):
    """A learning rate of its own for one layer is a common change to a copied file."""
    agent = make_agent(module)
    first, *rest = agent.actor.parameters()
    agent.optimizers["actor"] = torch.optim.Adam([{"params": [first], "lr": 1e-5}, {"params": rest}], 1e-3)
    before = copy_of(agent.actor)
    agent.update(make_batch(), HALF)
    assert not any(torch.equal(now, then) for now, then in zip(agent.actor.parameters(), before))


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
