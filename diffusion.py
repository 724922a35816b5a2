"""Diffusion: learn to separate images from noise, then turn pure noise into a digit, step by step.

    python diffusion.py --epochs 10
    # with seed 0: Frechet ratio 29 (real digits: 1; see README.md), in 10 minutes on two CPU cores

Ho, Jain and Abbeel 2020 (DDPM), arXiv:2006.11239. Differences from it: time is continuous, where
DDPM has 1000 steps, each with its own noise level; noise is added along an arc (a cosine, as in
Nichol and Dhariwal 2021, arXiv:2102.09672); the network predicts the velocity v (Salimans and Ho
2022, arXiv:2202.00512) and is shown the image that it predicted last (self-conditioning: Chen et
al. 2022, arXiv:2208.04202); a sampler between DDPM's and DDIM's (Song et al. 2020,
arXiv:2010.02502), with extrapolation; classifier-free guidance (Ho and Salimans 2022,
arXiv:2207.12598); a smaller U-Net (a network that halves the image and doubles it again, with a
direct connection from the first half to the second), with two resolutions, layer norms and no
attention; the matrices of its blocks trained by Muon, an optimizer explained in the train section.

Idea
  Mix an image with random noise, more and more, until nothing of the image is left. It is
  impossible to undo that at once: given pure noise, the best prediction of the image (with the
  smallest squared error) is the average of all digits, a grey blur. But a small step towards that
  prediction is safe: most of the noise remains, so an error can still be corrected. And the network
  can look again. The first prediction is the same blur for all noise. But mixed with this blur, one
  noise looks a little more like a 3, say, and another a little more like a 7. So the next
  prediction leans that way, and each step strengthens the choice. After 50 steps, the prediction
  has become a digit, and different noise has become different digits.
  Training needs no such steps. Mix an image with noise, in a random proportion, and let the network
  separate the two. It is plain regression, with nothing to balance: no opponent as in a GAN, no
  second loss term as in a VAE.
  The price: a sample takes 50 passes of the network (100 with labels), where a GAN needs one. And
  the loss is not a likelihood, so it does not say how probable an image is.

Maths
  Mixing. Time t runs from 0 (the image x0) to 1 (the noise eps: for each pixel, a number from N(0,
  1)):
      x_t = cos(a) x0 + sin(a) eps,   a = t pi / 2
  As cos^2 + sin^2 = 1, noise and image trade places without x_t growing: both have a mean square
  near 1. (DDPM and most tutorials write alpha_bar for cos(a)^2.) As the angle a rises, x_t moves on
  an arc from x0 to eps, with the velocity (per unit of angle)
      v = dx_t/da = cos(a) eps - sin(a) x0.
  So (x_t, v) is the pair (x0, eps), turned by the angle a. Turn it back:
      x0 = cos(a) x_t - sin(a) v,   eps = sin(a) x_t + cos(a) v.
  Learning.
      loss = E || v_net(x_t, t) - v ||^2 / 784,   the mean over the pixels, over x0, eps and t
  Many pairs of x0 and eps give the same x_t, each with a v of its own. The squared error is
  smallest if the network predicts the mean of these. So, at each t, it learns E[v | x_t]: the mean
  of these v, each weighted by the probability of its pair given x_t. By the two equations above,
  that also gives E[x0 | x_t] and E[eps | x_t]. (A network that predicts eps, like DDPM's, learns
  the same, except at t = 1, where eps is just x_t and says nothing of x0.) t = sqrt(u) with u
  uniform in [0, 1], so training favours large t, where the content of the image is decided.
  Self-conditioning. Each step of the sampler predicts x0, and the next step should only have to
  refine it. So the network has a second input, the x0 predicted last, or zeros if there is none. In
  training, half of the images get the x0 that a first pass, with zeros, predicts from the same x_t
  (The sampler has the one predicted a step earlier, from a slightly noisier x; with small steps the
  two are close.) So, strictly, v is learned given this input as well.
  The score. (Not needed below, but papers speak of it.) Given x0, x_t has the density N(cos(a) x0,
  sin(a)^2), and the gradient of its logarithm is -(x_t - cos(a) x0) / sin(a)^2 = -eps / sin(a).
  p(x_t) is the mean of these densities over x0. The gradient of p(x_t) is the mean of the gradients
  of these densities, each of which is the density times the gradient of its logarithm (grad p = p
  grad log p). Divided by p(x_t), that is a weighted mean, in which each x0 gets the weight p(x_t |
  x0) p(x0) / p(x_t) = p(x0 | x_t), so
      grad log p(x_t) = -E[eps | x_t] / sin(a).
  This is the score: the direction in which images with this much noise become more probable. To
  predict the noise is to know the score.
  Sampling. Start from noise at t = 1. A step from angle a to a smaller angle b splits x into the
  predicted x0 and eps, replaces part of eps with fresh noise, and mixes again, for angle b:
      x <- cos(b) x0 + sin(b) (keep eps + sqrt(1 - keep^2) noise),   keep = (tan(b) / tan(a))^fresh
  fresh = 0 is DDIM: the noise at the start decides the image, and small steps follow dx/da = E[v |
  x] (differentiate the formula with respect to b at b = a).
  Why does that end at digits? At time t, many arcs pass through a point x, with different
  velocities, of which E[v | x_t = x] is the mean. The density at x changes only by what flows in
  and out, and the flow is the density times this mean velocity. So if every point moves at that
  mean velocity instead, the flow is the same as that of the arcs, and so is the density at each t:
  noise at t = 1, hence images at t = 0.
  fresh = 1 is DDPM, which assumes that an image becomes noise by a little new noise at each step,
  not along one arc. The distribution at each t is the same, but x at angle b is not determined by
  x0 and x at angle a. If x0 were the true image, the step would draw x at b from its distribution
  given these two. (The share keep depends on tan, because tan(a) is the ratio of noise to image in
  x_t.) Replacing noise washes out errors of earlier steps, but needs more steps, and makes strokes
  a little thinner. The default of sample, fresh = 0.25, lies between. (Then the first step, where
  tan(a) is infinite, replaces all the noise. There is no harm in that, as x holds nothing of the
  image yet.)
  To need fewer steps, the code estimates x0 as it will be in the middle of the step, by
  extrapolating the last two predictions, and uses that and the eps that fits it (see move). The
  first step does not extrapolate, nor does a step to t = 0, which returns the prediction itself.
  Guidance. With --class-cond, an embedding of the label is added to that of t. In training, a label
  is replaced with probability 1/10 by "no label", which has an embedding of its own. Sampling
  follows v(no label) + guidance * (v(label) - v(no label)): 0 ignores the label, 1 is the model of
  images with that label, more than 1 exaggerates what the label adds (1.5 by default).

Shapes
  x (B, 1, 28, 28) in [0, 1] as given to loss(); x0 in [-1, 1], so that its mean square is near that
  of the noise, 1; x_t, v, eps (B, 1, 28, 28); t (B,) in [0, 1]; y (B,) in 0..9, or 10 for "no
  label". size: a multiple of 4, as the image is halved twice.

What to expect
  loss is the mean squared error of v per pixel. It falls to 0.15 in the first epoch and then slowly
  to 0.141. It stays far above 0, because x_t does not determine v. And a lower loss need not mean
  that a model draws better.
"""

