"""Official V-D4RL files (arXiv:2206.04779) into our sets and back; a check of any set; the public mirror.

    python data/vd4rl.py import vd4rl_data/main/walker_walk/medium_replay/84px  # datasets/vd4rl/walker-walk/mixed-84px
    python data/vd4rl.py export datasets/made/walker-walk/medexp-64px --format npz --out FOLDER
    python data/vd4rl.py check datasets/made/walker-walk/medexp-64px  # hashes, values, row convention
    python data/vd4rl.py download walker-walk expert  # 100 episodes at 64 px: all that the mirror has

official.py reads and writes the files. An import reads every episode twice, one at a time: nothing is written before
all have been looked at. What no set can hold stops it, with file and row; what is odd is named in its report."""

import hashlib
import json
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "data")]
import official  # noqa: E402
from official import Episode, Notes, bar  # noqa: E402
from published import TABLE_5, print_statistics, standard_transitions  # noqa: E402
from store import DatasetWriter, return_statistics, set_folder, sha256  # noqa: E402

from common import Dataset, UserError, make_env, one_line_errors  # noqa: E402

TASKS = ("walker-walk", "cheetah-run", "humanoid-walk")
OURS = {"random": "random", "medium_replay": "mixed", "medium": "medium", "medium_expert": "medexp", "expert": "expert"}
EPISODE = 500  # transitions
CONSTANT, FIRST_ROW = "frame of one value", "action or reward in a first row, dropped"
MIRROR = "conglu/vd4rl"
DRIVE = "https://drive.google.com/drive/folders/15HpW6nlJexJP5A4ygGk-1plqt9XdcWGI"
RENDER_NOTE = (
    "note: the official frames were rendered by a MuJoCo before 3.2.0; the later one that runs are evaluated in "
    "differs by 1.6 (walker) and 2.1 (cheetah) of 255 on average"
)


# ==== Import ====


def flaws(image: np.ndarray, action: np.ndarray, reward: np.ndarray) -> dict[str, np.ndarray]:
    """Which rows are wrong, (T+1,) bool, for each kind of flaw; image in either layout."""
    pixels = image.reshape(len(image), -1)
    with np.errstate(over="ignore"):
        finite = np.isfinite(reward.astype(np.float32))  # as a set stores it, and training reads it
    return {
        "action not finite or outside [-1, 1]": ~(np.abs(action) <= 1 + 1e-6).all(1),
        "reward not finite as float32": ~finite,
        CONSTANT: pixels.min(1) == pixels.max(1),
    }


def inspect(folder: Path, episode: Episode, notes: Notes) -> Episode:
    """The episode, fit to be stored. Raises UserError with file and row for what no set may hold."""
    where, rows, image = episode.where, len(episode.where), episode.image
    action, reward, discount = episode.action, episode.reward, episode.discount
    shapes = {name: f"{a.shape} {a.dtype}" for name, a in vars(episode).items() if name != "where"}
    numbers = all(array.dtype.kind in "biuf" for array in (action, reward, discount)) and image.size and action.size
    size = image.shape[1] if image.ndim == 4 else 0
    if rows < 2 or not numbers or [action.ndim, reward.ndim, discount.ndim] != [2, 1, 1]:
        raise UserError(f"{folder}/{where[0] if where else ''}: no whole episode: {shapes}")
    if image.shape[1:] != (size, size, 3) or image.dtype != np.uint8:
        expected = "(T+1, S, S, 3) uint8, channels last (in hdf5 files: first)"
        raise UserError(f"{folder}/{where[0]}: frames are {image.shape} {image.dtype}, expected {expected}")
    if rows != EPISODE + 1:
        notes[f"episodes of other than {EPISODE} transitions"].append(f"{where[0]}: {rows - 1}")
    if action[0].any() or reward[0] != 0:
        notes["reward in a first row no number, dropped" if np.isnan(reward[0]) else FIRST_ROW].append(where[0])
        action[0] = reward[0] = 0
    for kind, wrong in flaws(image, action, reward).items():
        places = [where[row] for row in np.flatnonzero(wrong)]
        if places and kind != CONSTANT:
            raise UserError(f"{folder}/{places[0]}: {kind}; in this episode {len(places)} times")
        notes[kind] += places
    odd = 1 + np.flatnonzero(discount[1:] != 1)  # row 0 has no transition that leads there
    if len(odd) and (odd[0] < rows - 1 or discount[-1] != 0):
        only = "a set can hold 1, and 0 in the last row of an episode"
        raise UserError(f"{folder}/{where[odd[0]]}: discount {discount[odd[0]]:g}; {only}")
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
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise UserError(f"--name {name}: letters, digits, - and _")
        if task not in TASKS:
            make_env(task, size=None)  # raises UserError if it is none
        return task, name
    if parts[-1] not in OURS or task not in TASKS:
        raise UserError(f"{path}: no official folder <task>/<set>/<size>px; give --task and --name")
    if parts[-3] in ("distracting", "multitask"):
        raise UserError(f"--name: {path} would take the name of the set in main/; give it one of its own")
    return task, OURS[parts[-1]]


