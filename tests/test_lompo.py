"""LOMPO against oracles: counts, NumPy and torch.distributions, the latent buffer against the set. One CPU thread.

What it shares with Offline DV2 word for word (priors, optimiser, decoder's first layer) is tested there."""

import math

import lompo
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_set
from torch import nn

import common

FLAGS = {"cnn_depth": 2, "stoch": 4, "deter": 8, "hidden": 10, "units": 12, "ensemble": 3, "batch_size": 2, "window": 5}
FLAGS |= {"device": "cpu", "precision": "fp32", "accelerate": "eager", "agent_batch_size": 8}


def make_agent(action_dim=2, **flags) -> lompo.Agent:
    torch.manual_seed(0)
    return lompo.Agent(lompo.Args(**(FLAGS | flags)), action_dim)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> common.Dataset:
    path = write_set(tmp_path_factory.mktemp("set") / "own", lengths=(12, 9, 6), size=64, terminal_last=True)
    return common.Dataset(path)


@pytest.fixture
def made(dataset):
    """agent, sequence buffer, latent buffer, embeddings."""
    agent = make_agent()
    buffer = common.SequenceBuffer(dataset, 2, 5)
    return agent, buffer, lompo.LatentBuffer(buffer, agent.model.feat_dim), agent.embed_set(buffer)


# ---- sizes and initial weights ----


@pytest.mark.parametrize(
    "action_dim, rssm, total, critic, actor",
    [(6, 1_464_576, 6_190_660, 215_553, 281_094), (21, 1_468_416, 6_194_500, 219_393, 284_949)],
)
def test_parameter_counts(action_dim, rssm, total, critic, actor):
    agent = lompo.Agent(lompo.Args(device="cpu", precision="fp32"), action_dim)
    model = agent.model
    assert (count(model.encoder), count(model.decoder), count(model.reward)) == (690_144, 3_887_715, 148_225)
    assert (count(model.rssm), count(model)) == (rssm, total)
    assert (count(agent.critic[0]), count(agent.critic[1]), count(agent.actor)) == (critic, critic, actor)


def test_defaults_are_the_released_codes():
    expected = {"model_lr": 6e-4, "actor_lr": 3e-4, "critic_lr": 3e-4, "batch_size": 64, "window": 50, "ensemble": 7}
    expected |= {"horizon": 5, "rollout_noise": 0.2, "rollout_every": 200, "agent_batch_size": 512, "tau": 0.005}
    expected |= {"gamma": 0.99, "penalty": "log_prob_std", "penalty_coef": 5.0, "starts": "window"}
    args = lompo.Args()
    assert {name: getattr(args, name) for name in expected} == expected
    assert set(lompo.Args.__annotations__["penalty"].__args__) == {*lompo.PENALTY, "none"}
    optimizer = make_agent().optimizers["model"]
    assert (optimizer.eps, optimizer.decay, optimizer.CLIP) == (1e-7, 0, 100)


def test_weights_begin_as_keras_begins_them():
    agent = lompo.Agent(lompo.Args(device="cpu", precision="fp32"), 6)
    for module in agent.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            bound = math.sqrt(6 / (math.prod(module.weight.shape[2:]) * sum(module.weight.shape[:2])))
            assert module.weight.abs().max() <= bound and (module.bias == 0).all()
    gru = agent.model.rssm.gru
    assert gru.weight_ih.abs().max() <= math.sqrt(6 / (256 + 3 * 256))
    torch.testing.assert_close(gru.weight_hh.T @ gru.weight_hh, torch.eye(256), rtol=0, atol=1e-4)
    assert (gru.bias_ih == 0).all() and (gru.bias_hh == 0).all()
    for ours, theirs in zip(agent.critic.parameters(), agent.critic_target.parameters()):
        assert torch.equal(ours, theirs)


