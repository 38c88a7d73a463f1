"""data/vd4rl.py on files in the official layouts, each known quirk among them, and on damaged sets."""

import argparse
import json
import re
import sys
import tracemalloc
import types
from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np
import pytest
import vd4rl
from conftest import run_python, write_set
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import Dataset, DatasetWriter, UserError

ARRAYS = ("image", "action", "reward", "discount", "episode")
SIZE, ACTIONS = 6, 2


# ---- official files, as their own writers make them ----


def official_episode(length: int, seed: int = 0, size: int = SIZE, terminal: bool = False) -> dict[str, np.ndarray]:
    """The arrays of one npz file: length + 1 arrival rows."""
    rng, row = np.random.default_rng([seed, length]), np.arange(length + 1)
    episode = {
        "image": rng.integers(0, 256, (length + 1, size, size, 3), np.uint8),
        "action": rng.uniform(-1, 1, (length + 1, ACTIONS)).astype(np.float32),
        "reward": rng.uniform(0, 2, length + 1),
        "discount": np.ones(length + 1),
        "is_first": row == 0, "is_last": row == length, "is_terminal": np.zeros(length + 1, bool),
    }  # fmt: skip
    episode["action"][0], episode["reward"][0] = 0, 0
    if terminal:
        episode["discount"][-1], episode["is_terminal"][-1] = 0, True
    return episode


def official_folder(root: Path, path: str = "main/walker_walk/random/64px") -> Path:
    folder = root / path
    folder.mkdir(parents=True)
    return folder


def write_npz(folder: Path, episodes: list[dict]) -> list[Path]:
    files = [folder / f"202206{i + 1:02d}T120000-{i:08x}-501.npz" for i in range(len(episodes))]
    for file, episode in zip(files, episodes):
        np.savez_compressed(file, **episode)
    return files


def flat(episodes: list[dict], step_dtype=np.float64) -> dict[str, np.ndarray]:
    """The arrays of an hdf5 file that holds whole episodes."""
    arrays = {key: np.concatenate([e[key] for e in episodes]) for key in ("action", "reward", "discount")}
    arrays["observation"] = np.concatenate([e["image"].transpose(0, 3, 1, 2) for e in episodes])
    steps = [np.r_[0, np.ones(len(e["action"]) - 2), 2] for e in episodes]
    return arrays | {"step_type": np.concatenate(steps).astype(step_dtype)}


def write_hdf5(folder: Path, arrays: dict, cuts: list[int] = (), name: str = "{}.hdf5") -> list[Path]:
    """Shards 0.hdf5, 1.hdf5, ..., cut before the rows `cuts`, wherever these are."""
    files = [folder / name.format(i) for i in range(len(cuts) + 1)]
    pieces = {key: np.split(array, cuts) for key, array in arrays.items()}
    for i, file in enumerate(files):
        with h5py.File(file, "w") as shard:
            for key in arrays:
                shard.create_dataset(key, data=pieces[key][i], compression="gzip")
    return files


def load(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.load(folder / f"{name}.npy") for name in ARRAYS}


