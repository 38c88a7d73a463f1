"""LOMPO (arXiv:2012.11547): a variational world model, trained on the data and then frozen; an off-policy actor and
critics on its latent states, half of them the data's, half imagined with a reward lowered by disagreement.

    model   deter_t = GRU(deter_{t-1}, stoch_{t-1}, action_t);  stoch_t: diagonal normal, feat_t = (stoch_t, deter_t)
            post_t = q(. | deter_t, image_t);  prior_t = p_k(. | deter_t), k drawn from 1..N once per time step
            L = -log p(image | feat) - log p(reward | feat) + KL(post || prior)
    penalty u = std_k log p_k(stoch' | deter')  of the state arrived at (Eq. 9 has the variance: --penalty log_prob_var,
            and the mean reward of every member's draw; here and in the released code it is the drawn one's)
    agent   y = r~ + gamma discount min_j Q'_j(s', pi(s')),  r~ = reward (data), reward - penalty_coef * u (imagined)
            L_Q = sum_j (Q_j(s, a) - y)^2,  L_pi = -min_j Q_j(s, pi(s)),  s = feat

--penalty-coef 0 is LMBRL, the baseline of the LOMPO paper. The paper's text has SLAC's stochastic actor; the released
one, and this one, is deterministic, with noise in the rollouts alone.
Dims: B windows, T rows of a window, A action, E embedding, S stoch, D deter, F = S + D feat, N ensemble.
Differs from the released code, as V-D4RL's fork has it (marked DIFF n where it happens; docs/lompo.md has the reasons):
  DIFF 1: each state has latent noise of its own; theirs draws one vector for a whole batch.
  DIFF 2: a window's first action, whose cause it cannot know, is zero, and an episode's last row can be drawn.
  DIFF 3: 25,000 and 150,000 updates are for 100,000 transitions and scale with the set, and so does the first fill of
          the imagined ring, half of it; theirs 50,000 transitions whatever the set.
  DIFF 4: the critics' targets start as their copies; theirs as other networks, crossed.
  DIFF 5: the encoder is frozen and deterministic in the second phase, so the set is embedded once: the same numbers.
  DIFF 6: --precision auto is bf16 autocast where the hardware has it; theirs fp32.
  DIFF 7: an evaluation is ten seeded episodes, the last one of the final weights; theirs is one, unseeded.
  DIFF 8: a real transition's discount is the set's, 0 after a terminal step; theirs takes no step as terminal.
  DIFF 9: Adam adds eps to the corrected root of the second moment; theirs to the raw one: its first steps are shorter.
Cost and scores: results/summary.csv (measured, one row per task, dataset, seed, commit)."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: beside, or one above
import common  # noqa: E402
from common import Count, EnvPool, Rate, Sequences, Share, UserError, Weight, Whole  # noqa: E402

Metrics = dict[str, Tensor]


@dataclass
class Args:
    task: str = "cheetah-run"  # dm_control domain-task
    dataset: str = "random"  # random, mixed, medium, medexp, expert, or the path of a set you made
    source: Literal["made", "vd4rl"] = "made"  # made: rendered here; vd4rl: the imported official set
    data_dir: str | None = None  # where sets are; None: $CLEANPIXELS_DATA, else datasets/ beside common.py
    transitions: Count | None = None  # a smaller made set of so many transitions
    data_seed: Whole = 0  # seed of a made set
    distraction: Literal["none", "low", "moderate", "high"] = "none"  # of background, camera, colours (variations.py)
    shifted: Annotated[int, (0, 100)] = 100  # percent of the episodes that the distraction shows in
    bodies: bool = False  # a set of four bodies; evaluated on them, and on four that were not seen
    seed: Whole = 0  # of weights, sampling and imagination; evaluation has seeds of its own
    tag: str = ""  # tells apart runs of the same task, set and seed with other flags
    runs_dir: str | None = None  # where run folders are; None: runs/ beside common.py
    overwrite: bool = False  # start anew in a folder that holds a run; without it the same command continues
    quick: bool = False  # a small setting that shows learning on two CPU cores; no benchmark row
    evaluate: str | None = None  # a finished run's folder: evaluate it, write a video, stop
    model_from: str | None = None  # a finished run's folder: its world model, no first phase; give a --tag
    model_steps: Whole | None = None  # updates of the world model; None: 25,000 for 100,000 transitions (DIFF 3)
    agent_steps: Whole | None = None  # gradient updates of the agent; None: 150,000 for 100,000 (DIFF 3)
    batch_size: Count = 64  # windows
    window: Count = 50  # rows per window
    model_lr: Rate = 6e-4  # Adam
    actor_lr: Rate = 3e-4
    critic_lr: Rate = 3e-4
    cnn_depth: Count = 32  # channels of the first convolution, doubled by each of the next three
    stoch: Count = 64  # normal variables
    deter: Count = 256  # width of the recurrent state
    hidden: Count = 256  # width of the layers beside it
    ensemble: Count = 7  # priors
    units: Count = 256  # width of the hidden layers of reward head, actor and critics
    penalty: Literal["log_prob_std", "log_prob_var"] = "log_prob_std"  # released code; log_prob_var: Eq. 9
    penalty_coef: Weight = 5.0  # lambda of Eq. 9; 1 for random sets; 0: LMBRL
    horizon: Count = 5  # steps of a rollout
    rollout_noise: Weight = 0.2  # std of the noise on a rollout's actions
    rollout_every: Count = 200  # agent updates between rollouts; also one episode's states are drawn anew
    starts: Literal["window", "episode"] = "window"  # rollouts begin in windows filtered from zero, or in real states
    agent_batch_size: Annotated[int, (2, math.inf)] = 512  # transitions, half real and half imagined
    gamma: Share = 0.99  # discount per control step
    tau: Share = 0.005  # Polyak rate of the target critics, per update
    eval_every: Whole | None = None  # gradient updates; None: a twentieth of the run, second phase; 0: no environment
    eval_episodes: Count = 10  # per evaluation
    log_every: Count = 100  # gradient updates
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast where the hardware has it (DIFF 6)
    accelerate: Literal["eager", "compile"] = "eager"  # compile: the losses under torch.compile
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"  # where the frames are; auto: on the GPU if they fit

    @property
    def steps(self) -> int:
        """Gradient updates of both phases: one counter runs over both."""
        return self.model_steps + self.agent_steps


TUNED = {("*", "random"): {"penalty_coef": 1.0}}
QUICK = {("*", "*"): {
    "transitions": 40_000, "batch_size": 16, "window": 25, "model_steps": 1_800, "agent_steps": 6_000,
    "eval_every": 600, "actor_lr": 1e-4, "cnn_depth": 8, "ensemble": 5, "penalty_coef": 1.0,
}}  # fmt: skip

SIZE = 64  # pixels per side: what the decoder's kernels give
MAX_GRAD_NORM = 100.0


# ==== Networks ====


def init_weights(module: nn.Module) -> None:
    """Keras's defaults: Glorot-uniform weights, orthogonal from a recurrent state, zero biases."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.GRUCell):
        nn.init.xavier_uniform_(module.weight_ih)
        nn.init.orthogonal_(module.weight_hh)
        nn.init.zeros_(module.bias_ih)
        nn.init.zeros_(module.bias_hh)


