"""The two layouts of official V-D4RL files, read an episode at a time, and written. They hold arrival rows, as ours do.

*.npz   64 px, one episode a file   image (T+1,S,S,3), action, reward, discount, is_first, is_last, is_terminal
*.hdf5  84 px, shards of episodes   observation (N,3,S,S), action, reward, discount, step_type (0 first, 2 last)"""

import contextlib
import io
import re
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "data")]
from common import BAR_SECONDS, Dataset, UserError  # noqa: E402

NPZ_ARRAYS, NPZ_FLAGS = ("image", "action", "reward", "discount"), ("is_first", "is_last", "is_terminal")
HDF5_ARRAYS = ("observation", "action", "reward", "discount", "step_type")
SHARD = 20  # episodes per exported hdf5 file: the original loader reads whole files into memory
Notes = defaultdict[str, list[str]]  # what was odd -> where


@dataclass
class Episode:
    """T+1 arrival rows: image (T+1, S, S, 3), action (T+1, A), reward and discount (T+1,)."""

    where: list[str]  # "file row n" of each row
    image: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    discount: np.ndarray


@contextlib.contextmanager
def readable(file: Path):
    """Names the file that NumPy, zipfile, zlib or h5py cannot read."""
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error}); fetch it again") from None


def same_rows(file: Path, arrays: Mapping, needed: tuple) -> int:
    """How many rows all the `needed` arrays have. Raises UserError where one is missing, or they differ."""
    if missing := set(needed) - set(arrays):
        raise UserError(f"{file}: has no {', '.join(sorted(missing))}, so it is no V-D4RL file")
    rows = {key: len(arrays[key]) for key in needed}
    if len(set(rows.values())) > 1:
        raise UserError(f"{file}: arrays differ in length: {rows}")
    return rows["action"]


def npz_episodes(files: list[Path], notes: Notes) -> Iterator[Episode]:
    for file in files:
        with readable(file), np.load(file) as archive:
            arrays = {key: archive[key] for key in archive.files}
            rows = same_rows(file, arrays, NPZ_ARRAYS)  # not the count in its name: writers disagree
        flags = {key: np.atleast_1d(arrays[key]).astype(bool) for key in NPZ_FLAGS if key in arrays}
        for key, flag in flags.items():
            if len(flag) < rows:
                raise UserError(f"{file}: {rows} rows of image, but only {len(flag)} of {key}")
            if len(flag) > rows:
                notes[f"{rows} rows of image, {len(flag)} of {key}: flags cut to the frames"].append(file.name)
                flags[key] = flag[:rows]
        if flags.get("is_first", np.zeros(1))[1:].any() or flags.get("is_last", np.zeros(1))[:-1].any():
            raise UserError(f"{file}: is_first or is_last inside the file; expected one whole episode")
        if "is_terminal" in flags and (flags["is_terminal"] != (arrays["discount"] == 0)).any():
            notes["is_terminal and discount disagree: terminal where one of them says so"].append(file.name)
            arrays["discount"][flags["is_terminal"]] = 0
        yield Episode([f"{file.name} row {row}" for row in range(rows)], *(arrays[key] for key in NPZ_ARRAYS))


def hdf5_episodes(files: list[Path], notes: Notes) -> Iterator[Episode]:
    import h5py

    where, held, last = [], [], None  # of the episode under way: its rows, their arrays, the shard read last
    for file in files:
        # A gzip chunk can span thousands of rows: the cache holds a row of chunks, so that each is unpacked once.
        with readable(file), h5py.File(file, rdcc_nbytes=2**28, rdcc_nslots=100_003) as shard:
            rows = same_rows(file, shard, HDF5_ARRAYS)
            if where and not follows(last, file):
                raise UserError(f"{file}: {last.name} ends inside an episode, which cannot go on here: no next number")
            step_type = shard["step_type"][:]  # float in some shards, integer in others
            ends = (np.flatnonzero(step_type == 2) + 1).tolist()
            for start, end in pairwise([0, *ends, rows]):
                if start < end:
                    where += [f"{file.name} row {row}" for row in range(start, end)]
                    held.append({key: shard[key][start:end] for key in HDF5_ARRAYS})
                if start < end and step_type[end - 1] == 2:
                    yield join(file.parent, where, held, notes)
                    where, held = [], []
        last = file
    if where:
        raise UserError(f"{last}: {len(where)} rows from {where[0]} on have no end (step_type 2); a shard is missing")


