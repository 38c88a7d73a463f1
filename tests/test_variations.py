"""variations.py and what is made with it: the looks and bodies that were asked for, one line for mistakes."""

import hashlib

import collect
import mujoco
import numpy as np
import pytest
import tyro
from collect import Args
from collectors import OWN_BODY
from conftest import SHORT

import common
import variations
from common import Dataset, EnvPool, UserError, make_env
from variations import BODIES, SCALES, STILLS, Look


def make(data_dir, episodes=4, dataset="random", **flags) -> tuple[Dataset, np.ndarray]:
    """A set of the cheetah, and its frames by episode, (E, T + 1, 3, 32, 32)."""
    args = Args("cheetah-run", dataset, 32, episodes * SHORT, data_dir=str(data_dir), **flags)
    collect.main(args)
    made = Dataset(collect.folder_of(args, dataset, args.transitions))
    return made, np.concatenate(made.images).reshape(episodes, SHORT + 1, 3, 32, 32)


def differs(one: np.ndarray, two: np.ndarray) -> list[bool]:
    """Episode by episode: whether every frame does."""
    return [bool((a != b).any((1, 2, 3)).all()) for a, b in zip(one, two)]


def test_the_shifted_episodes_are_the_ones_named_and_the_others_the_plain_set(short, tmp_path):
    plain, frames = make(tmp_path)
    for shifted, wanted in {0: "0000", 25: "0001", 75: "0111", 100: "1111"}.items():
        made, changed = make(tmp_path, distraction="low", shifted=shifted)
        assert differs(frames, changed) == [letter == "1" for letter in wanted]
        assert np.array_equal(frames[np.array(list(wanted)) == "0"], changed[np.array(list(wanted)) == "0"])
        assert np.array_equal(made.action, plain.action) and np.array_equal(made.reward, plain.reward)
        assert made.facts()["variation"]["shifted"] == shifted and not plain.facts()["variation"]
    again, same = make(tmp_path / "again", distraction="low", workers=1)
    assert np.array_equal(same, changed) and again.hash == made.hash
    _, joined = make(tmp_path, 8, "ranexp", distraction="low", shifted=50)
    assert np.array_equal(joined[:4], make(tmp_path, distraction="low", shifted=50)[1])


def test_a_look_is_drawn_once_or_for_each_episode_or_moves(short, tmp_path):
    draws = ("never", "episode", "dynamic")
    sky = {name: make(tmp_path, 2, distraction="high", redraw=name)[1][:, :, :, 0].astype(float) for name in draws}
    between = {name: np.abs(rows[0] - rows[1]).mean() for name, rows in sky.items()}  # the upper row of the pictures
    within = {name: np.abs(np.diff(rows, axis=1)).mean() for name, rows in sky.items()}
    assert between["episode"] > 10 * between["never"] and within["dynamic"] > 3 * within["episode"]
    assert np.array_equal(sky["dynamic"][:, 0], sky["episode"][:, 0])


def test_draws_and_backgrounds_of_training_and_test_never_coincide():
    pictures = [variations.still(split, i) for split, count in STILLS.items() for i in range(count)]
    assert len({hashlib.sha256(picture).digest() for picture in pictures}) == 90
    assert min(picture.std() for picture in pictures) > 5  # none is plain
    for level in SCALES:
        for redraw in ("never", "episode"):
            recipe = {"distraction": level, "shifted": 50, "redraw": redraw, "backgrounds": "procedural"}
            groups = variations.evaluation_groups(recipe, 10)
            looks = {name: [look for _, look in scenes] for name, scenes in groups.items()}
            assert looks["score"] == [None] * 10 and len(set(looks["score_train"])) == (1 if redraw == "never" else 10)
            assert len(set(looks["score_test"])) == 10 and {look.split for look in looks["score_test"]} == {"test"}
            assert set(looks["score_train"]) <= {variations.look_of(recipe, episode) for episode in range(20)}
    env = make_env("walker-walk", 32, 1)
    frames = [env.reset(0, Look("low", split, i))[0] for split in STILLS for i in range(10)]
    assert len({frame.tobytes() for frame in frames}) == 20
    plain = env.reset(0)[0]
    assert np.array_equal(plain, make_env("walker-walk", 32, 1).reset(0)[0])  # to the byte, after 20 looks


