"""What V-D4RL varies about the world (arXiv:2206.04779, Sections 5.1 and 5.2), for common.make_env: looks and bodies.

    look   background, camera and colours of the Distracting Control Suite (arXiv:2101.02722), at three levels
    body   walker-walk with eight lengths of the left foot, cheetah-run with eight of the torso, as in MTEnv

V-D4RL's copy of the suite draws once per episode and keeps that, unless `moving` asks for the suite's own dynamic
setting. Levels low, moderate, high are the suite's easy, medium, hard. Differs from that copy:
  the numbers come from NumPy's new generators, so our draws differ from theirs;
  the looks of a test have backgrounds that training has not; theirs have those of training again, so ours are harder;
  other bodies keep dm_control's blue floor and sky with stars; theirs have a grey floor and no stars;
  backgrounds are DAVIS 2017's only where a folder is given, else stills made here; 256 x 256 pixels, theirs 800 x 800.
The letters A to H for MTEnv's levels 1 to 8 are an inference: V-D4RL's text orders them by length.

Like manipulation.py this imports nothing of the project. Errors are ValueErrors of one line; a task without
bodies is a KeyError, as an unknown one is there."""

import functools
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

TASKS = ("walker-walk", "cheetah-run")  # that have looks and bodies; the suite has no humanoid
SCALES = {"low": 0.1, "moderate": 0.2, "high": 0.3}  # of all three distractions
BACKGROUNDS = {"low": 4, "moderate": 8, "high": 60}  # of each level: so many of the first stills
STILLS = {"train": 60, "test": 30}  # as many as DAVIS 2017 has videos
PROCEDURAL = "procedural"  # the stills that are made here, in place of a folder
STILL_SIZE = 256  # pixels per side
BODIES = "ABCDEFGH"  # walker C and cheetah A are dm_control's own
TRAIN_BODIES = "BCFG"
GROUPS = {"score": TRAIN_BODIES, "score_interpolation": "DE", "score_extrapolation": "AH"}  # of bodies, in evaluation


# ==== Looks ====


class Look(NamedTuple):
    """One draw of the distractions: a function of these alone."""

    level: str  # of SCALES
    split: str  # of STILLS
    number: int
    moving: bool = False
    folder: str | None = None  # of backgrounds; None: stills made here


def look_of(variation: dict, episode: int) -> Look | None:
    """The look of one episode of a set with that distraction; None: no distraction. Shifted ones are evenly spaced."""
    shifted, redraw = variation["shifted"], variation["redraw"]
    if (episode + 1) * shifted // 100 == episode * shifted // 100:
        return None
    number = 0 if redraw == "never" else episode + 1
    folder = None if variation["backgrounds"] == PROCEDURAL else variation["backgrounds"]
    return Look(variation["distraction"], "train", number, redraw == "dynamic", folder)


def evaluation_groups(variation: dict, episodes: int) -> dict[str, list[tuple[str | None, Look | None]]]:
    """Where a run on a set with that variation is evaluated: metric -> body and look of each episode.

    Distractions: score: none; score_train: those of the data; score_test: unseen ones of the same level, one for each
    episode. Bodies: score: those of the data; score_interpolation, score_extrapolation."""
    if "body" in variation:  # a part of such a set
        return {"score": [(variation["body"], None)] * episodes}
    if "bodies" in variation:
        return {name: [(letters[i % len(letters)], None) for i in range(episodes)] for name, letters in GROUPS.items()}
    shown = [episode for episode in range(100 * episodes) if look_of(variation, episode)][:episodes] or range(episodes)
    seen = [look_of(variation | {"shifted": 100}, episode) for episode in shown]
    if problem := backgrounds_problem(seen[0].folder):
        raise ValueError(problem)
    unseen = [look._replace(split="test", number=episode) for episode, look in enumerate(seen)]
    looks = {"score": [None] * episodes, "score_train": seen, "score_test": unseen}
    return {name: [(None, look) for look in group] for name, group in looks.items()}


