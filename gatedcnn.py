"""Gated PixelCNN: one stack of convolutions for the rows above, one for the pixel's own row.

    python gatedcnn.py    # 8 epochs, 101 minutes on two CPU cores: test nll 79.2

Read made.py first (predicting pixel by pixel, the loss nll, binarisation), then pixelcnn.py.

Idea
  Why does PixelCNN have a blind spot? Let X be the pixel to predict, and P the pixel one row up and
  four to the right, out of reach of a kernel 7 wide. P comes before X. But its information would
  have to move left within the row of P, and within a row it can only move right, as every kernel
  reads to the left. The row of X has to be read like this. The rows above do not: all of them come
  before X.
  So each job gets its own stack of layers. The vertical stack v reads the rows above, to both
  sides. The horizontal stack h reads the row of X, to the left, and takes in the features of v at
  each layer. h predicts. Nothing goes from h to v, so v never learns about the row being predicted.
  Three more ideas. Gates: a layer computes a value in (-1, 1) and a gate in (0, 1) for each
  channel, and passes on their product, so it can pass, weaken or block each channel. Skips: each
  layer of h also feeds the output directly. Dilation: a kernel reads places that are 1, 2 or 4
  pixels apart, which reaches further at the same cost.

      v reads rows above X, to both sides:         h reads the row of X, to the left:
          v v v v v
          v v v v v
          v v v v v
              X                                            h h h X

      one layer     v ----> vertical ---+------------> gate ----> v
                                        | v_to_h
                    h -+--> horizontal -+--> gate --> out --+--> skip, to the head
                       '------------------------------> + <-'
                                                        '-------> h

Maths
      nll = -sum_i log p(x_i | x_<i),   p(x_i = 1 | x_<i) = sigmoid(logits_i)
  A layer computes, with activate(pair) = tanh(first half of the channels) * sigmoid(second half),
      pair = vertical(v)
      change, skip = out(activate(horizontal(h) + v_to_h(pair)))
      v <- activate(pair),   h <- h + change
  vertical and horizontal are convolutions; v_to_h and out are linear layers, applied to each
  pixel's vector alone. At the end, logits = head(relu(h + sum of skips)).
  No masks. The first convolutions, the stems, read the image moved down by one row, for v, and
  right by one pixel, for h. This cannot leak: after the shift, v anywhere in the row of X depends
  only on rows above, and h at X on these and on pixels to the left of X. From then on, kernels read
  their own place and those above and to both sides (v), or to the left (h). Learned vectors for row
  and column are added to the first v, and a linear function of that v to the first h.
  Receptive field. The stem of v reaches 4 rows up and 3 pixels to either side. The four layers have
  dilations 1, 2, 4 and 1, and reach another 2, 4, 8 and 2. So X is predicted from 20 rows above, 19
  pixels to either side, and from 19 pixels to the left in its own row, with no blind spot between.
  Sampling. The naive loop runs a full pass for each of 784 pixels, and uses one logit of it. Here
  each row of v is computed once, as soon as the rows above are drawn (`update_v`), and h once per
  pixel (`logits_at`). `cache` keeps what later steps read. All 784 steps together take about as
  much arithmetic as one pass. 100 images take 2.1 seconds.

What to expect
  79.2 nats per image. A test nll far below 78 means a leak: check how forward moves the image. It
  does not overfit yet: the training loss stays above the test nll.

Differences from the paper (van den Oord et al. 2016, arXiv:1606.05328)
  - binary pixels, not 256 levels; skips (as in WaveNet) and dilations; row and column vectors
  - fast sampling (Ramachandran et al. 2017, arXiv:1704.06001)
  - with --class-cond, an embedding of the label is added to v at the start, not in each gate
  - matrices and kernels of the blocks are trained with Muon (see recipe)
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
def activate(pair):
    """pair (..., 2 C): C values, then C gates -> tanh(value) * sigmoid(gate) (..., C)."""
    value, gate = pair.chunk(2, dim=-1)
    # tanh and sigmoid are faster on contiguous memory
    return value.contiguous().tanh() * gate.contiguous().sigmoid()


class GatedBlock(nn.Module):
    """One layer of the vertical stack v and of the horizontal stack h, which receives v's features.

    The places that a kernel reads are dilation pixels apart. With pad = k // 2 * dilation, v looks
    at its own row and up to pad rows above, up to pad pixels to both sides; h looks at its own
    pixel and up to pad pixels to its left. Nothing leaks: the image moved down for v, right for h.
    """

    def __init__(self, channels, k, dilation):
        super().__init__()
        self.pad = k // 2 * dilation
        self.vertical = nn.Conv2d(channels, 2 * channels, (k // 2 + 1, k), dilation=dilation)
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, k // 2 + 1), dilation=dilation)
        self.v_to_h = nn.Linear(2 * channels, 2 * channels)
        self.out = nn.Linear(channels, 2 * channels)

    def forward_v(self, padded_v):
        """padded_v (B, pad + H, pad + W + pad, C) -> the next v (B, H, W, C), and v's contribution
        to h, a linear function of the pair before gating (B, H, W, 2 C)."""
        pair = self.vertical(padded_v.movedim(3, 1)).movedim(1, 3)
        return activate(pair), self.v_to_h(pair)

    def forward_h(self, padded_h, from_v):
        """padded_h (B, H, pad + W, C), the contribution of v (B, H, W, 2 C) -> the change of h, and
        the skip, which goes to the head, both (B, H, W, C)."""
        pair = self.horizontal(padded_h.movedim(3, 1)).movedim(1, 3) + from_v
        return self.out(activate(pair)).chunk(2, dim=-1)


class GatedPixelCNN(nn.Module):
    """A vertical and a horizontal stack of gated convolutions over the image.

    channels: length of a pixel's vector in each stack; n_layer: blocks; kernel: side k of the
    kernels, odd, at least 3; size: pixels per side; n_classes: number of labels, or 0
    """

    def __init__(self, *, channels=32, n_layer=4, kernel=5, size=28, n_classes=0):
        super().__init__()
        if min(channels, n_layer) < 1:
            raise ValueError("channels and n_layer must be at least 1")
        if kernel < 3 or kernel % 2 != 1:
            raise ValueError("kernel must be odd and at least 3")
        self.size = size
        self.n_classes = n_classes
        self.stem_v = nn.Conv2d(1, channels, (4, 7))
        self.stem_h = nn.Conv2d(1, channels, (1, 3))
        self.stem_to_h = nn.Linear(channels, channels)
        self.head = nn.Linear(channels, 1)
        self.row = nn.Parameter(0.02 * torch.randn(size, 1, channels))
        self.col = nn.Parameter(0.02 * torch.randn(1, size, channels))
        dilations = [2 ** (b % 3) for b in range(n_layer)]  # 1, 2, 4, then again 1, 2, 4
        self.blocks = nn.ModuleList(GatedBlock(channels, kernel, d) for d in dilations)
        if n_classes > 0:
            self.label = nn.Embedding(n_classes, channels)
            nn.init.zeros_(self.label.weight)  # at first labels change nothing

    def embed_v(self, padded, pos_emb, y):
        """The first v (B, H, W, C), from padded pixels (B, 1, 3 + H, 3 + W + 3), pos_emb (H, W, C),
        which says where they are, and y (B,) or None."""
        v = self.stem_v(padded).movedim(1, 3)
        # type_as: under autocast v is bfloat16, and adding float32 would make it float32
        v = v + pos_emb.type_as(v)
        if y is not None:
            v = v + self.label(y)[:, None, None].type_as(v)
        return v

    def forward(self, x, y=None):  # x (B, 1, H, W) in {0, 1} -> logits (B, 1, H, W)
        # For a kernel of 4 rows, 3 rows of zeros on top would keep the image in place. The 4th row
        # moves it down by one, and -1 crops its last row.
        v = self.embed_v(F.pad(x, (3, 3, 4, -1)), self.row + self.col, y)  # (B, H, W, C)
        # Likewise, for a kernel 3 wide, the 3rd column of zeros moves the image right by one.
        h = self.stem_h(F.pad(x, (3, -1))).movedim(1, 3) + self.stem_to_h(v)
        skips = 0
        for block in self.blocks:
            pad = block.pad
            v, from_v = block.forward_v(F.pad(v, (0, 0, pad, pad, pad, 0)))
            change, skip = block.forward_h(F.pad(h, (0, 0, pad, 0)), from_v)
            h = h + change
            skips = skips + skip
        return self.head((h + skips).relu()).movedim(3, 1).float()

    def new_cache(self, x):
        """What later steps read: for each block its inputs, v of all rows so far and h of this row,
        zero-padded.

        from_stem, from_v: what v contributes to this row of h, from its stem and from each block
        """
        size = self.size
        channels = self.head.in_features
        cache = {"v": [], "h": [], "from_v": [], "from_stem": None}
        for block in self.blocks:
            pad = block.pad
            cache["v"].append(x.new_zeros(len(x), pad + size, pad + size + pad, channels))
            cache["h"].append(x.new_zeros(len(x), 1, pad + size, channels))
            cache["from_v"].append(None)
        return cache

    def update_v(self, x, y, r, cache):
        """Compute row r of v in all blocks, from the rows above, and store it in cache."""
        rows_above = F.pad(x, (3, 3, 4, 0))[:, :, r : r + 4]  # (B, 1, 4, 3 + W + 3)
        v = self.embed_v(rows_above, self.row[r] + self.col, y)  # (B, 1, W, C)
        cache["from_stem"] = self.stem_to_h(v)
        for b, block in enumerate(self.blocks):
            pad = block.pad
            cache["v"][b][:, pad + r, pad:-pad] = v[:, 0]
            padded_v = cache["v"][b][:, r : r + pad + 1]  # the rows that the kernel covers
            v, cache["from_v"][b] = block.forward_v(padded_v)

    def logits_at(self, x, y, i, cache):
        """Logits (B,) of pixel i given those before it. Call it for i = 0, 1, 2, ... in turn.

        Adds to cache each block's h at pixel i and, when a row starts, all that v has for that row.
        """
        r, c = divmod(i, self.size)
        if c == 0:
            self.update_v(x, y, r, cache)
        pixels_left = F.pad(x[:, :, r : r + 1], (3, 0))[..., c : c + 3]  # (B, 1, 1, 3)
        h = self.stem_h(pixels_left).movedim(1, 3) + cache["from_stem"][:, :, c : c + 1]
        skips = 0
        for b, block in enumerate(self.blocks):
            pad = block.pad
            cache["h"][b][:, :, pad + c] = h[:, :, 0]
            # only up to this pixel: what is further right is left over from the previous row
            padded_h = cache["h"][b][:, :, c : c + pad + 1]
            change, skip = block.forward_h(padded_h, cache["from_v"][b][:, :, c : c + 1])
            h = h + change  # (B, 1, 1, C)
            skips = skips + skip
        return self.head((h + skips).relu()).flatten().float()

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
NAME = "gatedcnn"  # names the folder in out/ and marks checkpoints
Model = GatedPixelCNN
EPOCHS = 8
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
    in_blocks = set(model.blocks.parameters())
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
