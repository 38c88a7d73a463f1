"""Offline DV2's actor distribution and penalty at their edges; all else: test_world_models.py, test_released.py."""

import numpy as np
import offline_dv2 as dv2
import pytest
import scipy.stats
import torch
from worlds import make_agent


@pytest.mark.parametrize("loc, scale", [(0.0, 1.1), (0.5, 1.1), (-0.95, 0.1), (0.3, 2.1)])
def test_draws_of_the_truncated_normal(loc, scale):
    torch.manual_seed(0)
    parts = [torch.full((20_000, 1), value, requires_grad=True) for value in (loc, scale)]
    expected = scipy.stats.truncnorm((-1 - loc) / scale, (1 - loc) / scale, loc, scale)
    policy = dv2.TruncatedNormal(*parts)
    assert policy.entropy()[0].item() == pytest.approx(expected.entropy(), abs=1e-4)
    action = policy.sample()
    to_loc, to_scale = torch.autograd.grad(action.sum(), parts)  # as if the standardised draw were given
    assert (to_loc == 1).all()
    action = action.detach()
    torch.testing.assert_close(to_scale, (action - loc) / scale, rtol=0, atol=1e-3)
    assert action.abs().max() < 1 and scipy.stats.kstest(action[:, 0], expected.cdf).pvalue > 1e-4


def test_the_actors_scale_lies_between_its_bounds():
    actor = make_agent("offline_dv2").actor
    policy = actor(torch.zeros(1, 20))
    torch.testing.assert_close(policy.scale, torch.full((1, 2), 1.1))
    wide = actor(1e6 * torch.randn(50, 20))
    assert wide.scale.min() >= 0.1 and wide.scale.max() <= 2.1 + 1e-6 and wide.loc.abs().max() <= 1


def test_the_disagreement_and_its_written_gradient():
    logits = (2 * torch.randn(5, 6, 4, 3, dtype=torch.float64)).requires_grad_()
    probs = np.exp(logits.detach().numpy()) / np.exp(logits.detach().numpy()).sum(-1, keepdims=True)
    expected = [np.mean([np.linalg.norm(p - probs[:, m].mean(0)) for p in probs[:, m]]) for m in range(6)]
    np.testing.assert_allclose(dv2.Disagreement.apply(logits).detach(), expected)
    assert torch.autograd.gradcheck(dv2.Disagreement.apply, logits)
    equal = logits.detach()[:1].expand(5, -1, -1, -1).clone().requires_grad_()
    value = dv2.Disagreement.apply(equal)
    value.sum().backward()
    assert value.abs().max() < 1e-6 and equal.grad.abs().max() < 1e-3  # not NaN
