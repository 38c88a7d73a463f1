"""data/vd4rl.py on files in the official layouts, each known quirk among them, and on damaged sets."""

import contextlib
import json
import re
import sys
import types
from collections import defaultdict
from pathlib import Path

import collect
import h5py
import numpy as np
import official
import pytest
import vd4rl
from conftest import run_python, synthetic_episode, write_set
from hypothesis import given, settings
from hypothesis import strategies as st
from store import DatasetWriter, write_meta
from test_data import largest_file, load, meta

from common import Dataset, TransitionBuffer, UserError

SIZE, ACTIONS = 6, 2
FLAGS = {"task": "walker-walk", "name": "random"}


# ---- official files, as their own writers make them ----


def official_episode(length: int, seed: int = 0, size: int = SIZE, terminal: bool = False) -> dict[str, np.ndarray]:
    """The arrays of one npz file: length + 1 arrival rows."""
    row = np.arange(length + 1)
    image, action, reward = synthetic_episode(0, length, size, ACTIONS, np.random.default_rng([seed, length]))
    return {
        "image": image,
        "action": np.concatenate([np.zeros_like(action[:1]), action]),
        "reward": np.concatenate([[0.0], reward]),
        "discount": np.where(terminal & (row == length), 0.0, 1.0),
        "is_first": row == 0,
        "is_last": row == length,
        "is_terminal": terminal & (row == length),
    }


def write_npz(folder: Path, episodes: list[dict]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"2022060{i + 1}T120000-{i}-501.npz" for i in range(len(episodes))]
    for file, episode in zip(files, episodes):
        np.savez_compressed(file, **episode)
    return files


def flat(episodes: list[dict], step_dtype=np.float64) -> dict[str, np.ndarray]:
    """The arrays of an hdf5 file that holds whole episodes."""
    arrays = {key: np.concatenate([e[key] for e in episodes]) for key in ("action", "reward", "discount")}
    arrays["observation"] = np.concatenate([e["image"].transpose(0, 3, 1, 2) for e in episodes])
    steps = [np.r_[0, np.ones(len(e["action"]) - 2), 2] for e in episodes]
    return arrays | {"step_type": np.concatenate(steps).astype(step_dtype)}


