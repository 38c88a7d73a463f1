"""SequenceBuffer against the set itself: which windows there are, how often, what is in them; batches of a GPU."""

import collect
import numpy as np
import pytest
import torch
from conftest import write_set
from hypothesis import given, settings
from hypothesis import strategies as st

from common import Dataset, SequenceBuffer, TransitionBuffer, UserError


def sets_of(folder, lengths, parts: int) -> Dataset:
    """Episodes of `lengths`; as one set or, with parts = 2, as two that are joined."""
    sets = [Dataset(write_set(folder / str(i), lengths, 3, terminal_last=True, seed=i)) for i in range(parts)]
    if parts == 1:
        return sets[0]
    collect.join(folder / "both", sets)
    return Dataset(folder / "both")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(2, 10), st.integers(1, 2))
def test_every_window_equals_a_naive_loop(tmp_path_factory, lengths, window, parts):
    """lengths: steps, so one row less than an episode has."""
    dataset = sets_of(tmp_path_factory.mktemp("naive"), lengths, parts)
    if max(lengths) + 1 < window:
        with pytest.raises(UserError, match=f"no episode is long enough for --window {window}"):
            SequenceBuffer(dataset, 8, window)
        return
    arrays = {name: getattr(dataset, name) for name in ("action", "reward", "discount")}
    arrays["image"] = np.concatenate(dataset.images)
    expected, first_rows, row = set(), set(), 0
    for steps in lengths * parts:
        first_rows.add(row)
        expected |= {row + start for start in range(steps + 1 - window + 1)}
        row += steps + 1
    buffer, found = SequenceBuffer(dataset, 400, window), set()
    assert int(buffer.starts.sum()) == len(expected)
    for _ in range(2):
        batch = buffer.sample()
        rows = batch.row.numpy()
        found |= set(rows[:, 0].tolist())
        assert (np.diff(rows) == 1).all() and (np.diff(rows[:, 0]) >= 0).all()
        for name, array in arrays.items():
            np.testing.assert_array_equal(getattr(batch, name), array[rows])
        first = np.isin(rows, list(first_rows))
        assert not batch.reward.numpy()[first].any() and not batch.action.numpy()[first].any()
        first[:, 0] = True
        np.testing.assert_array_equal(batch.is_first, first)
    assert found == expected
    assert set(buffer.is_first.nonzero().flatten().tolist()) == first_rows  # sampling changes no set


def test_episodes_are_drawn_alike_however_long_they_are(tmp_path, capsys):
    dataset = Dataset(write_set(tmp_path / "set", lengths=(60, 6, 3), size=1))
    rows = SequenceBuffer(dataset, 20_000, 5).sample(images=False).row[:, 0]
    assert "note: 1 of 3 episodes in" in capsys.readouterr().out  # the third is too short
    assert (rows >= 61).float().mean().item() == pytest.approx(0.5, abs=0.02) and rows.max() < 68
    long = torch.bincount(rows[rows < 61])  # and its starts alike
    assert len(long) == 57 and long.min() > 100


BOTH = pytest.mark.parametrize("make", [SequenceBuffer, TransitionBuffer])


@BOTH
def test_sampling_continues_from_its_state_and_leaves_the_global_generator_alone(tmp_path, make):
    dataset = Dataset(write_set(tmp_path / "set", size=3))
    buffer, twin, other = (make(dataset, 8, 3, seed=seed) for seed in (5, 5, 6))
    before, rewards = torch.get_rng_state(), buffer.sample().reward
    assert torch.equal(twin.sample().reward, rewards) and not torch.equal(other.sample().reward, rewards)
    state = {name: value.clone() for name, value in buffer.state_dict().items()}
    expected = buffer.sample()
    assert not torch.equal(expected.reward, rewards) and torch.equal(torch.get_rng_state(), before)
    for again in (twin, other):
        again.load_state_dict(state)
    assert all(torch.equal(*pair) for pair in zip(twin.sample(), expected))
    if make is SequenceBuffer:
        assert torch.equal(other.sample(images=False).row, expected.row)  # without images the same rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("buffer_device", ["cpu", "cuda"])
@BOTH
def test_batches_on_cuda_are_those_of_the_cpu(tmp_path, make, buffer_device):
    dataset = Dataset(write_set(tmp_path / "set", lengths=(9, 7), size=3))
    here, there = make(dataset, 8, 3), make(dataset, 8, 3, device="cuda", buffer_device=buffer_device)
    for one, two in zip(here.sample(), there.sample()):
        assert two.device.type == "cuda" and torch.equal(one, two.cpu())
