"""Whole runs of the two-phase files: killed in either phase and continued, begun from another run's model, refused."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import lompo
import numpy as np
import offline_dv2
import pytest
import torch
from conftest import ROOT, run_main, run_python, write_set

import common
from common import UserError

ALGOS = {"offline_dv2": offline_dv2, "lompo": lompo}
EACH = pytest.mark.parametrize("algo", ALGOS)
SMALL = ["--cnn-depth", 2, "--stoch", 4, "--deter", 8, "--hidden", 10, "--units", 12, "--ensemble", 3]
SMALL += ["--batch-size", 2, "--window", 5, "--device", "cpu", "--log-every", 1, "--eval-every", 0]
OWN = {"offline_dv2": ["--classes", 3, "--target-every", 2],
       "lompo": ["--agent-batch-size", 8, "--rollout-every", 2]}  # fmt: skip
STEPS = ["--model-steps", 5, "--agent-steps", 5]


@pytest.fixture(scope="module")
def own_set(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("own") / "robot", lengths=(12, 9), size=64)


@pytest.fixture
def train(own_set, tmp_path):
    """train(algo, *flags) is its command line, here: see run_main."""

    def call(algo, *flags, crash=None, dataset=own_set, steps=STEPS):
        words = ["--dataset", dataset, "--runs-dir", tmp_path / "runs", *SMALL, *OWN[algo], *steps, *flags]
        return run_main(ALGOS[algo], words, methods=("update_model", "update_agent"), crash=crash)

    call.folder = lambda algo, name="seed0": tmp_path / "runs" / algo / "own" / "robot" / name
    return call


def rows_of(run: Path, part: str) -> list[list[str]]:
    """A metrics file without its wall clock."""
    lines = [line.split(",") for line in (run / f"{part}.csv").read_text().splitlines()]
    return [[line[0], *line[2:]] for line in lines]


def weights_of(run: Path) -> dict:
    loaded = torch.load(run / "weights.pt", weights_only=True)
    return {name: value for name, value in loaded.items() if name != "_extra_state"}


def same_weights(one: Path, two: Path) -> bool:
    ours, theirs = weights_of(one), weights_of(two)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@EACH
@pytest.mark.parametrize("crash", [3, 6, 8])  # in the first phase, at the second one's first update, in the second
def test_a_killed_run_continues_bit_by_bit(algo, train, crash):
    assert train(algo, "--tag", "whole") is None
    assert isinstance(train(algo, crash=crash), KeyboardInterrupt)
    one, two = train.folder(algo), train.folder(algo, "whole-seed0")
    assert sorted(path.name for path in one.glob("checkpoint-*"))[-1] == f"checkpoint-{crash - 1:09d}"
    assert train(algo) is None
    for part in ("model", "agent"):
        assert rows_of(one, part) == rows_of(two, part) and len(rows_of(one, part)) == 6
    assert same_weights(one, two)
    assert json.loads((one / "finished.json").read_text())["steps"] == 10
    assert train(algo, "--tag", "other", "--seed", 1) is None
    assert not same_weights(one, train.folder(algo, "other-seed1"))


@EACH
def test_steps_left_out_scale_with_the_set(algo, own_set, monkeypatch):
    found = {}

    def started(args, dataset, flags):
        found.update(model=args.model_steps, agent=args.agent_steps, total=args.steps)
        raise UserError("enough")

    module = ALGOS[algo]
    args = common.typed_args(module.Args, module.TUNED, module.QUICK, ["--dataset", str(own_set), "--batch-size", "2"])
    monkeypatch.setattr(module, "start_run", started)
    with pytest.raises(UserError, match="enough"):
        module.main(args)
    transitions = 21  # 800 and 2,400 epochs of 2 x 50 rows; 25,000 and 150,000 for 100,000 transitions
    steps = {"offline_dv2": (168, 504), "lompo": (round(transitions / 4), round(transitions * 1.5))}[algo]
    assert found == {"model": steps[0], "agent": steps[1], "total": sum(steps)}


@EACH
def test_agent_steps_may_grow_and_model_steps_may_not(algo, train):
    assert isinstance(train(algo, crash=8), KeyboardInterrupt)
    error = train(algo, "--model-steps", 6)
    assert isinstance(error, UserError) and "--model-steps 5 -> 6" in str(error)
    assert train(algo, "--agent-steps", 6) is None
    assert len(rows_of(train.folder(algo), "agent")) == 7


def test_the_target_is_a_copy_every_so_often(train):
    names = "critic.1.weight", "critic_target.1.weight"
    for steps, copied in ((4, True), (5, False)):  # after updates 2 and 4
        assert train("offline_dv2", "--agent-steps", steps, "--tag", f"{steps}") is None
        found = weights_of(train.folder("offline_dv2", f"{steps}-seed0"))
        assert torch.equal(*(found[name] for name in names)) == copied


def edited(run: Path, name: str, value) -> Path:
    """A copy of a run whose config.json says otherwise."""
    copy = run.with_name(f"{run.name}-{name}")
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(".lock"))
    config = json.loads((copy / "config.json").read_text())
    (config["dataset"] if name == "action_dim" else config["args"])[name] = value
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@EACH
def test_a_model_serves_a_copied_file_and_other_data(algo, train, tmp_path, capsys):
    """What --model-from is for: a copy of the file with another agent. A copy with other networks is told apart."""
    assert train(algo, "--agent-steps", 0, "--tag", "model") is None
    donor, other = train.folder(algo, "model-seed0"), write_set(tmp_path / "other", lengths=(8,), size=64, seed=1)
    config = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps(config | {"algo": "my_idea"}))
    assert train(algo, "--model-from", donor, "--tag", "two", dataset=other) is None
    assert "was trained on other data, robot" in capsys.readouterr().out
    weights = torch.load(donor / "weights.pt", weights_only=True)
    torch.save(weights | {"model.extra": torch.zeros(2)}, donor / "weights.pt")
    error = train(algo, "--model-from", donor, "--tag", "three")
    assert isinstance(error, UserError) and "has other networks: Unexpected key(s)" in str(error), error


@EACH
def test_the_second_phase_may_start_from_another_runs_model(algo, train):
    assert train(algo, "--agent-steps", 0, "--tag", "model") is None
    donor = train.folder(algo, "model-seed0")
    error = train(algo, "--model-from", donor)
    assert isinstance(error, UserError) and "also give a --tag" in str(error)
    assert train(algo, "--model-from", donor, "--penalty-coef", 1, "--tag", "two") is None
    run = train.folder(algo, "two-seed0")
    ours, theirs = weights_of(run), weights_of(donor)
    for name, value in theirs.items():
        if name.startswith("model."):
            assert torch.equal(ours[name], value)
    assert not (run / "model.csv").exists() and len(rows_of(run, "agent")) == 6
    assert isinstance(train(algo, "--model-from", donor, "--tag", "again", crash=3), KeyboardInterrupt)
    donor = donor.rename(donor.with_name("elsewhere"))  # a run that is under way needs it no more
    assert train(algo, "--model-from", donor.with_name("model-seed0"), "--tag", "again") is None
    assert isinstance(train(algo, "--tag", "unfinished", crash=8), KeyboardInterrupt)  # in its second phase
    assert train(algo, "--model-from", train.folder(algo, "unfinished-seed0"), "--tag", "three") is None
    assert isinstance(train(algo, "--tag", "early", crash=3), KeyboardInterrupt)
    for flags, message in (
        (["--model-from", train.folder(algo, "early-seed0")], "has not finished its first phase of 5 updates"),
        (["--model-from", donor, "--deter", 9], "has --deter 8, here 9"),
        (["--model-from", donor.parent], "there is no config.json"),
        (["--model-from", edited(donor, "task", "walker-walk")], "has task walker-walk, here own"),
        (["--model-from", edited(donor, "action_dim", 3)], "has action_dim 3, here 2"),
        (["--model-from", edited(donor, "units", 13)], "has --units 13, here 12"),
    ):
        error = train(algo, *flags, "--tag", "bad")
        assert isinstance(error, UserError) and message in str(error), error


@EACH
def test_bad_sets_and_flags_are_one_line(algo, train, tmp_path):
    small = write_set(tmp_path / "small", size=21)
    for flags, dataset, message in (
        ([], small, "has images of 21 px; the decoder gives 64"),
        (["--window", 14], None, "its longest episode has 13 rows, --window 14 needs as many"),
        (["--horizon", 1 if algo == "offline_dv2" else 0], None, "at least"),
        (["--ensemble", 0], None, "--ensemble 0: at least 1"),
        (["--model-steps", -1], None, "--model-steps -1: at least 0"),
    ):
        error = train(algo, *flags, **({"dataset": dataset} if dataset else {}))
        assert isinstance(error, UserError) and message in str(error), error


@EACH
@pytest.mark.parametrize("phase", ["model", "agent"])
def test_the_first_loss_that_is_not_finite_is_named_and_the_checkpoint_kept(algo, phase, train, monkeypatch):
    """From one update on everything is NaN, and metrics are looked at every fifth: the first one is told."""
    where, name = (ALGOS[algo], "normal_nll") if phase == "model" else (ALGOS[algo].Agent, "critic_loss")
    original, calls, bad = getattr(where, name), [], {"model": 14, "agent": 2}[phase]  # two likelihoods per update

    def poisoned(*args):
        calls.append(1)
        result, factor = original(*args), math.nan if len(calls) == bad else 1.0
        if phase == "model":
            return result * factor
        return result[0] * factor, result[1] | {"critic/loss": result[1]["critic/loss"] * factor}

    monkeypatch.setattr(where, name, poisoned)
    error = train(algo, "--log-every", 100, steps=["--model-steps", 10, "--agent-steps", 90])
    names = {"model": "model/loss, model/reward_loss, model/grad_norm", "agent": "critic/loss, critic/grad_norm"}[phase]
    step, kept = {"model": (7, "checkpoint-000000005"), "agent": (12, "checkpoint-000000010")}[phase]
    assert isinstance(error, UserError) and str(error).startswith(f"{names} not finite at step {step}; "), error
    assert str(error).endswith(kept)


class Pool:
    """Three episodes of four steps; what is seen and rewarded does not depend on much."""

    task, count, summary, describe = "walker-walk", 3, common.EnvPool.summary, staticmethod(common.EnvPool.describe)

    def reset(self, seeds):
        self.t, self.done, self.rng = 0, np.zeros(3, bool), np.random.default_rng(0)
        return self.rng.integers(0, 256, (3, 3, 64, 64), np.uint8)

    def step(self, actions):
        assert actions.shape == (3, 2) and np.abs(actions).max() <= 1
        self.t += 1
        self.done[:] = self.t == 4
        return self.rng.integers(0, 256, (3, 3, 64, 64), np.uint8), np.ones(3) + actions[:, 0], None


@EACH
def test_evaluation_draws_from_its_own_generator(algo):
    module = ALGOS[algo]
    args = module.Args(cnn_depth=2, stoch=4, deter=8, hidden=10, units=12, ensemble=2, device="cpu", precision="fp32")
    torch.manual_seed(0)
    agent = module.Agent(args, 2)
    for parameter in agent.actor.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # neither all alike nor all in a corner
    before = torch.get_rng_state()
    results = [module.evaluate(agent, Pool(), args) for _ in range(2)]
    assert results[0][0] == results[1][0] and torch.equal(torch.get_rng_state(), before) and agent.training
    assert len(results[0][1]) == 4 and results[0][1][0].shape == (3, 64, 64)
    args.eval_state_mode = True
    assert module.evaluate(agent, Pool(), args)[0] != results[0][0]


@EACH
@pytest.mark.parametrize("accelerate", ["eager"])
def test_an_update_leaves_every_parameter_where_it_was(algo, accelerate, own_set):
    """What a captured graph relies on."""
    module = ALGOS[algo]
    args = module.Args(cnn_depth=2, stoch=4, deter=8, hidden=10, units=12, ensemble=2, device="cpu", precision="fp32",
                       batch_size=2, window=5)  # fmt: skip
    agent = module.Agent(args, 2)
    buffer = common.SequenceBuffer(common.Dataset(own_set), 2, 5)
    places = [parameter.data_ptr() for parameter in agent.parameters()]
    agent.update_model(buffer.sample())
    state = agent.optimizers["model"].state_dict()
    agent.optimizers["model"].load_state_dict(state)
    assert agent.optimizers["model"].state["count"] == 1
    assert places == [parameter.data_ptr() for parameter in agent.parameters()]


def test_evaluate_may_ask_for_the_most_likely_state(train, capsys, monkeypatch):
    assert train("offline_dv2") is None
    asked = []
    monkeypatch.setattr(offline_dv2, "evaluation_pool", lambda *_: Pool())
    monkeypatch.setattr(offline_dv2, "save_video", lambda *_: None)
    original = offline_dv2.evaluate
    monkeypatch.setattr(offline_dv2, "evaluate", lambda *a: asked.append(a[2].eval_state_mode) or original(*a))
    for flags in ([], ["--eval-state-mode"]):
        words = ["--evaluate", train.folder("offline_dv2"), "--device", "cpu", *flags]
        assert run_main(offline_dv2, words, methods=()) is None
    assert asked == [False, True]


def small_agent(algo, **flags):
    torch.manual_seed(0)
    flags = {"batch_size": 2, "window": 7, "device": "cpu", "precision": "fp32"} | flags
    module = ALGOS[algo]
    return module.Agent(module.Args(cnn_depth=2, stoch=4, deter=8, hidden=10, units=12, ensemble=3, **flags), 2).eval()


def random_windows(seed=0) -> common.Sequences:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (2, 7, 3, 64, 64), dtype=torch.uint8, generator=generator)
    action, reward = torch.rand(2, 7, 2, generator=generator) * 2 - 1, torch.rand(2, 7, generator=generator)
    is_first = torch.zeros(2, 7, dtype=torch.bool)
    is_first[:, 0] = True
    return common.Sequences(image, action, reward, torch.ones(2, 7), is_first, torch.arange(14).view(2, 7))


PHASES = pytest.mark.parametrize("phase", ["model", "agent"])


def some_updates(algo, phase, count=3, **flags):
    """Metrics of so many updates, and the weights after them; flags device, accelerate, precision."""
    agent = small_agent(algo, horizon=2, **flags).to(flags.get("device", "cpu"))
    device, windows = agent.args.device, random_windows()
    batch = (common.Sequences(*(part.to(device) for part in windows)),)
    if phase == "agent":
        generator, feat_dim = torch.Generator().manual_seed(0), agent.model.feat_dim
        if algo == "offline_dv2":
            batch += (torch.randn(2, 7, agent.model.encoder.embed_dim, generator=generator).to(device),)
        else:
            shapes = (8, feat_dim), (8, 2), (8,), (8,), (8,), (8, feat_dim)
            parts = (torch.rand(shape, generator=generator).to(device) for shape in shapes)
            batch = (lompo.Transitions(*parts),)
    update = common.accelerate(agent, f"update_{phase}", agent.args)
    torch.manual_seed(1)
    metrics = [{name: value.item() for name, value in update(*batch).items()} for _ in range(count)]
    return metrics, {name: parameter.detach().cpu() for name, parameter in agent.named_parameters()}


def assert_close_updates(one, two, tolerance):
    for ours, theirs in zip(one[0], two[0]):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-5)
    for name, value in one[1].items():
        torch.testing.assert_close(value, two[1][name], rtol=tolerance, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs g++")
@EACH
@PHASES
def test_compiled_losses_equal_eager_ones(algo, phase):
    from torch._inductor import config

    with config.patch(fallback_random=True):  # eager's random numbers, else there is nothing to compare
        compiled = some_updates(algo, phase, accelerate="compile")
    assert_close_updates(compiled, some_updates(algo, phase), 1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@EACH
@PHASES
def test_a_cuda_graph_goes_on_drawing_and_learning(algo, phase):
    """Three warm-ups, the capture with its replay, two replays; a replay draws other numbers than eager code."""
    graphed = some_updates(algo, phase, 6, device="cuda", accelerate="graph")
    eager = some_updates(algo, phase, 6, device="cuda")
    assert_close_updates((graphed[0][:3], {}), eager, 1e-3)
    loss = {"model": "model/loss", "agent": "actor/loss"}[phase]
    values = [metrics[loss] for metrics in graphed[0]]
    assert len(set(values)) == 6 and np.isfinite(values).all()


@pytest.mark.parametrize("algo, phase", [("offline_dv2", "model"), ("offline_dv2", "agent"), ("lompo", "model")])
def test_gradients_in_bf16_are_near_those_in_fp32(algo, phase, monkeypatch):
    """Of every part of the networks; means and modes instead of samples, which would be others."""
    found = []
    for precision in ("fp32", "bf16"):
        agent, seen = small_agent(algo, precision=precision, horizon=2), {}
        if algo == "offline_dv2":
            monkeypatch.setattr(
                agent.model.rssm,
                "sample",
                lambda logits, _=False: logits.unflatten(-1, (4, 32)).softmax(-1).flatten(-2),
            )
            monkeypatch.setattr(offline_dv2.TruncatedNormal, "sample", lambda self, gradient: 0.9 * self.loc)
        else:
            monkeypatch.setattr(agent.model.rssm, "sample", lambda normal, mode=False: normal.mean)
        monkeypatch.setattr(agent.model.rssm, "draw_members", lambda count: torch.zeros(count, dtype=torch.int64))

        def record(name, loss, agent=agent, seen=seen):
            loss.backward(inputs=agent.optimizers[name].params)
            part = getattr(agent, name)
            for child, module in part.named_children() if name == "model" else ((name, part),):
                seen[child] = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
            return loss.detach()

        agent.minimize = record
        windows = random_windows()
        if phase == "model":
            agent.update_model(windows)
        else:
            embed = torch.randn(2, 7, agent.model.encoder.embed_dim, generator=torch.Generator().manual_seed(0))
            agent.update_agent(windows, embed)
        found.append(seen)
    for name in found[0]:
        one, two = found[0][name], found[1][name]
        assert one.norm() > 0 and (one - two).norm() < 0.1 * one.norm(), name


@EACH
@torch.no_grad()
def test_acting_is_filtering(algo):
    """act() over an episode gives the states that observe() gives for it, and the actor's own action in them."""
    agent, batch = small_agent(algo, eval_state_mode=True), random_windows()
    states = agent.model.rssm.observe(agent.model.embed(batch.image), batch.action, batch.is_first, mode=True)[0]
    state = None
    for t in range(7):
        action, state = agent.act(batch.image[:, t], batch.action[:, t], state)
        torch.testing.assert_close(state.deter, states.deter[:, t])
        chosen = agent.actor(states.feat[:, t])
        torch.testing.assert_close(action, getattr(chosen, "loc", chosen))