def write_hdf5(folder: Path, arrays: dict, cuts: list[int] = ()) -> list[Path]:
    """Shards 0.hdf5, 1.hdf5, ..., cut before the rows `cuts`, wherever these are."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i}.hdf5" for i in range(len(cuts) + 1)]
    for i, file in enumerate(files):
        with h5py.File(file, "w") as shard:
            for key, array in arrays.items():
                shard.create_dataset(key, data=np.split(array, cuts)[i], compression="gzip")
    return files


def assert_holds(folder: Path, episodes: list[dict]) -> None:
    """The set in `folder` is exactly these official episodes, first rows of zeros."""
    stored, lengths = load(folder), [len(e["action"]) for e in episodes]
    np.testing.assert_array_equal(stored["episode"], np.cumsum([0, *lengths[:-1]]))
    images = np.concatenate([e["image"] for e in episodes]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(stored["image"], images)
    for name in ("action", "reward", "discount"):
        expected = np.concatenate([e[name] for e in episodes]).astype(np.float32)
        expected[stored["episode"]] = 1 if name == "discount" else 0
        np.testing.assert_array_equal(stored[name], expected)


def do_import(folder: Path, root: Path, made: str = "walker-walk/random-6px", **flags) -> Path:
    vd4rl.import_set(folder, data_dir=str(root / "sets"), **flags)
    return root / "sets" / "vd4rl" / made


def refused(folder: Path, root: Path, message: str) -> None:
    """The import ends with one line that names the folder, and writes nothing."""
    with pytest.raises(UserError, match=message) as error:
        do_import(folder, root, **FLAGS)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not (root / "sets").exists()


# ---- import ----


def test_import_npz(tmp_path, capsys):
    episodes = [official_episode(7, seed) for seed in (1, 2, 3)]
    write_npz(folder := tmp_path / "main/cheetah_run/medium_replay/64px", episodes)
    made = do_import(folder, tmp_path, "cheetah-run/mixed-6px")
    assert_holds(made, episodes)
    facts = json.loads((made / "meta.json").read_text())
    assert (facts["task"], facts["source"], facts["name"]) == ("cheetah-run", "vd4rl", "mixed-6px")
    assert (facts["size"], facts["render"], facts["mujoco"], facts["transitions"]) == (SIZE, "reference", None, 21)
    printed = capsys.readouterr().out
    assert "3 episodes, 21 transitions" in printed and "397 of 400 published episodes ARE MISSING" in printed
    numbers, returns = re.search(r"imported(.*)", printed)[1].split(), [e["reward"].sum() for e in episodes]
    np.testing.assert_allclose(list(map(float, numbers[:2])), [np.mean(returns), np.std(returns)], atol=0.06)
    assert "   191.2   144.6     2.5    48.3   191.9   303.4   473.8" in printed  # V-D4RL Table 5
    assert list(vd4rl.findings(made)) == []
    with pytest.raises(UserError, match="mixed-6px is there already; delete it"):
        do_import(folder, tmp_path)


def test_shards_are_joined_in_natural_order(tmp_path, capsys):
    """Also with lengths that no file name says, and step types in integers."""
    episodes = [official_episode(length, length) for length in (5, 9, 4, 6, 7)]  # 36 rows
    files = write_hdf5(tmp_path / "in", flat(episodes, np.uint8), list(range(3, 36, 3)))
    assert len(files) == 12  # "10.hdf5" < "2.hdf5" as text
    assert_holds(do_import(tmp_path / "in", tmp_path, **FLAGS), episodes)
    assert "cut by the end of a shard, joined: 0.hdf5 row 0" in capsys.readouterr().out


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_any_cut_gives_the_same_episodes(tmp_path_factory, lengths, data):
    episodes = [official_episode(length, seed, size=2) for seed, length in enumerate(lengths)]
    cuts = sorted(data.draw(st.lists(st.integers(0, sum(lengths) + len(lengths)), max_size=6)))  # also empty shards
    files = write_hdf5(tmp_path_factory.mktemp("cut"), flat(episodes), cuts)
    found = list(official.hdf5_episodes(files, defaultdict(list)))
    assert [len(e.where) for e in found] == [length + 1 for length in lengths]
    for episode, original in zip(found, episodes):
        np.testing.assert_array_equal(episode.image, original["image"])
        np.testing.assert_array_equal(episode.action, original["action"])


@pytest.mark.parametrize(("path", "flags", "expected"), [
    ("main/walker_walk/medium_expert/84px", (None, None), ("walker-walk", "medexp")),
    ("anywhere", ("walker-walk", "mine"), ("walker-walk", "mine")),
    ("multitask/walker_walk/random/64px", (None, "heavy"), ("walker-walk", "heavy")),
    ("main/walker_walk/medium_rare/84px", (None, None), "give --task and --name"),
    ("main/hopper_hop/medium/84px", (None, None), "give --task and --name"),
    ("distracting/walker_walk/random/64px", (None, None), "--name: "),
    ("anywhere", ("walker_walk", "mine"), "--task walker_walk: no such task .meant walker-walk"),
    ("main/walker_walk/random/64px", (None, "a/../../b"), "--name a/../../b: letters"),
])  # fmt: skip
def test_names(path, flags, expected):
    with contextlib.nullcontext() if isinstance(expected, tuple) else pytest.raises(UserError, match=expected):
        assert vd4rl.names_from(Path(path), *flags) == expected


def put(index: int, key: str, row, value):
    """A change of one array of episode `index`."""
    return lambda episodes: episodes[index][key].__setitem__(row, value)


def replaced(index: int, key: str, change):
    return lambda episodes: episodes[index].update({key: change(episodes[index][key])})


def instead(index: int, episode):
    """`episode` of all episodes in place of one."""
    return lambda episodes: episodes.__setitem__(index, episode(episodes))


def departure(episode: dict) -> dict:
    """Action and reward beside the image they were chosen in."""
    return episode | {key: np.roll(episode[key], -1, 0) for key in ("action", "reward")}


ODD = {  # name -> (change of three episodes of 4; what the report says); they are imported
    "flags too long": (replaced(1, "is_last", lambda a: np.r_[a, False]), "5 rows of image, 6 of is_last: .*-1-501"),
    "no is_terminal": (lambda es: es[1].pop("is_terminal"), "3 episodes, 12 transitions"),
    "further arrays": (lambda e: e[1].update(height=np.zeros(5)), "3 episodes"),
    "terminal": (instead(2, lambda es: official_episode(4, 2, terminal=True)), "of 0 kept: .*-2-501.* row 4"),
    "terminal flag alone": (put(1, "is_terminal", -1, True), "is_terminal and discount disagree.*-1-501"),
    "NaN before the first step": (put(0, "reward", 0, np.nan), "reward in a first row no number, dropped: .*-0-501"),
    "one departure": (instead(1, lambda es: departure(es[1])), "or reward in a first row, dropped: .*-1-501.npz row 0"),
    "constant frame": (put(1, "image", 2, 77), "frame of one value: .*-1-501.npz row 2"),
    "the same again": (instead(2, lambda es: es[0]), "actions of an earlier episode again: .*-2-.* = .*-0-"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_what_is_odd_is_imported_and_named(tmp_path, capsys, kind):
    change, message = ODD[kind]
    change(episodes := [official_episode(4, seed) for seed in range(3)])
    for file in write_npz(tmp_path / "in", episodes):
        file.with_name(f"._{file.name}").write_bytes(b"\x00\x05\x16\x07" + bytes(80))  # what macOS leaves beside files
    made = do_import(tmp_path / "in", tmp_path, **FLAGS)
    assert re.search(message, capsys.readouterr().out)
    for episode in episodes:
        if episode.get("is_terminal", np.zeros(1))[-1]:
            episode["discount"][-1] = 0
    assert_holds(made, episodes)
    TransitionBuffer(Dataset(made), 4)  # what is imported, training takes


IMPOSSIBLE = {  # name -> (change of three episodes of 4; what the one line says; layout, else both)
    "action NaN": (put(1, "action", 3, np.nan), "(-1-501.npz row 3|1.hdf5 row 1): action not finite"),
    "reward NaN": (put(1, "reward", 3, np.nan), "row [13]: reward not finite as float32"),
    "reward beyond float32": (put(1, "reward", 3, 1e39), "row [13]: reward not finite as float32"),
    "discount inside": (put(1, "discount", 2, 0.0), "row [02]: discount 0; a set can hold 1, and 0"),
    "discount NaN": (put(1, "discount", 4, np.nan), "row [24]: discount nan"),
    "departure in all": (instead(slice(3), lambda es: map(departure, es)), "3 of 3 first rows .* no arrival rows"),
    "float frames": (lambda es: [e.update(image=e["image"] / 255) for e in es], "float64, expected .* uint8"),
    "no discount": (lambda es: es[1].pop("discount"), "-1-501.npz: has no discount", "npz"),
    "arrays differ": (replaced(1, "reward", lambda a: a[:-1]), "arrays differ in length.*'reward': 4", "npz"),
    "flags too short": (replaced(1, "is_last", lambda a: a[:4]), "5 rows of image, but only 4 of is_last", "npz"),
    "two episodes": (instead(1, lambda es: {k: np.r_[a, a] for k, a in es[1].items()}), "one whole episode", "npz"),
    "CHW frames": (replaced(0, "image", lambda a: a.swapaxes(1, 3)), r"\(5, 3, 6, 6\) uint8, .* channels last", "npz"),
    "not square": (replaced(1, "image", lambda a: a[:, :, :5]), r"frames are \(5, 6, 5, 3\)", "npz"),
    "another size": (replaced(1, "image", lambda a: a[:, :5, :5]), r"\(5, 2\), before \(6, 2\)", "npz"),
    "one row": (instead(1, lambda es: {k: a[:1] for k, a in es[1].items()}), "no whole episode", "npz"),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_what_no_set_can_hold_stops_before_anything_is_written(tmp_path, kind):
    change, message, *layouts = IMPOSSIBLE[kind]
    change(episodes := [official_episode(4, seed) for seed in range(3)])
    for layout in layouts or ("npz", "hdf5"):
        folder = tmp_path / layout
        write_npz(folder, episodes) if layout == "npz" else write_hdf5(folder, flat(episodes), [7])
        refused(folder, tmp_path, message)


SHARDS = {  # which of three shards is lost, or of the rows only the first episode's end -> what the line says
    0: "1.hdf5 row 0: step_type 1, but an episode should begin here",
    1: "2.hdf5: 0.hdf5 ends inside an episode",  # the rest looks like a whole episode of 8
    2: "1.hdf5: 4 rows from 1.hdf5 row 2 on have no end",
    "end": "1.hdf5 row 1: step_type 0, but an episode should go on here",
}


@pytest.mark.parametrize("lost", SHARDS)
def test_shards_that_lack_something(tmp_path, lost):
    arrays = flat([official_episode(7, 1), official_episode(7, 2), official_episode(1, 3)])
    if lost == "end":
        arrays = {key: np.delete(array, 7, 0) for key, array in arrays.items()}
    files = write_hdf5(tmp_path / "in", arrays, [6, 12])
    if lost != "end":
        files[lost].unlink()
    refused(tmp_path / "in", tmp_path, SHARDS[lost])


@pytest.mark.parametrize("layout", ["npz", "hdf5"])
def test_an_unreadable_file_is_named_and_stops(tmp_path, layout):
    folder, episodes = tmp_path / layout, [official_episode(20, seed, size=16) for seed in range(3)]
    files = write_npz(folder, episodes) if layout == "npz" else write_hdf5(folder, flat(episodes), [21, 42])
    content = files[1].read_bytes()
    third = len(content) // 3
    flipped = bytes(byte ^ 255 for byte in content[third : 2 * third])
    for damaged in (b"", content[:third], content[:third] + flipped + content[2 * third :], b"no such file"):
        files[1].write_bytes(damaged)
        refused(folder, tmp_path, f"{files[1].name}: cannot be read")
    write_npz(tmp_path / "both", episodes), write_hdf5(tmp_path / "both", flat(episodes))
    for other in (tmp_path / "both", tmp_path / "not there"):
        refused(other, tmp_path, "expected a folder with files of one kind")


def test_an_interrupted_import_continues(tmp_path, monkeypatch, capsys):
    write_npz(tmp_path / "in", episodes := [official_episode(5, seed) for seed in range(6)])
    add = DatasetWriter.add

    def add_or_stop(writer, *words):
        if writer.episodes == 4:
            raise KeyboardInterrupt
        add(writer, *words)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DatasetWriter, "add", add_or_stop)
        do_import(tmp_path / "in", tmp_path, **FLAGS)
    assert not list(tmp_path.glob("sets/**/meta.json"))
    assert_holds(do_import(tmp_path / "in", tmp_path, **FLAGS), episodes)
    reported = r"other than 500 transitions: 20220601T120000-0-501\.npz row 0: 5, (.*, ){3}.* and 1 more"  # all six
    assert re.search(reported, capsys.readouterr().out)


# ---- export ----


def standard_parts(root: Path) -> Path:
    """A medexp of 3 and 2 episodes, the last of them terminal."""
    sets = [Dataset(write_set(root / name, lengths, size=8, action_dim=3, terminal_last=terminal, seed=len(name)))
            for name, lengths, terminal in (("medium", (4, 4, 6), False), ("expert", (5, 3), True))]  # fmt: skip
    collect.join(root / "medexp", sets)
    return root / "medexp"


@pytest.mark.parametrize("layout", ["npz", "hdf5"])
def test_export_and_import_give_the_same_bytes(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(official, "SHARD", 2)
    source, out = standard_parts(tmp_path), tmp_path / "out/main/walker_walk/medium_expert/64px"
    vd4rl.export(source, out, layout)
    again = load(do_import(out, tmp_path, "walker-walk/medexp-8px"))
    dataset = Dataset(source)
    np.testing.assert_array_equal(again["image"], np.concatenate(dataset.images))
    for name in ("action", "reward", "discount"):
        np.testing.assert_array_equal(again[name], getattr(dataset, name))
    assert again["episode"].tolist() == [0, 5, 10, 17, 23] and np.flatnonzero(again["discount"] == 0).tolist() == [26]
    for folder, message in (("64px", "64px exists; delete it"), ("full", "full: File too large; nothing of it")):
        with pytest.raises(UserError, match=message), largest_file(100):
            vd4rl.export(source, out.with_name(folder), layout)
    assert list(out.parent.iterdir()) == [out]  # nothing unfinished either


# ---- check ----


WRONG = {  # array, row, value -> finding
    ("action", 3, np.nan): "action not finite or outside [-1, 1]: row 3",
    ("action", (9, 1), -1.01): "action not finite or outside [-1, 1]: row 9",
    ("reward", 4, 2.01): "reward outside [0, 2]: row 4",  # of the three tasks
    ("action", (8, 0), 0.5): "action in an episode's first row: no arrival rows: row 8",
    ("reward", 8, 0.5): "reward in an episode's first row: no arrival rows: row 8",
    ("discount", 4, 0): "discount neither 1 nor, in an episode's last row, 0: row 4",
    ("discount", 7, 0.5): "discount neither 1 nor, in an episode's last row, 0: row 7",
}


def test_check_finds_wrong_values_that_hashes_agree_with_and_wrong_facts(tmp_path):
    flags = {"size": 8, "action_dim": 3, "terminal_last": True, "task": "walker-walk"}
    for number, ((name, row, value), finding) in enumerate(WRONG.items()):
        path = write_set(tmp_path / str(number), **flags)
        assert list(vd4rl.findings(path)) == []
        array = np.load(path / f"{name}.npy")
        array[row] = value
        np.save(path / f"{name}.npy", array)
        write_meta(path, json.loads((path / "meta.json").read_text()))  # so that the hash cannot give it away
        with np.errstate(invalid="ignore"):
            assert list(vd4rl.findings(path)) == [f"{path}: {finding}"]
    path = write_set(tmp_path / "set", **flags)
    content = (path / "meta.json").read_text()
    for name, value, count in (("sha256", "", 5), ("transitions", 3, 1), ("returns", 3, 1), ("episode_returns", "", 1)):
        meta(**{name: value})(path)
        assert len(list(vd4rl.findings(path))) == count
        (path / "meta.json").write_text(content)


def test_the_check_command_on_a_medexp(tmp_path, capsys):
    vd4rl.check(path := standard_parts(tmp_path))
    assert capsys.readouterr().out == f"{path}: nothing is wrong\n"
    image = np.load(path / "image-1.npy", mmap_mode="r+")
    image[2] = 9
    image.flush()
    done = run_python("data/vd4rl.py", "check", path)
    assert done.returncode == 1 and done.stderr == f"error: {path}: 2 findings, listed above\n"
    assert done.stdout.splitlines() == [
        f"{path}/image-1.npy: another sha256 than in meta.json; it changed after it was written",
        f"{path}: frame of one value: row 19",
    ]


# ---- download ----


def test_a_download_is_imported_as_its_folder_says(tmp_path, monkeypatch):
    """From a huggingface_hub that writes two files where the mirror's pattern puts them."""

    def snapshot_download(repo_id, *, repo_type, allow_patterns, local_dir):
        write_npz(Path(local_dir) / Path(allow_patterns[0]).parent, [official_episode(3, seed) for seed in (0, 1)])

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    vd4rl.main(["download", "cheetah-run", "mixed", "--out", str(tmp_path)])
    folder = tmp_path / "vd4rl/main/cheetah_run/medium_replay/64px"
    vd4rl.main(["import", str(folder), "--data-dir", str(tmp_path / "sets")])
    assert Dataset(tmp_path / "sets/vd4rl/cheetah-run/mixed-6px").num_transitions == 6
