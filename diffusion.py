"""Diffusion: learn to separate images from noise, then turn pure noise into a digit, step by step.

    python diffusion.py --epochs 10    # 27 minutes on two CPU cores

Idea
  Mix an image with random noise, more and more, until nothing of the image is left. This cannot be
  undone in one step: given pure noise, the best prediction of the image, the one with the smallest
  squared error, is the average of all digits, a grey blur. But a small step towards this prediction
  is safe: the result is still mostly noise, so errors can be corrected. With a little of the blur
  mixed in, one sample looks slightly more like a 3, another, of other noise, slightly more like a
  7. The next prediction leans that way, and each step strengthens the choice, until it is a digit.
  Training needs no steps. Mix an image with noise in a random proportion, and let a network
  separate the two: plain regression. The price is that a sample takes 50 passes of the network,
  where a GAN needs one. And the loss does not say how probable an image is.

      * eps, noise (t = 1)
      | `-.                    The image x0 and the noise eps are the ends of an arc.
      |     `.                 x_t moves along it at the velocity v. The network sees
      |       * x_t            x_t and predicts v, which says where both ends are.
      |   a                    (One sample on its way: assets/denoising.png.)
      +---------* x0, image (t = 0)

Maths
  Mixing (`mix`). Time t = 0 is the image x0, with pixels in [-1, 1], t = 1 the noise eps ~ N(0, 1):
      x_t = cos(a) x0 + sin(a) eps,   a = t pi / 2
  As cos^2 + sin^2 = 1, x_t keeps a mean square near 1. While a rises, x_t moves at the velocity
      v = dx_t/da = cos(a) eps - sin(a) x0.
  (x_t, v) is (x0, eps), turned by the angle a. Turning it back (`split`) separates the two:
      x0 = cos(a) x_t - sin(a) v,   eps = sin(a) x_t + cos(a) v
  Learning.
      loss = E (v_net(x_t, t) - v)^2,   the mean over pixels, x0, eps and t (more often near 1)
  Many pairs (x0, eps) give the same x_t. The squared error is smallest at the mean of their v, so
  the network learns E[v | x_t], and with it E[x0 | x_t] and E[eps | x_t]. Why v? At t = 1, x_t is
  eps, so predicting eps, as DDPM does, teaches nothing there. v asks for what x_t does not show: x0
  at t = 1, eps at t = 0.
  The network is a U-Net. It halves the resolution twice, as a 3 x 3 kernel sees much of a digit at
  7 x 7. Then it doubles it twice, and adds back what it had at the same resolution on the way down:
  the details. It is given t as cosines and sines of many frequencies.
  Sampling (`move`) starts from noise, at t = 1. A step to an earlier time, whose angle is b, splits
  x into the predicted x0 and eps, replaces part of eps by new noise (`renew`), and mixes again:
      x <- cos(b) x0 + sin(b) (keep eps + sqrt(1 - keep^2) noise),   keep = tan(b) / tan(a)
  Why this keep? Suppose an image gets its noise in two portions: after the first it is x_b, then x.
  Then eps and the noise in x_b have correlation keep; so given eps, the noise in x_b is distributed
  like the bracket. In a small step it hardly matters that x0 and eps are only means. New noise also
  washes out the errors of earlier steps. The 50 steps are shortest near t = 1, where it is decided
  what is drawn. 100 images take 3.8 seconds. With keep = 1 (DDIM), nothing is random, and the steps
  can nearly be undone, which is how interpolations are made.
  Guidance. With --class-cond, the network is also told the label, except for one image in ten in
  training, so that it can also predict without one. Sampling follows
      v(no label) + guidance * (v(label) - v(no label)):
  0 ignores the label, 1 draws from about p(x | label), more (1.25 by default) exaggerates it.

What to expect
  loss is the mean squared error of v per pixel: 0.95 for a network that predicts 0, 0.143 after one
  epoch, 0.133 after ten. It stays far above 0, as x_t does not determine v. Look at the samples:
  digits of every kind after the first epoch, with stray strokes, fewer after each. If they stay
  grey or grainy, check the times and signs in `mix` and `split`.

Differences from the paper (DDPM: Ho, Jain and Abbeel 2020, arXiv:2006.11239)
  - continuous time on an arc (the cosine schedule of Nichol and Dhariwal 2021, arXiv:2102.09672)
  - the network predicts v (Salimans and Ho 2022, arXiv:2202.00512), not eps
  - it is shown its previous prediction of x0 (Chen et al. 2022, arXiv:2208.04202)
  - 50 steps, not 1,000; guidance by labels (Ho and Salimans 2022, arXiv:2207.12598)
  - a smaller U-Net: layer norms, no attention, its blocks trained with Muon (see recipe)
"""