def assert_holds(folder: Path, episodes: list[dict]) -> None:
    """The set in `folder` is exactly these official episodes."""
    stored, lengths = load(folder), [len(e["action"]) for e in episodes]
    np.testing.assert_array_equal(stored["episode"], np.cumsum([0, *lengths[:-1]]))
    images = np.concatenate([e["image"] for e in episodes]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(stored["image"], images)
    for name in ("action", "reward", "discount"):
        expected = np.concatenate([e[name] for e in episodes]).astype(np.float32)
        np.testing.assert_array_equal(stored[name], expected)


def do_import(folder: Path, root: Path, name: str = "walker-walk/random-6px", **flags) -> Path:
    vd4rl.import_set(folder, data_dir=str(root / "sets"), **flags)
    return root / "sets" / "vd4rl" / name


def read_all(files: list[Path]) -> list[vd4rl.Episode]:
    return list(vd4rl.hdf5_episodes(files, defaultdict(list)))


# ---- import: the plain case ----


def test_import_npz(tmp_path, capsys):
    episodes = [official_episode(7, 1), official_episode(7, 2), official_episode(7, 3)]
    folder = official_folder(tmp_path, "main/cheetah_run/medium_replay/64px")
    write_npz(folder, episodes)
    made = do_import(folder, tmp_path, "cheetah-run/mixed-6px")
    assert_holds(made, episodes)
    meta = json.loads((made / "meta.json").read_text())
    assert (meta["task"], meta["source"], meta["name"]) == ("cheetah-run", "vd4rl", "mixed-6px")
    assert (meta["size"], meta["render"], meta["mujoco"]) == (SIZE, "reference", None)
    assert (meta["rows"], meta["episodes"], meta["transitions"]) == (24, 3, 21)
    returns = [e["reward"].sum() for e in episodes]
    np.testing.assert_allclose(meta["episode_returns"], returns, atol=2e-3)
    printed = capsys.readouterr().out
    assert "3 episodes, 21 transitions" in printed
    numbers = [float(word) for word in re.search(r"imported(.*)", printed)[1].split()]
    np.testing.assert_allclose(numbers[:3], [np.mean(returns), np.std(returns), min(returns)], atol=0.06)
    assert "   191.2   144.6     2.5    48.3   191.9   303.4   473.8" in printed  # V-D4RL Table 5
    assert list(vd4rl.findings(made)) == []


@pytest.mark.parametrize("step_dtype", [np.float64, np.float32, np.int64, np.uint8])
def test_import_hdf5_with_float_or_integer_step_types(tmp_path, step_dtype):
    episodes = [official_episode(length, length) for length in (5, 9, 4)]
    folder = official_folder(tmp_path, "main/humanoid_walk/medium_expert/84px")
    write_hdf5(folder, flat(episodes, step_dtype), name="{}_humanoid_walk.hdf5")
    made = do_import(folder, tmp_path, "humanoid-walk/medexp-6px")
    assert_holds(made, episodes)


def test_imported_set_opens_as_source_vd4rl(tmp_path):
    folder = official_folder(tmp_path, "main/walker_walk/medium/64px")
    write_npz(folder, [official_episode(8)])
    do_import(folder, tmp_path, "walker-walk/medium-6px")
    args = argparse.Namespace(dataset="medium", source="vd4rl", task="walker-walk", data_dir=str(tmp_path / "sets"),
                              transitions=None, data_seed=0)  # fmt: skip
    dataset = common.open_dataset(args, size=SIZE)
    assert (dataset.num_transitions, dataset.source, dataset.render) == (8, "vd4rl", "reference")


@pytest.mark.parametrize(("path", "flags", "expected"), [
    ("main/walker_walk/medium_expert/84px", {}, ("walker-walk", "medexp")),
    ("main/humanoid_walk/expert", {}, ("humanoid-walk", "expert")),
    ("anywhere", {"task": "walker-walk", "name": "mine"}, ("walker-walk", "mine")),
    ("multitask/walker_walk/random/64px", {"name": "heavy"}, ("walker-walk", "heavy")),
])  # fmt: skip
def test_names(path, flags, expected):
    assert vd4rl.names_from(Path(path), **({"task": None, "name": None} | flags)) == expected


@pytest.mark.parametrize(("path", "flag"), [
    ("main/walker_walk/medium_rare/84px", "--name"),
    ("main/hopper_hop/medium/84px", "--task"),
    ("distracting/walker_walk/random/64px", "--name"),
])  # fmt: skip
def test_names_that_cannot_be_told(path, flag):
    with pytest.raises(UserError, match=flag):
        vd4rl.names_from(Path(path), None, None)


def test_a_folder_of_both_kinds_or_none_is_refused(tmp_path):
    folder = official_folder(tmp_path)
    with pytest.raises(UserError, match=r"0 \*\.npz, 0 \*\.hdf5"):
        do_import(folder, tmp_path)
    write_npz(folder, [official_episode(4)])
    write_hdf5(folder, flat([official_episode(4)]))
    with pytest.raises(UserError, match=r"1 \*\.npz, 1 \*\.hdf5"):
        do_import(folder, tmp_path)


# ---- quirk 1: flags longer than the frames ----


def test_500_rows_with_501_flags(tmp_path, capsys):
    episode = official_episode(500, size=2)
    short = {key: array[:500] if key in vd4rl.NPZ_ARRAYS else array for key, array in episode.items()}
    folder = official_folder(tmp_path, "main/humanoid_walk/medium_replay/64px")
    write_npz(folder, [episode, short])
    made = do_import(folder, tmp_path, "humanoid-walk/mixed-2px")
    assert_holds(made, [episode, short])
    assert np.load(made / "episode.npy").tolist() == [0, 501]
    assert json.loads((made / "meta.json").read_text())["transitions"] == 999
    printed = capsys.readouterr().out
    assert re.search(r"500 rows of image, 501 of is_last: .*20220602T120000-00000001-501\.npz", printed)
    assert re.search(r"other than 500 transitions: 20220602\S+ row 0: 499\n", printed)


def test_flags_shorter_than_the_frames_stop(tmp_path):
    folder = official_folder(tmp_path)
    episode = official_episode(6)
    [file] = write_npz(folder, [episode | {"is_last": episode["is_last"][:4]}])
    with pytest.raises(UserError, match=f"{file.name}: 7 rows of image, but only 4 of is_last"):
        do_import(folder, tmp_path)


def test_arrays_of_different_lengths_stop(tmp_path):
    folder = official_folder(tmp_path)
    episode = official_episode(6)
    [file] = write_npz(folder, [episode | {"reward": episode["reward"][:-1]}])
    with pytest.raises(UserError, match=f"{file.name}: arrays differ in length.*'reward': 6"):
        do_import(folder, tmp_path)


# ---- quirk 2: shards cut inside an episode ----


def test_shards_of_array_split_are_joined_in_natural_order(tmp_path, capsys):
    episodes = [official_episode(6, seed) for seed in range(9)]  # 63 rows
    cuts = np.cumsum([len(part) for part in np.array_split(np.zeros(63), 12)])[:-1].tolist()
    folder = official_folder(tmp_path)
    files = write_hdf5(folder, flat(episodes), cuts)
    assert len(files) == 12  # "10.hdf5" < "2.hdf5" as text
    assert_holds(do_import(folder, tmp_path), episodes)
    assert "cut by the end of a shard, joined: 0.hdf5 row 0" in capsys.readouterr().out


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_any_cut_gives_the_same_episodes(tmp_path_factory, lengths, data):
    episodes = [official_episode(length, seed, size=2) for seed, length in enumerate(lengths)]
    rows = sum(lengths) + len(lengths)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=6)))  # equal ones make empty shards
    files = write_hdf5(tmp_path_factory.mktemp("cut"), flat(episodes), cuts)
    found = read_all(files)
    assert [len(e.where) for e in found] == [length + 1 for length in lengths]
    for episode, original in zip(found, episodes):
        np.testing.assert_array_equal(episode.image, original["image"])
        np.testing.assert_array_equal(episode.action, original["action"])


