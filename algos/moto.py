"""MOTO (arXiv:2401.03306): a world model trained on demonstrations, an actor and two critics trained inside it; then
one episode in the environment, some updates, the next episode. No code of the authors is public.

    model   Offline DV2's (2206.04779): categorical RSSM, an ensemble of N priors, one drawn per time step; it goes on
            learning to the end, from offline and online episodes alike
    rollout from every state of the windows H steps under the actor; r^t on arrival, less penalty_coef * u
    values  V0^t = min_i Q_i(s^t, a^t), a^t ~ pi;  V^t = r^{t+1} + gamma Vhat^{t+1}
            Vhat^t = (1 - td_lambda) V0^t + td_lambda V^t,  Vhat^H = V0^H        Eq. 4 and 5 as a recursion
    L_pi = -mean_{t < H} (Vhat^t + actor_ent * entropy^t) - bc_coef * mean worth * log pi(a_data | s_data)  Eq. 6 and 10
    L_Q  = sum_i [ mean_{t < H} (Vbar^t - Q_i(s^t, a^t))^2                                               Eq. 7
                 + mean_data (r_{j+1} + gamma d_{j+1} V0bar(s_{j+1}) - Q_i(s_j, a_j))^2 ]                Eq. 8
    bar: by the target critics. r in Eq. 8: as it is in the data. d: 0 after a terminal step, else 1. worth:
    1 where an action is worth imitating, else 0 (the paper's f; --bc-filter).

Dims: B windows, T rows of a window, M = B T states, H horizon, A action, E embedding, S stoch, K classes, D deter,
F = S K + D feat, N ensemble.
Where the paper is silent or contradicts itself (marked DIFF n where it happens; docs/moto.md has the reasons):
  DIFF 1: u is the deviation over the members of the normalised logits, averaged; Eq. 2 says logits, no reduction.
  DIFF 2: Eq. 8's V is the value of the actor's action in s_{j+1}, as its text says; printed is the rollout's.
  DIFF 3: model and agent learn from one batch of 16 windows (Algorithm 1); an episode is played before its updates.
  DIFF 4: model sizes, KL, optimiser, entropy, target copies and horizon 5 are Offline DV2's (C.3: DreamerV2's).
  DIFF 5: the imitation term is a mean over rows, printed as a sum beside the means of Eq. 6.
  DIFF 6: evaluations are seeded episodes; the paper says nothing.
  DIFF 7: tasks with dense rewards have no success to filter by: there the better half of the episodes by return.
  DIFF 8: updates and episodes of Appendix C.1; elsewhere one update per transition, and no episodes.
  DIFF 9: --model-first; in Algorithm 1 all learn from the first update.
Cost and scores: results/summary.csv (measured, one row per task, dataset, seed, commit)."""

import math
import os
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
    task: str = "metaworld-drawer-open"  # metaworld-*, kitchen-mixed, kitchen-partial, or dm_control's domain-task
    dataset: str = "demos"  # demos (Meta-World), mixed and partial (kitchen), a set of dm_control, or a path
    source: Literal["made", "vd4rl"] = "made"  # made: rendered here; vd4rl: the imported official set
    data_dir: str | None = None  # where sets are; None: $CLEANPIXELS_DATA, else datasets/ beside common.py
    transitions: Count | None = None  # a made set of so many transitions; None: of the published number
    data_seed: Whole = 0  # seed of a made set
    distraction: Literal["none", "low", "moderate", "high"] = "none"  # of background, camera, colours (variations.py)
    shifted: Annotated[int, (0, 100)] = 100  # percent of the episodes that the distraction shows in
    bodies: bool = False  # a set of four bodies; evaluated on them, and on four that were not seen
    seed: Whole = 0  # of weights, sampling, imagination and online episodes; evaluation has seeds of its own
    tag: str = ""  # tells apart runs of the same task, set and seed with other flags
    runs_dir: str | None = None  # where run folders are; None: runs/ beside common.py
    overwrite: bool = False  # start anew in a folder that holds a run; without it the same command continues
    quick: bool = False  # a small setting for two CPU cores; what it shows: docs/moto.md
    evaluate: str | None = None  # a finished run's folder: evaluate it, write a video, stop
    offline_from: str | None = None  # a run's folder: begin online where its offline phase ended; give a --tag
    offline_steps: Whole | None = None  # gradient updates before the first episode; None: one per transition (DIFF 8)
    model_first: Whole = 0  # of these, so many train the model alone (DIFF 9)
    online_episodes: Whole = 0  # episodes in the environment, each before its updates (DIFF 8)
    updates_per_episode: Count = 20  # gradient updates after each of them (DIFF 8)
    batch_size: Count = 16  # windows (Appendix C.3)
    window: Annotated[int, (2, math.inf)] = 50  # rows per window
    model_lr: Rate = 1e-4  # Adam; the three rates: Appendix C.3
    actor_lr: Rate = 8e-5
    critic_lr: Rate = 8e-5
    cnn_depth: Count = 48  # channels of the first convolution, doubled by each of the next three
    stoch: Count = 32  # categorical variables
    classes: Count = 32  # of each
    deter: Count = 200  # width of the recurrent state
    hidden: Count = 200  # width of the layers beside it
    ensemble: Count = 7  # priors (Appendix C.3)
    units: Count = 400  # width of the four layers of reward head, actor and critics
    kl_balance: Share = 0.8  # share of the KL's gradient that trains the prior
    free_nats: Weight = 1.0  # below it the mean KL has no gradient
    penalty_coef: Weight = 10.0  # alpha of Eq. 3 (Appendix C.3); 0: Figure 3's ablation
    value: Literal["expansion", "dreamer"] = "expansion"  # dreamer: DreamerV2's lambda-returns, a critic of states
    bc_filter: Literal["success", "return", "all"] = "return"  # what is worth imitating (DIFF 7)
    bc_quantile: Share = 0.5  # return: of the episodes in the buffer, those above this quantile
    bc_success_reward: Weight = 1.0  # success: an episode with a step of at least this reward
    bc_coef: Weight = 10.0  # beta, weight of the imitation term (Appendix C.3); 0: Figure 3's ablation
    horizon: Count = 5  # imagined steps (DIFF 4)
    gamma: Share = 0.99  # discount per control step
    td_lambda: Share = 0.95  # of the value expansion
    actor_ent: Weight = 1e-4  # weight of the actor's entropy
    target_every: Count = 100  # gradient updates
    eval_every: Whole | None = None  # gradient updates; None: a twentieth of the run; 0: no evaluation
    eval_episodes: Count = 10  # per evaluation; 20 in manipulation tasks, where successes are counted
    log_every: Count = 100  # gradient updates
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast where the hardware has it
    accelerate: Literal["eager", "compile"] = "eager"  # compile: the losses under torch.compile
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"  # where the frames are; auto: on the GPU if they fit

    @property
    def steps(self) -> int:
        return self.offline_steps + self.online_episodes * self.updates_per_episode


