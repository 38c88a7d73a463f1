"""Offline DreamerV2 (arXiv:2206.04779): DreamerV2's world model (2010.02193), trained on the data and then frozen; an
actor and a critic trained inside it on the reward minus the disagreement of an ensemble of priors.

    model   deter_t = GRU(deter_{t-1}, stoch_{t-1}, action_t);  stoch_t: 32 categoricals, feat_t = (stoch_t, deter_t)
            post_t = q(. | deter_t, image_t);  prior_t = p_k(. | deter_t), k drawn from 1..N once per time step
            L = -log p(image | feat) - log p(reward | feat) + (1 - kl_balance) max(KL(post || sg prior), free_nats)
                + kl_balance max(KL(sg post || prior), free_nats),  each KL a mean over batch and time
    penalty u(deter) = mean_k |P_k - mean_j P_j|  (Frobenius), P_k the class probabilities of prior k
    agent   from every state of the windows H steps under the actor, r~ = reward - penalty_coef * u
            target_t = r~_t + gamma ((1 - td_lambda) v(feat_{t+1}) + td_lambda target_{t+1}),  target_H = v(feat_H)
            L_pi = -mean_{1 <= t < H} gamma^{t-1} (target_t + actor_ent * entropy_{t-1}), through the dynamics
            L_v  = mean_{t < H} gamma^t 0.5 (v(feat_t) - target_t)^2

Dims: B windows, T rows of a window, M = B T states, H horizon, A action, E embedding, S stoch, K classes, D deter,
F = S K + D feat, N ensemble.
Differs from the released code (marked DIFF n where it happens; docs/offline_dv2.md has the reasons):
  DIFF 1: 800 and 2,400 epochs (Table 7) of any set; theirs 25,100 and 200,000 updates, and a joint one before them.
  DIFF 2: penalty_coef 10, 3 for random sets, 8 for walker-walk mixed, in the paper's range of 3 to 10; theirs 5.
  DIFF 3: the critic's target starts as its copy; theirs is another network until the first update is over.
  DIFF 4: the encoder is frozen and deterministic in the second phase, so the set is embedded once: the same numbers.
  DIFF 5: --precision auto is bf16 autocast where the hardware has it; theirs float16 with a scaled loss.
  DIFF 6: an evaluation is ten seeded episodes, the last one of the final weights; theirs is one, unseeded.
  DIFF 7: AdamW adds eps to the corrected root of the second moment; theirs to the raw one: its first steps are shorter.
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
    model_steps: Whole | None = None  # gradient updates of the world model; None: 800 epochs (Table 7; DIFF 1)
    agent_steps: Whole | None = None  # gradient updates of the agent; None: 2,400 epochs (Table 7; DIFF 1)
    batch_size: Count = 64  # windows (Table 7)
    window: Count = 50  # rows per window (Table 7)
    model_lr: Rate = 3e-4  # Adam
    actor_lr: Rate = 8e-5
    critic_lr: Rate = 8e-5
    cnn_depth: Count = 48  # channels of the first convolution, doubled by each of the next three
    stoch: Count = 32  # categorical variables
    classes: Count = 32  # of each
    deter: Count = 200  # width of the recurrent state
    hidden: Count = 200  # width of the layers beside it
    ensemble: Count = 7  # priors (Table 7)
    units: Count = 400  # width of the four layers of reward head, actor and critic
    kl_balance: Share = 0.8  # share of the KL's gradient that trains the prior
    free_nats: Weight = 1.0  # below it the mean KL has no gradient
    penalty_coef: Weight = 10.0  # lambda of Eq. 1; 0: no penalty (DIFF 2)
    horizon: Annotated[int, (2, math.inf)] = 5  # imagined steps (Table 7)
    gamma: Share = 0.99  # discount per control step
    td_lambda: Share = 0.95  # of the lambda-return
    actor_ent: Weight = 1e-4  # weight of the actor's entropy
    target_every: Count = 100  # agent updates between hard copies of the critic into its target
    eval_every: Whole | None = None  # updates of the second phase; None: a twentieth of the run; 0: no environment
    eval_episodes: Count = 10  # per evaluation
    log_every: Count = 100  # gradient updates
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast where the hardware has it (DIFF 5)
    accelerate: Literal["eager", "compile"] = "eager"  # compile: the losses under torch.compile
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"  # where the frames are; auto: on the GPU if they fit

    @property
    def steps(self) -> int:
        """Gradient updates of both phases: one counter runs over both."""
        return self.model_steps + self.agent_steps


TUNED = {("*", "random"): {"penalty_coef": 3.0}, ("walker-walk", "mixed"): {"penalty_coef": 8.0}}  # DIFF 2
# A setting of its own: a small model and a critic that learn fast (1e-3). The penalty's weight goes with the rewards:
# on random sets a step pays 0.015, and the disagreement is about 0.12.
QUICK = {("*", "*"): {
    "transitions": 40_000, "batch_size": 16, "window": 25, "model_steps": 4_000, "agent_steps": 800,
    "eval_every": 100, "cnn_depth": 8, "stoch": 16, "classes": 16, "ensemble": 5, "units": 200, "model_lr": 1e-3,
    "actor_lr": 1e-4, "critic_lr": 1e-3, "target_every": 10, "horizon": 12, "penalty_coef": 1.0,
}, ("*", "random"): {"penalty_coef": 0.05}}  # fmt: skip

SIZE = 64  # pixels per side: what the decoder's kernels give
MAX_GRAD_NORM = 100.0


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


class Actor(nn.Module):
    """feat (..., F)  ->  a truncated normal over actions; its mode is loc."""

    def __init__(self, feat_dim: int, action_dim: int, units: int):
        super().__init__()
        self.hidden = hidden_layers(feat_dim, units, 4)
        self.loc, self.scale = LastLayer(units, action_dim), LastLayer(units, action_dim)

    def forward(self, feat: Tensor) -> TruncatedNormal:
        x = self.hidden(feat)
        return TruncatedNormal(torch.tanh(self.loc(x)), 2 * torch.sigmoid(self.scale(x) / 2) + 0.1)  # 0.1 .. 2.1


# ==== Penalty ====


class Disagreement(torch.autograd.Function):
    """logits (N, M, S, K)  ->  mean over N of |P - mean over N of P|, (M,), P the class probabilities; the norm over
    variables and classes together. Where a norm is 0 its gradient is 0, not NaN.

    Gradient by P_k: (d_k / |d_k| - mean_j d_j / |d_j|) / N with d_k = P_k - mean P. Written out, and member by member,
    since a third of the time of every agent update is spent here."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        probs = logits.softmax(-1)
        mean = probs.mean(0)
        norm = torch.stack([torch.linalg.vector_norm(p - mean, dim=(-2, -1)) for p in probs])
        ctx.save_for_backward(probs, norm)
        return norm.mean(0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        probs, norm = ctx.saved_tensors
        scale = (gradient / (len(probs) * norm.clamp_min(1e-12)))[..., None, None]
        mean, out = probs.mean(0), torch.empty_like(probs)
        for p, s, to_p in zip(probs, scale, out):
            torch.sub(p, mean, out=to_p).mul_(s)
        to_mean = out.mean(0)
        for p, to_p in zip(probs, out):
            to_p.sub_(to_mean).mul_(p)
            to_p.sub_(p * to_p.sum(-1, keepdim=True))  # through the softmax
        return out


# ==== Agent ====


def scale_pixels(obs: Tensor) -> Tensor:
    """(B, C, S, S) uint8 in 0..255 -> float32 in [-0.5, 0.5], in memory as the convolutions read it."""
    assert obs.dtype == torch.uint8  # floats would be scaled in place, perhaps twice
    return obs.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(0.5)


def categorical_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of S independent categoricals, nats. Logits (..., S, K) float32  ->  (...)."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum((-2, -1))


def categorical_entropy(logits: Tensor) -> Tensor:
    """Of S independent categoricals, nats. (..., S, K)  ->  (...)."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum((-2, -1))


def lambda_return(reward: Tensor, next_value: Tensor, gamma: float, td_lambda: float) -> Tensor:
    """reward (H, M) of states 0 .. H-1, next_value (H, M) of states 1 .. H  ->  target (H, M) of states 0 .. H-1.

    target_t = reward_t + gamma ((1 - td_lambda) value_{t+1} + td_lambda target_{t+1}), target_H = value_H
    A state's target, hence its value, includes its own reward."""
    target, found = next_value[-1], []
    for t in reversed(range(len(reward))):
        target = reward[t] + gamma * ((1 - td_lambda) * next_value[t] + td_lambda * target)
        found.append(target)
    return torch.stack(found[::-1])


class Agent(nn.Module):
    """World model, actor, critic and its target."""

    LOSSES = ("model_loss", "actor_loss", "critic_loss")  # what --accelerate compile compiles

    def __init__(self, args: Args, action_dim: int):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.model = WorldModel(args, action_dim)
        self.actor = Actor(self.model.feat_dim, action_dim, args.units)
        self.critic, self.critic_target = (mlp(self.model.feat_dim, args.units, 1) for _ in range(2))
        self.apply(init_weights)
        self.model.to(memory_format=torch.channels_last)  # faster convolutions, same numbers up to rounding
        self.critic_target.load_state_dict(self.critic.state_dict())  # DIFF 3
        self.critic_target.requires_grad_(False)
        rates = {"model": args.model_lr, "actor": args.actor_lr, "critic": args.critic_lr}
        self.optimizers = {
            # DIFF 7; the decay is 1e-6 a step, whatever the rate
            name: torch.optim.AdamW(getattr(self, name).parameters(), lr, eps=1e-5, weight_decay=1e-6 / lr, fused=True)
            for name, lr in rates.items()
        }

    def autocast(self):
        return torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.precision == "bf16")

    # ---- first phase ----

    def model_loss(self, batch: Sequences) -> tuple[Tensor, Metrics]:
        """Negative evidence bound of windows, see the head of this file."""
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
        metrics |= {
            "post_entropy": categorical_entropy(post).mean(),
            "prior_entropy": categorical_entropy(prior).mean(),
        }
        return loss, {f"model/{name}": value.detach() for name, value in metrics.items()}

    def update_model(self, batch: Sequences) -> Metrics:
        """One gradient step of the world model."""
        with self.autocast():
            loss, metrics = self.model_loss(batch)
        return metrics | {"model/grad_norm": self.minimize("model", loss)}

    # ---- second phase: the model is frozen ----

    @torch.no_grad()
    def embed_set(self, buffer: common.SequenceBuffer, rows: int = 1024) -> Tensor:
        """Embeddings of every row of the set, in the encoder's output precision. -> (rows of the set, E) (DIFF 4)."""
        out = None
        with self.autocast():
            for index in torch.arange(len(buffer.reward), device=buffer.images[0].device).split(rows):
                embed = self.model.embed(buffer.frames(index))
                out = embed.new_empty(len(buffer.reward), embed.shape[-1]) if out is None else out
                out[index.to(out.device)] = embed
        return out

    def imagine(self, state: State) -> tuple[list[State], list[TruncatedNormal]]:
        """The actor's rollout from states (M, ...)  ->  H + 1 states (M, ...), H policies.

        index      0            1        ...  H-1       H
        state      of the data  imagined ...  imagined  imagined
        policy     pi(sg feat)  pi       ...  pi        -         its draw leads to the next state: the gradient reaches
                                                                  it through the dynamics, not through its own input"""
        states, policies = [state], []
        for _ in range(self.args.horizon):
            policies.append(self.actor(states[-1].feat.detach()))
            states.append(self.model.rssm.imagine(states[-1], policies[-1].sample()))
        return states, policies

    def penalty(self, state: State) -> Tensor:
        """Disagreement of the priors on arriving at a state. (M, ...)  ->  (M,)."""
        logits = self.model.rssm.priors(state.deter)  # (N, M, S K)
        return Disagreement.apply(logits.unflatten(-1, (self.args.stoch, self.args.classes)))

    def actor_loss(self, start: State) -> tuple[Tensor, Tensor, Tensor, Metrics]:
        """Lambda-returns of imagined rollouts. start: states (M, ...) of the data, without gradient.
        Returns loss (); feat and target (H, M, ...) of states 0 .. H-1, without gradient, for the critic; metrics.

        index      0      1      ...  H-2          H-1    H
        reward     r~     r~     ...  r~           r~     -     penalised, on arrival
        value      -      v      ...  v            v      v     of the target critic
        target     T_0    T_1    ...  T_H-2        T_H-1  -     T_0: the actor had no part in that state
        weight     -      1      ...  gamma^(H-3)  gamma^(H-2)
        loss       -      T_1    ...  T_H-2        T_H-1  -     each plus actor_ent * the entropy one index earlier"""
        args = self.args
        states, policies = self.imagine(start)
        feat, next_feat = (torch.stack([state.feat for state in some]) for some in (states[:-1], states[1:]))
        reward = self.model.reward(feat).squeeze(-1)
        penalty = torch.stack([self.penalty(state) for state in states[:-1]])
        value = self.critic_target(next_feat).squeeze(-1)
        penalised = reward - args.penalty_coef * penalty
        assert penalised.shape == value.shape == (args.horizon, len(start.deter))
        target = lambda_return(penalised, value, args.gamma, args.td_lambda)
        entropy = torch.stack([policy.entropy() for policy in policies[:-1]])
        weight = args.gamma ** torch.arange(args.horizon - 1, device=feat.device)[:, None]
        loss = -(weight * (target[1:] + args.actor_ent * entropy)).mean()
        metrics = {
            "actor/loss": loss, "actor/entropy": entropy.mean(), "imag/reward": reward[1:].mean(),
            "imag/penalty": penalty[1:].mean(), "imag/penalty_std": penalty[1:].std(correction=0),
            "imag/target": target.mean(), "data/reward": reward[0].mean(), "data/penalty": penalty[0].mean(),
        }  # fmt: skip
        return loss, feat.detach(), target.detach(), {name: value.detach() for name, value in metrics.items()}

    def critic_loss(self, feat: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
        """Regression on the lambda-returns of states 0 .. H-1, weighted 1, gamma, gamma^2 ..."""
        value = self.critic(feat).squeeze(-1)
        assert value.shape == target.shape  # (H, M)
        weight = self.args.gamma ** torch.arange(len(target), device=feat.device)[:, None]
        loss = (weight * 0.5 * (value - target).square()).mean()
        return loss, {"critic/loss": loss.detach(), "critic/value": value.detach().mean()}

    def update_agent(self, batch: Sequences, embed: Tensor) -> Metrics:
        """One gradient step of actor and critic. embed (B, T, E) of the batch's rows."""
        with self.autocast():
            with torch.no_grad():
                states, _ = self.model.rssm.observe(embed, batch.action, batch.is_first)
                start = State(*(part.flatten(0, 1) for part in states))  # M = B T: every state is a start
            actor_loss, feat, target, actor_metrics = self.actor_loss(start)
        actor_norm = self.minimize("actor", actor_loss)
        with self.autocast():
            critic_loss, critic_metrics = self.critic_loss(feat, target)
        critic_norm = self.minimize("critic", critic_loss)
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
        """The actor's mode, and the filter's next state. obs (B, 3, 64, 64) uint8, arrived at by action (B, A); state:
        what the last call returned, None at an episode's first image."""
        first = torch.full((len(obs), 1), state is None, device=obs.device)
        embed = self.model.embed(obs)[:, None]
        states, _ = self.model.rssm.observe(embed, action[:, None], first, state)
        state = State(*(part[:, 0] for part in states))
        return self.actor(state.feat).loc, state

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


# ==== Evaluation ====


def evaluate(agent: Agent, pool: EnvPool, args: Args) -> tuple[dict, list[np.ndarray]]:
    """The actor's mode on filtered states, the same episodes and the same posterior draws every time. Returns score and
    every return, frames of the first episode."""
    agent.eval()
    obs, returns, frames = pool.reset(common.EVAL_SEED + np.arange(pool.count)), np.zeros(pool.count), []  # DIFF 6
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
    epoch = dataset.num_transitions / (args.batch_size * args.window)  # updates that draw as many rows as the set has
    if args.model_from:
        args.model_steps = 0
    if args.model_steps is None:
        args.model_steps = round(800 * epoch)  # DIFF 1
    if args.agent_steps is None:
        args.agent_steps = round(2400 * epoch)
    run = common.Run(args, dataset)  # its folder and lock; seeds torch
    pool = common.evaluation_pool(args, dataset.facts(), 1)
    buffer = common.SequenceBuffer(dataset, args.batch_size, args.window, args.seed, args.device, args.buffer_device)
    agent = Agent(args, buffer.action_dim).to(args.device)
    common.accelerate(agent, args)
    if args.model_from and not run.resumes:
        weights = common.read(f"{args.model_from}/weights.pt").items()
        agent.model.load_state_dict({k.removeprefix("model."): v for k, v in weights if k.startswith("model.")})
    step, embeds = run.begin(agent=agent, buffer=buffer), None  # 0, or where the checkpoint was written
    while step < args.steps:
        phase = "model" if step < args.model_steps else "agent"
        if phase == "model":
            metrics = agent.update_model(buffer.sample())
        else:
            if embeds is None:  # the second phase begins, or goes on in a new process
                embeds = agent.embed_set(buffer)
            batch = buffer.sample(images=False)
            metrics = agent.update_agent(batch, embeds[batch.row])
        step += 1
        if phase == "agent" and (step - args.model_steps) % args.target_every == 0:
            agent.critic_target.load_state_dict(agent.critic.state_dict())
        run.advance(step)
        if run.log_due:
            run.log(phase, step, {name: value.item() for name, value in metrics.items()})  # the only .item()
        if pool and phase == "agent" and run.eval_due:
            metrics, frames = evaluate(agent, pool, args)
            run.log("eval", step, metrics)
            if step == args.steps:
                common.save_video(run.path / "evaluation.mp4", frames)
        if run.checkpoint_due:
            run.save_checkpoint(step, agent=agent, buffer=buffer)


if __name__ == "__main__":
    main(common.parse_args(Args, TUNED, QUICK))