@pytest.mark.parametrize(("missing", "message"), [
    (0, r"1\.hdf5 row 0: step_type 1, but an episode should begin here"),
    (1, r"2\.hdf5: 0\.hdf5 ends inside an episode"),
    (2, r"1\.hdf5: 4 rows from 1\.hdf5 row 2 on have no end"),
])  # fmt: skip
def test_a_missing_shard_is_left_over_rows(tmp_path, missing, message):
    """Shards of 6 rows, episodes of 8: without shard 1 the pieces left would look like one whole episode of 8."""
    episodes = [official_episode(7, 1), official_episode(7, 2), official_episode(1, 3)]
    folder = official_folder(tmp_path)
    files = write_hdf5(folder, flat(episodes), [6, 12])
    files[missing].unlink()
    with pytest.raises(UserError, match=message):
        do_import(folder, tmp_path)
    assert not list(tmp_path.glob("sets/**/meta.json"))


def test_rows_lost_inside_a_shard_stop(tmp_path):
    whole = flat([official_episode(5), official_episode(5)])
    arrays = {key: np.delete(array, [5, 6], 0) for key, array in whole.items()}
    files = write_hdf5(official_folder(tmp_path), arrays)  # 0 1 1 1 1 | 1 1 1 1 2: one end and one beginning are gone
    arrays["step_type"][4] = 0
    with pytest.raises(UserError, match="no end"):
        read_all(write_hdf5(tmp_path, {key: array[:7] for key, array in arrays.items()}))
    write_hdf5(files[0].parent, arrays)
    with pytest.raises(UserError, match=r"0\.hdf5 row 4: step_type 0, but an episode should go on here"):
        read_all(files)


@pytest.mark.parametrize(("before", "after", "expected"), [
    ("9.hdf5", "10.hdf5", True), ("0_walker_walk.hdf5", "1_walker_walk.hdf5", True), ("s1-84.hdf5", "s2-84.hdf5", True),
    ("1.hdf5", "3.hdf5", False), ("2.hdf5", "1.hdf5", False), ("a.hdf5", "b.hdf5", False),
    ("1-1.hdf5", "2-2.hdf5", False), ("1.hdf5", "2_x.hdf5", False),
])  # fmt: skip
def test_follows(before, after, expected):
    assert vd4rl.follows(Path(before), Path(after)) is expected


# ---- quirk 3: 64 px enlarged to 84 px ----


def enlarge(frame: np.ndarray) -> np.ndarray:
    """(64, 64, 3) -> (84, 84, 3) uint8: bicubic by OpenCV's definition, pixel by pixel along each axis."""
    out = frame.astype(np.float64)
    for axis in (0, 1):
        lines = np.moveaxis(out, axis, 0)
        result = np.empty((84, *lines.shape[1:]))
        for i in range(84):
            base, x = divmod((i + 0.5) * 64 / 84 - 0.5, 1)
            w0 = -0.75 * (x + 1) ** 3 + 3.75 * (x + 1) ** 2 - 6 * (x + 1) + 3
            w1 = 1.25 * x**3 - 2.25 * x**2 + 1
            w2 = 1.25 * (1 - x) ** 3 - 2.25 * (1 - x) ** 2 + 1
            taps = [lines[min(max(int(base) + k, 0), 63)] for k in (-1, 0, 1, 2)]
            result[i] = np.tensordot([w0, w1, w2, 1 - w0 - w1 - w2], taps, 1)
        out = np.moveaxis(result, 0, axis)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def rendered() -> dict[int, np.ndarray]:
    """A frame (S, S, 3) of walker-walk for S = 64, 84."""
    frames = {}
    for size in (64, 84):
        env = common.make_env("walker-walk", size=size, frame_stack=1, render="reference")
        frames[size] = env.reset(seed=1)[0].transpose(1, 2, 0)
        env.close()
    return frames


def test_enlarged_frames_are_told_from_native_ones(rendered):
    assert 0.2 < vd4rl.beyond_cubic(enlarge(rendered[64])[None]) < 0.35  # rounding: 1 / sqrt(12) = 0.29
    assert vd4rl.beyond_cubic(rendered[84][None]) > 3
    assert np.isnan(vd4rl.beyond_cubic(np.zeros((1, 84, 84, 3), np.uint8)))  # nothing to judge


@pytest.mark.parametrize("native", [True, False])
def test_import_says_whether_84_px_seem_enlarged(tmp_path, capsys, rendered, native):
    frame = rendered[84] if native else enlarge(rendered[64])
    folder = official_folder(tmp_path, "main/walker_walk/random/84px")
    write_hdf5(folder, flat([official_episode(2, size=84) | {"image": np.stack([frame] * 3)}]))
    do_import(folder, tmp_path, "walker-walk/random-84px")
    printed = capsys.readouterr().out
    assert ("ENLARGED" in printed) is not native
    assert ("not enlarged that way; other ways are not checked" in printed) is native


# ---- quirk 4: old files, other keys ----


def test_missing_is_terminal_is_derived_and_further_keys_are_named(tmp_path, capsys):
    old = official_episode(4, 1, terminal=True)
    del old["is_terminal"], old["is_first"]
    states = official_episode(4, 2)
    folder = official_folder(tmp_path)
    write_npz(folder, [old, states | {"height": np.zeros(5), "velocity": np.zeros((5, 9))}, official_episode(4, 3)])
    made = do_import(folder, tmp_path)
    assert_holds(made, [old, states, official_episode(4, 3)])
    assert np.load(made / "discount.npy").tolist() == [1, 1, 1, 1, 0] + [1] * 10
    printed = capsys.readouterr().out
    assert "no is_terminal, derived from discount == 0: 20220601T120000-00000000-501.npz\n" in printed
    assert "no is_first: 20220601T120000-00000000-501.npz\n" in printed
    assert "further keys, not imported (height, velocity): 20220602T120000-00000001-501.npz\n" in printed


