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
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, run_python, synthetic_episode, write_set
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import Dataset, DatasetWriter, TransitionBuffer, UserError, open_dataset

ARRAYS = ("image", "action", "reward", "discount", "episode")
GAMMA = 0.9


def digests(path: Path) -> dict[str, str]:
    return {name: hashlib.sha256((path / f"{name}.npy").read_bytes()).hexdigest() for name in ARRAYS}


def load(path: Path) -> dict[str, np.ndarray]:
    return {name: np.load(path / f"{name}.npy") for name in ARRAYS}


def edit(path: Path, name: str, change) -> None:
    """Applies change(array) to <name>.npy."""
    array = np.load(path / f"{name}.npy")
    change(array)
    np.save(path / f"{name}.npy", array)


def two_parts(path: Path, parts: list[Path]) -> Path:
    """A set that lists others, as medexp does."""
    path.mkdir()
    names = [os.path.relpath(part, path) for part in parts]
    (path / "meta.json").write_text(json.dumps({"format": 1, "name": "medexp", "parts": names}))
    return path


# ---- sampling: every window against a loop ----


def naive_windows(folders: list[Path], stack: int, nstep: int):
    """obs, action, reward, discount, next_obs of every complete window, by a loop over the arrival rows."""
    for folder in folders:
        rows = load(folder)
        bounds = [*rows["episode"], len(rows["reward"])]
        for first, end in zip(bounds[:-1], bounds[1:]):
            steps = end - first - 1

            def stacked(t, first=first, rows=rows):
                return np.concatenate([rows["image"][first + max(t - k, 0)] for k in reversed(range(stack))])

            for t in range(steps):
                if t + nstep > steps:
                    continue
                reward, factor = 0.0, 1.0
                for k in range(nstep):
                    reward += factor * float(rows["reward"][first + t + 1 + k])
                    factor *= GAMMA * float(rows["discount"][first + t + 1 + k])
                yield stacked(t), rows["action"][first + t + 1], reward, factor, stacked(t + nstep)


def sets_for(kind: str, tmp_path: Path) -> tuple[Path, list[Path]]:
    """The set to open and the folders that hold its arrays."""
    folder = write_set(tmp_path / "one", lengths=(7, 2, 5, 1), terminal_last=kind == "terminal")
    if kind == "terminal inside":  # an imported set may hold one anywhere
        edit(folder, "discount", lambda discount: discount.put([4, 11], 0.0))
    if kind != "two parts":
        return folder, [folder]
    other = write_set(tmp_path / "other", lengths=(3, 6), terminal_last=True, seed=1)
    return two_parts(tmp_path / "both", [folder, other]), [folder, other]


@pytest.mark.parametrize("kind", ["timeouts", "terminal", "terminal inside", "two parts"])
@pytest.mark.parametrize("nstep", [1, 3])
@pytest.mark.parametrize("stack", [1, 3])
def test_every_window_equals_a_naive_loop(tmp_path, kind, nstep, stack):
    path, folders = sets_for(kind, tmp_path)
    buffer = TransitionBuffer(Dataset(path), 4, frame_stack=stack, nstep=nstep, gamma=GAMMA)
    expected = list(naive_windows(folders, stack, nstep))
    lengths = [7, 2, 5, 1] + ([3, 6] if kind == "two parts" else [])
    assert len(buffer) == len(expected) == sum(max(length - nstep + 1, 0) for length in lengths)
    whole = buffer.gather(torch.arange(len(buffer)))
    for i, (obs, action, reward, discount, next_obs) in enumerate(expected):
        single = buffer.gather(torch.tensor([i]))  # also batches that lie in one part alone
        for batch, j in ((whole, i), (single, 0)):
            assert np.array_equal(batch.obs[j].numpy(), obs), f"obs of window {i}"
            assert np.array_equal(batch.next_obs[j].numpy(), next_obs), f"next_obs of window {i}"
            assert np.array_equal(batch.action[j].numpy(), action)
            assert batch.reward[j].item() == pytest.approx(reward, rel=1e-6)
            assert batch.discount[j].item() == pytest.approx(discount, rel=1e-6, abs=0)
    shape = (len(buffer), 3 * stack, 12, 12)
    assert whole.obs.shape == whole.next_obs.shape == shape and whole.obs.dtype == torch.uint8
    assert whole.reward.shape == whole.discount.shape == (len(buffer), 1) and whole.reward.dtype == torch.float32
    assert whole.action.shape == (len(buffer), 2) and whole.action.dtype == torch.float32


