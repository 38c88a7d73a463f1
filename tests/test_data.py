"""The store and the sampler against naive loops, damaged files, killed writers and full disks."""

import argparse
import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import collect
import numpy as np
import pytest
import store
import torch
from conftest import ENVIRONMENT, ROOT, synthetic_episode, write_set
from hypothesis import given, settings
from hypothesis import strategies as st
from store import DatasetWriter

from common import ARRAYS, Dataset, TransitionBuffer, UserError, open_dataset

GAMMA = 0.9


def digests(path: Path) -> dict[str, str]:
    return {name: hashlib.sha256((path / f"{name}.npy").read_bytes()).hexdigest() for name in ARRAYS}


def load(path: Path) -> dict[str, np.ndarray]:
    return {name: np.load(path / f"{name}.npy") for name in ARRAYS}


# ---- sampling: every window against a loop ----


def naive_windows(folders: list[Path], stack: int, nstep: int):
    """obs, action, reward, discount, next_obs of every complete window, by a loop over the arrival rows."""
    for folder in folders:
        rows = load(folder)
        bounds = [*rows["episode"], len(rows["reward"])]
        for first, end in zip(bounds[:-1], bounds[1:]):
            for t in range(first, end - nstep):
                reward, factor = 0.0, 1.0
                for row in range(t + 1, t + 1 + nstep):
                    reward += factor * float(rows["reward"][row])
                    factor *= GAMMA * float(rows["discount"][row])
                stacks = [[rows["image"][max(last - k, first)] for k in range(stack)[::-1]] for last in (t, t + nstep)]
                obs, next_obs = map(np.concatenate, stacks)
                yield obs, rows["action"][t + 1], reward, factor, next_obs


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    nstep=st.integers(1, 4),
    stack=st.integers(1, 4),
    cut=st.integers(0, 5),
    end=st.sampled_from(["timeouts", "terminal", "terminal inside"]),
)
def test_every_window_equals_a_naive_loop(lengths, nstep, stack, cut, end):
    """cut: how many episodes lie in the first of two parts (0: all in one)."""
    with tempfile.TemporaryDirectory() as name:
        folder, cut = Path(name), cut % len(lengths)
        shares = [lengths[:cut], lengths[cut:]] if cut else [lengths]
        parts = [write_set(folder / str(i), share, 3, 2, end == "terminal", i) for i, share in enumerate(shares)]
        if end == "terminal inside":  # an imported set may hold one anywhere
            for part in parts:
                saved("discount", lambda a: np.where(np.arange(len(a)) % 3 == 2, np.float32(0), a))(part)
        if cut:
            collect.join(folder / "both", list(map(Dataset, parts)))
        dataset = Dataset(folder / "both" if cut else parts[0])
        assert dataset.num_transitions == sum(lengths) and dataset.num_episodes == len(lengths)
        expected = list(naive_windows(parts, stack, nstep))
        if not expected:
            with pytest.raises(UserError, match=f"no episode is long enough for --nstep {nstep}"):
                TransitionBuffer(dataset, 4, stack, nstep)
            return
        buffer = TransitionBuffer(dataset, 4, frame_stack=stack, nstep=nstep, gamma=GAMMA)
        count, shape = len(buffer.rows), (len(expected), 3 * stack, 3, 3)
        whole, first, last = (buffer.sample(torch.arange(*rows)) for rows in ((count,), (1,), (count - 1, count)))
        assert whole.obs.shape == whole.next_obs.shape == shape and whole.obs.dtype == torch.uint8
        assert whole.reward.shape == whole.discount.shape == (count, 1) and whole.reward.dtype == torch.float32
        assert whole.action.shape == (count, 2) and whole.action.dtype == torch.float32
        cases = [(whole, i, window) for i, window in enumerate(expected)]
        cases += [(first, 0, expected[0]), (last, 0, expected[-1])]  # batches that lie in one part alone
        for batch, i, (obs, action, reward, discount, next_obs) in cases:
            assert np.array_equal(batch.obs[i], obs) and np.array_equal(batch.next_obs[i], next_obs)
            assert np.array_equal(batch.action[i], action)
            assert batch.reward[i].item() == pytest.approx(reward, rel=1e-6)
            assert batch.discount[i].item() == pytest.approx(discount, rel=1e-6, abs=0)


def test_samples_are_uniform(tmp_path):
    buffer = TransitionBuffer(Dataset(write_set(tmp_path / "set", lengths=(6, 4), size=3)), 1000)
    newest = torch.cat([buffer.sample().obs[:, 6, 0, 0] for _ in range(20)])  # red spells a frame's row
    seen = newest.long().bincount(minlength=12)
    assert seen[[6, 11]].tolist() == [0, 0]  # nothing starts at an episode's last row
    starts = seen[[0, 1, 2, 3, 4, 5, 7, 8, 9, 10]]
    assert starts.sum() == 20_000 and starts.min() > 1800 and starts.max() < 2200  # 2000 +- 42


