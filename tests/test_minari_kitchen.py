"""data/minari_kitchen.py on a small local set of Minari's form, recorded here."""

import json
import subprocess
import warnings

import gymnasium
import minari
import minari_kitchen
import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, run_python
from minari.data_collector.episode_buffer import EpisodeBuffer

import common
import manipulation
from common import make_env

STEPS = (4, 6)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """$MINARI_DATASETS_PATH with test/kitchen-v0: two episodes, random actions, the second with the microwave open;
    the set; what the environment showed, 24 px."""
    path, env, buffers, images = tmp_path_factory.mktemp("minari"), make_env("kitchen-mixed", 24, 1), [], []
    rng = np.random.default_rng(0)
    for number, steps in enumerate(STEPS):
        image, info = env.reset(number)
        states, actions = [info["state"].astype(np.float64)], rng.uniform(-1, 1, (steps, 9))
        images.append(image)
        for action in actions:
            if number:
                env.data.qpos[22] = -0.75  # the microwave's door
            image, *_, info = env.step(action)
            states.append(info["state"].astype(np.float64))
            images.append(image)
        nothing = np.zeros(steps, bool)
        buffers.append(EpisodeBuffer(observations={"observation": np.stack(states)}, actions=actions,
                                     rewards=np.zeros(steps), terminations=nothing, truncations=nothing))  # fmt: skip
    env.close()
    box = gymnasium.spaces.Box
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(path))
        patch.setattr(warnings, "warn", lambda *_, **__: None)  # it asks for authors and links
        minari.create_dataset_from_buffers(
            "test/kitchen-v0", buffers, action_space=box(-1, 1, (9,), np.float64),
            observation_space=gymnasium.spaces.Dict({"observation": box(-np.inf, np.inf, (59,), np.float64)}),
        )  # fmt: skip
        yield path, minari.load_dataset("test/kitchen-v0"), np.stack(images)


def convert(recorded, *flags) -> subprocess.CompletedProcess:
    environment = ENVIRONMENT | {"MINARI_DATASETS_PATH": str(recorded[0])}
    return run_python(ROOT / "data" / "minari_kitchen.py", *flags, env=environment)


def test_the_set_is_what_was_recorded(recorded, tmp_path):
    flags = ["--dataset", "mixed", "--minari-id", "test/kitchen-v0", "--size", 24, "--data-dir", tmp_path]
    done = convert(recorded, *flags, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "2 episodes, 10 transitions" in done.stdout and "0: 1, 1: 1, 2: 0" in done.stdout
    dataset = common.Dataset(tmp_path / "made" / "kitchen-mixed" / "mixed-24px")
    part, episodes = dataset.parts[0], list(recorded[1].iterate_episodes())
    assert dataset.task == "kitchen-mixed" and part.lengths.tolist() == [5, 7]
    part.check_values()
    for first, episode in zip(part.episode, episodes):
        rows = slice(first + 1, first + 1 + len(episode.actions))
        np.testing.assert_allclose(part.action[rows], episode.actions, rtol=1e-6)
    assert part.reward[1:5].max() == 0 and (part.reward[6:] == 1).all()  # step after step, not once
    assert json.loads((part.path / "meta.json").read_text())["recipe"]["camera"]["distance"] == 1.86
    stored, seen = part.image.astype(float), recorded[2].astype(float)
    assert seen.shape == stored.shape and seen.std() > 10
    here, before = np.abs(stored - seen).mean((1, 2, 3)), np.abs(stored[1:] - seen[:-1]).mean((1, 2, 3))
    # what was seen in this row, but for the state's noise
    assert (here < 1.5).all() and (here[1:] < 0.5 * before).all()
    again = convert(recorded, *flags)
    assert again.returncode == 0, again.stderr  # it is there
    other = convert(recorded, *flags, "--render", "reference")
    assert other.returncode == 1 and "was made with another --render or --minari-id; delete it" in other.stderr


def test_an_interrupted_conversion_continues(recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(recorded[0]))
    monkeypatch.setattr(minari_kitchen, "load_minari", lambda name: recorded[1])
    original, added = common.DatasetWriter.add, []

    def add(self, *episode):
        added.append(self.episodes)
        if len(added) == 2:
            raise KeyboardInterrupt
        original(self, *episode)

    monkeypatch.setattr(common.DatasetWriter, "add", add)
    folders = [tmp_path / name for name in ("one", "two")]
    args = [minari_kitchen.Args(size=24, workers=1, data_dir=str(folder)) for folder in folders]
    with pytest.raises(KeyboardInterrupt):
        minari_kitchen.main(args[0])
    minari_kitchen.main(args[0])
    assert added == [0, 1, 1]  # the first episode is kept
    minari_kitchen.main(args[1])
    metas = [json.loads((folder / "made/kitchen-mixed/mixed-24px/meta.json").read_text()) for folder in folders]
    assert metas[0]["sha256"] == metas[1]["sha256"] and metas[0]["episodes"] == 2


def test_rewards_are_those_of_the_environment():
    """objects_in_place of the state that a step leads to is the reward of make_env's step, but for its noise."""
    env = make_env("kitchen-partial", None)
    env.reset(0)
    env.data.qpos[22] = -0.75
    rng = np.random.default_rng(0)
    for _ in range(5):
        _, reward, _, _, info = env.step(rng.uniform(-1, 1, 9))
        assert manipulation.objects_in_place("kitchen-partial", info["state"][None].astype(float)).item() == reward == 1


def test_statistics_alone(recorded, tmp_path):
    flags = ["--dataset", "partial", "--minari-id", "test/kitchen-v0", "--stats-only", "--data-dir", tmp_path]
    done = convert(recorded, *flags)
    assert done.returncode == 0 and "0.0 % solve the task" in done.stdout and not list(tmp_path.iterdir())


def test_what_cannot_be_loaded(recorded, tmp_path):
    done = convert(recorded, "--minari-id", "test/none-v0", "--data-dir", tmp_path)
    message = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and message.startswith("error: --minari-id test/none-v0")
    assert "ImportError" not in message  # what it fetches with is installed


def test_a_missing_kitchen_set_names_the_command(tmp_path):
    done = run_python(
        ROOT / "algos" / "moto.py", "--task", "kitchen-mixed", "--dataset", "mixed", "--data-dir", tmp_path
    )
    assert done.returncode == 1 and "python data/minari_kitchen.py --dataset mixed" in done.stderr
