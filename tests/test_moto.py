"""MOTO's equations against sums and loops, what is worth imitating, the buffer of its own episodes, both phases.

What it shares with Offline DV2 and LOMPO: test_world_models.py. Runs killed and continued: test_runs.py."""

from functools import partial

import moto
import numpy as np
import offline_dv2 as dv2
import pytest
import scipy.stats
import torch
import worlds
from conftest import DatasetWriter, FourSteps, FourStepsPool, write_set
from worlds import make_agent, make_args, make_batch, noise_set, observed, rows_of, without_draws

import common
from common import UserError

# ---- values and probabilities ----


@pytest.mark.parametrize("td_lambda", [0.0, 0.7, 1.0])
def test_the_value_recursion_is_eq_4_and_5(td_lambda):
    """V^t as the paper has it: a mixture of the expansions of 1 .. H - t steps; Vhat mixes in that of none. With the
    rewards of states 0 .. H-1 in place of 1 .. H, V is Offline DV2's lambda-return."""
    horizon, gamma, rng = 5, 0.9, np.random.default_rng(0)
    reward, value = rng.normal(size=(horizon, 3)), rng.normal(size=(horizon + 1, 3))  # reward[t] is r^{t+1}

    def steps(t, k):
        return sum(gamma**i * reward[t + i] for i in range(k)) + gamma**k * value[t + k]

    tensors = torch.from_numpy(reward), torch.from_numpy(value)
    expanded, hat = moto.expand_values(*tensors, gamma, td_lambda)
    for t in range(horizon):
        last = horizon - t
        mixture = (1 - td_lambda) * sum(td_lambda ** (k - 1) * steps(t, k) for k in range(1, last))
        mixture += td_lambda ** (last - 1) * steps(t, last)
        np.testing.assert_allclose(expanded[t], mixture)
        np.testing.assert_allclose(hat[t], td_lambda * mixture + (1 - td_lambda) * value[t])
    torch.testing.assert_close(expanded, dv2.lambda_return(tensors[0], tensors[1][1:], gamma, td_lambda))


def test_log_prob_against_scipy():
    policy = moto.TruncatedNormal(torch.tensor([[0.3, -0.9]]), torch.tensor([[0.2, 1.5]]))
    action = torch.tensor([[0.5, -1.0]])
    low, high, _ = policy.bounds()
    expected = scipy.stats.truncnorm.logpdf(action, low, high, policy.loc, policy.scale).sum()
    assert moto.truncated_log_prob(policy, action).item() == pytest.approx(expected, abs=1e-4)
    corner = moto.TruncatedNormal(torch.tensor([[1.0]]), torch.tensor([[0.1]]))
    assert torch.isfinite(moto.truncated_log_prob(corner, torch.tensor([[-1.0]]))).all()  # 20 deviations away


def test_the_penalty_against_numpy():
    """Eq. 2 with normalised logits."""
    agent, state = make_agent("moto"), moto.State(torch.randn(6, 12), torch.randn(6, 8))
    logits = agent.model.rssm.priors(state.deter).detach().double().numpy().reshape(3, 6, 4, 3)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(agent.penalty(state).detach(), log_probs.std(0).mean((-2, -1)), rtol=1e-4)


# ---- losses ----