TUNED = {  # DIFF 8
    ("metaworld-*", "*"): {"offline_steps": 1000, "online_episodes": 1000, "bc_filter": "success", "eval_episodes": 20},
    ("kitchen-*", "*"): {"offline_steps": 10_000, "online_episodes": 1_326, "updates_per_episode": 50,
                         "bc_filter": "success", "bc_success_reward": 4.0, "eval_episodes": 20},
    ("kitchen-partial", "*"): {"bc_success_reward": 3.0},  # no demonstration solves its four; any three count (C.1)
}  # fmt: skip
# A small model that learns fast, alone at first; then actor and critics, from demonstrations at the paper's rates.
DEMOS = {"offline_steps": 1_200, "online_episodes": 150, "updates_per_episode": 12, "eval_every": 300,
         "actor_lr": 8e-5, "critic_lr": 8e-5, "target_every": 100, "penalty_coef": 10.0, "bc_coef": 100.0}  # fmt: skip
QUICK = {
    ("*", "*"): {"transitions": 30_000, "offline_steps": 2_000, "model_first": 600, "batch_size": 8, "window": 25,
                 "eval_every": 200, "model_lr": 1e-3, "actor_lr": 3e-4, "critic_lr": 1e-3, "target_every": 10,
                 "penalty_coef": 1.0, "bc_quantile": 0.75, "cnn_depth": 8, "stoch": 16, "classes": 16, "ensemble": 5,
                 "units": 200},
    ("metaworld-*", "*"): DEMOS | {"transitions": 1_000},  # 10 demonstrations, as in the paper
    ("kitchen-*", "*"): DEMOS,
}  # fmt: skip

SIZE = 64  # pixels per side: what the decoder's kernels give
MAX_GRAD_NORM = 100.0
ONLINE_SEED = 2_000_000  # online episode i of run seed s starts from seed ONLINE_SEED + 100,000 s + i


# ==== Networks ====


