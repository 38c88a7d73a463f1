"""Offline DreamerV2 against oracles: counts, NumPy re-derivations of what TensorFlow computes, definitions, resume.

Small networks on real shapes of images (64 px, which the decoder fixes), one CPU thread."""

import math

import numpy as np
import offline_dv2 as dv2
import pytest
import torch
import torch.nn.functional as F
from conftest import write_set
from scipy import integrate, stats
from torch import nn

import common

FLAGS = {"cnn_depth": 2, "stoch": 4, "classes": 3, "deter": 8, "hidden": 10, "units": 12, "ensemble": 3}
FLAGS |= {"batch_size": 2, "window": 5, "device": "cpu", "precision": "fp32", "accelerate": "eager"}


def make_agent(action_dim=2, **flags) -> dv2.Agent:
    torch.manual_seed(0)
    return dv2.Agent(dv2.Args(**(FLAGS | flags)), action_dim)


def make_batch(agent, seed=0) -> common.Sequences:
    args, rng = agent.args, np.random.default_rng(seed)
    shape = args.batch_size, args.window
    image = torch.from_numpy(rng.integers(0, 256, (*shape, 3, 64, 64), np.uint8))
    action = torch.from_numpy(rng.uniform(-1, 1, (*shape, agent.action_dim)).astype(np.float32))
    reward = torch.from_numpy(rng.uniform(0, 2, shape).astype(np.float32))
    is_first = torch.zeros(shape, dtype=torch.bool)
    is_first[:, 0] = True
    return common.Sequences(
        image, action, reward, torch.ones(shape), is_first, torch.arange(math.prod(shape)).view(shape)
    )


def embed(agent, batch) -> torch.Tensor:
    with torch.no_grad():
        return agent.model.embed(batch.image)


def states_of(agent, count=4, seed=1) -> dv2.State:
    generator = torch.Generator().manual_seed(seed)
    args = agent.args
    stoch = F.one_hot(torch.randint(args.classes, (count, args.stoch), generator=generator), args.classes)
    return dv2.State(stoch.flatten(1).float(), torch.randn(count, args.deter, generator=generator))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def gradients(loss: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
    params = [*module.parameters()]
    found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found)]


def size_of(parts: list[torch.Tensor]) -> float:
    return sum(part.abs().sum().item() for part in parts)


# ---- sizes and initial weights ----


@pytest.mark.parametrize("action_dim, rssm, total, actor", [(6, 2_723_392, 15_132_916, 976_012),
                                                            (21, 2_726_392, 15_135_916, 988_042)])  # fmt: skip
def test_parameter_counts(action_dim, rssm, total, actor):
    agent = dv2.Agent(dv2.Args(device="cpu", precision="fp32"), action_dim)
    model = agent.model
    assert count(model.encoder) == 1_551_312
    assert count(model.rssm) == rssm
    assert count(model.decoder) == 9_886_611
    assert count(model.reward) == count(agent.critic) == 971_601
    assert count(model) == total
    assert count(agent.actor) == actor
    assert (model.encoder.embed_dim, model.feat_dim) == (1536, 1224)


def test_defaults_are_the_papers():
    expected = {"batch_size": 64, "window": 50, "horizon": 5, "ensemble": 7, "gamma": 0.99, "td_lambda": 0.95}
    expected |= {"model_lr": 3e-4, "actor_lr": 8e-5, "critic_lr": 8e-5, "kl_balance": 0.8, "free_nats": 1.0}
    expected |= {"penalty": "mean_disagreement", "actor_ent": 1e-4, "target_every": 100, "penalty_coef": 10.0}
    args = dv2.Args()
    assert {name: getattr(args, name) for name in expected} == expected
    for (_, name), values in dv2.TUNED.items():
        assert 3 <= values["penalty_coef"] <= 10 and (values["penalty_coef"] == 3) == (name == "random")


