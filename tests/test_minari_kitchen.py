"""data/minari_kitchen.py on a small local set of Minari's form, recorded here."""

import warnings

import gymnasium
import minari
import minari_kitchen
import numpy as np
import pytest
from minari.data_collector.episode_buffer import EpisodeBuffer
from store import DatasetWriter

from common import Dataset, TransitionBuffer, UserError, make_env


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """In $MINARI_DATASETS_PATH test/kitchen-v0: two episodes, random actions, the second with the microwave open.
    Returns the set and what the environment showed, 24 px."""
    path, env, buffers, images = tmp_path_factory.mktemp("minari"), make_env("kitchen-mixed", 24, 1), [], []
    rng = np.random.default_rng(0)
    for number, steps in enumerate((4, 6)):
        states, actions = [], rng.uniform(-1, 1, (steps, 9))
        for action in (None, *actions):
            if number:
                env.simulator.data.qpos[22] = -0.75  # the microwave's door
            image, *_, info = env.reset(number) if action is None else env.step(action)
            states.append(info["state"].astype(np.float64))
            images.append(image)
        nothing = np.zeros(steps, bool)
        buffers.append(EpisodeBuffer(observations={"observation": np.stack(states)}, actions=actions,
                                     rewards=np.zeros(steps), terminations=nothing, truncations=nothing))  # fmt: skip
    box = gymnasium.spaces.Box
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(path))
        patch.setattr(warnings, "warn", lambda *_, **__: None)  # it asks for authors and links
        minari.create_dataset_from_buffers(
            "test/kitchen-v0", buffers, action_space=box(-1, 1, (9,), np.float64),
            observation_space=gymnasium.spaces.Dict({"observation": box(-np.inf, np.inf, (59,), np.float64)}),
        )  # fmt: skip
        yield minari.load_dataset("test/kitchen-v0"), np.stack(images)


def convert(data_dir, **flags) -> None:
    flags = {"minari_id": "test/kitchen-v0", "size": 24, "data_dir": data_dir} | flags
    minari_kitchen.main(minari_kitchen.Args(**flags))


def test_the_set_is_what_was_recorded(recorded, tmp_path, monkeypatch, capsys):
    """Though its conversion was interrupted and continued."""
    original, added = DatasetWriter.add, []

    def add(self, *episode):
        added.append(self.episodes)
        if len(added) == 2:
            raise KeyboardInterrupt
        original(self, *episode)

    monkeypatch.setattr(DatasetWriter, "add", add)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path, workers=2)
    convert(tmp_path, workers=2)
    assert added == [0, 1, 1]  # the first episode is kept
    printed = capsys.readouterr().out
    assert "2 episodes, 10 transitions" in printed and "0: 1, 1: 1, 2: 0" in printed
    dataset = Dataset(tmp_path / "made" / "kitchen-mixed" / "mixed-24px")
    episodes = list(recorded[0].iterate_episodes())
    assert dataset.task == "kitchen-mixed" and dataset.lengths.tolist() == [5, 7]
    TransitionBuffer(dataset, 4)
    for first, episode in zip(dataset.first_rows, episodes):
        rows = slice(first + 1, first + 1 + len(episode.actions))
        np.testing.assert_allclose(dataset.action[rows], episode.actions, rtol=1e-6)
    assert dataset.reward[1:5].max() == 0 and (dataset.reward[6:] == 1).all()  # step after step, not once
    stored, seen = dataset.images[0].astype(float), recorded[1].astype(float)
    assert seen.shape == stored.shape and seen.std() > 10
    here, before = np.abs(stored - seen).mean((1, 2, 3)), np.abs(stored[1:] - seen[:-1]).mean((1, 2, 3))
    assert (here < 1.5).all() and (here[1:] < 0.5 * before).all()  # but for the state's noise
    convert(tmp_path)  # it is there
    with pytest.raises(UserError, match="was made with another --render or --minari-id; delete it"):
        convert(tmp_path, render="reference")


def test_statistics_alone_and_mistakes(recorded, tmp_path, capsys):
    convert(tmp_path, dataset="partial", stats_only=True)
    assert "0.0 % solve the task" in capsys.readouterr().out
    with pytest.raises(UserError, match="--workers -2: from 1"):
        convert(tmp_path, workers=-2)
    assert not list(tmp_path.iterdir())
