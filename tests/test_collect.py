"""The collector: the same bytes however it is run, the published recipe, honest errors."""

import itertools
import re
import types
from pathlib import Path

import collect
import collectors
import numpy as np
import pytest
import torch
import train_sac
import tyro
import vd4rl
from collect import Args
from collectors import POLICIES, SACPolicy
from conftest import SHORT, run_python
from published import TABLE_5, standard_transitions
from test_data import digests, load

from common import Dataset, UserError, make_env


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
    monkeypatch.setattr(collectors, "POLICIES", folder)
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
    (sets[0].path / "meta.json").unlink()
    make(tmp_path, "medium", episodes=2, render="reference")  # made again in place: medexp keeps its own frames
    assert list(vd4rl.findings(folder)) == [] and Dataset(folder).hash == dataset.hash


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
    ("--task", "hopper-hop", "--dataset", "medium"): "no medium policy is shipped .*train_sac.py",
    ("--task", "hopper-hop", "--dataset", "medexp"): "no medium policy .*walker-walk medium",
    ("--task", "hopper-hop", "--dataset", "mixed"): "no mixed policy is shipped",
    ("--dataset", "mixed", "--seed", "1"): "--seed 1: mixed is one recorded replay",
    ("--dataset", "mixed", "--transitions", "180"): "--transitions: the recorded replay holds 160",
    ("--dataset", "random", "--transitions", "19"): "--transitions 19: at least one episode of 20",
    ("--dataset", "medexp", "--transitions", "39"): "at least one episode of 20 of each of its 2 parts",
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
    ("--shifted", "130", "--distraction", "low"): "--shifted 130: from 0 to 100",
    ("--shifted", "50"): "--shifted, --redraw and --backgrounds need a --distraction",
    ("--bodies", "--distraction", "low"): "--bodies: not together with a --distraction",
    ("--bodies", "--dataset", "mixed"): "the recorded replay of mixed is of one body",
    ("--bodies", "--dataset", "expert", "--task", "humanoid-walk"): "are of walker-walk and cheetah-run alone",
    ("--distraction", "low", "--task", "humanoid-walk"): "distractions and bodies are of walker-walk and cheetah-run",
    ("--distraction", "low", "--backgrounds", "/"): "--backgrounds /: 0 of 60 folders for training with a .jpg",
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
    killed = sac(tmp_path / "killed", 80)
    assert "resumed at 20 updates" in capsys.readouterr().out
    whole = sac(tmp_path / "whole", 80)
    assert "resumed" not in capsys.readouterr().out
    one, two = (torch.load(folder / "sac.pt", weights_only=True) for folder in (killed, whole))
    assert one["step"] == two["step"] == 60
    assert all(torch.equal(one["agent"][name], two["agent"][name]) for name in two["agent"])
    for name in ("replay/action", "replay/reward", "record/physics", "record/seed", "record/ret"):
        arrays = [np.load(folder / f"{name}.npy") for folder in (killed, whole)]
        np.testing.assert_array_equal(*arrays)
    assert (arrays[0] > 0).all() and len(arrays[0]) == 8
    for name, message in (("medium", "walker-walk holds no actor yet"), ("mixed", "not begin with 5000 episodes")):
        with pytest.raises(UserError, match=f"--export {name}: .*{message}"):
            sac(tmp_path / "whole", 80, export=(name,))


@pytest.mark.parametrize("flags, message", [
    ({"upright": 1}, "--upright and --guided are for humanoids, and together for fewer than --envs"),
    ({"upright": 1, "guided": 1, "task": "humanoid-walk"}, "--upright and --guided are for humanoids, and"),
    ({"upright": -1}, "--upright -1: from 0"), ({"newest": 100}, "--newest 100: from 256"), ({"envs": 0}, "--envs 0"),
    ({"export": ("medium",)}, "--export: .*walker-walk holds no training run"),
    ({"task": "metaworld-drawer-open"}, "--task metaworld-drawer-open: tasks of dm_control are trained here"),
])  # fmt: skip
def test_mistakes_with_sac_are_one_line(tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as error:
        sac(tmp_path, 500, **flags)
    assert "\n" not in str(error.value)
