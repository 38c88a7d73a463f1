"""The collector: the same bytes however it is run, the published recipe, honest errors."""

import itertools
import re
import types
from pathlib import Path

import collect
import numpy as np
import pytest
import torch
import train_sac
import tyro
import vd4rl
from collect import POLICIES, Args, SACPolicy
from conftest import run_python
from published import TABLE_5
from store import return_statistics, standard_transitions, take_lock
from test_data import digests, load

from common import Dataset, UserError, make_env

SHORT = 20  # steps of an episode in most tests here


@pytest.fixture
def short(monkeypatch):
    """Episodes of 20 steps, a recorded physics state every 5."""
    for module in (collect, train_sac):
        monkeypatch.setattr(module, "EPISODE", SHORT)
        monkeypatch.setattr(module, "STATE_EVERY", 5)


def make(data_dir, dataset="random", episodes=2, size=16, **flags) -> Path:
    """Runs the collector in this process and returns the set's folder."""
    transitions = episodes * collect.EPISODE
    collect.main(Args(dataset=dataset, size=size, transitions=transitions, data_dir=str(data_dir), **flags))
    return data_dir / "made" / flags.get("task", "walker-walk") / f"{dataset}-{size}px-{transitions}"


# ---- the same bytes ----


def test_bytes_do_not_depend_on_workers_or_on_how_many_follow(short, tmp_path):
    one = make(tmp_path / "one", episodes=5, workers=1)
    two = make(tmp_path / "two", episodes=5, workers=2)  # the last round has one episode for two workers
    assert digests(one) == digests(two)
    rows, fewer = load(one), load(make(tmp_path / "fewer", episodes=2, workers=2))
    assert all(np.array_equal(fewer[name], rows[name][: 2 * (SHORT + 1)]) for name in ("image", "action", "reward"))
    seen = rows["action"].reshape(5, SHORT + 1, 6)[:, 1:]
    assert len(np.unique(seen)) == seen.size  # no two episodes share their actions


def test_an_interrupted_collector_continues_to_the_same_bytes(short, tmp_path, monkeypatch, capsys):
    wanted, original = make(tmp_path / "wanted", episodes=5, workers=2), collect.store.DatasetWriter.add

    def add(writer, *episode):
        if writer.episodes == 3:
            raise KeyboardInterrupt
        original(writer, *episode)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collect.store.DatasetWriter, "add", add)
        make(tmp_path / "killed", episodes=5, workers=2)
    assert not list(tmp_path.glob("killed/**/meta.json"))
    folder = make(tmp_path / "killed", episodes=5, workers=1)
    assert "continuing after 3 episodes" in capsys.readouterr().out and digests(folder) == digests(wanted)


def test_sizes_hold_the_same_actions_and_rewards(short, tmp_path):
    small, large = (load(make(tmp_path, size=size)) for size in (64, 84))
    for name in ("action", "reward", "discount", "episode"):
        assert small[name].tobytes() == large[name].tobytes()
    assert small["image"].shape == (42, 3, 64, 64) and large["image"].shape == (42, 3, 84, 84)
    assert small["reward"].sum() > 0
    means = [rows["image"].mean((2, 3)) for rows in (small, large)]  # the same scene, at two resolutions
    assert np.abs(means[0] - means[1]).max() < 5


def test_a_finished_set_is_not_made_again(short, tmp_path, monkeypatch, capsys):
    folder = make(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    monkeypatch.setattr(collect, "EnvPool", None)  # it could not be called
    assert make(tmp_path) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("      made")]
    assert len(rows) == 2 and rows[0] == rows[1]


# ---- what is in a set ----


def test_stats_only_gives_the_returns_of_the_rendered_set(tiny_set, tmp_path):
    args = Args(dataset="random", transitions=1000, data_dir=str(tmp_path), stats_only=True)
    returns = collect.collect(args, "random", 1000, tmp_path / "nothing")
    np.testing.assert_allclose(returns, load(tiny_set)["reward"].reshape(2, 501).sum(1), rtol=1e-5)
    assert list(tmp_path.iterdir()) == []
    wanted = {"mean": returns.mean(), "std": returns.std(), "min": returns.min(), "max": returns.max()}
    wanted |= {"p25": np.quantile(returns, 0.25), "median": np.median(returns), "p75": np.quantile(returns, 0.75)}
    assert return_statistics(returns) == {name: round(value, 2) for name, value in wanted.items()}