def test_discount_is_zero_at_a_terminal_and_bootstraps_through_a_time_limit(tmp_path):
    path = write_set(tmp_path / "set", lengths=(4, 4), terminal_last=True)
    buffer = TransitionBuffer(Dataset(path), 4, nstep=2, gamma=GAMMA)
    discount = buffer.gather(torch.arange(6)).discount[:, 0]
    torch.testing.assert_close(discount, torch.tensor([0.81, 0.81, 0.81, 0.81, 0.81, 0.0]))


def test_reward_t_gives_the_closed_form(tmp_path):
    T, n = 20, 3
    frames, actions, _ = synthetic_episode(0, T, 6, 1, np.random.default_rng(0))
    with DatasetWriter(tmp_path / "set", 6, 1) as writer:
        writer.add(frames, actions, np.arange(T))  # leaving frame t is rewarded with t
    buffer = TransitionBuffer(Dataset(tmp_path / "set"), 4, nstep=n, gamma=GAMMA)
    t = torch.arange(T - n + 1.0)
    # sum over k < n of g^k (t + k) = t (1 - g^n) / (1 - g) + g (1 - n g^(n-1) + (n-1) g^n) / (1 - g)^2
    powers = GAMMA * (1 - n * GAMMA ** (n - 1) + (n - 1) * GAMMA**n) / (1 - GAMMA) ** 2
    closed = t * (1 - GAMMA**n) / (1 - GAMMA) + powers
    assert len(buffer) == T - n + 1 == 18
    torch.testing.assert_close(buffer.reward[:, 0], closed)


def row_of(frames: torch.Tensor) -> torch.Tensor:
    """The global rows that write_set's frames spell, (..., 3, S, S) -> (...)."""
    return frames[..., 0, 0, 0].long() + 256 * frames[..., 1, 0, 0].long()


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    nstep=st.integers(1, 4),
    stack=st.integers(1, 4),
    cut=st.integers(0, 4),
    terminal=st.booleans(),
)
def test_no_window_mixes_episodes_and_none_is_missing(lengths, nstep, stack, cut, terminal):
    """cut: how many episodes lie in the first of two parts (0: all in one)."""
    with tempfile.TemporaryDirectory() as name:
        folder, cut = Path(name), cut % len(lengths)
        shares = [lengths[:cut], lengths[cut:]] if cut else [lengths]
        parts = [write_set(folder / str(i), share, 3, 1, terminal, i) for i, share in enumerate(shares)]
        dataset = Dataset(two_parts(folder / "both", parts) if cut else parts[0])
        assert dataset.num_transitions == sum(lengths) and dataset.num_episodes == len(lengths)
        expected = []  # (part, first row of the episode, row) of each window
        for part, share in enumerate(shares):
            firsts = np.cumsum([0, *(length + 1 for length in share)])
            expected += [(part, f, f + t) for f, n in zip(firsts, share) for t in range(n - nstep + 1)]
        if not expected:
            with pytest.raises(UserError, match=f"no episode is as long as --nstep {nstep}"):
                TransitionBuffer(dataset, 4, stack, nstep)
            return
        buffer = TransitionBuffer(dataset, 4, stack, nstep)
        assert len(buffer) == len(expected) == sum(max(length - nstep + 1, 0) for length in lengths)
        batch = buffer.gather(torch.arange(len(buffer)))
        obs, next_obs = (row_of(x.view(len(x), stack, 3, 3, 3)) for x in (batch.obs, batch.next_obs))
        actions = [np.load(part / "action.npy") for part in parts]
        for i, (part, first, row) in enumerate(expected):
            assert obs[i].tolist() == [max(row - k, first) for k in reversed(range(stack))]
            assert next_obs[i].tolist() == [max(row + nstep - k, first) for k in reversed(range(stack))]
            assert batch.action[i].numpy() == actions[part][row + 1]


