"""Official V-D4RL files (arXiv:2206.04779) into our sets and back; a check of any set; the public mirror.

    python data/vd4rl.py import vd4rl_data/main/walker_walk/medium_replay/84px  # datasets/vd4rl/walker-walk/mixed-84px
    python data/vd4rl.py export datasets/made/walker-walk/medexp-64px --format npz --out FOLDER
    python data/vd4rl.py check datasets/made/walker-walk/medexp-64px  # hashes, counts, values, row convention
    python data/vd4rl.py download walker-walk expert  # 100 episodes at 64 px: all that the mirror has

Official files hold arrival rows, as ours do (common.py, Data), in two layouts:
    *.npz   64 px, one episode a file   image (T+1,S,S,3), action, reward, discount, is_first, is_last, is_terminal
    *.hdf5  84 px, shards of episodes   observation (N,3,S,S), action, reward, discount, step_type (0 first, 2 last)
Episodes are read one at a time, however many there are. What cannot be stored as it is stops the import with its
file and row; whatever else is odd is named in the report."""

import argparse
import contextlib
import hashlib
import re
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))
from collect import EPISODE, TABLE_5  # noqa: E402

import common  # noqa: E402
from common import Dataset, DatasetWriter, Part, UserError, standard_transitions  # noqa: E402

TASKS = ("walker-walk", "cheetah-run", "humanoid-walk")
OURS = {"random": "random", "medium_replay": "mixed", "medium": "medium", "medium_expert": "medexp", "expert": "expert"}
NPZ_ARRAYS, NPZ_FLAGS = ("image", "action", "reward", "discount"), ("is_first", "is_last", "is_terminal")
HDF5_ARRAYS = ("observation", "action", "reward", "discount", "step_type")
CONSTANT = "frame of one value"
SHARD = 20  # episodes per exported hdf5 file: the original loader reads whole files into memory
MIRROR = "conglu/vd4rl"
DRIVE = "https://drive.google.com/drive/folders/15HpW6nlJexJP5A4ygGk-1plqt9XdcWGI"
MIRROR_NOTE = (
    f"The HuggingFace mirror {MIRROR} has the main sets at 64 px alone, and 100 episodes (50,000 transitions) of each "
    "instead of all 200 (cheetah mixed, medexp: 400; humanoid mixed: 1,200). That is enough to try things, not to "
    f"reproduce the paper. Complete sets, 84 px included: {DRIVE} (a browser hands a folder over as several zip files, "
    "to be merged by hand)."
)
Notes = defaultdict[str, list[str]]  # what was odd -> where


# ==== Reading official files ====


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
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error}); fetch it again") from None


def same_rows(file: Path, arrays: Mapping, needed: tuple, flags: tuple, notes: Notes) -> int:
    """How many rows all the `needed` arrays have. Notes the `flags` that are missing and keys that are neither."""
    if missing := set(needed) - set(arrays):
        raise UserError(f"{file}: has no {', '.join(sorted(missing))}, so it is no V-D4RL file")
    rows = {key: len(arrays[key]) for key in needed}
    if len(set(rows.values())) > 1:
        raise UserError(f"{file}: arrays differ in length: {rows}")
    for flag in set(flags) - set(arrays):
        notes[f"no {flag}" + (", derived from discount == 0" if flag == "is_terminal" else "")].append(file.name)
    if extra := set(arrays) - {*needed, *flags}:
        notes[f"further keys, not imported ({', '.join(sorted(extra))})"].append(file.name)
    return rows["action"]


def npz_episodes(files: list[Path], notes: Notes) -> Iterator[Episode]:
    for file in files:
        with readable(file), np.load(file) as archive:
            arrays = {key: archive[key] for key in archive.files}
        rows = same_rows(file, arrays, NPZ_ARRAYS, NPZ_FLAGS, notes)  # not the count in its name: writers disagree
        flags = {key: arrays[key].astype(bool) for key in NPZ_FLAGS if key in arrays}
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
            rows = same_rows(file, shard, HDF5_ARRAYS, (), notes)
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


# ==== Import ====


