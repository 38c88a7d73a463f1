"""What the three world models have in common, and benchmarks/inspect_world_model.py.

Offline DV2's and LOMPO's losses, gradients and values equal the released code's: test_released.py. Here: sizes,
settings, first weights, draws, what an update moves, precision, acting, evaluation, one run's model for another."""

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import collect
import pytest
import scipy.stats
import torch
import worlds
from conftest import ROOT, FourStepsPool, run_main, write_set
from torch import nn
from worlds import EACH, FILES, PHASES, TWO_PHASES, make_agent, make_batch

import common
from common import UserError

# ---- sizes, settings, first weights ----

PARAMETERS = {  # at 6 action dimensions, by the papers' sizes
    "offline_dv2": {"model": 15_132_916, "actor": 976_012, "critic": 971_601},
    "lompo": {"model": 6_190_660, "actor": 281_094, "critic.0": 215_553, "critic.1": 215_553},
    "moto": {"model": 15_132_916, "actor": 976_012, "critic.nets.0": 974_001, "critic.nets.1": 974_001},
}  # fmt: skip


@EACH
def test_sizes_are_the_papers(algo):
    agent = FILES[algo].Agent(FILES[algo].Args(device="cpu", precision="fp32"), 6)
    assert {name: worlds.count(agent.get_submodule(name)) for name in PARAMETERS[algo]} == PARAMETERS[algo]


@pytest.mark.parametrize("algo, expected", [("offline_dv2", (480, 1440)), ("lompo", (15, 90)), ("moto", (60, 0))])
def test_steps_left_out_scale_with_the_set(algo, expected, tmp_path, monkeypatch):
    """800 and 2,400 epochs of rows drawn; 25,000 and 150,000 for 100,000 transitions; one per transition."""
    file, found = FILES[algo], []

    def begun(args, dataset):
        names = ("offline_steps", "online_episodes") if algo == "moto" else ("model_steps", "agent_steps")
        found.extend(getattr(args, name) for name in names)
        raise UserError("enough")

    path = worlds.noise_set(tmp_path / "set", [[0.0] * 60])  # epochs of 60 / (2 x 50) updates
    monkeypatch.setattr(common, "Run", begun)
    words = ["--dataset", path, "--batch-size", 2, "--window", 50]
    assert "enough" in str(run_main(file, words))
    assert tuple(found) == expected


@EACH
def test_weights_begin_as_keras_begins_them(algo):
    agent = make_agent(algo, hidden=64, units=64, deter=48)
    for module in agent.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            bound = math.sqrt(6 / (math.prod(module.weight.shape[2:]) * sum(module.weight.shape[:2])))  # Glorot's
            assert module.weight.abs().max() <= bound and (module.bias == 0).all()
            if module.weight.numel() > 1000:
                assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    priors = agent.model.rssm.priors
    for weight in (priors.w1, priors.w2):
        bound = math.sqrt(6 / sum(weight.shape[1:]))  # of each member's own layer
        assert weight.abs().max() <= bound and not torch.equal(weight[0], weight[1])
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert (priors.b1 == 0).all() and (priors.b2 == 0).all()
    assert all(torch.equal(*pair) for pair in zip(agent.critic.parameters(), agent.critic_target.parameters()))
    if algo == "lompo":
        gru = agent.model.rssm.gru
        torch.testing.assert_close(gru.weight_hh.T @ gru.weight_hh, torch.eye(48), rtol=0, atol=1e-4)
        assert gru.weight_ih.abs().max() <= math.sqrt(6 / (64 + 3 * 48)) and (gru.bias_hh == 0).all()
    if algo != "offline_dv2":
        one, two = agent.critic if algo == "lompo" else agent.critic.nets
        assert not torch.equal(one[0][0].weight, two[0][0].weight)


# ---- draws ----


@pytest.mark.parametrize("loc, scale", [(0.0, 1.1), (0.5, 1.1), (-0.95, 0.1), (0.3, 2.1)])
def test_draws_of_the_truncated_normal(loc, scale):
    torch.manual_seed(0)
    parts = [torch.full((20_000, 1), value, requires_grad=True) for value in (loc, scale)]
    expected = scipy.stats.truncnorm((-1 - loc) / scale, (1 - loc) / scale, loc, scale)
    action = FILES["offline_dv2"].TruncatedNormal(*parts).sample()
    assert action.abs().max() < 1 and scipy.stats.kstest(action.detach()[:, 0], expected.cdf).pvalue > 1e-4
    to_loc, to_scale = torch.autograd.grad(action.sum(), parts)  # as if the standardised draw were given
    assert (to_loc == 1).all()
    torch.testing.assert_close(to_scale, (action.detach() - loc) / scale, rtol=0, atol=1e-3)


