"""GAN: a generator turns noise into digits; a discriminator learns to tell them from real ones.

    python gan.py
    # 20 epochs, seed 0: Frechet ratio 10 (real digits: 1; see README.md)

Goodfellow et al. 2014, arXiv:1406.2661; convolutions: DCGAN, Radford et al. 2015, arXiv:1511.06434;
the penalty r1: Mescheder et al. 2018, arXiv:1801.04406. Main differences from DCGAN: layer norm in
the generator and no norm in the discriminator, instead of batch norm; the r1 penalty; in each
network, a convolution at 7 x 7 that keeps the size; optional labels; AdamW without momentum (see
make_optimizers), where DCGAN uses Adam with momentum; evaluation with an exponential moving average
of the weights (EMA) of both networks.

Idea
  The generator G turns random numbers z into an image, a fake. It never sees a digit. The
  discriminator D sees real digits and fakes, and learns to tell which is which. Then G learns from
  D: the gradient of D with respect to the fake's pixels says how they should change to look more
  real, and backpropagation carries that on to G's weights. D and G take turns, one step each per
  batch. If even the best D can do no better than flip a coin, fakes are distributed like the data.
  Sampling takes one pass, and samples are usually sharp, because D would notice a blur.
  The price: we cannot tell how probable a given image is, and no loss tells whether fakes get
  better, as each depends on the opponent. Training is a game of two players: it may go round in
  circles, or one of them may win. Or G may collapse: each fake follows only the slope of D where it
  is, so all may end up at a few kinds of digits, and no slope leads from there to the missing ones.

Maths
  z: z_dim independent draws from N(0, 1). p_data is the distribution of real images x, p_fake that
  of fakes G(z). E is the mean over real x, or over z. D(x) is a logit: D's probability that x is
  real is sigmoid(D(x)).
      d_loss = E[ -log sigmoid(D(x)) ] + E[ -log(1 - sigmoid(D(G(z)))) ] + (gamma / 2) r1
      g_loss = E[ -log sigmoid(D(G(z))) ]
  The first two terms of d_loss are the cross-entropy of a classifier of real images and fakes. With
  s = sigmoid(D(x)), they are the integral over all images x, real or fake, of
      -p_data(x) log s - p_fake(x) log(1 - s).
  D can choose s at each x separately. This is convex in s, with the derivative -p_data(x) / s +
  p_fake(x) / (1 - s). So its minimum is where that is 0:
      s = p_data(x) / (p_data(x) + p_fake(x)).
  D = log(s / (1 - s)), so, leaving the penalty aside, the best D is
      D(x) = log( p_data(x) / p_fake(x) ).
  This D measures how the two distributions differ at x, and is 0 everywhere if and only if they are
  equal. As long as they are not, G follows D uphill, to where data are more probable relative to
  fakes.
  Why does G not minimise E[ log(1 - sigmoid(D(G(z)))) ], the negative of the second term of d_loss?
  Where D recognises a fake, D(G(z)) is very negative. There the slope of log(1 - sigmoid(D)) with
  respect to D, -sigmoid(D), is almost 0 (it saturates), while the slope of the g_loss above, -(1 -
  sigmoid(D)), is almost -1. So a fake that D rejects still gets a gradient.
  r1 = E |dD(x)/dx|^2 over real x: this penalty makes slopes of D around real images costly, so that
  fakes that arrive there stay. Without the penalty, D's slope can push fakes past the data; then D
  learns the opposite slope, which pushes them back, and so on.
  Sampling. Draw z, then x = G(z).
  Labels. With --class-cond, G adds an embedding of the label to z, and D outputs one logit per
  label (and one for "no label", see below); the one for the given label is used. Given a label, the
  best D compares p_data and p_fake among images with this label. So a fake 3 with the label 7 is
  recognised, as no real 7 looks like it, and G has to obey the label. In training, a label is
  replaced with probability 1/10 by "no label", which has an embedding and a logit of its own, so
  that one model works with labels and without.

Shapes
  x (B, 1, 28, 28) in [0, 1] (0 black, 1 white) for the caller, in [-1, 1] for the networks; z (B,
  z_dim); logits of D (B,). size: a multiple of 4, because G doubles the side of a small image
  twice.

What to expect
  The train loss in the log is the sum d_loss (with the penalty) + g_loss; nothing minimises this
  sum. The test figures are those of the averaged weights (EMA), without labels; d_real and d_fake
  are the means of sigmoid(D) over test digits and over fakes. Neither loss keeps falling, because
  the opponent improves, too: judge by the samples. If D could only guess, d_loss would be 2 log 2 =
  1.386 and g_loss log 2 = 0.693, with d_real = d_fake = 0.5. In a run of 20 epochs with seed 0 they
  are near that from the fourth epoch on (1.35, 0.73, 0.51 and 0.48 at the end), while the samples
  go on improving. If d_loss nears 0, G has lost; if fakes look alike, G has collapsed.
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
class Generator(nn.Module):
    """z (B, z_dim), y (B,) -> images (B, 1, H, W) in [-1, 1]."""

    def __init__(self, channels, z_dim, size, n_classes):
        super().__init__()
        self.grid = (size // 4, size // 4, 2 * channels)
        self.label = nn.Embedding(n_classes + 1, z_dim)  # the last entry is "no label"
        nn.init.zeros_(self.label.weight)  # at first labels change nothing
        self.stem = nn.Linear(z_dim, math.prod(self.grid))
        self.mix = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1)
        self.head = nn.ConvTranspose2d(channels, 1, 4, stride=2, padding=1)

    def forward(self, z, y):
        h = self.stem(z + self.label(y)).view(-1, *self.grid)  # (B, 7, 7, 2 * channels)
        for layer in self.mix, self.up, self.head:  # to 7, 14, 28 pixels per side
            h = F.layer_norm(h, h.shape[-1:]).relu()  # (B, H, W, features), over the features
            h = layer(h.movedim(3, 1)).movedim(1, 3)  # convolve (B, features, H, W)
        return h.movedim(3, 1).tanh()  # (B, 1, 28, 28)


class Discriminator(nn.Module):
    """x (B, 1, H, W) in [-1, 1], y (B,) -> logits (B,): is this a real image with this label?"""

    def __init__(self, channels, size, n_classes):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 4, stride=2, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1)
        self.mix = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.head = nn.Linear(2 * channels * (size // 4) ** 2, n_classes + 1)

    def forward(self, x, y):
        for layer in self.stem, self.down, self.mix:  # 14, 7, 7 pixels per side
            x = F.leaky_relu(layer(x), 0.2)
        logits = self.head(x.flatten(1)).float()  # (B, n_classes + 1): an answer for each label
        return logits.gather(1, y[:, None])[:, 0]  # (B,): in row b, the answer for label y[b]


class GAN(nn.Module):
    """Two players, and what each of them minimises.

    channels: feature maps at 14 x 14, twice as many at 7 x 7; z_dim: numbers in z; gamma: d_loss
    contains gamma / 2 * r1; size: pixels per side; n_classes: number of labels, or 0
    """

    def __init__(self, *, channels=32, z_dim=64, gamma=1.0, size=28, n_classes=10):
        super().__init__()
        if min(channels, z_dim) < 1 or n_classes < 0 or not 0 <= gamma < math.inf:
            raise ValueError(
                "channels and z_dim must be at least 1, gamma (finite) and n_classes at least 0"
            )
        if size < 4 or size % 4 != 0:
            raise ValueError(f"size must be a multiple of 4, not {size}")
        self.size = size
        self.n_classes = n_classes
        self.z_dim = z_dim
        self.gamma = gamma
        self.generator = Generator(channels, z_dim, size, n_classes)
        self.discriminator = Discriminator(channels, size, n_classes)

    def labels(self, n, y):
        """y (n,) itself, or n times "no label" if y is None."""
        if y is None:
            y = torch.full((n,), self.n_classes, device=self.generator.label.weight.device)
        return y

    def forward(self, y):
        """Draw a fake (B, 1, H, W) in [-1, 1] for each label in y (B,)."""
        weight = self.generator.label.weight
        z = torch.randn(len(y), self.z_dim, device=weight.device, dtype=weight.dtype)
        return self.generator(z, y)

    def d_loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> the discriminator's loss, metrics."""
        self.check(x, y)
        y = self.labels(len(x), y)
        if self.training:  # hide 1 label in 10, to learn to judge without labels, too
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.n_classes, y)
        with torch.no_grad():  # it is not the generator's turn
            x_fake = self(y)
        x = (2 * x - 1).requires_grad_()
        real = self.discriminator(x, y)
        fake = self.discriminator(x_fake, y)
        # r1 = E |dD(x)/dx|^2. D(x_b) depends on x_b alone, so row b of the gradient of sum_b D(x_b)
        # is the gradient of D(x_b). create_graph, because r1 itself is differentiated later.
        slope = torch.autograd.grad(real.sum(), x, create_graph=True)[0]
        r1 = slope.square().sum() / len(x)
        # -log sigmoid(a) = softplus(-a) and -log(1 - sigmoid(a)) = softplus(a), where
        # softplus(a) = log(1 + exp(a)). Written with sigmoid, this would be infinite for large |a|,
        # where sigmoid(a) is rounded to 0 or 1.
        loss = F.softplus(-real).mean() + F.softplus(fake).mean() + self.gamma / 2 * r1
        d_real = real.detach().sigmoid().mean()
        d_fake = fake.detach().sigmoid().mean()
        return loss, {"d_loss": loss.detach(), "d_real": d_real, "d_fake": d_fake}

    def g_loss(self, x, y=None):
        """-> the generator's loss on len(x) fakes with labels y (B,) or None; metrics."""
        y = self.labels(len(x), y)
        if self.training:  # hide 1 label in 10, to learn to draw without labels, too
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.n_classes, y)
        # the gradient goes through the discriminator, whose weights stay as they are
        loss = F.softplus(-self.discriminator(self(y), y)).mean()
        return loss, {"g_loss": loss.detach()}

    def loss(self, x, y=None):
        """The sum of both losses, and all metrics, for evaluation; train_step takes one at a time.

        It needs gradients to be enabled, for r1.
        """
        d_loss, d_metrics = self.d_loss(x, y)
        g_loss, g_metrics = self.g_loss(x, y)
        return d_loss + g_loss, {**d_metrics, **g_metrics}

    @torch.no_grad()
    def sample(self, n, y=None):
        """Draw n images (n, 1, H, W) in [0, 1]; y (n,) labels or None."""
        return (self(self.labels(n, y)) + 1) / 2

    @torch.no_grad()
    def pictures(self, x):
        """x (N, 1, H, W) images -> {name: pictures}:

        interpolation  (10 N, 1, H, W): N rows, each from one fake to the next; of x, only N matters
        """
        a = torch.randn(len(x), 1, self.z_dim, device=x.device)
        b = a.roll(-1, 0)  # the z of the next fake
        w = torch.linspace(0, math.pi / 2, 10, device=x.device)[:, None]  # (10, 1)
        z = w.cos() * a + w.sin() * b  # (N, 10, z_dim), ~ N(0, 1), as cos^2 + sin^2 = 1
        fakes = self.generator(z.flatten(0, 1), self.labels(10 * len(x), None))
        return {"interpolation": (fakes + 1) / 2}

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
NAME = "gan"  # of the folder in out/; saved in checkpoints, so that others are refused
Model = GAN
EPOCHS = 20
BATCH_SIZE = 64
LR = 3e-3