def import_set(
    path: Positional[Path], task: str | None = None, name: str | None = None, data_dir: str | None = None
) -> None:
    """Official files of one set -> datasets/vd4rl/<task>/<name>-<size>px.

    Args:
        path: folder of *.npz or *.hdf5, such as main/walker_walk/medium_replay/64px
        task: dm_control domain-task; default: from the path
        name: our name of the set; default: from the path (medium_replay: mixed, medium_expert: medexp)
        data_dir: default: $CLEANPIXELS_DATA, else datasets/ beside common.py
    """
    task, name = names_from(path, task, name)
    kinds = {".npz": official.npz_episodes, ".hdf5": official.hdf5_episodes}
    files = [file for file in path.glob("[!.]*") if file.suffix in kinds]  # macOS puts a .file beside each
    files = sorted(files, key=official.natural)
    if len({file.suffix for file in files}) != 1:
        raise UserError(f"{path}: {len(files)} *.npz and *.hdf5 files; expected a folder with files of one kind")

    def read(notes: Notes) -> Iterator[Episode]:
        return (inspect(path, episode, notes) for episode in kinds[files[0].suffix](files, notes))

    if not (first := next(read(defaultdict(list)), None)):
        raise UserError(f"{path}: no episode in {len(files)} files")
    size, action_dim = first.image.shape[1], first.action.shape[1]
    folder = set_folder(data_dir, "vd4rl", task, name, size)
    if (folder / "meta.json").exists():
        raise UserError(f"{folder} is there already; delete it to import it again, or give another --name")
    notes, seen, samples = defaultdict(list), {}, []
    for episode in bar(read(notes), "looking"):
        where, shape = episode.where[0], (episode.image.shape[1], episode.action.shape[1])
        if shape != (size, action_dim):
            raise UserError(f"{path}/{where}: size and action dimensions {shape}, before {(size, action_dim)}")
        if (twin := seen.setdefault(hash(episode.action.tobytes()), where)) != where:
            notes["actions of an earlier episode again"].append(f"{where} = {twin}")
        samples.append(episode.image[-1].copy())  # a view would keep the whole episode
    if (filled := len(notes[FIRST_ROW])) > len(samples) / 2:
        wanted = "these are no arrival rows, in which action and reward LED to the image"
        raise UserError(f"{path}: {filled} of {len(samples)} first rows hold an action or a reward: {wanted}")
    listing = "".join(f"{file.name} {file.stat().st_size}\n" for file in files)
    recipe = {"files": len(files), "listing": hashlib.sha256(listing.encode()).hexdigest()}
    facts = {"render": "reference", "mujoco": None, "recipe": recipe}
    with DatasetWriter(folder, size, action_dim, task, "vd4rl", **facts) as writer:  # continues an interrupted import
        for episode in islice(bar(read(defaultdict(list)), "writing"), writer.episodes, None):
            writer.add(episode.image, episode.action[1:], episode.reward[1:], episode.discount[-1] == 0)
    print(f"{path}: {len(files)} files -> {folder}")
    report(json.loads((folder / "meta.json").read_text()), name, np.stack(samples), notes)