def test_sides_of_the_convolutions():
    agent, sides = make_agent(), []
    hook = lambda _, inputs, output: sides.append(output.shape[-1])  # noqa: E731
    for conv in agent.model.encoder.convs:
        conv.register_forward_hook(hook)
    embedding = agent.model.embed(torch.zeros(2, 3, 3, 64, 64, dtype=torch.uint8))
    assert sides == [31, 14, 6, 2] and embedding.shape == (2, 3, 8 * 2 * 4)
    side, chain = 1, []
    for conv in agent.model.decoder.convs:
        side = (side - 1) * conv.stride[0] + conv.kernel_size[0]
        chain.append(side)
    assert chain == [5, 13, 30, 64]


def test_the_decoder_is_a_linear_layer_and_four_transposed_convolutions():
    decoder = make_agent().model.decoder
    for conv in decoder.convs:
        nn.init.normal_(conv.bias)
    feat = torch.randn(3, decoder.linear.in_features)
    image = decoder.linear(feat)[:, :, None, None]
    for conv in decoder.convs[:-1]:
        image = F.elu(conv(image))
    torch.testing.assert_close(decoder(feat), decoder.convs[-1](image))


def test_weights_begin_as_keras_begins_them():
    agent = dv2.Agent(dv2.Args(device="cpu", precision="fp32"), 6)
    for module in agent.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            *kernel, one, two = [*module.weight.shape[2:], *module.weight.shape[:2]]
            bound = math.sqrt(6 / (math.prod(kernel) * (one + two)))  # Glorot: fan in + fan out
            assert module.weight.abs().max() <= bound
            if module.weight.numel() > 1000:
                assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert (module.bias == 0).all()
    priors = agent.model.rssm.priors
    for weight in (priors.w1, priors.w2):
        bound = math.sqrt(6 / sum(weight.shape[1:]))  # of each member's own layer
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not torch.equal(weight[0], weight[1])
    assert (priors.b1 == 0).all() and (priors.b2 == 0).all()


# ---- the optimiser ----


def numpy_adam(params, grads_of_steps, lr):
    """TensorFlow's Adam after a clip of the global norm and the decay, float64."""
    params, m, v = [p.astype(np.float64) for p in params], [0.0] * len(params), [0.0] * len(params)
    for t, grads in enumerate(grads_of_steps, 1):
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads))
        for i, g in enumerate(grads):
            g = g * min(1, 100 / norm)
            params[i] = params[i] * (1 - 1e-6)
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g**2
            params[i] = params[i] - lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m[i] / (np.sqrt(v[i]) + 1e-5)
    return params


def test_the_optimiser_is_tensorflows(monkeypatch):
    rng = np.random.default_rng(0)
    shapes = (5, 3), (4,)
    start = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    scales = 1e-5, 1e-4, 300.0, 1.0  # the first two near epsilon, the third beyond the clip
    steps = [[(scale * rng.normal(size=shape)).astype(np.float32) for shape in shapes] for scale in scales]
    params = [nn.Parameter(torch.from_numpy(p.copy())) for p in start]
    optimizer = dv2.Optimizer(params, 3e-2, eps=1e-5, decay=1e-6)
    for grads in steps:
        for p, g in zip(params, grads):
            p.grad = torch.from_numpy(g.copy())
        norm = optimizer.step()
        assert norm.item() == pytest.approx(math.sqrt(sum((g**2).sum() for g in grads)), rel=1e-5)
    for p, expected in zip(params, numpy_adam(start, steps, 3e-2)):
        np.testing.assert_allclose(p.detach(), expected, rtol=2e-5, atol=1e-6)
    torchs = [nn.Parameter(torch.from_numpy(p.copy())) for p in start]  # torch's own epsilon would not do
    adam = torch.optim.Adam(torchs, 3e-2, eps=1e-5)
    for p, g in zip(torchs, steps[0]):
        p.grad = torch.from_numpy(g.copy())
    adam.step()
    one = numpy_adam(start, steps[:1], 3e-2)
    assert np.abs(torchs[0].detach().numpy() - one[0]).max() > 0.01


def test_decay_alone():
    p = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    optimizer = dv2.Optimizer([p], 1.0, eps=1e-5, decay=1e-6)
    for _ in range(100):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    np.testing.assert_allclose(p.detach(), 2 * (1 - 1e-6) ** 100, rtol=1e-12)  # not scaled by the learning rate