class LastLayer(nn.Linear):
    """Linear, in float32 also under autocast: bf16 tells actions near 1 apart by 0.004, values near 100 by 0.5.

    Every head that gives an action or a value ends in one."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def hidden_layers(inputs: int, units: int, count: int) -> nn.Sequential:
    """(..., inputs) -> (..., units)."""
    layers = []
    for i in range(count):
        layers += [nn.Linear(units if i else inputs, units), nn.ELU(inplace=True)]
    return nn.Sequential(*layers)


def mlp(inputs: int, units: int, outputs: int, count: int = 4) -> nn.Sequential:
    """`count` hidden layers. (..., inputs) -> (..., outputs) float32."""
    return nn.Sequential(hidden_layers(inputs, units, count), LastLayer(units, outputs))


class Encoder(nn.Module):
    """Frames to embeddings. image (M, 3, 64, 64) float32 in [-0.5, 0.5]  ->  embed (M, E); depth 32: E = 1024."""

    def __init__(self, depth: int):
        super().__init__()
        widths = [3, depth, 2 * depth, 4 * depth, 8 * depth]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2) for a, b in zip(widths, widths[1:]))
        self.embed_dim = 8 * depth * 2 * 2  # 64 -> 31 -> 14 -> 6 -> 2

    def forward(self, image: Tensor) -> Tensor:
        for conv in self.convs:
            image = F.relu_(conv(image))
        return image.flatten(1)


class Decoder(nn.Module):
    """Mean of a unit normal per pixel. feat (M, F)  ->  image (M, 3, 64, 64), in the scale of the encoder's input."""

    def __init__(self, feat_dim: int, depth: int):
        super().__init__()
        widths = [32 * depth, 4 * depth, 2 * depth, depth, 3]
        self.linear = nn.Linear(feat_dim, widths[0])
        self.convs = nn.ModuleList(  # 1 -> 5 -> 13 -> 30 -> 64
            nn.ConvTranspose2d(a, b, kernel, stride=2) for a, b, kernel in zip(widths, widths[1:], (5, 5, 6, 6))
        )

    def forward(self, feat: Tensor) -> Tensor:
        first, *others = self.convs
        image = self.linear(feat) @ first.weight.flatten(1)  # of one pixel: a matrix product, 20 times as fast so
        image = image.unflatten(1, first.weight.shape[1:]).contiguous(memory_format=torch.channels_last)
        image = image + first.bias[:, None, None].to(image.dtype)
        for conv in others:  # the bias apart: inside, one of these layers takes three times as long on a CPU
            image = F.conv_transpose2d(F.relu_(image), conv.weight, stride=2)
            image = image + conv.bias[:, None, None].to(image.dtype)
        return image


