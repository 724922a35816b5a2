"""VAE (variational autoencoder): codes that are distributed like noise, so noise decodes to digits.

    python vae.py    # 30 epochs, 47 minutes on two CPU cores: test neg_elbo 86.5

Idea
  Think of an image as made in two steps. First a code z, 32 random numbers, decides what to draw:
  which digit, how slanted, how bold. Then a network, the decoder, turns z into the probability that
  each pixel is white. z is called latent, as it is never observed. Its fixed distribution p(z), a
  standard Gaussian, is called the prior.
  Training should make real images probable. The probability p(x) that the model assigns to an image
  is the average of p(x | z) over z from the prior. But almost every such z decodes to something
  quite different from x, so it is hopeless to estimate this average from a few. Therefore a second
  network, the encoder, says for each x which z are likely to have made it: a Gaussian q(z | x),
  with a mean mu and a standard deviation sigma for each of the 32 numbers. (Gaussian, because it is
  easy to draw from and its KL has a closed form, see below.) The decoder is trained on z from q.
  Encode, then rebuild: that is an autoencoder. Here the code is noisy, and has a price, kl: how
  much more q(z | x) says about z than p(z) does. So the encoder says only what improves the rebuilt
  image by more than it costs, and each mu is pulled towards 0, each sigma towards 1. The average of
  q over all images comes near the prior, though not without gaps, and a z drawn from the prior
  usually decodes to a digit: sampling takes one pass of the decoder.
  The drawbacks: only a bound on log p(x) is known, and whatever z leaves open comes out as a blur,
  as each pixel is predicted without knowing the others.

      x ---> encoder ---> mu, sigma ---> z = mu + sigma eps ---> decoder ---> logits of x
                              |                  ^                               |
                  kl: mu near 0, sigma near 1    eps ~ N(0, 1)                recon: like x

      (With --z-dim 2, z can be plotted: assets/posteriors.png.)

Maths
  p(x) = E_{z ~ p}[ p(x | z) ] is a mean over the prior. For any density q(z | x) > 0, it is a mean
  over q as well:
      log p(x) = log E_{z ~ q}[ p(x | z) p(z) / q(z | x) ]
              >= E_{z ~ q}[ log ( p(x | z) p(z) / q(z | x) ) ]
               = E_{z ~ q}[ log p(x | z) ] - KL( q(z | x) || p(z) )  =  ELBO
  as the log of a mean is at least the mean of the logs. (ELBO: evidence lower bound.) KL(q || p) =
  E_q[log q - log p], never negative, measures how far q is from p. By Bayes' rule, p(x | z) p(z) is
  p(z | x) p(x), so
      ELBO = log p(x) - KL( q(z | x) || p(z | x) ):
  nothing is lost if q is the true posterior p(z | x), which these Gaussians can only approximate.
  What is minimised is neg_elbo = -ELBO = recon + kl, in nats (natural logarithms) per image:
      recon = -E_q[ sum_i log p(x_i | z) ],   p(x_i = 1 | z) = sigmoid(logits_i), one draw of z
      kl    = sum over the numbers in z of (mu^2 + sigma^2 - 1 - log sigma^2) / 2
  the KL of N(mu, sigma^2) from N(0, 1), number by number: for mu = 1, sigma = 0.5 it is 0.82 nats.
  Gradients cannot pass through a random draw to mu and sigma. So draw noise that does not depend on
  them, and compute z (the reparametrisation trick):
      z = mu + sigma eps,   eps ~ N(0, 1):   dz/dmu = 1,   dz/dsigma = eps
  The encoder outputs logvar = log sigma^2, which may be any real number.
  Sampling. z ~ N(0, 1), decoded to the probabilities of the pixels: 100 images in 0.02 seconds.
  Binarisation. loss() takes grey levels from 0 (black) to 1 (white): a pixel of 0.7 becomes 1 with
  probability 0.7, drawn anew each time.

What to expect
  neg_elbo 86.5 = recon 60.0 + kl 26.5; the tighter bound from `bound` is 83.1. Both terms are
  summed, over pixels or over z, then averaged over images. A common mistake is to average recon
  over pixels and kl over z: this weights kl 784 / 32 = 24.5 times too much, so codes say next to
  nothing, and all samples look like the average digit. Reconstructions look better than samples,
  because a z from a gap between the q(z | x) decodes to something between digits.

Differences from the paper (Kingma and Welling 2013, arXiv:1312.6114)
  - residual blocks of convolutions instead of one hidden layer in each network
  - a bound from many draws (IWAE, Burda et al. 2015, arXiv:1509.00519), to measure, not to train
  - with --class-cond, encoder and decoder are given the label, so the model becomes p(x | label)
  - kernels of the blocks trained with Muon (see recipe)
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
class ConvBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(x)))))."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.LayerNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # at first the block adds no more than a bias

    def forward(self, x):  # (B, C, H, W)
        h = self.conv1(F.silu(x)).permute(0, 2, 3, 1)  # (B, H, W, C), to normalise over C
        h = self.norm(h).permute(0, 3, 1, 2)  # (B, C, H, W)
        return x + self.conv2(F.silu(h))


class VAE(nn.Module):
    """Encoder q(z | x), decoder p(x | z), and the bound that trains both.

    channels: at 14 x 14, twice as many at 7 x 7; hidden: units of the layer before and after z;
    z_dim: numbers in z; size: pixels per side; n_classes: number of labels, or 0
    """

    def __init__(self, *, channels=32, hidden=512, z_dim=32, size=28, n_classes=0):
        super().__init__()
        if min(channels, hidden, z_dim) < 1:
            raise ValueError("channels, hidden and z_dim must be at least 1")
        if size < 4 or size % 4 != 0:
            raise ValueError(f"size must be a multiple of 4, not {size}")
        self.size = size
        self.n_classes = n_classes
        self.z_dim = z_dim
        self.grid = (2 * channels, size // 4, size // 4)
        n_grid = math.prod(self.grid)
        self.stem = nn.Conv2d(4, channels, 3, padding=1)  # 4: the pixels of a 2 x 2 patch
        self.encoder_outer = ConvBlock(channels)
        self.down = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self.encoder_inner = ConvBlock(2 * channels)
        self.shrink = nn.Linear(n_grid + n_classes, hidden)
        self.to_z = nn.Linear(hidden, 2 * z_dim)  # mu and logvar
        self.from_z = nn.Linear(z_dim + n_classes, hidden)
        self.expand = nn.Linear(hidden, n_grid)
        self.decoder_inner = ConvBlock(2 * channels)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.decoder_outer = ConvBlock(channels)
        self.head = nn.Conv2d(channels, 4, 3, padding=1)

    def append_label(self, h, y):
        """h (B, D) -> (B, D + n_classes), with the one-hot label."""
        if y is None:
            return h
        return torch.cat([h, F.one_hot(y, self.n_classes)], 1)

    def encode(self, x, y=None):
        """x (B, 1, H, W) in {0, 1} -> mu, logvar (B, z_dim) of q(z | x)."""
        h = self.stem(F.pixel_unshuffle(2 * x - 1, 2))  # (B, 4, 14, 14) -> (B, C, 14, 14)
        h = self.down(self.encoder_outer(h))  # (B, 2 C, 7, 7)
        h = F.silu(self.encoder_inner(h)).flatten(1)  # (B, 2 C * 7 * 7)
        h = F.silu(self.shrink(self.append_label(h, y)))  # (B, hidden)
        mu_and_logvar = self.to_z(h).type_as(x)  # from bfloat16, under autocast
        return mu_and_logvar.chunk(2, dim=1)  # (B, z_dim) each

    def decode(self, z, y=None):
        """z (B, z_dim) -> logits (B, 1, H, W) of p(x | z)."""
        h = F.silu(self.from_z(self.append_label(z, y)))  # (B, hidden)
        h = self.decoder_inner(self.expand(h).view(-1, *self.grid))  # (B, 2 C, 7, 7)
        h = self.decoder_outer(self.up(h))  # (B, C, 14, 14)
        logits = F.pixel_shuffle(self.head(F.silu(h)), 2)  # (B, 4, 14, 14) -> (B, 1, 28, 28)
        return logits.type_as(z)

    def forward(self, x, y=None):  # x in {0, 1} -> logits like x; mu, logvar (B, z_dim)
        mu, logvar = self.encode(x, y)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        return self.decode(z, y), mu, logvar

    def loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> the loss, neg_elbo = recon + kl; metrics."""
        if x.shape[1:] != (1, self.size, self.size):
            raise ValueError(f"x must be (B, 1, {self.size}, {self.size}), not {tuple(x.shape)}")
        self.check_labels(len(x), y)
        x = torch.bernoulli(x)
        logits, mu, logvar = self(x, y)
        # recon = -log p(x | z), a mean over images
        recon = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        # kl = 1/2 sum_j (mu_j^2 + sigma_j^2 - 1 - log sigma_j^2)
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1).mean()
        neg_elbo = recon + kl
        metrics = {"neg_elbo": neg_elbo, "recon": recon, "kl": kl}
        return neg_elbo, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def bound(self, x, y=None, k=64):
        """x, y as in loss -> iwae, a tighter bound on -log p(x) from k draws, in nats/image.

        iwae = -log( 1/k sum_j p(x | z_j) p(z_j) / q(z_j | x) ), z_j ~ q(z | x): each ratio has the
        mean p(x). So has the average of k, which varies less, so taking the log loses less.
        """
        self.check_labels(len(x), y)
        x = torch.bernoulli(x)
        mu, logvar = self.encode(x, y)
        log_w = []
        for _ in range(k):  # one draw at a time: k at once would need k times the memory
            eps = torch.randn_like(mu)
            z = mu + (0.5 * logvar).exp() * eps
            logits = self.decode(z, y)
            recon = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3))
            # log w = log p(x | z) + log p(z) - log q(z | x), where log(2 pi) cancels
            log_w.append(-recon + 0.5 * (eps**2 + logvar - z**2).sum(1))  # (B,)
        return math.log(k) - torch.stack(log_w).logsumexp(0).mean()

    @torch.no_grad()
    def sample(self, n, y=None):
        """Draw n codes z -> images (n, 1, H, W), the means of p(x | z); y (n,) or None."""
        self.check_labels(n, y)
        z = torch.randn(n, self.z_dim, device=self.head.weight.device)
        return self.decode(z, y).sigmoid()

    @torch.no_grad()
    def pictures(self, x, y=None):
        """x (N, 1, H, W) images, y (N,) or None -> {name: pictures}:

        reconstruction  (2 N, 1, H, W): each row of ten images above its reconstructions, from mu
        interpolation   (10 N, 1, H, W): a row from the mu of each image to that of the next (from
                        the last to the first), with the label of the first
        """
        x = torch.bernoulli(x)
        mu, _ = self.encode(x, y)
        reconstruction = []
        for images, decoded in zip(x.split(10), self.decode(mu, y).sigmoid().split(10)):
            reconstruction += [images, decoded]
        a = mu[:, None]  # (N, 1, z_dim)
        b = mu.roll(-1, 0)[:, None]  # the next
        w = torch.linspace(0, 1, 10, device=x.device)[:, None]
        z = (a + (b - a) * w).flatten(0, 1)  # (N, 10, z_dim) -> (10 N, z_dim)
        if y is not None:
            y = y.repeat_interleave(10)
        interpolation = self.decode(z, y).sigmoid()
        return {"reconstruction": torch.cat(reconstruction), "interpolation": interpolation}

    def check_labels(self, n, y):
        """Raise ValueError unless y holds n labels, or is None in a model without labels."""
        n_labels = 0 if y is None else len(y)
        expected = n if self.n_classes > 0 else 0
        if n_labels != expected:
            raise ValueError(
                f"y must hold {expected} labels, not {n_labels}: n_classes is {self.n_classes}"
            )


# ---------------------------------------------------------------- recipe
NAME = "vae"  # names the folder in out/ and marks checkpoints
Model = VAE
EPOCHS = 30
BATCH_SIZE = 64
LR = 4e-3


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
    """Muon for the kernels in the blocks, AdamW for all other weights."""
    blocks = [module for module in model.modules() if isinstance(module, ConvBlock)]
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