def test_the_actors_loss_and_gradient_are_eq_6_and_10():
    """From t = 0 on, through critics, rewards, penalty and dynamics; not through the input of the policy."""
    agent = make_agent("moto", horizon=4, penalty_coef=2.0, bc_coef=3.0, actor_ent=0.1)
    batch, worth = make_batch(), torch.tensor([[1.0] * 5, [0.0] * 5])
    start = observed(agent, batch)
    torch.manual_seed(1)
    loss, rollout, metrics = agent.actor_loss(start, batch, worth)
    torch.manual_seed(1)
    state = moto.State(*(part.flatten(0, 1) for part in start))
    feats, actions, values, rewards, entropies = [], [], [], [], []
    for t in range(5):
        feat = torch.cat([state.stoch, state.deter], -1)
        policy = agent.actor(feat.detach())
        action = policy.sample()
        values.append(torch.minimum(*(net(torch.cat([feat, action], -1))[:, 0] for net in agent.critic.nets)))
        for found, part in ((feats, feat), (actions, action), (entropies, policy.entropy())):
            found.append(part)
        if t < 4:
            state = agent.model.rssm.imagine(state, action)
            rewards.append(agent.model.reward(state.feat)[:, 0] - 2.0 * agent.penalty(state))
    _, hat = moto.expand_values(torch.stack(rewards), torch.stack(values), 0.99, 0.95)
    imitation = 0.0  # of window 0 alone; the action that was taken in row t stands in row t + 1
    for t in range(4):
        imitation = imitation - moto.truncated_log_prob(agent.actor(start.feat[0, t]), batch.action[0, t + 1]) / 8
    expected = -(hat + 0.1 * torch.stack(entropies[:4])).mean() + 3.0 * imitation
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["bc/loss"], imitation.detach())
    assert metrics["bc/kept"] == 0.5
    actor = [*agent.actor.parameters()]
    gradients = [torch.autograd.grad(one, actor, retain_graph=True) for one in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    for found, part in zip(rollout, (feats, actions, rewards)):
        torch.testing.assert_close(found, torch.stack(part).detach())
        assert not found.requires_grad


def test_the_critics_loss_is_eq_7_to_9():
    agent = make_agent("moto", horizon=4)
    for parameter in agent.critic_target.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = make_batch()._replace(discount=torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]))
    feat, action, reward = torch.randn(5, 10, 20), torch.rand(5, 10, 2) * 2 - 1, torch.randn(4, 10)
    loss, metrics = agent.critic_loss([feat, action, reward], batch)

    def q(critic, feat, action):
        return [net(torch.cat([feat, action], -1))[..., 0] for net in critic.nets]

    value = torch.minimum(*q(agent.critic_target, feat, action))  # V0bar
    expanded, _ = moto.expand_values(reward, value, 0.99, 0.95)
    model = sum(((expanded - own) ** 2).mean() for own in q(agent.critic, feat[:-1], action[:-1]))
    data = torch.zeros(())
    for b in range(2):
        for j in range(4):
            following = value[0].view(2, 5)[b, j + 1]  # of the actor's own action in the next state
            target = batch.reward[b, j + 1] + 0.99 * batch.discount[b, j + 1] * following
            for own in q(agent.critic, feat[0].view(2, 5, -1)[b, j], batch.action[b, j + 1]):
                data = data + (target - own) ** 2 / 8
    torch.testing.assert_close(loss, model + data)
    torch.testing.assert_close(metrics["critic/data_loss"], data.detach())


def test_value_dreamer_is_offline_dv2():
    """Same weights, draws and penalty: the losses and gradients of Offline DV2's second phase."""
    agent = make_agent("moto", value="dreamer", penalty_coef=2.0, actor_ent=0.1)
    twin = make_agent("offline_dv2", penalty_coef=2.0, actor_ent=0.1)
    twin.penalty = agent.penalty
    for critic in (agent.critic_target, agent.critic):
        for parameter in critic.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    for name in ("model", "actor"):
        getattr(twin, name).load_state_dict(getattr(agent, name).state_dict())
    twin.critic.load_state_dict(agent.critic.nets[0].state_dict())
    twin.critic_target.load_state_dict(agent.critic_target.nets[0].state_dict())
    batch = make_batch()
    start = observed(agent, batch)
    torch.manual_seed(1)
    loss, rollout, _ = agent.actor_loss(start, batch, torch.zeros(2, 5))
    torch.manual_seed(1)
    expected, feat, target, _ = twin.actor_loss(dv2.State(*(part.flatten(0, 1) for part in start)))
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(one, [*who.actor.parameters()], retain_graph=True)
                 for one, who in ((loss, agent), (expected, twin))]  # fmt: skip
    torch.testing.assert_close(*gradients)  # through the same dynamics, and not through the policy's input
    torch.testing.assert_close(agent.critic_loss(rollout, batch)[0], twin.critic_loss(feat, target)[0])


def test_the_model_learns_as_offline_dv2s():
    """The same loss with the same weights, and the same step whether actor and critics learn beside it or not."""
    agent, whole, twin = make_agent("moto"), make_agent("moto"), make_agent("offline_dv2", model_lr=1e-4)
    twin.model.load_state_dict(agent.model.state_dict())
    found = []
    for step in (lambda: agent.update(make_batch(), None), lambda: twin.update_model(make_batch()),
                 lambda: whole.update(make_batch(), torch.ones(2, 5))):  # fmt: skip
        torch.manual_seed(1)
        found.append(step())
    for name in ("model/loss", "model/image_loss", "model/reward_loss", "model/kl", "model/grad_norm"):
        assert found[0][name] == found[1][name] == found[2][name]
    for ours, others, theirs in zip(agent.model.parameters(), whole.model.parameters(), twin.model.parameters()):
        assert torch.equal(ours, others) and torch.equal(ours, theirs)


# ---- what is worth imitating ----


def online_buffer(path, rows=0, **flags) -> moto.OnlineBuffer:
    return moto.OnlineBuffer(common.Dataset(path), make_args("moto", **({"window": 2} | flags)), rows)