@pytest.mark.parametrize("key", ["image", "action", "reward", "discount"])
def test_a_missing_array_stops(tmp_path, key):
    episode = official_episode(4)
    del episode[key]
    [file] = write_npz(official_folder(tmp_path), [episode])
    with pytest.raises(UserError, match=f"{file.name}: has no {key}"):
        do_import(file.parent, tmp_path)


def test_a_shard_without_step_type_stops(tmp_path):
    arrays = flat([official_episode(4)])
    del arrays["step_type"]
    with pytest.raises(UserError, match=r"0\.hdf5: has no step_type"):
        read_all(write_hdf5(tmp_path, arrays))


# ---- quirk 5: unreadable files, and sets beyond 1,000,000 rows ----


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text"])
@pytest.mark.parametrize("kind", ["npz", "hdf5"])
def test_an_unreadable_file_is_named_and_stops(tmp_path, kind, damage):
    folder = official_folder(tmp_path)
    episodes = [official_episode(20, seed, size=16) for seed in range(3)]
    files = write_npz(folder, episodes) if kind == "npz" else [
        write_hdf5(folder, flat([e]), name=f"{i}.hdf5")[0] for i, e in enumerate(episodes)]  # fmt: skip
    content = bytearray(files[1].read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(byte ^ 255 for byte in content[middle : middle + 40])
    damaged = {"empty": b"", "cut": content[:middle], "flipped": bytes(content), "text": b"no such file"}[damage]
    files[1].write_bytes(damaged)
    with pytest.raises(UserError, match=f"{files[1].name}: cannot be read") as caught:
        do_import(folder, tmp_path, task="walker-walk", name="x")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("sets/**/meta.json"))


def test_the_command_ends_with_one_line_and_a_status(tmp_path):
    folder = official_folder(tmp_path)
    (folder / "20220601T120000-0-501.npz").write_bytes(b"PK")
    result = run_python("data/vd4rl.py", "import", folder, "--data-dir", tmp_path / "sets")
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*20220601T120000-0-501\.npz: cannot be read.*\n", result.stderr)


def test_no_stop_at_a_million_rows(tmp_path, capsys):
    rows = 50_101
    rng = np.random.default_rng(0)
    episode = {"observation": rng.integers(0, 256, (rows, 3, 1, 1), np.uint8), "discount": np.ones(rows)}
    episode |= {"action": rng.uniform(-1, 1, (rows, 1)), "reward": np.full(rows, 0.5)}
    episode["action"][0], episode["reward"][0] = 0, 0
    step_type = np.r_[0, np.ones(rows - 2), 2]
    folder = official_folder(tmp_path)
    for i in range(21):
        with h5py.File(folder / f"{i}.hdf5", "w") as shard:
            for key, array in (episode | {"step_type": step_type}).items():
                shard.create_dataset(key, data=array)
    made = do_import(folder, tmp_path, "walker-walk/random-1px")
    dataset = Dataset(made)
    assert (dataset.num_episodes, dataset.num_transitions) == (21, 1_052_100)
    assert len(np.load(made / "reward.npy")) == 21 * rows > 1_000_000
    assert dataset.mean_return == 0.5 * (rows - 1)
    assert "actions of an earlier episode again: 1.hdf5 row 0 = 0.hdf5 row 0" in capsys.readouterr().out


