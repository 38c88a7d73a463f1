"""manipulation.py: seeds, rewards, success, cameras, and environments side by side."""

import contextlib
import sys

import collect
import mujoco
import numpy as np
import pytest
from conftest import ROOT, run_python
from metaworld.policies import ENV_POLICY_MAP

import common
import manipulation
from common import EnvPool, UserError, make_env

TASKS = ("metaworld-drawer-open", "kitchen-mixed", "kitchen-partial", "adroit-pen", "adroit-door")


@contextlib.contextmanager
def environment(*args, **kwargs):
    with contextlib.closing(make_env(*args, **kwargs)) as env:
        yield env


def roll(env, seed: int, steps: int = 3) -> list:
    """What an episode shows: obs, reward and state at each step."""
    obs, info = env.reset(seed)
    rng, found = np.random.default_rng(0), [(obs, 0.0, info["state"])]
    for _ in range(steps):
        obs, reward, terminal, timeout, info = env.step(rng.uniform(-1, 1, env.action_dim))
        assert not terminal and not timeout
        found.append((obs, reward, info["state"]))
    return found


@pytest.mark.parametrize("task", TASKS)
def test_an_episode_is_a_function_of_its_seed(task):
    with environment(task, 16, 1) as env, environment(task, 16, 1) as other:
        expected = roll(env, 7)
        roll(other, 3)
        for (obs, reward, state), (obs2, reward2, state2) in zip(expected, roll(other, 7)):
            np.testing.assert_array_equal(obs, obs2)
            np.testing.assert_array_equal(state, state2)
            assert reward == reward2
        frames = [obs for obs, _, _ in expected]
        assert frames[0].shape == (3, 16, 16) and frames[0].dtype == np.uint8
        assert all(frame.std() > 5 for frame in frames) and (frames[0] != frames[-1]).any()


@pytest.mark.parametrize("task", sorted(collect.MOTO_TABLE_1))
def test_seeds_of_the_papers_ten_tasks(task):
    with environment(task, None) as env:
        first, other, again = ([state for _, _, state in roll(env, seed)] for seed in (7, 8, 7))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != other[0]).any()


@pytest.mark.parametrize("task", ["metaworld-drawer-open", "metaworld-plate-slide"])
def test_goals_vary_with_the_seed(task):
    with environment(task, None) as env:
        goals = {tuple(env.reset(seed)[1]["state"][-3:]) for seed in range(4)}
        assert len(goals) == 4 and all(np.any(np.array(goal) != 0) for goal in goals)


@pytest.mark.parametrize("task", ["metaworld-drawer-open", "kitchen-mixed", "adroit-pen"])
def test_closing_one_environment_leaves_another(task):
    """gymnasium's own viewer goes on with one constant frame."""
    one, two = make_env(task, 16, 1), make_env(task, 16, 1)
    alone = [obs for obs, _, _ in roll(two, 7)]
    one.reset(0)
    one.close()
    frames = [obs for obs, _, _ in roll(two, 7)]
    np.testing.assert_array_equal(frames, alone)
    assert (frames[0] != frames[-1]).any()
    two.close()


def test_metaworld_pays_1_in_each_step_that_ends_in_success():
    policy = ENV_POLICY_MAP["drawer-open-v3"]()
    with environment("metaworld-drawer-open", None) as env:
        (_, info), rewards, over = env.reset(0), [], False
        while not over:
            _, reward, terminal, over, info = env.step(policy.get_action(info["state"].astype(np.float64)))
            assert not terminal and reward == float(info["success"])
            rewards.append(reward)
    assert len(rewards) == 100  # it goes on after success
    first = rewards.index(1.0)
    assert 30 < first < 60 and rewards[first:] == [1.0] * (100 - first)


def test_action_repeat():
    with environment("metaworld-drawer-open", None) as env:
        env.reset(0)
        env.step(np.zeros(4))
        assert env.env.curr_path_length == 2