def episode_of(rewards: list[float], value=0, terminal=False) -> tuple:
    """images, actions, rewards, terminal of one's own episode; images and actions tell `value`."""
    steps = len(rewards)
    images = np.full((steps + 1, 3, 64, 64), value, np.uint8)
    images[:, 0, 0, 0] = np.arange(steps + 1)
    return images, np.full((steps, 2), value / 100, np.float32), np.array(rewards, np.float64), terminal


RETURNS = [  # filter, flags, which of the episodes [0 0 0], [1 1], [0 0 1 0], [.5 .4] are imitated
    ("all", {}, [1, 1, 1, 1]),
    ("success", {"bc_success_reward": 0.5}, [0, 1, 1, 1]),
    ("return", {}, [0, 1, 1, 0]),  # returns 0, 2, 1, 0.9; the median is 0.95
    ("return", {"bc_quantile": 0.0}, [0, 1, 1, 1]),  # above the lowest
    ("return", {"bc_quantile": 1.0}, [0, 1, 0, 0]),  # the best
]


@pytest.mark.parametrize("name, flags, expected", RETURNS)
def test_filters_of_episodes(name, flags, expected, tmp_path):
    """Two of the set and two own ones; the rows of later ones count 0."""
    buffer = online_buffer(noise_set(tmp_path / "set", [[0, 0, 0], [1, 1]]), rows=11)
    buffer.open(tmp_path / "online")
    buffer.add(*episode_of([0.0, 0, 1, 0]))
    buffer.add(*episode_of([0.5, 0.4]))
    worth = moto.worth_imitating(buffer, moto.Args(bc_filter=name, **flags))
    assert worth.dtype == torch.float32
    assert worth.tolist() == [*np.repeat(expected, [4, 3, 5, 3]), 0, 0, 0]  # whole episodes, reset rows included


# ---- the buffer of the set's and of the run's own episodes ----


def assert_buffer_is(buffer, episodes: list[tuple]) -> None:
    """Its windows are those of a naive list of (images, actions, rewards, terminal), row for row."""
    rows, starts, length = [], [], buffer.length
    for images, actions, rewards, terminal in episodes:
        starts += range(len(rows), len(rows) + len(images) - length + 1)
        for t in range(len(images)):  # arrival rows: what led to image t
            action, reward = (actions[t - 1], rewards[t - 1]) if t else (np.zeros(2), 0)
            discount = 0 if terminal and t == len(images) - 1 else 1
            rows.append((images[t], action, np.float32(reward), discount, t == 0))
    assert buffer.is_first.nonzero().flatten().tolist() == [row for row, values in enumerate(rows) if values[4]]
    assert {row.item() for _ in range(60) for row in buffer.sample().row[:, 0]} == set(starts)
    for start in starts:
        batch = buffer.sample(row=torch.arange(start, start + length)[None])
        for t, (image, action, reward, discount, is_first) in enumerate(rows[start : start + length]):
            np.testing.assert_array_equal(batch.image[0, t], image)
            np.testing.assert_array_equal(batch.action[0, t], action)
            assert (batch.reward[0, t], batch.discount[0, t], batch.row[0, t]) == (reward, discount, start + t)
            assert batch.is_first[0, t] == (is_first or t == 0)


def test_the_buffer_grows_and_continues_with_the_episodes_that_counted(tmp_path):
    path, known = tmp_path / "set", [episode_of([0.0, 1, 2, 0, 1, 3, 1], 10), episode_of([1.0, 0, 2, 1, 1], 20)]
    with DatasetWriter(path, 64, 2) as writer:
        for images, *others in known:
            writer.add(images.transpose(0, 2, 3, 1), *others)
    own = [episode_of([0.5, 1, 2, 0, 1], 50), episode_of([1.0, 1], 60), episode_of([2.0, 0, 0, 1], 70, terminal=True)]
    flags = {"rows": 20, "window": 4, "batch_size": 32, "seed": 3}
    buffer = online_buffer(path, **flags)
    buffer.open(tmp_path / "online")
    assert_buffer_is(buffer, known)
    for episode in own:
        known.append(episode)
        buffer.add(*episode)
        assert_buffer_is(buffer, known)  # the second one is shorter than a window
    assert len(buffer.own_rows) == 3 and sum(buffer.own_rows) == 11 + 3
    state = buffer.state_dict()
    state = {"generator": state["generator"].clone(), "online": list(state["online"])}
    expected = buffer.sample()
    buffer.add(*episode_of([9.0, 9], 99))  # after the checkpoint
    again = online_buffer(path, **(flags | {"seed": 9}))
    again.load_state_dict(state)
    again.open(tmp_path / "online")
    assert all(torch.equal(*pair) for pair in zip(again.sample(), expected))
    assert_buffer_is(again, known)
    again.add(*episode_of([1.0, 2, 3], 80))  # over what came after the checkpoint
    assert_buffer_is(again, [*known, episode_of([1.0, 2, 3], 80)])
    assert again.lengths.tolist() == [8, 6, 6, 3, 5, 4]
    assert (np.load(tmp_path / "online" / "image.npy")[14:18, 1] == 80).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("buffer_device", ["cpu", "cuda"])
