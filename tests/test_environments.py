"""Environments against dm_control itself, and worker processes against one environment in this process."""

import contextlib
import ctypes.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, run_python

import common
from common import EnvPool, UserError, make_env


@contextlib.contextmanager
def environment(*args, **kwargs):
    with contextlib.closing(make_env(*args, **kwargs)) as env:
        yield env


@contextlib.contextmanager
def worker_pool(*args, **kwargs):
    with contextlib.closing(EnvPool(*args, **kwargs)) as pool:
        yield pool


def actions_of(env_or_dim, steps: int, seed: int = 0) -> np.ndarray:
    """(steps, A) float32, uniform."""
    action_dim = getattr(env_or_dim, "action_dim", env_or_dim)
    return np.random.default_rng(seed).uniform(-1, 1, (steps, action_dim)).astype(np.float32)


# ---- pixels ----

# In a process of its own and with every environment kept: dm_control's GL contexts and ours do not mix while
# environments are collected.
AGAINST_DM_CONTROL = """
import os
import numpy as np
import common
os.environ["MUJOCO_GL"] = common.choose_gl()
from dm_control import suite
keep = []
for task, size in (("walker-walk", 84), ("cheetah-run", 84), ("cheetah-run", 64)):
    ours = common.make_env(task, size, frame_stack=1, render="reference")
    theirs = suite.load(*task.split("-"), task_kwargs={"random": 3})
    keep += [ours, theirs]
    frames, rng = [ours.reset(3)[0]], np.random.default_rng(0)
    theirs.reset()
    expected = [theirs.physics.render(size, size, camera_id=0)]
    for _ in range(3):
        action = rng.uniform(-1, 1, ours.action_dim)
        frames.append(ours.step(action)[0])
        theirs.step(action), theirs.step(action)
        expected.append(theirs.physics.render(size, size, camera_id=0))
    for frame, wanted in zip(frames, expected):
        assert frame.shape == (3, size, size) and frame.dtype == np.uint8
        assert wanted.std() > 20, "dm_control rendered nothing"
        different = int((frame.transpose(1, 2, 0) != wanted).sum())
        print("pixels that differ:", different)
"""