def init_weights(module: nn.Module) -> None:
    """Keras's defaults: Glorot-uniform weights, zero biases."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


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
    """Frames to embeddings. image (M, 3, 64, 64) float32 in [-0.5, 0.5]  ->  embed (M, E); depth 48: E = 1536."""

    def __init__(self, depth: int):
        super().__init__()
        widths = [3, depth, 2 * depth, 4 * depth, 8 * depth]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2) for a, b in zip(widths, widths[1:]))
        self.embed_dim = 8 * depth * 2 * 2  # 64 -> 31 -> 14 -> 6 -> 2

    def forward(self, image: Tensor) -> Tensor:
        for conv in self.convs:
            image = F.elu_(conv(image))
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
            image = F.conv_transpose2d(F.elu_(image), conv.weight, stride=2)
            image = image + conv.bias[:, None, None].to(image.dtype)
        return image


class GRUCell(nn.Module):
    """DreamerV2's: one LayerNorm over the three pre-activations, the update gate's bias -1. Not torch.nn.GRUCell.

    x (M, inputs), h (M, D)  ->  h' (M, D) float32."""

    def __init__(self, inputs: int, deter: int):
        super().__init__()
        self.linear = nn.Linear(inputs + deter, 3 * deter)
        self.norm = nn.LayerNorm(3 * deter, eps=1e-3)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        reset, candidate, update = self.norm(self.linear(torch.cat([x, h], -1)).float()).chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)
        return update * candidate + (1 - update) * h


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
        stoch, classes, deter, hidden, ensemble = args.stoch, args.classes, args.deter, args.hidden, args.ensemble
        self.stoch, self.classes, self.deter, self.ensemble = stoch, classes, deter, ensemble
        self.img_in = nn.Linear(stoch * classes + action_dim, hidden)
        self.gru = GRUCell(hidden, deter)
        self.priors = Priors(ensemble, deter, hidden, stoch * classes)
        self.post_in = nn.Linear(deter + embed_dim, hidden)
        self.post_out = nn.Linear(hidden, stoch * classes)

    def initial(self, count: int) -> State:
        zeros = self.img_in.weight.new_zeros
        return State(zeros(count, self.stoch * self.classes), zeros(count, self.deter))

    def draw_members(self, count: int) -> Tensor:
        """One prior per time step, shared by the batch, drawn on the device. -> (count,) int64."""
        return torch.randint(self.ensemble, (count,), device=self.img_in.weight.device)

    def sample(self, logits: Tensor) -> Tensor:
        """One-hot draws. logits (..., S K)  ->  (..., S K); the gradient is that of the probabilities
        (straight-through)."""
        probs = logits.unflatten(-1, (self.stoch, self.classes)).softmax(-1)
        cumulative = probs.detach().cumsum(-1)
        threshold = torch.rand_like(cumulative[..., :1]) * cumulative[..., -1:]
        index = (cumulative <= threshold).sum(-1, keepdim=True).clamp_max(self.classes - 1)
        one_hot = torch.zeros_like(probs).scatter_(-1, index, 1.0)
        return (one_hot + (probs - probs.detach())).flatten(-2)

    def recur(self, state: State, action: Tensor) -> Tensor:
        """The next recurrent state. action (M, A) leads to it. -> deter (M, D)."""
        return self.gru(F.elu_(self.img_in(torch.cat([state.stoch, action], -1))), state.deter)

    def observe(self, embed: Tensor, action: Tensor, is_first: Tensor, state: State | None = None):
        """Filters windows. embed (B, T, E), action (B, T, A), is_first (B, T)
        ->  states (B, T, ...), logits of the posterior (B, T, S K).

        row        t-1                 t                 action[t] led to image[t]
        state      s[t-1] --action[t]--> deter[t] --embed[t]--> stoch[t]
        is_first[t] makes s[t-1] and action[t] zero: what was before is unknown."""
        state = state or self.initial(len(embed))
        keep = 1 - is_first[..., None].float()
        action = action * keep
        from_deter, from_embed = self.post_in.weight.split([self.deter, embed.shape[-1]], 1)
        embedded = F.linear(embed, from_embed, self.post_in.bias)  # the image's half of the layer, for all rows at once
        states, post = [], []
        for t in range(embed.shape[1]):
            deter = self.recur(State(*(part * keep[:, t] for part in state)), action[:, t])
            logits = self.post_out(F.elu_(F.linear(deter, from_deter) + embedded[:, t])).float()
            state = State(self.sample(logits), deter)
            states.append(state)
            post.append(logits)
        return State(*(torch.stack(parts, 1) for parts in zip(*states))), torch.stack(post, 1)

    def imagine(self, state: State, action: Tensor) -> State:
        """One step under a prior drawn for the whole batch. state (M, ...), action (M, A)."""
        deter = self.recur(state, action)
        return State(self.sample(self.priors(deter[None], self.draw_members(1))[0]), deter)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward head."""

    def __init__(self, args: Args, action_dim: int):
        super().__init__()
        self.encoder = Encoder(args.cnn_depth)
        self.rssm = RSSM(self.encoder.embed_dim, action_dim, args)
        self.feat_dim = args.stoch * args.classes + args.deter
        self.decoder = Decoder(self.feat_dim, args.cnn_depth)
        self.reward = mlp(self.feat_dim, args.units, 1)  # mean of a unit normal

    def embed(self, image: Tensor) -> Tensor:
        """image (..., 3, 64, 64) uint8  ->  (..., E)."""
        return self.encoder(scale_pixels(image.flatten(0, -4))).unflatten(0, image.shape[:-3])


class TruncatedNormal(NamedTuple):
    """A normal with these loc and scale (..., A), cut to [-1, 1]."""

    loc: Tensor
    scale: Tensor

    def bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised bounds, and the mass between them."""
        low, high = (-1 - self.loc) / self.scale, (1 - self.loc) / self.scale
        return low, high, torch.special.ndtr(high) - torch.special.ndtr(low)

    def sample(self) -> Tensor:
        """Draws within +- (1 - 1e-6). The gradient is the released code's: as if the standardised draw z were given,
        dx/dloc = 1 and dx/dscale = z; that of the bounds is left out."""
        with torch.no_grad():
            low, _, mass = self.bounds()
            uniform = torch.rand_like(mass).clamp(1e-6, 1 - 1e-6)
            z = torch.special.ndtri(torch.special.ndtr(low) + uniform * mass)
        action = self.loc + self.scale * z
        return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()

    def entropy(self) -> Tensor:
        """Nats, summed over actions. -> (...)."""
        low, high, mass = self.bounds()
        density_low, density_high = (torch.exp(-0.5 * bound**2) / math.sqrt(2 * math.pi) for bound in (low, high))
        shape = (low * density_low - high * density_high) / (2 * mass)
        return (torch.log(self.scale * mass) + 0.5 * math.log(2 * math.pi * math.e) + shape).sum(-1)


