"""VAE (variational autoencoder): compress images into 32 numbers that are distributed like noise,
so that noise decodes to digits.

    python vae.py
    # 30 epochs, seed 0: test neg_elbo 86.75; an epoch takes 42 seconds on two CPU cores (bfloat16)

Kingma and Welling 2013, arXiv:1312.6114; the tighter bound, IWAE: Burda et al. 2015,
arXiv:1509.00519. Differences from the paper: convolutions as well, where the paper's encoder and
decoder have one hidden layer each; optional labels; images binarised anew each time they are used
(see Shapes); the matrices and kernels of the residual blocks trained by Muon, an optimizer
explained in the train section; evaluation with an exponential moving average of the weights (EMA).

Idea
  Think of an image as made in two steps. First a code z, 32 random numbers, decides what to draw:
  which digit, how slanted, how bold. Then a network, the decoder, turns z into the probability that
  each pixel is white. Given z, pixels are independent, so p(x | z) is the product of the
  probabilities of their values. z is called latent, as it is never observed. Its fixed distribution
  p(z), a standard Gaussian, is called the prior.
  Training should make real images probable. The probability that the model gives an image, p(x), is
  the average of p(x | z) over z drawn from the prior. But for a given x almost every random z draws
  something quite different, so it would be hopeless to estimate this average from random z. So a
  second network, the encoder, says for each x which z are likely to have made it: a Gaussian q(z |
  x) with a mean mu and a standard deviation sigma for each of the 32 numbers. (Given x, these are
  independent of each other.) q is far narrower than the prior, except for numbers that the decoder
  ignores: there it equals the prior, which costs nothing. The decoder is then trained on z that
  could have made x.
  Encode, then rebuild: that is an autoencoder. Here the code is noisy, and it has a price. The
  encoder pays for every bit by which q(z | x) says more about z than p(z) does. So it spends bits
  only where each improves the rebuilt image by more than it costs. The price also pulls each mu
  towards 0 and each sigma towards 1, so the q of all images together nearly fill the prior, and a z
  drawn from it usually decodes to a digit. Sampling takes one pass of the decoder, and similar z
  decode to similar images.
  The drawbacks: we only get a bound on p(x), and whatever z leaves open comes out as a blur,
  because given z each pixel is predicted without knowing the others.

Maths
  p(x) is the integral of p(x | z) p(z) over z. Multiply and divide by any density q(z | x) > 0, and
  the integral becomes a mean over z drawn from q:
      log p(x) = log E_{z ~ q}[ p(x | z) p(z) / q(z | x) ]
              >= E_{z ~ q}[ log ( p(x | z) p(z) / q(z | x) ) ]          (Jensen's inequality)
               = E_{z ~ q}[ log p(x | z) ] - KL( q(z | x) || p(z) )  =  ELBO
  The inequality holds because log is concave: the log of a mean is at least the mean of the logs.
  ELBO is short for evidence lower bound. KL(q || p) = E_q[log q - log p], never negative, says how
  far q is from p, in nats (natural logarithms; a nat is 1.44 bits).
  How large is the gap between the two sides? The posterior p(z | x) says how probable each z is
  once x is known. As p(x | z) p(z) = p(z | x) p(x),
      ELBO = E_{z ~ q}[ log ( p(z | x) p(x) / q(z | x) ) ] = log p(x) - KL( q(z | x) || p(z | x) ).
  So the gap is 0 if q is the posterior. A Gaussian can only come near to it.
  What is minimised is neg_elbo = -ELBO = recon + kl:
      recon = -E_q[ sum_i log p(x_i | z) ]   with p(x_i = 1 | z) = sigmoid(logits_i),
              estimated from one draw of z for each image
      kl    = sum over the numbers in z of (mu^2 + sigma^2 - 1 - log sigma^2) / 2,
              because for each of them q(z | x) = N(mu, sigma^2) and p(z) = N(0, 1), so that
              E_q[log q] = -(1 + log(2 pi sigma^2)) / 2
              E_q[log p] = -(mu^2 + sigma^2 + log(2 pi)) / 2
  kl is the cost of the code: about 26 nats (38 bits) after training.
  Gradients. A random draw cannot be differentiated with respect to the mu and sigma of its
  distribution. So draw noise that does not depend on them, and compute z from it (the
  reparametrisation trick):
      z = mu + sigma * eps,   eps ~ N(0, 1):   dz/dmu = 1,  dz/dsigma = eps
  The encoder outputs logvar = log sigma^2, which may be any number; sigma = exp(logvar / 2) is
  positive.
  A tighter bound, importance-weighted (the method `bound`; bench/compare.py reports it), averages
  over k independent draws inside the log:
      log p(x) >= E[ log( 1/k sum_j p(x | z_j) p(z_j) / q(z_j | x) ) ]  =  -iwae
  Each ratio has the expectation p(x). So has the average of k of them, but the average varies less,
  so Jensen's inequality loses less. With k = 1 it is the ELBO; as k grows it tends to log p(x).
  Sampling. z ~ N(0, 1), decoded to the probabilities of the pixels. These are shown as grey levels:
  flipping a coin for each pixel would only add speckles.
  Labels. With --class-cond, the label's vector sets a scale and a shift for the features in encoder
  and decoder. In training, a label is replaced with probability 1/10 by "no label", which has a
  vector of its own, so that one model works with labels and without. With a label, q and p(x | z)
  depend on it; p(z) does not.

Shapes
  x (B, 1, 28, 28), images of handwritten digits (MNIST): loss() takes grey levels, from 0 (black)
  to 1 (white), but the networks see binary pixels. A grey level of 0.7 becomes 1 with probability
  0.7, drawn anew each time an image is used (dynamic binarisation). mu, logvar, z (B, z_dim);
  logits like x. size: a multiple of 4, as the image is halved twice.

What to expect
  All figures are in nats per image: summed over the pixels and over z, then averaged over images.
  Averaging over pixels and over z instead is a common mistake: it weighs kl 784 / 32 = 24.5 times
  too much, so the codes carry next to nothing, and all samples look like the average digit. recon
  keeps falling, while kl gets near its final value in the first epoch. With its defaults, this
  script reaches neg_elbo 86.75 (recon 60.4, kl 26.3); with 64 draws, iwae is 83.4, so log p(x) is
  at least 3 nats above the ELBO. The training images' neg_elbo is 0.8 lower than the test images'
  at the end, as the model begins to learn the training images by heart. Reconstructions look better
  than samples: the prior is not quite filled, and a z from one of the holes decodes to something
  between digits.
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


class VAE(nn.Module):
    """Encoder q(z | x), decoder p(x | z), and the bound that trains both.

    channels: at 14 x 14, twice as many at 7 x 7; hidden: units of the layer between these and z;
    z_dim: numbers in z; n_embd: numbers in the vector of a label; size: pixels per side; n_classes:
    number of labels, or 0
    """

    def __init__(self, *, channels=32, hidden=512, z_dim=32, n_embd=16, size=28, n_classes=10):
        super().__init__()
        if min(channels, hidden, z_dim, n_embd) < 1 or n_classes < 0:
            raise ValueError("channels, hidden, z_dim, n_embd must be >= 1, n_classes >= 0")
        if size < 4 or size % 4 != 0:
            raise ValueError(f"size must be a multiple of 4, not {size}")
        self.size = size
        self.n_classes = n_classes
        self.z_dim = z_dim
        self.grid = (2 * channels, size // 4, size // 4)
        n_grid = math.prod(self.grid)
        # the last entry is "no label": without labels, all images get the same scale and shift
        self.label = nn.Embedding(n_classes + 1, n_embd)
        self.stem = nn.Conv2d(4, channels, 3, padding=1)  # 4: the pixels of a 2 x 2 patch
        self.encoder_outer = ResBlock(channels, n_embd)
        self.down = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self.encoder_inner = ResBlock(2 * channels, n_embd)
        to_z = nn.Linear(hidden, 2 * z_dim)  # mu and logvar
        self.shrink = nn.Sequential(nn.Linear(n_grid, hidden), nn.SiLU(), to_z)
        self.expand = nn.Sequential(nn.Linear(z_dim, hidden), nn.SiLU(), nn.Linear(hidden, n_grid))
        self.decoder_inner = ResBlock(2 * channels, n_embd)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.decoder_outer = ResBlock(channels, n_embd)
        self.head = nn.Conv2d(channels, 4, 3, padding=1)

    def embed(self, x, y):
        """A vector for each label in y (B,), or for "no label" if y is None, with B = len(x)."""
        if y is None:
            y = torch.full((len(x),), self.n_classes, device=x.device)
        return self.label(y)

    def encode(self, x, y=None):
        """x (B, 1, H, W) in {0, 1} -> mu, logvar (B, z_dim) of q(z | x)."""
        emb = self.embed(x, y)
        h = self.stem(F.pixel_unshuffle(2 * x - 1, 2))  # (B, 4, 14, 14) -> (B, C, 14, 14)
        h = self.down(self.encoder_outer(h, emb))  # (B, 2 C, 7, 7)
        h = self.encoder_inner(h, emb)
        mu_and_logvar = self.shrink(F.silu(h).flatten(1))  # (B, 2 * z_dim)
        return mu_and_logvar.type_as(x).chunk(2, dim=1)  # from bfloat16, under autocast

    def decode(self, z, y=None):
        """z (B, z_dim) -> logits (B, 1, H, W) of p(x | z)."""
        emb = self.embed(z, y)
        h = self.decoder_inner(self.expand(z).view(-1, *self.grid), emb)  # (B, 2 C, 7, 7)
        h = self.decoder_outer(self.up(h), emb)  # (B, C, 14, 14)
        logits = F.pixel_shuffle(self.head(F.silu(h)), 2)  # (B, 4, 14, 14) -> (B, 1, 28, 28)
        return logits.type_as(z)  # from bfloat16, under autocast

    def forward(self, x, y=None):  # x in {0, 1} -> logits like x; mu, logvar (B, z_dim)
        mu, logvar = self.encode(x, y)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        return self.decode(z, y), mu, logvar

    def hidden_weights(self):
        """The weights that Muon trains: the matrices and kernels in the residual blocks."""
        blocks = [self.encoder_outer, self.encoder_inner, self.decoder_inner, self.decoder_outer]
        return [weight for block in blocks for weight in block.parameters() if weight.ndim > 1]

    def loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> the loss, neg_elbo = recon + kl; metrics."""
        self.check(x, y)
        x = torch.bernoulli(x)
        if y is not None and self.training:  # hide 1 label in 10, to learn p(x) as well
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.n_classes, y)
        logits, mu, logvar = self(x, y)
        # recon = -log p(x | z)
        recon = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        # kl = 1/2 sum_j (mu_j^2 + sigma_j^2 - 1 - log sigma_j^2)
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1).mean()
        neg_elbo = recon + kl
        return neg_elbo, {"neg_elbo": neg_elbo, "recon": recon, "kl": kl}

    @torch.no_grad()
    def bound(self, x, y=None, k=64):
        """Returns iwae, the negative of the importance-weighted bound on log p(x) from k draws, in
        nats/image, and the metrics of loss together with iwae."""
        self.check(x, y)
        x = torch.bernoulli(x)
        _, metrics = self.loss(x, y)  # binarises x again, which changes nothing
        mu, logvar = self.encode(x, y)
        log_w = []
        for _ in range(k):  # one draw at a time: k at once would need k times the memory
            eps = torch.randn_like(mu)
            z = mu + (0.5 * logvar).exp() * eps
            logits = self.decode(z, y)
            nll = F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)
            # log w = log p(z) - log q(z | x) + log p(x | z), whose log(2 pi) cancel
            log_w.append(0.5 * (eps**2 + logvar - z**2).sum(1) - nll)  # (B,)
        # iwae = -log mean_k w
        iwae = math.log(k) - torch.stack(log_w).logsumexp(0).mean()
        return iwae, {**metrics, "iwae": iwae}

    @torch.no_grad()
    def sample(self, n, y=None):
        """Draw n codes z -> images (n, 1, H, W), the means of p(x | z); y (n,) or None."""
        weight = self.label.weight  # for its device and dtype; any would do
        z = torch.randn(n, self.z_dim, device=weight.device, dtype=weight.dtype)
        return self.decode(z, y).sigmoid()

    @torch.no_grad()
    def pictures(self, x):
        """x (N, 1, H, W) images -> {name: pictures}:

        reconstruction  (2 N, 1, H, W): each row of ten images above its reconstructions, from mu
        interpolation   (10 N, 1, H, W): a row from the mu of each image to that of the next (from
                        the last to the first)
        """
        x = torch.bernoulli(x)
        mu, _ = self.encode(x)
        reconstruction = []
        for images, decoded in zip(x.split(10), self.decode(mu).sigmoid().split(10)):
            reconstruction += [images, decoded]
        a = mu[:, None]  # (N, 1, z_dim)
        b = mu.roll(-1, 0)[:, None]  # the next
        w = torch.linspace(0, 1, 10, device=x.device)[:, None]
        z = (a + (b - a) * w).flatten(0, 1)  # (N, 10, z_dim) -> (10 N, z_dim)
        interpolation = self.decode(z).sigmoid()
        return {"reconstruction": torch.cat(reconstruction), "interpolation": interpolation}

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
NAME = "vae"  # of the folder in out/; saved in checkpoints, so that others are refused
Model = VAE
EPOCHS = 30
BATCH_SIZE = 64
LR = 4e-3


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