# ---- writing ----


def two_episodes() -> list[tuple]:
    rng = np.random.default_rng(3)
    return [synthetic_episode(row, length, 8, 2, rng) for row, length in ((0, 6), (7, 4))]


@pytest.fixture
def wanted(tmp_path) -> dict[str, str]:
    """Digests of the set of both episodes."""
    with DatasetWriter(tmp_path / "wanted", 8, 2) as writer:
        for episode in two_episodes():
            writer.add(*episode)
    return digests(tmp_path / "wanted")


def test_round_trip(tmp_path):
    path, episodes = tmp_path / "robot", two_episodes()
    with DatasetWriter(path, size=8, action_dim=2, mujoco="1.2.3") as writer:
        writer.add(*episodes[0])
        writer.add(*episodes[1], terminal=True)
    rows = load(path)
    for name, dtype in zip(ARRAYS, (np.uint8, np.float32, np.float32, np.float32, np.int64)):
        assert rows[name].dtype == dtype
    assert rows["episode"].tolist() == [0, 7]
    for (frames, actions, rewards), first, end in zip(episodes, (0, 7), (7, 12)):
        assert np.array_equal(rows["image"][first:end], frames.transpose(0, 3, 1, 2))
        assert np.array_equal(rows["action"][first:end], [[0, 0], *actions])  # arrival: row 0 holds zeros
        assert np.array_equal(rows["reward"][first:end], np.float32([0, *rewards]))
    assert rows["discount"].tolist() == [1.0] * 11 + [0.0]
    meta = json.loads((path / "meta.json").read_text())
    counts = {"rows": 12, "episodes": 2, "transitions": 10, "task": "own", "source": "own", "name": "robot", "size": 8}
    assert counts.items() <= meta.items() and meta["mujoco"] == "1.2.3" and meta["sha256"] == digests(path)
    returns = [rewards.sum() for _, _, rewards in episodes]
    np.testing.assert_allclose(meta["episode_returns"], returns, atol=2e-3)
    quartiles = [meta["returns"][name] for name in ("min", "p25", "median", "p75", "max")]
    np.testing.assert_allclose(quartiles, np.quantile(returns, [0, 0.25, 0.5, 0.75, 1]), atol=0.01)
    assert {file.name for file in path.iterdir()} == {*(f"{name}.npy" for name in ARRAYS), "meta.json", ".lock"}
    dataset = Dataset(path)
    assert (dataset.num_transitions, dataset.num_episodes, dataset.action_dim, dataset.size) == (10, 2, 2, 8)
    assert dataset.mean_return == pytest.approx(np.mean(returns), abs=1e-5)


BAD = {  # name -> (change of frames, actions, rewards[, terminal]; what the error says)
    "frames missing": (lambda f, a, r: (f[:-1], a, r), r"frames \(6, 8, 8, 3\), expected \(7, 8, 8, 3\)"),
    "frames of two sizes": (lambda f, a, r: ([*f[:-1], f[0, :4]], a, r), "frames, .* are no array of numbers"),
    "float frames": (lambda f, a, r: (f / np.float32(255), a, r), "frames are float32, expected uint8"),
    "action size": (lambda f, a, r: (f, np.hstack([a, a]), r), r"actions \(6, 4\), expected \(6, 2\)"),
    "action range": (lambda f, a, r: (f, np.vstack([a[1:], [0, 1.01]]), r), r"actions must lie in \[-1, 1\]"),
    "action NaN": (lambda f, a, r: (f, np.vstack([a[1:], [0, np.nan]]), r), r"actions must lie in \[-1, 1\]"),
    "rewards missing": (lambda f, a, r: (f, a, r[1:]), r"rewards \(5,\), expected \(6,\)"),
    "reward NaN": (lambda f, a, r: (f, a, [*r[1:], np.nan]), "rewards be finite"),
    "reward beyond float32": (lambda f, a, r: (f, a, [*r[1:], 1e39]), "rewards be finite as float32"),
    "reward in words": (lambda f, a, r: (f, a, ["none"] * 6), "rewards are no array of numbers"),
    "terminal per step": (lambda f, a, r: (f, a, r, np.arange(6) == 5), r"terminal \(6,\), expected \(\)"),
    "no step": (lambda f, a, r: (f[:1], a[:0], r[:0]), r"frames \(1, 8, 8, 3\), expected \(2, 8, 8, 3\)"),
}