def flaws(image: np.ndarray, action: np.ndarray, reward: np.ndarray) -> dict[str, np.ndarray]:
    """Which rows are wrong, (T+1,) bool, for each kind of flaw; image in either layout."""
    pixels = image.reshape(len(image), -1)
    return {
        "action not finite or outside [-1, 1]": ~(np.abs(action) <= 1 + 1e-6).all(1),
        "reward not finite": ~np.isfinite(reward),
        CONSTANT: pixels.min(1) == pixels.max(1),
    }


def inspect(folder: Path, episode: Episode, notes: Notes) -> Episode:
    """The episode, fit to be stored. Raises UserError with file and row for what no set may hold."""
    where, rows, action, reward = episode.where, len(episode.where), episode.action, episode.reward
    shapes = {name: array.shape for name, array in vars(episode).items() if name != "where"}
    if rows < 2 or [len(shape) for shape in shapes.values()] != [4, 2, 1, 1]:
        raise UserError(f"{folder}/{where[0] if where else ''}: no whole episode: {shapes}")
    if rows != EPISODE + 1:
        notes[f"episodes of other than {EPISODE} transitions"].append(f"{where[0]}: {rows - 1}")
    if action[0].any() or reward[0] != 0:
        notes["action or reward in a first row, dropped; if in every file, these are no arrival rows"].append(where[0])
        action[0] = reward[0] = 0
    for kind, wrong in flaws(episode.image, action, reward).items():
        places = [where[row] for row in np.flatnonzero(wrong)]
        if places and kind != CONSTANT:
            raise UserError(f"{folder}/{places[0]}: {kind}; in this episode {len(places)} times")
        notes[kind] += places
    odd = 1 + np.flatnonzero(episode.discount[1:] != 1)  # row 0 has no transition that leads there
    if len(odd) and (odd[0] < rows - 1 or episode.discount[-1] != 0):
        raise UserError(f"{folder}/{where[odd[0]]}: discount {episode.discount[odd[0]]:g}; a set can hold 1, and 0 "
                        "in the last row of an episode")  # fmt: skip
    if len(odd):
        notes["terminal episodes, their last discount of 0 kept"].append(where[-1])
    return episode


def beyond_cubic(frames: np.ndarray) -> float:
    """The part of frames (N, 84, 84, 3) that no cubic enlargement from 64 px explains: RMS in grey levels.

    OpenCV's INTER_CUBIC (a = -0.75; what the original npz -> hdf5 converter calls) is linear up to rounding and
    clipping: column (84,) = W (84, 64) @ column (64,). So 20 of 84 dimensions hold rounding alone, 0.29.
    Measured on renders of the three tasks: enlarged 0.27 to 0.29, native 5.7 to 7.5."""
    position = (np.arange(84) + 0.5) * 64 / 84 - 0.5  # in source pixels, centres aligned
    weights = np.zeros((84, 64))
    for tap in range(-1, 3):
        source = np.floor(position) + tap
        d, a = np.abs(position - source), -0.75
        weight = np.where(d <= 1, (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4))
        np.add.at(weights, (np.arange(84), np.clip(source, 0, 63).astype(int)), weight)
    outside = np.linalg.svd(weights)[0][:, 64:]  # (84, 20)
    columns = frames.transpose(1, 0, 2, 3).reshape(84, -1).astype(np.float64)
    columns = columns[:, ((columns > 0) & (columns < 255)).all(0)]  # the others may be clipped
    return float(np.sqrt(np.mean((outside.T @ columns) ** 2))) if columns.size else float("nan")


def names_from(path: Path, task: str | None, name: str | None) -> tuple[str, str]:
    """Our task and set, from .../{main,distracting,multitask}/<task>/<set>/<size>px unless flags give them."""
    parts = ["", "", "", *(part for part in path.resolve().parts if not re.fullmatch(r"\d+px", part))]
    task = task or parts[-2].replace("_", "-")
    if name:
        return task, name
    if parts[-1] not in OURS or task not in TASKS:
        raise UserError(f"{path}: no official folder <task>/<set>/<size>px; give --task and --name")
    if parts[-3] in ("distracting", "multitask"):
        raise UserError(f"--name: {path} would take the name of the set in main/; give it one of its own")
    return task, OURS[parts[-1]]