def test_where_members_agree_the_penaltys_gradient_is_no_nan():
    logits = torch.randn(6, 4, 3).expand(5, -1, -1, -1).clone().requires_grad_()
    value = FILES["offline_dv2"].Disagreement.apply(logits)
    value.sum().backward()
    assert value.abs().max() < 1e-6 and logits.grad.abs().max() < 1e-3


@EACH
def test_members_are_drawn_alike(algo):
    drawn = make_agent(algo).model.rssm.draw_members(30_000)
    assert (torch.bincount(drawn) / 30_000 - 1 / 3).abs().max() < 0.02


# ---- updates ----

MOVED = {("offline_dv2", "agent"): {"actor", "critic"}, ("lompo", "agent"): {"actor", "critic", "critic_target"},
         ("moto", "all"): {"model", "actor", "critic"}}  # fmt: skip


@pytest.mark.parametrize("algo, phase", PHASES)
def test_what_an_update_moves(algo, phase):
    """In a two-phase file the model is frozen in the second phase."""
    agent = make_agent(algo)
    before = worlds.copies(agent)
    metrics, changed = worlds.update(algo, phase, agent), worlds.moved(agent, before)
    assert changed == MOVED.get((algo, phase), {"model"}) and all(map(torch.isfinite, metrics.values()))
    if "critic_target" in changed:  # one Polyak step
        for target, (name, critic) in zip(agent.critic_target.parameters(), agent.critic.named_parameters()):
            old = before[f"critic.{name}"]
            torch.testing.assert_close(target, old + agent.args.tau * (critic - old))


@EACH
@pytest.mark.parametrize("lr", [1e-2, 1e-3])
def test_the_optimisers_step(algo, lr):
    """Adam's first step, the decay, and the clip, whatever the rate."""
    eps, decay = (1e-7, 0) if algo == "lompo" else (1e-5, 1e-6)
    for scale in (0.0, 1e-5, 1e4):
        agent = make_agent(algo, actor_lr=lr)
        before, params = worlds.copies(agent), [*agent.actor.parameters()]
        norm = agent.minimize("actor", scale * sum(parameter.sum() for parameter in params))
        gradient = min(scale, 100 * scale / norm)  # equal in all
        assert norm.item() == pytest.approx(scale * math.sqrt(worlds.count(agent.actor)))
        for name, parameter in agent.actor.named_parameters():
            expected = before[f"actor.{name}"] * (1 - decay) - lr * gradient / (gradient + eps)
            torch.testing.assert_close(parameter, expected, rtol=1e-7, atol=1e-7 * (1 + lr * 100))
        assert worlds.moved(agent, before) <= {"actor"}


@pytest.mark.parametrize("algo, phase", PHASES)
def test_gradients_in_bf16_are_near_those_in_fp32(algo, phase, monkeypatch):
    """Of each part of the agent. Weights that were first cast where nothing is learned (the actor in a target) keep
    their gradient."""
    found, still = {}, {"model_lr": 1e-9, "actor_lr": 1e-9, "critic_lr": 1e-9}  # one step changes no gradient after it
    for precision in ("fp32", "bf16"):
        agent = make_agent(algo, precision=precision, deter=32, hidden=32, units=32, **still)
        worlds.without_draws(monkeypatch, algo, agent)
        metrics, found[precision] = worlds.update(algo, phase, agent), {}
        assert all(value.dtype == torch.float32 for value in metrics.values())
        for name, weight in agent.named_parameters():
            if weight.grad is not None:
                part = ".".join(name.split(".")[: 2 if name.startswith("model") else 1])
                found[precision].setdefault(part, []).append(weight.grad.flatten())
    for part, gradients in found["fp32"].items():
        exact, other = torch.cat(gradients), torch.cat(found["bf16"][part])
        assert exact.norm() > 0 and 0 < (exact - other).norm() < 0.1 * exact.norm(), part


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs g++")
@pytest.mark.parametrize("algo, phase", PHASES)
def test_compiled_losses_equal_eager_ones(algo, phase, monkeypatch):
    found = []
    for accelerate in ("eager", "compile"):
        agent = make_agent(algo, accelerate=accelerate, window=3, horizon=2)
        worlds.without_draws(monkeypatch, algo, agent)
        common.accelerate(agent, agent.args)
        metrics = [worlds.update(algo, phase, agent) for _ in range(3)]
        found.append([value.item() for step in metrics for value in step.values()])
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5)