def truncated_log_prob(policy: TruncatedNormal, action: Tensor) -> Tensor:
    """Nats, summed over actions; what lies on a bound counts as just inside. action (..., A)  ->  (...)."""
    z = (action.clamp(-1 + 1e-6, 1 - 1e-6) - policy.loc) / policy.scale
    mass = policy.bounds()[2]
    return (-0.5 * z.square() - 0.5 * math.log(2 * math.pi) - torch.log(policy.scale * mass)).sum(-1)


class Actor(nn.Module):
    """feat (..., F)  ->  a truncated normal over actions; its mode is loc."""

    def __init__(self, feat_dim: int, action_dim: int, units: int):
        super().__init__()
        self.hidden = hidden_layers(feat_dim, units, 4)
        self.loc, self.scale = LastLayer(units, action_dim), LastLayer(units, action_dim)

    def forward(self, feat: Tensor) -> TruncatedNormal:
        x = self.hidden(feat)
        return TruncatedNormal(torch.tanh(self.loc(x)), 2 * torch.sigmoid(self.scale(x) / 2) + 0.1)  # 0.1 .. 2.1


class Critics(nn.Module):
    """Two Q networks; under --value dreamer one V, which sees no action. (..., F), (..., A)  ->  (2 or 1, ...)."""

    def __init__(self, feat_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.sees_action = args.value == "expansion"
        inputs, count = (feat_dim + action_dim, 2) if self.sees_action else (feat_dim, 1)
        self.nets = nn.ModuleList(mlp(inputs, args.units, 1) for _ in range(count))

    def forward(self, feat: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([feat, action], -1) if self.sees_action else feat
        return torch.stack([net(x).squeeze(-1) for net in self.nets])


# ==== Agent ====


def scale_pixels(obs: Tensor) -> Tensor:
    """(B, C, S, S) uint8 in 0..255 -> float32 in [-0.5, 0.5], in memory as the convolutions read it."""
    assert obs.dtype == torch.uint8  # floats would be scaled in place, perhaps twice
    return obs.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(0.5)


def categorical_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of S independent categoricals, nats. Logits (..., S, K) float32  ->  (...)."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum((-2, -1))


def expand_values(reward: Tensor, value: Tensor, gamma: float, td_lambda: float) -> tuple[Tensor, Tensor]:
    """Value expansion. reward (H, M) on arrival in states 1 .. H, value (H + 1, M) V0 of states 0 .. H
    ->  V and Vhat (H, M) of states 0 .. H-1. With rewards of states 0 .. H-1, V is DreamerV2's lambda-return.

    V^t = reward^{t+1} + gamma Vhat^{t+1};  Vhat^t = (1 - td_lambda) V0^t + td_lambda V^t;  Vhat^H = V0^H
    Unrolled, V is Eq. 5 and Vhat mixes in the expansion of no step."""
    hat, found = value[-1], []
    for t in reversed(range(len(reward))):
        expanded = reward[t] + gamma * hat
        hat = (1 - td_lambda) * value[t] + td_lambda * expanded
        found.append((expanded, hat))
    return tuple(torch.stack(parts[::-1]) for parts in zip(*found))


class Agent(nn.Module):
    """World model, actor, critics and their targets."""

    LOSSES = ("model_loss", "actor_loss", "critic_loss")  # what --accelerate compile compiles

    def __init__(self, args: Args, action_dim: int):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.model = WorldModel(args, action_dim)
        self.actor = Actor(self.model.feat_dim, action_dim, args.units)
        self.critic, self.critic_target = (Critics(self.model.feat_dim, action_dim, args) for _ in range(2))
        self.apply(init_weights)
        self.model.to(memory_format=torch.channels_last)  # faster convolutions, same numbers up to rounding
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.requires_grad_(False)
        rates = {"model": args.model_lr, "actor": args.actor_lr, "critic": args.critic_lr}
        self.optimizers = {
            # the decay is 1e-6 a step, whatever the rate
            name: torch.optim.AdamW(getattr(self, name).parameters(), lr, eps=1e-5, weight_decay=1e-6 / lr, fused=True)
            for name, lr in rates.items()
        }

    def autocast(self):
        return torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.precision == "bf16")

    def model_loss(self, batch: Sequences) -> tuple[Tensor, State, Metrics]:
        """Negative evidence bound of windows, and their states (B, T, ...) without gradient."""
        args, rssm = self.args, self.model.rssm
        pixels = scale_pixels(batch.image.flatten(0, 1))  # (B T, 3, 64, 64)
        embed = self.model.encoder(pixels).unflatten(0, batch.reward.shape)
        states, post = rssm.observe(embed, batch.action, batch.is_first)
        # the prior's draw feeds nothing while filtering, so only the drawn member is evaluated, all rows at once
        member = rssm.draw_members(args.window)
        prior = rssm.priors(states.deter.transpose(0, 1), member).transpose(0, 1)
        post, prior = (logits.unflatten(-1, (args.stoch, args.classes)) for logits in (post, prior))
        train_post = categorical_kl(post, prior.detach()).mean()
        train_prior = categorical_kl(post.detach(), prior).mean()
        kl_loss = (1 - args.kl_balance) * train_post.clamp_min(args.free_nats)  # on the mean, not per state
        kl_loss = kl_loss + args.kl_balance * train_prior.clamp_min(args.free_nats)
        feat = states.feat
        image = self.model.decoder(feat.flatten(0, 1)).float()
        assert image.shape == pixels.shape
        image_loss = normal_nll(image, pixels) / len(pixels)  # a sum over pixels, a mean over rows: 11,291.9 at best
        reward = self.model.reward(feat).squeeze(-1)  # of a window's first row too, which knows no past
        assert reward.shape == batch.reward.shape  # (B, T)
        reward_loss = normal_nll(reward, batch.reward) / reward.numel()
        loss = image_loss + reward_loss + kl_loss
        metrics = {"loss": loss, "image_loss": image_loss, "reward_loss": reward_loss, "kl": train_prior}
        states = State(*(part.detach() for part in states))
        return loss, states, {f"model/{name}": value.detach() for name, value in metrics.items()}

    def penalty(self, state: State) -> Tensor:
        """Deviation over the priors of the normalised logits, on arriving at a state. (M, ...)  ->  (M,). Unnormalised
        logits carry an offset per variable that means nothing (DIFF 1)."""
        logits = self.model.rssm.priors(state.deter).unflatten(-1, (self.args.stoch, self.args.classes))  # (N, M, S, K)
        return logits.log_softmax(-1).std(0, correction=0).mean((-2, -1))

    def imagine(self, state: State) -> tuple[list[State], list[TruncatedNormal], list[Tensor]]:
        """The actor's rollout from states (M, ...)  ->  H + 1 states (M, ...), policies, and actions (M, A).

        index      0            1        ...  H-1       H
        state      of the data  imagined ...  imagined  imagined
        action     ~ pi(sg feat)         ...            ~ pi      the last one is valued and not taken"""
        states, policies, actions = [state], [], []
        for t in range(self.args.horizon + 1):
            policies.append(self.actor(states[t].feat.detach()))
            actions.append(policies[t].sample())
            if t < self.args.horizon:
                states.append(self.model.rssm.imagine(states[t], actions[t]))
        return states, policies, actions

    def actor_loss(self, start: State, batch: Sequences, worth: Tensor) -> tuple[Tensor, list[Tensor], Metrics]:
        """Eq. 6 and the imitation term. start: states (B, T, ...) of the windows, without gradient; worth (B, T).
        Returns loss (); the rollout without gradient, for the critics; metrics.

        index      0       1    ...  H-1    H
        feat       data    imagined  ...    imagined
        reward     -       r^1  ...  r^H-1  r^H       penalised, on arrival; under --value dreamer r^0 .. r^H-1
        V0         min_i Q_i(feat, action)  ...
        loss       Vhat^0  ...       Vhat^H-1         the first one: the actor's action in a state of the data"""
        args = self.args
        states, policies, actions = self.imagine(State(*(part.flatten(0, 1) for part in start)))
        feat, action = torch.stack([state.feat for state in states]), torch.stack(actions)
        rewarded = states[1:] if args.value == "expansion" else states[:-1]  # dreamer: r^0 .. r^H-1
        penalty = torch.stack([self.penalty(state) for state in rewarded])
        model_reward = self.model.reward(torch.stack([state.feat for state in rewarded])).squeeze(-1)
        reward = model_reward - args.penalty_coef * penalty
        entropy = torch.stack([policy.entropy() for policy in policies[:-1]])
        assert reward.shape == entropy.shape == (args.horizon, action.shape[1])
        if args.value == "expansion":
            _, hat = expand_values(reward, self.critic(feat, action).amin(0), args.gamma, args.td_lambda)
            loss = -(hat + args.actor_ent * entropy).mean()
        else:  # the actor cannot change state 0; entropy^0 goes with state 1
            hat = expand_values(reward, self.critic_target(feat, action)[0], args.gamma, args.td_lambda)[0]  # V
            weight = args.gamma ** torch.arange(args.horizon - 1, device=feat.device)[:, None]
            loss = -(weight * (hat[1:] + args.actor_ent * entropy[:-1])).mean()
        # row       t          t+1          arrival rows: the action that was taken in feat[t] lies in the next row
        # feat      feat[t]
        # action               action[t+1]
        # worth                worth[t+1]   of the whole episode
        log_prob = truncated_log_prob(self.actor(start.feat[:, :-1]), batch.action[:, 1:])
        assert log_prob.shape == worth[:, 1:].shape  # (B, T - 1)
        imitation = -(worth[:, 1:] * log_prob).mean()  # DIFF 5
        metrics = {"actor/loss": loss, "actor/entropy": entropy.mean(), "bc/loss": imitation}
        metrics |= {"bc/kept": worth[:, 1:].mean(), "imag/value": hat.mean(), "imag/reward": model_reward.mean()}
        metrics |= {"imag/penalty": penalty.mean(), "imag/penalty_std": penalty.std(correction=0)}
        rollout = [part.detach() for part in (feat, action, reward)]
        return loss + args.bc_coef * imitation, rollout, {name: value.detach() for name, value in metrics.items()}

    def critic_loss(self, rollout: list[Tensor], batch: Sequences) -> tuple[Tensor, Metrics]:
        """Eq. 9: Eq. 7 on the rollout, feat (H + 1, M, F), action (H + 1, M, A), reward (H, M), and Eq. 8 on the data,
        whose states are the rollout's first."""
        args, (feat, action, reward) = self.args, rollout
        with torch.no_grad():
            v0_bar = self.critic_target(feat, action).amin(0)  # (H + 1, M)
            model_target, _ = expand_values(reward, v0_bar, args.gamma, args.td_lambda)
        q = self.critic(feat[:-1], action[:-1])
        assert q.shape[1:] == model_target.shape  # (2, H, M), (H, M)
        if args.value == "dreamer":
            weight = args.gamma ** torch.arange(args.horizon, device=feat.device)[:, None]
            loss = (weight * 0.5 * (q[0] - model_target).square()).mean()
            return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean()}
        model_loss = (model_target - q).square().mean((1, 2)).sum()  # Eq. 7; the sum: over the two critics
        # row       j          j+1                                          arrival rows
        # state     feat[j]    feat[j+1]
        # data                 action[j+1], reward[j+1], discount[j+1]
        # value                V0bar of the actor's own action in feat[j+1] (DIFF 2)
        shape = batch.reward.shape  # (B, T)
        next_value = v0_bar[0].unflatten(0, shape)[:, 1:]
        data_target = batch.reward[:, 1:] + args.gamma * batch.discount[:, 1:] * next_value
        q_data = self.critic(feat[0].unflatten(0, shape)[:, :-1], batch.action[:, 1:])
        assert q_data.shape[1:] == data_target.shape
        data_loss = (data_target - q_data).square().mean((1, 2)).sum()
        metrics = {"loss": model_loss + data_loss, "model_loss": model_loss, "data_loss": data_loss}
        metrics |= {"q": q.mean(), "q_data": q_data.mean()}
        return metrics["loss"], {f"critic/{name}": value.detach() for name, value in metrics.items()}

    def update(self, batch: Sequences, worth: Tensor | None) -> Metrics:
        """One gradient step of model, actor and critics, from one batch (DIFF 3). worth (B, T) of its rows; None:
        of the model alone (DIFF 9)."""
        with self.autocast():
            model_loss, states, metrics = self.model_loss(batch)
        metrics["model/grad_norm"] = self.minimize("model", model_loss)
        if worth is None:
            return metrics
        with self.autocast():
            actor_loss, rollout, actor_metrics = self.actor_loss(states, batch, worth)
        metrics["actor/grad_norm"] = self.minimize("actor", actor_loss)
        with self.autocast():
            critic_loss, critic_metrics = self.critic_loss(rollout, batch)
        metrics["critic/grad_norm"] = self.minimize("critic", critic_loss)
        return metrics | actor_metrics | critic_metrics

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
    def act(self, obs: Tensor, action: Tensor, state: State | None, draw: bool = False) -> tuple[Tensor, State]:
        """The actor's mode, or a draw, and the filter's next state. obs (B, 3, 64, 64) uint8, arrived at by action
        (B, A); state: what the last call returned, None at an episode's first image."""
        first = torch.full((len(obs), 1), state is None, device=obs.device)
        states, _ = self.model.rssm.observe(self.model.embed(obs)[:, None], action[:, None], first, state)
        state = State(*(part[:, 0] for part in states))
        policy = self.actor(state.feat)
        return policy.sample() if draw else policy.loc, state

    def get_extra_state(self) -> dict:
        """What torch adds to state_dict(): the optimisers. What else an update changes belongs here, for resume."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def set_extra_state(self, state: dict) -> None:
        for name, optimizer_state in state.items():
            self.optimizers[name].load_state_dict(optimizer_state)


def normal_nll(mean: Tensor, x: Tensor) -> Tensor:
    """-log N(x; mean, 1), the sum over all elements."""
    return 0.5 * F.mse_loss(mean, x, reduction="sum") + 0.5 * math.log(2 * math.pi) * x.numel()


# ==== Online ====


class OnlineBuffer(common.SequenceBuffer):
    """The set's windows and those of own episodes: at most `capacity` rows, in memory-mapped arrays, see open()."""

    def __init__(self, dataset: common.Dataset, args: Args, capacity: int):
        super().__init__(dataset, args.batch_size, args.window, args.seed, args.device, args.buffer_device)
        self.set_rows, self.capacity = len(self.reward), capacity
        self.own_rows, self.maps = [], {}  # how many rows each own episode has; name -> array
        for name in ("action", "reward", "discount", "is_first"):
            column = getattr(self, name)
            setattr(self, name, torch.cat([column, column.new_zeros(capacity, *column.shape[1:])]))

    def open(self, folder: Path) -> None:
        """Takes the space of all episodes on the disk; reads in those that a checkpoint counts. Raises UserError."""
        folder.mkdir(exist_ok=True)
        shapes = {"image": (3, SIZE, SIZE), "action": (self.action_dim,), "reward": (), "discount": ()}
        for name, shape in shapes.items():
            file = folder / f"{name}.npy"
            try:
                if not self.own_rows:
                    np.lib.format.open_memmap(file, "w+", common.ARRAYS[name], (self.capacity, *shape))
                    if hasattr(os, "posix_fallocate"):  # macOS has none; a full disk would be a bus error later
                        with open(file, "r+b") as handle:
                            os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)
            except OSError as error:
                raise UserError(f"{file}: no room for {self.capacity:,} rows of episodes ({error.strerror})") from None
            self.maps[name] = np.load(file, mmap_mode="r+")
        self.images.append(torch.from_numpy(self.maps["image"]).to(self.images[0].device))  # the map itself on a CPU
        for episode in range(len(self.own_rows)):
            self.take_in(episode)

    def add(self, images: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminal: bool) -> None:
        """One episode: images (T+1, 3, S, S) uint8, actions (T, A), rewards (T,); stored as arrival rows."""
        first, last = sum(self.own_rows), sum(self.own_rows) + len(actions)
        self.maps["image"][first : last + 1] = images
        for name, values in {"action": actions, "reward": rewards}.items():
            self.maps[name][first] = 0
            self.maps[name][first + 1 : last + 1] = values
        self.maps["discount"][first : last + 1] = [*[1] * len(actions), not terminal]
        self.own_rows.append(len(images))
        self.take_in(len(self.own_rows) - 1)

    def take_in(self, episode: int) -> None:
        """Makes windows of an episode of the files."""
        first, count = sum(self.own_rows[:episode]), self.own_rows[episode]
        ours = slice(self.set_rows + first, self.set_rows + first + count)
        for name in ("action", "reward", "discount"):
            getattr(self, name)[ours] = torch.from_numpy(self.maps[name][first : first + count])
        self.is_first[ours.start] = True
        if self.on_gpu:
            self.images[-1][first : first + count] = torch.from_numpy(self.maps["image"][first : first + count])
        self.set_lengths(torch.cat([self.lengths, torch.tensor([count])]))

    def state_dict(self) -> dict:
        return super().state_dict() | {"online": self.own_rows}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.own_rows = list(state["online"])