# ---- the model ----


def test_gru_cell_against_numpy():
    torch.manual_seed(0)
    cell = dv2.GRUCell(4, 6)
    for parameter in cell.parameters():
        nn.init.normal_(parameter)
    x, h = torch.randn(3, 4), torch.randn(3, 6)
    W, b, gain, shift = (p.detach().numpy().astype(np.float64) for p in cell.parameters())
    y = np.concatenate([x, h], -1) @ W.T + b
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(
        y.var(-1, keepdims=True) + 1e-3
    ) * gain + shift  # over all three gates
    sigmoid = lambda value: 1 / (1 + np.exp(-value))  # noqa: E731
    reset, candidate, update = sigmoid(y[:, :6]), y[:, 6:12], sigmoid(y[:, 12:] - 1)
    expected = update * np.tanh(reset * candidate) + (1 - update) * h.numpy()
    np.testing.assert_allclose(cell(x, h).detach(), expected, rtol=1e-4, atol=1e-5)


def test_samples_are_one_hot_and_as_frequent_as_their_probabilities():
    rssm = make_agent().model.rssm
    logits = torch.randn(1, 12).expand(40_000, -1).clone().requires_grad_()
    sample = rssm.sample(logits)
    drawn = sample.detach().unflatten(-1, (4, 3))
    assert ((drawn - drawn.round()).abs() < 1e-6).all() and torch.allclose(drawn.sum(-1), torch.ones(()))
    probs = logits[0].detach().view(4, 3).softmax(-1)
    assert (drawn.mean(0) - probs).abs().max() < 0.01
    pairs = torch.einsum("mi,mj->ij", drawn[:, 0], drawn[:, 1]) / len(drawn)  # variables are independent
    assert (pairs - probs[0, :, None] * probs[1]).abs().max() < 0.01
    weight = torch.randn(12)  # straight-through: the gradient of the probabilities
    (gradient,) = torch.autograd.grad((sample * weight).sum(), logits)
    again = logits.detach().requires_grad_()
    (expected,) = torch.autograd.grad((again.unflatten(-1, (4, 3)).softmax(-1).flatten(-2) * weight).sum(), again)
    torch.testing.assert_close(gradient, expected)
    mode = rssm.sample(logits[:1], mode=True).detach().view(4, 3)
    assert torch.equal(mode.argmax(-1), probs.argmax(-1))


def test_a_class_without_probability_is_never_drawn():
    rssm = make_agent(stoch=1, classes=4).model.rssm
    logits = torch.tensor([-200.0, 0.0, -200.0, 0.0]).expand(20_000, -1)
    drawn = rssm.sample(logits).sum(0)
    assert drawn[0] == drawn[2] == 0 and (drawn[[1, 3]] > 9000).all()


def test_filtering_is_the_recurrence_step_by_step():
    """The layers as the reference has them: whole inputs, one row after the other."""
    agent = make_agent()
    rssm, batch = agent.model.rssm, make_batch(agent)
    batch.is_first[1, 3] = True  # an episode that begins within a window
    embeds = embed(agent, batch)
    torch.manual_seed(1)
    states, post = rssm.observe(embeds, batch.action, batch.is_first)
    torch.manual_seed(1)
    stoch, deter = torch.zeros(2, 12), torch.zeros(2, 8)
    for t in range(5):
        keep = (~batch.is_first[:, t, None]).float()
        x = F.elu(rssm.img_in(torch.cat([stoch * keep, batch.action[:, t] * keep], -1)))
        deter = rssm.gru(x, deter * keep)
        logits = rssm.post_out(F.elu(rssm.post_in(torch.cat([deter, embeds[:, t]], -1))))
        stoch = rssm.sample(logits)
        torch.testing.assert_close(states.deter[:, t], deter)
        torch.testing.assert_close(post[:, t], logits)
        torch.testing.assert_close(states.stoch[:, t], stoch)