def test_the_kitchen_counts_what_is_in_place():
    from gymnasium_robotics.envs.franka_kitchen import kitchen_env

    with environment("kitchen-mixed", None) as env:
        env.reset(0)
        _, reward, _, _, info = env.step(np.zeros(9))
        assert reward == 0 and not info["success"]
        for count, name in enumerate(("microwave", "light switch", "slide cabinet", "kettle"), 1):
            env.data.qpos[kitchen_env.OBS_ELEMENT_INDICES[name]] = kitchen_env.OBS_ELEMENT_GOALS[name]
            _, reward, _, _, info = env.step(np.zeros(9))
            assert reward == count and info["success"] == (count == 4)  # nothing is taken off when it is done
        assert env.step(np.zeros(9))[1] == 4


@pytest.mark.parametrize("task, steps", [("metaworld-drawer-open", 100), ("kitchen-mixed", 280), ("adroit-pen", 200)])
def test_episode_lengths(task, steps):
    with environment(task, None) as env:
        assert env.episode_steps == steps
    with environment(task, None, episode_steps=3) as env:
        env.reset(0)
        assert [env.step(np.zeros(env.action_dim))[3] for _ in range(3)] == [False, False, True]


def test_fast_rendering_has_no_shadows_and_reference_has():
    with (
        environment("metaworld-drawer-open", 16, 1) as env,
        environment("metaworld-drawer-open", 16, 1, 0, "reference") as other,
    ):
        assert not env.model.light_castshadow.any() and other.model.light_castshadow.any()
        assert (env.reset(0)[0] != other.reset(0)[0]).any()


def test_the_table_is_below():
    """corner2 hangs upside down: turned upright, the wooden table fills the lower rows and the wall the upper ones."""
    with environment("metaworld-drawer-open", 64, 1) as env:
        image = env.reset(0)[0].astype(int)
        np.testing.assert_array_equal(image, np.rot90(env.renderer.render(), 2, (1, 2)))  # turned, not mirrored
    wood = (image[0] - image[2] > 20).mean(1)  # redder than blue, per row
    assert wood[48:].mean() > 0.5 > 0.1 > wood[:8].mean()


def test_the_kitchens_camera():
    with environment("kitchen-mixed", 16, 1) as env:
        camera = env.renderer.camera
    assert (camera.distance, camera.azimuth, camera.elevation) == (1.86, 90, -60)
    assert tuple(camera.lookat) == (-0.3, 0.5, 2.0) and camera.type == mujoco.mjtCamera.mjCAMERA_FREE


def test_a_pool_counts_successes():
    policy = ENV_POLICY_MAP["drawer-open-v3"]()
    pool = EnvPool("metaworld-drawer-open", None, 2, workers=2, episode_steps=60)
    pool.reset([0, 1])
    returns = np.zeros(2)
    while not pool.done.all():
        actions = np.stack([policy.get_action(info["state"].astype(np.float64)) for info in pool.infos])
        actions[1] = 0  # this one does nothing
        returns += pool.step(actions)[1]
    assert pool.success.tolist() == [True, False]
    assert pool.summary(returns) == {"score": returns.mean(), "success": 50.0, "return": returns.tolist()}
    pool.reset([0, 1])
    assert not pool.success.any()
    pool.close()


def test_dm_control_has_scores_and_no_successes():
    pool = EnvPool("walker-walk", None, 1, episode_steps=2)
    pool.reset([0])
    for _ in range(2):
        pool.step(np.zeros((1, 6)))
    assert pool.done.all() and pool.summary(np.array([70.0])) == {"score": 7.0, "return": [70.0]}
    pool.close()


@pytest.mark.parametrize(
    "task, message",
    [
        ("metaworld-fly", "no such task. There are: assembly"),
        ("kitchen-fly", "There are: kitchen-mixed, kitchen-partial"),
        ("adroit-fly", "There are: adroit-pen, adroit-door"),
    ],
)
def test_unknown_tasks(task, message):
    with pytest.raises(UserError, match=message):
        make_env(task, None)


