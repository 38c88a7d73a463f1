"""Environments against dm_control itself, and worker processes against one environment in this process."""

import contextlib
import json
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, FourStepsPool, run_python

from common import Env, EnvPool, UserError, make_env


@contextlib.contextmanager
def worker_pool(*args, **kwargs):
    with contextlib.closing(EnvPool(*args, **kwargs)) as pool:
        yield pool


def actions_of(action_dim: int, steps: int, seed: int = 0) -> np.ndarray:
    """(steps, A) float32, uniform."""
    return np.random.default_rng(seed).uniform(-1, 1, (steps, action_dim)).astype(np.float32)


# ---- pixels ----

# In a process of its own and with every environment kept: dm_control's GL contexts and ours do not mix while
# environments are collected.
AGAINST_DM_CONTROL = """
import os
import numpy as np
import common
os.environ["MUJOCO_GL"] = common.gl_backend()
from dm_control import suite
keep = []
for task, size, camera in (("walker-walk", 84, 0), ("cheetah-run", 64, 0), ("quadruped-walk", 64, 2)):
    ours = common.make_env(task, size, frame_stack=1, render="reference")
    theirs = suite.load(*task.split("-"), task_kwargs={"random": 3})
    keep += [ours, theirs]
    frames, rng = [ours.reset(3)[0]], np.random.default_rng(0)
    theirs.reset()
    expected = [theirs.physics.render(size, size, camera_id=camera)]
    for _ in range(3):
        action, bounds = rng.uniform(-1, 1, ours.spec["action_dim"]).astype(np.float32), theirs.action_spec()
        frames.append(ours.step(action)[0])
        action = np.interp(action, (-1, 1), (0, 1)) * (bounds.maximum - bounds.minimum) + bounds.minimum
        theirs.step(action), theirs.step(action)
        expected.append(theirs.physics.render(size, size, camera_id=camera))
    for frame, wanted in zip(frames, expected):
        assert frame.shape == (3, size, size) and frame.dtype == np.uint8
        assert wanted.std() > 20, "dm_control rendered nothing"
        print("pixels that differ:", int((frame.transpose(1, 2, 0) != wanted).sum()))
"""