def join(folder: Path, where: list[str], held: list[dict], notes: Notes) -> Episode:
    """An episode of its pieces. Raises UserError unless its step types are 0 1 ... 1 2."""
    arrays = {key: np.concatenate([piece[key] for piece in held]) for key in HDF5_ARRAYS}
    step_type, image = arrays.pop("step_type"), arrays.pop("observation").transpose(0, 2, 3, 1)
    wrong = step_type[:-1] != (np.arange(len(where) - 1) > 0)
    if wrong.any() or len(where) == 1:
        row = int(np.flatnonzero(wrong)[0]) if wrong.any() else 0
        raise UserError(f"{folder}/{where[row]}: step_type {step_type[row]:g}, but an episode should "
                        f"{'go on' if row else 'begin'} here; rows before it are missing")  # fmt: skip
    if len(held) > 1:
        notes["episodes cut by the end of a shard, joined"].append(where[0])
    return Episode(where, image, **arrays)


def natural(file: Path) -> list:
    """Sort key that puts 2.hdf5 before 10.hdf5: text and numbers in turn."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]


def follows(before: Path, after: Path) -> bool:
    """Whether the names of two shards differ in one number, and that by 1: no shard between them is missing."""
    pairs = [pair for pair in zip(natural(before), natural(after)) if pair[0] != pair[1]]
    return len(pairs) == 1 and isinstance(pairs[0][0], int) and pairs[0][1] == pairs[0][0] + 1


def episodes_of(dataset: Dataset) -> list[dict[str, np.ndarray]]:
    """image (T+1, 3, S, S), action, reward, discount of every episode, memory-mapped."""
    episodes, before = [], 0  # before: rows in the image files before this one
    for image in dataset.images:
        for first, rows in zip(dataset.first_rows, dataset.lengths):
            if before <= first < before + len(image):
                at = slice(first, first + rows)
                columns = {name: getattr(dataset, name)[at] for name in ("action", "reward", "discount")}
                episodes.append({"image": image[first - before : first - before + rows]} | columns)
        before += len(image)
    return episodes


def bar(episodes, title: str) -> tqdm:
    return tqdm(episodes, title, unit="episode", mininterval=BAR_SECONDS, delay=1)


def export_npz(folder: Path, dataset: Dataset) -> None:
    for index, rows in enumerate(bar(episodes_of(dataset), "writing")):
        row, discount = np.arange(len(rows["reward"])), rows["discount"].astype(np.float64)
        stamp = datetime(2022, 6, 9) + timedelta(seconds=index)  # readers sort by it; the same set, the same names
        np.savez_compressed(
            folder / f"{stamp:%Y%m%dT%H%M%S}-{index:032x}-{len(row)}.npz",
            image=rows["image"].transpose(0, 2, 3, 1), action=rows["action"],
            reward=rows["reward"].astype(np.float64), discount=discount,
            is_first=row == 0, is_last=row == row[-1], is_terminal=discount == 0,
        )  # fmt: skip


def export_hdf5(folder: Path, dataset: Dataset) -> None:
    """Shards of whole episodes, each readable alone; zero-padded names, so that any sorting is the right one."""
    import h5py

    episodes = iter(bar(episodes_of(dataset), "writing"))
    for number in range(-(-dataset.num_episodes // SHARD)):
        chosen = list(islice(episodes, SHARD))
        step_type = [np.r_[0.0, np.ones(len(rows["reward"]) - 2), 2.0] for rows in chosen]
        with h5py.File(file := io.BytesIO(), "w") as shard:  # in memory: h5py does not survive a full disk
            shard.create_dataset("step_type", data=np.concatenate(step_type), compression="gzip")
            for name in ("image", "action", "reward", "discount"):
                array = np.concatenate([rows[name] for rows in chosen])
                array = array.astype(np.float64) if array.ndim == 1 else array
                key, chunks = ("observation", (1, *array.shape[1:])) if name == "image" else (name, True)
                shard.create_dataset(key, data=array, chunks=chunks, compression="gzip")
        (folder / f"{number:04d}.hdf5").write_bytes(file.getbuffer())