def test_more_steps_than_metaworld_has():
    with pytest.raises(UserError, match="--episode-steps 251: at most 250"):
        make_env("metaworld-drawer-open", None, episode_steps=251)


@pytest.mark.parametrize(
    "task, module", [("metaworld-drawer-open", "metaworld"), ("kitchen-mixed", "gymnasium_robotics")]
)
def test_without_the_packages(monkeypatch, task, module):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refuse(module), *sys.meta_path])
    with pytest.raises(UserError, match=f"{module}.*pip install -r requirements-manipulation.txt"):
        make_env(task, None)


class Refuse:
    """As if a package were not installed."""

    def __init__(self, name: str):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_the_six_scripts_do_without_the_packages():
    code = """
import sys
for name in ("metaworld", "gymnasium", "gymnasium_robotics", "minari"):
    sys.modules[name] = None  # import raises ModuleNotFoundError
sys.path[:0] = ["algos", "."]
import bc, cql, drq_bc, lompo, moto, offline_dv2
from common import make_env
env = make_env("walker-walk", None)
assert env.reset(0)[0].shape == (24,)
print("fine")
"""
    done = run_python("-c", code)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr


def test_without_the_manipulation_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "manipulation", None)  # import raises ModuleNotFoundError
    with pytest.raises(UserError, match="needs manipulation: .*in a full checkout"):
        make_env("kitchen-mixed", None)


def test_demonstrations(tmp_path):
    """All of them succeed, have 101 rows, and are the same ones whatever the number of workers."""
    flags = ["--task", "metaworld-drawer-open", "--dataset", "demos", "--transitions", 200, "--size", 16]
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        done = run_python(ROOT / "data" / "collect.py", *flags, "--workers", workers, "--data-dir", folder)
        assert done.returncode == 0, done.stderr
        assert "MOTO's Table 1" in done.stdout and "48.0" in done.stdout
    sets = [
        common.Dataset(folder / "made/metaworld-drawer-open/demos-16px-200") for folder in sorted(tmp_path.iterdir())
    ]
    assert sets[0].hash == sets[1].hash and sets[0].num_transitions == 200
    part = sets[0].parts[0]
    assert part.lengths.tolist() == [101, 101] and (common.episode_returns(part) > 40).all()
    assert set(np.unique(part.reward)) == {0.0, 1.0}
    assert manipulation.EPISODE_STEPS["metaworld"] == 100
    recipe = part.meta["recipe"]
    assert recipe["camera"] == {"corner2": [0.75, 0.075, 0.7], "rotated": 180} and recipe["shadows"] is False


def test_demonstrations_with_noise(tmp_path):
    """A set of its own, which says so; its episodes succeed, too, and are the same ones for any number of workers."""
    flags = ["--task", "metaworld-drawer-open", "--dataset", "demos", "--transitions", 200, "--size", 16]
    flags += ["--action-noise", 0.3]
    for workers in (1, 2):
        done = run_python(ROOT / "data/collect.py", *flags, "--workers", workers, "--data-dir", tmp_path / str(workers))
        assert done.returncode == 0, done.stderr
    name = "made/metaworld-drawer-open/demos-noise0.3-16px-200"
    one, two = (common.Dataset(tmp_path / workers / name) for workers in "12")
    assert one.hash == two.hash and one.parts[0].meta["recipe"]["action_noise"] == 0.3
    assert (common.episode_returns(one.parts[0]) > 0).all()
    done = run_python(ROOT / "data/collect.py", "--task", "walker-walk", "--dataset", "random", "--action-noise", 0.3)
    assert done.returncode == 1 and "--action-noise 0.3: 0 or more, and of --dataset demos alone" in done.stderr


def test_demonstrations_of_what_has_no_scripted_policy(tmp_path):
    done = run_python(
        ROOT / "data" / "collect.py", "--task", "walker-walk", "--dataset", "demos", "--data-dir", tmp_path
    )
    assert done.returncode == 1 and "there are scripted policies for metaworld-<task>" in done.stderr
