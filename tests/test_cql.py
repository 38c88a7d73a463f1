"""cql.py's own: the conservative term against NumPy, where its gradient goes, Table 10."""

import math

import cql
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_python
from scipy.special import logsumexp
from scipy.stats import norm
from test_algos import make_agent, make_batch, numpy_actor, numpy_critic, numpy_encode, numpy_noisy

VARIANTS = pytest.mark.parametrize(
    "flags",
    [
        {},
        {"cql_actions": "uniform"},
        {"importance_sample": True},
        {"cql_actions": "uniform", "importance_sample": True},
    ],
    ids=["full", "uniform", "importance", "uniform-importance"],
)


def draws(seed: int, count: int, batch: int = 4, dims: int = 2, full: bool = True):
    """The random numbers of one critic loss, in order: next action's noise, uniform actions, policy noise at s', s."""
    torch.manual_seed(seed)
    shapes = [torch.randn(batch, dims), torch.rand(count, batch, dims) * 2 - 1]
    return shapes + [torch.randn(count, batch, dims) for _ in range(2 if full else 0)]


@VARIANTS
def test_critic_loss_is_td_error_plus_the_conservative_term(flags):
    agent, batch = make_agent(cql, augment="none", cql_alpha=3.0, cql_samples=5, **flags), make_batch()
    with torch.no_grad():
        for parameter in agent.critic_target.parameters():  # else it equals the online critic
            parameter.mul_(1.5)
    full, std = agent.args.cql_actions == "full", 0.5
    next_noise, uniform, *noises = draws(5, 5, full=full)
    torch.manual_seed(5)
    loss, embed, metrics = agent.critic_loss(batch, torch.tensor(std))

    online, arriving = numpy_encode(agent.encoder, batch.obs), numpy_encode(agent.encoder, batch.next_obs)
    mean, next_mean = numpy_actor(agent.actor, online), numpy_actor(agent.actor, arriving)
    next_q = np.minimum(*numpy_critic(agent.critic_target, arriving, numpy_noisy(next_mean, std, next_noise)))
    target = batch.reward.numpy() + batch.discount.numpy() * next_q
    data = numpy_critic(agent.critic, online, batch.action.numpy())
    td_loss = sum(np.mean((q - target) ** 2) for q in data)

    actions, densities = list(uniform.numpy().astype(np.float64)), [np.full((4, 1), 0.5**2)] * 5
    for centre, noise in zip((next_mean, mean), noises):  # pi(s') and pi(s), both valued at s
        for draw in noise:
            actions.append(numpy_noisy(centre, std, draw))
            densities.append(norm.pdf(actions[-1], centre, std).prod(-1, keepdims=True))
    term = 0
    for j in (0, 1):
        values = np.stack([numpy_critic(agent.critic, online, action)[j] for action in actions])
        if agent.args.importance_sample:
            values = values - np.log(np.stack(densities))
        elif full:
            values = np.concatenate([values, data[j][None]])
        assert len(values) == {(True, False): 16, (True, True): 15}.get((full, agent.args.importance_sample), 5)
        term += np.mean(logsumexp(values, axis=0) - data[j])
    assert metrics["critic/td_loss"].item() == pytest.approx(td_loss, rel=1e-4)
    assert metrics["critic/conservative"].item() == pytest.approx(term, rel=1e-4, abs=1e-5)
    assert loss.item() == pytest.approx(td_loss + 3.0 * term, rel=1e-4)
    assert metrics["critic/q"].item() == pytest.approx(data[0].mean(), abs=1e-5)
    np.testing.assert_allclose(embed.numpy(), online, atol=1e-5)
    assert not embed.requires_grad


def repeated_embeddings(agent, batch, std):
    """The released form: each of the N actions meets the whole embedding, whose trunk runs N times."""
    embed = agent.encoder(cql.scale_pixels(agent.augment(batch.obs)))
    with torch.no_grad():
        next_embed = agent.encoder(cql.scale_pixels(agent.augment(batch.next_obs)))
        next_mean = agent.actor(next_embed)
        next_q = torch.minimum(*agent.critic_target(next_embed, agent.noisy(next_mean, std)))
        target = batch.reward + batch.discount * next_q
        actions, _ = agent.conservative_actions(batch.action, agent.actor(embed), next_mean, std)
    N, B, A = actions.shape
    repeated = embed.repeat(N, 1)  # (N * B, E)
    loss = 0
    for values, data in zip(agent.critic(repeated, actions.reshape(N * B, A)), agent.critic(embed, batch.action)):
        loss = loss + F.mse_loss(data, target)
        loss = loss + agent.args.cql_alpha * (torch.logsumexp(values.view(N, B), 0) - data[:, 0]).mean()
    return loss


def test_running_the_trunk_once_equals_repeating_the_embedding():
    agent, batch, std = make_agent(cql, cql_alpha=2.0), make_batch(), torch.tensor(0.5)
    parameters = [*agent.encoder.parameters(), *agent.critic.parameters()]
    torch.manual_seed(2)
    once, *_ = agent.critic_loss(batch, std)
    torch.manual_seed(2)
    repeated = repeated_embeddings(agent, batch, std)
    torch.testing.assert_close(once, repeated, rtol=1e-6, atol=1e-6)
    for one, two in zip(torch.autograd.grad(once, parameters), torch.autograd.grad(repeated, parameters)):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_31_actions():
    agent, batch = make_agent(cql), make_batch()
    mean, next_mean = torch.full((4, 2), 0.6), torch.full((4, 2), -0.6)
    torch.manual_seed(0)
    actions, log_density = agent.conservative_actions(batch.action, mean, next_mean, torch.tensor(0.2))
    assert actions.shape == (31, 4, 2)
    assert not log_density.any()  # no importance sampling, no correction for their number
    assert torch.equal(actions[0], batch.action)
    assert actions[1:11].abs().max() > 0.9 and len(actions[1:11].unique()) == 80  # uniform
    for part, centre in ((actions[11:21], -0.6), (actions[21:], 0.6)):
        assert ((part - centre).abs() <= 0.3 + 1e-6).all()  # the scheduled noise, clipped
        assert len(part.unique()) > 50  # each with noise of its own; some are clipped