def pairs_that_fit(path: Path) -> float:
    """The share of (obs, action, next_obs) in which the next frame is the frame, brightened as the action says."""
    buffer = TransitionBuffer(Dataset(path), 4, frame_stack=1)
    batch = buffer.gather(torch.arange(len(buffer)))
    change = batch.next_obs[:, 0, 0, 0].int() - batch.obs[:, 0, 0, 0].int()
    return (change == (10 * batch.action[:, 0]).round()).float().mean().item()


def test_an_action_beside_the_image_it_led_to_is_detected(tmp_path):
    """The alignment trap: (image[t], action[t]) instead of (image[t], action[t + 1])."""
    rng = np.random.default_rng(0)
    for name in ("set", "misaligned"):
        with DatasetWriter(tmp_path / name, 4, 1) as writer:
            for _ in range(3):
                brighter = rng.integers(-10, 11, 40)  # action t changes every pixel by ten times itself
                level = 100 + np.concatenate([[0], np.cumsum(brighter)]).clip(-100, 150)
                actions = (np.diff(level) / 10).astype(np.float32)
                frames = np.broadcast_to(level[:, None, None, None], (41, 4, 4, 3)).astype(np.uint8)
                writer.add(frames, actions[:, None], np.zeros(40))
    edit(tmp_path / "misaligned", "action", lambda action: action.__setitem__(slice(1, None), action[:-1].copy()))
    assert pairs_that_fit(tmp_path / "set") == 1.0
    assert pairs_that_fit(tmp_path / "misaligned") < 0.2  # by chance 1 in 21


def test_the_sampler_continues_with_the_same_batches(tmp_path):
    dataset = Dataset(write_set(tmp_path / "set", lengths=(30, 30)))
    buffer, other = (TransitionBuffer(dataset, 16, seed=seed) for seed in (5, 6))
    twin = TransitionBuffer(dataset, 16, seed=5)
    torch.manual_seed(0)  # torch's own generator plays no part
    first = buffer.sample()
    torch.manual_seed(1)
    assert torch.equal(first.action, twin.sample().action)
    assert not torch.equal(first.action, other.sample().action)
    saved = buffer.state_dict()
    expected = [buffer.sample() for _ in range(3)]
    other.load_state_dict(saved)
    for batch, wanted in zip([other.sample() for _ in range(3)], expected):
        assert all(torch.equal(a, b) for a, b in zip(batch, wanted))
    assert not torch.equal(expected[0].action, expected[1].action)


def test_samples_are_uniform(tmp_path):
    buffer = TransitionBuffer(Dataset(write_set(tmp_path / "set", lengths=(6, 4), size=3)), 1000)
    seen = row_of(torch.cat([buffer.sample().obs[:, 6:] for _ in range(20)])).bincount(minlength=12)
    assert seen[[6, 11]].tolist() == [0, 0]  # nothing starts at an episode's last row
    starts = seen[[0, 1, 2, 3, 4, 5, 7, 8, 9, 10]]
    assert starts.sum() == 20_000 and starts.min() > 1800 and starts.max() < 2200  # 2000 +- 42


# ---- writing ----


def two_episodes(action_dim: int = 2) -> list[tuple]:
    rng = np.random.default_rng(3)
    return [synthetic_episode(row, length, 8, action_dim, rng) for row, length in ((0, 6), (7, 4))]


def test_round_trip(tmp_path):
    path, episodes = tmp_path / "robot", two_episodes()
    with DatasetWriter(path, size=8, action_dim=2, mujoco="1.2.3") as writer:
        writer.add(*episodes[0])
        assert writer.episodes == 1
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
    assert counts.items() <= meta.items() and meta["mujoco"] == "1.2.3"
    assert meta["sha256"] == digests(path)
    np.testing.assert_allclose(meta["episode_returns"], [e[2].sum() for e in episodes], atol=2e-3)
    assert {file.name for file in path.iterdir()} == {*(f"{name}.npy" for name in ARRAYS), "meta.json", ".lock"}
    dataset = Dataset(path)
    assert (dataset.num_transitions, dataset.num_episodes, dataset.action_dim, dataset.size) == (10, 2, 2, 8)
    assert dataset.mean_return == pytest.approx(np.mean([e[2].sum() for e in episodes]), abs=1e-5)
    assert dataset.facts()["hash"] == dataset.hash and len(dataset.hash) == 16


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[3] = value
    return array