def learning_rate(step, total_steps, peak):
    """The rate at a step: it rises to the peak over the first 2 %, then falls linearly to 0.

    step: from 1 to total_steps; 0 would be reached at total_steps + 1
    """
    warmup = max(1, round(0.02 * total_steps))
    if step <= warmup:
        return peak * step / warmup
    return peak * (total_steps + 1 - step) / (total_steps + 1 - warmup)


def make_optimizers(model):
    """An optimizer for each player, without momentum (the first of the betas is 0), which would
    go on in directions that were right against the opponent as it was some steps ago.

    train_epoch sets their learning rates.
    """
    return [
        torch.optim.AdamW(model.discriminator.parameters(), betas=(0.0, 0.99), fused=True),
        torch.optim.AdamW(model.generator.parameters(), betas=(0.0, 0.99), fused=True),
    ]


def train_step(model, optimizers, autocast, x, y):
    """Update the discriminator, then the generator, each once, on images x (B, 1, H, W) in [0, 1]
    and labels y (B,) or None.

    Returns the sum of their losses.
    """
    d_optimizer, g_optimizer = optimizers

    d_optimizer.zero_grad()
    with autocast:
        d_loss, _ = model.d_loss(x, y)
    # gradients for the weights alone: x requires one, too, for r1, but nobody needs it now
    d_loss.backward(inputs=list(model.discriminator.parameters()))
    d_optimizer.step()

    g_optimizer.zero_grad()
    # A block of its own: until a block ends, autocast keeps its bfloat16 copies of the weights. In
    # older versions of torch, those made under no_grad (the generator's, in d_loss) would be used
    # again and pass on no gradient.
    with autocast:
        g_loss, _ = model.g_loss(x, y)
    g_loss.backward(inputs=list(model.generator.parameters()))  # not for the discriminator
    g_optimizer.step()
    return (d_loss + g_loss).detach()


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