def report(meta: dict, name: str, samples: np.ndarray, notes: Notes) -> None:
    """Prints counts, oddities and returns beside the published ones. samples (E, S, S, 3): a frame per episode."""
    task, size, episodes = meta["task"], meta["size"], meta["episodes"]
    print(f"  {episodes:,} episodes, {meta['transitions']:,} transitions")
    if (task, name) in TABLE_5:
        published = standard_transitions(task, name) // EPISODE
        missing = f"warning: {published - episodes:,} of {published:,} published episodes ARE MISSING"
        missing += ", so scores do not compare with published ones"
        print(missing if episodes < published else f"  none of {published:,} published episodes is missing")
    for kind, places in notes.items():
        if places:
            print(f"  {kind}: {listed(places)}")
    if size == 84 and np.isfinite(level := beyond_cubic(samples[:: len(samples) // 100 + 1])):
        verdict = "not enlarged that way; other ways are not checked"
        if level < 0.5:
            verdict = "it seems ENLARGED; evaluation renders natively at 84 px, so do not compare scores"
        print(f"  {level:.2f} grey levels outside OpenCV's cubic 64 -> 84 enlargement (rounding gives 0.29): {verdict}")
    print_statistics(task, name, meta["returns"], "imported", episodes)
    print(RENDER_NOTE)


def listed(places: list) -> str:
    """The first five, and how many more there are."""
    return ", ".join(map(str, places[:5])) + (f" and {len(places) - 5:,} more" if len(places) > 5 else "")


# ==== Export ====


def export(path: Positional[Path], out: Path, format: Literal["npz", "hdf5"] = "npz") -> None:
    """One of our sets -> a new folder `out` of official files. npz: Offline DV2, LOMPO; hdf5: DrQ+BC, CQL, BC."""
    dataset, out = Dataset(path), out.resolve()
    temporary = Path(f"{out}.unfinished")  # a folder under its own name is whole
    for folder in (out, temporary):
        if folder.exists():
            raise UserError(f"{folder} exists; delete it, or export to another folder")
    temporary.mkdir(parents=True)
    try:
        {"npz": official.export_npz, "hdf5": official.export_hdf5}[format](temporary, dataset)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; nothing of it is kept") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # if it is not whole
    print(f"{out}: {dataset.num_episodes:,} episodes of {dataset.task} at {dataset.size} px")
    if dataset.size != {"npz": 64, "hdf5": 84}[format]:
        print(f"note: official {format} files have another size; see that whoever reads these accepts it")


# ==== Check ====


def check(path: Positional[Path]) -> None:
    """Prints a line per finding in one of our sets, and ends with status 1 if there is any."""
    lines = list(findings(path))
    print("\n".join(lines) or f"{path}: nothing is wrong")
    if lines:
        raise UserError(f"{path}: {len(lines)} finding{'s' * (len(lines) > 1)}, listed above")


def findings(path: Path) -> Iterator[str]:
    """What is wrong with a set. Reads the frames twice: for their hash, and an episode at a time."""
    try:
        dataset = Dataset(path)
    except UserError as error:
        yield str(error)
        return
    meta = dataset.meta
    recorded = meta["sha256"] if isinstance(meta["sha256"], dict) else {}
    for file in sorted(path.glob("*.npy")):
        if sha256(file) != recorded.get(file.stem):
            yield f"{file}: another sha256 than in meta.json; it changed after it was written"
    if meta.get("transitions") != dataset.num_transitions:
        yield f"{path}/meta.json: transitions are not the rows less the episodes"
    returns = np.add.reduceat(dataset.reward.astype(np.float64), dataset.first_rows)
    if not np.array_equal(returns.round(3), meta.get("episode_returns")):
        yield f"{path}/meta.json: episode_returns are not the sums of reward.npy"
    if meta.get("returns") != return_statistics(returns):
        yield f"{path}/meta.json: returns are not those of the arrays"
    first, last = dataset.first_rows, dataset.first_rows + dataset.lengths - 1
    bad = defaultdict(list)
    for start, rows in zip(first, bar(official.episodes_of(dataset), "checking")):
        for kind, wrong in flaws(rows["image"], rows["action"], rows["reward"]).items():
            bad[kind] += (start + np.flatnonzero(wrong)).tolist()
    odd = dataset.discount != 1
    odd[last] &= dataset.discount[last] != 0
    bad["discount neither 1 nor, in an episode's last row, 0"] = np.flatnonzero(odd).tolist()
    bad["action in an episode's first row: no arrival rows"] = first[dataset.action[first].any(1)].tolist()
    bad["reward in an episode's first row: no arrival rows"] = first[dataset.reward[first] != 0].tolist()
    if meta["task"] in TASKS:
        bad["reward outside [0, 2]"] = np.flatnonzero((dataset.reward < 0) | (dataset.reward > 2)).tolist()
    yield from (f"{path}: {kind}: row {listed(found)}" for kind, found in bad.items() if found)


# ==== Download ====


def download(
    task: Positional[Literal["walker-walk", "cheetah-run", "humanoid-walk"]],
    dataset: Positional[Literal["random", "mixed", "medium", "medexp", "expert"]],
    out: Path = Path("vd4rl_data"),
) -> None:
    """Fetch the official 64 px files that are mirrored, for import.

    The HuggingFace mirror conglu/vd4rl has the main sets at 64 px alone, and 100 episodes (50,000 transitions) of each
    instead of all 200 (cheetah mixed, medexp: 400; humanoid mixed: 1,200). That is enough to try things, not to
    reproduce the paper. Complete sets, 84 px included:
    https://drive.google.com/drive/folders/15HpW6nlJexJP5A4ygGk-1plqt9XdcWGI (a browser hands a folder over as several
    zip files, to be merged by hand).
    """
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
        raise UserError(f"{MIRROR} has nothing under {inside}; all there is: {DRIVE}")
    published = standard_transitions(task, dataset) // EPISODE
    print(f"{count:,} of {published:,} published episodes: enough to try things, not to reproduce the paper")
    print(f"all of them: {DRIVE}\nnext: python data/vd4rl.py import {out / inside}")


def main(argv: list[str] | None = None) -> None:
    commands = {"import": import_set, "export": export, "check": check, "download": download}
    tyro.extras.subcommand_cli_from_dict(commands, args=argv, description=__doc__)


if __name__ == "__main__":
    sys.excepthook = one_line_errors
    main()