def test_a_set_is_never_held_in_memory(tmp_path):
    episodes = [official_episode(20, seed, size=80) for seed in range(30)]  # 12 MB of frames
    folder = official_folder(tmp_path)
    write_hdf5(folder, flat(episodes), [101, 300])
    tracemalloc.start()
    do_import(folder, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one = episodes[0]["image"].nbytes
    assert peak < 10 * one < 30 * one / 2


# ---- quirk 6: the number in a file's name ----


def test_lengths_come_from_the_arrays(tmp_path):
    folder = official_folder(tmp_path)
    lengths = {"20220601T000000-a-500.npz": 5, "20220602T000000-b-501.npz": 7, "20220603T000000-c-3.npz": 6}
    for name, length in lengths.items():
        np.savez(folder / name, **official_episode(length))
    made = do_import(folder, tmp_path)
    assert np.diff(np.append(np.load(made / "episode.npy"), 21)).tolist() == [6, 8, 7]


# ---- quirk 7: a true terminal ----


@pytest.mark.parametrize("kind", ["npz", "hdf5"])
def test_a_terminal_discount_of_zero_stays(tmp_path, capsys, kind):
    episodes = [official_episode(4, 1, terminal=True), official_episode(4, 2)]
    folder = official_folder(tmp_path)
    write_npz(folder, episodes) if kind == "npz" else write_hdf5(folder, flat(episodes))
    made = do_import(folder, tmp_path)
    assert np.load(made / "discount.npy").tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    assert "terminal episodes, their last discount of 0 kept: " in capsys.readouterr().out


@pytest.mark.parametrize("says_so", ["is_terminal", "discount"])
def test_is_terminal_and_discount_that_disagree(tmp_path, capsys, says_so):
    episode = official_episode(4)
    episode[says_so][-1] = {"is_terminal": True, "discount": 0.0}[says_so]
    folder = official_folder(tmp_path)
    write_npz(folder, [episode])
    made = do_import(folder, tmp_path)
    assert np.load(made / "discount.npy").tolist() == [1, 1, 1, 1, 0]
    assert "is_terminal and discount disagree" in capsys.readouterr().out


@pytest.mark.parametrize(("row", "value"), [(2, 0.0), (2, 0.5), (4, 0.5), (3, np.nan)])
def test_a_discount_that_no_set_can_hold_stops(tmp_path, row, value):
    episode = official_episode(4)
    episode["discount"][row] = value
    [file] = write_hdf5(official_folder(tmp_path), flat([official_episode(4), episode]))
    with pytest.raises(UserError, match=rf"0\.hdf5 row {5 + row}: discount {value:g}"):
        do_import(file.parent, tmp_path)


# ---- values ----


@pytest.mark.parametrize(("key", "value"), [("action", 1.5), ("action", np.nan), ("reward", np.nan)])
@pytest.mark.parametrize("kind", ["npz", "hdf5"])
def test_bad_values_are_named_with_file_and_row(tmp_path, kind, key, value):
    episodes = [official_episode(4, 1), official_episode(4, 2)]
    episodes[1][key][3] = value
    folder = official_folder(tmp_path)
    if kind == "npz":
        place = f"{write_npz(folder, episodes)[1].name} row 3"
    else:  # shards of 7 and 3 rows
        write_hdf5(folder, flat(episodes), [7])
        place = "1.hdf5 row 1"
    with pytest.raises(UserError, match=f"/{re.escape(place)}: {key} not finite"):
        do_import(folder, tmp_path)


def test_constant_frames_are_imported_and_named(tmp_path, capsys):
    episodes = [official_episode(4, 1), official_episode(4, 2)]
    episodes[1]["image"][2] = 77
    folder = official_folder(tmp_path)
    write_hdf5(folder, flat(episodes))
    made = do_import(folder, tmp_path)
    assert_holds(made, episodes)
    assert "frame of one value: 0.hdf5 row 7\n" in capsys.readouterr().out
    assert list(vd4rl.findings(made)) == [f"{made}: frame of one value: row 7"]


@pytest.mark.parametrize("departure", [True, False])
def test_departure_rows_and_what_a_first_row_holds_are_named(tmp_path, capsys, departure):
    episode = official_episode(4)
    episode["reward"][0] = np.nan  # what some writers leave where nothing was earned yet
    if departure:
        episode["action"], episode["reward"] = np.roll(episode["action"], -1, 0), np.arange(5) / 5 + 0.1
    folder = official_folder(tmp_path)
    write_npz(folder, [episode])
    made = do_import(folder, tmp_path)
    assert not np.load(made / "action.npy")[0].any() and np.load(made / "reward.npy")[0] == 0
    assert "these are no arrival rows: 20220601T120000-00000000-501.npz row 0\n" in capsys.readouterr().out


def test_two_episodes_in_one_npz_stop(tmp_path):
    both = {key: np.concatenate([a, a]) for key, a in official_episode(4).items()}
    [file] = write_npz(official_folder(tmp_path), [both])
    with pytest.raises(UserError, match="expected one whole episode"):
        do_import(file.parent, tmp_path)


@pytest.mark.parametrize("change", [
    {"image": np.zeros((5, 6, 5, 3), np.uint8)}, {"image": np.zeros((5, 3, 6, 6), np.uint8)},
    {"image": np.zeros((5, 6, 6, 9), np.uint8)}, {"image": np.zeros((5, 6, 6, 3), np.float32)},
    {"image": np.zeros((5, 6, 6), np.uint8)}, {"reward": np.zeros((5, 1))}, {"action": np.zeros((5, 3), np.float32)},
    {key: array[:1] for key, array in official_episode(4).items()},
    {key: array[:0] for key, array in official_episode(4).items()},
])  # fmt: skip
def test_shapes_that_do_not_fit_stop(tmp_path, change):
    folder = official_folder(tmp_path)
    write_npz(folder, [official_episode(4, 1), official_episode(4, 2) | change])
    with pytest.raises(UserError, match=str(folder)):
        do_import(folder, tmp_path)


# ---- counts ----


def test_counts_beside_the_published_ones(tmp_path, capsys):
    folder = official_folder(tmp_path)
    write_npz(folder, [official_episode(1, seed, size=2) for seed in range(3)])
    do_import(folder, tmp_path)
    assert "published: 200 episodes; 197 ARE MISSING" in capsys.readouterr().out
    files = [folder / f"2022-{i}-2.npz" for i in range(197)]
    for i, file in enumerate(files):
        np.savez(file, **official_episode(1, 3 + i, size=2))
    do_import(folder, tmp_path / "again")
    printed = capsys.readouterr().out
    assert "200 episodes, 200 transitions" in printed and "published: 200 episodes; none is missing" in printed
    assert "and 195 more\n" in printed  # all of them shorter than 500 transitions


@pytest.mark.parametrize(("task", "theirs", "published"), [
    ("walker_walk", "medium_replay", 200), ("cheetah_run", "medium_replay", 400), ("cheetah_run", "expert", 200),
    ("humanoid_walk", "medium_replay", 1200), ("humanoid_walk", "medium_expert", 400),
])  # fmt: skip
def test_published_counts(tmp_path, capsys, task, theirs, published):
    folder = official_folder(tmp_path, f"main/{task}/{theirs}/64px")
    write_npz(folder, [official_episode(2, size=2)])
    do_import(folder, tmp_path)
    assert f"published: {published:,} episodes; {published - 1:,} ARE MISSING" in capsys.readouterr().out


# ---- interrupted, and repeated ----


def test_an_interrupted_import_continues(tmp_path, monkeypatch, capsys):
    episodes = [official_episode(5, seed) for seed in range(6)]
    folder = official_folder(tmp_path)
    write_npz(folder, episodes)
    add, added = DatasetWriter.add, []

    def add_or_stop(writer, *words, **flags):
        if len(added) == 4:
            raise KeyboardInterrupt
        added.append(add(writer, *words, **flags))

    monkeypatch.setattr(DatasetWriter, "add", add_or_stop)
    with pytest.raises(KeyboardInterrupt):
        do_import(folder, tmp_path)
    assert not list(tmp_path.glob("sets/**/meta.json"))
    added.append("counts on from 5")
    made = do_import(folder, tmp_path)
    assert len(added) == 7  # two more episodes, not six
    assert_holds(made, episodes)
    assert re.search("other than 500 transitions: (.*, ){4}.* and 1 more", capsys.readouterr().out)  # all six reported
    with pytest.raises(UserError, match="there already"):
        do_import(folder, tmp_path)


def test_other_files_start_anew(tmp_path):
    first, second = official_episode(5, 1), official_episode(5, 2)
    folder = official_folder(tmp_path)
    files = write_npz(folder, [first, second])
    files[1].write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        do_import(folder, tmp_path)
    write_npz(folder, [second])  # now the first file is another one
    files[1].unlink()
    assert_holds(do_import(folder, tmp_path), [second])


# ---- export ----


def standard_parts(root: Path) -> Path:
    """A medexp whose parts hold 3 and 2 episodes, the last of them terminal."""
    for name, lengths, terminal in (("medium", (4, 4, 6), False), ("expert", (5, 3), True)):
        write_set(root / name, lengths, size=8, action_dim=3, terminal_last=terminal, seed=len(name))
    parts = [common.read_meta(root / name) for name in ("medium", "expert")]
    returns = np.concatenate([meta["episode_returns"] for meta in parts])
    meta = {"parts": ["../medium", "../expert"], "name": "medexp", "returns": common.return_statistics(returns)}
    (root / "medexp").mkdir()
    (root / "medexp" / "meta.json").write_text(json.dumps(meta))
    return root / "medexp"


def joined(path: Path) -> dict[str, np.ndarray]:
    parts = Dataset(path).parts
    starts = np.cumsum([0, *(part.meta["rows"] for part in parts[:-1])])
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS[:4]}
    return arrays | {"episode": np.concatenate([part.episode + start for part, start in zip(parts, starts)])}