def test_the_gru_is_keras_with_reset_after():
    """z, r, candidate as Keras names them; the reset gate acts on the recurrent product, bias included."""
    torch.manual_seed(0)
    cell = nn.GRUCell(3, 4)
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    wi, wh, bi, bh = (p.detach().numpy() for p in cell.parameters())
    inputs, recurrent = x.numpy() @ wi.T + bi, h.numpy() @ wh.T + bh
    sigmoid = lambda value: 1 / (1 + np.exp(-value))  # noqa: E731
    r, z = sigmoid(inputs[:, :4] + recurrent[:, :4]), sigmoid(inputs[:, 4:8] + recurrent[:, 4:8])
    candidate = np.tanh(inputs[:, 8:] + r * recurrent[:, 8:])
    np.testing.assert_allclose(cell(x, h).detach(), z * h.numpy() + (1 - z) * candidate, rtol=1e-4, atol=1e-6)


# ---- the model ----


def test_normals_are_those_of_torch():
    raw = torch.randn(2, 6, 8)
    one, two = lompo.Normal.of(raw[0]), lompo.Normal.of(raw[1])
    torch.testing.assert_close(one.std, F.softplus(raw[0, :, 4:]) + 0.1)
    p, q = (torch.distributions.Normal(*normal) for normal in (one, two))
    x = torch.randn(6, 4)
    torch.testing.assert_close(one.log_prob(x), p.log_prob(x).sum(-1))
    torch.testing.assert_close(one.kl(two), torch.distributions.kl_divergence(p, q).sum(-1))


def test_filtering_is_the_recurrence_step_by_step(made):
    agent, buffer, _, embeds = made
    rssm, batch = agent.model.rssm, buffer.sample()
    torch.manual_seed(1)
    states, post = rssm.observe(embeds[batch.row], batch.action, batch.is_first)
    torch.manual_seed(1)
    stoch, deter = torch.zeros(2, 4), torch.zeros(2, 8)
    for t in range(5):
        keep = (~batch.is_first[:, t, None]).float()
        x = F.elu(rssm.img_in(torch.cat([stoch * keep, batch.action[:, t] * keep], -1)))
        deter = rssm.gru(x, deter * keep)
        raw = rssm.post_out(F.elu(rssm.post_in(torch.cat([deter, embeds[batch.row[:, t]]], -1))))
        normal = lompo.Normal.of(raw)
        stoch = normal.mean + normal.std * torch.randn(2, 4)
        torch.testing.assert_close(states.deter[:, t], deter)
        torch.testing.assert_close(post.mean[:, t], normal.mean)
        torch.testing.assert_close(states.stoch[:, t], stoch)


@pytest.mark.parametrize("mask", [True, False])
def test_the_first_action_of_a_window_counts_only_where_it_is_not_masked(dataset, mask):
    agent = make_agent()
    buffer = common.SequenceBuffer(dataset, 2, 5, force_first=mask)
    embeds, row = agent.embed_set(buffer), torch.arange(3, 8)[None]
    batch, found = buffer.gather(row), []
    for first in (0.0, 1.0):
        action = batch.action.clone()
        action[:, 0] = first
        torch.manual_seed(1)
        found.append(agent.model.rssm.observe(embeds[row], action, batch.is_first)[0].deter)
    assert torch.equal(*found) == mask


def test_shared_noise_is_one_vector_for_a_batch():
    for shared in (True, False):
        rssm = make_agent(shared_noise=shared).model.rssm
        drawn = rssm.sample(lompo.Normal(torch.zeros(5, 4), torch.ones(5, 4)))
        assert torch.equal(drawn, drawn[:1].expand(5, -1)) == shared
    assert torch.equal(rssm.sample(lompo.Normal(torch.ones(5, 4), torch.ones(5, 4)), mode=True), torch.ones(5, 4))