@TWO_PHASES
def test_the_sets_embeddings_are_those_of_the_batch(algo, tmp_path):
    """Of a set with two image files, in pieces that divide neither."""
    paths = [write_set(tmp_path / name, lengths=(12, 9), size=64, seed=seed) for seed, name in enumerate("ab")]
    collect.join(tmp_path / "both", list(map(common.Dataset, paths)))
    agent, buffer = make_agent(algo), common.SequenceBuffer(common.Dataset(tmp_path / "both"), 8, 5)
    embeds, batch = agent.embed_set(buffer, rows=7), buffer.sample()
    assert len(embeds) == 46 and batch.row.min() < 23 <= batch.row.max()
    torch.testing.assert_close(embeds[batch.row], agent.model.embed(batch.image), rtol=1e-5, atol=1e-6)
    agent.args.precision = "bf16"
    assert agent.embed_set(buffer).dtype == torch.bfloat16  # the encoder's output precision


# ---- acting and evaluation ----


@EACH
@torch.no_grad()
def test_what_was_before_a_first_row_and_its_action_do_not_count(algo, monkeypatch):
    """States from a first row on are those of a window that begins there."""
    agent, batch = make_agent(algo), make_batch()
    worlds.without_draws(monkeypatch, algo, agent)
    batch.is_first[:, 3] = True
    expected = worlds.observed(agent, common.Sequences(*(part[:, 3:] for part in batch))).feat
    batch.is_first[1, 3], batch.action[:, 3] = False, 1.0
    found = worlds.observed(agent, batch).feat[:, 3:]
    torch.testing.assert_close(found[0], expected[0])
    assert (found[1] != expected[1]).any(-1).all()  # no first row there


@EACH
def test_evaluation_draws_from_its_own_generator(algo):
    agent = make_agent(algo)
    for parameter in agent.actor.parameters():
        nn.init.normal_(parameter, std=0.5)  # actions neither all alike nor all in a corner
    before = torch.get_rng_state()
    results = [FILES[algo].evaluate(agent, FourStepsPool("walker-walk", 64, 3, 1), agent.args) for _ in range(2)]
    assert results[0][0] == results[1][0] and torch.equal(torch.get_rng_state(), before) and agent.training
    assert len(set(results[0][0]["return"])) == 3 and results[0][1][0].shape == (3, 64, 64)


# ---- runs ----


@TWO_PHASES
def test_the_second_phase_may_start_from_another_runs_model(algo, tmp_path):
    train = partial(worlds.train, algo, tmp_path)
    error, donor = train("donor", agent_steps=0)
    assert error is None
    error, run = train("two", model_from=donor, penalty_coef=1)
    assert error is None
    ours, theirs = worlds.weights_of(run), worlds.weights_of(donor)
    names = [name for name in theirs if name.startswith("model.")]
    assert len(names) > 20 and all(torch.equal(ours[name], theirs[name]) for name in names)
    assert not (run / "model.csv").exists() and len(worlds.rows_of(run, "agent")) == 4
    assert isinstance(train("again", model_from=donor, crash=3)[0], KeyboardInterrupt)
    assert train("again", model_from=donor)[0] is None
    with pytest.raises(RuntimeError, match="size mismatch for rssm"):
        train("wide", model_from=donor, deter=9)
    for unfinished in (train("half", crash=3)[1], tmp_path / "none"):
        error, _ = train("three", model_from=unfinished)
        assert isinstance(error, UserError) and f"{unfinished}/weights.pt is missing" in str(error)


@pytest.mark.parametrize("algo, flags", [("offline_dv2", {}), ("moto", {"model_first": 0, "online_episodes": 0})])
def test_the_target_is_a_copy_every_so_often(algo, flags, tmp_path):
    for steps, copied in ((4, True), (5, False)):
        phase = {"offline_dv2": "agent_steps", "moto": "offline_steps"}[algo]
        error, run = worlds.train(algo, tmp_path, f"{steps}", target_every=2, **(flags | {phase: steps}))
        found = worlds.weights_of(run)
        pairs = [(found[n.replace("_target", "")], v) for n, v in found.items() if n.startswith("critic_target")]
        assert error is None and all(torch.equal(*pair) for pair in pairs) == copied