def test_reference_quality_is_dm_control_pixel_for_pixel():
    result = run_python("-c", AGAINST_DM_CONTROL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["pixels that differ: 0"] * 12


@pytest.mark.parametrize("task, mean_bound, share_bound", [("walker-walk", 0.1, 0.003), ("cheetah-run", 0.05, 0.002)])
def test_fast_quality_is_near_reference(task, mean_bound, share_bound):
    frames = {}
    for render in ("reference", "fast"):
        with environment(task, frame_stack=1, render=render) as env:
            frames[render] = [env.reset(5)[0]] + [env.step(action)[0] for action in actions_of(env, 6)]
    difference = np.abs(np.stack(frames["fast"]).astype(int) - np.stack(frames["reference"]))
    assert np.stack(frames["reference"]).std() > 20
    assert 0 < difference.mean() < mean_bound
    assert (difference.max(1) > 8).mean() < share_bound  # of pixels, the worst of their three channels


def test_frames_are_stacked_oldest_first_and_reset_repeats_the_first():
    with environment("walker-walk", size=24, frame_stack=3) as env:
        obs, _ = env.reset(0)
        assert obs.shape == (9, 24, 24) and obs.dtype == np.uint8
        frames = [obs[6:]] * 3
        assert np.array_equal(obs, np.concatenate(frames))
        for action in actions_of(env, 4):
            obs = env.step(action)[0]
            assert not np.array_equal(obs[6:], frames[-1])  # the newest frame is the last
            frames = [*frames[1:], obs[6:]]
            assert np.array_equal(obs, np.concatenate(frames))
        obs, _ = env.reset(1)
        assert np.array_equal(obs[:3], obs[6:]) and not np.array_equal(obs[6:], frames[-1])


@pytest.mark.filterwarnings("ignore:`in1d`:DeprecationWarning")  # in dm_control
def test_quadruped_is_seen_by_its_third_camera():
    with environment("quadruped-walk", size=16) as env:
        assert env.renderer.camera.fixedcamid == 2
        assert env.reset(0)[0].std() > 5
    with environment("walker-walk", size=16) as env:
        assert env.renderer.camera.fixedcamid == 0


# ---- physics ----


@pytest.mark.parametrize("task", ["walker-walk", "cheetah-run", "humanoid-walk"])
def test_an_episode_is_a_function_of_its_seed(task):
    env, other = make_env(task, size=None, seed=1), make_env(task, size=None, seed=2)
    actions = actions_of(env, 20)

    def episode(env):
        states = [env.reset(7)[0]]
        return np.stack(states + [env.step(action)[0] for action in actions])

    first = episode(env)
    env.reset()
    for action in actions_of(env, 13, seed=1):
        env.step(action)
    assert np.array_equal(episode(env), first) and np.array_equal(episode(other), first)
    assert not np.array_equal(env.reset(8)[0], first[0])
    assert not np.array_equal(env.reset()[0], env.reset()[0])  # without a seed: another episode each time


@pytest.mark.parametrize("task", ["walker-walk", "cheetah-run"])
def test_an_action_is_repeated_twice_and_rewards_are_summed(task):
    from dm_control import suite

    env, raw = make_env(task, size=None), suite.load(*task.split("-"), task_kwargs={"random": 4})
    obs, info = env.reset(4)
    raw_state = raw.reset().observation
    for action in [None, *actions_of(env, 30)]:
        if action is not None:
            obs, reward, terminal, timeout, info = env.step(action)
            steps = [raw.step(action), raw.step(action)]
            assert reward == steps[0].reward + steps[1].reward and not terminal and not timeout
            raw_state = steps[1].observation
        expected = np.concatenate([np.ravel(part) for part in raw_state.values()]).astype(np.float32)
        assert np.array_equal(obs, expected) and np.array_equal(info["state"], expected)


def test_time_runs_out_after_500_steps_and_is_not_terminal():
    env = make_env("cheetah-run", size=None)
    env.reset(0)
    flags = [env.step(action)[2:4] for action in actions_of(env, 500)]
    assert flags[:499] == [(False, False)] * 499 and flags[499] == (False, True)


def test_a_termination_is_terminal_and_not_a_timeout():
    env = make_env("cheetah-run", size=None)
    env.reset(0)
    action = actions_of(env, 1)[0]
    env.env.task.get_termination = lambda physics: 0.0  # dm_control: the discount of a last step
    assert env.step(action)[2:4] == (True, False)
    env.env.task.get_termination = lambda physics: 1.0
    env.reset(0)
    assert env.step(action)[2:4] == (False, True)


@pytest.mark.parametrize("task", ["walker-walk", "cheetah-run"])
def test_a_state_put_back_gives_the_same_future(task):
    env = make_env(task, size=None)
    env.reset(3)
    actions = actions_of(env, 60)
    for action in actions[:20]:
        env.step(action)
    state = env.get_state()
    future = [env.step(action)[:2] for action in actions[20:]]
    env.reset(9)
    env.set_state(state)
    assert np.array_equal(env.get_state(), state)
    again = [env.step(action)[:2] for action in actions[20:]]
    assert [reward for _, reward in again] == [reward for _, reward in future]
    assert all(np.array_equal(obs, other) for (obs, _), (other, _) in zip(again, future))


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(UserError, match="--task walker-fly: no such dm_control task.*cheetah-run.*walker-walk"):
        make_env("walker-fly", size=None)
    with (
        worker_pool("nonsense", None, 1) as pool,
        pytest.raises(UserError, match="--task nonsense: .*humanoid-walk") as error,
    ):
        pool.reset([0])
    assert "\n" not in str(error.value)


# ---- choosing the backend ----


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS renders by itself")
def test_rendering_backend(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "OSMesa")
    assert common.choose_gl() == "osmesa"  # the user's, whatever works
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(common, "egl_works", lambda: True)
    assert common.choose_gl() == "egl"
    monkeypatch.setattr(common, "egl_works", lambda: False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: {"OSMesa": "libOSMesa.so.8"}.get(name))
    assert common.choose_gl() == "osmesa"
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(UserError, match="libegl1 libopengl0 libgl1-mesa-dri.*libosmesa6"):
        common.choose_gl()
    with pytest.raises(UserError, match="libegl1"):
        make_env("walker-walk", size=16)


@pytest.mark.skipif(sys.platform == "darwin", reason="no EGL")
def test_egl_without_a_device_does_not_work(monkeypatch):
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    assert common.egl_works.__wrapped__() is False  # the function beneath its cache


# ---- worker processes ----


def test_pool_equals_one_environment_with_any_number_of_workers():
    seeds, steps = [11, 12, 13], 3
    actions = np.stack([actions_of(6, steps, seed=i) for i in range(3)], 1)  # (steps, 3, 6)
    expected = []
    for i, seed in enumerate(seeds):
        with environment("walker-walk", size=24) as env:
            expected.append([(env.reset(seed)[0], 0.0, env.reset(seed)[1]["state"])])
            for t in range(steps):
                obs, reward, _, _, info = env.step(actions[t, i])
                expected[i].append((obs, reward, info["state"]))
    for workers in (1, 2):
        with worker_pool("walker-walk", 24, 3, workers=workers) as pool:
            assert len(pool.processes) == workers
            obs, reward = pool.reset(seeds), np.zeros(3)
            for t in range(steps + 1):
                if t:
                    obs, reward, terminal = pool.step(actions[t - 1])
                    assert not terminal.any()
                assert obs.shape == (3, 9, 24, 24) and not pool.done.any()
                for i in range(3):
                    assert np.array_equal(obs[i], expected[i][t][0]) and reward[i] == expected[i][t][1]
                    assert np.array_equal(pool.infos[i]["state"], expected[i][t][2])


def test_finished_episodes_get_no_reward_and_keep_their_obs():
    with worker_pool("walker-walk", None, 2, workers=2) as pool:
        pool.reset([0, 1])
        pool.call("step", [(np.zeros(6),), None])  # the first environment is one step ahead
        actions = actions_of(12, 501).reshape(501, 2, 6)
        for t in range(498):
            pool.step(actions[t])
        assert pool.done.tolist() == [False, False]
        last, reward, _ = pool.step(actions[498])
        assert pool.done.tolist() == [True, False] and (reward > 0).all()
        obs, reward, terminal = pool.step(actions[499])
        assert pool.done.tolist() == [True, True] and not terminal.any()
        assert reward[0] == 0 and reward[1] > 0
        assert np.array_equal(obs[0], last[0]) and not np.array_equal(obs[1], last[1])
        final, reward, _ = pool.step(actions[500])
        assert reward.tolist() == [0, 0] and np.array_equal(final, obs)
        pool.reset([0, 1])
        assert pool.done.tolist() == [False, False]


def test_a_workers_exception_is_raised_here_with_its_traceback():
    with worker_pool("walker-walk", None, 2, workers=2) as pool:
        pool.reset([0, 1])
        with pytest.raises(
            RuntimeError, match="(?s)in an environment worker:.*Traceback.*in step.*ValueError.*broadcast"
        ):
            pool.step(np.zeros((2, 5)))  # walker has 6 joints
        assert not any(process.is_alive() for process in pool.processes)


@pytest.mark.parametrize("moment", ["idle", "busy"])
def test_a_killed_worker_is_named(moment):
    with worker_pool("walker-walk", None, 2, workers=2) as pool:
        pool.reset([0, 1])
        victim = pool.processes[1]
        os.kill(victim.pid, signal.SIGKILL if moment == "idle" else signal.SIGSTOP)
        if moment == "idle":
            victim.join(10)
        else:
            pid = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {victim.pid}"])
        with pytest.raises(RuntimeError, match="an environment worker died"):
            pool.step(np.zeros((2, 6)))
        if moment == "busy":
            pid.wait()


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_workers_end_when_their_parent_is_killed():
    script = """
import time
from common import EnvPool
pool = EnvPool("cheetah-run", None, 2, workers=2)
pool.reset([0, 1])
print([process.pid for process in pool.processes], flush=True)
time.sleep(100)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE
    )
    workers = json.loads(parent.stdout.readline())
    assert len(workers) == 2 and all(map(running, workers))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, workers))


def test_workers_do_not_import_the_calling_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
from pathlib import Path
with open(Path({str(tmp_path)!r}) / "imports", "a") as file:
    file.write(__name__ + "\\n")
print("imported", flush=True)
from common import EnvPool
pool = EnvPool("cheetah-run", None, 2, workers=2)  # on purpose without a guard for __main__
print(pool.reset([0, 1]).shape)
pool.close()
""")
    result = run_python(script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["imported", "(2, 17)"]
    assert (tmp_path / "imports").read_text() == "__main__\n"