def test_a_bad_episode_is_refused_and_nothing_of_it_written(tmp_path, wanted):
    path, (first, second) = tmp_path / "set", two_episodes()
    with DatasetWriter(path, 8, 2) as writer:
        writer.add(*first)
        before = {file: file.read_bytes() for file in path.iterdir()}
        for name, (change, message) in BAD.items():
            with pytest.raises(UserError, match=f"^episode 1: .*{message}") as error:
                writer.add(*change(*first))
            assert "\n" not in str(error.value), name
            assert {file: file.read_bytes() for file in path.iterdir()} == before and writer.episodes == 1, name
        writer.add(*second)
    assert digests(path) == wanted


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_killed_writer_continues_with_its_next_episode(tmp_path, wanted, written):
    path, episodes = tmp_path / "set", two_episodes()
    writer = DatasetWriter(path, 8, 2).__enter__()
    for episode in episodes[:written]:
        writer.add(*episode)
    writer.opened.close()  # what a kill leaves: nothing is finished, the lock is free
    for garbage in (b"", b"\xff", b"\xff" * 2000):  # the next episode had begun
        for name in ("image", "action"):
            with open(path / f"{name}.npy", "ab") as file:
                file.write(garbage)
        with pytest.raises(UserError, match="set is no whole set .*meta.json"):
            Dataset(path)
        with contextlib.suppress(InterruptedError), DatasetWriter(path, 8, 2) as writer:
            assert writer.episodes == written and not writer.complete
            raise InterruptedError
    with DatasetWriter(path, 8, 2) as writer:
        for episode in episodes[writer.episodes :]:
            writer.add(*episode)
    assert digests(path) == wanted


@pytest.mark.parametrize("function", ["write_header", "write_meta", "sha256"])
def test_a_writer_killed_while_it_finishes_finishes_later(tmp_path, wanted, monkeypatch, function):
    path = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt), DatasetWriter(path, 8, 2) as writer:
        for episode in two_episodes():
            writer.add(*episode)
        monkeypatch.setattr(store, function, mock.Mock(side_effect=KeyboardInterrupt))
    monkeypatch.undo()
    assert not (path / "meta.json").exists()
    with DatasetWriter(path, 8, 2) as writer:
        assert writer.episodes == 2
    assert digests(path) == wanted


def test_another_recipe_starts_anew(tmp_path, wanted):
    path, (first, second) = tmp_path / "set", two_episodes()
    for seed in (0, 1, 0):
        with contextlib.suppress(InterruptedError), DatasetWriter(path, 8, 2, recipe={"a": np.int64(seed)}) as writer:
            assert writer.episodes == 0  # also the first recipe's: another may have written over it
            writer.add(*first)
            raise InterruptedError
    with DatasetWriter(path, np.int64(8), 2, recipe={"a": 0}) as writer:
        assert writer.episodes == 1
        writer.add(*second)
    assert digests(path) == wanted


@pytest.mark.parametrize("flags", [{"size": 0}, {"action_dim": 2.5}, {"task": 5}, {"mujoco": 3}, {"render": "best"}])
def test_the_writer_refuses_what_opening_would_refuse(tmp_path, flags):
    with pytest.raises(UserError, match="a wrong value of"):
        DatasetWriter(tmp_path / "set", **{"size": 8, "action_dim": 2} | flags)


def test_an_empty_and_a_finished_set(tmp_path):
    with pytest.raises(UserError, match="set: no episode was added"), DatasetWriter(tmp_path / "set", 12, 2):
        pass
    before = digests(path := write_set(tmp_path / "set"))
    with DatasetWriter(path, 12, 2) as writer:
        assert writer.complete
        with pytest.raises(UserError, match="set is finished"):
            writer.add(*synthetic_episode(0, 3, 12, 2, np.random.default_rng(0)))
    assert digests(path) == before


def test_a_second_writer_waits_for_the_first(tmp_path, wanted):
    path, episodes = tmp_path / "set", two_episodes()
    script = f"from store import *\nwith DatasetWriter({str(path)!r}, 8, 2) as writer: print(writer.complete)"
    with DatasetWriter(path, 8, 2) as writer:
        writer.add(*episodes[0])
        second = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT / "data", env=ENVIRONMENT, text=True,
                                  stdout=subprocess.PIPE)  # fmt: skip
        assert second.stdout.readline() == f"another process is writing {path}; waiting for it\n"
        writer.add(*episodes[1])
        assert second.poll() is None
    rest, _ = second.communicate(timeout=60)
    assert rest == "True\n" and second.returncode == 0 and digests(path) == wanted


