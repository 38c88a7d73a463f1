"""manipulation.py: seeds, rewards, success, cameras, and environments side by side."""

import contextlib
import gc
import sys

import mujoco
import numpy as np
import pytest
from metaworld.policies import ENV_POLICY_MAP

from common import EnvPool, UserError, make_env

# One task per suite: steps of an episode, action dimensions, action repeat.
SUITES = {"metaworld-drawer-open": (100, 4, 2), "kitchen-mixed": (280, 9, 1), "adroit-pen": (200, 24, 1)}
EACH = pytest.mark.parametrize("task", SUITES)
TABLE_1 = ["assembly", "coffee-push", "disassemble", "door-open", "drawer-open", "hammer", "plate-slide", "push-back"]
OTHERS = ["kitchen-partial", "adroit-door", *(f"metaworld-{name}" for name in TABLE_1)]  # MOTO's


def roll(env, seed: int, steps: int = 3) -> list:
    """What an episode shows: obs, reward and state at each step."""
    obs, info = env.reset(seed)
    rng, found = np.random.default_rng(0), [(obs, 0.0, info["state"])]
    for _ in range(steps):
        obs, reward, terminal, timeout, info = env.step(rng.uniform(-1, 1, env.spec["action_dim"]))
        assert not terminal and not timeout
        found.append((obs, reward, info["state"]))
    return found


@pytest.mark.parametrize("task", [*SUITES, "walker-walk"])
def test_an_episode_is_a_function_of_its_seed_and_of_no_other_environment(task):
    """Two side by side, one of them dropped: gymnasium's own viewer goes on with one constant frame."""
    one, two = make_env(task, 16, 1), make_env(task, 16, 1)
    expected = roll(one, 7)
    roll(two, 3)
    del one
    gc.collect()
    for (obs, reward, state), (obs2, reward2, state2) in zip(expected, roll(two, 7)):
        np.testing.assert_array_equal(obs, obs2)
        np.testing.assert_array_equal(state, state2)
        assert reward == reward2
    frames = [obs for obs, _, _ in expected]
    assert frames[0].shape == (3, 16, 16) and frames[0].dtype == np.uint8
    assert all(frame.std() > 5 for frame in frames) and (frames[0] != frames[-1]).any()


@pytest.mark.parametrize("task", [*SUITES, *OTHERS])
def test_seeds(task):
    """Meta-World's goals are the last three numbers of its states; hammer's alone has one place."""
    env = make_env(task, None)
    first, other, again = ([state for _, _, state in roll(env, seed, steps=2)] for seed in (7, 8, 7))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != other[0]).any()
    if task.startswith("metaworld"):
        assert (first[0][-3:] != other[0][-3:]).any() == (task != "metaworld-hammer") and first[0][-3:].any()


@EACH
def test_lengths_and_repeats(task):
    env = make_env(task, None)
    steps, actions, repeat = SUITES[task]
    assert env.spec == {"action_dim": actions, "action_repeat": repeat, "return_per_score": 1, "episode_steps": steps}
    env.reset(0)
    ends = [env.step(np.zeros(actions))[2:4] for _ in range(steps)]
    assert ends == [(False, False)] * (steps - 1) + [(False, True)]
    if task.startswith("metaworld"):
        assert env.simulator.env.curr_path_length == 2 * steps


def test_metaworld_pays_1_in_each_step_that_ends_in_success_and_a_pool_counts_it():
    policy = ENV_POLICY_MAP["drawer-open-v3"]()
    with contextlib.closing(EnvPool("metaworld-drawer-open", None, 2, workers=2)) as pool:
        pool.reset([0, 1])
        rewards = []
        while not pool.done.all():
            actions = np.stack([policy.get_action(info["state"].astype(np.float64)) for info in pool.infos])
            actions[1] = 0  # this one does nothing
            rewards.append(pool.step(actions)[1])
            assert rewards[-1][0] == float(pool.infos[0]["success"])
        rewards = np.array(rewards)
        first = rewards[:, 0].argmax()
        assert 30 < first < 60 and (rewards[first:, 0] == 1).all() and len(rewards) == 100  # it goes on after success
        assert not rewards[:, 1].any() and pool.success.tolist() == [True, False]
        returns = rewards.sum(0)
        assert pool.summary(returns) == {"score": returns.mean(), "success": 50.0, "return": returns.tolist()}


def test_the_kitchen_counts_what_is_in_place():
    from gymnasium_robotics.envs.franka_kitchen import kitchen_env

    env = make_env("kitchen-mixed", None)
    env.reset(0)
    _, reward, _, _, info = env.step(np.zeros(9))
    assert reward == 0 and not info["success"]
    for count, name in enumerate(("microwave", "light switch", "slide cabinet", "kettle"), 1):
        indices = kitchen_env.OBS_ELEMENT_INDICES[name]
        env.simulator.data.qpos[indices] = kitchen_env.OBS_ELEMENT_GOALS[name]
        _, reward, _, _, info = env.step(np.zeros(9))
        assert reward == count and info["success"] == (count == 4)  # nothing is taken off when it is done


def test_cameras_and_shadows():
    """corner2 hangs upside down: turned upright, the wooden table fills the lower rows and the wall the upper ones."""
    env, reference = make_env("metaworld-drawer-open", 64, 1), make_env("metaworld-drawer-open", 64, 1, "reference")
    image = env.reset(0)[0].astype(int)
    np.testing.assert_array_equal(image, np.rot90(env.renderer.render(), 2).transpose(2, 0, 1))  # not mirrored
    assert (image != reference.reset(0)[0]).any()
    assert [env.simulator.model.light_castshadow.any() for env in (env, reference)] == [False, True]
    wood = (image[0] - image[2] > 20).mean(1)  # redder than blue, per row
    assert wood[48:].mean() > 0.5 > 0.1 > wood[:8].mean()
    camera = make_env("kitchen-mixed", None).simulator.camera
    assert (camera.distance, camera.azimuth, camera.elevation) == (1.86, 90, -60)
    assert tuple(camera.lookat) == (-0.3, 0.5, 2.0) and camera.type == mujoco.mjtCamera.mjCAMERA_FREE


@pytest.mark.parametrize("known", ["metaworld-assembly", "kitchen-mixed, kitchen-partial", "adroit-pen, adroit-door"])
def test_unknown_tasks(known):
    task = f"{known.partition('-')[0]}-fly"
    with pytest.raises(UserError, match=f"--task {task}: no such task. There are: {known}"):
        make_env(task, None)


@pytest.mark.parametrize("task, module, message", [
    ("metaworld-drawer-open", "metaworld", "packages .*metaworld.*pip install -r requirements-manipulation.txt"),
    ("kitchen-mixed", "manipulation", "of manipulation.*: manipulation.py beside common.py"),
])  # fmt: skip
def test_what_is_not_installed_is_named(monkeypatch, task, module, message):
    for name in [name for name in sys.modules if name.split(".")[0] == module] + [module]:
        monkeypatch.setitem(sys.modules, name, None)  # import raises ModuleNotFoundError
    with pytest.raises(UserError, match=message):
        make_env(task, None)