class Priors(nn.Module):
    """The ensemble: N networks of two layers from the recurrent state to the distribution of the stochastic one.

    A weight of all N is one tensor, so a member that is not drawn has a gradient of zero: its moments and the decay go
    on. In V-D4RL's released code it has none and stays as it is."""

    def __init__(self, ensemble: int, deter: int, hidden: int, outputs: int):
        super().__init__()
        self.w1, self.w2 = (
            nn.Parameter(torch.empty(ensemble, *shape)) for shape in ((deter, hidden), (hidden, outputs))
        )
        self.b1, self.b2 = (nn.Parameter(torch.zeros(ensemble, 1, width)) for width in (hidden, outputs))
        for weight in (self.w1, self.w2):
            for member in weight:
                nn.init.xavier_uniform_(member.data)

    def forward(self, deter: Tensor, member: Tensor | None = None) -> Tensor:
        """deter (n, M, D), one member (n,) int64 each  ->  (n, M, outputs) float32; None: deter (M, D) in all of
        them  ->  (N, M, outputs)."""
        w1, b1, w2, b2 = self.w1, self.b1, self.w2, self.b2
        if member is not None:
            w1, b1, w2, b2 = w1[member], b1[member], w2[member], b2[member]
        x = F.elu_(torch.baddbmm(b1, deter.expand(len(w1), -1, -1), w1))
        return torch.baddbmm(b2, x, w2).float()