BAD = {  # name -> (change of frames, actions, rewards; what the error says)
    "frames missing": (lambda f, a, r: (f[:-1], a, r), r"frames \(6, 8, 8, 3\), expected \(7, 8, 8, 3\)"),
    "channels first": (lambda f, a, r: (f.transpose(0, 3, 1, 2), a, r), r"frames .*expected \(7, 8, 8, 3\)"),
    "float frames": (lambda f, a, r: (f / np.float32(255), a, r), "frames are float32, expected uint8"),
    "signed frames": (lambda f, a, r: (f.astype(int), a, r), "frames are int64, expected uint8"),
    "action size": (lambda f, a, r: (f, np.hstack([a, a]), r), r"actions \(6, 4\), expected \(6, 2\)"),
    "flat actions": (lambda f, a, r: (f, a[:, 0], r), r"actions \(6,\), expected \(6, 2\)"),
    "action range": (lambda f, a, r: (f, with_value(a, 1.01), r), r"actions must lie in \[-1, 1\]"),
    "action NaN": (lambda f, a, r: (f, with_value(a, np.nan), r), r"actions must lie in \[-1, 1\]"),
    "rewards missing": (lambda f, a, r: (f, a, r[1:]), r"rewards \(5,\), expected \(6,\)"),
    "rewards column": (lambda f, a, r: (f, a, r[:, None]), r"rewards \(6, 1\), expected \(6,\)"),
    "reward NaN": (lambda f, a, r: (f, a, with_value(r, np.nan)), "rewards be finite"),
    "reward infinite": (lambda f, a, r: (f, a, with_value(r, np.inf)), "rewards be finite"),
    "no step": (lambda f, a, r: (f[:1], a[:0], r[:0]), "episode 1: "),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_episode_is_refused_and_nothing_of_it_written(tmp_path, kind):
    change, message = BAD[kind]
    first, second = two_episodes()
    with DatasetWriter(tmp_path / "set", 8, 2) as writer:
        writer.add(*first)
        sizes = {file: file.stat().st_size for file in (tmp_path / "set").iterdir()}
        with pytest.raises(UserError, match=message) as error:
            writer.add(*change(*first))
        assert "\n" not in str(error.value) and str(error.value).startswith("episode 1: ")
        assert {file: file.stat().st_size for file in (tmp_path / "set").iterdir()} == sizes
        assert writer.episodes == 1
        writer.add(*second)
    with DatasetWriter(tmp_path / "wanted", 8, 2) as writer:
        writer.add(*first)
        writer.add(*second)
    assert digests(tmp_path / "set") == digests(tmp_path / "wanted")


def killed(writer: DatasetWriter) -> None:
    """What a kill leaves of a writer: nothing is flushed or finished, the lock is gone."""
    for file in [*writer.files.values(), writer.progress, writer.lock]:
        file.close()


@pytest.mark.parametrize("garbage", [0, 1, 500], ids=lambda n: f"{n} bytes of the next episode")
@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_killed_writer_continues_with_its_next_episode(tmp_path, written, garbage):
    episodes = two_episodes()
    with DatasetWriter(tmp_path / "wanted", 8, 2) as writer:
        for episode in episodes:
            writer.add(*episode)
    path = tmp_path / "set"
    writer = DatasetWriter(path, 8, 2).__enter__()
    for episode in episodes[:written]:
        writer.add(*episode)
    killed(writer)
    for name in ("image", "action"):  # the next episode had begun
        with open(path / f"{name}.npy", "ab") as file:
            file.write(b"\xff" * garbage)
    with pytest.raises(UserError, match="unfinished set"):
        Dataset(path)
    with DatasetWriter(path, 8, 2) as writer:
        assert writer.episodes == written and not writer.complete
        for episode in episodes[written:]:
            writer.add(*episode)
    assert digests(path) == digests(tmp_path / "wanted")


@pytest.mark.parametrize("function", ["_write_header", "write_meta", "write_atomically"])
def test_a_writer_killed_while_it_finishes_finishes_later(tmp_path, monkeypatch, function):
    episodes = two_episodes()
    with DatasetWriter(tmp_path / "wanted", 8, 2) as writer:
        for episode in episodes:
            writer.add(*episode)
    path = tmp_path / "set"

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), DatasetWriter(path, 8, 2) as writer:
        for episode in episodes:
            writer.add(*episode)
        monkeypatch.setattr(common, function, stop)
    monkeypatch.undo()
    assert not (path / "meta.json").exists()
    with DatasetWriter(path, 8, 2) as writer:
        assert writer.episodes == 2
    assert digests(path) == digests(tmp_path / "wanted") and Dataset(path).num_episodes == 2