def test_the_model_loss_is_its_terms(made):
    agent, buffer, _, embeds = made
    batch = buffer.sample()
    torch.manual_seed(3)
    loss, metrics = agent.model_loss(batch)
    torch.manual_seed(3)
    states, post = agent.model.rssm.observe(embeds[batch.row], batch.action, batch.is_first)
    member = agent.model.rssm.draw_members(5)
    image = torch.distributions.Normal(agent.model.decode(states.feat), 1.0)
    image_loss = -image.log_prob(batch.image / 255 - 0.5).sum((2, 3, 4)).mean()
    reward_loss = (
        -torch.distributions.Normal(agent.model.reward(states.feat)[..., 0], 1.0).log_prob(batch.reward).mean()
    )
    raw = torch.stack([agent.model.rssm.priors(states.deter[:, t])[member[t]] for t in range(5)], 1)
    kl = post.kl(lompo.Normal.of(raw)).mean()
    for name, value in {"image_loss": image_loss, "reward_loss": reward_loss, "kl": kl}.items():
        torch.testing.assert_close(metrics[f"model/{name}"], value.detach())
    torch.testing.assert_close(loss, image_loss + reward_loss + kl)


# ---- penalties ----

PRIORS = lompo.Normal.of(torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0)))
STOCH = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def numpy_penalty(name: str) -> np.ndarray:
    mean, std, x = (part.numpy().astype(np.float64) for part in (*PRIORS, STOCH))
    log_prob = (-0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)
    return {
        "log_prob_std": log_prob.std(0),  # NumPy divides by N, not by N - 1
        "log_prob_var": log_prob.var(0),
        "mean_distance": np.sqrt(((mean - mean.mean(0)) ** 2).sum(-1)).mean(0),
        "max_std": np.sqrt((std**2).sum(-1)).max(0),
    }[name]


@pytest.mark.parametrize("name", lompo.PENALTY)
def test_penalties_against_numpy(name):
    np.testing.assert_allclose(lompo.PENALTY[name](PRIORS, STOCH), numpy_penalty(name), rtol=1e-5)
    if name != "max_std":  # which is not about disagreement
        equal = lompo.Normal(*(part[:1].expand(5, -1, -1) for part in PRIORS))
        assert lompo.PENALTY[name](equal, STOCH).abs().max() < 1e-5


# ---- latent transitions ----


def fill(agent, buffer, latent, embeds) -> None:
    lompo.generate(agent, latent, buffer, embeds, 0)


def test_real_transitions_are_those_of_the_set(made, dataset):
    agent, buffer, latent, embeds = made
    fill(agent, buffer, latent, embeds)
    part, ends = dataset.parts[0], [12, 22, 29]
    assert latent.starts.tolist() == [row for row in range(30) if row not in ends]  # 13, 10 and 7 rows
    assert (latent.real.abs().sum(1) > 0).all()  # every state of every episode, the last rows' too
    seen = set()
    for _ in range(60):
        batch = latent.sample(8)
        assert len(batch.reward) == 8 and (batch.penalty[:4] == 0).all()
        for i in range(4):
            row = (latent.real == batch.feat[i]).all(1).nonzero().item()
            seen.add(row)
            assert torch.equal(batch.next_feat[i], latent.real[row + 1])  # action t + 1 leads from image t to t + 1
            np.testing.assert_array_equal(batch.action[i], part.action[row + 1])
            assert batch.reward[i] == part.reward[row + 1].astype(np.float32)
            assert batch.discount[i] == part.discount[row + 1]
    assert seen == set(latent.starts.tolist())
    assert latent.buffer.discount[29] == 0  # the terminal is among them


def test_states_are_filtered_over_whole_episodes(made):
    agent, buffer, latent, embeds = made
    agent.model.rssm.sample = lambda normal, mode=False: normal.mean
    fill(agent, buffer, latent, embeds)
    for first, rows in ((0, 13), (13, 10), (23, 7)):
        row = torch.arange(first, first + rows)[None]
        states, _ = agent.model.rssm.observe(embeds[row], buffer.action[row], buffer.is_first[row])
        torch.testing.assert_close(latent.real[row], states.feat, rtol=1e-4, atol=1e-5)