import argparse
import csv
import inspect
import io
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------- model
class ResBlock(nn.Module):
    """x + conv(silu((1 + scale) norm(conv(silu(x))) + shift)), where emb sets scale and shift."""

    def __init__(self, channels, n_embd):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulate = nn.Linear(n_embd, 2 * channels)
        nn.init.zeros_(self.conv2.weight)  # at first the block adds no more than a bias

    def forward(self, x, emb):  # x (B, C, H, W), emb (B, n_embd)
        scale, shift = self.modulate(emb)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        h = self.conv1(F.silu(x)).permute(0, 2, 3, 1)  # (B, H, W, C), to normalise over C
        h = F.layer_norm(h, h.shape[-1:]).permute(0, 3, 1, 2)  # (B, C, H, W)
        return x + self.conv2(F.silu(torch.addcmul(shift, h, 1 + scale)))  # shift + h (1 + scale)


def slerp(a, b, n=10):
    """Spherical interpolation: n points on the arc from each a to its b, (B, ...) -> (B * n, D).

    Noise of D numbers has a norm of about sqrt(D); the arc keeps it, a straight line does not.
    """
    a = a.flatten(1)[:, None]  # (B, 1, D)
    b = b.flatten(1)[:, None]
    cosine = F.cosine_similarity(a, b, dim=2)[..., None]  # (B, 1, 1)
    angle = cosine.clamp(-1, 1).acos().clamp(min=1e-4)  # so that a = b gives a, not 0 / 0
    w = torch.linspace(0, 1, n, device=a.device)[:, None]  # (n, 1)
    arc = (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()  # (B, n, D)
    return arc.flatten(0, 1)


class Diffusion(nn.Module):
    """A U-Net v(x_t, t, y, x0_last) over two resolutions, and the noising that it undoes.

    channels: at 14 x 14, twice as many at 7 x 7; n_inner: residual blocks at 7 x 7; n_embd: numbers
    in the vector of time and label (an even number); size: pixels per side; n_classes: number of
    labels, or 0
    """

    def __init__(self, *, channels=32, n_inner=4, n_embd=128, size=28, n_classes=10):
        super().__init__()
        if channels < 1 or min(n_inner, n_classes) < 0:
            raise ValueError("channels must be at least 1, n_inner and n_classes at least 0")
        if n_embd < 2 or n_embd % 2 != 0:
            raise ValueError("n_embd must be even and at least 2")
        if size < 4 or size % 4 != 0:
            raise ValueError(f"size must be a multiple of 4, not {size}")
        self.size = size
        self.n_classes = n_classes
        self.register_buffer("freqs", torch.logspace(0, 3, n_embd // 2), persistent=False)
        self.time = nn.Sequential(nn.Linear(n_embd, n_embd), nn.SiLU(), nn.Linear(n_embd, n_embd))
        self.label = nn.Embedding(n_classes + 1, n_embd)  # the last entry is "no label"
        self.stem = nn.Conv2d(8, channels, 3, padding=1)  # 8: 2 x 2 pixels of x_t and of x0_last
        self.down = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self.inner = nn.ModuleList(ResBlock(2 * channels, n_embd) for _ in range(n_inner))
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.outer = ResBlock(channels, n_embd)
        self.head = nn.Conv2d(channels, 4, 3, padding=1)
        nn.init.zeros_(self.head.weight)  # start near v = 0

    def embed(self, x, y):
        """A vector for each label in y (B,), or for "no label" if y is None, with B = len(x)."""
        if y is None:
            y = torch.full((len(x),), self.n_classes, device=x.device)
        return self.label(y)

    def forward(self, x_t, t, y=None, x0_last=None):
        """x_t (B, 1, H, W), t (B,) in [0, 1] -> v like x_t.

        x0_last: an earlier prediction of x0, like x_t, or None if there is none
        """
        if x0_last is None:
            x0_last = torch.zeros_like(x_t)
        angles = t[:, None] * self.freqs  # (B, n_embd / 2): t as the hands of slow and fast clocks
        clocks = torch.cat([angles.cos(), angles.sin()], 1)  # (B, n_embd)
        emb = F.silu(self.time(clocks) + self.embed(x_t, y))
        both = torch.cat([x_t, x0_last], 1)  # (B, 2, 28, 28)
        skip = self.stem(F.pixel_unshuffle(both, 2))  # (B, 8, 14, 14) -> (B, C, 14, 14)
        h = self.down(skip)  # (B, 2 C, 7, 7)
        for block in self.inner:
            h = block(h, emb)
        h = self.outer(skip + self.up(h), emb)  # (B, C, 14, 14)
        return F.pixel_shuffle(self.head(h), 2).type_as(x_t)  # (B, 4, 14, 14) -> (B, 1, 28, 28)

    def diffuse(self, x0, t, eps):
        """x0, eps (B, 1, H, W), t (B,) -> x_t and its velocity v, both (B, 1, H, W)."""
        a = t[:, None, None, None] * math.pi / 2
        x_t = a.cos() * x0 + a.sin() * eps
        v = a.cos() * eps - a.sin() * x0
        return x_t, v

    def hidden_weights(self):
        """The weights that Muon trains: the matrices and kernels in the blocks."""
        blocks = [*self.inner, self.outer]
        return [weight for block in blocks for weight in block.parameters() if weight.ndim > 1]

    def loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> the mean squared error of v, metrics."""
        self.check(x, y)
        if y is not None and self.training:  # hide 1 label in 10, to learn p(x) as well
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.n_classes, y)
        # one random u in each of B equal slices of [0, 1]: less variance than B independent ones
        u = (torch.arange(len(x), device=x.device) + torch.rand(len(x), device=x.device)) / len(x)
        # P(t < s) = P(u < s^2) = s^2, so t has density 2 t, which favours the noisy end,
        # where it is decided what is drawn
        t = u.sqrt()
        x0 = 2 * x - 1
        x_t, v = self.diffuse(x0, t, torch.randn_like(x0))
        # Half of the images also see an x0 that the network predicts for them. t rises along the
        # batch, so the times of every second image still cover [0, 1]. (detach instead of
        # torch.no_grad: in older versions of torch, the second pass would reuse weights that
        # autocast has cached without gradients.)
        x0_last = torch.zeros_like(x0)
        a = t[::2, None, None, None] * math.pi / 2
        v_first = self(x_t[::2], t[::2], None if y is None else y[::2]).detach()
        x0_last[::2] = a.cos() * x_t[::2] - a.sin() * v_first
        loss = F.mse_loss(self(x_t, t, y, x0_last), v)
        return loss, {"loss": loss}

    def guided_v(self, x_t, t, y, guidance, x0_last):
        """-> v (B, 1, H, W) of x_t at time t, one number for the batch. With labels y (B,), it is
        v(no label) + guidance * (v(y) - v(no label))."""
        t = torch.full((len(x_t),), t, device=x_t.device, dtype=x_t.dtype)
        v = self(x_t, t, None, x0_last)
        if y is None:
            return v
        return v + guidance * (self(x_t, t, y, x0_last) - v)

    @torch.no_grad()
    def move(
        self, x, start, end, steps, y=None, guidance=1.5, fresh=0.0, self_cond=True, frames=None
    ):
        """Move x (B, 1, H, W) from time start to time end, in equal steps -> x at time end.

        A step splits x into x0 and eps, as the network predicts them, and mixes these again for the
        next time. One call of the network per step, two if labels y (B,) are given.

        fresh:  how much of eps each step replaces with fresh noise (the exponent of keep). 0: none,
                so the start determines the end (DDIM); 1: as in DDPM (both of which use x0, not
                x0_middle). Above 0 only if end < start
        self_cond: show the network the x0 that it predicted last. Without it, v depends on x, t and
                y alone, so that with fresh = 0 the steps can nearly be undone
        frames: a list, to which each step appends the new x and the x0 predicted from the old one
        """
        x0_last = None
        for i in range(steps):
            t = (start * (steps - i) + end * i) / steps
            t_next = (start * (steps - i - 1) + end * (i + 1)) / steps
            a = t * math.pi / 2
            b = t_next * math.pi / 2
            v = self.guided_v(x, t, y, guidance, x0_last if self_cond else None)
            x0 = math.cos(a) * x - math.sin(a) * v
            eps = math.sin(a) * x + math.cos(a) * v
            x0_middle = x0
            if x0_last is not None and t_next > 0:
                # x0 as it will be in the middle of the step, if it goes on changing as it did, and
                # the eps that belongs to it: x = cos(a) x0_middle + sin(a) eps. With fresh = 0, the
                # error then falls with the square of the step (second order).
                x0_middle = 1.5 * x0 - 0.5 * x0_last
                eps = (x - math.cos(a) * x0_middle) / math.sin(a)
            if fresh > 0:
                keep = (math.tan(b) / math.tan(a)) ** fresh  # in [0, 1]
                eps = keep * eps + math.sqrt(1 - keep**2) * torch.randn_like(eps)
            x = math.cos(b) * x0_middle + math.sin(b) * eps
            x0_last = x0
            if frames is not None:
                frames.append((x, x0))
        return x

    @torch.no_grad()
    def sample(self, n, y=None, steps=50, guidance=1.5, fresh=0.25):
        """Draw n images (n, 1, H, W) in [0, 1], in `steps` steps; y (n,) labels or None.

        guidance, fresh: see the methods guided_v and move
        """
        weight = self.label.weight  # for its device and dtype; any would do
        shape = (n, 1, self.size, self.size)
        noise = torch.randn(shape, device=weight.device, dtype=weight.dtype)
        x0 = self.move(noise, 1, 0, steps, y, guidance, fresh)
        return (x0.clamp(-1, 1) + 1) / 2

    @torch.no_grad()
    def pictures(self, x):
        """x (N, 1, H, W) images -> {name: pictures}:

        process        (25, N, 1, H, 2 W): noise becomes images, x_t left, predicted x0 right,
                       without fresh noise, whose flicker would distract
        interpolation  (10 N, 1, H, W): a row from each image to the next, by way of their noise
        """
        frames = []
        self.move(torch.randn_like(x), 1, 0, 25, frames=frames)
        process = torch.stack([torch.cat(pair, dim=-1) for pair in frames])
        # Backwards, from the images to their noise. At t = 0 there is no noise in x_t, and the best
        # prediction of eps is 0: the image would move towards no noise. So start with a little.
        start = 0.05
        x_t, _ = self.diffuse(2 * x - 1, x.new_full((len(x),), start), torch.randn_like(x))
        noise = self.move(x_t, start, 1, 50, self_cond=False)
        arcs = slerp(noise, noise.roll(-1, 0)).view(-1, *x.shape[1:])  # each image and the next
        interpolation = self.move(arcs, 1, 0, 50, self_cond=False)
        return {
            "process": (process.clamp(-1, 1) + 1) / 2,
            "interpolation": (interpolation.clamp(-1, 1) + 1) / 2,
        }

    checked = False  # becomes True once check has read the values of a batch

    def check(self, x, y):
        """Raise ValueError unless x (B, 1, size, size) lies in [0, 1] and y (B,) holds labels.

        Reading values means waiting for the GPU. So on a GPU, values are checked in the first batch
        only; shapes and types always.
        """
        shape = (len(x), 1, self.size, self.size)
        if len(x) == 0:
            raise ValueError("x holds no images")
        if x.shape != shape or not x.is_floating_point():
            raise ValueError(f"x must be {shape} float, not {tuple(x.shape)} {x.dtype}")
        if y is not None and (y.shape != x.shape[:1] or y.dtype != torch.int64):
            raise ValueError(f"y must be ({len(x)},) int64, not {tuple(y.shape)} {y.dtype}")
        if self.checked and x.device.type != "cpu":
            return
        if not (x.min() >= 0 and x.max() <= 1):  # NaN fails, too
            raise ValueError("x must lie in [0, 1]")
        if y is not None and not (y.min() >= 0 and y.max() <= self.n_classes):
            raise ValueError(f"y must lie in 0..{self.n_classes}, where the last means no label")
        self.checked = True


# ---------------------------------------------------------------- train
# This section is the same text in all ten scripts, except for these constants and, in gan.py,
# make_optimizers and train_step. Start reading at train_step.
NAME = "diffusion"  # of the folder in out/; saved in checkpoints, so that others are refused
Model = Diffusion
EPOCHS = 10
BATCH_SIZE = 64
LR = 5e-3


def learning_rate(step, total_steps, peak):
    """The rate at a step: it rises to the peak over the first 2 %, then falls linearly to 0.

    step: from 1 to total_steps; 0 would be reached at total_steps + 1
    """
    warmup = max(1, round(0.02 * total_steps))
    if step <= warmup:
        return peak * step / warmup
    return peak * (total_steps + 1 - step) / (total_steps + 1 - warmup)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for a network's hidden matrices (Jordan et al. 2024).

    The gradient of a matrix is dominated by a few singular directions. Plain momentum moves the
    weights along these, and hardly along the others; Muon moves them along all at about the same
    speed. The weight of a convolution (out, in, h, w) counts as the matrix (out, in h w).
    """

    def __init__(self, weights):
        # one group for all weights of a shape: a few large operations instead of many small ones
        groups_by_shape = {}
        for weight in weights:
            groups_by_shape.setdefault(weight.shape, []).append(weight)
        param_groups = [{"params": group} for group in groups_by_shape.values()]
        super().__init__(param_groups, defaults={"lr": 0.0})  # train_epoch sets the rate

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = group["params"]
            grads = torch.stack([weight.grad for weight in weights]).flatten(2)  # (K, M, N)
            state = self.state[weights[0]]  # the first weight keeps the state of its whole group
            if not state:
                state["mean"] = torch.zeros_like(grads)
            mean = state["mean"]
            mean.lerp_(grads, 0.05)  # mean <- 0.95 mean + 0.05 grads
            nesterov = grads.lerp(mean, 0.95)  # 0.95 mean + 0.05 grads again, with the new mean
            updates = orthogonalise(nesterov)
            for weight, update in zip(weights, updates):
                weight.sub_(update.reshape(weight.shape), alpha=group["lr"])


def orthogonalise(x):
    """Replace each matrix U S V^T (its singular value decomposition) in x (K, M, N) by about U V^T.

    The iteration X <- a X + b (X X^T) X + c (X X^T)^2 X keeps U and V, and turns each singular
    value s into a s + b s^3 + c s^5. With the a, b and c below, five steps turn any s between 0.002
    and 1 into one between 0.68 and 1.2, in far less time than computing U, S and V would take. The
    result is scaled to a root mean square of about 0.2, like AdamW's updates, so that one learning
    rate suits both (arXiv:2502.16982).
    """
    scale = 0.2 * max(x.shape[1:]) ** 0.5
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT  # so that X X^T is the smaller product
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # now no s is above 1
    a = 3.4445
    b = -4.7750
    c = 2.0315
    for _ in range(5):
        xxt = x @ x.mT
        x = a * x + (b * xxt + (c * xxt) @ xxt) @ x
    if is_tall:
        x = x.mT
    return scale * x


def make_optimizers(model):
    """Muon for the matrices that the model names, AdamW for all other weights.

    train_epoch sets their learning rates.
    """
    hidden = model.hidden_weights()
    hidden_ids = {id(weight) for weight in hidden}
    others = [weight for weight in model.parameters() if id(weight) not in hidden_ids]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    optimizers = [adamw]
    if hidden:
        optimizers.append(Muon(hidden))
    return optimizers


def train_step(model, optimizers, autocast, x, y):
    """Update the model once, on images x (B, 1, H, W) in [0, 1] and labels y (B,) or None.

    Returns the loss.
    """
    for optimizer in optimizers:
        optimizer.zero_grad()
    with autocast:
        loss, _ = model.loss(x, y)
    loss.backward()
    # If the norm of the gradient is above 1, scale it down to 1. In the scripts whose loss is a sum
    # over pixels, it is always far above. So all steps get the norm 1, and none dominates the
    # optimizers' averages.
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


@torch.no_grad()
def update_ema(ema, model, step):
    """Move the weights of ema, an exponential moving average, a little towards those of the model.

    Its half-life is 5 % of the steps so far: short at first, when the weights move fast, and
    longer later. step: counted from 1
    """
    half_life = 0.05 * step
    decay = 0.5 ** (1 / half_life)
    for average, weight in zip(ema.parameters(), model.parameters()):
        average.lerp_(weight, 1 - decay)  # decay * average + (1 - decay) * weight
    for average, buffer in zip(ema.buffers(), model.buffers()):
        average.copy_(buffer)


def train_epoch(epoch, args, model, ema, optimizers, images, labels):
    """Train for one epoch on uint8 images (N, 1, H, W), labels (N,) or None, in random order.

    Images left over after the last full batch are skipped. Returns the mean loss and the seconds
    taken.
    """
    set_seed(args.seed, epoch)  # the same order and noise, whether the run was resumed or not
    order = torch.randperm(len(images)).to(images.device)
    steps = len(images) // args.batch_size
    total_steps = args.epochs * steps
    autocast = bfloat16_autocast(args.device)
    is_terminal = os.isatty(1)  # 1 is standard output
    loss_sum = 0
    start = time.time()
    last_shown = start
    for i in range(steps):
        step = (epoch - 1) * steps + i + 1  # counted from the first epoch
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total_steps, args.lr)

        idx = order[i * args.batch_size : (i + 1) * args.batch_size]
        x = images[idx] / 255
        y = None if labels is None else labels[idx]
        loss = train_step(model, optimizers, autocast, x, y)
        update_ema(ema, model, step)
        loss_sum += loss

        # on a terminal, at most once a second, because reading the loss waits for the GPU
        if is_terminal and time.time() > last_shown + 1:
            loss_now = float(loss)
            last_shown = time.time()
            seconds_per_step = (last_shown - start) / (i + 1)
            speed = args.batch_size / seconds_per_step
            seconds_left = seconds_per_step * (total_steps - step)
            line = (
                f"step {step}/{total_steps} | loss {loss_now:.4g} | {speed:,.0f} img/s | "
                f"{seconds_left:.0f} s left"
            )
            print(f"{line:<79}", end="\r", flush=True)  # padded, to overwrite a longer line
    mean_loss = float(loss_sum) / steps  # float() waits for the GPU to finish
    return mean_loss, time.time() - start


def evaluate(loss_fn, images, autocast, batch_size=500):
    """Average each metric of loss_fn(x) over all uint8 images (N, 1, H, W) -> {name: mean}.

    loss_fn gets no labels, so that runs with and without labels can be compared. Each batch has a
    fixed seed, so that every call sees the same noise. There is no torch.no_grad() here, because
    the loss of gan.py computes a gradient; the weights of ema require no gradients, so no graph is
    kept for them.
    """
    means = {}
    for i, batch in enumerate(images.split(batch_size)):
        torch.manual_seed(i)
        with autocast:
            _, metrics = loss_fn(batch / 255)
        for name, value in metrics.items():
            means[name] = means.get(name, 0) + float(value) * len(batch) / len(images)
    return means


def draw_samples(model, n, args, chunk=500):
    """Draw n images (n, 1, H, W) in [0, 1], the same each time for the same seed and n.

    With --class-cond, the labels are 0, 1, 2, ... in turn.

    chunk: images drawn at a time, to limit memory
    """
    set_seed(args.seed)
    samples = []
    for start in range(0, n, chunk):
        idx = torch.arange(start, min(start + chunk, n), device=args.device)
        y = idx % model.n_classes if args.class_cond else None
        samples.append(model.sample(len(idx), y))
    return torch.cat(samples)


def set_seed(seed, epoch=0):
    """Seed torch for an epoch, counted from 1, or for what is outside training (epoch 0)."""
    # seeds do not share numbers, up to a million epochs; % keeps to torch's range
    torch.manual_seed((1_000_003 * seed + epoch) % 2**32)


def bfloat16_autocast(device):
    """A context in which convolutions and matrix products use bfloat16 if the hardware can."""
    supported = False
    if device == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # older versions lack it
        supported = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device, torch.bfloat16, enabled=supported)


def make_checkpoint(args, config, model, ema, optimizers, log):
    """Everything needed to draw samples (config and model) and to resume training."""
    settings = ("epochs", "batch_size", "lr", "seed", "dataset")
    return {
        "script": NAME,
        "config": config,
        "settings": {name: getattr(args, name) for name in settings},
        "model": ema.state_dict(),  # the averaged weights, which samples are drawn from
        "model_in_training": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "log": log,
    }


def save_checkpoint(checkpoint, path, new=False):
    """Write the file atomically, so that neither a kill nor a full disk leaves half of it.

    new: raise FileExistsError if there is one already
    """
    # first into memory: on a full disk, torch.save raises a RuntimeError, not an OSError
    data = io.BytesIO()
    torch.save(checkpoint, data)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data.getvalue())
        if new:
            path.touch(exist_ok=False)  # raises if the file exists; os.replace would overwrite it
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path, resume):
    """Load a dictionary made by make_checkpoint; to draw samples, config and model are enough."""
    needed = {"config", "model"}
    if resume:
        needed |= {"settings", "model_in_training", "optimizers", "log"}
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint.get("script", NAME) != NAME:
            raise ValueError(f"it was written by {checkpoint['script']}.py")
        missing = needed - checkpoint.keys()
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        model = Model(**checkpoint["config"])
        model.load_state_dict(checkpoint["model"])  # raises an error if they do not fit
        # a config made by hand may leave sizes to their defaults
        sizes = {**size_defaults(), "size": model.size, "n_classes": model.n_classes}
        checkpoint["config"] = {**sizes, **checkpoint["config"]}
    except Exception as error:  # a missing, damaged or foreign file can raise anything
        reason = " ".join(str(error).split())  # on one line
        if not reason:
            reason = type(error).__name__
        fail(f"cannot load {path}: {reason}")
    return checkpoint


