"""Whole runs of the two-phase files: killed in either phase and continued, begun from another run's model, refused."""

import json
import math
from pathlib import Path

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

    def started(args, dataset):
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
def test_a_loss_that_is_not_finite_is_named_and_the_checkpoint_kept(algo, train, monkeypatch):
    original, calls = ALGOS[algo].Agent.model_loss, []

    def poisoned(self, batch):
        loss, metrics = original(self, batch)
        calls.append(1)
        return loss, metrics | ({"model/reward_loss": loss.detach() * math.nan} if len(calls) == 4 else {})

    monkeypatch.setattr(ALGOS[algo].Agent, "model_loss", poisoned)
    error = train(algo)
    assert isinstance(error, UserError) and "model/reward_loss is nan at step 4" in str(error)
    assert "keeps checkpoint-" in str(error)


class Pool:
    """Three episodes of four steps; what is seen and rewarded does not depend on much."""

    task, count, summary = "walker-walk", 3, common.EnvPool.summary

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
    agent = module.Agent(args, 2)
    for parameter in agent.actor.parameters():
        torch.nn.init.normal_(parameter)
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


# ---- benchmarks/inspect_world_model.py ----


@EACH
def test_films_and_errors_of_a_run(algo, train, own_set, tmp_path):
    assert train(algo) is None
    run, out = train.folder(algo), tmp_path / "films"
    words = [ROOT / "benchmarks" / "inspect_world_model.py", run, "--batch", 4, "--windows", 2, "--context", 2]
    result = run_python(*words, "--episodes", 0, "--out", out)
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    for part in ("filtered", "open_loop"):
        assert report["errors"][part].keys() == {"image_rmse_255", "reward_rmse", "reward_r2"}
        assert 0 < report["errors"][part]["image_rmse_255"] < 255
    import imageio.v2 as imageio

    for name in ("reconstruction", "open_loop"):
        with imageio.get_reader(out / f"{name}.mp4") as video:
            assert video.count_frames() == 5 and video.get_data(0).shape == (2 * 3 * 64, 2 * 2 * 64, 3)
    assert imageio.imread(out / "open_loop.png").shape == (3 * 64, 8 * 64, 3)
    other = write_set(tmp_path / "small", size=21)
    for flags, message in (([tmp_path], "there is no config.json"), ([run, "--dataset", other], "21 px")):
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
    result = run_python(ROOT / "benchmarks" / "inspect_world_model.py", run, "--batch", 4, "--episodes", 1)
    assert result.returncode == 0, result.stderr
    report = json.loads((run / "inspect" / "report.json").read_text())
    assert report["return"]["real"]["mean"] == pytest.approx(10 * score, rel=1e-4)
    assert report["penalty_random_policy"]["mean"] > 0 and "reward_over_15_steps" in report
    assert "penalty on a random policy's states" in result.stdout