class Normal(NamedTuple):
    """Independent normals, mean and std (..., S) float32."""

    mean: Tensor
    std: Tensor

    @staticmethod
    def of(raw: Tensor) -> "Normal":
        """raw (..., 2 S) -> a std above 0.1."""
        mean, std = raw.float().chunk(2, -1)
        return Normal(mean, F.softplus(std) + 0.1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Nats, summed over variables. x (..., S)  ->  (...)."""
        return (-0.5 * ((x - self.mean) / self.std).square() - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def kl(self, other: "Normal") -> Tensor:
        """KL(self || other), nats, summed over variables. -> (...)."""
        ratio, distance = (self.std / other.std).square(), ((self.mean - other.mean) / other.std).square()
        return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)


class State(NamedTuple):
    """The latent state: what is drawn and flat, and what is recurrent. (..., *) and (..., D)."""

    stoch: Tensor
    deter: Tensor

    @property
    def feat(self) -> Tensor:
        return torch.cat(self, -1)


class RSSM(nn.Module):
    """Recurrent state-space model: the dynamics of the latent state, and its posterior given images."""

    def __init__(self, embed_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.img_in = nn.Linear(args.stoch + action_dim, args.hidden)
        self.gru = nn.GRUCell(args.hidden, args.deter)  # Keras's with reset_after is the same function
        self.priors = Priors(args.ensemble, args.deter, args.hidden, 2 * args.stoch)
        self.post_in = nn.Linear(args.deter + embed_dim, args.hidden)
        self.post_out = nn.Linear(args.hidden, 2 * args.stoch)

    def initial(self, count: int) -> State:
        zeros = self.img_in.weight.new_zeros
        return State(zeros(count, self.args.stoch), zeros(count, self.args.deter))

    def draw_members(self, count: int) -> Tensor:
        """One prior per time step, shared by the batch, drawn on the device. -> (count,) int64."""
        return torch.randint(self.args.ensemble, (count,), device=self.img_in.weight.device)

    def sample(self, normal: Normal) -> Tensor:
        """(M, S) -> (M, S)."""
        return normal.mean + normal.std * torch.randn_like(normal.mean)  # DIFF 1

    def recur(self, state: State, action: Tensor) -> Tensor:
        """The next recurrent state. action (M, A) leads to it. -> deter (M, D)."""
        x = F.elu_(self.img_in(torch.cat([state.stoch, action], -1)))
        with torch.autocast(x.device.type, enabled=False):
            return self.gru(x.float(), state.deter)

    def observe(self, embed: Tensor, action: Tensor, is_first: Tensor, state: State | None = None):
        """Filters windows. embed (B, T, E), action (B, T, A), is_first (B, T)
        ->  states (B, T, ...), posterior (B, T, S).

        row        t-1                 t                 action[t] led to image[t]
        state      s[t-1] --action[t]--> deter[t] --embed[t]--> stoch[t]
        is_first[t] makes s[t-1] and action[t] zero: what was before is unknown."""
        state = state or self.initial(len(embed))
        keep = 1 - is_first[..., None].float()
        action = action * keep  # DIFF 2
        from_deter, from_embed = self.post_in.weight.split([self.args.deter, embed.shape[-1]], 1)
        embedded = F.linear(embed, from_embed, self.post_in.bias)  # the image's half of the layer, for all rows at once
        states, posts = [], []
        for t in range(embed.shape[1]):
            deter = self.recur(State(*(part * keep[:, t] for part in state)), action[:, t])
            post = Normal.of(self.post_out(F.elu_(F.linear(deter, from_deter) + embedded[:, t])))
            state = State(self.sample(post), deter)
            states.append(state)
            posts.append(post)
        states, posts = ((torch.stack(parts, 1) for parts in zip(*found)) for found in (states, posts))
        return State(*states), Normal(*posts)

    def imagine(self, state: State, action: Tensor) -> State:
        """One step under a prior drawn for the whole batch. state (M, ...), action (M, A)."""
        deter = self.recur(state, action)
        return State(self.sample(Normal.of(self.priors(deter[None], self.draw_members(1))[0])), deter)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward head."""

    def __init__(self, args: Args, action_dim: int):
        super().__init__()
        self.encoder = Encoder(args.cnn_depth)
        self.rssm = RSSM(self.encoder.embed_dim, action_dim, args)
        self.feat_dim = args.stoch + args.deter
        self.decoder = Decoder(self.feat_dim, args.cnn_depth)
        self.reward = mlp(self.feat_dim, args.units, 1, count=2)  # mean of a unit normal

    def embed(self, image: Tensor) -> Tensor:
        """image (..., 3, 64, 64) uint8  ->  (..., E)."""
        return self.encoder(scale_pixels(image.flatten(0, -4))).unflatten(0, image.shape[:-3])


# ==== Penalties ====
# every member's prior (N, M, S) of the state arrived at, stoch (M, S)  ->  (M,)


def log_prob_std(priors: Normal, stoch: Tensor) -> Tensor:
    """Deviation over the members of the state's log-likelihood."""
    return priors.log_prob(stoch).std(0, correction=0)


def log_prob_var(priors: Normal, stoch: Tensor) -> Tensor:
    """Variance of it, as the paper has it; hundreds where there are 64 variables."""
    return priors.log_prob(stoch).var(0, correction=0)


PENALTY = {"log_prob_std": log_prob_std, "log_prob_var": log_prob_var}


# ==== Agent ====


def scale_pixels(obs: Tensor) -> Tensor:
    """(B, C, S, S) uint8 in 0..255 -> float32 in [-0.5, 0.5], in memory as the convolutions read it."""
    assert obs.dtype == torch.uint8  # floats would be scaled in place, perhaps twice
    return obs.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(0.5)


class Transitions(NamedTuple):
    """feat, next_feat (M, F); action (M, A); reward, penalty, discount (M,). The first half is real, of penalty 0."""

    feat: Tensor
    action: Tensor
    reward: Tensor
    penalty: Tensor
    discount: Tensor
    next_feat: Tensor


class LatentBuffer:
    """Latent states of every row of the set, and a ring of as many imagined transitions as the set has real ones."""

    def __init__(self, buffer: common.SequenceBuffer, feat_dim: int):
        self.buffer, self.device, rows = buffer, buffer.device, len(buffer.reward)
        self.first = buffer.lengths.cumsum(0) - buffer.lengths  # row of each episode
        leads_on = torch.ones(rows, dtype=torch.bool)
        leads_on[self.first + buffer.lengths - 1] = False  # an episode's last row leads nowhere
        self.real_rows = leads_on.nonzero().flatten().to(self.device)
        self.feat = torch.zeros(rows, feat_dim, device=self.device)
        widths = {"feat": (feat_dim,), "action": (buffer.action_dim,), "reward": (), "penalty": (), "discount": ()}
        widths["next_feat"] = (feat_dim,)
        self.ring = {n: torch.zeros(len(self.real_rows), *width, device=self.device) for n, width in widths.items()}
        self.written = self.refreshed = 0  # transitions imagined, episodes whose states were drawn anew, so far

    def episode_rows(self, episodes: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (n, T) of episodes (n,), the last one repeated where an episode is shorter, and which are its own."""
        lengths = self.buffer.lengths[episodes][:, None]
        t = torch.arange(lengths.max())
        rows, inside = self.first[episodes][:, None] + torch.minimum(t, lengths - 1), t < lengths
        return rows.to(self.device), inside.to(self.device)

    def add(self, imagined: Transitions) -> None:
        size, count = len(self.real_rows), len(imagined.reward)
        place = torch.arange(self.written, self.written + count, device=self.device)[-size:] % size
        for name, value in imagined._asdict().items():
            self.ring[name][place] = value[-size:]
        self.written += count

    def sample(self, count: int) -> Transitions:
        """Half real, half imagined, each uniform with replacement.

        row       row            row + 1         arrival rows
        state     feat           next_feat
        action    -------------> action, with the reward and discount it led to"""
        row = self.real_rows[torch.randint(len(self.real_rows), (count // 2,), device=self.device)]
        filled = min(self.written, len(self.real_rows))
        place = torch.randint(filled, (count - count // 2,), device=self.device)
        action, reward, discount = (x[row + 1] for x in (self.buffer.action, self.buffer.reward, self.buffer.discount))
        real = Transitions(self.feat[row], action, reward, torch.zeros_like(reward), discount, self.feat[row + 1])
        imagined = Transitions(*(self.ring[name][place] for name in Transitions._fields))
        return Transitions(*(torch.cat(pair) for pair in zip(real, imagined)))  # discount: DIFF 8

    def state_dict(self) -> dict:
        """Nothing in the first phase; in the second it cannot be made again: the actor that imagined is gone."""
        if not self.written:
            return {}
        filled = {name: value[: self.written].clone() for name, value in self.ring.items()}
        return {"feat": self.feat, "ring": filled, "written": self.written, "refreshed": self.refreshed}

    def load_state_dict(self, state: dict) -> None:
        if not state:
            return
        self.feat.copy_(state["feat"])
        for name, value in state["ring"].items():
            self.ring[name][: len(value)] = value
        self.written, self.refreshed = state["written"], state["refreshed"]


class Agent(nn.Module):
    """World model, actor, twin critics and their targets."""

    LOSSES = ("model_loss", "critic_loss", "actor_loss")  # what --accelerate compile compiles

    def __init__(self, args: Args, action_dim: int):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.model = WorldModel(args, action_dim)
        feat_dim = self.model.feat_dim
        self.actor = nn.Sequential(mlp(feat_dim, args.units, action_dim), nn.Tanh())  # deterministic
        self.critic, self.critic_target = (
            nn.ModuleList(mlp(feat_dim + action_dim, args.units, 1, count=3) for _ in range(2)) for _ in range(2)
        )
        self.apply(init_weights)
        self.model.to(memory_format=torch.channels_last)  # faster convolutions, same numbers up to rounding
        self.critic_target.load_state_dict(self.critic.state_dict())  # DIFF 4
        self.critic_target.requires_grad_(False)
        rates = {"model": args.model_lr, "actor": args.actor_lr, "critic": args.critic_lr}
        self.optimizers = {
            name: torch.optim.Adam(getattr(self, name).parameters(), lr, eps=1e-7, fused=True)  # DIFF 9
            for name, lr in rates.items()
        }

    def autocast(self):
        return torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.precision == "bf16")

    # ---- first phase ----

    def model_loss(self, batch: Sequences) -> tuple[Tensor, Metrics]:
        """Negative evidence bound of windows, see the head of this file."""
        rssm = self.model.rssm
        pixels = scale_pixels(batch.image.flatten(0, 1))  # (B T, 3, 64, 64)
        embed = self.model.encoder(pixels).unflatten(0, batch.reward.shape)
        states, post = rssm.observe(embed, batch.action, batch.is_first)
        # the prior's draw feeds nothing while filtering, so only the drawn member is evaluated, all rows at once
        member = rssm.draw_members(self.args.window)
        prior = Normal.of(rssm.priors(states.deter.transpose(0, 1), member).transpose(0, 1))
        kl = post.kl(prior).mean()  # neither balanced nor free: both sides learn from it
        feat = states.feat
        image = self.model.decoder(feat.flatten(0, 1)).float()
        assert image.shape == pixels.shape
        image_loss = normal_nll(image, pixels) / len(pixels)  # a sum over pixels, a mean over rows: 11,291.9 at best
        reward = self.model.reward(feat).squeeze(-1)  # of a window's first row too, which knows no past
        assert reward.shape == batch.reward.shape  # (B, T)
        reward_loss = normal_nll(reward, batch.reward) / reward.numel()
        loss = image_loss + reward_loss + kl
        metrics = {"loss": loss, "image_loss": image_loss, "reward_loss": reward_loss, "kl": kl}
        metrics |= {"post_std": post.std.mean(), "prior_std": prior.std.mean()}
        return loss, {f"model/{name}": value.detach() for name, value in metrics.items()}

    def update_model(self, batch: Sequences) -> Metrics:
        """One gradient step of the world model."""
        with self.autocast():
            loss, metrics = self.model_loss(batch)
        return metrics | {"model/grad_norm": self.minimize("model", loss)}

    # ---- second phase: the model is frozen ----

    @torch.no_grad()
    def embed_set(self, buffer: common.SequenceBuffer, rows: int = 1024) -> Tensor:
        """Embeddings of every row of the set, in the encoder's output precision. -> (rows of the set, E) (DIFF 5)."""
        out = None
        with self.autocast():
            for index in torch.arange(len(buffer.reward), device=buffer.images[0].device).split(rows):
                embed = self.model.embed(buffer.frames(index))
                out = embed.new_empty(len(buffer.reward), embed.shape[-1]) if out is None else out
                out[index.to(out.device)] = embed
        return out

    @torch.no_grad()
    def encode(self, latent: LatentBuffer, embeds: Tensor, episodes: Tensor) -> None:
        """Draws the states of whole episodes (n,), filtered from their first row, into `latent`."""
        rows, inside = latent.episode_rows(episodes)
        buffer = latent.buffer
        with self.autocast():
            states, _ = self.model.rssm.observe(embeds[rows], buffer.action[rows], buffer.is_first[rows])
        latent.feat[rows[inside]] = states.feat[inside]

    def penalty(self, state: State) -> Tensor:
        """Disagreement of the priors on arriving at a state. (M, ...)  ->  (M,)."""
        return PENALTY[self.args.penalty](Normal.of(self.model.rssm.priors(state.deter)), state.stoch)

    @torch.no_grad()
    def rollout(self, latent: LatentBuffer, batch: Sequences, embed: Tensor) -> Transitions:
        """Imagined transitions from every state of a batch of windows: H B T of them."""
        args, rssm, parts = self.args, self.model.rssm, []
        with self.autocast():
            if args.starts == "window":  # filtered from nothing, theirs
                states, _ = rssm.observe(embed, batch.action, batch.is_first)
                state = State(*(part.flatten(0, 1) for part in states))
            else:  # from the episode's beginning
                state = State(*latent.feat[batch.row].flatten(0, 1).split([args.stoch, args.deter], -1))
            for _ in range(args.horizon):
                noise = args.rollout_noise * torch.randn(len(state.deter), self.action_dim, device=embed.device)
                action = (self.actor(state.feat) + noise).clamp(-1, 1)
                deter = rssm.recur(state, action)
                priors = Normal.of(rssm.priors(deter))  # (N, M, S)
                member = rssm.draw_members(1)
                following = State(rssm.sample(Normal(*(part[member].squeeze(0) for part in priors))), deter)
                reward = self.model.reward(following.feat).squeeze(-1)
                penalty = PENALTY[args.penalty](priors, following.stoch)
                parts.append((state.feat, action, reward, penalty, torch.ones_like(reward), following.feat))
                state = following
        return Transitions(*(torch.cat(part).float() for part in zip(*parts)))

    def critic_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        """TD error of both critics, penalised rewards."""
        args = self.args
        reward = batch.reward - args.penalty_coef * batch.penalty
        with torch.no_grad():
            pair = torch.cat([batch.next_feat, self.actor(batch.next_feat)], -1)
            next_q = torch.minimum(*(critic(pair).squeeze(-1) for critic in self.critic_target))
            target_q = reward + args.gamma * batch.discount * next_q  # discount: 0 at terminal, not timeout
        q1, q2 = (critic(torch.cat([batch.feat, batch.action], -1)).squeeze(-1) for critic in self.critic)
        assert q1.shape == target_q.shape == batch.reward.shape  # (M,)
        loss = F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)
        half = len(reward) // 2  # from there on imagined
        metrics = {"critic/loss": loss, "critic/q": q1.mean(), "imag/reward": batch.reward[half:].mean()}
        penalty = batch.penalty[half:]
        metrics |= {"imag/penalty": penalty.mean(), "imag/penalty_std": penalty.std(correction=0)}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def actor_loss(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        """Minus the value of the actor's own action."""
        pair = torch.cat([batch.feat, self.actor(batch.feat)], -1)
        loss = -torch.minimum(*(critic(pair) for critic in self.critic)).mean()
        return loss, {"actor/loss": loss.detach()}

    def update_agent(self, batch: Transitions) -> Metrics:
        """One gradient step of critics and actor, both at the old critics, one Polyak step of the targets."""
        with self.autocast():
            critic_loss, critic_metrics = self.critic_loss(batch)
            actor_loss, actor_metrics = self.actor_loss(batch)
        actor_norm = self.minimize("actor", actor_loss)
        critic_norm = self.minimize("critic", critic_loss)
        with torch.no_grad():
            torch._foreach_lerp_([*self.critic_target.parameters()], [*self.critic.parameters()], self.args.tau)
        return actor_metrics | critic_metrics | {"actor/grad_norm": actor_norm, "critic/grad_norm": critic_norm}

    # ---- both ----

    def minimize(self, name: str, loss: Tensor) -> Tensor:
        """One step of an optimiser on its own parameters; no gradient is computed for others. Returns the
        gradient's norm before the clip, ()."""
        optimizer = self.optimizers[name]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        loss.backward(inputs=params)
        norm = nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
        optimizer.step()
        return norm

    @torch.no_grad()
    def act(self, obs: Tensor, action: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The actor's action, and the filter's next state. obs (B, 3, 64, 64) uint8, arrived at by action (B, A);
        state: what the last call returned, None at an episode's first image."""
        first = torch.full((len(obs), 1), state is None, device=obs.device)
        embed = self.model.embed(obs)[:, None]
        states, _ = self.model.rssm.observe(embed, action[:, None], first, state)
        state = State(*(part[:, 0] for part in states))
        return self.actor(state.feat), state

    # ---- checkpoints ----

    def get_extra_state(self) -> dict:
        """What torch adds to state_dict(): the optimisers. What else an update changes belongs here, for resume."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def set_extra_state(self, state: dict) -> None:
        for name, optimizer_state in state.items():
            self.optimizers[name].load_state_dict(optimizer_state)


def normal_nll(mean: Tensor, x: Tensor) -> Tensor:
    """-log N(x; mean, 1), the sum over all elements."""
    return 0.5 * F.mse_loss(mean, x, reduction="sum") + 0.5 * math.log(2 * math.pi) * x.numel()


def refill(agent: Agent, latent: LatentBuffer, embeds: Tensor, update: int) -> None:
    """What agent updates are made from, before number `update`: first the states of all episodes and half a ring of
    rollouts, then, every --rollout-every updates, one episode drawn anew and more rollouts."""
    args, buffer = agent.args, latent.buffer
    if update % args.rollout_every:
        return
    if update == 0:
        for episodes in torch.arange(len(buffer.lengths)).split(args.batch_size):
            agent.encode(latent, embeds, episodes)
    else:
        agent.encode(latent, embeds, torch.tensor([latent.refreshed % len(buffer.lengths)]))
        latent.refreshed += 1
    while True:
        batch = buffer.sample(images=False)
        latent.add(agent.rollout(latent, batch, embeds[batch.row]))
        if update > 0 or latent.written >= len(latent.real_rows) // 2:  # DIFF 3
            return


# ==== Evaluation ====


def evaluate(agent: Agent, pool: EnvPool, args: Args) -> tuple[dict, list[np.ndarray]]:
    """The actor's mode on filtered states, the same episodes and the same posterior draws every time. Returns score and
    every return, frames of the first episode."""
    agent.eval()
    obs, returns, frames = pool.reset(common.EVAL_SEED + np.arange(pool.count)), np.zeros(pool.count), []  # DIFF 7
    action, state = np.zeros((pool.count, agent.action_dim), np.float32), None
    devices = [torch.cuda.current_device()] if args.device == "cuda" else []
    with torch.random.fork_rng(devices):  # how often one evaluates does not change the training's draws
        torch.manual_seed(common.EVAL_SEED)
        while not pool.done.all():
            frames.append(obs[0].copy())  # a view would keep the frames of all episodes
            images, last = (torch.from_numpy(array).to(args.device) for array in (obs, action))
            chosen, state = agent.act(images, last, state)
            action = chosen.cpu().numpy()
            obs, reward, _ = pool.step(action)  # reward is 0 where the episode is over
            returns += reward
    agent.train()
    return pool.summary(returns), frames


def evaluate_run(args: Args) -> None:
    """--evaluate RUN: scores a finished run's weights on --eval-episodes episodes and writes a video."""
    facts, weights = common.load_run(args)
    pool = common.evaluation_pool(args, facts, 1)
    agent = Agent(args, facts["action_dim"]).to(args.device)
    agent.load_state_dict(agent.state_dict() | weights)  # results/runs/ has only those that act
    metrics, frames = evaluate(agent, pool, args)
    print(", ".join(f"{name} {np.round(value, 2)}" for name, value in metrics.items()))
    common.save_video(Path(args.evaluate) / "evaluation.mp4", frames)


def main(args: Args) -> None:
    if args.evaluate:
        return evaluate_run(args)
    dataset = common.open_dataset(args, SIZE)  # a standard set is made on the spot if it is missing
    if dataset.size != SIZE:
        raise UserError(f"{dataset.path} has images of {dataset.size} px; the decoder gives {SIZE}")
    if args.model_from:
        args.model_steps = 0
    if args.model_steps is None:
        args.model_steps = round(dataset.num_transitions * 25_000 / 100_000)  # DIFF 3
    if args.agent_steps is None:
        args.agent_steps = round(dataset.num_transitions * 150_000 / 100_000)
    run = common.Run(args, dataset)  # its folder and lock; seeds torch
    pool = common.evaluation_pool(args, dataset.facts(), 1)
    buffer = common.SequenceBuffer(dataset, args.batch_size, args.window, args.seed, args.device, args.buffer_device)
    agent = Agent(args, buffer.action_dim).to(args.device)
    common.accelerate(agent, args)
    if args.model_from and not run.resumes:
        weights = common.read(f"{args.model_from}/weights.pt").items()
        agent.model.load_state_dict({k.removeprefix("model."): v for k, v in weights if k.startswith("model.")})
    latent, embeds = LatentBuffer(buffer, agent.model.feat_dim), None
    step = run.begin(agent=agent, buffer=buffer, latent=latent)  # 0, or where the checkpoint was written
    while step < args.steps:
        phase = "model" if step < args.model_steps else "agent"
        if phase == "model":
            metrics = agent.update_model(buffer.sample())
        else:
            if embeds is None:  # the second phase begins, or goes on in a new process
                embeds = agent.embed_set(buffer)
            refill(agent, latent, embeds, step - args.model_steps)
            metrics = agent.update_agent(latent.sample(args.agent_batch_size))
        step += 1
        run.advance(step)
        if run.log_due:
            run.log(phase, step, {name: value.item() for name, value in metrics.items()})  # the only .item()
        if pool and phase == "agent" and run.eval_due:
            metrics, frames = evaluate(agent, pool, args)
            run.log("eval", step, metrics)
            if step == args.steps:
                common.save_video(run.path / "evaluation.mp4", frames)
        if run.checkpoint_due:
            run.save_checkpoint(step, agent=agent, buffer=buffer, latent=latent)


if __name__ == "__main__":
    main(common.parse_args(Args, TUNED, QUICK))