@contextlib.contextmanager
def largest_file(size: int):
    """No file may grow beyond `size` bytes: what a full disk looks like to a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("space, kept", [(0, 0), (300, 0), (128 + 7 * 192, 1), (128 + 7 * 192 + 500, 1)])
def test_a_full_disk_is_one_line_and_loses_no_episode(tmp_path, wanted, space, kept):
    path, episodes = tmp_path / "set", two_episodes()  # 7 and 5 rows of 192 bytes
    with pytest.raises(UserError) as error, largest_file(space), DatasetWriter(path, 8, 2) as writer:
        for episode in episodes:
            writer.add(*episode)
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(path)) and "what was complete before is kept" in message
    with DatasetWriter(path, 8, 2) as writer:
        assert writer.episodes == kept
        with largest_file(space), pytest.raises(UserError):
            writer.add(*episodes[kept])
        for episode in episodes[kept:]:  # there is room again
            writer.add(*episode)
    assert digests(path) == wanted


# ---- opening ----


def saved(name: str, change):
    """A change of <name>.npy."""
    return lambda path: np.save(path / f"{name}.npy", change(np.load(path / f"{name}.npy")))


def meta(**changes):
    def write(path):
        facts = json.loads((path / "meta.json").read_text()) | changes
        (path / "meta.json").write_text(json.dumps({name: fact for name, fact in facts.items() if fact is not ...}))

    return write


DAMAGED = {  # name -> (change of a set of 14 rows, 12 px, 2 actions; what the error says)
    "no meta.json": (lambda path: (path / "meta.json").unlink(), "meta.json"),
    "broken meta.json": (lambda path: (path / "meta.json").write_text('{"rows": 1'), "delimiter"),
    "no task": (meta(task=...), "meta.json has no 'task'"),
    "no hashes": (meta(sha256=...), "meta.json has no 'sha256'"),
    "another size": (meta(size=9), r"image.npy: \(14, 3, 12, 12\) uint8, expected \('n', 3, 9, 9\)"),
    "size as text": (meta(size="12"), "meta.json: size '12'"),
    "other counts": (meta(transitions=99, rows=5, episodes=7), None),  # those of the arrays count
    "a byte less": (lambda path: os.truncate(path / "image.npy", (path / "image.npy").stat().st_size - 1), ""),
    "empty file": (lambda path: os.truncate(path / "reward.npy", 0), ""),
    "an action less": (saved("action", lambda a: a[:-1]), "must have as many rows"),
    "rewards in float64": (saved("reward", lambda a: a.astype(float)), "reward.npy: .* float64, expected .* float32"),
    "no episode": (saved("episode", lambda a: a[:0]), "index 0 is out of bounds"),
    "late start": (saved("episode", lambda a: a + 1), "first rows must start at 0"),
    "empty episode": (saved("episode", lambda a: a[[0, 0]]), "first rows must .*rise by 2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_set_is_one_line(tmp_path, kind):
    change, message = DAMAGED[kind]
    change(path := write_set(tmp_path / "set"))
    if message is None:
        assert (Dataset(path).num_transitions, Dataset(path).num_episodes) == (12, 2)
        return
    with pytest.raises(UserError, match=f"is no whole set .*{message}") as error:
        Dataset(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, value", [
    ("action", np.nan), ("action", 1.5), ("reward", np.inf), ("discount", np.nan), ("discount", -1.0)
])  # fmt: skip
def test_a_bad_value_is_named_by_its_row(tmp_path, name, value):
    path = write_set(tmp_path / "set")
    saved(name, lambda a: np.concatenate([a[:9], np.full_like(a[:1], value), a[10:]]))(path)
    with pytest.raises(UserError, match="set: row 9 is not finite or out of range") as error:
        TransitionBuffer(Dataset(path), 4)
    assert "\n" not in str(error.value)


def test_a_set_that_is_made_on_the_spot_and_one_that_is_not_there(tiny_set):
    dataset, rows = Dataset(tiny_set), load(tiny_set)
    assert (dataset.task, dataset.source, dataset.size, dataset.render) == ("walker-walk", "made", 84, "fast")
    assert (rows["discount"] == 1).all() and rows["image"].std() > 20
    np.testing.assert_allclose(np.delete(rows["action"], [0, 501], 0).std(0), 3**-0.5, atol=0.03)  # uniform
    words = {"task": "walker-walk", "dataset": "medium", "source": "vd4rl", "transitions": None, "data_seed": 0}
    words |= {"distraction": "none", "bodies": False, "data_dir": str(tiny_set.parents[2])}
    with pytest.raises(UserError, match=f"medium-84px does not exist .there are: {tiny_set}.*data/vd4rl.py import"):
        open_dataset(argparse.Namespace(**words), 84)