def test_the_ring_keeps_the_newest(made):
    _, _, latent, _ = made
    size = len(latent.starts)
    assert size == 27

    def numbered(first, count):
        column = torch.arange(first, first + count).float()
        wide = column[:, None].expand(-1, latent.real.shape[1])
        return lompo.Transitions(wide, column[:, None].expand(-1, 2), column, column, column, wide)

    latent.add(numbered(0, 10))
    assert set(latent.sample(400).reward[200:].tolist()) == set(range(10))  # only what has been written
    latent.add(numbered(10, 30))
    assert sorted(latent.ring["reward"].tolist()) == list(range(13, 40))
    latent.add(numbered(40, 70))  # more than it holds
    assert sorted(latent.ring["reward"].tolist()) == list(range(83, 110)) and latent.written == 110
    drawn = latent.sample(400)
    assert torch.equal(drawn.action[200:, 0], drawn.reward[200:])  # columns stay together


def test_the_schedule_of_what_is_generated(made, dataset):
    agent, buffer, latent, embeds = made
    agent.args.rollout_every = 3
    fill(agent, buffer, latent, embeds)
    assert latent.written == 50 and latent.refreshed == 0  # one batch is 2 x 5 starts x 5 steps, half a ring is 13
    real = latent.real.clone()
    for done in range(1, 7):
        lompo.generate(agent, latent, buffer, embeds, done)
    assert latent.written == 150 and latent.refreshed == 2
    changed = (latent.real != real).any(1).nonzero().flatten().tolist()
    assert changed == list(range(23))  # the first two episodes were drawn anew
    twin = lompo.LatentBuffer(buffer, agent.model.feat_dim)
    twin.load_state_dict(latent.state_dict())
    torch.manual_seed(4)
    one = latent.sample(8)
    torch.manual_seed(4)
    assert all(torch.equal(*pair) for pair in zip(one, twin.sample(8)))


def test_rollouts_follow_the_model(made):
    agent, buffer, latent, embeds = made
    fill(agent, buffer, latent, embeds)
    batch = buffer.sample(images=False)
    found = agent.rollout(latent, batch, embeds[batch.row])
    M, H = 10, 5
    assert found.feat.shape == found.next_feat.shape == (H * M, 12) and found.reward.shape == (H * M,)
    steps = [part.unflatten(0, (H, M)) for part in found]
    feat, action, reward, penalty, discount, following = steps
    torch.testing.assert_close(feat[1:], following[:-1])
    assert (discount == 1).all() and (penalty > 0).all() and action.abs().max() <= 1
    torch.testing.assert_close(reward, agent.model.reward(following)[..., 0])
    for t in range(H):
        state = lompo.State(*feat[t].split([4, 8], -1))
        deter = agent.model.rssm.recur(state, action[t])
        torch.testing.assert_close(following[t, :, 4:], deter)
        priors = lompo.Normal.of(agent.model.rssm.priors(deter))
        torch.testing.assert_close(penalty[t], lompo.log_prob_std(priors, following[t, :, :4]), rtol=1e-3, atol=1e-4)
    noise = action - agent.actor(feat)
    assert 0.1 < noise[action.abs() < 1].std() < 0.3


def test_rollouts_variants(made):
    agent, buffer, latent, embeds = made
    fill(agent, buffer, latent, embeds)
    batch = buffer.sample(images=False)
    agent.args.rollout_noise, agent.args.penalty = 0.0, "none"
    found = agent.rollout(latent, batch, embeds[batch.row])
    torch.testing.assert_close(found.action, agent.actor(found.feat).clamp(-1, 1))
    assert (found.penalty == 0).all()
    agent.args.starts = "episode"
    found = agent.rollout(latent, batch, embeds[batch.row])
    assert torch.equal(found.feat[:10], latent.real[batch.row.flatten()])
    agent.args.reward_avg = True
    averaged = agent.rollout(latent, batch, embeds[batch.row])
    assert not torch.allclose(averaged.reward, agent.model.reward(averaged.next_feat)[..., 0])


