"""Collectors: soft actor-critic (arXiv:1812.05905) on proprioceptive states, frame skip 2, one core.

    python data/train_sac.py --task cheetah-run --envs 10 --tau 0.01             # train; the same line continues
    python data/train_sac.py --task cheetah-run --export medium expert mixed     # write data/policies/cheetah-run/

--export tries the actors that scored about as much as the published set while they learned, and takes the nearest
over 50 episodes, see export_actor(); mixed is the run's first episodes.

One step = one gradient update, before which each of `--envs` environments makes one control step. The run folder:
    sac.pt                   networks, optimisers, temperature, generators, counts
    replay/*.npy             the transitions, memory-mapped
    record/*.npy             per episode: reset seed, int16 actions, return, a full physics state every 50 steps
    actors/<step>.npz        candidates for medium and expert
Actions are rounded to a grid of 2 / 65534 before they are executed, so that two bytes record them exactly."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # 256-wide layers: a second thread costs more than it gives

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "data")]
from collect import EPISODE, STATE_EVERY, get_state  # noqa: E402
from collectors import GRID, POLICIES, SACPolicy, policy_file  # noqa: E402
from published import TABLE_5, standard_transitions  # noqa: E402
from store import return_statistics, take_lock  # noqa: E402

import common  # noqa: E402
from common import Count, EnvPool, Share, UserError, Weight, Whole, make_env  # noqa: E402
from variations import TASKS, TRAIN_BODIES  # noqa: E402

HIDDEN, BATCH, GAMMA = 256, 256, 0.99
STANDING = 1.3  # m: the root of a humanoid on its feet
FALLEN, RISEN = 1.0, 1.3  # m: its head when it falls, and when it is up again


@dataclass
class Args:
    task: str = "walker-walk"  # dm_control domain-task
    body: Literal[*TRAIN_BODIES] | None = None  # of walker-walk and cheetah-run; None: dm_control's
    steps: Count = 60_000  # gradient updates; the first 500 turns only collect
    envs: Count = 8  # environments, one control step each per update; another number may continue a run
    lr: Weight = 1e-3  # Adam, of actor, critics and temperature
    tau: Share = 0.005  # Polyak rate of the target critics, per update
    entropy: float = -1.0  # target entropy per action dimension; lower: less noise
    mean_penalty: Weight = 0.0  # weight of the squared means before tanh, in the actor's loss: off the bounds
    upright: Whole = 0  # humanoid: so many of --envs start on their feet, and again whenever they fall, see stand()
    guided: Whole = 0  # humanoid: in so many others the shipped medium policy gets it up, whenever it is down
    newest: Annotated[int, (BATCH, 2**31)] | None = None  # transitions to learn from, the last collected; None: all
    seed: Whole = 0  # of weights, actions and initial states
    actor_every: Count = 250  # updates between saved actors
    runs_dir: Path = ROOT / "runs" / "sac"  # run folders: <runs_dir>/<task>[/<body>]
    export: tuple[Literal["medium", "expert", "mixed"], ...] = ()  # write these to data/policies/<task>[/<body>]; stop
    candidates: Count = 8  # --export: actors to try, those whose round scored nearest while it learned


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    layers = nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs)
    return nn.Sequential(*layers)


class SAC(nn.Module):
    """Twin critics, tanh-Gaussian actor, learned temperature. States are divided by `scale` (D,), a buffer."""

    def __init__(self, state_dim: int, action_dim: int, lr: float, tau: float, entropy: float = -1.0, mean_penalty=0.0):
        super().__init__()
        self.tau, self.target_entropy, self.mean_penalty = tau, entropy * action_dim, mean_penalty
        self.actor = mlp(state_dim, 2 * action_dim)
        self.q1, self.q2 = (mlp(state_dim + action_dim, 1) for _ in range(2))
        self.q1_target, self.q2_target = (mlp(state_dim + action_dim, 1) for _ in range(2))
        self.q1_target.load_state_dict(self.q1.state_dict())
        self.q2_target.load_state_dict(self.q2.state_dict())
        self.log_alpha = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("scale", torch.ones(state_dim))
        critics = [*self.q1.parameters(), *self.q2.parameters()]
        self.optimizers = {
            "actor": torch.optim.Adam(self.actor.parameters(), lr, fused=True),
            "critic": torch.optim.Adam(critics, lr, fused=True),
            "alpha": torch.optim.Adam([self.log_alpha], lr),
        }
        self.critics, self.targets = critics, [*self.q1_target.parameters(), *self.q2_target.parameters()]

    def sample(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """state (B, D), scaled -> action (B, A) in (-1, 1), its log-density (B, 1), the mean before tanh (B, A)."""
        mean, log_std = self.actor(state).chunk(2, -1)
        log_std = -5 + 3.5 * (1 + torch.tanh(log_std))  # std between e^-5 and e^2
        raw = mean + log_std.exp() * torch.randn_like(mean)
        normal = -0.5 * ((raw - mean) / log_std.exp()).square() - log_std - 0.9189385
        squash = 2 * (0.6931472 - raw - F.softplus(-2 * raw))  # log(1 - tanh(raw)^2)
        return torch.tanh(raw), (normal - squash).sum(-1, keepdim=True), mean

    def update(self, state, action, reward, next_state, discount) -> None:
        state, next_state, alpha = (state / self.scale, next_state / self.scale, self.log_alpha.exp().detach())
        with torch.no_grad():
            next_action, next_log_prob, _ = self.sample(next_state)
            pair = torch.cat([next_state, next_action], -1)
            next_value = torch.minimum(self.q1_target(pair), self.q2_target(pair)) - alpha * next_log_prob
            target_q = reward + discount * GAMMA * next_value
        pair = torch.cat([state, action], -1)
        critic_loss = F.mse_loss(self.q1(pair), target_q) + F.mse_loss(self.q2(pair), target_q)
        self._step("critic", critic_loss)
        sampled, log_prob, mean = self.sample(state)
        pair = torch.cat([state, sampled], -1)
        actor_loss = alpha * log_prob - torch.minimum(self.q1(pair), self.q2(pair))
        self._step("actor", (actor_loss + self.mean_penalty * mean.square().sum(-1, keepdim=True)).mean())
        self._step("alpha", -(self.log_alpha * (log_prob.detach().mean() + self.target_entropy)))
        with torch.no_grad():
            torch._foreach_lerp_(self.targets, self.critics, self.tau)

    def _step(self, name: str, loss: torch.Tensor) -> None:
        self.optimizers[name].zero_grad()
        loss.backward(inputs=self.optimizers[name].param_groups[0]["params"])
        self.optimizers[name].step()

    def save_actor(self, path: Path, **facts) -> None:
        """The actor as plain arrays: W0, b0, ... (in, out), and `scale`."""
        layers = [m for m in self.actor if isinstance(m, nn.Linear)]
        arrays = {f"W{i}": m.weight.detach().numpy().T for i, m in enumerate(layers)}
        arrays |= {f"b{i}": m.bias.detach().numpy() for i, m in enumerate(layers)}
        np.savez(path, scale=self.scale.numpy(), **arrays, **{k: np.array(v) for k, v in facts.items()})


class Store:
    """Named memory-mapped arrays that share their first axis; a checkpoint says how many rows count."""

    def __init__(self, folder: Path, rows: int, **row_shapes):
        folder.mkdir(parents=True, exist_ok=True)
        for name, (shape, dtype) in row_shapes.items():
            path = folder / f"{name}.npy"
            old = np.load(path, mmap_mode="r+") if path.exists() else None
            if old is None or len(old) < rows:  # new, or --steps has grown: the file is sparse until it is written
                new = np.lib.format.open_memmap(path.with_suffix(".tmp"), "w+", dtype, (rows, *shape))
                if old is not None:
                    new[: len(old)] = old
                path.with_suffix(".tmp").replace(path)
                old = new
            setattr(self, name, old)


def stand(env, rng: np.random.Generator) -> np.ndarray:
    """Puts a humanoid on its feet, facing anywhere, moving forwards at up to 1 m/s. Returns its state (D,) float32.

    From the task's own starts a humanoid learns to get up first, and then to leap, fall and get up again. With most
    environments on their feet it learns to walk first, while a fall still costs all that is to come: rewards and the
    end of an episode stay the task's, and what lying is worth is learned where episodes start as the task's do. How to
    get up it then learns from a policy that can (--guided)."""
    simulator, turn = env.simulator.env, rng.uniform(-np.pi, np.pi)
    physics = simulator.physics
    with physics.reset_context():
        physics.data.qpos[:] = physics.model.qpos0
        physics.data.qpos[2:7] = STANDING, np.cos(turn / 2), 0, 0, np.sin(turn / 2)
        physics.data.qpos[7:] += rng.uniform(-0.1, 0.1, len(physics.data.qpos) - 7)
        physics.data.qvel[:2] = rng.uniform(0, 1) * np.array([np.cos(turn), np.sin(turn)])
    parts = simulator.task.get_observation(physics).values()
    return np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)


def train(args: Args) -> None:
    if args.task.startswith(common.MANIPULATION) or args.body and args.task not in TASKS:
        raise UserError(f"--task {args.task}: tasks of dm_control are trained here; --body: {' and '.join(TASKS)}")
    out = args.runs_dir / args.task / (args.body or "")
    (out / "actors").mkdir(parents=True, exist_ok=True)
    lock = take_lock(out / ".lock", wait=False)  # noqa: F841  held until the process ends
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    envs = [make_env(args.task, size=None, body=args.body) for _ in range(args.envs)]
    physics = [env.simulator.env.physics for env in envs]
    D, A, S = len(envs[0].reset(0)[1]["state"]), envs[0].spec["action_dim"], len(get_state(envs[0]))
    helped = args.upright + args.guided  # environments whose episodes are not the agent's own from the task's starts
    if helped and (helped >= args.envs or not hasattr(physics[0], "head_height")):
        raise UserError("--upright and --guided are for humanoids, and together for fewer than --envs")
    rounds = -(-args.steps // EPISODE)  # every environment makes one episode a round
    checkpoint, saved = out / "sac.pt", {"rounds": 0, "episodes": 0, "seed": args.seed}
    if checkpoint.exists():
        saved = common.read(checkpoint)
    if saved["seed"] != args.seed:
        raise UserError(f"{out} holds a run of --seed {saved['seed']}; give a --runs-dir")
    episodes, done = saved["episodes"], saved["rounds"]
    all_episodes = episodes + max(rounds - done, 0) * args.envs
    if (all_episodes - episodes) * EPISODE * (2 * D + A + 2) * 4 > shutil.disk_usage(out).free:  # would be a SIGBUS
        raise UserError(f"{out}: no room on the disk for the replay; give fewer --steps or another --runs-dir")
    replay = Store(
        out / "replay", all_episodes * EPISODE,
        state=((D,), "f4"), action=((A,), "f4"), reward=((1,), "f4"), next_state=((D,), "f4"), discount=((1,), "f4"),
    )  # fmt: skip
    record = Store(
        out / "record", all_episodes,
        seed=((), "i8"), action=((EPISODE, A), "i2"), ret=((), "f8"),
        physics=((EPISODE // STATE_EVERY, S), "f8"), updates=((), "i8"),
    )  # fmt: skip
    guide = SACPolicy(policy_file(args.task, "medium")) if args.guided else None
    agent = SAC(D, A, args.lr, args.tau, args.entropy, args.mean_penalty)
    step, mean, square = 0, np.zeros(D), np.ones(D)
    if episodes:
        agent.load_state_dict(saved["agent"])
        for name, state in saved["optimizers"].items():
            agent.optimizers[name].load_state_dict(state)
            agent.optimizers[name].param_groups[0]["lr"] = args.lr  # may be lowered on the way
        torch.set_rng_state(saved["torch_rng"])
        rng.bit_generator.state = json.loads(saved["rng"])
        step, mean, square = saved["step"], saved["mean"].numpy(), saved["square"].numpy()
        print(f"resumed at {step} updates, {episodes} episodes", flush=True)
    for turn in tqdm(range(done, rounds), "train", rounds, initial=done, unit="round", mininterval=common.BAR_SECONDS):
        seeds = [args.seed * 1_000_003 + episodes + i for i in range(args.envs)]
        states = np.stack([env.reset(seed)[1]["state"] for env, seed in zip(envs, seeds)])
        for i, env in enumerate(envs[: args.upright]):
            states[i] = stand(env, rng)
        returns = np.zeros(args.envs)
        for t in range(EPISODE):
            if t % STATE_EVERY == 0:
                for i, env in enumerate(envs):
                    record.physics[episodes + i, t // STATE_EVERY] = get_state(env)
            if turn == 0:  # one round of uniform actions before learning starts
                action = rng.uniform(-1, 1, (args.envs, A))
            else:
                with torch.no_grad():
                    action = agent.sample(torch.from_numpy(states) / agent.scale)[0].numpy()
                for i in range(args.upright, helped):
                    if physics[i].head_height() < RISEN:
                        action[i] = guide.act(states[i], rng)
            grid = np.rint(action * GRID).astype(np.int16)
            action = grid.astype(np.float32) / np.float32(GRID)
            rows = slice(episodes * EPISODE + t * args.envs, episodes * EPISODE + (t + 1) * args.envs)
            replay.state[rows], replay.action[rows] = states, action
            for i, env in enumerate(envs):
                _, reward, terminal, _, info = env.step(action[i])
                states[i] = info["state"]
                replay.reward[rows.start + i], replay.discount[rows.start + i] = (reward, 1.0 - terminal)
                returns[i] += reward
            replay.next_state[rows] = states
            for i, env in enumerate(envs[: args.upright]):
                if physics[i].head_height() < FALLEN:
                    states[i] = stand(env, rng)
            record.action[episodes : episodes + args.envs, t] = grid
            weight = args.envs / max(rows.stop, 1)  # running moments over all transitions so far
            mean += weight * (states.mean(0) - mean)
            square += weight * ((states**2).mean(0) - square)
            if turn > 0:
                agent.scale.copy_(torch.from_numpy(np.sqrt(np.maximum(square - mean**2, 1e-4))))
                i = rng.integers(max(rows.stop - (args.newest or rows.stop), 0), rows.stop, size=BATCH)
                batch = [a[i] for a in (replay.state, replay.action, replay.reward, replay.next_state, replay.discount)]
                agent.update(*map(torch.from_numpy, batch))
                step += 1
                if step % args.actor_every == 0:
                    agent.save_actor(out / "actors" / f"{step:07d}.npz", updates=step)
        returns[:helped] = np.nan
        made = slice(episodes, episodes + args.envs)
        record.seed[made], record.ret[made], record.updates[made] = seeds, returns, step
        episodes = made.stop
        saved = {
            "agent": agent.state_dict(), "optimizers": {k: o.state_dict() for k, o in agent.optimizers.items()},
            "torch_rng": torch.get_rng_state(), "rng": json.dumps(rng.bit_generator.state), "step": step,
            "rounds": turn + 1, "mean": torch.from_numpy(mean), "square": torch.from_numpy(square),
            "episodes": episodes, "seed": args.seed,
        }  # fmt: skip
        common.write_atomically(checkpoint, saved)
        tqdm.write(f"{step:7d} updates  {episodes:6d} episodes  sampled return {np.nanmean(returns):6.1f}", sys.stderr)


def returns_of(args: Args, actor: Path, sampled: bool, episodes: int = 50) -> np.ndarray:
    """Returns (episodes,) of the stochastic actor, or of its mean action."""
    groups = {"score": [(args.body, None)] * episodes}
    policy, pool = SACPolicy(actor), EnvPool(args.task, None, episodes, groups=groups)
    rngs = [np.random.default_rng([7, i]) if sampled else None for i in range(episodes)]
    pool.reset(range(episodes))
    returns = np.zeros(episodes)
    while not pool.done.all():
        _, reward, _ = pool.step(np.stack([policy.act(info["state"], rng) for info, rng in zip(pool.infos, rngs)]))
        returns += reward
    pool.close()
    return returns


def export_actor(args: Args, name: str, record: dict, out: Path, target: Path) -> None:
    """Writes the saved actor nearest to the published set: |mean - mean'| + |std - std'| of its sampled returns, and
    |mean - mean'| of its mean action's, which is what an algorithm learns from the set."""
    if (args.task, name) not in TABLE_5:
        how = f"copy an actor of your choice from {out}/actors to {target}/{name}.npz"
        raise UserError(f"--export {name}: there is no published set of {args.task} to come near to; {how}")
    wanted, spread = TABLE_5[args.task, name][:2]
    updates, returns = (record[name][~np.isnan(record["ret"])] for name in ("updates", "ret"))
    ends, first = np.unique(updates, return_index=True)  # of the rounds
    scored = np.add.reduceat(returns, first) / np.diff([*first, len(returns)])
    steps = np.array(sorted(n for n in (int(path.stem) for path in (out / "actors").glob("*.npz")) if n <= ends[-1]))
    if not len(steps):
        raise UserError(f"--export {name}: {out} holds no actor yet; leave --export out to continue, with more --steps")
    learned = scored[np.searchsorted(ends, steps)]  # what its round scored while it learned
    tried = []
    for step in sorted(steps[np.argsort(np.abs(learned - wanted), kind="stable")[: args.candidates]]):
        actor = out / "actors" / f"{step:07d}.npz"
        sampled, mean_action = (returns_of(args, actor, kind) for kind in (True, False))
        distance = abs(sampled.mean() - wanted) + abs(sampled.std() - spread) + abs(mean_action.mean() - wanted)
        tried.append((bool(abs(sampled.mean() / wanted - 1) > 0.05), distance, step))
        print(f"{name}: {step} updates, 50 episodes: {sampled.mean():.1f} +- {sampled.std():.1f}, "
              f"mean action {mean_action.mean():.1f} +- {mean_action.std():.1f}", flush=True)  # fmt: skip
    far, _, step = min(tried)  # the nearest of those within 5 %, if there are any
    shutil.copy(out / "actors" / f"{step:07d}.npz", target / f"{name}.npz")
    print(f"{name}: chose {step} updates (published mean {wanted}{', NONE within 5 % of it' * far})", flush=True)


def export_mixed(args: Args, record: dict, out: Path, target: Path) -> None:
    """The first episodes of the replay, as many as the published set has."""
    count = standard_transitions(args.task, "mixed") // EPISODE
    arrays = {name: record[name][:count] for name in ("seed", "action", "physics", "ret")}
    if len(arrays["ret"]) < count or np.isnan(arrays["ret"]).any():
        raise UserError(f"--export mixed: {out} does not begin with {count} episodes without --upright and --guided")
    np.savez_compressed(target / "mixed.npz", **arrays)
    print(f"mixed: {count} episodes, returns {return_statistics(arrays['ret'])}")


def main(args: Args) -> None:
    common.check_ranges(args)
    if not args.export:
        return train(args)
    out, target = (folder / args.task / (args.body or "") for folder in (args.runs_dir, POLICIES))
    if not (out / "sac.pt").exists():
        raise UserError(f"--export: {out} holds no training run; leave --export out to start one")
    episodes = common.read(out / "sac.pt")["episodes"]  # behind them: what a kill left
    record = {file.stem: np.load(file, mmap_mode="r")[:episodes] for file in (out / "record").glob("*.npy")}
    target.mkdir(parents=True, exist_ok=True)
    for name in args.export:
        export_mixed(args, record, out, target) if name == "mixed" else export_actor(args, name, record, out, target)


if __name__ == "__main__":
    import tyro

    sys.excepthook = common.one_line_errors
    main(tyro.cli(Args))