def test_a_camera_that_is_drawn_at_the_middle_sees_the_plain_picture():
    env = make_env("walker-walk", 64, 1)
    plain = env.reset(3)[0]
    env.reset(3, Look("low", "train", 0))
    distractor = env.distractor
    distractor.start(None)
    distractor.look, distractor.first = Look("low", "train", 0), False  # nothing is drawn, the camera is put in place
    distractor.place, distractor.roll = env.simulator.model.cam_poscom0[0], 0.0
    assert np.abs(env.frame().astype(int) - plain).max() <= 1
    distractor.roll = 0.3
    assert np.abs(env.frame().astype(int) - plain).max() > 50


SIZES = {"walker-walk": ("left_foot", [0.08, 0.09, 0.10, 0.11, 0.12, 0.13, 0.14, 0.15],
                         [1.780, 1.937, 2.094, 2.252, 2.409, 2.566, 2.723, 2.880]),
         "cheetah-run": ("torso", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2],
                         [6.250, 6.708, 7.115, 7.478, 7.805, 8.101, 8.370, 8.616])}  # fmt: skip


@pytest.mark.parametrize("task", SIZES)
def test_bodies_have_the_sizes_and_masses_of_v_d4rls_files(task):
    geom, lengths, masses = SIZES[task]
    for body, length, mass in zip(BODIES, lengths, masses, strict=True):
        model = make_env(task, None, body=body).simulator.model
        index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, geom)
        assert model.geom_size[index, 1] == pytest.approx(length)
        assert model.body_mass[model.geom_bodyid[index]] == pytest.approx(mass, abs=1e-3)
    own = make_env(task, None, body=OWN_BODY[task]), make_env(task, None)
    assert np.array_equal(own[0].simulator.model.body_mass, own[1].simulator.model.body_mass)
    states = [env.step(np.full(6, 0.3))[4]["state"] for env in own if env.reset(5)]
    assert np.array_equal(*states)


def test_an_evaluation_scores_each_group_by_itself():
    groups = variations.evaluation_groups({"bodies": "BCFG"}, 4)
    assert {name: "".join(body for body, _ in scenes) for name, scenes in groups.items()} == {
        "score": "BCFG", "score_interpolation": "DEDE", "score_extrapolation": "AHAH"}  # fmt: skip
    assert variations.evaluation_groups({"body": "F"}, 2) == {"score": [("F", None)] * 2}
    facts = {"task": "cheetah-run", "size": 16, "render": "fast", "action_dim": 6, "mujoco": None, "set": "x"}
    args = tyro.cli(Args, args=[])  # has no eval_every: what evaluation_pool needs is set below
    args.eval_every, args.eval_episodes = None, 2
    pool = common.evaluation_pool(args, facts | {"variation": {"bodies": "BCFG"}})
    obs = pool.reset([0] * 6)
    assert len({picture.tobytes() for picture in obs}) == 6  # B, C, D, E, A, H
    assert pool.summary(np.arange(6.0))["score_extrapolation"] == 0.45 and pool.summary(np.arange(6.0))["score"] == 0.05
    with pytest.raises(UserError):
        EnvPool("humanoid-walk", 16, 1, groups={"score": [("B", None)]})


def test_a_folder_of_backgrounds_in_the_layout_of_davis(tmp_path):
    from PIL import Image

    for i in range(90):
        folder = tmp_path / "JPEGImages" / "480p" / f"video{i:02d}"
        folder.mkdir(parents=True)
        for frame in range(2):
            Image.new("RGB", (20, 10), (i, 100 * frame, 0)).save(folder / f"{frame:05d}.jpg", quality=95)
    with pytest.raises(ValueError, match="59 of 60 folders for training"):
        (folder.parent / "video03" / "00000.jpg").unlink(), (folder.parent / "video03" / "00001.jpg").unlink()
        variations.videos(str(tmp_path), "train")
    assert [files[0].parent.name for files in variations.videos(str(tmp_path), "test")] == [
        f"video{i}" for i in range(60, 90)
    ]
    clip = variations.BackgroundClip(Look("low", "test", 0, True, str(tmp_path)), np.random.default_rng(0))
    shown = [clip.next()[0, 0] for _ in range(4)]
    assert [pixel[1] > 50 for pixel in shown] in ([True, False, True, False], [False, True, False, True])  # to and fro