def import_set(path: Path, task: str | None = None, name: str | None = None, data_dir: str | None = None) -> None:
    task, name = names_from(path, task, name)
    npz, hdf5 = (sorted(path.glob(pattern), key=natural) for pattern in ("*.npz", "*.hdf5"))
    if bool(npz) == bool(hdf5):
        raise UserError(f"{path}: {len(npz)} *.npz, {len(hdf5)} *.hdf5; expected a folder with files of one kind")
    notes: Notes = defaultdict(list)
    found = npz_episodes(npz, notes) if npz else hdf5_episodes(hdf5, notes)
    episodes = (inspect(path, episode, notes) for episode in found)
    if not (first := next(episodes, None)):
        raise UserError(f"{path}: no episode in {len(npz + hdf5)} files")
    size, action_dim = first.image.shape[1], first.action.shape[1]
    folder = common.set_folder(data_dir or common.default_data_dir(), "vd4rl", task, name, size)
    listing = "".join(f"{file.name} {file.stat().st_size}\n" for file in npz + hdf5)
    recipe = {"files": len(npz + hdf5), "listing": hashlib.sha256(listing.encode()).hexdigest()}
    facts = {"render": "reference", "mujoco": None, "recipe": recipe}
    seen, samples = {}, []
    with DatasetWriter(folder, size, action_dim, task, "vd4rl", **facts) as writer:
        if writer.complete:
            raise UserError(f"{folder} is there already; delete it to import it again, or give another --name")
        done = writer.episodes  # by an interrupted import of the same files: read again for the report alone
        bar = common.progress_bar(None, 0, "episode")
        for index, episode in enumerate(chain([first], episodes)):
            bar.update(1)
            where = episode.where[0]
            if (twin := seen.setdefault(hash(episode.action.tobytes()), where)) != where:
                notes["actions of an earlier episode again"].append(f"{where} = {twin}")
            samples.append(episode.image[-1].copy())  # a view would keep the whole episode
            if index >= done:
                try:
                    writer.add(episode.image, episode.action[1:], episode.reward[1:], episode.discount[-1] == 0)
                except UserError as error:
                    raise UserError(f"{path}/{where}: {error}") from None
    print(f"{path}: {len(npz + hdf5)} files -> {folder}")
    report(common.read_meta(folder), name, np.stack(samples), notes)