def test_a_writer_killed_before_its_first_episode_begins_again(tmp_path):
    """progress.bin exists but is empty: a kill, or a disk that was full from the start."""
    path, episodes = tmp_path / "set", two_episodes()
    killed(DatasetWriter(path, 8, 2).__enter__())
    os.truncate(path / "progress.bin", 0)
    with DatasetWriter(path, 8, 2) as writer:
        assert writer.episodes == 0
        writer.add(*episodes[0])
        progress = np.fromfile(path / "progress.bin", np.int64)
    assert progress.tolist() == [0, 7] and Dataset(path).num_transitions == 6


def test_another_recipe_starts_anew(tmp_path):
    path, episodes = tmp_path / "set", two_episodes()
    for recipe in ({"seed": 0}, {"seed": 1}):
        with contextlib.suppress(InterruptedError), DatasetWriter(path, 8, 2, recipe=recipe) as writer:
            assert writer.episodes == 0
            writer.add(*episodes[0])
            raise InterruptedError
    with DatasetWriter(path, 8, 2, recipe={"seed": 1}) as writer:
        assert writer.episodes == 1
    with DatasetWriter(tmp_path / "wanted", 8, 2) as writer:
        writer.add(*episodes[0])
    assert digests(path) == digests(tmp_path / "wanted")


def test_another_action_size_starts_anew(tmp_path):
    path = tmp_path / "set"
    with contextlib.suppress(InterruptedError), DatasetWriter(path, 8, 3) as writer:
        writer.add(*two_episodes(action_dim=3)[0])
        raise InterruptedError
    with DatasetWriter(path, 8, 2) as writer:
        assert writer.episodes == 0
        writer.add(*two_episodes(action_dim=2)[0])
    assert np.load(path / "action.npy").shape == (7, 2)


def test_a_set_without_episodes_is_refused(tmp_path):
    with pytest.raises(UserError, match="set: no episode was added"), DatasetWriter(tmp_path / "set", 8, 2):
        pass
    with pytest.raises(UserError, match=r"unfinished set \(no meta.json\); run data/collect.py again"):
        Dataset(tmp_path / "set")


def test_a_finished_set_is_left_alone(tmp_path):
    path = write_set(tmp_path / "set")
    before = digests(path)
    with DatasetWriter(path, 12, 2) as writer:
        assert writer.complete
        with pytest.raises(UserError, match="set is finished"):
            writer.add(*synthetic_episode(0, 3, 12, 2, np.random.default_rng(0)))
    assert digests(path) == before


def test_a_second_writer_waits_for_the_first(tmp_path):
    path, episodes = tmp_path / "set", two_episodes()
    script = f"""
from common import DatasetWriter
with DatasetWriter({str(path)!r}, 8, 2) as writer:
    print(writer.complete)
"""
    with DatasetWriter(path, 8, 2) as writer:
        writer.add(*episodes[0])
        second = subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE
        )
        line = second.stdout.readline().strip()
        assert line == f"another process is writing {path}; waiting for it (process {os.getpid()})"
        time.sleep(0.2)
        assert second.poll() is None  # it waits
        writer.add(*episodes[1])
    rest, _ = second.communicate(timeout=60)
    assert rest.strip() == "True" and second.returncode == 0
    assert Dataset(path).num_episodes == 2


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