class Distractor:
    """Changes what is drawn of a model: start() at an episode's begin, move() before each of its frames.

    The physics is untouched: materials' colours, the sky's texture and the camera's pose have no part in it."""

    camera = 0  # of both tasks: at the side, going along with the centre of mass

    def __init__(self, model, data, renderer):
        self.model, self.data, self.renderer = model, data, renderer
        self.colors = model.mat_rgba.copy()
        self.sky = int(np.flatnonzero(model.tex_type == mujoco.mjtTexture.mjTEXTURE_SKYBOX)[0])
        self.sky_size = int(model.tex_height[self.sky]), int(model.tex_width[self.sky])
        begin = int(model.tex_adr[self.sky])
        self.pixels = model.tex_data[begin : begin + STILL_SIZE**2 * 3]  # a view: where a still is written
        self.sky_pixels = self.pixels.copy()
        self.look = None

    def start(self, look: Look | None) -> None:
        """look None: the model as it was, to the byte."""
        changed, self.look = look != self.look, look
        if look is None:
            self.model.mat_rgba[:] = self.colors
            if changed:
                self.show(self.sky_pixels, self.sky_size)
            return
        seed = [zlib.crc32(word.encode()) for word in (look.level, look.split)]
        self.rng, self.scale = np.random.default_rng([*seed, look.number]), SCALES[look.level]
        self.clip = BackgroundClip(look, self.rng)
        rgb = self.colors[:, :3]
        self.rgb_low, self.rgb_high = (rgb - self.scale).clip(0), (rgb + self.scale).clip(None, 1)
        self.rgb = self.rng.uniform(self.rgb_low, self.rgb_high)
        angle, zoom = np.pi / 2 * self.scale, self.scale * np.array([-0.5, 1.5])
        centre = self.spherical(self.model.cam_poscom0[self.camera])
        low = centre * [1 + zoom[0], 1, 1] - [0, angle, angle]  # radius, polar and azimuth angle
        high = centre * [1 + zoom[1], 1, 1] + [0, angle, angle]
        self.low, self.high = np.maximum(low, [0, 0, -np.pi]), np.minimum(high, [np.inf, np.pi / 2, 0])
        self.radius, self.place = centre[0], self.cartesian(self.rng.uniform(self.low, self.high))
        self.roll, self.roll_limit = self.rng.uniform(-angle, angle), angle
        self.velocity, self.roll_velocity, self.first = np.zeros(3), 0.0, True

    def move(self) -> None:
        """Before each frame: simulating puts the camera back, and what is dynamic goes on."""
        if self.look is None:
            return
        if self.look.moving and not self.first:
            self.walk()
        if self.look.moving or self.first:
            self.model.mat_rgba[:, :3] = self.rgb
            self.show(self.clip.next().reshape(-1), (STILL_SIZE, STILL_SIZE))
        self.first = False
        self.aim()

    def walk(self) -> None:
        """The suite's dynamic setting: random walks of the camera, its roll, and every colour."""
        scale, radius, before = self.scale, self.radius, (self.place, self.roll)
        self.velocity = self.velocity + self.rng.normal(0, 0.1 * scale * radius / 4, 3)
        self.velocity *= min(1, 0.4 * scale * radius / 4 / np.linalg.norm(self.velocity))
        self.place = self.cartesian(self.spherical(self.place + self.velocity).clip(self.low, self.high))
        limit = np.pi / 50 * scale
        self.roll_velocity = np.clip(self.roll_velocity + self.rng.normal(0, np.pi / 300 * scale), -limit, limit)
        self.roll = np.clip(self.roll + self.roll_velocity, -self.roll_limit, self.roll_limit)
        self.velocity, self.roll_velocity = self.place - before[0], self.roll - before[1]  # what the bounds leave of it
        steps = self.rng.normal(0, 0.03 * scale, self.rgb.shape)
        self.rgb = (self.rgb + steps).clip(self.rgb_low, self.rgb_high)

    def aim(self) -> None:
        """Puts the camera where it was drawn, seen from the body's centre of mass, and turns it to the point that it
        looks at without a distraction."""
        model, camera = self.model, self.camera
        com = self.data.subtree_com[model.cam_bodyid[camera]]
        plain, forward = model.cam_poscom0[camera], -model.cam_mat0[camera].reshape(3, 3)[:, 2]  # from the com
        target = plain + forward * np.linalg.norm(plain)  # on its axis, as far away as the centre of mass
        back = (self.place - target) / np.linalg.norm(self.place - target)  # axes of a camera: right, up, back
        right = np.cross([0, 0, 1], back)
        right /= np.linalg.norm(right)
        up, cos, sin = np.cross(back, right), np.cos(self.roll), np.sin(self.roll)
        axes = np.stack([cos * right + sin * up, cos * up - sin * right, back], 1)
        self.data.cam_xpos[camera], self.data.cam_xmat[camera] = com + self.place, axes.reshape(-1)

    def show(self, pixels: np.ndarray, size: tuple[int, int]) -> None:
        """pixels (256 * 256 * 3,) uint8, the first of the sky; size: height and width that it has from now on. Where
        they are equal, it is one picture on all six sides."""
        self.pixels[:] = pixels
        self.model.tex_height[self.sky], self.model.tex_width[self.sky] = size
        self.renderer._gl_context.make_current()
        mujoco.mjr_uploadTexture(self.model, self.renderer._mjr_context, self.sky)

    @staticmethod
    def spherical(place: np.ndarray) -> np.ndarray:
        """(x, y, z) -> radius, polar angle from above, azimuth."""
        radius = np.linalg.norm(place)
        return np.array([radius, np.arccos(place[2] / radius), np.arctan2(place[1], place[0])])

    @staticmethod
    def cartesian(place: np.ndarray) -> np.ndarray:
        radius, polar, azimuth = place
        return radius * np.array([np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)])