def report(meta: dict, name: str, samples: np.ndarray, notes: Notes) -> None:
    """Prints counts, oddities and returns beside the published ones. samples (E, S, S, 3): a frame per episode."""
    task, size, episodes, paper = meta["task"], meta["size"], meta["episodes"], TABLE_5.get((meta["task"], name))
    print(f"  {episodes:,} episodes, {meta['transitions']:,} transitions")
    if paper:
        published = standard_transitions(task, name) // EPISODE
        verdict = f"{published - episodes:,} ARE MISSING, so scores do not compare with published ones"
        print(f"  published: {published:,} episodes; {verdict if episodes < published else 'none is missing'}")
    for kind, places in notes.items():
        if places:
            print(f"  {kind}: {listed(places)}")
    if size == 84 and np.isfinite(level := beyond_cubic(samples[:: len(samples) // 100 + 1])):
        verdict = "not enlarged that way; other ways are not checked"
        if level < 0.5:
            verdict = "it seems ENLARGED; evaluation renders natively at 84 px, so do not compare scores"
        print(f"  {level:.2f} grey levels outside OpenCV's cubic 64 -> 84 enlargement (rounding gives 0.29): {verdict}")
    print(f"{task} {name}: returns beside V-D4RL's Table 5\n" + " " * 10 + "".join(f"{k:>8}" for k in meta["returns"]))
    for label, numbers in {"imported": meta["returns"].values(), "paper": paper}.items():
        if numbers:
            print(f"{label:>10}" + "".join(f"{number:8.1f}" for number in numbers))


def listed(places: list) -> str:
    """The first five, and how many more there are."""
    return ", ".join(map(str, places[:5])) + (f" and {len(places) - 5:,} more" if len(places) > 5 else "")


# ==== Export ====


def export(path: Path, out: Path, format: str) -> None:
    dataset = Dataset(path)
    episodes = [(part, slice(first, first + length)) for part in dataset.parts
                for first, length in zip(part.episode, part.lengths)]  # fmt: skip
    temporary = out.with_name(f"{out.name}.unfinished")  # a folder under its own name is whole
    for folder in (out, temporary):
        if folder.exists():
            raise UserError(f"{folder} exists; delete it, or export to another folder")
    temporary.mkdir(parents=True)
    {"npz": export_npz, "hdf5": export_hdf5}[format](temporary, episodes)
    temporary.rename(out)
    print(f"{out}: {len(episodes):,} episodes of {dataset.task} at {dataset.size} px")
    if dataset.size != {"npz": 64, "hdf5": 84}[format]:
        print(f"note: official {format} files have another size; see that whoever reads these accepts it")


def export_npz(folder: Path, episodes: list[tuple[Part, slice]]) -> None:
    for index, (part, rows) in enumerate(episodes):
        row, discount = np.arange(rows.stop - rows.start), part.discount[rows].astype(np.float64)
        stamp = datetime(2022, 6, 9) + timedelta(seconds=index)  # readers sort by it; the same set, the same names
        np.savez_compressed(
            folder / f"{stamp:%Y%m%dT%H%M%S}-{index:032x}-{len(row)}.npz",
            image=part.image[rows].transpose(0, 2, 3, 1), action=part.action[rows],
            reward=part.reward[rows].astype(np.float64), discount=discount,
            is_first=row == 0, is_last=row == row[-1], is_terminal=discount == 0,
        )  # fmt: skip


def export_hdf5(folder: Path, episodes: list[tuple[Part, slice]]) -> None:
    """Shards of whole episodes, each readable alone; zero-padded names, so that any sorting is the right one."""
    import h5py

    for start in range(0, len(episodes), SHARD):
        chosen = episodes[start : start + SHARD]
        step_type = [np.r_[0.0, np.ones(rows.stop - rows.start - 2), 2.0] for _, rows in chosen]
        with h5py.File(folder / f"{start // SHARD:04d}.hdf5", "w") as shard:
            shard.create_dataset("step_type", data=np.concatenate(step_type), compression="gzip")
            for name in ("image", "action", "reward", "discount"):
                array = np.concatenate([getattr(part, name)[rows] for part, rows in chosen])
                array = array.astype(np.float64) if array.ndim == 1 else array
                key, chunks = ("observation", (1, *array.shape[1:])) if name == "image" else (name, True)
                shard.create_dataset(key, data=array, chunks=chunks, compression="gzip")


# ==== Check ====


def check(path: Path) -> None:
    lines = list(dict.fromkeys(findings(path)))  # a broken part is found in the part and again in the whole
    print("\n".join(lines) or f"{path}: nothing is wrong")
    if lines:
        raise UserError(f"{path}: {len(lines)} finding{'s' * (len(lines) > 1)}, listed above")


def findings(path: Path) -> Iterator[str]:
    """What is wrong with a set, or with each part of a set and with the whole."""
    try:
        meta = common.read_meta(path)
        for part in meta.get("parts", []):
            yield from findings((path / part).resolve())
        if "parts" not in meta:
            yield from array_findings(path, meta)
        returns = np.concatenate([common.episode_returns(part) for part in Dataset(path).parts])
        if any(abs(meta["returns"][key] - value) > 0.02 for key, value in common.return_statistics(returns).items()):
            yield f"{path}/meta.json: returns are not those of the arrays"
    except UserError as error:
        yield str(error)
    except KeyError as error:
        yield f"{path}/meta.json: has no {error}"


def array_findings(path: Path, meta: dict) -> Iterator[str]:
    """Reads the frames twice: for their hash, and an episode at a time. Raises UserError where one cannot be opened."""
    part = Part(path, meta)
    for name in common.ARRAYS:
        if common.sha256(path / f"{name}.npy") != meta["sha256"][name]:
            yield f"{path}/{name}.npy: another sha256 than in meta.json; it changed after it was written"
    if part.image.shape[1:] != (3, meta["size"], meta["size"]) or part.action.ndim != 2:
        raise UserError(f"{path}: image {part.image.shape}, action {part.action.shape}, but size {meta['size']}")
    if meta["transitions"] != meta["rows"] - meta["episodes"]:
        yield f"{path}/meta.json: {meta['transitions']} transitions are not its rows less its episodes"
    if not np.array_equal(common.episode_returns(part).round(3), meta["episode_returns"]):
        yield f"{path}/meta.json: episode_returns are not the sums of reward.npy"
    first, last = part.episode, part.episode + part.lengths - 1
    bad = defaultdict(list)
    for start, end in zip(first, last + 1):
        for kind, wrong in flaws(part.image[start:end], part.action[start:end], part.reward[start:end]).items():
            bad[kind] += (start + np.flatnonzero(wrong)).tolist()
    odd = part.discount != 1
    odd[last] &= part.discount[last] != 0
    bad["discount neither 1 nor, in an episode's last row, 0"] = np.flatnonzero(odd).tolist()
    bad["action in an episode's first row: no arrival rows"] = first[part.action[first].any(1)].tolist()
    bad["reward in an episode's first row: no arrival rows"] = first[part.reward[first] != 0].tolist()
    if meta["task"] in TASKS:
        bad["reward outside [0, 2]"] = np.flatnonzero((part.reward < 0) | (part.reward > 2)).tolist()
    yield from (f"{path}: {kind}: row {listed(rows)}" for kind, rows in bad.items() if rows)


# ==== Download ====


def download(task: str, dataset: str, out: Path) -> None:
    print(MIRROR_NOTE)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError("the mirror is read with huggingface_hub: pip install huggingface_hub") from None
    theirs = next(theirs for theirs, ours in OURS.items() if ours == dataset)
    inside = f"vd4rl/main/{task.replace('-', '_')}/{theirs}/64px"
    try:
        snapshot_download(MIRROR, repo_type="dataset", allow_patterns=[f"{inside}/*.npz"], local_dir=str(out))
    except Exception as error:  # HTTP, hub and disk errors have no base class in common
        reason = " ".join(str(error).split())
        raise UserError(f"{MIRROR}: {type(error).__name__}: {reason}; the same command continues") from None
    if not (count := len(list((out / inside).glob("*.npz")))):
        raise UserError(f"{MIRROR} has nothing under {inside}; use {DRIVE}")
    published = standard_transitions(task, dataset) // EPISODE
    print(f"{count:,} of {published:,} published episodes. Next: python data/vd4rl.py import {out / inside}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{import,export,check,download}")

    def command(name: str, run, help: str, more: str = ""):
        added = commands.add_parser(name, help=help, description=f"{help}. {more}")
        added.set_defaults(run=run)
        return added.add_argument

    add = command("import", import_set, "official files of one set -> datasets/vd4rl/<task>/<name>-<size>px")
    add("path", type=Path, help="folder of *.npz or *.hdf5, such as main/walker_walk/medium_replay/64px")
    add("--task", help="dm_control domain-task; default: from the path")
    add("--name", help="our name of the set; default: from the path (medium_replay: mixed, medium_expert: medexp)")
    add("--data-dir", help="default: $CLEANPIXELS_DATA, else datasets/ beside common.py")
    add = command("export", export, "one of our sets -> a new folder of official files")
    add("path", type=Path, help="folder of the set")
    add("--out", type=Path, required=True, help="folder to make")
    add("--format", choices=("npz", "hdf5"), default="npz", help="npz: Offline DV2, LOMPO; hdf5: DrQ+BC, CQL, BC")
    add = command("check", check, "one line per finding in one of our sets, and status 1 if there is any")
    add("path", type=Path, help="folder of the set")
    add = command("download", download, "fetch the official 64 px files that are mirrored, for import", MIRROR_NOTE)
    add("task", choices=TASKS)
    add("dataset", choices=OURS.values())
    add("--out", type=Path, default=Path("vd4rl_data"), help="folder for the files; default: vd4rl_data")
    flags = vars(parser.parse_args(argv))
    flags.pop("run")(**flags)


if __name__ == "__main__":
    sys.excepthook = common.one_line_errors
    main()