@pytest.mark.parametrize("space", [128 + 7 * 192, 128 + 7 * 192 + 500, 128 + 11 * 192])
def test_a_full_disk_is_one_line_and_loses_no_episode(tmp_path, space):
    path, episodes = tmp_path / "set", two_episodes()  # 7 and 5 rows of 192 bytes
    with pytest.raises(UserError) as error, largest_file(space), DatasetWriter(path, 8, 2) as writer:
        for episode in episodes:
            writer.add(*episode)
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(path)) and "what was complete before is kept" in message
    with DatasetWriter(path, 8, 2) as writer:
        assert writer.episodes == 1
        writer.add(*episodes[1])
    with DatasetWriter(tmp_path / "wanted", 8, 2) as writer:
        for episode in episodes:
            writer.add(*episode)
    assert digests(path) == digests(tmp_path / "wanted")


def test_a_disk_full_from_the_start_is_one_line(tmp_path):
    path, episodes = tmp_path / "set", two_episodes()
    for space in (0, 4, 300):
        with pytest.raises(UserError) as error, largest_file(space), DatasetWriter(path, 8, 2) as writer:
            writer.add(*episodes[0])
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    with DatasetWriter(path, 8, 2) as writer:
        assert writer.episodes == 0
        for episode in episodes:
            writer.add(*episode)
    assert Dataset(path).num_transitions == 10


# ---- opening ----


def test_a_set_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nothing does not exist; run data/collect.py"):
        Dataset(tmp_path / "nothing")
    folder = write_set(tmp_path / "set")
    (folder / "meta.json").write_text('{"rows": 1')
    with pytest.raises(UserError, match="set/meta.json cannot be read"):
        Dataset(folder)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("damage", ["truncated", "header alone", "empty", "missing"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    file = write_set(tmp_path / "set") / f"{name}.npy"
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, {"truncated": file.stat().st_size - 1, "header alone": 60, "empty": 0}[damage])
    with pytest.raises(UserError, match=f"set/{name}.npy: missing, truncated") as error:
        Dataset(tmp_path / "set")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("action", lambda a: a[:-1], "action.npy: 13 rows of float32, meta.json says 14"),
        ("reward", lambda a: a.astype(np.float64), "reward.npy: 14 rows of float64, meta.json says 14 of float32"),
        ("episode", lambda a: a[:1], "episode.npy: 1 rows of int64, meta.json says 2"),
        ("episode", lambda a: a + 1, "episode.npy: first rows must start at 0"),
        ("episode", lambda a: a[[0, 0]], "episode.npy: first rows must .*rise by 2"),
    ],
)
def test_wrong_counts_are_named(tmp_path, name, change, message):
    path = write_set(tmp_path / "set")
    np.save(path / f"{name}.npy", change(np.load(path / f"{name}.npy")))
    with pytest.raises(UserError, match=message):
        Dataset(path)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("action", np.nan, "action.npy: row 9 is"),
        ("action", 1.5, "action.npy: row 9 is"),
        ("reward", np.inf, "reward.npy: row 9 is inf"),
        ("discount", np.nan, "discount.npy: row 9 is nan"),
        ("discount", -1.0, "discount.npy: row 9 is -1"),
    ],
)
def test_bad_values_are_named_by_file_and_row(tmp_path, name, value, message):
    path = write_set(tmp_path / "set")
    edit(path, name, lambda array: array[9:10].fill(value))
    with pytest.raises(UserError, match=f"set/{message}.*not finite or out of range") as error:
        TransitionBuffer(Dataset(path), 4)
    assert "\n" not in str(error.value)


