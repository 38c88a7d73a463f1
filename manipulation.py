"""Manipulation tasks for make_env; they need requirements-manipulation.txt.

    metaworld-<task>   Meta-World v3, e.g. metaworld-drawer-open: reward 1 in success, action repeat 2, 100 steps
    kitchen-mixed      Franka Kitchen: microwave, kettle, light switch, slide cabinet; 280 steps
    kitchen-partial    microwave, kettle, bottom burner, light switch; reward: how many of the four are in place
    adroit-pen         Adroit hand, with the environment's dense reward; 200 steps
    adroit-door

Images alone, no proprioception, as in MOTO (arXiv:2401.03306 Appendix C.1); info["success"] says whether a step ends
in success. render "fast" also switches shadows off, 5 to 10 times the frames per second and visibly another
picture; "reference" is the model as it comes."""

import mujoco
import numpy as np

from common import Renderer, UserError

KITCHEN = {  # what has to be in place (arXiv:2401.03306 Appendix C.1); in D4RL and Minari the names are swapped
    "kitchen-mixed": ["microwave", "kettle", "light switch", "slide cabinet"],
    "kitchen-partial": ["microwave", "kettle", "bottom burner", "light switch"],
}
ADROIT = ("adroit-pen", "adroit-door")
EPISODE_STEPS = {"metaworld": 100, "kitchen": 280, "adroit": 200}
MOST_STEPS = {"metaworld": 250}  # Meta-World ends an episode after 500 of its own steps
ACTION_REPEAT = {"metaworld": 2}  # else 1
KITCHEN_CAMERA = {"distance": 1.86, "lookat": (-0.3, 0.5, 2.0), "azimuth": 90, "elevation": -60}  # D5RL's
METAWORLD_CAMERA = (0.75, 0.075, 0.7)  # where corner2 is moved to; MOTO names no camera, this one is ours


class ManipulationEnv:
    """One of the tasks above: the interface and the kind of observations of common.DMCEnv.

    obs (3 * frame_stack, S, S) uint8, or the state (D,) float32 where size is None. action (A,) in [-1, 1]. reward:
    of the last of the repeats. Every episode ends by its clock; goals and initial states are a function of
    reset(seed) alone."""

    def __init__(self, task: str, size: int | None, frame_stack: int, seed: int, render: str, episode_steps=None):
        self.task, self.size, self.frame_stack, self.seed = task, size, frame_stack, seed
        self.suite, _, name = task.partition("-")
        make = {"metaworld": make_metaworld, "kitchen": make_kitchen, "adroit": make_adroit}[self.suite]
        self.env = make(name)
        self.model, self.data, self.action_dim = self.env.model, self.env.data, self.env.action_space.shape[0]
        self.episode_steps, self.steps = episode_steps or EPISODE_STEPS[self.suite], 0
        if self.episode_steps > MOST_STEPS.get(self.suite, self.episode_steps):
            raise UserError(f"--episode-steps {self.episode_steps}: at most {MOST_STEPS[self.suite]} in {task}")
        self.repeat, self.renderer = ACTION_REPEAT.get(self.suite, 1), None
        if size is not None:
            if render == "fast":
                self.model.light_castshadow[:] = 0
            self.renderer = Renderer(self.model, self.data, size, camera_of(self.suite, self.model), quality=render)

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict]:
        """Returns obs and info {"state": (D,) float32, "success": bool}."""
        self.seed = self.seed + 1 if seed is None else seed
        if self.suite == "metaworld":
            self.env.seed(self.seed)  # its reset(seed) seeds nothing
        observation, _ = self.env.reset(seed=self.seed)
        mujoco.mj_forward(self.model, self.data)  # Meta-World moves bodies after the last one
        self.steps = 0
        self.frames = [self._render()] * self.frame_stack if self.renderer else []
        return self._observe(observation, False)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Returns obs, reward, terminal (never), timeout, info."""
        action = np.clip(np.asarray(action, np.float64), -1, 1)
        for _ in range(self.repeat):
            observation, reward, _, _, info = self.env.step(action)
        in_place = info.get("step_task_completions", ())  # of the kitchen
        success = len(in_place) == len(self.env.goal) if self.suite == "kitchen" else bool(info["success"])
        if self.suite == "metaworld":
            reward = success
        self.steps += 1
        if self.renderer:
            self.frames = [*self.frames[1:], self._render()]
        obs, info = self._observe(observation, success)
        return obs, float(reward), False, self.steps == self.episode_steps, info

    def action_size(self) -> int:
        return self.action_dim

    def film(self, states: np.ndarray) -> np.ndarray:
        """Frames of the kitchen in recorded states (n, 59). -> (n, 3, S, S) uint8."""
        frames = []
        for qpos, qvel in zip(*split_kitchen(states)):
            self.env.robot_env.set_state(qpos, qvel)
            frames.append(self._render())
        return np.stack(frames)

    def clock(self) -> tuple[int, int]:
        """Actions in an episode, simulation steps in an action."""
        return self.episode_steps, self.repeat

    def close(self) -> None:
        if self.renderer:
            self.renderer.close()
        self.env.close()

    def _render(self) -> np.ndarray:
        frame = self.renderer.render()
        return np.ascontiguousarray(frame[:, ::-1, ::-1]) if self.suite == "metaworld" else frame  # hangs upside down

    def _observe(self, observation, success: bool) -> tuple[np.ndarray, dict]:
        state = observation["observation"] if self.suite == "kitchen" else observation
        state = np.asarray(state, np.float32)
        return (np.concatenate(self.frames) if self.renderer else state), {"state": state, "success": success}


def camera_of(suite: str, model):
    """A number, or a free camera. Moves Meta-World's corner2."""
    if suite == "metaworld":
        number = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "corner2")
        model.cam_pos[number] = METAWORLD_CAMERA
        return number
    if suite == "adroit":
        return mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "vil_camera")
    camera = mujoco.MjvCamera()
    for name, value in KITCHEN_CAMERA.items():
        setattr(camera, name, value)
    return camera


def make_metaworld(name: str):
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    known = sorted(key.removesuffix("-v3") for key in ALL_V3_ENVIRONMENTS)
    if name not in known:
        raise UserError(f"--task metaworld-{name}: no such task. There are: {', '.join(known)}")
    env = ALL_V3_ENVIRONMENTS[f"{name}-v3"]()
    env._partially_observable = False  # the state names the goal; images are what policies here see
    vars(env).pop("sawyer_observation_space", None)  # cached; it depends on the line above
    env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True  # goals drawn at every reset
    return env


def make_kitchen(name: str):
    from gymnasium_robotics.envs.franka_kitchen import KitchenEnv

    if f"kitchen-{name}" not in KITCHEN:
        raise UserError(f"--task kitchen-{name}: no such task. There are: {', '.join(KITCHEN)}")
    goals = KITCHEN[f"kitchen-{name}"]
    return KitchenEnv(goals, terminate_on_tasks_completed=False, remove_task_when_completed=False)


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


def make_adroit(name: str):
    if f"adroit-{name}" not in ADROIT:
        raise UserError(f"--task adroit-{name}: no such task. There are: {', '.join(ADROIT)}")
    from gymnasium_robotics.envs.adroit_hand import AdroitHandDoorEnv, AdroitHandPenEnv

    return AdroitHandPenEnv() if name == "pen" else AdroitHandDoorEnv()