@EACH
@torch.no_grad()
def test_the_open_loop_sees_the_first_images_and_all_actions(algo):
    agent, batch, context = small_agent(algo), random_windows(), 3

    def rolled(changed):
        torch.manual_seed(0)
        return agent.roll(changed, context).deter

    torch.manual_seed(0)
    filtered = agent.filter(common.Sequences(*(part[:, :context] for part in batch))).deter
    usual = rolled(batch)
    assert usual.shape == (2, 7, 8) and torch.equal(usual[:, :context], filtered)
    later, earlier = batch.image.clone(), batch.image.clone()
    later[:, context:] = 0
    earlier[:, context - 1] = 0
    assert torch.equal(rolled(batch._replace(image=later)), usual)
    seen = (rolled(batch._replace(image=earlier)) != usual).any(-1).all(0)
    assert seen.tolist() == 3 * [False] + 4 * [True]  # an image tells of its own row's draw, hence the next row's deter
    action = batch.action.clone()
    action[:, 5] = 0  # it leads to row 5
    assert (rolled(batch._replace(action=action)) != usual).any(-1).all(0).tolist() == 5 * [False] + 2 * [True]


# ---- benchmarks/inspect_world_model.py ----


class Model:
    """feat is the row's number: decodes to a grey image of row / 10 and predicts the reward row + 1 later."""

    rssm = property(lambda self: self)
    decode = staticmethod(lambda feat: (feat / 10)[..., None, None].expand(*feat.shape[:-1], 3, 2, 2))
    reward = staticmethod(lambda feat: feat + 1)
    imagine = staticmethod(lambda state, action: SimpleNamespace(feat=state.feat + action, deter=state.deter))