def test_the_term_is_positive_where_the_data_action_is_in_the_sum():
    """log sum_k exp Q(a_k) > Q(a) as soon as a is one of several a_k; a smaller value means it was lost or shifted."""
    for seed in range(5):
        torch.manual_seed(seed)
        agent = make_agent(cql)
        with torch.no_grad():
            agent.critic.q1[-1].weight.mul_(100)  # values far apart, so that one action rules the sum
        _, _, metrics = agent.critic_loss(make_batch(seed=seed), torch.tensor(0.5))
        assert metrics["critic/conservative"].item() > 0


@VARIANTS
def test_equal_values_give_the_logarithm_of_their_number(flags):
    agent = make_agent(cql, cql_alpha=1.0, **flags)
    for head in (agent.critic.q1, agent.critic.q2):
        torch.nn.init.zeros_(head[-1].weight)
    _, _, metrics = agent.critic_loss(make_batch(), torch.tensor(0.5))
    number = {(): math.log(31), ("uniform",): math.log(10), ("uniform", True): math.log(10 * 2**2)}
    if tuple(flags.values()) in number:  # both critics; a uniform density on [-1, 1]^2 is 1 / 4
        assert metrics["critic/conservative"].item() == pytest.approx(2 * number[tuple(flags.values())], rel=1e-6)
    assert torch.isfinite(metrics["critic/loss"])


@VARIANTS
def test_the_conservative_term_reaches_the_encoder_and_not_the_actor(flags):
    agent, batch = make_agent(cql, cql_alpha=1.0, **flags), make_batch()
    encoder = list(agent.encoder.parameters())

    def gradient(alpha):
        agent.args.cql_alpha = alpha
        torch.manual_seed(0)
        loss, *_ = agent.critic_loss(batch, torch.tensor(0.5))
        assert all(
            g is None for g in torch.autograd.grad(loss, agent.actor.parameters(), allow_unused=True, retain_graph=True)
        )
        return torch.autograd.grad(loss, encoder)

    for with_it, without in zip(gradient(1.0), gradient(0.0)):
        assert torch.isfinite(with_it).all()
        assert (with_it - without).abs().max() > 1e-4


def test_actor_loss_is_minus_the_value_of_a_noisy_action():
    agent, batch = make_agent(cql), make_batch()
    embed = agent.encoder(cql.scale_pixels(batch.obs)).detach()
    torch.manual_seed(7)
    draw = torch.randn(4, 2)
    torch.manual_seed(7)
    loss, metrics = agent.actor_loss(embed, batch, torch.tensor(0.5))
    action = numpy_noisy(numpy_actor(agent.actor, embed.numpy()), 0.5, draw)
    assert loss.item() == pytest.approx(
        -np.minimum(*numpy_critic(agent.critic, embed.numpy(), action)).mean(), abs=1e-5
    )
    assert metrics["actor/distance"].item() == pytest.approx(np.mean((action - batch.action.numpy()) ** 2), rel=1e-4)


def test_the_term_makes_the_data_action_worth_more_than_others():
    def gap(alpha):
        agent, batch = make_agent(cql, cql_alpha=alpha, lr=3e-3, augment="none"), make_batch(count=16)
        for _ in range(100):
            agent.update(batch, torch.tensor(0.5))
        embed = agent.encoder(cql.scale_pixels(batch.obs))
        torch.manual_seed(0)
        other = torch.stack([agent.critic(embed, torch.rand_like(batch.action) * 2 - 1)[0] for _ in range(20)])
        return (agent.critic(embed, batch.action)[0] - other).mean().item()

    assert gap(20.0) > gap(0.0) + 0.5


def test_tuned_is_table_10():
    table = {"random": (0.5, 0.5), "mixed": (0.5, 0.5), "medium": (2, 10), "medexp": (2, 1), "expert": (5, 20)}
    tasks = ("walker-walk", "cheetah-run")
    expected = {(task, name): {"cql_alpha": row[i]} for name, row in table.items() for i, task in enumerate(tasks)}
    assert expected == cql.TUNED
    assert cql.Args.cql_alpha == 1.0


@pytest.mark.parametrize(
    "line, alpha, note",
    [
        ("--task cheetah-run --dataset expert", 20.0, False),
        ("--task walker-walk --dataset medium --quick", 2.0, False),
        ("--task walker-walk --dataset medium --cql-alpha 7", 7.0, False),
        ("--task humanoid-walk --dataset medium", 1.0, True),
    ],
)
def test_the_command_line_takes_the_rows_alpha(line, alpha, note):
    script = "import sys; sys.path.insert(0, 'algos'); import cql\n"
    script += "print(cql.parse_args(cql.Args, cql.TUNED, cql.QUICK).cql_alpha)"
    result = run_python("-c", script, *line.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(alpha)
    text = "note: humanoid-walk medium has no value of its own for --cql-alpha; it is 1.0"
    assert (text in result.stdout) == note