# ---- the agent ----


def make_transitions(agent, seed=0) -> lompo.Transitions:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    penalty = draw(8).abs()
    penalty[:4] = 0
    discount = torch.ones(8)
    discount[2] = 0
    return lompo.Transitions(draw(8, 12), draw(8, 2).clamp(-1, 1), draw(8), penalty, discount, draw(8, 12))


def test_the_losses_are_their_definitions():
    agent = make_agent(penalty_coef=2.0)
    for parameter in agent.critic_target.parameters():
        parameter.data.add_(0.05)
    batch = make_transitions(agent)
    following = torch.cat([batch.next_feat, agent.actor(batch.next_feat)], -1)
    value = torch.minimum(*(critic(following)[:, 0] for critic in agent.critic_target))
    target = (batch.reward - 2 * batch.penalty + 0.99 * batch.discount * value).detach()
    loss, metrics = agent.critic_loss(batch)
    pair = torch.cat([batch.feat, batch.action], -1)
    expected = sum((critic(pair)[:, 0] - target).square().mean() for critic in agent.critic)
    torch.testing.assert_close(loss, expected)
    assert metrics["imag/penalty"].item() == pytest.approx(batch.penalty[4:].mean().item())  # of the imagined half
    own = torch.cat([batch.feat, agent.actor(batch.feat)], -1)
    value = torch.minimum(*(critic(own)[:, 0] for critic in agent.critic))
    torch.testing.assert_close(agent.actor_loss(batch)[0], -value.mean())


def test_an_update_steps_actor_and_critics_at_the_old_critics_and_moves_the_targets():
    agent, twin = make_agent(), make_agent()
    batch = make_transitions(agent)
    before = [parameter.clone() for parameter in agent.critic_target.parameters()]
    model = [parameter.clone() for parameter in agent.model.parameters()]
    agent.update_agent(batch)
    twin.minimize("actor", twin.actor_loss(batch)[0])  # the actor's gradient is that of the critics before their step
    for ours, theirs in zip(agent.actor.parameters(), twin.actor.parameters()):
        torch.testing.assert_close(ours, theirs)
    for target, old, online in zip(agent.critic_target.parameters(), before, agent.critic.parameters()):
        torch.testing.assert_close(target, old + 0.005 * (online - old))
        assert not torch.equal(online, old) or old.numel() == 1
    assert all(torch.equal(*pair) for pair in zip(agent.model.parameters(), model))


def test_bf16_is_near_fp32(dataset):
    found = []
    for precision in ("fp32", "bf16"):
        agent = make_agent(precision=precision)
        buffer = common.SequenceBuffer(dataset, 2, 5)
        torch.manual_seed(2)
        with agent.autocast():
            loss, metrics = agent.model_loss(buffer.sample())
            critic_loss, _ = agent.critic_loss(make_transitions(agent))
        assert loss.dtype == critic_loss.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in metrics.values())
        found.append((loss.item(), critic_loss.item()))
    assert found[0] == pytest.approx(found[1], rel=0.05)


def test_gradients_in_bf16_are_near_those_in_fp32():
    """Weights that were first cast where nothing is learned (the actor in the target) keep their gradient."""
    found = []
    for precision in ("fp32", "bf16"):
        agent, seen = make_agent(precision=precision, units=64), {}

        def record(name, loss, agent=agent, seen=seen):
            seen[name] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, agent.optimizers[name].params)])
            return loss.detach()

        agent.minimize = record
        agent.update_agent(make_transitions(agent))
        found.append(seen)
    for name in ("actor", "critic"):
        one, two = found[0][name], found[1][name]
        assert (one - two).norm() < 0.05 * one.norm()