def test_own_episodes_reach_the_gpu(tmp_path, buffer_device):
    path, found = write_set(tmp_path / "set", lengths=(9, 7), size=64), []
    for flags in ({}, {"device": "cuda", "buffer_device": buffer_device}):
        buffer = online_buffer(path, rows=20, batch_size=40, **flags)
        buffer.open(tmp_path / f"{len(found)}")
        buffer.add(*episode_of([1.0, 2, 3], 50))
        found.append(buffer.sample())
    for one, two in zip(*found):
        assert two.device.type == "cuda" and torch.equal(one, two.cpu())


# ---- episodes and runs ----


def test_playing_is_filtering(monkeypatch, tmp_path):
    """The states in which an own episode's actions are chosen are those that its rows have in a window."""
    agent, states, act = make_agent("moto"), [], moto.Agent.act
    without_draws(monkeypatch, "moto", agent)

    def recorded(*words):
        chosen, state = act(agent, *words)
        states.append(state.feat)
        return chosen, state

    monkeypatch.setattr(agent, "act", recorded)
    pool = FourStepsPool("walker-walk", 64, 1, 1)
    images, actions, rewards, terminal = moto.play(agent, pool, agent.args, [7], draw=True)
    assert images.shape == (5, 1, 3, 64, 64) and actions.std() > 1e-4 and agent.training
    buffer = online_buffer(write_set(tmp_path / "set", size=64), rows=5, window=5)
    buffer.open(tmp_path / "online")
    buffer.add(images[:, 0], actions[:, 0], rewards[:, 0], terminal[0])
    window = buffer.sample(row=torch.arange(buffer.set_rows, buffer.set_rows + 5)[None])
    feat = observed(agent, window).feat[0]
    torch.testing.assert_close(feat[:-1], torch.cat(states))
    torch.testing.assert_close(window.action[0, 1:], 0.9 * agent.actor(feat[:-1]).loc.detach())
    moto.play(agent, pool, agent.args, [7])  # without draws: the mode
    torch.testing.assert_close(torch.from_numpy(pool.envs[0].history[1]).float(), agent.actor(feat[0]).loc.detach())


def test_own_episodes_are_what_the_environment_gives_and_another_run_begins_where_they_began(tmp_path):
    """Played again, their actions lead to their images and rewards, row for row; and the metrics count them."""
    train, env = partial(worlds.train, "moto", tmp_path), FourSteps(64, 1)
    outcome, whole = train("whole")
    assert outcome is None
    names = "image", "action", "reward", "discount"
    image, action, reward, discount = (np.load(whole / "online" / f"{name}.npy") for name in names)
    assert image.shape == (15, 3, 64, 64) and (discount == 1).all()
    for number, first in enumerate((0, 5, 10)):
        np.testing.assert_array_equal(env.reset(moto.ONLINE_SEED + number)[0], image[first])
        assert (action[first] == 0).all() and reward[first] == 0
        for row in range(first + 1, first + 5):
            obs, paid, *_ = env.step(action[row])
            np.testing.assert_array_equal(obs, image[row])
            assert np.float32(paid) == reward[row]
    assert (image[0] != image[5]).any() and np.abs(action).max() > 0
    evaluations, episodes = rows_of(whole, "eval"), rows_of(whole, "episodes")
    assert [(row["episodes"], row["env_steps"]) for row in evaluations] == [(0, 0), (2, 16), (3, 24)]
    assert [(row["step"], row["episodes"], row["env_steps"]) for row in episodes] == [(4, 1, 8), (6, 2, 16), (8, 3, 24)]
    assert [row["return_0"] for row in episodes] == pytest.approx(reward.reshape(3, 5).sum(1).tolist(), rel=1e-5)
    outcome, path = train("on", offline_from=whole)
    assert outcome is None and not (path / "offline.csv").exists() and len(rows_of(path, "online")) == 6
    assert torch.load(whole / "offline.pt", weights_only=True)["_extra_state"].keys() == {"model", "actor", "critic"}
    first, theirs = rows_of(path, "eval")[0], rows_of(whole, "eval")[0]
    assert first.pop("step") == 0 and theirs.pop("step") == 3 and first == theirs  # it is the same agent
    half = train("half", crash=2)[1]  # has not come to the end of its offline phase
    for donor in (half, whole.with_name("none-seed0")):
        error = train("bad", offline_from=donor)[0]
        assert isinstance(error, UserError) and f"{donor}/offline.pt is missing" in str(error)