import argparse
import copy
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
        return x + self.conv2(F.silu((1 + scale) * h + shift))


def slerp(a, b, n):
    """Spherical interpolation: n points from each a (B, 1, H, W) to its b -> (B, n, 1, H, W).

    Noise of D numbers has a norm of about sqrt(D); the arc keeps it, a straight line does not.
    """
    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1)  # (B,)
    angle = cosine.acos().clamp(min=1e-4)  # so that a = b gives a, not 0 / 0
    angle = angle.view(-1, 1, 1, 1, 1)
    w = torch.linspace(0, 1, n, device=a.device).view(-1, 1, 1, 1)
    arc = ((1 - w) * angle).sin() * a[:, None] + (w * angle).sin() * b[:, None]
    return arc / angle.sin()


class Diffusion(nn.Module):
    """A U-Net v(x_t, t, y, x0_last) over three resolutions, and the noising that it undoes.

    channels: at 28 x 28, doubled at 14 x 14 and again at 7 x 7; n_inner: residual blocks at 7 x 7;
    n_embd: numbers in the vector of time and label (an even number); size: pixels per side;
    n_classes: number of labels, or 0
    """

    def __init__(self, *, channels=16, n_inner=4, n_embd=128, size=28, n_classes=0):
        super().__init__()
        if channels < 1:
            raise ValueError("channels must be at least 1")
        if n_embd < 2 or n_embd % 2 != 0:
            raise ValueError("n_embd must be even and at least 2")
        if size < 4 or size % 4 != 0:
            raise ValueError(f"size must be a multiple of 4, not {size}")
        self.size = size
        self.n_classes = n_classes
        self.register_buffer("freqs", torch.logspace(0, 3, n_embd // 2), persistent=False)
        self.time = nn.Sequential(nn.Linear(n_embd, n_embd), nn.SiLU(), nn.Linear(n_embd, n_embd))
        self.stem = nn.Conv2d(2, channels, 3, padding=1)
        self.down14 = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self.down7 = nn.Conv2d(2 * channels, 4 * channels, 2, stride=2)
        self.blocks7 = nn.ModuleList(ResBlock(4 * channels, n_embd) for _ in range(n_inner))
        self.up14 = nn.ConvTranspose2d(4 * channels, 2 * channels, 2, stride=2)
        self.block14 = ResBlock(2 * channels, n_embd)
        self.up28 = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.block28 = ResBlock(channels, n_embd)
        self.head = nn.Conv2d(channels, 1, 3, padding=1)
        nn.init.zeros_(self.head.weight)  # start near v = 0
        if n_classes > 0:
            self.label = nn.Embedding(n_classes + 1, n_embd)  # the last entry is "no label"

    def forward(self, x_t, t, y=None, x0_last=None):
        """x_t (B, 1, H, W), t (B,) in [0, 1], y (B,) or None -> v like x_t.

        x0_last: an earlier prediction of x0, like x_t, or None if there is none
        """
        if x0_last is None:
            x0_last = torch.zeros_like(x_t)
        phases = t[:, None] * self.freqs  # (B, n_embd / 2): t as the hands of slow and fast clocks
        clocks = torch.cat([phases.cos(), phases.sin()], 1)  # (B, n_embd)
        emb = self.time(clocks)
        if y is not None:
            emb = emb + self.label(y)
        emb = F.silu(emb)
        h28 = self.stem(torch.cat([x_t, x0_last], 1))  # (B, 2, 28, 28) -> (B, C, 28, 28)
        h14 = self.down14(h28)  # (B, 2 C, 14, 14)
        h7 = self.down7(h14)  # (B, 4 C, 7, 7)
        for block in self.blocks7:
            h7 = block(h7, emb)
        h14 = self.block14(h14 + self.up14(h7), emb)
        h28 = self.block28(h28 + self.up28(h14), emb)
        return self.head(h28).type_as(x_t)  # (B, 1, 28, 28)

    def angle(self, t):
        """t (B,) in [0, 1] -> (B, 1, 1, 1), from 0 to a right angle."""
        return t[:, None, None, None] * math.pi / 2

    def mix(self, x0, eps, t):
        """x_t (B, 1, H, W), on the arc from x0 to eps, at t (B,)."""
        a = self.angle(t)
        return a.cos() * x0 + a.sin() * eps

    def split(self, x_t, v, t):
        """The x0 and eps that x_t and its velocity v are made of: the inverse of mix."""
        a = self.angle(t)
        x0 = a.cos() * x_t - a.sin() * v
        eps = a.sin() * x_t + a.cos() * v
        return x0, eps

    def renew(self, eps, t, t_next):
        """Replace part of eps (B, 1, H, W), the noise at t, by new noise -> the noise at t_next.

        t, t_next (B,). At the larger of the two, x has all the noise of the other, and more (DDPM).
        """
        less = self.angle(torch.minimum(t, t_next)).tan()
        more = self.angle(torch.maximum(t, t_next)).tan()
        keep = less / more
        return keep * eps + (1 - keep**2).sqrt() * torch.randn_like(eps)

    def loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> the mean squared error of v, metrics."""
        if x.shape[1:] != (1, self.size, self.size):
            raise ValueError(f"x must be (B, 1, {self.size}, {self.size}), not {tuple(x.shape)}")
        self.check_labels(len(x), y)
        if x.device.type == "cpu" and not (x.min() >= 0 and x.max() <= 1):
            raise ValueError("x must lie in [0, 1]")
        B = len(x)
        if y is not None and self.training:  # hide 1 label in 10: guidance needs p(x), too
            y = torch.where(torch.rand(B, device=y.device) < 0.1, self.n_classes, y)
        # u: B points at equal distances, moved by a random shift; after 1 comes 0 again. The loss
        # varies less than with B independent u.
        u = (torch.arange(B, device=x.device) / B + torch.rand(1, device=x.device)) % 1
        # P(t < s) = P(u < s^2) = s^2, so t has density 2 t, which favours the noisy end,
        # where it is decided what is drawn
        t = u.sqrt()
        x0 = 2 * x - 1
        eps = torch.randn_like(x0)
        a = self.angle(t)
        x_t = self.mix(x0, eps, t)
        v = a.cos() * eps - a.sin() * x0
        # Self-conditioning. Sampling shows the network the x0 that it predicted one step before,
        # which it only has to refine. So here, in half the batches, it is shown what it predicts
        # from x_last, which is x_t with one extra step of noise. (detach, not torch.no_grad,
        # after which older versions of torch with autocast would reuse copies of the weights that
        # have no gradient.)
        x0_last = None
        if torch.rand(1, device="cpu") < 0.5:  # a coin on the CPU: no wait for the GPU
            # times(50) are the sines of angles that lie pi / 100 apart
            t_last = (t.asin() + math.pi / 100).clamp(max=math.pi / 2).sin()
            x_last = self.mix(x0, self.renew(eps, t, t_last), t_last)
            x0_last, _ = self.split(x_last, self(x_last, t_last, y).detach(), t_last)
        loss = F.mse_loss(self(x_t, t, y, x0_last), v)
        return loss, {"loss": loss.detach()}

    def times(self, steps):
        """The times of a sample (steps + 1,), from 1 to 0, closest together near 1."""
        s = torch.linspace(1, 0, steps + 1, device=self.freqs.device)
        return (s * math.pi / 2).sin()

    @torch.no_grad()
    def move(self, x, times, y=None, guidance=1.25, reversible=False, frames=None):
        """Move x (B, 1, H, W) from times[0] through all others to times[-1] -> the last x.

        times (T,) fall from noise to images, or rise from images to noise. With labels y (B,), a
        step follows v(no label) + guidance * (v(y) - v(no label)).

        reversible: no new noise (DDIM, arXiv:2010.02502), and the network is not shown the x0 that
        it predicted last. Then a step depends on x, t and y alone, and can nearly be undone
        frames: a list, to which each step appends the new x and the x0 predicted from the old one
        """
        times = times[:, None].expand(-1, len(x))  # (T, B)
        x0_last = None
        for t, t_next in zip(times, times[1:]):
            v = self(x, t, y, x0_last)
            if y is not None:
                v_none = self(x, t, torch.full_like(y, self.n_classes), x0_last)
                v = v_none + guidance * (v - v_none)
            x0, eps = self.split(x, v, t)
            if not reversible:
                eps = self.renew(eps, t, t_next)
                x0_last = x0
            x = self.mix(x0, eps, t_next)
            if frames is not None:
                frames.append((x, x0))
        return x

    @torch.no_grad()
    def sample(self, n, y=None, steps=50, guidance=1.25):
        """Draw n images (n, 1, H, W) in [0, 1], in `steps` steps; y (n,) labels or None.

        guidance: 0 ignores y, 1 draws from about p(x | y), more exaggerates what y adds
        """
        self.check_labels(n, y)
        noise = torch.randn(n, 1, self.size, self.size, device=self.freqs.device)
        x0 = self.move(noise, self.times(steps), y, guidance)
        return (x0.clamp(-1, 1) + 1) / 2

    @torch.no_grad()
    def pictures(self, x, y=None):
        """x (N, 1, H, W) images, y (N,) or None -> {name: pictures}:

        process        (25, N, 1, H, 2 W): noise becomes images, x_t left, predicted x0 right
        interpolation  (10 N, 1, H, W): a row from each image to the next, by way of their noise,
                       with the label of the first
        """
        frames = []
        self.move(torch.randn_like(x), self.times(25), y, frames=frames)
        process = torch.stack([torch.cat(pair, dim=-1) for pair in frames])
        # Backwards, from the images to their noise. At t = 0 there is no noise in x_t, so the best
        # prediction of eps is 0, and no noise would ever come in. So start with a little.
        start = 0.05
        x_t = self.mix(2 * x - 1, torch.randn_like(x), torch.full_like(x[:, 0, 0, 0], start))
        times = torch.linspace(start, 1, 51, device=x.device)
        noise = self.move(x_t, times, y, guidance=1.0, reversible=True)
        arcs = slerp(noise, noise.roll(-1, 0), 10).flatten(0, 1)  # each image and the next
        if y is not None:
            y = y.repeat_interleave(10)
        times = torch.linspace(1, 0, 51, device=x.device)
        interpolation = self.move(arcs, times, y, guidance=1.0, reversible=True)
        return {
            "process": (process.clamp(-1, 1) + 1) / 2,
            "interpolation": (interpolation.clamp(-1, 1) + 1) / 2,
        }

    def check_labels(self, n, y):
        """Raise ValueError unless y holds n labels, or is None in a model without labels."""
        n_labels = 0 if y is None else len(y)
        expected = n if self.n_classes > 0 else 0
        if n_labels != expected:
            raise ValueError(
                f"y must hold {expected} labels, not {n_labels}: n_classes is {self.n_classes}"
            )


# ---------------------------------------------------------------- recipe
NAME = "diffusion"  # names the folder in out/ and marks checkpoints
Model = Diffusion
EPOCHS = 10
BATCH_SIZE = 64
LR = 5e-3


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for a network's hidden matrices (Jordan et al. 2024).

    The gradient of a matrix is dominated by a few directions. Plain momentum hardly moves along the
    others, which matter as well; Muon moves along all of them at about the same speed. A kernel
    (out, in, h, w) counts as the matrix (out, in h w).
    """

    def __init__(self, weights, lr):
        groups = {}  # by shape: a few large operations instead of many small ones
        for weight in weights:
            groups.setdefault(weight.shape, []).append(weight)
        super().__init__([{"params": group} for group in groups.values()], {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = group["params"]
            grads = torch.stack([weight.grad for weight in weights]).flatten(2)  # (K, M, N)
            state = self.state[weights[0]]  # shared by the whole group
            if not state:
                state["momentum"] = torch.zeros_like(grads)
            momentum = state["momentum"]
            momentum.lerp_(grads, 0.05)  # 0.95 momentum + 0.05 grads
            nesterov = 0.05 * grads + 0.95 * momentum  # with the new momentum: a look ahead
            for weight, update in zip(weights, orthogonalise(nesterov)):
                weight.sub_(update.view_as(weight), alpha=group["lr"])


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
        x = a * x + (b * xxt + c * xxt @ xxt) @ x
    if is_tall:
        x = x.mT
    return scale * x


def make_optimizers(model, lr):
    """Muon for the matrices and kernels in the blocks, AdamW for all other weights."""
    blocks = [module for module in model.modules() if isinstance(module, ResBlock)]
    in_blocks = {weight for block in blocks for weight in block.parameters()}
    matrices = []
    others = []
    for weight in model.parameters():
        if not weight.requires_grad:  # frozen
            continue
        if weight in in_blocks and weight.ndim > 1:
            matrices.append(weight)
        else:
            others.append(weight)
    optimizers = [torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]
    if matrices:  # none if the blocks are frozen
        optimizers.append(Muon(matrices, lr))
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
    # a gradient of norm above 1 is scaled down to 1: no step dominates the optimizers' averages
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


# ---------------------------------------------------------------- train
# The same text in all ten scripts. You can stop reading after main; its helpers follow.
def main(argv=None):
    """Train, or with --sample only draw. argv: a list of flags; None: those of the command line."""
    args, checkpoint = parse_args(argv)
    # imported here, so that the model can be copied and imported alone
    from common import load_mnist, save_images

    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

    if args.sample:
        model = Model(**checkpoint["config"]).eval()
        model.load_state_dict(checkpoint["model"])
        model.to(args.device, memory_format=torch.channels_last)
        samples = draw_samples(model, args.sample, args)
        save_images(samples, args.out_dir / "samples.npy")
        save_images(samples[:100], args.out_dir / "samples.png")
        n_epochs = len(checkpoint.get("log", []))
        print(f"{args.out_dir}: samples.npy and samples.png, drawn after {n_epochs} epochs")
        return

    path = args.out_dir / "model.pt"
    if path.exists() and not args.resume and not args.dry_run:
        sys.exit(f"{args.out_dir} holds a run: --resume it, or choose another --out-dir")

    # data: float32 images (N, 1, H, W) in [0, 1] and int64 labels (N,), on the device
    train_x, train_y, test_x, test_y = load_mnist(args.data_dir, args.dataset, args.device)
    if not args.resume:
        args.size = train_x.shape[-1]
        args.n_classes = int(train_y.max()) + 1 if args.class_cond else 0
    n_samples = 100
    if args.dry_run:
        args.epochs = 1
        two_batches = 2 * args.batch_size
        train_x = train_x[:two_batches]
        test_x = test_x[:two_batches]
        test_y = test_y[:two_batches]
        n_samples = 4
    steps_per_epoch = len(train_x) // args.batch_size  # the images left over are skipped
    if steps_per_epoch == 0:
        sys.exit(f"--batch-size {args.batch_size} exceeds the {len(train_x)} training images")

    # the model, ema (the average of its weights, which is tested and sampled), the optimizers
    config = {name: getattr(args, name) for name in inspect.signature(Model).parameters}
    set_seed(args.seed)
    try:
        model = Model(**config)
    except (ValueError, RuntimeError) as error:  # sizes that the model cannot have
        sys.exit(f"{NAME}.py: {error}")
    model.to(args.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(model, args.lr)
    log = []  # grows by a dictionary of numbers per epoch
    if args.resume:
        log = checkpoint["log"]
        model.load_state_dict(checkpoint["model_in_training"])
        ema.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
    if len(log) > args.epochs:
        sys.exit(f"--epochs {args.epochs}: the run in {args.out_dir} has done {len(log)} already")
    if args.compile:
        model.compile()

    # Save before the first step, so that a disk that cannot be written to is noticed now.
    names = ("epochs", "batch_size", "lr", "seed", "dataset", "data_dir", "dry_run")
    settings = {name: getattr(args, name) for name in names}
    run = {"script": NAME, "config": config, "settings": settings, "log": log}
    args.out_dir.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, run, model, ema, optimizers)
    if args.tensorboard:
        writer = SummaryWriter(args.out_dir)
    n_parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{n_parameters:,} parameters, {steps_per_epoch} steps per epoch on {args.device}")
    print(f"{len(log)} epochs are done, {args.epochs - len(log)} are left")
    print(f"to continue after an interruption: --resume --out-dir {args.out_dir}", flush=True)

    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    autocast = bfloat16_autocast(args.device)
    total_steps = args.epochs * steps_per_epoch
    interval = 60  # seconds from one progress line to the next
    line_end = "\n"
    if sys.stdout.isatty():
        interval = 1
        line_end = "\r"
    for epoch in range(len(log) + 1, args.epochs + 1):
        set_seed(args.seed, epoch)  # the same order and noise, whether the run was resumed or not
        perm = torch.randperm(len(train_x)).to(args.device)
        loss_sum = 0
        start = time.perf_counter()
        shown = start
        for i in range(steps_per_epoch):
            step = (epoch - 1) * steps_per_epoch + i + 1  # counted from the first epoch
            for group in groups:
                group["lr"] = learning_rate(step, total_steps, args.lr)
            idx = perm[i * args.batch_size : (i + 1) * args.batch_size]
            y = train_y[idx] if args.class_cond else None
            loss = train_step(model, optimizers, autocast, train_x[idx], y)
            update_ema(ema, model, step)
            loss_sum += loss

            now = time.perf_counter()
            if now > shown + interval:  # not at each step: reading the loss waits for the GPU
                shown = now
                speed = (i + 1) * args.batch_size / (now - start)
                left = (total_steps - step) * args.batch_size / speed
                line = f"step {step}/{total_steps} | loss {float(loss):.4g} | {speed:,.0f} img/s"
                print(f"{line} | {left:.0f} s left".ljust(79), end=line_end, flush=True)
        train_loss = float(loss_sum) / steps_per_epoch  # float() waits for the GPU to finish
        seconds = time.perf_counter() - start

        metrics = evaluate(ema, test_x, test_y)
        row = {"epoch": epoch, "seconds": seconds, "train_loss": train_loss, **metrics}
        if not all(math.isfinite(value) for value in row.values()):
            sys.exit(f"the loss of epoch {epoch} is not finite: --resume with a smaller --lr")
        samples = draw_samples(ema, n_samples, args)
        if not samples.isfinite().all():
            sys.exit(f"the samples of epoch {epoch} are not finite: --resume with a smaller --lr")

        log.append(row)
        save_checkpoint(path, run, model, ema, optimizers)
        columns = dict.fromkeys(name for entry in log for name in entry)
        with open(args.out_dir / "log.csv", "w", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(log)
        save_images(samples, args.out_dir / f"samples_{epoch:04d}.png")
        save_images(samples, args.out_dir / "samples.png")
        speed = steps_per_epoch * args.batch_size / seconds
        test = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(
            f"epoch {epoch:3}/{args.epochs} | train loss {train_loss:.4g} | test {test} | "
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
    y = test_y[:20] if args.class_cond else None
    for name, images in ema.pictures(test_x[:20], y).items():
        suffix = "gif" if images.ndim == 5 else "png"
        save_images(images, args.out_dir / f"{name}.{suffix}")


def learning_rate(step, total_steps, peak):
    """A rise to peak in the first 2 % of the steps, then a linear fall to almost 0 at the last."""
    warmup = max(1, round(0.02 * total_steps))
    return peak * min(step / warmup, (total_steps + 1 - step) / (total_steps + 1 - warmup))


@torch.no_grad()
def update_ema(ema, model, step):
    """Move ema, the exponential moving average of the weights, a little towards those of model."""
    half_life = 0.05 * step  # in steps: short at first, when the weights move fast
    decay = 0.5 ** (1 / half_life)
    for average, weight in zip(ema.parameters(), model.parameters()):
        average.lerp_(weight, 1 - decay)  # decay * average + (1 - decay) * weight
    for average, buffer in zip(ema.buffers(), model.buffers()):
        average.copy_(buffer)


@torch.no_grad()
def evaluate(model, x, y):
    """The metrics of model.loss, averaged over images x (N, 1, H, W) -> {name: float}.

    Every call sees the same noise. Labels y (N,) are used if the model was made for them.
    """
    torch.manual_seed(0)
    means = {}
    for idx in torch.arange(len(x), device=x.device).split(100):
        _, metrics = model.loss(x[idx], y[idx] if model.n_classes > 0 else None)
        for name, value in metrics.items():
            means[name] = means.get(name, 0) + float(value) * len(idx) / len(x)
    return means


def draw_samples(model, n, args):
    """n images (n, 1, H, W), from the same noise at each call; labels are 0, 1, 2, ... in turn."""
    set_seed(args.seed)
    samples = []
    for idx in torch.arange(n, device=args.device).split(500):
        y = idx % model.n_classes if model.n_classes > 0 else None
        samples.append(model.sample(len(idx), y))
    return torch.cat(samples)


def set_seed(seed, epoch=0):
    """Seed torch for an epoch, counted from 1, or for what is outside training (epoch 0)."""
    torch.manual_seed((1_000_003 * seed + epoch) % 2**63)  # % keeps within torch's range


def bfloat16_autocast(device):
    """A context in which matrix products and convolutions use bfloat16, if the hardware can."""
    kind = torch.device(device).type
    supported = False
    if kind == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # older versions lack it
        supported = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(kind, torch.bfloat16, enabled=supported)


def save_checkpoint(path, run, model, ema, optimizers):
    """Write what --resume needs, atomically: neither a kill nor a full disk leaves half a file.

    run: the script's name, the model's config, the settings and the log
    """
    checkpoint = {
        **run,
        "model": ema.state_dict(),  # the averaged weights, which are tested and drawn from
        "model_in_training": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    data = io.BytesIO()  # into memory first: on a full disk, torch.save raises no OSError
    torch.save(checkpoint, data)
    part = path.with_name("model.pt.part")
    part.write_bytes(data.getvalue())
    os.replace(part, path)


def parse_args(argv):
    """Parse argv (None: the command line) -> the settings, and a checkpoint or None.

    --resume and --sample start from the settings of the run, and refuse flags that contradict it.
    """
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=f"Train {Model.__name__}, or draw samples from it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    datasets = ["MNIST", "FashionMNIST", "KMNIST"]
    add("--epochs", type=int, default=EPOCHS, help="passes over the training images")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images per step")
    add("--lr", type=float, default=LR, help="peak learning rate")
    add("--seed", type=int, default=0, help="random seed")
    add("--device", default=device, help="torch device: cpu, cuda, cuda:1, mps")
    add("--dataset", choices=datasets, default="MNIST", help="images to train on")
    add("--data-dir", help="folder of the data sets; None: data, beside common.py")
    add("--out-dir", type=Path, default=Path("out", NAME), help="folder for all output")
    add("--class-cond", action="store_true", help="learn p(x | label) instead of p(x)")
    add("--compile", action="store_true", help="torch.compile: slow to start, may speed up steps")
    add("--dry-run", action="store_true", help="two batches of everything, into OUT_DIR-dry")
    add("--tensorboard", action="store_true", help="also write TensorBoard logs into OUT_DIR")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continue the run in OUT_DIR")
    mode.add_argument("--sample", type=int, metavar="N", help="draw N images from that run")
    sizes = parser.add_argument_group("sizes of the model", Model.__doc__)
    for name, parameter in inspect.signature(Model).parameters.items():
        if name not in ("size", "n_classes"):  # the data decide
            flag = "--" + name.replace("_", "-")
            default = parameter.default
            sizes.add_argument(flag, type=type(default), default=default, help="see above")
    args = parser.parse_args(argv)

    out_dir = args.out_dir.expanduser()
    if args.dry_run:
        out_dir = Path(f"{out_dir}-dry")
    checkpoint = None
    if args.resume or args.sample:
        path = out_dir / "model.pt"
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        needed = "optimizers" if args.resume else "config"
        if needed not in checkpoint or checkpoint.get("script", NAME) != NAME:
            parser.error(f"{path} is no checkpoint of {NAME}.py, or lacks {needed}")
        saved = {**checkpoint.get("settings", {}), **checkpoint["config"]}
        saved["class_cond"] = saved.get("n_classes", 0) > 0
        # Parse again with these as defaults: a value that still differs was given as a flag.
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        may_differ = ["epochs", "lr", "batch_size", "data_dir"]
        if args.sample:
            may_differ.append("seed")
        if args.class_cond and not saved["class_cond"]:
            parser.error(f"--class-cond: the run in {out_dir} was trained without labels")
        for name, value in saved.items():
            if getattr(args, name) != value and name not in may_differ:
                flag = "--" + name.replace("_", "-")
                parser.error(f"{flag} {getattr(args, name)}: the run in {out_dir} has {value}")
    args.out_dir = out_dir

    for name in ("epochs", "batch_size", "lr", "sample"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive and finite")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]  # the first sentence
        parser.error(f"--device {args.device}: {reason}")
    return args, checkpoint


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: common.py must be beside this script; install other packages with pip")
    except OSError as error:
        sys.exit(f"{NAME}.py: {error}")