def test_errors_and_imagined_rewards_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import inspect_world_model as tool

    rows = torch.arange(4.0).view(1, 4, 1)
    agent = SimpleNamespace(model=Model(), filter=lambda batch: SimpleNamespace(feat=rows),
                            roll=lambda batch, context: SimpleNamespace(feat=rows + 1),
                            actor=lambda feat: torch.full_like(feat, 2.0))  # fmt: skip
    image = torch.full((1, 4, 3, 2, 2), 255 // 2, dtype=torch.uint8)
    batch = SimpleNamespace(image=image, reward=torch.tensor([[9.0, 2.0, 5.0, 4.0]]))
    found, grey = tool.errors(agent, batch, context=2), 127 / 255 - 0.5
    by_hand = {"filtered": ([0.1, 0.2, 0.3], [0, -2, 0], [2, 5, 4]), "open_loop": ([0.3, 0.4], [-1, 1], [5, 4])}
    for name, (shown, residuals, real) in by_hand.items():
        assert found[name]["image_rmse_255"] == pytest.approx(
            255 * np.sqrt(np.mean((np.array(shown) - grey) ** 2)), 1e-4
        )
        assert found[name]["reward_rmse"] == pytest.approx(np.sqrt(np.mean(np.square(residuals))))
        assert found[name]["reward_r2"] == pytest.approx(1 - np.mean(np.square(residuals)) / np.var(real))
    state = SimpleNamespace(feat=torch.tensor([[1.0], [5.0]]), deter=torch.zeros(2, 1))
    # from 1: states 3, 5, 7, rewards 4, 6, 8; from 5: states 7, 9, 11
    assert tool.imagined_reward(agent, state, 3).tolist() == [18, 30]


@EACH
def test_films_and_errors_of_a_run(algo, train, own_set, tmp_path):
    assert train(algo) is None
    run, out = train.folder(algo), tmp_path / "films"
    words = [ROOT / "benchmarks" / "inspect_world_model.py", run, "--batch", 4, "--windows", 2, "--context", 2]
    result = run_python(*words, "--episodes", 0, "--out", out)
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["trained_on"] is True and "which the model was trained on" in result.stdout
    for part in ("filtered", "open_loop"):
        assert report["errors"][part].keys() == {"image_rmse_255", "reward_rmse", "reward_r2"}
        assert 0 < report["errors"][part]["image_rmse_255"] < 255
    import imageio.v2 as imageio

    for name in ("reconstruction", "open_loop"):
        with imageio.get_reader(out / f"{name}.mp4") as video:
            assert video.count_frames() == 5 and video.get_data(0).shape == (2 * 3 * 64, 2 * 2 * 64, 3)
    assert imageio.imread(out / "open_loop.png").shape == (3 * 64, 8 * 64, 3)
    other = write_set(tmp_path / "small", size=21)
    for flags, message in (
        ([tmp_path], "there is no config.json"),
        ([run, "--dataset", other], "21 px"),
        ([run, "--context", 5], "--context 5: from 1 to 4"),
        ([run, "--context", 0], "--context 0: from 1 to 4"),
    ):
        result = run_python(words[0], *flags, "--episodes", 0)
        assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.slow
@EACH
def test_runs_and_inspections_with_the_environment(algo, tmp_path):
    flags = ["--task", "walker-walk", "--dataset", "random", "--transitions", 1000, "--data-dir", tmp_path / "data"]
    small = [*SMALL[: SMALL.index("--eval-every")], *OWN[algo], *STEPS, "--eval-every", 10, "--eval-episodes", 1]
    result = run_python(ROOT / "algos" / f"{algo}.py", *flags, *small, "--runs-dir", tmp_path / "runs")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / algo / "walker-walk" / "random-64px-1000" / "seed0"
    assert (run / "evaluation.mp4").exists() and len(rows_of(run, "eval")) == 2
    again = run_python(ROOT / "algos" / f"{algo}.py", "--evaluate", run, "--eval-episodes", 1)
    score = float((run / "eval.csv").read_text().splitlines()[1].split(",")[2])
    assert f"score {score:.2f}, returns [{10 * score:.1f}]" in again.stdout
    result = run_python(
        ROOT / "benchmarks" / "inspect_world_model.py", run, "--batch", 4, "--context", 2, "--episodes", 1
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((run / "inspect" / "report.json").read_text())
    assert report["return"]["real"]["mean"] == pytest.approx(10 * score, rel=1e-4)
    assert report["penalty_random_policy"]["mean"] > 0 and "reward_over_15_steps" in report
    assert "penalty on a random policy's states" in result.stdout