def test_the_action_of_a_first_row_and_what_was_before_do_not_count():
    agent = make_agent()
    batch = make_batch(agent)
    embeds, other = embed(agent, batch), batch.action.clone()
    other[:, 0] = 1.0
    before = states_of(agent, 2)
    results = []
    for action, state in ((batch.action, None), (other, None), (other, before)):
        torch.manual_seed(1)
        results.append(agent.model.rssm.observe(embeds, action, batch.is_first, state)[1])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    torch.manual_seed(1)
    unmasked = agent.model.rssm.observe(embeds, other, torch.zeros_like(batch.is_first))[1]
    assert not torch.allclose(results[0], unmasked)


def test_action_t_leads_to_image_t():
    """With actions one row late the next recurrent states are others: the alignment is not a matter of taste."""
    agent = make_agent()
    batch = make_batch(agent)
    torch.manual_seed(1)
    states, _ = agent.model.rssm.observe(embed(agent, batch), batch.action, batch.is_first)
    now = dv2.State(*(part[:, 2] for part in states))
    torch.testing.assert_close(agent.model.rssm.recur(now, batch.action[:, 3]), states.deter[:, 3])
    assert not torch.allclose(agent.model.rssm.recur(now, batch.action[:, 2]), states.deter[:, 3])


def test_only_the_drawn_prior_is_evaluated_and_it_is_the_right_one():
    agent = make_agent()
    priors, deter = agent.model.rssm.priors, torch.randn(5, 7, 8)  # 5 time steps of 7 states
    member = torch.tensor([2, 0, 1, 2, 2])
    every = torch.stack([priors(part) for part in deter], 1)  # (N, 5, 7, S K)
    torch.testing.assert_close(priors(deter, member), every[member, torch.arange(5)])
    expected = F.elu(deter[0] @ priors.w1[2] + priors.b1[2]) @ priors.w2[2] + priors.b2[2]
    torch.testing.assert_close(priors(deter, member)[0], expected)
    loss = priors(deter, member).square().sum()
    found = torch.autograd.grad(loss, priors.w2)[0]
    unused = torch.autograd.grad(priors(deter[:1], member[:1]).square().sum(), priors.w2)[0]
    assert (found.flatten(1).abs().sum(1) > 0).all() and (unused[:2] == 0).all()  # zeros, not None: their Adam goes on


def test_members_are_drawn_alike():
    drawn = make_agent().model.rssm.draw_members(30_000)
    assert (torch.bincount(drawn) / 30_000 - 1 / 3).abs().max() < 0.02


def test_a_perfect_reconstruction_costs_11_292_nats():
    image = torch.rand(1, 3, 64, 64)
    assert dv2.normal_nll(image, image).item() == pytest.approx(11_291.917, abs=0.01)
    assert dv2.normal_nll(image, image + 2).item() == pytest.approx(11_291.917 + 2 * 12_288, rel=1e-5)


def test_the_kl_is_that_of_torch():
    p, q = torch.randn(2, 6, 4, 3).unbind(0)
    one, two = (torch.distributions.OneHotCategorical(logits=logits) for logits in (p, q))
    torch.testing.assert_close(dv2.categorical_kl(p, q), torch.distributions.kl_divergence(one, two).sum(-1))
    torch.testing.assert_close(dv2.categorical_entropy(p), one.entropy().sum(-1))


def test_the_model_loss_is_its_terms():
    agent = make_agent(free_nats=0.0)
    batch = make_batch(agent)
    torch.manual_seed(3)
    loss, metrics = agent.model_loss(batch)
    torch.manual_seed(3)
    states, post = agent.model.rssm.observe(embed(agent, batch), batch.action, batch.is_first)
    member = agent.model.rssm.draw_members(5)
    feat = torch.cat([states.stoch, states.deter], -1)
    image = agent.model.decoder(feat.flatten(0, 1)).view(2, 5, 3, 64, 64)
    normal = torch.distributions.Normal(image, 1.0)
    image_loss = -normal.log_prob(batch.image / 255 - 0.5).sum((2, 3, 4)).mean()  # summed over pixels, not their mean
    reward_loss = -torch.distributions.Normal(agent.model.reward(feat)[..., 0], 1.0).log_prob(batch.reward).mean()
    prior = torch.stack([agent.model.rssm.priors(states.deter[:, t])[member[t]] for t in range(5)], 1)
    kl = dv2.categorical_kl(post.unflatten(-1, (4, 3)), prior.unflatten(-1, (4, 3))).mean()
    for name, value in {"image_loss": image_loss, "reward_loss": reward_loss, "kl": kl}.items():
        torch.testing.assert_close(metrics[f"model/{name}"], value.detach())
    torch.testing.assert_close(loss, image_loss + reward_loss + kl)  # balanced or not, the value is the same


