"""GAN: a generator turns noise into digits; a discriminator learns to tell them from real ones.

    python gan.py    # 20 epochs, 37 minutes on two CPU cores

Idea
  The generator G turns random numbers z into an image, a fake. It never sees a digit. The
  discriminator D sees real digits and fakes, and learns to tell which is which. G learns from D:
  the gradient of D with respect to the fake's pixels says how they should change to look more real,
  and backpropagation carries that on to the weights of G. D and G take turns, one step each per
  batch.
  If even the best possible D can do no better than flip a coin, fakes are distributed like the
  data.
  Sampling takes one pass, and samples are usually sharp, because D would notice a blur.
  The price: nothing says how probable an image is, and no loss says whether fakes get better, as
  each depends on the opponent. Training may go round in circles, or one player may win. Or G may
  collapse: nothing compares fakes with each other, so all may end up as a few kinds of digits.

      z ~ N(0, 1) ---> G ---> fake --.
                                     +---> D ---> logit: real or fake?
                         real x -----'
      d_loss moves D: up on x, down on G(z)      g_loss moves G: D up on G(z)

Maths
  D(x) is a logit: D's probability that x is real is sigmoid(D(x)). E is the mean over x, or over z.
      d_loss = E[ -log sigmoid(D(x)) ] + E[ -log(1 - sigmoid(D(G(z)))) ] + (gamma / 2) r1
      g_loss = E[ -log sigmoid(D(G(z))) ]
  The best D, without r1. The first two terms of d_loss are the cross-entropy of a classifier. At an
  image x, with s = sigmoid(D(x)), they contribute -p_data(x) log s - p_fake(x) log(1 - s), which is
  smallest at
      s = p_data(x) / (p_data(x) + p_fake(x)),   that is, D(x) = log( p_data(x) / p_fake(x) ).
  It is 0 everywhere if and only if the two distributions are equal. Where digits are three times as
  common as fakes, s = 0.75. G follows D uphill, to where digits are more common relative to fakes.
  Why this g_loss? G could also minimise the negative of the second term of d_loss,
  E[ log(1 - sigmoid(D(G(z)))) ]. But that saturates: its slope vanishes where G needs it most, on a
  fake that D recognises.
      slope with respect to D at D =         -5         0         5
      of log(1 - sigmoid(D))             -0.007      -0.5    -0.993
      of g_loss, -log sigmoid(D)         -0.993      -0.5    -0.007
  r1 = E |dD(x)/dx|^2, for real x in [-1, 1], penalises steep slopes at real images, so fakes that
  get there stay there. Without it, D's slope carries them past the data; then D learns the opposite
  slope, which carries them back, and so on.
  Sampling. Draw z, then x = G(z): 100 images in 0.02 seconds.
  Labels. With --class-cond, G adds an embedding of the label to z, and D has one logit per label. D
  then compares p_data and p_fake among images with this label: a fake 3 labelled 7 is recognised,
  so G has to obey the label.

What to expect
  Neither loss keeps falling, as the opponent improves too: judge by the samples. If D can only
  toss a coin, d_loss is 2 log 2 = 1.386, g_loss is log 2 = 0.693, and d_real and d_fake, the means
  of sigmoid(D) over digits and fakes, are 0.5. Here they end at 1.37, 0.72, 0.51 and 0.49. After
  the first epoch they are near that already, after the second D is ahead (d_loss 0.63), then it is
  even again, while samples go on improving. If d_loss stays near 0, D has won; if fakes look alike,
  G has collapsed. The train loss in the log is d_loss + g_loss, which nothing minimises.

Differences from the papers (Goodfellow et al. 2014, arXiv:1406.2661; with convolutions: DCGAN,
Radford et al. 2015, arXiv:1511.06434)
  - layer norm in G, no normalisation in D; DCGAN has batch norm in both
  - the penalty r1 (Mescheder et al. 2018, arXiv:1801.04406)
  - one more convolution at 7 x 7 in each network, and one at 28 x 28 in G; AdamW without momentum
  - tested with an exponential moving average of the weights (EMA) of both players
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
def norm_relu(h):
    """Normalise h (B, C, H, W) over C, then ReLU."""
    h = h.permute(0, 2, 3, 1)  # (B, H, W, C)
    return F.layer_norm(h, h.shape[-1:]).relu().permute(0, 3, 1, 2)


class Generator(nn.Module):
    """z (B, z_dim), y (B,) or None -> images (B, 1, H, W) in [-1, 1]."""

    def __init__(self, channels, z_dim, size, n_classes):
        super().__init__()
        self.grid = (size // 4, size // 4, 4 * channels)
        self.stem = nn.Linear(z_dim, math.prod(self.grid))
        self.mix = nn.Conv2d(4 * channels, 4 * channels, 3, padding=1)
        self.up14 = nn.ConvTranspose2d(4 * channels, 2 * channels, 4, stride=2, padding=1)
        self.up28 = nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1)
        self.head = nn.Conv2d(channels, 1, 3, padding=1)
        if n_classes > 0:
            self.label = nn.Embedding(n_classes, z_dim)
            nn.init.zeros_(self.label.weight)  # at first labels change nothing

    def forward(self, z, y):
        if y is not None:
            z = z + self.label(y)
        h = self.stem(z).view(-1, *self.grid).permute(0, 3, 1, 2)  # (B, 4 C, 7, 7)
        h = self.mix(norm_relu(h))  # (B, 4 C, 7, 7)
        h = self.up14(norm_relu(h))  # (B, 2 C, 14, 14)
        h = self.up28(norm_relu(h))  # (B, C, 28, 28)
        h = self.head(norm_relu(h))  # (B, 1, 28, 28)
        return h.tanh()


class Discriminator(nn.Module):
    """x (B, 1, H, W) in [-1, 1], y (B,) or None -> logits (B,): is x real (and of class y)?"""

    def __init__(self, channels, size, n_classes):
        super().__init__()
        self.stem = nn.Conv2d(1, 2 * channels, 4, stride=2, padding=1)
        self.down = nn.Conv2d(2 * channels, 4 * channels, 4, stride=2, padding=1)
        self.mix = nn.Conv2d(4 * channels, 4 * channels, 3, padding=1)
        self.head = nn.Linear(4 * channels * (size // 4) ** 2, max(n_classes, 1))

    def forward(self, x, y):
        h = F.leaky_relu(self.stem(x), 0.2)  # (B, 2 C, 14, 14)
        h = F.leaky_relu(self.down(h), 0.2)  # (B, 4 C, 7, 7)
        h = F.leaky_relu(self.mix(h), 0.2)  # (B, 4 C, 7, 7)
        logits = self.head(h.flatten(1)).float()  # one for each label, or a single one
        if y is None:
            return logits[:, 0]
        return logits.gather(1, y[:, None])[:, 0]  # (B,): in row b, that of label y[b]


class GAN(nn.Module):
    """Two players, and what each of them minimises.

    channels: feature maps at 28 x 28, doubled at 14 x 14 and again at 7 x 7; z_dim: numbers in z;
    gamma: d_loss contains gamma / 2 * r1; size: pixels per side; n_classes: number of labels, or 0
    """

    def __init__(self, *, channels=16, z_dim=64, gamma=1.0, size=28, n_classes=0):
        super().__init__()
        if min(channels, z_dim) < 1:
            raise ValueError("channels and z_dim must be at least 1")
        if size < 4 or size % 4 != 0:
            raise ValueError(f"size must be a multiple of 4, not {size}")
        self.size = size
        self.n_classes = n_classes
        self.z_dim = z_dim
        self.gamma = gamma
        self.generator = Generator(channels, z_dim, size, n_classes)
        self.discriminator = Discriminator(channels, size, n_classes)

    def forward(self, n, y=None):
        """Draw n fakes (n, 1, H, W) in [-1, 1], with labels y (n,) or None."""
        z = torch.randn(n, self.z_dim, device=self.generator.stem.weight.device)
        return self.generator(z, y)

    def d_loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> the discriminator's loss, metrics."""
        if x.shape[1:] != (1, self.size, self.size):
            raise ValueError(f"x must be (B, 1, {self.size}, {self.size}), not {tuple(x.shape)}")
        self.check_labels(len(x), y)
        if x.device.type == "cpu" and not (x.min() >= 0 and x.max() <= 1):
            raise ValueError("x must lie in [0, 1]")
        with torch.no_grad():  # it is not the generator's turn
            x_fake = self(len(x), y)
        fake = self.discriminator(x_fake, y)
        with torch.enable_grad():  # r1 needs a gradient in evaluation, too
            x = (2 * x - 1).requires_grad_()
            real = self.discriminator(x, y)
            # r1 = E |dD(x)/dx|^2. D(x_b) depends on x_b alone, so row b of the gradient of
            # sum_b D(x_b) is dD(x_b)/dx_b. create_graph, as r1 itself is differentiated later.
            slope = torch.autograd.grad(real.sum(), x, create_graph=True)[0]
            r1 = slope.square().sum() / len(x)
        # -log sigmoid(a) = softplus(-a) and -log(1 - sigmoid(a)) = softplus(a), where
        # softplus(a) = log(1 + exp(a)), computed without overflow
        loss = F.softplus(-real).mean() + F.softplus(fake).mean() + self.gamma / 2 * r1
        metrics = {"d_loss": loss, "d_real": real.sigmoid().mean(), "d_fake": fake.sigmoid().mean()}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def g_loss(self, n, y=None):
        """-> the generator's loss on n fakes with labels y (n,) or None, metrics."""
        self.check_labels(n, y)
        # the gradient goes through the discriminator, which train_step leaves as it is
        loss = F.softplus(-self.discriminator(self(n, y), y)).mean()
        return loss, {"g_loss": loss.detach()}

    def loss(self, x, y=None):
        """The sum of both losses, and all metrics, for evaluation. (Minimising the sum would also
        train the discriminator to be fooled.)"""
        if self.training:
            raise ValueError("GAN.loss is for evaluation: train with d_loss and g_loss in turn")
        d_loss, d_metrics = self.d_loss(x, y)
        g_loss, g_metrics = self.g_loss(len(x), y)
        return d_loss + g_loss, {**d_metrics, **g_metrics}

    @torch.no_grad()
    def sample(self, n, y=None):
        """Draw n images (n, 1, H, W) in [0, 1]; y (n,) labels or None."""
        self.check_labels(n, y)
        return (self(n, y) + 1) / 2

    @torch.no_grad()
    def pictures(self, x, y=None):
        """x (N, 1, H, W) images, y (N,) or None -> {name: pictures}:

        interpolation  (10 N, 1, H, W): a row from each of N random z to the next, with label y if
                       there are labels; of x, only the number N is used
        """
        a = torch.randn(len(x), 1, self.z_dim, device=x.device)
        b = a.roll(-1, 0)  # the z of the next fake
        w = torch.linspace(0, math.pi / 2, 10, device=x.device)[:, None]  # (10, 1)
        z = w.cos() * a + w.sin() * b  # (N, 10, z_dim), ~ N(0, 1), as cos^2 + sin^2 = 1
        if y is not None:
            y = y.repeat_interleave(10)
        return {"interpolation": (self.generator(z.flatten(0, 1), y) + 1) / 2}

    def check_labels(self, n, y):
        """Raise ValueError unless y holds n labels, or is None in a model without labels."""
        n_labels = 0 if y is None else len(y)
        expected = n if self.n_classes > 0 else 0
        if n_labels != expected:
            raise ValueError(
                f"y must hold {expected} labels, not {n_labels}: n_classes is {self.n_classes}"
            )


