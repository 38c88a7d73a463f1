"""SequenceBuffer against the set itself: which windows there are, how often, what is in them."""

import numpy as np
import pytest
import torch
from conftest import write_set

from common import Dataset, SequenceBuffer, TransitionBuffer, UserError


def spelled(image: torch.Tensor) -> np.ndarray:
    """The global row that red and green of each frame spell. (B, T, 3, S, S) -> (B, T)."""
    return (image[:, :, 0, 0, 0].long() + 256 * image[:, :, 1, 0, 0].long()).numpy()


def test_windows_lie_in_one_episode_and_reach_its_last_row(tmp_path):
    dataset = Dataset(write_set(tmp_path / "set", lengths=(9, 5, 6), size=3))  # rows 0..9, 10..15, 16..22
    buffer = SequenceBuffer(dataset, 64, 6)
    starts = set()
    for _ in range(50):
        rows = spelled(buffer.sample().image)
        assert (np.diff(rows) == 1).all()
        starts |= set(rows[:, 0].tolist())
    assert starts == {0, 1, 2, 3, 4, 10, 16, 17}


def test_501_rows_have_452_windows_of_50(tmp_path):
    dataset = Dataset(write_set(tmp_path / "set", lengths=(500,), size=1))
    buffer = SequenceBuffer(dataset, 5000, 50)
    starts = buffer.sample().row[:, 0]
    assert buffer.starts.tolist() == [452]
    assert starts.min() == 0 and starts.max() == 451  # row 500 is the last of the last window


def test_episodes_are_drawn_alike_however_long_they_are(tmp_path):
    dataset = Dataset(write_set(tmp_path / "set", lengths=(60, 6), size=1))
    rows = SequenceBuffer(dataset, 20_000, 5).sample(images=False).row[:, 0]
    assert (rows >= 61).float().mean().item() == pytest.approx(0.5, abs=0.02)
    long = torch.bincount(rows[rows < 61])  # and its starts alike
    assert len(long) == 57 and long.min() > 100


@pytest.mark.parametrize("force", [True, False])
def test_rows_come_with_what_led_to_them(tmp_path, force):
    path = write_set(tmp_path / "set", lengths=(7, 5), size=3, terminal_last=True)
    dataset = Dataset(path)
    buffer = SequenceBuffer(dataset, 32, 4, force_first=force)
    batch = buffer.sample()
    rows, part = spelled(batch.image), dataset.parts[0]
    assert (batch.row.numpy() == rows).all() and (np.diff(rows[:, 0]) >= 0).all()
    for name in ("action", "reward", "discount"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(part, name)[rows].astype(np.float32))
    np.testing.assert_array_equal(batch.image, part.image[rows])
    first = np.isin(rows, [0, 8])
    assert first.any() and (batch.reward.numpy()[first] == 0).all() and (batch.discount == 0).any()
    first[:, 0] |= force
    np.testing.assert_array_equal(batch.is_first, first)
    assert (buffer.is_first.nonzero().flatten() == torch.tensor([0, 8])).all()  # forcing it changes no set


def test_parts_are_read_as_one_set(tmp_path):
    import json

    one, two = (write_set(tmp_path / name, lengths=(6, 4), size=3, seed=seed) for seed, name in enumerate("ab"))
    both = tmp_path / "both"
    both.mkdir()
    (both / "meta.json").write_text(json.dumps({"parts": ["../a", "../b"]}))
    batch = SequenceBuffer(Dataset(both), 40, 3).sample()
    blue = torch.from_numpy(np.concatenate([np.load(path / "image.npy") for path in (one, two)]))
    assert torch.equal(batch.image, blue[batch.row]) and (batch.row[:, 0] >= 12).any() and (batch.row[:, 0] < 12).any()
    np.testing.assert_array_equal(
        batch.action, np.concatenate([np.load(path / "action.npy") for path in (one, two)])[batch.row]
    )


def test_sampling_continues_from_its_state_and_leaves_the_global_generator_alone(tmp_path):
    dataset = Dataset(write_set(tmp_path / "set", size=3))
    buffer, other = SequenceBuffer(dataset, 8, 3, seed=5), SequenceBuffer(dataset, 8, 3, seed=6)
    buffer.sample()
    state, before = buffer.state_dict(), torch.get_rng_state()
    state = {name: value.clone() for name, value in state.items()}
    rows = buffer.sample().row
    other.load_state_dict(state)
    assert torch.equal(other.sample(images=False).row, rows)
    assert not torch.equal(buffer.sample().row, rows) and torch.equal(torch.get_rng_state(), before)


def test_short_episodes_are_named(tmp_path, capsys):
    dataset = Dataset(write_set(tmp_path / "set", lengths=(9, 4), size=3))
    assert SequenceBuffer(dataset, 8, 6).sample().row.max() < 10
    assert "note: 1 episodes of" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"its longest episode has 10 rows, --window 11 needs as many"):
        SequenceBuffer(dataset, 8, 11)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("buffer_device", ["cpu", "cuda"])
def test_batches_on_cuda_are_those_of_the_cpu(tmp_path, device, buffer_device):
    dataset = Dataset(write_set(tmp_path / "set", lengths=(9, 7), size=3))
    for make in (
        lambda **where: SequenceBuffer(dataset, 8, 4, **where),
        lambda **where: TransitionBuffer(dataset, 8, **where),
    ):
        here, there = make(), make(device=device, buffer_device=buffer_device)
        for one, two in zip(here.sample(), there.sample()):
            assert two.device.type == "cuda" and torch.equal(one, two.cpu())
