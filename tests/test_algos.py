"""The model-free files against oracles: counts, NumPy forward passes, definitions. Small networks, one CPU thread."""

import contextlib
import copy
import shutil

import bc
import cql
import drq_bc
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_set
from torch import nn

import common

EACH = pytest.mark.parametrize("module", [bc, drq_bc, cql], ids=["bc", "drq_bc", "cql"])
CRITICS = pytest.mark.parametrize("module", [drq_bc, cql], ids=["drq_bc", "cql"])
SMALL = {"device": "cpu", "precision": "fp32", "accelerate": "eager", "feature_dim": 8, "hidden_dim": 16}


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


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- a second implementation, in float64 NumPy ----


def numpy_encode(encoder, obs: torch.Tensor) -> np.ndarray:
    x = obs.numpy().astype(np.float64) / 255 - 0.5
    for i, conv in enumerate(encoder.convs):
        stride = 2 if i == 0 else 1
        patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
        weight, bias = conv.weight.detach().numpy().astype(np.float64), conv.bias.detach().numpy()
        x = np.maximum(np.einsum("bchwij,ocij->bohw", patches, weight) + bias[:, None, None], 0)
    return x.transpose(0, 2, 3, 1).reshape(len(x), -1)  # rows, columns, channels


def numpy_layers(layers: nn.Sequential, x: np.ndarray) -> np.ndarray:
    for layer in layers:
        weights = [parameter.detach().numpy().astype(np.float64) for parameter in layer.parameters()]
        if isinstance(layer, nn.Linear):
            x = x @ weights[0].T + weights[1]
        elif isinstance(layer, nn.LayerNorm):
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weights[0] + weights[1]
        else:
            x = np.tanh(x) if isinstance(layer, nn.Tanh) else np.maximum(x, 0)
    return x


def numpy_actor(actor, embed: np.ndarray) -> np.ndarray:
    return numpy_layers(actor.policy, numpy_layers(actor.trunk, embed))