@pytest.mark.parametrize("kind", ["npz", "hdf5"])
def test_export_and_import_give_the_same_bytes(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(vd4rl, "SHARD", 2)
    source = standard_parts(tmp_path)
    out = tmp_path / "out" / "main" / "walker_walk" / "medium_expert" / "64px"
    vd4rl.export(source, out, kind)
    made = do_import(out, tmp_path, "walker-walk/medexp-8px")
    again, original = load(made), joined(source)
    for name in ARRAYS:
        np.testing.assert_array_equal(again[name], original[name])
    assert again["episode"].tolist() == [0, 5, 10, 17, 23]
    assert np.flatnonzero(again["discount"] == 0).tolist() == [26]
    assert Dataset(made).num_transitions == 22


def test_export_npz_layout(tmp_path):
    source = write_set(tmp_path / "set", (4, 3), size=8, action_dim=3, terminal_last=True)
    vd4rl.export(source, tmp_path / "out", "npz")
    files = sorted((tmp_path / "out").iterdir())
    assert [re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{32}-(\d+)\.npz", file.name)[1] for file in files] == ["5", "4"]
    with np.load(files[1]) as archive:
        arrays = dict(archive)
    kinds = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    assert kinds == {
        "image": ("uint8", (4, 8, 8, 3)), "action": ("float32", (4, 3)),
        "reward": ("float64", (4,)), "discount": ("float64", (4,)),
        "is_first": ("bool", (4,)), "is_last": ("bool", (4,)), "is_terminal": ("bool", (4,)),
    }  # fmt: skip
    assert arrays["is_first"].tolist() == [True, False, False, False]
    assert arrays["is_last"].tolist() == arrays["is_terminal"].tolist() == [False, False, False, True]
    assert arrays["discount"].tolist() == [1, 1, 1, 0]
    np.testing.assert_array_equal(arrays["image"][2], np.load(source / "image.npy")[7].transpose(1, 2, 0))
    assert arrays["action"][0].tolist() == [0, 0, 0] and arrays["reward"][0] == 0


def test_export_hdf5_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(vd4rl, "SHARD", 2)
    source = write_set(tmp_path / "set", (4, 1, 3), size=8, action_dim=3)
    vd4rl.export(source, tmp_path / "out", "hdf5")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["0000.hdf5", "0001.hdf5"]
    with h5py.File(tmp_path / "out" / "0000.hdf5") as shard:
        kinds = {name: (array.dtype.name, array.shape) for name, array in shard.items()}
        assert shard["step_type"][:].tolist() == [0, 1, 1, 1, 2, 0, 2]
        np.testing.assert_array_equal(shard["observation"][:], np.load(source / "image.npy")[:7])
        np.testing.assert_array_equal(shard["reward"][:], np.load(source / "reward.npy")[:7])
    assert kinds == {
        "observation": ("uint8", (7, 3, 8, 8)), "action": ("float32", (7, 3)), "reward": ("float64", (7,)),
        "discount": ("float64", (7,)), "step_type": ("float64", (7,)),
    }  # fmt: skip


def test_export_never_overwrites(tmp_path, monkeypatch):
    source = write_set(tmp_path / "set", (4, 3))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists"):
        vd4rl.export(source, tmp_path / "out", "npz")
    monkeypatch.setattr(np, "savez_compressed", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left")))
    with pytest.raises(OSError, match="No space"):
        vd4rl.export(source, tmp_path / "other", "npz")
    assert not (tmp_path / "other").exists()  # what is unfinished does not bear the name
    with pytest.raises(UserError, match=r"other\.unfinished exists"):
        vd4rl.export(source, tmp_path / "other", "npz")


# ---- check ----


@pytest.fixture
def healthy(tmp_path) -> Path:
    path = write_set(tmp_path / "set", (7, 5), size=8, action_dim=3)
    assert list(vd4rl.findings(path)) == []
    return path


def change(path: Path, name: str, row, value, rehash: bool = True) -> None:
    """array[row] = value; with `rehash` meta.json is made to agree, so that the hash cannot give it away."""
    array = np.load(path / f"{name}.npy")
    array[row] = value
    np.save(path / f"{name}.npy", array)
    if rehash:
        meta = {name: value for name, value in common.read_meta(path).items() if name != "sha256"}
        common.write_meta(path, meta)


@pytest.mark.parametrize("name", ARRAYS)
def test_check_finds_a_flipped_bit(healthy, name):
    file = healthy / f"{name}.npy"
    content = bytearray(file.read_bytes())
    content[-1 if name != "episode" else -8] ^= 1  # episode: 8 becomes 9
    file.write_bytes(content)
    assert f"{file}: another sha256 than in meta.json; it changed after it was written" in vd4rl.findings(healthy)


@pytest.mark.parametrize("name", ARRAYS)
def test_check_finds_a_truncated_and_a_missing_file(healthy, name):
    file = healthy / f"{name}.npy"
    for content in (file.read_bytes()[:-3], b""):
        file.write_bytes(content)
        [line] = set(vd4rl.findings(healthy))
        assert line.startswith(f"{file}: missing, truncated")
    file.unlink()
    [line] = set(vd4rl.findings(healthy))
    assert line.startswith(f"{file}: missing, truncated")


@pytest.mark.parametrize(("name", "row", "value", "finding"), [
    ("action", 3, np.nan, "action not finite or outside [-1, 1]: row 3"),
    ("action", (9, 1), -1.01, "action not finite or outside [-1, 1]: row 9"),
    ("reward", 5, np.inf, "reward not finite: row 5"),
    ("image", [2, 3, 10], 255, "frame of one value: row 2, 3, 10"),
    ("image", slice(0, 7), 0, "frame of one value: row 0, 1, 2, 3, 4 and 2 more"),
    ("action", (8, 0), 0.5, "action in an episode's first row: no arrival rows: row 8"),
    ("reward", 8, 0.5, "reward in an episode's first row: no arrival rows: row 8"),
    ("discount", 4, 0, "discount neither 1 nor, in an episode's last row, 0: row 4"),
    ("discount", 7, 0.5, "discount neither 1 nor, in an episode's last row, 0: row 7"),
    ("discount", 8, 0, "discount neither 1 nor, in an episode's last row, 0: row 8"),
    ("discount", 7, np.nan, "discount neither 1 nor, in an episode's last row, 0: row 7"),
])  # fmt: skip
def test_check_finds_wrong_values_that_hashes_agree_with(healthy, name, row, value, finding):
    with np.errstate(invalid="ignore"):
        change(healthy, name, row, value)
        assert list(vd4rl.findings(healthy)) == [f"{healthy}: {finding}"]


@pytest.mark.parametrize(("value", "wrong"), [(2.5, True), (-0.1, True), (2.0, False)])
def test_check_knows_the_range_of_rewards_in_the_three_tasks(tmp_path, value, wrong):
    with DatasetWriter(tmp_path / "set", 4, 1, task="walker-walk") as writer:
        frames = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), np.uint8)
        writer.add(frames, np.zeros((3, 1)), [0.5, value, 1.0])
    expected = [f"{tmp_path / 'set'}: reward outside [0, 2]: row 2"] * wrong
    assert list(vd4rl.findings(tmp_path / "set")) == expected


def test_a_last_discount_of_zero_is_no_finding(tmp_path):
    assert list(vd4rl.findings(write_set(tmp_path / "set", (4, 3), terminal_last=True))) == []


@pytest.mark.parametrize(("key", "value", "finding"), [
    ("transitions", 14, "14 transitions are not its rows less its episodes"),
    ("rows", 15, "14 rows"), ("episodes", 3, "2 rows"), ("size", 9, "size 9"),
    ("episode_returns", [1.0, 2.0], "episode_returns are not the sums of reward.npy"),
    ("returns", common.return_statistics(np.zeros(2)), "returns are not those of the arrays"),
])  # fmt: skip
def test_check_finds_wrong_counts(healthy, key, value, finding):
    meta = common.read_meta(healthy) | {key: value}
    (healthy / "meta.json").write_text(json.dumps(meta))
    lines = set(vd4rl.findings(healthy))
    assert len(lines) == 1 and finding in lines.pop()


@pytest.mark.parametrize("key", ["sha256", "rows", "task", "episode_returns", "returns", "render"])
def test_check_finds_a_meta_json_that_lacks_something(healthy, key):
    meta = common.read_meta(healthy)
    del meta[key]
    (healthy / "meta.json").write_text(json.dumps(meta))
    (finding,) = set(vd4rl.findings(healthy))
    opening = f"{healthy}/meta.json cannot be read (it lacks {key})"  # what Dataset needs is missed as it opens
    assert opening in finding or finding == f"{healthy}/meta.json: has no '{key}'"


def test_check_finds_a_missing_and_a_broken_meta_json(healthy, tmp_path):
    (healthy / "meta.json").write_text("{")
    assert [line for line in vd4rl.findings(healthy) if "meta.json cannot be read" in line]
    (healthy / "meta.json").unlink()
    assert [line for line in vd4rl.findings(healthy) if "unfinished set (no meta.json)" in line]
    assert [line for line in vd4rl.findings(tmp_path / "nowhere") if "does not exist" in line]


def test_check_of_a_set_with_parts(tmp_path, capsys):
    path = standard_parts(tmp_path)
    vd4rl.check(path)
    assert capsys.readouterr().out == f"{path}: nothing is wrong\n"
    change(tmp_path / "expert", "image", 2, 9)
    with pytest.raises(UserError, match="1 finding, listed above"):
        vd4rl.check(path)
    assert capsys.readouterr().out == f"{tmp_path}/expert: frame of one value: row 2\n"
    change(tmp_path / "medium", "reward", 3, 1.75, rehash=False)
    with pytest.raises(UserError, match="5 findings"):
        vd4rl.check(path)
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/medium/reward.npy: another sha256 than in meta.json; it changed after it was written",
        f"{tmp_path}/medium/meta.json: episode_returns are not the sums of reward.npy",
        f"{tmp_path}/medium/meta.json: returns are not those of the arrays",
        f"{tmp_path}/expert: frame of one value: row 2",
        f"{path}/meta.json: returns are not those of the arrays",
    ]
    (tmp_path / "medium" / "meta.json").unlink()
    assert [line for line in vd4rl.findings(path) if f"{tmp_path}/medium is an unfinished set" in line]