def test_reference_quality_is_dm_control_pixel_for_pixel():
    result = run_python("-W", "ignore", "-c", AGAINST_DM_CONTROL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["pixels that differ: 0"] * 12
    assert result.stderr == ""  # nothing is said at exit


@pytest.mark.parametrize("task, mean_bound, share_bound", [("walker-walk", 0.1, 0.003), ("cheetah-run", 0.05, 0.002)])
def test_fast_quality_is_near_reference(task, mean_bound, share_bound):
    frames = {}
    for render in ("reference", "fast"):
        env = make_env(task, frame_stack=1, render=render)
        frames[render] = [env.reset(5)[0]] + [env.step(action)[0] for action in actions_of(6, 6)]
    difference = np.abs(np.stack(frames["fast"]).astype(int) - np.stack(frames["reference"]))
    assert np.stack(frames["reference"]).std() > 20
    assert 0 < difference.mean() < mean_bound
    assert (difference.max(1) > 8).mean() < share_bound  # of pixels, the worst of their three channels


def test_frames_are_stacked_oldest_first_and_reset_repeats_the_first():
    env = make_env("walker-walk", size=24, frame_stack=3)
    obs, _ = env.reset(0)
    assert obs.shape == (9, 24, 24) and obs.dtype == np.uint8
    frames = [obs[6:]] * 3
    assert np.array_equal(obs, np.concatenate(frames))
    for action in actions_of(6, 4):
        obs = env.step(action)[0]
        assert not np.array_equal(obs[6:], frames[-1])  # the newest frame is the last
        frames = [*frames[1:], obs[6:]]
        assert np.array_equal(obs, np.concatenate(frames))
    obs, _ = env.reset(1)
    assert np.array_equal(obs[:3], obs[6:]) and not np.array_equal(obs[6:], frames[-1])


# ---- physics ----


@pytest.mark.parametrize("task", ["walker-walk", "cheetah-run", "humanoid-walk"])
def test_an_episode_is_a_function_of_its_seed_and_dm_controls(task):
    """Whatever was before. An action is repeated twice, rewards are summed."""
    from dm_control import suite

    env, raw = make_env(task, size=None), suite.load(*task.split("-"), task_kwargs={"random": 7})
    actions = actions_of(env.spec["action_dim"], 30)
    env.reset(8)
    for action in actions[:13]:
        env.step(action)
    obs, info = env.reset(7)
    raw_state = raw.reset().observation
    for action in [None, *actions]:
        if action is not None:
            obs, reward, terminal, timeout, info = env.step(action)
            steps = [raw.step(action), raw.step(action)]
            assert reward == steps[0].reward + steps[1].reward and not terminal and not timeout
            raw_state = steps[1].observation
        expected = np.concatenate([np.ravel(part) for part in raw_state.values()]).astype(np.float32)
        assert np.array_equal(obs, expected) and np.array_equal(info["state"], expected)
    assert not np.array_equal(env.reset(8)[0], env.reset(7)[0])


def test_time_runs_out_after_500_steps_and_is_not_terminal():
    env = make_env("cheetah-run", size=None)
    env.reset(0)
    flags = [env.step(action)[2:4] for action in actions_of(6, 500)]
    assert flags[:499] == [(False, False)] * 499 and flags[499] == (False, True)
    assert env.spec == {"action_dim": 6, "action_repeat": 2, "return_per_score": 10, "episode_steps": 500}
    assert isinstance(env.spec["episode_steps"], int)  # MOTO makes room for as many rows


@pytest.mark.parametrize("discount, flags", [(0.0, (True, False)), (1.0, (False, True))])
def test_a_termination_is_terminal_and_not_a_timeout(discount, flags):
    env = make_env("cheetah-run", size=None)
    env.reset(0)
    env.simulator.env.task.get_termination = lambda physics: discount  # dm_control: the discount of a last step
    assert env.step(actions_of(6, 1)[0])[2:4] == flags


def test_unknown_task_lists_the_known_ones():
    for make in (lambda: make_env("walker-fly", size=None), lambda: EnvPool("walker-fly", None, 1)):
        with pytest.raises(UserError, match="--task walker-fly: no such task. There are: .*cheetah-run") as error:
            make()
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such task .meant walker-walk"):
        make_env("walker_walk", size=None)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS renders by itself")
@pytest.mark.parametrize("variables", [{"MUJOCO_EGL_DEVICE_ID": "99"}, {"MUJOCO_GL": "unknown"}])
def test_a_backend_that_does_not_work_is_one_line(monkeypatch, variables):
    """In a worker of a new fork server: a backend is loaded once per process."""
    multiprocessing.forkserver._forkserver._stop()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="cannot render here.*libegl1 libopengl0 libgl1-mesa-dri") as error:
        EnvPool("walker-walk", 16, 1)
    assert "\n" not in str(error.value)
    multiprocessing.forkserver._forkserver._stop()


# ---- worker processes ----


def test_pool_equals_one_environment_with_any_number_of_workers():
    seeds, steps = [11, 12, 13], 3
    actions = np.stack([actions_of(6, steps, seed=i) for i in range(3)], 1)  # (steps, 3, 6)
    expected = []
    for i, seed in enumerate(seeds):
        env = make_env("walker-walk", size=24)
        expected.append([(*env.reset(seed), 0.0)])
        for t in range(steps):
            obs, reward, _, _, info = env.step(actions[t, i])
            expected[i].append((obs, info, reward))
    for workers in (1, 2):
        with worker_pool("walker-walk", 24, 3, workers=workers) as pool:
            assert len(pool.workers) == workers
            obs, reward = pool.reset(seeds), np.zeros(3)
            for t in range(steps + 1):
                if t:
                    obs, reward, terminal = pool.step(actions[t - 1])
                    assert not terminal.any()
                assert obs.shape == (3, 9, 24, 24) and not pool.done.any()
                for i in range(3):
                    assert np.array_equal(obs[i], expected[i][t][0]) and reward[i] == expected[i][t][2]
                    assert np.array_equal(pool.infos[i]["state"], expected[i][t][1]["state"])