def kl_part(agent, batch):
    """The gradients of the KL term alone, of priors and posterior."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dv2, "normal_nll", lambda mean, x: 0 * mean.sum())
        torch.manual_seed(3)
        loss, _ = agent.model_loss(batch)
        parts = agent.model.rssm.priors, agent.model.rssm.post_out
        return [torch.cat([g.flatten() for g in gradients(loss, part)]) for part in parts]


def test_under_the_free_nats_the_kl_has_no_gradient():
    agent = make_agent(free_nats=50.0)
    batch = make_batch(agent)
    loss, metrics = agent.model_loss(batch)
    rest = metrics["model/image_loss"] + metrics["model/reward_loss"]
    assert metrics["model/kl"] < 50 and loss.item() == pytest.approx((rest + 50).item())
    assert size_of(gradients(loss, agent.model.rssm.priors)) == 0
    assert all(size_of([part]) > 0 for part in kl_part(make_agent(free_nats=0.0), batch))


def test_the_free_nats_are_of_the_mean_not_of_each_state():
    agent = make_agent()
    with torch.no_grad():  # a sharp posterior, so that states differ in how far they are from their prior
        agent.model.rssm.post_out.weight.mul_(30)
    batch, each = make_batch(agent), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dv2, "categorical_kl", lambda p, q, kl=dv2.categorical_kl: each.append(kl(p, q)) or each[-1])
        kl = agent.model_loss(batch)[1]["model/kl"].item()
    agent.args.free_nats = 0.9 * kl
    assert each[0].shape == (2, 5) and (each[0] < 0.9 * kl).any()  # these have a gradient all the same
    torch.manual_seed(3)
    one = kl_part(agent, batch)
    agent.args.free_nats = 0.0
    two = kl_part(agent, batch)
    for ours, theirs in zip(one, two):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_most_of_the_kl_trains_the_prior():
    parts = []
    for balance in (0.8, 0.5):
        agent = make_agent(free_nats=0.0, kl_balance=balance, window=1)  # in longer ones draws reach later priors
        parts.append(kl_part(agent, make_batch(agent)))
    torch.testing.assert_close(parts[0][0], parts[1][0] * (0.8 / 0.5), rtol=1e-3, atol=1e-5)  # the prior's
    torch.testing.assert_close(parts[0][1], parts[1][1] * (0.2 / 0.5), rtol=1e-3, atol=1e-5)  # the posterior's


# ---- penalties ----

LOGITS = 2 * torch.randn(5, 6, 4, 3, generator=torch.Generator().manual_seed(0))
STOCH = F.one_hot(torch.randint(3, (6, 4), generator=torch.Generator().manual_seed(1)), 3).float()


def numpy_penalty(name: str) -> np.ndarray:
    logits, stoch = LOGITS.numpy().astype(np.float64), STOCH.numpy()
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    probs, found = np.exp(log_probs), np.zeros(6)
    for m in range(6):
        mean = sum(probs[k, m] for k in range(5)) / 5
        if name == "mean_disagreement":
            found[m] = sum(np.sqrt(((probs[k, m] - mean) ** 2).sum()) for k in range(5)) / 5
        elif name == "sum_squares":
            found[m] = sum(((probs[k, m] - mean) ** 2).sum() for k in range(5))
        elif name == "logit_std":
            found[m] = log_probs[:, m].std(0).mean()  # NumPy divides by N, not by N - 1
        elif name == "log_prob_std":
            found[m] = np.array([(log_probs[k, m] * stoch[m]).sum() for k in range(5)]).std()
        else:
            found[m] = np.sqrt(mean * (1 - mean)).mean()
    return found


@pytest.mark.parametrize("name", dv2.PENALTY)
def test_penalties_against_numpy(name):
    np.testing.assert_allclose(dv2.PENALTY[name](LOGITS, STOCH), numpy_penalty(name), rtol=1e-5)


@pytest.mark.parametrize("name", dv2.PENALTY)
def test_penalties_of_equal_priors_and_shifted_logits(name):
    penalty = dv2.PENALTY[name]
    shifted = LOGITS + torch.randn(5, 6, 4, 1)  # another constant for each categorical of each member
    torch.testing.assert_close(penalty(shifted, STOCH), penalty(LOGITS, STOCH), rtol=1e-4, atol=1e-5)
    equal = LOGITS[:1].expand(5, -1, -1, -1).clone().requires_grad_()
    value = penalty(equal, STOCH)
    value.sum().backward()
    if name != "mixture_std":  # which is also the spread of one prior alone
        assert value.abs().max() < 1e-5
    assert torch.isfinite(equal.grad).all()


def test_the_gradient_of_the_disagreement_that_is_written_out():
    logits = LOGITS.double().requires_grad_()
    assert torch.autograd.gradcheck(dv2.Disagreement.apply, logits)
    equal = logits.detach()[:1].expand(5, -1, -1, -1).clone().requires_grad_()
    dv2.Disagreement.apply(equal).sum().backward()
    assert equal.grad.abs().max() < 1e-3


def test_the_penalty_is_a_function_of_the_state_arrived_at():
    agent = make_agent(penalty_coef=1.0)
    state = states_of(agent)
    logits = agent.model.rssm.priors(state.deter).unflatten(-1, (4, 3))
    torch.testing.assert_close(agent.penalty(state), dv2.mean_disagreement(logits, state.stoch))
    agent.args.penalty = "none"
    assert (agent.penalty(state) == 0).all()


def test_the_flag_has_all_penalties():
    choices = dv2.Args.__annotations__["penalty"].__args__
    assert set(choices) == {*dv2.PENALTY, "none"}


# ---- the actor ----


@pytest.mark.parametrize("loc, scale", [(0.0, 1.1), (0.5, 1.1), (-0.95, 0.1), (0.3, 2.1)])
def test_the_truncated_normal(loc, scale):
    low, high = (-1 - loc) / scale, (1 - loc) / scale
    expected = stats.truncnorm(low, high, loc, scale)
    policy = dv2.TruncatedNormal(torch.full((40_000, 1), loc), torch.full((40_000, 1), scale))
    assert policy.entropy()[0].item() == pytest.approx(expected.entropy(), abs=1e-4)
    for gradient in ("reference", "exact"):
        action = policy.sample(gradient).numpy()
        assert np.abs(action).max() < 1
        assert stats.kstest(action[:, 0], expected.cdf).pvalue > 1e-4


def sample_gradients(gradient: str, loc: float, scale: float) -> tuple[np.ndarray, ...]:
    parts = [torch.full((200_000, 1), value, requires_grad=True) for value in (loc, scale)]
    action = dv2.TruncatedNormal(*parts).sample(gradient)
    found = torch.autograd.grad(action.sum(), parts)
    return action.detach().numpy(), *(g.numpy() for g in found)


def test_the_draws_gradient_is_the_references_or_the_exact_one():
    loc, scale = 0.5, 1.1
    action, to_loc, to_scale = sample_gradients("reference", loc, scale)
    np.testing.assert_allclose(to_loc, 1)
    np.testing.assert_allclose(to_scale, (action - loc) / scale, atol=1e-4)
    action, exact_loc, exact_scale = sample_gradients("exact", loc, scale)

    def mean_square(loc, scale):  # E[-(x - 0.5)^2], whose gradient the draws' must give on average
        density = stats.truncnorm((-1 - loc) / scale, (1 - loc) / scale, loc, scale).pdf
        return integrate.quad(lambda x: -((x - 0.5) ** 2) * density(x), -1, 1)[0]

    def mean(loc, scale):
        return stats.truncnorm((-1 - loc) / scale, (1 - loc) / scale, loc, scale).mean()

    h = 1e-4
    assert exact_loc.mean() == pytest.approx((mean(loc + h, scale) - mean(loc - h, scale)) / (2 * h), abs=0.01)
    assert exact_loc.mean() == pytest.approx(0.24, abs=0.01)  # against 1 of the reference
    slope = (mean_square(loc, scale + h) - mean_square(loc, scale - h)) / (2 * h)
    assert (-2 * (action - 0.5) * exact_scale).mean() == pytest.approx(slope, abs=0.01)
    assert slope == pytest.approx(-0.23, abs=0.01)
    assert (-2 * (action - 0.5) * (action - loc) / scale).mean() == pytest.approx(-0.79, abs=0.02)


def test_the_actors_scale_lies_between_its_bounds():
    actor = make_agent().actor
    policy = actor(torch.zeros(1, actor.hidden[0].in_features))
    torch.testing.assert_close(policy.scale, torch.full((1, 2), 1.1))
    assert (policy.loc == 0).all()
    wide = actor(1e6 * torch.randn(50, actor.hidden[0].in_features))
    assert wide.scale.min() >= 0.1 and wide.scale.max() <= 2.1 + 1e-6 and wide.loc.abs().max() <= 1


# ---- imagination ----


def test_lambda_returns_against_the_definition():
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 4, 3))  # of states 0..3 and of 1..4
    targets = {}
    for td_lambda in (0.0, 0.6, 1.0):
        found = dv2.lambda_return(torch.from_numpy(reward), torch.from_numpy(value), 0.9, td_lambda).numpy()
        for t in range(4):
            steps = [sum(0.9**j * reward[t + j] for j in range(n)) + 0.9**n * value[t + n - 1] for n in range(1, 5 - t)]
            weights = [(1 - td_lambda) * td_lambda**i for i in range(len(steps) - 1)] + [td_lambda ** (len(steps) - 1)]
            np.testing.assert_allclose(found[t], sum(w * s for w, s in zip(weights, steps)))
        targets[td_lambda] = found
    np.testing.assert_allclose(targets[0.0], reward + 0.9 * value)  # one step
    np.testing.assert_allclose(
        targets[1.0][0], sum(0.9**j * reward[j] for j in range(4)) + 0.9**4 * value[3]
    )  # the discounted sum


def test_the_losses_of_the_second_phase_are_their_definitions():
    agent = make_agent(horizon=4, penalty_coef=2.0, actor_ent=0.1)
    start = states_of(agent)
    with torch.no_grad():
        for parameter in agent.critic_target.parameters():
            parameter.add_(0.1)  # another network than the critic
    torch.manual_seed(5)
    loss, feat, target, metrics = agent.actor_loss(start)
    torch.manual_seed(5)
    states, policies = agent.imagine(start)
    feats = [torch.cat([state.stoch, state.deter], -1) for state in states]
    reward = [agent.model.reward(f)[:, 0] - 2.0 * agent.penalty(s) for f, s in zip(feats, states)]
    value = [agent.critic_target(f)[:, 0] for f in feats]
    expected, following = [], value[4]
    for t in (3, 2, 1, 0):
        following = reward[t] + 0.99 * (0.05 * value[t + 1] + 0.95 * following)
        expected.insert(0, following)
    torch.testing.assert_close(target, torch.stack(expected))
    terms = [0.99**i * (expected[i + 1] + 0.1 * policies[i].entropy()) for i in range(3)]
    torch.testing.assert_close(loss, -torch.stack(terms).mean())
    torch.testing.assert_close(feat, torch.stack(feats[:-1]))
    assert not feat.requires_grad and not target.requires_grad
    for policy, f in zip(policies, feats):
        torch.testing.assert_close(policy.loc, agent.actor(f).loc)
    critic_loss, _ = agent.critic_loss(feat, target)
    errors = [0.99**t * 0.5 * (agent.critic(feats[t])[:, 0] - expected[t]) ** 2 for t in range(4)]
    torch.testing.assert_close(critic_loss, torch.stack(errors).mean())
    assert metrics["imag/penalty"] > 0


def test_the_actor_learns_through_the_dynamics_and_the_state_that_is_drawn():
    agent = make_agent(horizon=3)
    torch.manual_seed(5)
    states, policies = agent.imagine(states_of(agent))
    (to_action,) = torch.autograd.grad(states[1].stoch.square().sum() + states[1].stoch[:, 0].sum(), policies[0].loc,
                                       retain_graph=True)  # fmt: skip
    assert to_action.abs().sum() > 0  # straight-through, not cut off
    (of_penalty,) = torch.autograd.grad(agent.penalty(states[1]).sum(), policies[0].loc, retain_graph=True)
    assert of_penalty.abs().sum() > 0
    found = torch.autograd.grad(policies[1].loc.sum(), policies[0].loc, allow_unused=True)[0]
    assert found is None  # the policy's input carries no gradient


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two))


def test_each_phase_changes_its_own_networks():
    agent = make_agent()
    batch = make_batch(agent)
    parts = {name: getattr(agent, name) for name in ("model", "actor", "critic", "critic_target")}
    assert equal(weights(agent.critic), weights(agent.critic_target))  # the target starts as a copy

    def changed(update) -> set[str]:
        before = {name: weights(part) for name, part in parts.items()}
        update()
        return {name for name, part in parts.items() if not equal(before[name], weights(part))}

    assert changed(lambda: agent.update_model(batch)) == {"model"}
    assert changed(lambda: agent.update_agent(batch, embed(agent, batch))) == {"actor", "critic"}
    assert changed(agent.update_target) == {"critic_target"}
    assert equal(weights(agent.critic), weights(agent.critic_target))


def test_the_sets_embeddings_are_those_of_the_batch(tmp_path):
    path = write_set(tmp_path / "set", lengths=(30, 20), size=64)
    agent = make_agent()
    buffer = common.SequenceBuffer(common.Dataset(path), 4, 5)
    embeds = agent.embed_set(buffer, rows=7)
    assert embeds.shape == (52, agent.model.encoder.embed_dim) and embeds.dtype == torch.float32
    batch = buffer.sample()
    torch.testing.assert_close(embeds[batch.row], embed(agent, batch), rtol=1e-5, atol=1e-6)
    agent.args.precision = "bf16"
    assert agent.embed_set(buffer).dtype == torch.bfloat16  # the encoder's output precision
    assert buffer.sample(images=False).image is None


def test_the_model_learns_a_small_set(tmp_path):
    """Reward and images of three windows: all terms fall, and reconstructions come near."""
    agent = make_agent(cnn_depth=4, stoch=8, classes=8, deter=32, hidden=32, units=32, model_lr=3e-3)
    batch = make_batch(agent)
    yes = torch.arange(10).view(2, 5) % 3 == 0  # grey images of two kinds, the reward tells them apart
    image = torch.where(yes[..., None, None, None], 200, 60).to(torch.uint8).expand(2, 5, 3, 64, 64).contiguous()
    batch = batch._replace(image=image, reward=yes.float())
    first = agent.update_model(batch)
    for _ in range(150):
        last = agent.update_model(batch)
    assert last["model/image_loss"] < 11_291.9 + 0.2 * (first["model/image_loss"] - 11_291.9)
    assert last["model/reward_loss"] < 0.94 < first["model/reward_loss"]  # 0.92 is a perfect mean
    shown = agent.reconstruct(batch) + 0.5
    assert (shown - batch.image / 255).abs().mean() < 0.08
    rolled = agent.open_loop(batch, context=3)
    assert rolled.shape == (2, 5, 3, 64, 64) and torch.isfinite(rolled).all()


@pytest.mark.parametrize("phase", ["model", "agent"])
def test_bf16_is_near_fp32(phase):
    found = []
    for precision in ("fp32", "bf16"):
        agent = make_agent(precision=precision, deter=32, hidden=32, units=32)
        batch = make_batch(agent)
        torch.manual_seed(2)
        with agent.autocast():
            if phase == "model":
                loss, metrics = agent.model_loss(batch)
            else:
                loss, feat, target, metrics = agent.actor_loss(states_of(agent))
                assert feat.dtype == target.dtype == torch.float32
        assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in metrics.values())
        found.append(loss.item())
    assert found[0] == pytest.approx(found[1], rel=0.02 if phase == "model" else 0.2)