# ==== Backgrounds ====


class BackgroundClip:
    """The background of one episode. Moving: a still made here drifts, a video plays back and forth."""

    def __init__(self, look: Look, rng: np.random.Generator):
        count = min(BACKGROUNDS[look.level], STILLS[look.split])
        index, self.shift = int(rng.integers(count)), rng.integers(-3, 4, 2)
        self.files = videos(look.folder, look.split)[index] if look.folder else []
        self.made = None if look.folder else still(look.split, index)
        self.time = int(rng.integers(len(self.files))) if look.folder and look.moving else 0

    def next(self) -> np.ndarray:
        """(256, 256, 3) uint8."""
        time, self.time = self.time, self.time + 1
        if self.made is not None:
            return np.roll(self.made, self.shift * time, (0, 1))
        last = len(self.files) - 1
        return picture(self.files[last - abs(last - time % (2 * last))] if last else self.files[0])


@functools.lru_cache(90)
def still(split: str, index: int) -> np.ndarray:
    """A random picture (256, 256, 3) uint8 that repeats without a seam: clouds of two colours, islands of a third."""
    rng = np.random.default_rng([zlib.crc32(split.encode()), index])
    clouds, islands = (smooth_field(rng, rng.uniform(1.2, 2.2)) for _ in range(2))
    colors = rng.uniform(0, 255, (3, 3))
    image = colors[0] + clouds[..., None] * (colors[1] - colors[0])
    shore = ((islands - rng.uniform(0.45, 0.75)) * 12).clip(0, 1)[..., None]
    return (image + shore * (colors[2] * (0.6 + 0.4 * clouds[..., None]) - image)).astype(np.uint8)


def smooth_field(rng: np.random.Generator, power: float) -> np.ndarray:
    """(256, 256) in [0, 1]: white noise whose amplitudes fall with frequency^power."""
    frequency = np.hypot(np.fft.fftfreq(STILL_SIZE)[:, None], np.fft.rfftfreq(STILL_SIZE)) * STILL_SIZE
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((STILL_SIZE, STILL_SIZE))) / frequency**power)
    return (field - field.min()) / (field.max() - field.min())


def backgrounds_problem(folder: str | None) -> str:
    """Why a folder has not the videos of both splits, in one line; "" if it has, or is None."""
    try:
        for split in STILLS if folder else ():
            videos(folder, split)
    except ValueError as error:
        return str(error)
    return ""


@functools.lru_cache
def videos(folder: str, split: str) -> list[list[Path]]:
    """The frames of each video of a split, in DAVIS' layout: JPEGImages/480p/<name>/*.jpg, and the names of the splits
    in ImageSets/2017/{train,val}.txt. Without these files the first 60 names are for training, the next 30 for test."""
    root = Path(folder, "JPEGImages", "480p")
    listed = Path(folder, "ImageSets", "2017", {"train": "train.txt", "test": "val.txt"}[split])
    names = listed.read_text().split() if listed.exists() else sorted(path.name for path in root.glob("*/"))
    if not listed.exists():
        names = names[:60] if split == "train" else names[60:90]
    found = [sorted((root / name).glob("*.jpg")) for name in sorted(names)]
    if len(found) < STILLS[split] or not all(found):
        have = f"{sum(map(bool, found))} of {STILLS[split]} folders for {split}ing with a .jpg"
        raise ValueError(f"--backgrounds {folder}: {have} in JPEGImages/480p")
    return found


@functools.lru_cache(64)
def picture(file: Path) -> np.ndarray:
    """A picture file, stretched to (256, 256, 3) uint8."""
    from PIL import Image

    return np.asarray(Image.open(file).convert("RGB").resize((STILL_SIZE, STILL_SIZE)))


# ==== Bodies ====


def load_body(task: str, body: str):
    """The dm_control environment of a task with the body of that letter: one geometry differs from dm_control's."""
    from dm_control.rl import control
    from dm_control.suite import cheetah, walker

    if task not in TASKS:
        raise KeyError(", ".join(TASKS))
    level = BODIES.index(body) + 1
    xml, assets = (walker if task == "walker-walk" else cheetah).get_model_and_assets()
    tree = ElementTree.fromstring(xml)
    if task == "walker-walk":
        tree.find(".//geom[@name='left_foot']").set("size", f"0.05 {0.07 + 0.01 * level:.2f}")
        physics = walker.Physics.from_xml_string(ElementTree.tostring(tree), assets)
        return control.Environment(physics, walker.PlanarWalker(move_speed=1), time_limit=25, control_timestep=0.025)
    half = 0.4 + 0.1 * level
    tree.find(".//geom[@name='torso']").set("fromto", f"-{half:.1f} 0 0 {half:.1f} 0 0")
    return control.Environment(cheetah.Physics.from_xml_string(ElementTree.tostring(tree), assets), cheetah.Cheetah(),
                               time_limit=10)  # fmt: skip
