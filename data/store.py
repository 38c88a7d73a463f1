"""What writes sets: DatasetWriter and its parts. What a set is stands in common.py, Data, which reads them."""

import contextlib
import hashlib
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import filelock
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "data")]
import common  # noqa: E402
from common import ARRAYS, UserError, provenance, standard_set, write_atomically  # noqa: E402

HEADER = 128  # bytes before the rows of a .npy file


def set_folder(data_dir, source: str, task: str, name: str, size: int, transitions=None, seed: int = 0, **variation):
    """Where training looks for a standard set. data_dir None: $CLEANPIXELS_DATA, else datasets/ beside common.py."""
    data_dir = Path(data_dir or os.environ.get("CLEANPIXELS_DATA") or ROOT / "datasets").expanduser()
    flags = {"task": task, "dataset": name, "source": source, "transitions": transitions, "data_seed": seed}
    flags |= {"data_dir": data_dir, "distraction": "none", "shifted": 100, "bodies": False} | variation
    return standard_set(Namespace(**flags), size)[0]


def take_lock(path: Path, wait: bool) -> filelock.FileLock:
    """The lock file `path`. Where another process holds it: says so and waits, or raises UserError."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0.3)
    except filelock.Timeout:
        if not wait:
            raise UserError(f"{path.parent} is in use by another process") from None
        print(f"another process is writing {path.parent}; waiting for it", flush=True)
        lock.acquire()
    return lock


@contextlib.contextmanager
def plain_errors(path: Path):
    """A full, read-only or forbidden disk as one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; what was complete before is kept") from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def return_statistics(returns: np.ndarray) -> dict[str, float]:
    """mean, std, min, quartiles and max of returns (E,), named as in V-D4RL's Table 5."""
    quartiles = zip(("min", "p25", "median", "p75", "max"), np.percentile(returns, [0, 25, 50, 75, 100]))
    found = {"mean": np.mean(returns), "std": np.std(returns)} | dict(quartiles)
    return {name: round(float(value), 2) for name, value in found.items()}


def write_meta(path: Path, meta: dict) -> None:
    """`meta` with counts, returns and hashes of the arrays in `path`, as its meta.json, whole or not at all."""
    reward, episode = (np.load(path / f"{name}.npy", mmap_mode="r") for name in ("reward", "episode"))
    returns = np.add.reduceat(reward.astype(np.float64), episode)  # undiscounted; the reset row's reward is 0
    facts = {"format": 1, "rows": len(reward), "episodes": len(episode), "transitions": len(reward) - len(episode)}
    facts |= {"returns": return_statistics(returns), "episode_returns": returns.round(3).tolist()}
    hashes = {file.stem: sha256(file) for file in sorted(path.glob("*.npy"))}
    facts |= {"versions": provenance("cpu")["versions"], "sha256": hashes}
    write_atomically(path / "meta.json", json.dumps(meta | facts, indent=1).encode())