# ---- policies ----

SHIPPED = sorted((path.parent.name, path.stem) for path in POLICIES.glob("*/*.npz"))


@pytest.mark.parametrize("task", sorted({task for task, _ in SHIPPED}))
def test_the_shipped_replays_are_near_the_published_statistics(task):
    with np.load(POLICIES / task / "mixed.npz") as arrays:
        returns, actions, physics = arrays["ret"], arrays["action"], arrays["physics"]
    assert len(returns) == len(actions) == len(physics) == standard_transitions(task, "mixed") // 500
    mean, _, _, _, median, *_ = TABLE_5[task, "mixed"]
    assert returns.mean() == pytest.approx(mean, rel=0.2) and np.median(returns) == pytest.approx(median, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("task, name", [pair for pair in SHIPPED if pair[1] != "mixed"])
def test_the_shipped_policies_are_near_the_published_mean(task, name, tmp_path):
    """Within 5 % over a whole set (data/README.md); here eight episodes, so three standard errors more."""
    returns = collect.collect(Args(task=task, dataset=name, stats_only=True), name, 8 * 500, tmp_path)
    assert abs(returns.mean() / TABLE_5[task, name][0] - 1) < 0.05 + 3 * returns.std() / 8**0.5 / returns.mean()


@pytest.fixture
def policies(tmp_path, monkeypatch) -> Path:
    """A folder of actors for walker-walk (24 state entries, 6 joints), in place of the shipped ones."""
    folder = tmp_path / "policies"
    (folder / "walker-walk").mkdir(parents=True)
    for seed, name in enumerate(("medium", "expert")):
        torch.manual_seed(seed)
        train_sac.SAC(24, 6, lr=1e-3, tau=0.005).save_actor(folder / "walker-walk" / f"{name}.npz")
    monkeypatch.setattr(collect, "POLICIES", folder)
    return folder


def test_the_actor_in_numpy_is_the_trained_one(tmp_path):
    torch.manual_seed(0)
    agent = train_sac.SAC(5, 3, lr=1e-3, tau=0.005)
    agent.scale.copy_(torch.tensor([1.0, 2, 3, 4, 5]))
    agent.save_actor(tmp_path / "actor.npz")
    policy = SACPolicy(tmp_path / "actor.npz")
    states = np.random.default_rng(0).normal(0, 5, (4, 5)).astype(np.float32)
    for noise in (np.zeros(3, np.float32), np.array([1, -0.5, 2], np.float32)):
        rng = types.SimpleNamespace(standard_normal=lambda size, dtype, noise=noise: noise)
        with torch.no_grad():
            mean, log_std = agent.actor(torch.from_numpy(states) / agent.scale).chunk(2, -1)
            std = torch.exp(-5 + 3.5 * (1 + torch.tanh(log_std)))
            expected = torch.tanh(mean + std * torch.from_numpy(noise))
        actions = np.stack([policy.act(state, rng) for state in states])
        np.testing.assert_allclose(actions, expected, atol=1 / 65534 + 1e-6)  # rounded to the grid
        assert actions.dtype == np.float32 and np.array_equal(actions, np.float32(np.rint(actions * 32767) / 32767))


def test_medexp_joins_two_sets_and_copies_no_frame(short, policies, tmp_path):
    dataset = Dataset(folder := make(tmp_path, "medexp", episodes=4))
    sets = [Dataset(folder.parent / f"{name}-16px-40") for name in ("medium", "expert")]
    assert (dataset.num_transitions, dataset.num_episodes, dataset.task) == (80, 4, "walker-walk")
    for i, part in enumerate(sets):
        assert (folder / f"image-{i}.npy").samefile(part.path / "image.npy")
    for name in ("action", "reward", "discount", "lengths"):
        assert np.array_equal(getattr(dataset, name), np.concatenate([getattr(part, name) for part in sets]))
    assert dataset.first_rows.tolist() == [0, 21, 42, 63] and not np.array_equal(sets[0].action, sets[1].action)
    assert dataset.meta["episode_returns"] == sets[0].meta["episode_returns"] + sets[1].meta["episode_returns"]
    assert list(vd4rl.findings(folder)) == []


@pytest.mark.parametrize("name", ["random", "medium"])
def test_a_set_holds_what_its_policy_leads_to(short, policies, tmp_path, name):
    """Row t + 1 holds what action t + 1 led to, in an environment made here."""
    rows, env = load(make(tmp_path, name, episodes=2, workers=2)), make_env("walker-walk", size=16, frame_stack=1)
    policy = collect.UniformPolicy(6) if name == "random" else SACPolicy(policies / "walker-walk" / "medium.npz")
    for first in (0, SHORT + 1):
        rng = collect.rng_of(name, 0, first // SHORT)
        obs, info = env.reset(rng.integers(2**31))
        assert np.array_equal(obs, rows["image"][first])
        for t in range(first + 1, first + SHORT + 1):
            action = policy.act(info["state"], rng)
            obs, reward, _, _, info = env.step(action)
            assert np.array_equal(action, rows["action"][t]) and np.float32(reward) == rows["reward"][t]
            assert np.array_equal(obs, rows["image"][t])


@pytest.fixture
def recorded(policies) -> dict[str, np.ndarray]:
    """mixed.npz with eight episodes of 20 steps, as train_sac.py records them. Returns its arrays."""
    env, rng = make_env("walker-walk", size=None), np.random.default_rng(0)
    seeds, actions = np.arange(100, 108), rng.integers(-32767, 32768, (8, SHORT, 6)).astype(np.int16)
    physics, rewards = [], np.empty((8, SHORT))
    for episode, t in np.ndindex(8, SHORT):
        if t == 0:
            env.reset(int(seeds[episode]))
        if t % 5 == 0:
            physics.append(collect.get_state(env))
        rewards[episode, t] = env.step(actions[episode, t] / np.float32(32767))[1]
    arrays = {"seed": seeds, "action": actions, "physics": np.reshape(physics, (8, 4, -1)), "ret": rewards.sum(1)}
    np.savez(policies / "walker-walk" / "mixed.npz", **arrays)
    return arrays | {"reward": rewards}


@pytest.mark.parametrize("episodes, chosen, off, says", [
    (8, range(8), 0, "as recorded; largest difference 0.00, above 0.1 in 0 episodes"),
    (3, [1, 4, 6], 0.25, r"DIFFER from the record .*; largest difference 0.25, above 0.1 in 3 episodes"),
])  # fmt: skip
def test_mixed_takes_evenly_spaced_episodes_and_replays_them(short, recorded, policies, tmp_path, capsys, episodes,
                                                             chosen, off, says):  # fmt: skip
    np.savez(policies / "walker-walk" / "mixed.npz", **recorded | {"ret": recorded["ret"] + off})
    rows, chosen = load(make(tmp_path, "mixed", episodes=episodes, workers=2)), list(chosen)
    actions = rows["action"].reshape(episodes, SHORT + 1, 6)[:, 1:]
    assert np.array_equal(actions, recorded["action"][chosen].astype(np.float32) / np.float32(32767))
    rewards = rows["reward"].reshape(episodes, SHORT + 1)[:, 1:]
    assert np.array_equal(rewards, recorded["reward"][chosen].astype(np.float32))
    assert re.search(f"re-simulated returns {says}", capsys.readouterr().out)


def test_mixed_restores_the_recorded_physics(short, recorded, policies, tmp_path):
    """A state that differs from where the actions lead is put back every STATE_EVERY steps."""
    recorded["physics"][:, 2] = recorded["physics"][:, 1]  # before step 10: back to before step 5
    recorded["action"][:, 10:15] = recorded["action"][:, 5:10]
    np.savez(policies / "walker-walk" / "mixed.npz", **recorded)
    rewards = load(make(tmp_path, "mixed", episodes=8))["reward"].reshape(8, SHORT + 1)[:, 1:]
    assert np.array_equal(rewards[:, 10:15], rewards[:, 5:10])


# ---- errors ----

IMPOSSIBLE = {  # flags -> what the one line says
    ("--task", "hopper-hop", "--dataset", "medium"): "no medium policy of this task is shipped .*train_sac.py",
    ("--task", "hopper-hop", "--dataset", "medexp"): "no medium policy of .*walker-walk medium",
    ("--task", "hopper-hop", "--dataset", "mixed"): "no mixed policy of this task is shipped",
    ("--dataset", "mixed", "--seed", "1"): "--seed 1: mixed is one recorded replay",
    ("--dataset", "mixed", "--transitions", "180"): "--transitions: the recorded replay holds 160",
    ("--dataset", "random", "--transitions", "19"): "--transitions 19: at least one episode of 20",
    ("--dataset", "medexp", "--transitions", "39"): "--transitions 39: at least one episode of 20 of each part",
    ("--task", "kitchen-mixed", "--dataset", "mixed", "--size", "64"):
        "python data/minari_kitchen.py --dataset mixed --size 64 --data-dir",
    ("--task", "kitchen-mixed", "--dataset", "partial"): "kitchen-mixed mixed and kitchen-partial partial",
    ("--task", "kitchen-partial", "--dataset", "partial", "--seed", "1"): "whole and without a seed",
    ("--task", "adroit-pen", "--dataset", "random"): "no such set is made; record one",
    ("--dataset", "partial"): "no such set is made",
    ("--dataset", "demos"): "scripted policies for metaworld-<task> alone",
    ("--dataset", "random", "--action-noise", "0.1"): "--action-noise 0.1: of --dataset demos alone",
    ("--dataset", "random", "--action-noise", "-1"): "--action-noise -1.0: from 0",
    ("--dataset", "random", "--seed", "-1"): "--seed -1: from 0 to",
    ("--dataset", "random", "--workers", "-2"): "--workers -2: from 1 to",
    ("--dataset", "random", "--size", "0"): "--size 0: from 1 to",
    ("--dataset", "random", "--task", "walker-fly"): "--task walker-fly: no such task. There are: acrobot",
    ("--dataset", "random", "--task", "lqr-lqr_2_1", "--size", "9999999"): "needs .* GB, the disk has .* GB free",
}  # fmt: skip


@pytest.mark.parametrize("flags", IMPOSSIBLE, ids=" ".join)
def test_what_cannot_be_made_is_one_line(short, recorded, tmp_path, flags):
    with pytest.raises(UserError, match=IMPOSSIBLE[flags]) as error:
        collect.main(tyro.cli(Args, args=[*flags, "--data-dir", str(tmp_path / "sets")]))
    assert "\n" not in str(error.value) and not list(tmp_path.glob("sets/**/*.npy"))


def test_an_error_ends_the_command_with_one_line(tmp_path):
    (tmp_path / "file").touch()
    flags = ["--dataset", "random", "--transitions", 500, "--data-dir", tmp_path / "file"]
    result = run_python("data/collect.py", *flags)
    assert result.returncode == 1 and result.stderr == f"error: {tmp_path}/file/made/walker-walk: Not a directory\n"


# ---- train_sac.py ----


def sac(folder: Path, steps: int, task="walker-walk", **flags) -> Path:
    """Trains in this process. Returns the run's folder."""
    train_sac.main(train_sac.Args(**{"task": task, "envs": 2, "steps": steps, "runs_dir": folder} | flags))
    return folder / task


def test_sac_killed_between_two_checkpoints_ends_as_if_never_killed(short, tmp_path, monkeypatch, capsys):
    """Everything is compared: networks, replay and what becomes the mixed set."""
    update, calls = train_sac.SAC.update, itertools.count()

    def update_or_die(agent, *batch):
        if next(calls) == 30:  # in the third of four rounds, of which the first only collects
            raise KeyboardInterrupt
        update(agent, *batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_sac.SAC, "update", update_or_die)
        sac(tmp_path / "killed", 80)
    held = take_lock(tmp_path / "killed" / "walker-walk" / ".lock", wait=False)
    with pytest.raises(UserError, match="walker-walk is in use by another process"):
        sac(tmp_path / "killed", 80)
    held.release()
    killed = sac(tmp_path / "killed", 80)
    assert "resumed at 20 updates" in capsys.readouterr().out
    whole = sac(tmp_path / "whole", 80)
    assert "resumed" not in capsys.readouterr().out
    one, two = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (killed, whole))
    assert one["step"] == two["step"] == 60
    assert all(torch.equal(one["agent"][name], two["agent"][name]) for name in two["agent"])
    for name in ("replay/action", "replay/reward", "record/physics", "record/seed", "record/ret"):
        arrays = [np.load(folder / f"{name}.npy") for folder in (killed, whole)]
        np.testing.assert_array_equal(*arrays)
    assert (arrays[0] > 0).all() and len(arrays[0]) == 8
    with pytest.raises(UserError, match="holds a run of --seed 0"):
        sac(tmp_path / "killed", 80, seed=1)
    sac(tmp_path / "whole", 100, envs=3)  # another number of environments may go on
    printed = capsys.readouterr().out
    assert "resumed at 60 updates, 8 episodes" in printed and "80 updates       220 transitions" in printed
    assert np.load(whole / "record/updates.npy").tolist() == [0, 0, 20, 20, 40, 40, 60, 60, 80, 80, 80]
    replay = np.load(whole / "replay/reward.npy")
    assert len(replay) == 220 and (replay[160:] > 0).mean() > 0.5


def test_a_humanoid_is_put_on_its_feet():
    env, rng = make_env("humanoid-walk", size=None), np.random.default_rng(0)
    env.reset(0)
    states = [train_sac.stand(env, rng) for _ in range(20)]
    assert len({state.tobytes() for state in states}) == 20 and states[0].dtype == np.float32
    physics = env.simulator.env.physics
    assert physics.head_height() == pytest.approx(1.49, abs=0.02) and physics.torso_upright() > 0.98
    forwards, velocity = physics.named.data.xmat["torso", ["xx", "yx"]], physics.center_of_mass_velocity()[:2]
    assert forwards @ velocity == pytest.approx(np.linalg.norm(velocity)) and 0 < forwards @ velocity < 1


@pytest.mark.parametrize("flags, message", [
    ({"upright": 1}, "--upright and --guided are for humanoids, and together for fewer than --envs"),
    ({"upright": 1, "guided": 1, "task": "humanoid-walk"}, "--upright and --guided are for humanoids, and"),
    ({"upright": -1}, "--upright -1: from 0"), ({"newest": 100}, "--newest 100: from 256"), ({"envs": 0}, "--envs 0"),
    ({"export": ("medium",)}, "--export: .*walker-walk holds no training run"),
])  # fmt: skip
def test_mistakes_with_sac_are_one_line(tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as error:
        sac(tmp_path, 500, **flags)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_newest_transitions_are_what_is_learned_from(short, tmp_path):
    """More of them than there are is all of them; 640 are collected."""
    weights = []
    for newest in (None, 10**9, 256):
        folder = sac(tmp_path / str(newest), 40, envs=16, newest=newest)
        weights.append(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]["actor.0.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.slow
def test_humanoids_that_are_helped(tmp_path, capsys):
    """The first environment's heads stay up, for it starts again when it falls; the second lies in the round of uniform
    actions and is got up in the next; the third goes on lying. Returns of the first two do not count as the task's."""
    folder = sac(tmp_path, 1000, "humanoid-walk", envs=3, upright=1, guided=1)
    printed = capsys.readouterr().out
    state, after = (np.load(folder / f"replay/{name}.npy").reshape(1000, 3, -1) for name in ("state", "next_state"))
    heads, fallen = state[..., 21], after[..., 21] < 1  # their column, behind the joint angles
    assert heads[:, 0].min() >= 1 and (heads[50:500, 1:] < 1).all() and (heads[550:, 2] < 1).all()
    assert (heads[550:, 1] > 1.2).mean() > 0.05
    restarts, within = (state[1:] != after[:-1]).any(-1), np.arange(999) != 499  # a round's last row
    np.testing.assert_array_equal(restarts[within, 0], fallen[:-1][within, 0])
    assert 40 < restarts[:, 0].sum() < 200 and not restarts[within, 1:].any()
    returns = np.load(folder / "record/ret.npy").reshape(2, 3)
    assert np.isnan(returns[:, :2]).all() and ((returns[:, 2] >= 0) & (returns[:, 2] < 10)).all()
    assert all(f"sampled return {value:6.1f}" in printed for value in returns[:, 2])
    with pytest.raises(UserError, match="are of --upright or --guided"):
        sac(tmp_path, 500, "humanoid-walk", export=("mixed",))


@pytest.mark.parametrize("means, chosen, note", [
    # step: (mean of the sampled actions, of the mean action); the published mean is 439.6 +- 48.4
    ({300: (440, 440), 400: (430, 350), 500: (445, 430)}, 300, ""),
    ({300: (440, 340), 400: (430, 438), 500: (445, 200)}, 400, ""),  # the mean action counts
    ({300: (410, 440), 400: (419, 419), 500: (480, 440)}, 400, ""),  # 300 is nearer, but 7 % off
    ({400: (300, 300), 500: (700, 700)}, 400, ", NONE within 5 % of it"),
])  # fmt: skip
def test_export_takes_the_actor_nearest_to_the_published_set(tmp_path, monkeypatch, capsys, means, chosen, note):
    """From five rounds of two environments with actors 100 to 500, whose rounds scored 100 to 500."""
    out = tmp_path / "runs" / "walker-walk"
    for folder in (out / "record", out / "actors"):
        folder.mkdir(parents=True)
    torch.save({"rounds": 5, "episodes": 10}, out / "checkpoint.pt")
    record = np.repeat([100, 200, 300, 400, 500, 0], 2)  # the last row: not yet made
    np.save(out / "record" / "updates.npy", record)
    np.save(out / "record" / "ret.npy", record + np.tile([-5.0, 5], 6))
    for step in range(100, 700, 100):  # 600: later than the checkpoint
        np.savez(out / "actors" / f"{step:07d}.npz", updates=step)
    monkeypatch.setattr(train_sac, "POLICIES", tmp_path / "policies")
    asked = []

    def returns_of(task, actor, sampled, episodes=50):
        step = int(np.load(actor)["updates"])
        asked.append(step)
        return means[step][0 if sampled else 1] + np.array([-48.4, 48.4])  # the published deviation

    monkeypatch.setattr(train_sac, "returns_of", returns_of)
    sac(tmp_path / "runs", 500, export=("medium",), candidates=len(means))
    assert asked[::2] == list(means)
    assert int(np.load(tmp_path / "policies" / "walker-walk" / "medium.npz")["updates"]) == chosen
    assert f"chose {chosen} updates (published mean 439.6{note})" in capsys.readouterr().out


@pytest.mark.parametrize("sampled", [True, False])
def test_returns_of_an_actor_are_those_of_its_episodes_one_by_one(sampled):
    path, expected = POLICIES / "walker-walk" / "medium.npz", np.zeros(2)
    env, policy = make_env("walker-walk", size=None), SACPolicy(path)
    for i in range(2):
        rng, (_, info) = np.random.default_rng([7, i]) if sampled else None, env.reset(i)
        for _ in range(500):
            _, reward, _, truncated, info = env.step(policy.act(info["state"], rng))
            expected[i] += reward
    assert truncated
    np.testing.assert_allclose(train_sac.returns_of("walker-walk", path, sampled, 2), expected, rtol=1e-6)