def test_check_finds_a_part_that_was_made_again(tmp_path):
    path = standard_parts(tmp_path)
    change(tmp_path / "medium", "reward", [1, 2, 3], 0.01)
    assert list(vd4rl.findings(path)) == [f"{path}/meta.json: returns are not those of the arrays"]


def test_check_finds_parts_that_do_not_belong_together(tmp_path):
    path = standard_parts(tmp_path)
    for file in (tmp_path / "expert").iterdir():
        file.unlink()
    write_set(tmp_path / "expert", (5, 3), size=9, action_dim=3)
    assert len(lines := list(vd4rl.findings(path))) == 1 and "another task, size or render quality" in lines[0]


def test_status_of_the_check_command(healthy):
    fine = run_python("data/vd4rl.py", "check", healthy)
    assert (fine.returncode, fine.stdout, fine.stderr) == (0, f"{healthy}: nothing is wrong\n", "")
    change(healthy, "action", 3, np.nan, rehash=False)
    wrong = run_python("data/vd4rl.py", "check", healthy)
    assert wrong.returncode == 1
    assert wrong.stdout.splitlines() == [
        f"{healthy}/action.npy: another sha256 than in meta.json; it changed after it was written",
        f"{healthy}: action not finite or outside [-1, 1]: row 3",
    ]
    assert wrong.stderr == f"error: {healthy}: 2 findings, listed above\n"


