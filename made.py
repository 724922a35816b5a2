"""MADE (masked autoencoder for distribution estimation): masks let one pass predict all pixels.

    python made.py    # 30 epochs, 25 minutes on two CPU cores: test nll 85.5

Idea
  A generative model can draw new images, here handwritten digits of 28 x 28 = 784 pixels. Many can
  also say how probable an image is. Both become easy if we treat an image as a sequence of pixels:
  predict the first pixel, then the second given the first, and so on: an autoregressive model.
  So we want 784 predictions. A network with 784 inputs and 784 outputs could make them all at once,
  but it would cheat: output i would copy pixel i. MADE removes connections so that nothing leads to
  output i from pixel i or any later one. One pass is only a few matrix products, so of the six
  autoregressive scripts this one trains fastest.
  The price: unlike a convolution, it shares no weights between places in the image, so it needs 8
  million of them (half are masked), where pixelcnn.py has 120,000.

  Four pixels, three hidden units, 1 = connected. In brackets, degrees: how many leading pixels a
  unit may depend on. A unit may see units of equal or lower degree:

              x0  x1  x2  x3                    h1  h2  h3
              (1) (2) (3) (4)                   (1) (2) (3)
      h1 (1)   1   .   .   .          out0 (0)   .   .   .      a constant
      h2 (2)   1   1   .   .          out1 (1)   1   .   .      sees h1, so x0
      h3 (3)   1   1   1   .          out2 (2)   1   1   .      sees h1, h2, so x0, x1
                                      out3 (3)   1   1   1      sees x0, x1, x2

Maths
  Let x_<i stand for pixels 0 to i - 1, row by row. The chain rule holds for any distribution:
      p(x) = p(x_0) p(x_1 | x_0) p(x_2 | x_0, x_1) ... = prod_i p(x_i | x_<i)
  Each factor sums to 1 over the two values of x_i, so p sums to 1 over all images. Output i is a
  logit: p(x_i = 1 | x_<i) = sigmoid(logits_i) = 1 / (1 + exp(-logits_i)). The loss
      nll = -log p(x) = -sum_i log p(x_i | x_<i)
  is a sum of binary cross-entropies, and exact, not estimated. Its mean over the data
  distribution p_data is
      E[-log p(x)] = E[-log p_data(x)] + E[log(p_data(x) / p(x))] = entropy + KL(p_data || p).
  The entropy does not depend on the model. The KL divergence is 0 if p equals p_data, or positive.
  Network. Degrees never fall along a path, so output i sees nothing but x_<i, through any number of
  layers. The hidden units have the degrees 1 to 783, about two units each. After the first layer
  comes a residual block, h + f(h), where f is ReLU, masked layer, ReLU, masked layer. Unit k of
  f(h) has the degree of unit k of h, to which it is added. Then come a ReLU and the outputs. One
  more masked layer, `direct`, leads from the pixels straight to the outputs.
  Sampling. A pixel must be drawn before the next can be predicted: 784 steps. The naive loop runs
  a full pass in each, and uses one of its outputs. But once x_i is drawn, the units of degree i + 1
  can be computed, and never change again: in the figure, x0 gives h1, and h1 gives out1. Units are
  sorted by degree, so a step computes one slice of each layer (`part`), without the masked half,
  and keeps it in `cache`. All 784 steps together take less arithmetic than one pass: 0.3 seconds
  for 100 images. Each pixel is drawn at random. Always taking the likelier value gives a blank
  image: as long as every pixel so far is black, black is the likelier value, so no stroke would
  ever start. The first rows can be given, as `top`.
  Binarisation. loss() takes grey levels, from 0 (black) to 1 (white), and draws each pixel: 0.7
  becomes 1 with probability 0.7, anew each time an image is used.

What to expect
  nll is in nats (natural logarithms) per image; bpd = nll / (784 log 2), bits per pixel.
  Probability 1/2 for every pixel gives 784 log 2 = 543; predicting each pixel from how often it is
  white in training images gives 206; this script 85.5; the best published autoregressive model
  with a single pixel order 78.6. A figure far below that means a leak: outputs see their own
  pixels. Even a model that knew the grey levels would have 45.5: it cannot know the coin flips.

Differences from the paper (Germain et al. 2015, arXiv:1502.03509)
  - residual blocks (Nash and Durkan 2019, arXiv:1904.05626) with dropout
  - degrees spread evenly and sorted, not random; one order of the pixels, not an average of several
  - outputs have degrees one lower, so that one rule serves all layers
  - with --class-cond, an embedding of the label is added to the first layer: p(x | label)
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
class MaskedLinear(nn.Linear):
    """A linear layer in which output k sees input j if, and only if, degree j <= degree k."""

    def __init__(self, in_degree, out_degree):  # both in ascending order
        super().__init__(len(in_degree), len(out_degree))
        mask = in_degree <= out_degree[:, None]  # (outputs, inputs), the shape of weight
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)

    def part(self, x, rows):
        """The outputs `rows` (a slice) from x (B, K), the first K inputs.

        The caller passes exactly the inputs that these outputs may see, so no mask is needed.
        """
        return F.linear(x, self.weight[rows, : x.shape[1]], self.bias[rows])


class ResidualBlock(nn.Module):
    """h + last(dropout(relu(first(relu(h))))): unit k sees the same pixels as unit k of h."""

    def __init__(self, degree):
        super().__init__()
        self.first = MaskedLinear(degree, degree)
        self.last = MaskedLinear(degree, degree)
        nn.init.zeros_(self.last.weight)  # at first the block adds no more than a bias

    def forward(self, h):
        x = self.first(h.relu()).relu()
        x = F.dropout(x, 0.2, self.training)  # in training: less overfitting
        return h + self.last(x)


class MADE(nn.Module):
    """A masked residual network from all pixels to the logits of all pixels.

    hidden: units per layer; n_layer: residual blocks; size: pixels per side; n_classes: number
    of labels, or 0
    """

    def __init__(self, *, hidden=1568, n_layer=1, size=28, n_classes=0):
        super().__init__()
        if hidden < 1:
            raise ValueError("hidden must be at least 1")
        self.size = size
        self.n_classes = n_classes
        pixel = torch.arange(size**2)
        # evenly from 1 to 783: 1, 1, 1, 2, 2, 3, 3, ... for 1568 units and 784 pixels
        degree = 1 + torch.arange(hidden) * (size**2 - 1) // hidden
        # n_units[i]: number of units of degree i or less
        self.n_units = (degree <= pixel[:, None]).sum(1).tolist()
        self.stem = MaskedLinear(pixel + 1, degree)
        self.head = MaskedLinear(degree, pixel)
        self.direct = MaskedLinear(pixel + 1, pixel)
        self.blocks = nn.ModuleList(ResidualBlock(degree) for _ in range(n_layer))
        if n_classes > 0:
            self.label = nn.Embedding(n_classes, hidden)
            nn.init.zeros_(self.label.weight)  # at first labels change nothing

    def forward(self, x, y=None):  # x (B, 1, H, W) in {0, 1} -> logits (B, 1, H, W)
        pixels = x.flatten(1)  # (B, H * W)
        h = self.stem(pixels)  # (B, hidden)
        if y is not None:
            h = h + self.label(y)
        for block in self.blocks:
            h = block(h)
        return (self.direct(pixels) + self.head(h.relu())).view_as(x).float()

    def new_cache(self, x):
        """Zeros, to be filled by logits_at with what goes into each block's layers and the head."""
        zeros = x.new_zeros(2 * len(self.blocks) + 1, len(x), self.head.in_features)
        # blocks (n_layer, 2, B, hidden): what goes into first and last of each block
        return {"blocks": zeros[:-1].unflatten(0, (-1, 2)), "head": zeros[-1]}

    def logits_at(self, x, y, i, cache):
        """Logits (B,) of pixel i given those before it. Call it for i = 0, 1, 2, ... in turn.

        Adds the units of degree i to cache, layer by layer. They see pixels 0 to i - 1 and, in the
        previous layer, the units of degree i or less, all of which are known by then.
        """
        pixels = x.flatten(1)[:, :i]  # (B, i)
        known = self.n_units[i]  # number of units known after this step
        new = slice(self.n_units[i - 1] if i > 0 else 0, known)
        h = self.stem.part(pixels, new)  # (B, new): the new units alone
        if y is not None:
            h = h + self.label(y)[:, new]
        # first_in, last_in (B, hidden) are views: writing to them fills the cache
        for block, (first_in, last_in) in zip(self.blocks, cache["blocks"]):
            first_in[:, new] = h.relu()
            last_in[:, new] = block.first.part(first_in[:, :known], new).relu()
            h = h + block.last.part(last_in[:, :known], new)
        cache["head"][:, new] = h.relu()
        out = slice(i, i + 1)
        logits = self.direct.part(pixels, out) + self.head.part(cache["head"][:, :known], out)
        return logits[:, 0].float()

    def loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> mean of -log p(x) in nats/image; metrics."""
        if x.shape[1:] != (1, self.size, self.size):
            raise ValueError(f"x must be (B, 1, {self.size}, {self.size}), not {tuple(x.shape)}")
        self.check_labels(len(x), y)
        x = torch.bernoulli(x)
        logits = self(x, y)
        # nll = -sum_i log p(x_i | x_<i)
        nll = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        bpd = nll / (x[0].numel() * math.log(2))
        return nll, {"nll": nll.detach(), "bpd": bpd.detach()}

    @torch.no_grad()
    def sample(self, n, y=None, top=None):
        """Draw n binary images (n, 1, H, W), each pixel given those before it.

        y:   (n,) labels, or None
        top: (n, 1, rows, W) in [0, 1], the first rows, or None to draw them as well
        """
        self.check_labels(n, y)
        x = torch.zeros(n, 1, self.size, self.size, device=self.head.weight.device)
        n_given = 0
        if top is not None:
            x[:, :, : top.shape[2]] = torch.bernoulli(top)
            n_given = top[0].numel()
        pixels = x.view(n, -1)  # (n, H * W), the same memory
        cache = self.new_cache(x)
        for i in range(self.size**2):
            logits = self.logits_at(x, y, i, cache)  # (n,); for given pixels, it only fills cache
            if i >= n_given:
                pixels[:, i] = torch.bernoulli(logits.sigmoid())
        return x

    @torch.no_grad()
    def pictures(self, x, y=None):
        """x (N, 1, H, W) images, y (N,) or None -> {name: pictures}:

        sampling    (frames, N, 1, H, W): N images as they are drawn, half a row per frame
        completion  (60, 1, H, W): ten images, their upper halves, four completions of each
        """
        half = self.size // 2  # half the pixels of a row, and half the rows
        index = torch.arange(self.size**2, device=x.device).view(self.size, self.size)
        samples = self.sample(len(x), y)
        steps = range(0, self.size**2 + half, half)  # the last frame shows the whole image
        frames = [samples.where(index < n_drawn, 0.5) for n_drawn in steps]  # grey: not drawn yet
        x = torch.bernoulli(x[:10])
        upper = x.where(index < half * self.size, 0.5)
        top = x[:, :, :half].repeat(4, 1, 1, 1)
        if y is not None:
            y = y[:10].repeat(4)
        completion = torch.cat([x, upper, self.sample(len(top), y, top)])
        return {"sampling": torch.stack(frames), "completion": completion}

    def check_labels(self, n, y):
        """Raise ValueError unless y holds n labels, or is None in a model without labels."""
        n_labels = 0 if y is None else len(y)
        expected = n if self.n_classes > 0 else 0
        if n_labels != expected:
            raise ValueError(
                f"y must hold {expected} labels, not {n_labels}: n_classes is {self.n_classes}"
            )


# ---------------------------------------------------------------- recipe
NAME = "made"  # names the folder in out/ and marks checkpoints
Model = MADE
EPOCHS = 30
BATCH_SIZE = 128
LR = 5e-3


def make_optimizers(model, lr):
    """AdamW for all weights."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return [torch.optim.AdamW(trained, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]


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