def numpy_critic(critic, embed: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pair = np.concatenate([numpy_layers(critic.trunk, embed), action], -1)
    return numpy_layers(critic.q1, pair), numpy_layers(critic.q2, pair)


def numpy_noisy(mean: np.ndarray, std: float, draw: torch.Tensor, clip: float = 0.3) -> np.ndarray:
    return np.clip(mean + np.clip(std * draw.numpy().astype(np.float64), -clip, clip), -1 + 1e-6, 1 - 1e-6)


# ---- sizes ----


@EACH
@pytest.mark.parametrize("action_dim, actor, critic", [(6, 3_068_124, 4_178_136), (21, 3_083_499, 4_208_856)])
def test_parameter_counts(module, action_dim, actor, critic):
    with torch.device("meta"):  # sizes alone, no memory and no initialisation
        encoder = module.Encoder(9, 84)
        dims = encoder.embed_dim, action_dim, module.Args.feature_dim, module.Args.hidden_dim
        assert count(encoder) == 30_368
        assert count(module.Actor(*dims)) == actor
        if module is not bc:
            assert count(module.Critic(*dims)) == critic


@EACH
@pytest.mark.parametrize(
    "size, chain, embed_dim", [(84, [41, 39, 37, 35], 39_200), (64, [31, 29, 27, 25], 20_000), (15, [7, 5, 3, 1], 32)]
)
def test_sizes_follow_from_the_image(module, size, chain, embed_dim):
    with torch.device("meta"):
        encoder, obs, sides = module.Encoder(9, size), torch.empty(2, 9, size, size), []
    for conv in encoder.convs:
        conv.register_forward_hook(lambda _, inputs, output: sides.append(output.shape[-1]))
    assert encoder(obs).shape == (2, embed_dim)
    assert encoder.embed_dim == embed_dim
    assert sides == chain


@EACH
def test_images_too_small_for_the_encoder_are_refused(module):
    with pytest.raises(common.UserError, match="14 px"):
        module.Encoder(9, 14)


@EACH
def test_defaults_are_the_papers(module):
    expected = {"batch_size": 256, "lr": 1e-4, "feature_dim": 50, "hidden_dim": 1024, "steps": None, "augment": "shift"}
    expected |= {"noise_start": 1.0, "noise_end": 0.1, "noise_steps": 250_000, "noise_clip": 0.3, "eval_episodes": 10}
    if module is not bc:
        expected |= {"nstep": 3, "gamma": 0.99, "tau": 0.01}
    expected |= {
        bc: {"bc_noise": False},
        drq_bc: {"bc_alpha": 2.5, "bc_deterministic": False},
        cql: {"cql_actions": "full", "cql_samples": 10, "importance_sample": False},
    }[module]
    args = module.Args()
    assert {name: getattr(args, name) for name in expected} == expected


# ---- initialisation and optimisers ----


@EACH
def test_initialisation_is_orthogonal_with_zero_biases(module):
    agent = make_agent(module)
    layers = [layer for layer in agent.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == (4 + 4 if module is bc else 4 + 4 + 2 * 7)
    for layer in layers:
        gain = 2.0 if isinstance(layer, nn.Conv2d) else 1.0  # squared: W W^T = gain^2 I
        weight = layer.weight.detach().flatten(1).double()
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
        torch.testing.assert_close(
            weight @ weight.T, gain * torch.eye(len(weight), dtype=torch.float64), atol=1e-5, rtol=0
        )
        assert not layer.bias.any()


@EACH
def test_optimisers(module):
    agent = make_agent(module)
    parts = {"critic": ["encoder", "critic"], "actor": ["actor"]}
    parts = {"actor": ["encoder", "actor"]} if module is bc else parts
    assert list(agent.optimizers) == list(parts)
    for name, optimizer in agent.optimizers.items():
        assert type(optimizer) is torch.optim.Adam
        (group,) = optimizer.param_groups
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad")}
        assert settings == {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
        expected = [p for part in parts[name] for p in getattr(agent, part).parameters()]
        assert {id(p) for p in group["params"]} == {id(p) for p in expected}
        assert len(group["params"]) == len(expected)


@CRITICS
def test_target_critic_starts_as_a_copy_without_gradient(module):
    agent = make_agent(module)
    assert same(agent.critic_target, copy_of(agent.critic))
    assert not any(parameter.requires_grad for parameter in agent.critic_target.parameters())
    shared = {p.data_ptr() for p in agent.critic.parameters()} & {
        p.data_ptr() for p in agent.critic_target.parameters()
    }
    assert not shared  # a copy, not the same memory


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
    shifted = module.random_shift(obs.repeat(total, 1, 1, 1))
    assert shifted.shape == (total, 9, size, size)
    assert shifted.dtype == torch.uint8
    every = crops(obs[0]).flatten(1)  # all nine channels: the stacked frames must have moved together
    counts = torch.zeros(81)
    for k, crop in enumerate(every):
        counts[k] = (shifted.flatten(1) == crop).all(1).sum()
    assert counts.sum() == total
    assert counts.min() > 0
    chi2 = ((counts - 50) ** 2 / 50).sum().item()
    assert chi2 < 80 + 5 * (2 * 80) ** 0.5  # 80 degrees of freedom


@EACH
def test_random_shift_moves_each_image_on_its_own_and_keeps_its_input(module):
    torch.manual_seed(1)
    obs = make_batch(21, count=4).obs
    before = obs.clone()
    shifted = module.random_shift(obs)
    assert torch.equal(obs, before)
    for image, moved in zip(obs, shifted):
        assert (crops(image) == moved).flatten(1).all(1).sum() == 1
    stacked = torch.arange(3, dtype=torch.uint8).repeat_interleave(3)[None, :, None, None] + obs[:, :1] // 2
    moved = module.random_shift(stacked)  # frame f is frame 0 plus f: true after the shift, if they move together
    assert torch.equal(moved[:, 3:6], moved[:, :3] + 1)
    assert torch.equal(moved[:, 6:], moved[:, :3] + 2)


@EACH
def test_augment_flag(module):
    obs = make_batch().obs
    assert make_agent(module, augment="none").augment(obs) is obs
    assert not torch.equal(make_agent(module, augment="shift").augment(obs), obs)


@EACH
def test_scale_pixels(module):
    obs = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    scaled = module.scale_pixels(obs)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.tensor([[[[-0.5, -0.3], [-0.1, 0.5]]]]), atol=1e-7, rtol=0)
    assert obs.flatten().tolist() == [0, 51, 102, 255]


@EACH
@pytest.mark.parametrize(
    "step, value", [(0, 1.0), (50_000, 0.82), (100_000, 0.64), (125_000, 0.55), (250_000, 0.1), (10**6, 0.1)]
)
def test_noise_schedule(module, step, value):
    std = module.noise_std(module.Args(device="cpu"), step)
    assert std.shape == ()
    assert std.dtype == torch.float32
    assert std.item() == pytest.approx(value, abs=1e-6)


@EACH
def test_noise_is_clipped_and_actions_stay_in_range(module):
    agent, mean = make_agent(module), torch.zeros(2000, 2)
    torch.manual_seed(0)
    noise = agent.noisy(mean, torch.tensor(100.0)) - mean  # so wide that every draw is clipped
    assert noise.abs().max().item() == pytest.approx(0.3, abs=1e-6)
    assert (noise.abs() > 0.2999).float().mean() > 0.99
    torch.manual_seed(0)
    draws = torch.randn(2000, 2)
    torch.manual_seed(0)
    torch.testing.assert_close(agent.noisy(mean, torch.tensor(0.2)), (0.2 * draws).clamp(-0.3, 0.3))
    edge = agent.noisy(torch.tensor([[0.999, -0.999]]).repeat(1000, 1), torch.tensor(1.0))
    assert edge.max() < 1
    assert edge.min() > -1
    assert edge.abs().max().item() == pytest.approx(1 - 1e-6, abs=2e-7)
    assert torch.equal(make_agent(module, noise_clip=0.0).noisy(mean, torch.tensor(1.0)), mean)


@EACH
def test_gradient_of_a_clamped_noisy_action_is_exactly_one(module):
    agent = make_agent(module)
    mean = torch.tensor([[-0.9999, 0.0, 0.9999], [1.5, -1.5, 0.3]], requires_grad=True)
    action = agent.noisy(mean, torch.tensor(1.0))
    (gradient,) = torch.autograd.grad(action.sum(), mean)
    assert (action.detach() != mean).any()
    assert torch.equal(gradient, torch.ones_like(mean))


# ---- losses ----


@EACH
def test_act_is_the_mean_action_without_augmentation(module):
    agent, obs = make_agent(module), make_batch().obs
    state = torch.get_rng_state()
    action = agent.act(obs)
    assert torch.equal(torch.get_rng_state(), state)  # evaluation draws nothing
    assert not action.requires_grad
    expected = numpy_actor(agent.actor, numpy_encode(agent.encoder, obs))
    np.testing.assert_allclose(action.numpy(), expected, atol=1e-5)


def test_bc_loss_is_the_mean_squared_distance_of_the_mean_action():
    agent, batch = make_agent(bc, augment="none"), make_batch()
    loss, metrics = agent.actor_loss(batch, torch.tensor(0.5))
    mean = numpy_actor(agent.actor, numpy_encode(agent.encoder, batch.obs))
    expected = np.mean((mean - batch.action.numpy()) ** 2)  # over batch and action dimensions
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["actor/loss"].item() == loss.item()


def test_bc_noise_regresses_the_noisy_sample():
    agent, batch = make_agent(bc, augment="none", bc_noise=True), make_batch()
    torch.manual_seed(3)
    draw = torch.randn(4, 2)
    torch.manual_seed(3)
    loss, _ = agent.actor_loss(batch, torch.tensor(0.5))
    mean = numpy_actor(agent.actor, numpy_encode(agent.encoder, batch.obs))
    expected = np.mean((numpy_noisy(mean, 0.5, draw) - batch.action.numpy()) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    plain, _ = make_agent(bc, augment="none").actor_loss(batch, torch.tensor(0.5))
    assert abs(loss.item() - plain.item()) > 1e-4


def test_critic_loss_and_target():
    agent, batch = make_agent(drq_bc, augment="none"), make_batch()
    with torch.no_grad():
        for parameter in agent.critic_target.parameters():  # else it equals the online critic
            parameter.mul_(1.5)
    torch.manual_seed(5)
    draw = torch.randn(4, 2)
    torch.manual_seed(5)
    loss, embed, metrics = agent.critic_loss(batch, torch.tensor(0.5))
    next_embed = numpy_encode(agent.encoder, batch.next_obs)  # the online encoder, for there is no target encoder
    next_action = numpy_noisy(numpy_actor(agent.actor, next_embed), 0.5, draw)
    next_q = np.minimum(*numpy_critic(agent.critic_target, next_embed, next_action))
    target = batch.reward.numpy() + batch.discount.numpy() * next_q
    assert target[-1] == batch.reward[-1].item()  # terminal: no bootstrap
    assert np.abs(target[:-1] - batch.reward.numpy()[:-1]).min() > 1e-3
    online = numpy_encode(agent.encoder, batch.obs)
    q1, q2 = numpy_critic(agent.critic, online, batch.action.numpy())
    assert loss.item() == pytest.approx(np.mean((q1 - target) ** 2) + np.mean((q2 - target) ** 2), rel=1e-4)
    assert metrics["critic/q"].item() == pytest.approx(q1.mean(), abs=1e-5)
    np.testing.assert_allclose(embed.numpy(), online, atol=1e-5)
    assert not embed.requires_grad


@CRITICS
def test_critic_loss_reaches_encoder_and_critic_alone(module):
    agent = make_agent(module)
    loss, _, _ = agent.critic_loss(make_batch(), torch.tensor(0.5))
    loss.backward()
    for part in (agent.encoder, agent.critic):
        assert all(parameter.grad.abs().sum() > 0 for parameter in part.parameters())
    for part in (agent.actor, agent.critic_target):
        assert all(parameter.grad is None for parameter in part.parameters())


@pytest.mark.parametrize("deterministic", [False, True])
def test_actor_loss(deterministic):
    agent, batch = make_agent(drq_bc, augment="none", bc_deterministic=deterministic), make_batch()
    embed = agent.encoder(drq_bc.scale_pixels(batch.obs)).detach()
    torch.manual_seed(7)
    draw = torch.randn(4, 2)
    torch.manual_seed(7)
    loss, metrics = agent.actor_loss(embed, batch, torch.tensor(0.5))
    mean = numpy_actor(agent.actor, embed.numpy())
    action = numpy_noisy(mean, 0.5, draw)
    q = np.minimum(*numpy_critic(agent.critic, embed.numpy(), action))  # Q is always of the noisy action
    bc_loss = np.mean(((mean if deterministic else action) - batch.action.numpy()) ** 2)
    lam = 2.5 / np.abs(q).mean()
    assert np.abs(q).mean() > 1e-2  # the floor of the normaliser is not in play
    assert loss.item() == pytest.approx(bc_loss - lam * q.mean(), rel=1e-4)
    assert metrics["actor/bc_loss"].item() == pytest.approx(bc_loss, rel=1e-4)
    assert metrics["actor/q"].item() == pytest.approx(q.mean(), abs=1e-5)


def test_lam_is_a_constant_to_the_gradient():
    agent, batch = make_agent(drq_bc), make_batch()
    embed = agent.encoder(drq_bc.scale_pixels(batch.obs)).detach()
    actor = list(agent.actor.parameters())
    torch.manual_seed(7)
    loss, _ = agent.actor_loss(embed, batch, torch.tensor(0.5))
    gradient = torch.autograd.grad(loss, actor)
    torch.manual_seed(7)
    action = agent.noisy(agent.actor(embed), torch.tensor(0.5))
    q = torch.minimum(*agent.critic(embed, action))
    lam = 2.5 / q.abs().mean().item()  # a Python number: without the detach, lam * q would be +-2.5 and carry nothing
    expected = torch.autograd.grad(F.mse_loss(action, batch.action) - lam * q.mean(), actor, retain_graph=True)
    without_q = torch.autograd.grad(F.mse_loss(action, batch.action), actor)
    for got, want in zip(gradient, expected):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert any((got - other).abs().max() > 1e-3 for got, other in zip(gradient, without_q))


def test_lam_has_a_floor_where_q_is_zero():
    agent, batch = make_agent(drq_bc), make_batch()
    for q in (agent.critic.q1, agent.critic.q2):
        nn.init.zeros_(q[-1].weight)
    embed = agent.encoder(drq_bc.scale_pixels(batch.obs)).detach()
    loss, metrics = agent.actor_loss(embed, batch, torch.tensor(0.5))
    assert loss.item() == pytest.approx(metrics["actor/bc_loss"].item())
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in agent.actor.parameters())


# ---- updates ----


@CRITICS
def test_each_step_moves_its_own_weights_alone(module):
    agent, batch, std = make_agent(module), make_batch(), torch.tensor(0.5)
    parts = {name: getattr(agent, name) for name in ("encoder", "actor", "critic", "critic_target")}

    def moved_by(name, loss):
        before = {part: copy_of(module) for part, module in parts.items()}
        agent.minimize(name, loss)
        return {part for part, module in parts.items() if not same(module, before[part])}

    loss, embed, _ = agent.critic_loss(batch, std)
    assert moved_by("critic", loss) == {"encoder", "critic"}
    critics = [*agent.encoder.parameters(), *agent.critic.parameters()]
    gradients = [parameter.grad.clone() for parameter in critics]
    loss, _ = agent.actor_loss(embed, batch, std)
    assert moved_by("actor", loss) == {"actor"}
    for parameter, before in zip(critics, gradients):
        assert torch.equal(parameter.grad, before)  # the actor's loss added nothing


@EACH
def test_minimize_reaches_every_group_of_an_optimiser(module):
    """A learning rate of its own for one layer is a common change to a copied file."""
    agent = make_agent(module)
    first, *rest = agent.actor.parameters()
    agent.optimizers["actor"] = torch.optim.Adam([{"params": [first], "lr": 1e-5}, {"params": rest}], 1e-3)
    before = [parameter.detach().clone() for parameter in agent.actor.parameters()]
    agent.update(make_batch(), torch.tensor(0.5))
    for now, then in zip(agent.actor.parameters(), before):
        assert not torch.equal(now, then)


@CRITICS
def test_the_critic_steps_on_its_own_loss_alone(module):
    agent, batch = make_agent(module), make_batch()
    agent.update(batch, torch.tensor(0.5))
    torch.manual_seed(1)
    loss, _, _ = agent.critic_loss(batch, torch.tensor(0.5))
    expected = torch.autograd.grad(loss, list(agent.critic.parameters()))
    torch.manual_seed(1)
    agent.minimize("critic", agent.critic_loss(batch, torch.tensor(0.5))[0])
    for parameter, gradient in zip(agent.critic.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


@CRITICS
@pytest.mark.parametrize("tau", [0.01, 0.25])
def test_target_critic_is_the_polyak_average(module, tau):
    agent = make_agent(module, tau=tau)
    for k in range(3):
        before = copy_of(agent.critic_target)
        agent.update(make_batch(seed=k), torch.tensor(0.5))
        for target, was, online in zip(agent.critic_target.parameters(), before, agent.critic.parameters()):
            torch.testing.assert_close(target, (1 - tau) * was + tau * online.detach(), atol=1e-7, rtol=1e-6)
    assert not same(agent.critic_target, copy_of(agent.critic))


def test_bc_trains_its_encoder():
    agent = make_agent(bc)
    encoder, actor = copy_of(agent.encoder), copy_of(agent.actor)
    agent.update(make_batch(), torch.tensor(0.5))
    assert all(not torch.equal(now, then) for now, then in zip(agent.encoder.parameters(), encoder))
    assert all(not torch.equal(now, then) for now, then in zip(agent.actor.parameters(), actor))


@pytest.mark.parametrize("module", [bc, drq_bc], ids=["bc", "drq_bc"])
def test_repeated_updates_on_one_batch_lower_the_bc_loss(module):
    agent, batch = make_agent(module, lr=1e-3, augment="none"), make_batch(count=8)
    name = "actor/loss" if module is bc else "actor/bc_loss"
    flags = {"bc_alpha": 0.0} if module is drq_bc else {}
    agent.args.__dict__.update(flags)
    losses = [agent.update(batch, torch.tensor(0.0))[name].item() for _ in range(100)]
    assert losses[-1] < 0.5 * losses[0]


@EACH
def test_state_restores_weights_and_optimisers(module):
    agent, std = make_agent(module), torch.tensor(0.5)
    for k in range(2):
        agent.update(make_batch(seed=k), std)
    other = make_agent(module)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))  # as from disk: an optimiser keeps what it is given
    for one in (agent, other):
        torch.manual_seed(9)
        one.update(make_batch(seed=5), std)
    assert same(other, copy_of(agent))


def some_updates(module, wrap=None, count=3, **flags):
    """Metrics of `count` updates on as many batches, and the agent."""
    agent = make_agent(module, **flags)
    device = agent.args.device
    agent.to(device)
    update = wrap(agent) if wrap else agent.update
    torch.manual_seed(1)
    metrics = []
    for k in range(count):
        batch = common.Batch(*(value.to(device) for value in make_batch(seed=k)))
        metrics.append(update(batch, torch.tensor(0.5, device=device)))
    return agent, [{name: value.item() for name, value in row.items()} for row in metrics]


def assert_close_updates(one, two, tolerance: float) -> None:
    (agent, rows), (other, others) = one, two
    for row, expected in zip(rows, others):
        assert row == pytest.approx(expected, rel=tolerance, abs=tolerance)
    for now, then in zip(agent.parameters(), other.parameters()):
        torch.testing.assert_close(now, then, rtol=0, atol=tolerance)


@EACH
def test_three_updates_are_reproducible_bit_by_bit(module):
    (agent, rows), (other, others) = some_updates(module), some_updates(module)
    assert rows == others
    assert same(agent, copy_of(other))


@EACH
def test_bf16_stays_close_to_fp32(module):
    """bfloat16 keeps 8 bits: losses agree to 3 %. DrQ+BC's actor loss is coarser, for lam divides by mean|Q|, which is
    small in a new network: lam is held as 1 / lam, to which it is proportional. Adam moves a weight by at most about lr
    a step, so weights part by at most 3 * 2 lr."""
    (agent, rows), (other, others) = some_updates(module), some_updates(module, precision="bf16")
    for row, expected in zip(rows, others):
        for name, value in row.items():
            close = {"rel": 0.03, "abs": 0.2 if module is drq_bc and name == "actor/loss" else 0.01}
            if name == "actor/lam":
                assert 1 / value == pytest.approx(1 / expected[name], **close)
            else:
                assert value == pytest.approx(expected[name], **close)
    assert rows != others  # autocast was on
    for now, then in zip(agent.parameters(), other.parameters()):
        assert then.dtype == torch.float32
        torch.testing.assert_close(now, then, rtol=0, atol=3 * 2 * 1e-4)


# ---- --accelerate ----


@EACH
def test_auto_and_eager_are_the_method_itself(module):
    for flag in ("auto", "eager"):
        agent = make_agent(module, accelerate=flag)
        assert common.accelerate(agent, "update", agent.args) == agent.update


@EACH
def test_graph_needs_cuda(module):
    agent = make_agent(module, accelerate="graph")
    with pytest.raises(common.UserError, match="--device cuda"):
        common.accelerate(agent, "update", agent.args)


@pytest.mark.slow
@EACH
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs g++")
def test_compiled_losses_equal_eager(module):
    from torch._inductor import config

    def wrap(agent):
        return common.accelerate(agent, "update", agent.args)

    with config.patch(fallback_random=True):  # eager's random numbers, else there is nothing to compare
        compiled = some_updates(module, wrap, accelerate="compile")
    assert_close_updates(compiled, some_updates(module), 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@EACH
def test_cuda_graph_equals_eager(module):
    """Six updates: three warm-ups, the capture with its replay, two replays."""
    flags = {"device": "cuda", "accelerate": "graph", "count": 6}
    graphed = some_updates(module, lambda agent: common.accelerate(agent, "update", agent.args), **flags)
    assert_close_updates(graphed, some_updates(module, device="cuda", count=6), 1e-4)


@EACH
def test_cuda_graph_wrapper_equals_eager_with_a_pretended_graph(module, monkeypatch):
    """Without CUDA: the capture is undone, a replay runs the method again on the static inputs.

    A capture must find the optimisers' state there: made inside, it would be zeroed again by every replay."""
    fakes, replays = {}, []

    class Graph:
        def replay(self):
            wrapper = fakes["wrapper"]
            replays.append(1)
            for name, value in wrapper.method(wrapper.batch, *wrapper.tensors).items():
                wrapper.metrics[name].copy_(value)

    class Capture:
        def __init__(self, graph, stream):
            self.agent = fakes["agent"]

        def __enter__(self):
            for optimizer in self.agent.optimizers.values():
                for parameter in optimizer.param_groups[0]["params"]:
                    assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
            self.saved, self.random = copy.deepcopy(self.agent.state_dict()), torch.get_rng_state()

        def __exit__(self, *_):
            self.agent.load_state_dict(self.saved)
            torch.set_rng_state(self.random)

    class Stream(contextlib.nullcontext):
        def wait_stream(self, _):
            pass

    for name, fake in {"Stream": Stream, "stream": Stream, "CUDAGraph": Graph, "graph": Capture}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)

    def wrap(agent):
        fakes["agent"], fakes["wrapper"] = agent, common.CudaGraph(agent.update)
        return fakes["wrapper"]

    graphed, eager = some_updates(module, wrap, count=6), some_updates(module, count=6)
    assert len(replays) == 3
    assert graphed[1] == eager[1]  # each row kept its own numbers: outputs are cloned
    assert same(graphed[0], copy_of(eager[0]))


# ---- data of another size, evaluation ----


def test_bc_on_a_set_of_64_px(tmp_path):
    dataset = common.Dataset(write_set(tmp_path / "own", size=64))
    buffer = common.TransitionBuffer(dataset, 4, frame_stack=3, next_obs=False)
    torch.manual_seed(0)
    agent = bc.Agent(bc.Args(**SMALL, augment="none"), buffer.obs_shape, buffer.action_dim)
    assert buffer.obs_shape == (9, 64, 64)
    assert agent.encoder.embed_dim == 20_000
    batch = buffer.sample()
    expected = F.mse_loss(agent.act(batch.obs), batch.action).item()
    assert agent.update(batch, torch.tensor(0.5))["actor/loss"].item() == pytest.approx(expected, rel=1e-5)


@EACH
def test_evaluate_plays_the_mean_action_on_its_own_seeds(module):
    agent, played, modes = make_agent(module), [], []

    class Pool:
        """Three episodes of 2, 3 and 4 steps; the reward is 1 a step and 0 once an episode is over."""

        task, count, lengths, summary = "walker-walk", 3, np.array([2, 3, 4]), common.EnvPool.summary

        def reset(self, seeds):
            self.seeds, self.t, self.done = list(seeds), 0, np.zeros(3, bool)
            return self.frames()

        def frames(self):
            return make_batch(count=3, seed=self.t).obs.numpy()

        def step(self, actions):
            played.append(actions)
            modes.append(agent.training)
            reward, self.t = (~self.done).astype(float), self.t + 1
            self.done = self.t >= self.lengths
            return self.frames(), reward, np.zeros(3, bool)

    pool = Pool()
    pool.done = np.ones(3, bool)
    state = torch.get_rng_state()
    metrics, frames = module.evaluate(agent, pool, agent.args)
    assert pool.seeds == [1_000_000, 1_000_001, 1_000_002]
    assert modes == [False] * 4 and agent.training  # a dropout or batch norm of yours rests meanwhile
    assert metrics == {"score": pytest.approx(0.3), "return": [2.0, 3.0, 4.0]}  # mean return / 10
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(played[1], agent.act(make_batch(count=3, seed=1).obs).numpy())
    np.testing.assert_array_equal(frames[2], make_batch(count=3, seed=2).obs[0, -3:].numpy())  # the newest frame