def write_header(file, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """The .npy header, 128 bytes for any number of rows: numpy leaves room for the first axis to grow."""
    file.seek(0)
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
    assert file.tell() == HEADER


def arrival_rows(images: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminal: bool) -> dict:
    """An episode of T steps as T+1 rows. images (T+1, 3, S, S), actions (T, A), rewards (T,)."""
    return {
        "image": images,
        "action": np.concatenate([np.zeros_like(actions[:1]), actions]),
        "reward": np.concatenate([[0.0], rewards]),
        "discount": np.concatenate([np.ones(len(actions)), [0.0 if terminal else 1.0]]),
    }


class DatasetWriter:
    """Writes a set, one whole episode at a time; an interrupted writer continues with its next episode.

    task: of make_env, to evaluate in, rendered in `render` quality; "own": none. mujoco: the version that rendered the
    frames, if one did. recipe: what tells one set from another; an unfinished set of another is begun anew.

    The set counts once the `with` block ends without an exception. `writer.episodes`: how many there are, those of an
    interrupted writer included. `writer.complete`: the set was there already, it takes no more. Raises UserError for
    a bad episode (nothing of it is written) and for a full disk. Waits for another process that writes the same set."""

    def __init__(self, path, size: int, action_dim: int, task: str = "own", source: str = "own", render: str = "fast",
                 mujoco: str | None = None, recipe: dict | None = None, variation: dict | None = None):  # fmt: skip
        self.path, self.progress, self.files = Path(path), Path(path, "progress.json"), {}
        self.boundaries = [0]  # the row behind each whole episode
        meta = {"task": task, "source": source, "name": self.path.name, "size": size, "action_dim": action_dim,
                "render": render, "mujoco": mujoco, "recipe": recipe or {}}  # fmt: skip
        meta |= {"variation": variation} if variation else {}  # of the looks or the body, see variations.py
        self.meta = json.loads(json.dumps(meta, default=lambda number: number.item()))  # of NumPy
        wrong = [name for name, kind in common.META.items() if not isinstance(self.meta[name], kind)]
        if wrong or min(size, action_dim) < 1 or render not in common.RENDER_QUALITY:  # Dataset would refuse it
            raise UserError(f"{path}: a wrong value of {wrong or 'size, action_dim or render'} in {meta}")
        size, action_dim = self.meta["size"], self.meta["action_dim"]
        self.shapes = {"image": (3, size, size), "action": (action_dim,), "reward": (), "discount": ()}

    def __enter__(self):
        with contextlib.ExitStack() as opened, plain_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            opened.callback(take_lock(self.path / ".lock", wait=True).release)
            self.complete = (self.path / "meta.json").exists()  # perhaps made by the process that was waited for
            if not self.complete:
                saved = common.read(self.progress) if self.progress.exists() else {}
                if saved.get("meta") == self.meta:
                    self.boundaries = saved["boundaries"]
                elif saved:
                    print(f"{self.path}: begun anew, the unfinished set there was of another recipe")
                    self.progress.unlink()
                for name in self.shapes:
                    file = self.path / f"{name}.npy"
                    if not self.episodes:
                        file.unlink(missing_ok=True)  # a medexp may share these frames
                    file.touch()
                    if self.episodes and file.stat().st_size < self.end(name):
                        raise UserError(f"{file} is shorter than progress.json says; delete {self.path}")
                    self.files[name] = opened.enter_context(open(file, "r+b"))
            self.opened = opened.pop_all()
        return self

    @property
    def episodes(self) -> int:
        return len(self.boundaries) - 1

    def end(self, name: str) -> int:
        """Bytes of a file up to its last whole episode. What is behind, half an episode, is overwritten or cut off."""
        return HEADER + self.boundaries[-1] * int(np.prod(self.shapes[name])) * np.dtype(ARRAYS[name]).itemsize

    def add(self, frames, actions, rewards, terminal: bool = False) -> None:
        """frames (T+1, S, S, 3) uint8; actions (T, A) in [-1, 1], action t leads from frame t to frame t+1;
        rewards (T,); terminal: whether the last step ended the episode for good (not by a time limit)."""
        if not self.files:
            raise UserError(f"{self.path} is finished (delete it to make it anew), or this is outside the with block")
        frames, actions, rewards = self.checked(frames, actions, rewards, terminal)
        boundary = self.boundaries[-1] + len(frames)
        with plain_errors(self.path):
            for name, rows in arrival_rows(frames.transpose(0, 3, 1, 2), actions, rewards, terminal).items():
                self.files[name].seek(self.end(name))
                self.files[name].write(np.ascontiguousarray(rows, ARRAYS[name]).data)
                self.files[name].flush()
        progress = {"meta": self.meta, "boundaries": [*self.boundaries, boundary]}
        write_atomically(self.progress, json.dumps(progress).encode())  # last: now the episode counts
        self.boundaries.append(boundary)

    def checked(self, frames, actions, rewards, terminal) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """frames, actions and rewards as arrays. Raises UserError for what a set cannot hold."""
        here = f"episode {self.episodes}"
        try:
            with np.errstate(over="ignore"):  # beyond float32: inf, which is refused below
                actions, rewards = np.asarray(actions, np.float32), np.asarray(rewards, np.float32)
            frames = np.asarray(frames)
        except (TypeError, ValueError) as error:  # text, or frames of two sizes
            raise UserError(f"{here}: frames, actions or rewards are no array of numbers ({error})") from None
        size, action_dim, steps = self.meta["size"], self.meta["action_dim"], max(len(np.atleast_1d(actions)), 1)
        shapes = {"frames": (frames, (steps + 1, size, size, 3)), "actions": (actions, (steps, action_dim))}
        shapes |= {"rewards": (rewards, (steps,)), "terminal": (np.asarray(terminal), ())}
        for name, (array, shape) in shapes.items():
            if array.shape != shape:
                raise UserError(f"{here}: {name} {array.shape}, expected {shape}")
        if frames.dtype != np.uint8:
            raise UserError(f"{here}: frames are {frames.dtype}, expected uint8 in 0..255")
        if not (np.abs(actions) <= 1 + 1e-6).all() or not np.isfinite(rewards).all():
            raise UserError(f"{here}: actions must lie in [-1, 1] and rewards be finite as float32")
        return frames, actions, rewards

    def __exit__(self, kind, *_) -> None:
        with plain_errors(self.path), self.opened:  # which closes the files and releases the lock
            if kind is None and not self.complete:
                self.finish()

    def finish(self) -> None:
        if not self.episodes:
            raise UserError(f"{self.path}: no episode was added, so there is no set")
        for name, shape in self.shapes.items():
            write_header(self.files[name], np.dtype(ARRAYS[name]), (self.boundaries[-1], *shape))
            self.files[name].truncate(self.end(name))
        with open(self.path / "episode.npy", "wb") as self.files["episode"]:
            np.save(self.files["episode"], np.array(self.boundaries[:-1], np.int64))
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
        write_meta(self.path, self.meta)
        self.progress.unlink()
