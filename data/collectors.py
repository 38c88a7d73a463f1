"""The policies that collect sets: they act on states, in NumPy. Actors and records lie in data/policies/."""

import warnings
from pathlib import Path

import numpy as np

POLICIES = Path(__file__).resolve().parent / "policies"
OWN_BODY = {"walker-walk": "C", "cheetah-run": "A"}  # dm_control's own among those of variations.py
GRID = 32767  # actions of an actor are whole multiples of 1 / GRID, so that two bytes record them exactly


def policy_file(task: str, name: str, body: str | None = None) -> Path:
    """Where an actor is: of medium or expert; or the record of mixed."""
    own = body in (None, OWN_BODY.get(task))
    return POLICIES / task / f"{name}.npz" if own else POLICIES / task / body / f"{name}.npz"


class UniformPolicy:
    """Actions uniform in [-1, 1]."""

    def __init__(self, action_dim: int):
        self.action_dim = action_dim

    def act(self, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(-1, 1, self.action_dim).astype(np.float32)


class SACPolicy:
    """The stochastic actor of train_sac.py in NumPy, one state at a time: the same bits in any batch."""

    def __init__(self, path: Path):
        with np.load(path) as arrays:
            self.scale = arrays["scale"]
            self.layers = [(arrays[f"W{i}"], arrays[f"b{i}"]) for i in range(3)]

    def act(self, state: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """state (D,) -> sampled action (A,) float32 on the 16-bit grid; the mean action where rng is None."""
        x = state / self.scale
        for i, (weight, bias) in enumerate(self.layers):
            x = x @ weight + bias
            x = np.maximum(x, 0) if i < 2 else x
        mean, log_std = np.split(x, 2)
        std = np.exp(-5 + 3.5 * (1 + np.tanh(log_std)))
        noise = rng.standard_normal(len(mean), np.float32) if rng else 0
        action = np.tanh(mean + std * noise)
        return np.rint(action * GRID).astype(np.float32) / np.float32(GRID)


class ScriptedPolicy:
    """Meta-World's own policy for a task, with Gaussian noise of deviation `noise` on its actions."""

    def __init__(self, task: str, noise: float):
        from metaworld.policies import ENV_POLICY_MAP

        warnings.filterwarnings("ignore", module="metaworld.policies")  # that it clips actions, as we do
        self.policy, self.noise = ENV_POLICY_MAP[f"{task.removeprefix('metaworld-')}-v3"](), noise

    def act(self, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        action = self.policy.get_action(state.astype(np.float64))
        if self.noise:
            action = action + self.noise * rng.standard_normal(len(action))
        return np.clip(action, -1, 1).astype(np.float32)