def worth_imitating(buffer: OnlineBuffer, args: Args) -> Tensor:
    """1 or 0 for each row of the buffer, by its episode; 0 where no episode is yet. -> (rows,) float32.

    success: the episode has a step of at least --bc-success-reward. return: its return is above the quantile of all
    episodes' returns, or equal to the highest. all: every episode."""
    count, worth = int(buffer.lengths.sum()), torch.zeros_like(buffer.reward)
    episodes = buffer.reward[:count].cpu().split(buffer.lengths.tolist())
    highest, returns = (torch.stack([of(episode) for episode in episodes]) for of in (torch.max, torch.sum))
    good = torch.ones(len(episodes), dtype=torch.bool)
    if args.bc_filter == "success":
        good = highest >= args.bc_success_reward
    if args.bc_filter == "return":
        good = (returns > returns.quantile(args.bc_quantile)) | (returns == returns.max())
    worth[:count] = good.float().repeat_interleave(buffer.lengths).to(buffer.device)
    return worth


@torch.no_grad()
def play(agent: Agent, pool: EnvPool, args: Args, seeds, draw: bool = False) -> tuple[np.ndarray, ...]:
    """Episodes of the actor on filtered states. Returns images (T+1, B, 3, S, S), actions (T, B, A), rewards (T, B),
    terminal (B,)."""
    agent.eval()
    obs, state, action = pool.reset(seeds), None, np.zeros((pool.count, agent.action_dim), np.float32)
    images, actions, rewards, terminal = [obs], [], [], np.zeros(pool.count, bool)
    while not pool.done.all():
        chosen, state = agent.act(*(torch.from_numpy(x).to(args.device) for x in (obs, action)), state, draw)
        action = chosen.cpu().numpy()
        if not np.isfinite(action).all():
            raise UserError("an action of the actor is not finite; the checkpoint is kept")
        obs, reward, ended = pool.step(action)
        terminal |= ended
        for found, array in ((images, obs), (actions, action), (rewards, reward)):
            found.append(array)
    agent.train()
    return np.stack(images), np.stack(actions), np.stack(rewards), terminal