def test_finished_episodes_get_no_reward_and_keep_their_obs():
    pool = FourStepsPool("", 8, 2)
    pool.reset([0, 1])
    pool.call(Env.step, [(np.zeros(2),), None])  # the first environment is one step ahead
    found = [pool.step(np.array([[0.5, t == 2], [0.25, t == 4]])) for t in range(5)]
    assert [reward.tolist() for _, reward, _ in found] == [[1.5, 1.25]] * 3 + [[0, 1.25], [0, 0]]
    assert not any(terminal.any() for _, _, terminal in found) and pool.done.all()
    obs = np.stack([obs for obs, _, _ in found])
    moved = (obs[1:] != obs[:-1]).any((2, 3, 4))  # (4, 2)
    assert moved.tolist() == [[True, True]] * 2 + [[False, True], [False, False]]
    assert pool.success.tolist() == [True, False]  # solved at some step, while the episode lasted
    assert pool.summary(np.array([70.0, 30.0])) == {"score": 5.0, "return": [70.0, 30.0]}  # a tenth of the return
    pool.reset([0, 1])
    assert not pool.done.any() and not pool.success.any()
    assert pool.step(np.array([[2.0, 0.0], [0.5, 0.0]]))[2].tolist() == pool.done.tolist() == [True, False]


def processes_of(pool: EnvPool) -> list[multiprocessing.Process]:
    return [process for worker in pool.workers for process in worker._processes.values()]


@pytest.mark.parametrize("moment", ["idle", "busy"])
def test_a_killed_worker_is_named(moment):
    with worker_pool("walker-walk", None, 2, workers=2) as pool:
        pool.reset([0, 1])
        victim = processes_of(pool)[1]
        os.kill(victim.pid, signal.SIGKILL if moment == "idle" else signal.SIGSTOP)
        if moment == "idle":
            victim.join(10)
        else:
            threading.Timer(0.5, os.kill, (victim.pid, signal.SIGKILL)).start()
        with pytest.raises(UserError, match="an environment worker died"):
            pool.step(np.zeros((2, 6)))


def test_workers_leave_signals_to_their_parent():
    """Batch schedulers send SIGTERM to every process of a job: the evaluation that is on ends all the same."""
    with worker_pool("walker-walk", None, 2, workers=2) as pool:
        pool.reset([0, 1])
        server = multiprocessing.forkserver._forkserver._forkserver_pid
        for pid in (server, *(process.pid for process in processes_of(pool))):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
        assert (pool.step(np.zeros((2, 6)))[1] > 0).all()


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_workers_end_with_their_pool():
    """What main() leaves behind would end beside the interpreter, whose traceback then says "Bad file descriptor"."""
    pool = EnvPool("cheetah-run", 16, 2, workers=2)
    threads = [worker._executor_manager_thread for worker in pool.workers]
    assert len(threads) == 2 and all(thread.is_alive() for thread in threads)
    del pool
    assert not any(thread.is_alive() for thread in threads)


def test_workers_end_with_their_parent_and_import_its_common(tmp_path):
    """Though the parent is killed, and the current folder holds another common.py."""
    (tmp_path / "common.py").write_text("raise SystemExit('the wrong one')")
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from common import EnvPool

if __name__ == "__main__":
    pool = EnvPool("cheetah-run", 16, 2, workers=2)
    pool.reset([0, 1])
    print([pid for worker in pool.workers for pid in worker._processes], flush=True)
    time.sleep(100)
""")
    env = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    command = [sys.executable, script]
    with subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE) as parent:
        workers = json.loads(parent.stdout.readline())
        assert len(workers) == 2 and all(map(running, workers))
        parent.kill()
    deadline = time.monotonic() + 20
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, workers))