def fail(message):
    """Exit with status 1 and one line on stderr."""
    sys.exit(f"{NAME}.py: error: {message}")


def to_flag(name):
    """n_layer -> --n-layer"""
    return "--" + name.replace("_", "-")


def size_defaults():
    """{name: default} of the model's sizes, except size and n_classes, which the data decide."""
    parameters = inspect.signature(Model).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("size", "n_classes")}


def make_parser():
    """Define the flags: first those that all ten scripts share, then the sizes of this model."""
    devices = ["cpu"]
    if torch.backends.mps.is_available():
        devices.append("mps")
    if torch.cuda.is_available():
        devices.append("cuda")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    datasets = ["MNIST", "FashionMNIST", "KMNIST"]

    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=f"Train {Model.__name__}, or draw samples from it."
    )
    add = parser.add_argument
    add("--epochs", type=int, default=EPOCHS, help="passes over the images (default %(default)s)")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images per step (default %(default)s)")
    add("--lr", type=float, default=LR, help="peak learning rate (default %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default %(default)s)")
    add("--device", choices=devices, default=device, help="device to run on (default %(default)s)")
    add("--dataset", choices=datasets, default="MNIST", help="(default %(default)s)")
    add("--data-dir", type=Path, help="folder of the data sets (default: data, beside common.py)")
    add("--out-dir", type=Path, default=Path("out", NAME), help="for output (default %(default)s)")
    add("--class-cond", action="store_true", help="learn labels; grids have one column per class")
    add("--compile", action="store_true", help="torch.compile: slow to start, may speed up steps")
    add("--dry-run", action="store_true", help="only two batches per epoch; overwrites OUT_DIR-dry")
    add("--tensorboard", action="store_true", help="also write TensorBoard logs into OUT_DIR")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continue the run in OUT_DIR")
    mode.add_argument("--sample", type=int, metavar="N", help="draw N images from that run")
    sizes = parser.add_argument_group("sizes of the model", Model.__doc__)
    for name, value in size_defaults().items():
        sizes.add_argument(
            to_flag(name), type=type(value), default=value, help=f"(default {value})"
        )
    return parser