# ---------------------------------------------------------------- recipe
NAME = "gan"  # names the folder in out/ and marks checkpoints
Model = GAN
EPOCHS = 20
BATCH_SIZE = 64
LR = 3e-3


def make_optimizers(model, lr):
    """An optimizer for each player, without momentum (the first of the betas is 0), which would go
    on in directions that were right against the opponent as it was some steps ago."""
    optimizers = []
    for player in model.discriminator, model.generator:
        trained = [weight for weight in player.parameters() if weight.requires_grad]
        adamw = torch.optim.AdamW(trained, lr, betas=(0.0, 0.99), weight_decay=0.01, fused=True)
        optimizers.append(adamw)
    return optimizers


def train_step(model, optimizers, autocast, x, y):
    """Update the discriminator, then the generator, each once, on images x (B, 1, H, W) in [0, 1]
    and labels y (B,) or None.

    Returns the sum of their losses.
    """
    d_optimizer, g_optimizer = optimizers

    d_optimizer.zero_grad()
    with autocast:
        d_loss, _ = model.d_loss(x, y)
    # inputs: gradients for the weights of this player alone
    d_loss.backward(inputs=d_optimizer.param_groups[0]["params"])
    d_optimizer.step()

    g_optimizer.zero_grad()
    with autocast:
        g_loss, _ = model.g_loss(len(x), y)
    g_loss.backward(inputs=g_optimizer.param_groups[0]["params"])
    g_optimizer.step()
    return (d_loss + g_loss).detach()


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