# ==== Evaluation ====


def evaluate(agent: Agent, pool: EnvPool, args: Args) -> tuple[dict, list[np.ndarray]]:
    """The actor's mode, with the same episodes and draws every time (DIFF 6). Returns scores, frames of one."""
    devices = [torch.cuda.current_device()] if args.device == "cuda" else []
    with torch.random.fork_rng(devices):  # how often one evaluates does not change the training's draws
        torch.manual_seed(common.EVAL_SEED)
        images, _, rewards, _ = play(agent, pool, args, common.EVAL_SEED + np.arange(pool.count))
    return pool.summary(rewards.sum(0)), list(images[:, 0])


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
    if args.offline_from:
        args.offline_steps = args.model_first = 0
    if args.offline_steps is None:
        args.offline_steps = dataset.num_transitions  # DIFF 8
    if args.model_first > args.offline_steps:
        raise UserError(f"--model-first {args.model_first}: at most --offline-steps, {args.offline_steps}")
    run = common.Run(args, dataset)  # its folder and lock; seeds torch
    pool = common.evaluation_pool(args, dataset.facts(), 1)
    rows, repeat = 0, 1
    if args.online_episodes:
        episode_pool = common.EnvPool(dataset.task, SIZE, 1, 1, dataset.render)  # plain, whatever the set's look
        repeat, length = episode_pool.spec["action_repeat"], episode_pool.spec["episode_steps"] + 1
        if length < args.window:
            raise UserError(f"--window {args.window}: online episodes have {length} rows, none would be drawn")
        rows = args.online_episodes * length
    agent = Agent(args, dataset.action_dim).to(args.device)
    common.accelerate(agent, args)
    if args.offline_from and not run.resumes:
        agent.load_state_dict(common.read(f"{args.offline_from}/offline.pt"))
    buffer = OnlineBuffer(dataset, args, rows)
    step = run.begin(agent=agent, buffer=buffer)  # 0, or where the checkpoint was written
    if args.online_episodes:
        buffer.open(run.path / "online")
    worth = worth_imitating(buffer, args)

    def played() -> dict[str, int]:  # own episodes so far, and the simulation steps in them
        return {"episodes": len(buffer.own_rows), "env_steps": repeat * (sum(buffer.own_rows) - len(buffer.own_rows))}

    if args.offline_from and step == 0 and pool:  # where the curve begins
        run.log("eval", step, evaluate(agent, pool, args)[0] | played())
    while step < args.steps:
        phase = "model" if step < args.model_first else "offline" if step < args.offline_steps else "online"
        if phase == "online" and (step - args.offline_steps) % args.updates_per_episode == 0:
            seed = (ONLINE_SEED + 100_000 * args.seed + len(buffer.own_rows)) % 2**32
            images, actions, rewards, terminal = play(agent, episode_pool, args, [seed], draw=True)
            buffer.add(images[:, 0], actions[:, 0], rewards[:, 0], terminal[0])
            run.log("episodes", step + 1, episode_pool.summary(rewards.sum(0)) | played())
            worth = worth_imitating(buffer, args)
        batch = buffer.sample()
        metrics = agent.update(batch, None if phase == "model" else worth[batch.row])
        step += 1
        if step % args.target_every == 0:
            agent.critic_target.load_state_dict(agent.critic.state_dict())
        run.advance(step)
        if run.log_due or step == args.offline_steps:
            run.log(phase, step, {name: value.item() for name, value in metrics.items()})  # the only .item()
        if step == args.offline_steps:  # for another run's --offline-from, optimisers included
            common.write_atomically(run.path / "offline.pt", agent.state_dict())
        if pool and phase != "model" and (run.eval_due or step == args.offline_steps):
            metrics, frames = evaluate(agent, pool, args)
            run.log("eval", step, metrics | (played() if args.online_episodes else {}))
            if step == args.steps:
                common.save_video(run.path / "evaluation.mp4", frames)
        if run.checkpoint_due:
            run.save_checkpoint(step, agent=agent, buffer=buffer)


if __name__ == "__main__":
    main(common.parse_args(Args, TUNED, QUICK))