# ---- download ----


@pytest.fixture
def hub(monkeypatch):
    """A huggingface_hub that writes `episodes` files where the mirror's pattern puts them."""
    module = types.ModuleType("huggingface_hub")
    module.episodes, module.calls, module.error = 2, [], None

    def snapshot_download(repo_id, *, repo_type, allow_patterns, local_dir):
        module.calls.append((repo_id, repo_type, allow_patterns))
        if module.error:
            raise module.error
        folder = Path(local_dir) / Path(allow_patterns[0]).parent
        folder.mkdir(parents=True)
        write_npz(folder, [official_episode(3, seed) for seed in range(module.episodes)])
        return local_dir

    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_download_says_what_the_mirror_lacks_and_import_reads_it(tmp_path, capsys, hub):
    vd4rl.main(["download", "cheetah-run", "mixed", "--out", str(tmp_path / "raw")])
    inside = "vd4rl/main/cheetah_run/medium_replay/64px"
    assert hub.calls == [("conglu/vd4rl", "dataset", [f"{inside}/*.npz"])]
    printed = capsys.readouterr().out
    for fact in ("64 px alone", "100 episodes (50,000 transitions)", "not to reproduce the paper",
                 "https://drive.google.com/drive/folders/15HpW6nlJexJP5A4ygGk-1plqt9XdcWGI",
                 "2 of 400 published episodes"):  # fmt: skip
        assert fact in printed
    assert printed.endswith(f"python data/vd4rl.py import {tmp_path / 'raw' / inside}\n")
    vd4rl.main(["import", str(tmp_path / "raw" / inside), "--data-dir", str(tmp_path / "sets")])
    assert Dataset(tmp_path / "sets/vd4rl/cheetah-run/mixed-6px").num_transitions == 6
    assert "398 ARE MISSING" in capsys.readouterr().out


def test_download_without_huggingface_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        vd4rl.download("walker-walk", "medium", tmp_path)
    assert "drive.google.com" in capsys.readouterr().out  # said all the same


def test_download_that_fails_or_finds_nothing(tmp_path, hub):
    hub.error = ConnectionError("no route\nto host")
    with pytest.raises(UserError, match="ConnectionError: no route to host; the same command continues"):
        vd4rl.download("walker-walk", "medium", tmp_path)
    hub.error, hub.episodes = None, 0
    with pytest.raises(UserError, match="nothing under vd4rl/main/walker_walk/medium/64px; use https://drive"):
        vd4rl.download("walker-walk", "medium", tmp_path)