def parse_args(argv):
    """Parse argv (None: the command line); returns the settings, and a checkpoint or None.

    --resume and --sample load the checkpoint of a run. The settings of that run become the
    defaults, and a flag that contradicts them is refused, except for the few that may differ.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "lr", "sample"):
        value = getattr(args, name)
        if value is None:  # no --sample
            continue
        if value <= 0 or not math.isfinite(value):
            parser.error(f"{to_flag(name)} must be positive and finite")
    out_dir = args.out_dir.expanduser()
    if args.dry_run:
        out_dir = Path(f"{out_dir}-dry")

    checkpoint = None
    if args.resume or args.sample:
        checkpoint = load_checkpoint(out_dir / "model.pt", args.resume)
        run_settings = {**checkpoint.get("settings", {}), **checkpoint["config"]}
        del run_settings["size"]
        n_classes = run_settings.pop("n_classes")
        run_settings["class_cond"] = n_classes > 0
        # Parse again with these as defaults: a value that still differs was given by a flag.
        parser.set_defaults(**run_settings)
        args = parser.parse_args(argv)
        may_differ = ["epochs", "lr"]
        if args.sample:
            may_differ += ["batch_size", "seed"]
        for name, value in run_settings.items():
            if getattr(args, name) != value and name not in may_differ:
                parser.error(f"{to_flag(name)} contradicts the run in {out_dir}: {value} there")
    args.out_dir = out_dir
    return args, checkpoint


def sample_only(args, checkpoint):
    """--sample N: write all N images as an array, and the first 100 as a picture."""
    from common import save_images

    model = Model(**checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    samples = draw_samples(model.to(args.device).eval(), args.sample, args)
    save_images(samples, args.out_dir / "samples.npy")
    save_images(samples[:100], args.out_dir / "samples.png")
    print(f"wrote samples.npy and samples.png into {args.out_dir}")


def load_images(args):
    """Returns uint8 training images (N, 1, H, W), their labels (N,) or None, and test images."""
    from common import load_mnist  # here, so that the model can be imported without common.py

    train_x, train_y, test_x, _ = load_mnist(args.data_dir, args.dataset, args.device)
    if args.dry_run:
        limit = 2 * args.batch_size
        train_x = train_x[:limit]
        train_y = train_y[:limit]
        test_x = test_x[:limit]
    if args.batch_size > len(train_x):
        fail(f"--batch-size {args.batch_size} exceeds the {len(train_x)} training images")
    labels = train_y if args.class_cond else None
    return train_x, labels, test_x


def set_up(args, config, checkpoint):
    """Returns model, ema and optimizers, new or restored from the checkpoint.

    model is the one being trained; ema, the running average of its weights, is tested and sampled.
    """
    set_seed(args.seed)
    try:
        model = Model(**config).to(args.device, memory_format=torch.channels_last)
    except ValueError as error:  # sizes that the model cannot have
        fail(error)
    ema = Model(**config).to(args.device, memory_format=torch.channels_last)
    ema.load_state_dict(model.state_dict())
    ema.eval().requires_grad_(False)
    optimizers = make_optimizers(model)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model_in_training"])
        ema.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
    if args.compile:
        model.compile()  # its forward, which is the network (in gan.py, the generator)
    return model, ema, optimizers


def write_log(log, path):
    """Write the log, a list with a dictionary of numbers per epoch, as a CSV file with a header."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=log[0].keys())
        writer.writeheader()
        writer.writerows(log)