MEASURE_OPENING = """
import resource, sys, time
from pathlib import Path
from common import Dataset, TransitionBuffer

def resident():  # bytes of memory that are this process's own, or mapped and touched
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

Dataset(sys.argv[1])  # once before, so that imports do not count
before, start = resident(), time.process_time()  # CPU time: other processes do not count
dataset = Dataset(sys.argv[1])
seconds = time.process_time() - start
batch = TransitionBuffer(dataset, 4).sample()
assert batch.obs.shape[:2] == (4, 9) and batch.obs.sum() == 0
print(seconds, (resident() - before) / 1e6, dataset.num_transitions)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_large_set_opens_at_once_and_stays_on_the_disk(tmp_path):
    """More frames than there is memory and swap, in a sparse file that takes no disk."""
    path, size, episodes = write_set(tmp_path / "set", lengths=(3,)), 512, 100
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    memory = sum(int(words[1]) * 1024 for words in lines if words[0] in ("MemTotal:", "SwapTotal:"))
    each = (memory + 2**32) // (episodes * 3 * size**2) + 1  # rows of an episode
    rows = each * episodes
    shapes = {"image": (rows, 3, size, size), "action": (rows, 2), "reward": (rows,), "discount": (rows,)}
    for name, shape in shapes.items():
        dtype = np.dtype(common.ARRAYS[name])
        with open(path / f"{name}.npy", "wb") as file:
            common._write_header(file, dtype, shape)
            file.truncate(common.HEADER + int(np.prod(shape)) * dtype.itemsize)
    np.save(path / "episode.npy", np.arange(episodes) * each)
    meta = json.loads((path / "meta.json").read_text())
    meta |= {"rows": rows, "episodes": episodes, "transitions": rows - episodes, "size": size}
    (path / "meta.json").write_text(json.dumps(meta))
    result = run_python("-c", MEASURE_OPENING, path)  # a fresh process: allocators keep what other tests freed
    assert result.returncode == 0, result.stderr
    seconds, megabytes, transitions = map(float, result.stdout.split())
    assert transitions == rows - episodes and seconds < 0.1 and megabytes < 100


def arguments(data_dir, dataset: str, **changes) -> argparse.Namespace:
    facts = {"task": "walker-walk", "source": "made", "transitions": None, "data_seed": 0}
    return argparse.Namespace(data_dir=str(data_dir), dataset=dataset, **(facts | changes))


def test_open_dataset_by_name_or_path(tmp_path, capsys):
    path = write_set(tmp_path / "made" / "walker-walk" / "random-84px-500")
    assert open_dataset(arguments(tmp_path, "random", transitions=500), 84).path == path
    args = arguments(tmp_path, str(path))
    assert open_dataset(args, 84).size == 12 and args.task == "own"  # what the folder says
    assert "was recorded on own" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"--dataset medum: neither one of random, .*there are: {path}"):
        open_dataset(arguments(tmp_path, "medum"), 84)
    with pytest.raises(UserError, match="medium-84px does not exist; import the official files"):
        open_dataset(arguments(tmp_path, "medium", source="vd4rl"), 84)


def test_parts_must_belong_together(tmp_path):
    parts = [write_set(tmp_path / "a"), write_set(tmp_path / "b", size=8)]
    with pytest.raises(UserError, match="another task, size"):
        Dataset(two_parts(tmp_path / "both", parts))


def test_the_collected_set(tiny_set):
    dataset = Dataset(tiny_set)
    assert (dataset.task, dataset.source, dataset.size, dataset.render) == ("walker-walk", "made", 84, "fast")
    assert (dataset.num_transitions, dataset.num_episodes, dataset.action_dim) == (1000, 2, 6)
    rows = load(tiny_set)
    assert rows["image"].shape == (1002, 3, 84, 84) and rows["episode"].tolist() == [0, 501]
    assert 20 < rows["image"].std() < 100
    same = [np.array_equal(rows["image"][t], rows["image"][t + 1]) for t in range(1001)]
    assert sum(same) < 20  # frames move
    assert (rows["action"][[0, 501]] == 0).all() and (rows["reward"][[0, 501]] == 0).all()
    assert (rows["discount"] == 1).all() and rows["reward"].min() >= 0 and rows["reward"].max() <= 2
    np.testing.assert_allclose(np.delete(rows["action"], [0, 501], 0).std(0), 3**-0.5, atol=0.03)  # uniform
    batch = TransitionBuffer(dataset, 8, nstep=3).sample()
    assert batch.obs.shape == (8, 9, 84, 84)


def test_the_documented_loop_continues_where_a_writer_was_interrupted(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [synthetic_episode(0, 6, 12, 2, rng) for _ in range(3)]

    def loop(path, until):
        with DatasetWriter(path, size=12, action_dim=2) as writer:
            for episode in episodes[writer.episodes :]:
                if writer.episodes == until:
                    raise KeyboardInterrupt
                writer.add(*episode)

    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "interrupted", until=2)
    loop(tmp_path / "interrupted", until=None)
    loop(tmp_path / "whole", until=None)
    assert Dataset(tmp_path / "interrupted").meta["sha256"] == Dataset(tmp_path / "whole").meta["sha256"]
    assert Dataset(tmp_path / "interrupted").num_episodes == 3
