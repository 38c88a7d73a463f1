"""Behavioural cloning from pixels, the BC baseline of V-D4RL (arXiv:2206.04779).

    L_pi = mean over batch and action dimensions of (pi(z) - a)^2,  z = encoder(random shift of three stacked frames)

Dims: B batch, C = 3 * frame_stack channels, S pixels per side, A action, E embedding.
Differs from the released code (marked DIFF n where it happens):
  DIFF 1: one step = one gradient update; theirs counts loop turns and updates on every second.
  DIFF 2: regresses the mean action, as the paper writes; theirs a noisy clipped sample (--bc-noise).
  DIFF 3: random shifts are integer crops; theirs resamples with grid_sample, equal up to rounding.
  DIFF 4: --steps left out is the paper's 256 epochs; their default amounts to 1,408 at 100,000 transitions.
  DIFF 5: lr 1e-4, DrQ-v2's default; theirs 3e-4.
  DIFF 6: each evaluation runs the same seeded episodes, the last one on the final weights; theirs are new each time.
  DIFF 7: --precision auto is bf16 autocast where the hardware has it natively; theirs fp32.
Cost and scores: results/summary.csv (measured, one row per task, dataset, seed, commit)."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: beside, or one above
import common  # noqa: E402
from common import Batch, Count, EnvPool, Rate, UserError, Weight, Whole  # noqa: E402

Metrics = dict[str, Tensor]


@dataclass
class Args:
    task: str = "cheetah-run"  # dm_control domain-task
    dataset: str = "medexp"  # random, mixed, medium, medexp, expert, or the path of a set you made
    source: Literal["made", "vd4rl"] = "made"  # made: rendered here; vd4rl: the imported official set
    data_dir: str | None = None  # where sets are; None: $CLEANPIXELS_DATA, else datasets/ beside common.py
    transitions: Count | None = None  # a smaller made set of so many transitions
    data_seed: Whole = 0  # seed of a made set
    distraction: Literal["none", "low", "moderate", "high"] = "none"  # of background, camera, colours (variations.py)
    shifted: Annotated[int, (0, 100)] = 100  # percent of the episodes that the distraction shows in
    bodies: bool = False  # a set of four bodies; evaluated on them, and on four that were not seen
    seed: Whole = 0  # of weights, sampling and augmentation; evaluation has seeds of its own
    tag: str = ""  # tells apart runs of the same task, set and seed with other flags
    runs_dir: str | None = None  # where run folders are; None: runs/ beside common.py
    overwrite: bool = False  # start anew in a folder that holds a run; without it the same command continues
    quick: bool = False  # a small setting that shows learning on two CPU cores; no benchmark row
    evaluate: str | None = None  # a finished run's folder: evaluate it, write a video, stop
    steps: Whole | None = None  # gradient updates; None: 256 epochs, one update per transition at batch 256 (Table 9)
    batch_size: Count = 256  # transitions (Table 9)
    lr: Rate = 1e-4  # Adam (DIFF 5)
    image_size: Annotated[int, (15, 1024)] = 84  # pixels per side of a standard set
    encoder_width: Count = 32  # channels of its four convolutions
    feature_dim: Count = 50  # width of the trunk after the encoder
    hidden_dim: Count = 1024  # width of the actor's two layers
    bc_noise: bool = False  # regress a noisy clipped sample (released code; its schedule: --noise-steps 125000)
    noise_start: Weight = 1.0  # std of that noise at step 0
    noise_end: Weight = 0.1  # and after noise_steps, which is later than most runs end
    noise_steps: Whole = 250_000  # gradient updates over which it falls linearly (Table 9: 500,000 loop turns)
    noise_clip: Weight = 0.3  # noise is clipped to +- this (Table 9)
    augment: Literal["shift", "none"] = "shift"  # random shift by up to 4 pixels, or off
    eval_every: Whole | None = None  # gradient updates; None: a twentieth of the run; 0: no environment at all
    eval_episodes: Count = 10  # per evaluation
    log_every: Count = 100  # gradient updates
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast where the hardware has it (DIFF 7)
    accelerate: Literal["eager", "compile"] = "eager"  # compile: the losses under torch.compile
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"  # where the frames are; auto: on the GPU if they fit


TUNED: dict = {}  # the paper gives BC one setting for all rows
QUICK = {("*", "*"): {"transitions": 40_000, "batch_size": 256, "lr": 5e-4, "image_size": 64, "encoder_width": 8,
                     "hidden_dim": 256, "steps": 7_000, "eval_every": 1_000}}  # fmt: skip

FRAME_STACK = 3  # frames per observation, in the order they were seen


# ==== Networks ====


def init_weights(module: nn.Module) -> None:
    """Orthogonal weights, gain sqrt(2) in convolutions and 1 elsewhere, zero biases: DrQ-v2's."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.orthogonal_(module.weight, 2**0.5 if isinstance(module, nn.Conv2d) else 1.0)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """Pixels to embedding. obs (B, C, S, S) float32 in [-0.5, 0.5]  ->  embed (B, E); S = 84: E = 39200."""

    def __init__(self, channels: int, size: int, width: int):
        super().__init__()
        if size < 15:
            raise UserError(f"images of {size} px are too small for this encoder; it needs 15 or more")
        self.convs = nn.ModuleList([nn.Conv2d(channels, width, 3, stride=2)])  # 84 -> 41
        self.convs += [nn.Conv2d(width, width, 3) for _ in range(3)]  # 41 -> 39 -> 37 -> 35
        self.embed_dim = width * ((size - 1) // 2 - 6) ** 2

    def forward(self, obs: Tensor) -> Tensor:
        for conv in self.convs:
            obs = F.relu(conv(obs))
        return obs.permute(0, 2, 3, 1).flatten(1)  # rows, columns, channels: as they lie in memory, so no copy


class LastLayer(nn.Linear):
    """Linear, in float32 also under autocast: bf16 tells actions near 1 apart by 0.004, values near 100 by 0.5.

    Every head that gives an action or a value ends in one."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Actor(nn.Module):
    """Embedding to mean action. embed (B, E)  ->  (B, A) in (-1, 1)."""

    def __init__(self, embed_dim: int, action_dim: int, feature_dim: int, hidden_dim: int):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(embed_dim, feature_dim), nn.LayerNorm(feature_dim), nn.Tanh())
        self.policy = nn.Sequential(
            nn.Linear(feature_dim, hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim), nn.ReLU(),
            LastLayer(hidden_dim, action_dim), nn.Tanh(),
        )  # fmt: skip

    def forward(self, embed: Tensor) -> Tensor:
        return self.policy(self.trunk(embed))


# ==== Agent ====


def scale_pixels(obs: Tensor) -> Tensor:
    """(B, C, S, S) uint8 in 0..255 -> float32 in [-0.5, 0.5], in memory as the convolutions read it."""
    assert obs.dtype == torch.uint8  # floats would be scaled in place, perhaps twice
    return obs.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(0.5)


def random_shift(obs: Tensor, pad: int = 4) -> Tensor:
    """Each image moved by up to `pad` pixels per axis, its border repeated; the stacked frames move together.

    obs (B, C, S, S) uint8 -> the same. Equals cropping the replicate-padded image at integer offsets (DIFF 3)."""
    B, C, S, _ = obs.shape
    wide = S + 2 * pad
    dy, dx = torch.randint(2 * pad + 1, (2, B, 1, 1), device=obs.device)  # 0..2 pad each
    left, right = obs[..., :1].expand(-1, -1, -1, pad), obs[..., -1:].expand(-1, -1, -1, pad)
    padded = torch.cat([left, obs, right], -1)  # (B, C, S, wide)
    pixel_rows = torch.arange(S, device=obs.device)
    source_rows = (pixel_rows + dy - pad).clamp(0, S - 1)  # (B, 1, S): clamping pads the other axis
    planes = torch.arange(B * C, device=obs.device).view(B, C, 1) * S
    starts = (planes + source_rows) * wide + dx  # (B, C, S): where each cropped row of S pixels begins
    runs = padded.view(-1).as_strided((padded.numel() - S + 1, S), (1, 1))  # every run of S pixels, as a view
    return runs.index_select(0, starts.flatten()).view(B, C, S, S)


def noise_std(args: Args, step: int) -> Tensor:
    """The exploration-noise schedule at `step` gradient updates, a 0-dim tensor (DIFF 1: not loop turns)."""
    progress = min(step / max(args.noise_steps, 1), 1.0)
    value = args.noise_start + progress * (args.noise_end - args.noise_start)
    return torch.full((), value, device=args.device)


class Agent(nn.Module):
    """Encoder and actor, trained together by one optimiser."""

    LOSSES = ("actor_loss",)  # what --accelerate compile compiles

    def __init__(self, args: Args, obs_shape: tuple[int, int, int], action_dim: int):
        super().__init__()
        self.args = args
        channels, size, _ = obs_shape
        self.encoder = Encoder(channels, size, args.encoder_width)
        self.actor = Actor(self.encoder.embed_dim, action_dim, args.feature_dim, args.hidden_dim)
        self.apply(init_weights)  # all of it: load pretrained weights after this line
        self.encoder.to(memory_format=torch.channels_last)  # faster convolutions, same numbers up to rounding
        on_cuda = args.device == "cuda"
        self.optimizers = {"actor": torch.optim.Adam(self.parameters(), args.lr, fused=True, capturable=on_cuda)}

    def augment(self, obs: Tensor) -> Tensor:
        """obs (B, C, S, S) uint8 -> the same."""
        return random_shift(obs) if self.args.augment == "shift" else obs

    def noisy(self, mean: Tensor, std: Tensor) -> Tensor:
        """mean + clipped noise, (B, A), clamped to the action range with a straight-through gradient."""
        noise = (std * torch.randn_like(mean)).clamp(-self.args.noise_clip, self.args.noise_clip)
        action = mean + noise
        return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()

    def actor_loss(self, batch: Batch, noise_std: Tensor) -> tuple[Tensor, Metrics]:
        """Mean squared distance to the data's actions. Returns loss (), metrics."""
        action = self.actor(self.encoder(scale_pixels(self.augment(batch.obs))))  # crops on uint8, then floats
        if self.args.bc_noise:
            action = self.noisy(action, noise_std)  # DIFF 2
        assert action.shape == batch.action.shape
        loss = F.mse_loss(action, batch.action)
        return loss, {"actor/loss": loss.detach()}

    def update(self, batch: Batch, noise_std: Tensor) -> Metrics:
        """One gradient step."""
        with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            loss, metrics = self.actor_loss(batch, noise_std)
        self.minimize("actor", loss)
        return metrics

    def minimize(self, name: str, loss: Tensor) -> None:
        """One step of an optimiser on its own parameters; no gradient is computed for others in the loss."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
        optimizer.step()

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Mean action. obs (B, C, S, S) uint8 -> (B, A)."""
        return self.actor(self.encoder(scale_pixels(obs)))

    def get_extra_state(self) -> dict:
        """What torch adds to state_dict(): the optimisers. What else an update changes belongs here, for resume."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def set_extra_state(self, state: dict) -> None:
        for name, optimizer_state in state.items():
            self.optimizers[name].load_state_dict(optimizer_state)


# ==== Evaluation ====


def evaluate(agent: Agent, pool: EnvPool, args: Args) -> tuple[dict, list[np.ndarray]]:
    """Mean action, the same episodes every time. Returns score and every return, frames of the first episode."""
    agent.eval()
    obs, returns, frames = pool.reset(common.EVAL_SEED + np.arange(pool.count)), np.zeros(pool.count), []  # DIFF 6
    while not pool.done.all():
        frames.append(obs[0, -3:].copy())  # RGB of the newest frame; a view would keep the frames of all episodes
        action = agent.act(torch.from_numpy(obs).to(args.device))
        obs, reward, _ = pool.step(action.cpu().numpy())  # reward is 0 where the episode is over
        returns += reward
    agent.train()
    return pool.summary(returns), frames


def evaluate_run(args: Args) -> None:
    """--evaluate RUN: scores a finished run's weights on --eval-episodes episodes and writes a video."""
    facts, weights = common.load_run(args)
    pool = common.evaluation_pool(args, facts, FRAME_STACK)
    agent = Agent(args, (3 * FRAME_STACK, facts["size"], facts["size"]), facts["action_dim"]).to(args.device)
    agent.load_state_dict(agent.state_dict() | weights)  # results/runs/ has only those that act
    metrics, frames = evaluate(agent, pool, args)
    print(", ".join(f"{name} {np.round(value, 2)}" for name, value in metrics.items()))
    common.save_video(Path(args.evaluate) / "evaluation.mp4", frames)


def main(args: Args) -> None:
    if args.evaluate:
        return evaluate_run(args)
    dataset = common.open_dataset(args, args.image_size)  # a standard set is made on the spot if it is missing
    if args.steps is None:
        args.steps = 256 * dataset.num_transitions // args.batch_size  # DIFF 4: 256 epochs
    run = common.Run(args, dataset)  # its folder and lock; seeds torch
    pool = common.evaluation_pool(args, dataset.facts(), FRAME_STACK)
    buffer = common.TransitionBuffer(
        dataset, args.batch_size, FRAME_STACK, seed=args.seed, device=args.device,
        buffer_device=args.buffer_device, next_obs=False,
    )  # fmt: skip
    agent = Agent(args, buffer.obs_shape, buffer.action_dim).to(args.device)
    common.accelerate(agent, args)
    step = run.begin(agent=agent, buffer=buffer)  # 0, or where the checkpoint was written
    while step < args.steps:
        metrics = agent.update(buffer.sample(), noise_std(args, step))
        step += 1
        run.advance(step)
        if run.log_due:
            run.log("train", step, {name: value.item() for name, value in metrics.items()})  # the only .item()
        if pool and run.eval_due:
            metrics, frames = evaluate(agent, pool, args)
            run.log("eval", step, metrics)
            if step == args.steps:
                common.save_video(run.path / "evaluation.mp4", frames)
        if run.checkpoint_due:
            run.save_checkpoint(step, agent=agent, buffer=buffer)


if __name__ == "__main__":
    main(common.parse_args(Args, TUNED, QUICK))