@EACH
def test_images_must_be_of_the_decoders_size(algo, tmp_path):
    error, _ = worlds.train(algo, tmp_path, "", dataset=write_set(tmp_path / "small", lengths=(9,), size=21))
    assert isinstance(error, UserError) and "has images of 21 px; the decoder gives 64" in str(error)


# ---- benchmarks/inspect_world_model.py ----


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import inspect_world_model

    for module in (common, inspect_world_model):
        monkeypatch.setattr(module, "EnvPool", FourStepsPool)
    return inspect_world_model


@EACH
def test_films_and_errors_of_a_run(algo, tool, tmp_path):
    error, run = worlds.train(algo, tmp_path, "a")
    assert error is None
    out = tmp_path / "films"
    tool.main(
        tool.Args(str(run), out=str(out), batch=4, windows=2, context=2, episodes=1, horizon=3, distraction="low")
    )
    report, last = json.loads((out / "report.json").read_text()), worlds.rows_of(run, "eval")[-1]
    assert report["trained_on"] is True
    for part in ("filtered", "open_loop"):
        assert report["errors"][part].keys() == {"image_rmse_255", "reward_rmse", "reward_r2"}
        assert 0 < report["errors"][part]["image_rmse_255"] < 255
    assert report["return"]["real"]["mean"] == pytest.approx(last["return_0"])  # that of the last evaluation
    assert report["penalty_random_policy"]["mean"] > 0 and "imagined" in report["reward_over_3_steps"]
    assert {path.name for path in out.iterdir()} >= {"reconstruction.mp4", "open_loop.mp4", "translation.mp4"}
    with pytest.raises(UserError, match="has 21 px and . actions, the run needs 64 and"):
        tool.main(tool.Args(str(run), dataset=str(write_set(tmp_path / "small", lengths=(9,), size=21))))
    config = json.loads((run / "config.json").read_text()) | {"script": "0" * 12}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"algos/{algo}.py has changed"):
        tool.main(tool.Args(str(run)))


@EACH
@torch.no_grad()
def test_the_open_loop_sees_the_first_images_and_all_actions(algo, tool):
    agent, batch, context = make_agent(algo), make_batch(rows=7), 3

    def rolled(changed):
        torch.manual_seed(0)
        return tool.open_loop(agent, changed, context).deter

    torch.manual_seed(0)
    seen = tool.filtered(agent, common.Sequences(*(part[:, :context] for part in batch))).deter
    usual = rolled(batch)
    assert usual.shape == (2, 7, 8) and torch.equal(usual[:, :context], seen)
    later, earlier, action = batch.image.clone(), batch.image.clone(), batch.action.clone()
    later[:, context:], earlier[:, context - 1], action[:, 5] = 0, 0, 0
    assert torch.equal(rolled(batch._replace(image=later)), usual)
    differs = (rolled(batch._replace(image=earlier)) != usual).any(-1).any(0)
    assert differs.tolist() == 3 * [False] + 4 * [True]  # an image tells of its own row's draw, hence the next deter
    differs = (rolled(batch._replace(action=action)) != usual).any(-1).any(0)
    assert differs.tolist() == 5 * [False] + 2 * [True]  # action[5] leads to row 5


def test_errors_by_hand(tool):
    """feat is a row's number: it decodes to a grey image of row / 10 and predicts the reward row + 1. Of rows 1 to 3
    the images are off by 0.102, 0.202 and 0.302, and rewards of 2, 5 and 4 are predicted as 2, 3 and 4."""
    grey = SimpleNamespace(decoder=lambda feat: (feat / 10)[..., None, None].expand(-1, 3, 2, 2))
    grey.reward = lambda feat: feat + 1
    batch = SimpleNamespace(image=torch.full((1, 4, 3, 2, 2), 127).byte(), reward=torch.tensor([[9.0, 2, 5, 4]]))
    found = tool.errors(SimpleNamespace(model=grey), torch.arange(4.0).view(1, 4, 1), batch, first=1)
    expected = {"image_rmse_255": 55.549, "reward_rmse": (4 / 3) ** 0.5, "reward_r2": 1 / 7}
    assert found == pytest.approx(expected, rel=1e-4)
