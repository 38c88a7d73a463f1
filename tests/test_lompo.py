"""LOMPO's penalties, and its latent transitions against the set and a naive ring.

Its losses, gradients and rollouts equal the released code's: test_released.py. All else: test_world_models.py."""

import math

import lompo
import numpy as np
import pytest
import torch
from conftest import write_set
from worlds import make_agent, without_draws

import common

LENGTHS = (13, 10, 7)  # rows per episode; the last one ends in a terminal
FIRST, LAST = (0, 13, 23), (12, 22, 29)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> common.Dataset:
    path = write_set(tmp_path_factory.mktemp("set") / "own", lengths=(12, 9, 6), size=64, terminal_last=True)
    return common.Dataset(path)


@pytest.fixture
def made(dataset):
    """agent, latent buffer, embeddings; filled as before the first agent update."""
    agent = make_agent("lompo", rollout_every=3)
    buffer = common.SequenceBuffer(dataset, 2, 5)
    latent, embeds = lompo.LatentBuffer(buffer, agent.model.feat_dim), agent.embed_set(buffer)
    lompo.refill(agent, latent, embeds, 0)
    return agent, latent, embeds


def test_the_penalty_that_theirs_has_not():
    """The variance; log_prob_std is the released code's."""
    agent, state = make_agent("lompo", penalty="log_prob_var"), lompo.State(torch.randn(6, 4), torch.randn(6, 8))
    priors = lompo.Normal.of(agent.model.rssm.priors(state.deter))
    mean, std, x = (part.detach().numpy().astype(np.float64) for part in (*priors, state.stoch))
    log_prob = (-0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)
    np.testing.assert_allclose(agent.penalty(state).detach(), log_prob.var(0), rtol=1e-4)  # NumPy divides by N


def test_real_transitions_are_those_of_the_set(made, dataset):
    _, latent, _ = made
    starts = [row for row in range(30) if row not in LAST]
    assert latent.real_rows.tolist() == starts and (latent.feat.abs().sum(1) > 0).all()  # the last rows' states too
    found, seen = latent.sample(601), set()
    real = lompo.Transitions(*(value[:300] for value in found))
    assert len(found.reward) == 601 and (real.penalty == 0).all() and (found.penalty[300:] > 0).all()
    for i in range(300):
        row = (latent.feat == real.feat[i]).all(1).nonzero().item()
        seen.add(row)
        assert torch.equal(real.next_feat[i], latent.feat[row + 1])  # action row + 1 leads from image row to the next
        np.testing.assert_array_equal(real.action[i], dataset.action[row + 1])
        assert real.reward[i] == dataset.reward[row + 1] and real.discount[i] == dataset.discount[row + 1]
    assert seen == set(starts) and (real.discount == 0).any()


def test_states_are_filtered_over_whole_episodes(made, monkeypatch):
    agent, latent, embeds = made
    without_draws(monkeypatch, "lompo", agent)
    lompo.refill(agent, latent, embeds, 0)
    buffer = latent.buffer
    for first, rows in zip(FIRST, LENGTHS):
        row = torch.arange(first, first + rows)[None]
        with torch.no_grad():
            states, _ = agent.model.rssm.observe(embeds[row], buffer.action[row], buffer.is_first[row])
        torch.testing.assert_close(latent.feat[row], states.feat, rtol=1e-4, atol=1e-5)


def test_the_ring_is_a_list_of_the_newest(made):
    _, made_latent, _ = made
    latent = lompo.LatentBuffer(made_latent.buffer, 12)
    size, naive, rng = len(latent.real_rows), [], np.random.default_rng(0)
    for chunk in (4, 10, *rng.integers(1, 70, 20)):  # also more than it holds
        column = torch.arange(len(naive), len(naive) + chunk).float()
        wide = column[:, None].expand(-1, 12)
        latent.add(lompo.Transitions(wide, wide[:, :2], column, column, column, wide))
        naive += column.tolist()
        newest = naive[-size:]
        drawn = lompo.Transitions(*(value[500:] for value in latent.sample(1000)))
        assert set(drawn.reward.tolist()) == set(newest)
        assert all(torch.equal(value, drawn.reward) for value in (drawn.feat[:, 5], drawn.action[:, 1], drawn.penalty))
    assert latent.written == len(naive)


def test_the_schedule_of_refills(made):
    agent, latent, embeds = made
    rollout = 2 * 5 * 3  # starts of a batch of windows, times the horizon
    assert latent.written == rollout and latent.refreshed == 0  # the first fill: at least half a ring of 27
    feat = latent.feat.clone()
    for number in range(1, 7):
        lompo.refill(agent, latent, embeds, number)
    assert latent.written == 3 * rollout and latent.refreshed == 2
    changed = (latent.feat != feat).any(1).nonzero().flatten().tolist()
    assert changed == list(range(23))  # the states of the first two episodes were drawn anew, all their rows
    for number in (9, 12):
        lompo.refill(agent, latent, embeds, number)
    assert latent.refreshed == 4  # the third, and again the first
    agent.args.batch_size = agent.args.horizon = latent.buffer.batch_size = 1  # rollouts of 5: three are half a ring
    twin = lompo.LatentBuffer(latent.buffer, agent.model.feat_dim)
    lompo.refill(agent, twin, embeds, 0)
    assert twin.written == 15 and (twin.feat.abs().sum(1) > 0).all()


def test_rollouts_from_windows_or_from_real_states(made):
    """H steps from each of the B T states of a batch; the first are the windows' own, or those of whole episodes."""
    agent, latent, embeds = made
    batch = latent.buffer.sample(images=False)
    agent.args.rollout_noise = 0.0
    for starts in ("window", "episode"):
        agent.args.starts = starts
        found = agent.rollout(latent, batch, embeds[batch.row])
        feat, following = found.feat.view(3, 10, 12), found.next_feat.view(3, 10, 12)
        torch.testing.assert_close(feat[1:], following[:-1])
        torch.testing.assert_close(found.action, agent.actor(found.feat).detach())
        assert torch.equal(feat[0], latent.feat[batch.row.flatten()]) == (starts == "episode")
        assert (found.discount == 1).all()
