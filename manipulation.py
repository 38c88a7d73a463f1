"""Simulators of manipulation tasks for common.make_env; they need requirements-manipulation.txt.

    metaworld-<task>   Meta-World v3, e.g. metaworld-drawer-open: reward 1 in success, action repeat 2, 100 steps
    kitchen-mixed      Franka Kitchen: microwave, kettle, light switch, slide cabinet; 280 steps
    kitchen-partial    microwave, kettle, bottom burner, light switch; reward: how many of the four are in place
    adroit-pen         Adroit hand, with the environment's dense reward; 200 steps
    adroit-door

Images alone, no proprioception, as in MOTO (arXiv:2401.03306 Appendix C.1). render "fast" also switches shadows off, 5
to 10 times the frames per second and visibly another picture; "reference" is the model as it comes.

Each simulator has what common.DMCSimulator has: action_dim, action_repeat, episode_steps, return_per_score, model,
data, camera, upside_down, reset(seed) -> state (D,) float32, and step(action) -> state, reward, terminal (never), over,
success. Rewards are those of the last repeat. Goals and initial states are a function of reset's seed alone."""

import mujoco
import numpy as np

KITCHEN = {  # what has to be in place (arXiv:2401.03306 Appendix C.1); in D4RL and Minari the names are swapped
    "kitchen-mixed": ["microwave", "kettle", "light switch", "slide cabinet"],
    "kitchen-partial": ["microwave", "kettle", "bottom burner", "light switch"],
}
KITCHEN_CAMERA = {"distance": 1.86, "lookat": (-0.3, 0.5, 2.0), "azimuth": 90, "elevation": -60}  # D5RL's
METAWORLD_CAMERA = (0.75, 0.075, 0.7)  # where corner2 is moved to; MOTO names no camera, this one is ours


def make_simulator(task: str, render: str):
    """Raises KeyError with the tasks that there are, and ModuleNotFoundError."""
    suite, _, name = task.partition("-")
    simulator = {"metaworld": MetaWorld, "kitchen": Kitchen, "adroit": Adroit}[suite](name)
    if render == "fast":
        simulator.model.light_castshadow[:] = 0
    return simulator


class Gymnasium:
    """A gymnasium environment behind this interface."""

    action_repeat, return_per_score, upside_down = 1, 1, False

    def __init__(self, env):
        self.env, self.model, self.data = env, env.model, env.data
        self.action_dim, self.steps = env.action_space.shape[0], 0

    def reset(self, seed: int) -> np.ndarray:
        observation, _ = self.env.reset(seed=seed)
        mujoco.mj_forward(self.model, self.data)  # Meta-World moves bodies after the last one
        self.steps = 0
        return self.state_of(observation)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        for _ in range(self.action_repeat):
            observation, reward, _, _, info = self.env.step(np.clip(action, -1, 1))
        self.steps += 1
        success = self.succeeds(info)
        reward = float(self.reward_of(reward, success))
        return self.state_of(observation), reward, False, self.steps == self.episode_steps, success

    def state_of(self, observation) -> np.ndarray:
        return np.asarray(observation, np.float32)

    def succeeds(self, info: dict) -> bool:
        return bool(info["success"])

    def reward_of(self, reward: float, success: bool) -> float:
        return reward


class MetaWorld(Gymnasium):
    action_repeat, episode_steps, upside_down = 2, 100, True

    def __init__(self, name: str):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        if f"{name}-v3" not in ALL_V3_ENVIRONMENTS:
            raise KeyError(", ".join(sorted(f"metaworld-{key.removesuffix('-v3')}" for key in ALL_V3_ENVIRONMENTS)))
        env = ALL_V3_ENVIRONMENTS[f"{name}-v3"]()
        env._partially_observable = False  # the state names the goal; images are what policies here see
        vars(env).pop("sawyer_observation_space", None)  # cached; it depends on the line above
        env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True  # goals drawn at resets
        super().__init__(env)
        self.camera = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, "corner2")
        self.model.cam_pos[self.camera] = METAWORLD_CAMERA

    def reset(self, seed: int) -> np.ndarray:
        self.env.seed(seed)  # its reset(seed) seeds nothing
        return super().reset(seed)

    def reward_of(self, reward: float, success: bool) -> float:
        return success


class Kitchen(Gymnasium):
    episode_steps = 280

    def __init__(self, name: str):
        from gymnasium_robotics.envs.franka_kitchen import KitchenEnv

        if f"kitchen-{name}" not in KITCHEN:
            raise KeyError(", ".join(KITCHEN))
        goals = KITCHEN[f"kitchen-{name}"]
        super().__init__(KitchenEnv(goals, terminate_on_tasks_completed=False, remove_task_when_completed=False))
        self.camera = mujoco.MjvCamera()
        for attribute, value in KITCHEN_CAMERA.items():
            setattr(self.camera, attribute, value)

    def state_of(self, observation) -> np.ndarray:
        return np.asarray(observation["observation"], np.float32)

    def succeeds(self, info: dict) -> bool:
        return len(info["step_task_completions"]) == len(self.env.goal)


class Adroit(Gymnasium):
    episode_steps = 200

    def __init__(self, name: str):
        from gymnasium_robotics.envs.adroit_hand import AdroitHandDoorEnv, AdroitHandPenEnv

        known = {"pen": AdroitHandPenEnv, "door": AdroitHandDoorEnv}
        if name not in known:
            raise KeyError(", ".join(f"adroit-{key}" for key in known))
        super().__init__(known[name]())
        self.camera = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, "vil_camera")


def split_kitchen(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observations (n, 59) of the kitchen: robot position 9, velocity 9, objects' positions 21, velocities 20.
    -> qpos (n, 30), qvel (n, 29)."""
    return np.hstack([states[:, :9], states[:, 18:39]]), np.hstack([states[:, 9:18], states[:, 39:59]])


def objects_in_place(task: str, states: np.ndarray) -> np.ndarray:
    """How many of a kitchen task's four are in place in states (n, 59). -> (n,) float."""
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import BONUS_THRESH, OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES

    qpos, _ = split_kitchen(states)
    distances = [
        np.linalg.norm(qpos[:, OBS_ELEMENT_INDICES[name]] - OBS_ELEMENT_GOALS[name], axis=1) for name in KITCHEN[task]
    ]
    return (np.array(distances) < BONUS_THRESH).sum(0).astype(float)