def main(argv=None):
    """Train, or with --sample only draw. argv: a list of flags; None: those of the command line."""
    args, checkpoint = parse_args(argv)
    if args.sample:
        sample_only(args, checkpoint)
        return

    # in another project, replace load_images and save_images by your own
    from common import save_images

    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
    train_x, labels, test_x = load_images(args)
    if checkpoint is None:
        config = {name: getattr(args, name) for name in size_defaults()}
        config["size"] = train_x.shape[-1]
        config["n_classes"] = 10 if args.class_cond else 0
        log = []  # a dictionary of numbers per epoch
    else:
        config = checkpoint["config"]
        log = checkpoint["log"]
    if len(log) > args.epochs:
        fail(f"--epochs {args.epochs}: the run in {args.out_dir} has already done {len(log)}")
    model, ema, optimizers = set_up(args, config, checkpoint)

    # Save before the first step, so that a disk that cannot be written to is noticed now and not
    # after an hour, and so that --resume works wherever the run is stopped.
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path = args.out_dir / "model.pt"
    is_new = checkpoint is None and not args.dry_run
    first = make_checkpoint(args, config, model, ema, optimizers, log)
    try:
        save_checkpoint(first, path, new=is_new)
    except FileExistsError:
        fail(f"{args.out_dir} holds a run: --resume it, choose another --out-dir, or delete it")
    if args.tensorboard:
        writer = SummaryWriter(args.out_dir)
    steps = len(train_x) // args.batch_size
    plan = f"{args.epochs} epochs of {steps} steps on {args.device}, {len(log)} done"
    print(f"{args.out_dir}: {plan}; if interrupted, continue with --resume", flush=True)

    for epoch in range(len(log) + 1, args.epochs + 1):
        train_loss, seconds = train_epoch(epoch, args, model, ema, optimizers, train_x, labels)
        metrics = evaluate(ema.loss, test_x, bfloat16_autocast(args.device))
        row = {"epoch": epoch, "seconds": seconds, "train_loss": train_loss, **metrics}
        if not all(math.isfinite(value) for value in row.values()):
            fail(f"the loss of epoch {epoch} is not finite: --resume with a smaller --lr")
        samples = draw_samples(ema, 4 if args.dry_run else 100, args)
        if not samples.isfinite().all():
            fail(f"the samples of epoch {epoch} are not finite: --resume with a smaller --lr")

        log.append(row)
        save_images(samples, args.out_dir / f"samples_{epoch:04d}.png")
        save_images(samples, args.out_dir / "samples.png")
        write_log(log, args.out_dir / "log.csv")
        save_checkpoint(make_checkpoint(args, config, model, ema, optimizers, log), path)

        test_metrics = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        speed = steps * args.batch_size / seconds
        print(
            f"epoch {epoch:3}/{args.epochs} | train loss {train_loss:.4g} | test {test_metrics} | "
            f"{seconds:.1f} s | {speed:,.0f} img/s",
            flush=True,
        )
        if args.tensorboard:
            writer.add_images("samples", samples, epoch)
            for name, value in row.items():
                writer.add_scalar(name, value, epoch)
            writer.flush()

    # pictures that show how the model works
    set_seed(args.seed)
    for name, images in ema.pictures(test_x[:20] / 255).items():
        suffix = "gif" if images.ndim == 5 else "png"
        save_images(images, args.out_dir / f"{name}.{suffix}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except ModuleNotFoundError as error:
        fail(f"{error}: common.py must be beside this script; install other packages with pip")
    except OSError as error:
        fail(error)
