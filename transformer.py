"""Transformer: every pixel looks back at all earlier ones and picks what helps to predict it.

    python transformer.py    # 4 epochs, 70 minutes on two CPU cores: test nll 79.9

Read made.py first: it explains why predicting pixel by pixel makes a generative model, the loss
nll, its reference values, binarisation, and why each pixel is drawn at random.

Idea
  The other autoregressive models always look at the same places, or squeeze the past into a memory
  of fixed size (rnn.py). A transformer keeps all of the past, and decides at each pixel where to
  look, depending on the image so far: attention.
  Each place in the sequence has a token, a vector. Three linear maps give its query (what the token
  looks for), its key (how other tokens find it) and its value (what it hands over when found). A
  token compares its query with its own key and those of all earlier tokens. Then it averages their
  values, weighted by how well query and key match.
  Attention treats the past as a set: it has no notion of near and far. So learned vectors for the
  row and the column of pixel i are added to token i. And token i starts from a convolution of the
  87 pixels before pixel i (`stem`): three rows and three pixels, so the neighbours above and to the
  left need not be searched for.
  The price: attention compares each token with itself and each earlier one, 784 x 785 / 2 pairs for
  each image, layer and head.

                     keys 0 1 2 3
      query 0             #                token 0 attends to itself,
            1             # #              token 1 to tokens 0 and 1,
            2             # # #            and so on. Token i sees only
            3             # # # #          pixels 0 to i - 1.

Maths
      nll = -sum_i log p(x_i | x_<i),   p(x_i = 1 | x_<i) = sigmoid(logits_i)
  Attention, for queries q, keys k and values v of d numbers each (here 64):
      attention_i = sum_{j <= i} w_ij v_j,   s_ij = q_i k_j / sqrt(d)
      w_ij = softmax_j(s_ij) = exp(s_ij) / sum_{l <= i} exp(s_il)
  q_i k_j is a dot product. For each i, the weights w_ij are positive and sum to 1. Why sqrt(d)? A
  layer norm gives q and k mean 0 and mean square 1, so their length is sqrt(d). For random
  directions, q_i k_j is of order sqrt(d), and s_ij of order 1. Without the division, most of the
  weight would lie on one j from the start, and the others would hardly get a gradient: for d = 64
  and 784 random keys, the largest weight would be 0.67 on average; with the division, it is 0.017.
  With n_head > 1, q, k and v are cut into n_head pieces, the heads, each of which attends with
  weights of its own.
  A block first adds to each token a linear map of what attention collects. Then it adds the output
  of a small network (MLP), which sees this token alone. Both read tokens through a layer norm.
  After the blocks, a layer norm and a linear map give logits_i.
  Causality. Token i starts without any pixel from i on, and attends only to tokens up to i, which
  have not seen them either. So a token may attend to itself without seeing the answer.
  Sampling. The naive loop runs a full pass for each of 784 pixels, and uses one logit of it. But
  a token does not depend on later pixels, so its key and value are computed once, and kept in
  `cache`. Step i computes token i alone, and compares its query with all keys so far: 4 seconds for
  100 images.

What to expect (figures from commit 64766eb, to be re-measured)
  79.9 nats per image. A test nll far below 78 means a leak: check the padding in `tokens`. It does
  not overfit yet: the training loss stays above the test nll.

Differences from the paper (Vaswani et al. 2017, arXiv:1706.03762; on pixels: Chen et al. 2020,
Image GPT)
  - only the causal half, the decoder, as in GPT; squared ReLU; no biases in the blocks, no dropout
  - layer norms have no weights; they come before attention, MLP and output, and on queries and keys
  - a convolution at the input, vectors for row and column
  - with --class-cond, an embedding of the label is added to every token, which gives p(x | label)
  - the matrices of the blocks are trained with Muon (see recipe)
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
class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        self.expand = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.shrink = nn.Linear(4 * n_embd, n_embd, bias=False)
        # at first the block is the identity
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.shrink.weight)

    def forward(self, x, cache=None, i=0):
        """x (B, T, n_embd) -> the same shape; each token attends to itself and to those before it.

        Without a cache, x holds all tokens. With one, x is token i alone (T = 1), and its key and
        value are written into the cache (2, B, n_head, all tokens, head size), after those of the
        tokens before i.
        """
        qkv = self.qkv(F.layer_norm(x, x.shape[-1:])).unflatten(2, (3, self.n_head, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, head size) each
        q = F.layer_norm(q, q.shape[-1:])
        k = F.layer_norm(k, k.shape[-1:])
        # h = sum_j softmax_j(q_i k_j / sqrt(head size)) v_j, over j <= i
        if cache is None:
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            cache[0, :, :, i] = k[:, :, 0]
            cache[1, :, :, i] = v[:, :, 0]
            k, v = cache[:, :, :, : i + 1]  # (B, n_head, i + 1, head size) each; no mask is needed
            h = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(h.transpose(1, 2).flatten(2))  # the heads side by side: (B, T, n_embd)
        # the MLP, for each token alone, with a squared ReLU
        return x + self.shrink(self.expand(F.layer_norm(x, x.shape[-1:])).relu().square())


class PixelTransformer(nn.Module):
    """Causal self-attention over the pixels in raster order.

    n_embd: numbers in a token; n_head: heads, each of n_embd / n_head numbers; n_layer: blocks;
    size: pixels per side; n_classes: number of labels, or 0
    """

    def __init__(self, *, n_embd=64, n_head=1, n_layer=2, size=28, n_classes=0):
        super().__init__()
        if min(n_head, n_layer) < 1:
            raise ValueError("n_head and n_layer must be at least 1")
        if n_embd <= n_head or n_embd % n_head != 0:
            raise ValueError("n_embd must be a multiple of n_head, and larger")
        self.size = size
        self.n_classes = n_classes
        self.n_embd = n_embd
        self.n_head = n_head
        self.context = 3 * size + 3  # the last three rows and three pixels
        self.stem = nn.Conv1d(1, n_embd, self.context)
        self.row = nn.Parameter(0.02 * torch.randn(size, 1, n_embd))
        self.col = nn.Parameter(0.02 * torch.randn(1, size, n_embd))
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, 1)
        if n_classes > 0:
            self.label = nn.Embedding(n_classes, n_embd)
            nn.init.zeros_(self.label.weight)  # at first labels change nothing

    def tokens(self, x, y, start, end):
        """Tokens i = start, ..., end - 1, as (B, end - start, n_embd).

        Token i is made from the `context` pixels before pixel i, with zeros where there are none.
        Pixel j is padded[context + j], so the pixels before pixel i are padded[i : i + context].
        `past` has end - start - 1 + context pixels: the kernel fits in at end - start positions.
        """
        padded = F.pad(x.flatten(2), (self.context, 0))  # (B, 1, context + H * W)
        past = padded[..., start : end - 1 + self.context]
        pos_emb = (self.row + self.col).flatten(0, 1)[start:end]  # (end - start, n_embd)
        tokens = self.stem(past).transpose(1, 2) + pos_emb
        if y is not None:
            tokens = tokens + self.label(y)[:, None]
        return tokens

    def forward(self, x, y=None):  # x (B, 1, H, W) in {0, 1} -> logits (B, 1, H, W)
        h = self.tokens(x, y, 0, x[0].numel())
        for block in self.blocks:
            h = block(h)
        return self.head(F.layer_norm(h, h.shape[-1:])).view_as(x).float()

    def new_cache(self, x):
        """For each block, room for the keys and values of all tokens."""
        shape = (2, len(x), self.n_head, self.size**2, self.n_embd // self.n_head)
        return [x.new_zeros(shape) for _ in self.blocks]

    def logits_at(self, x, y, i, cache):
        """Logits (B,) of pixel i given those before it. Call it for i = 0, 1, 2, ... in turn.

        Adds the key and value of token i in each block to cache.
        """
        h = self.tokens(x, y, i, i + 1)  # (B, 1, n_embd)
        for block, block_cache in zip(self.blocks, cache):
            h = block(h, block_cache, i)
        return self.head(F.layer_norm(h, h.shape[-1:]))[:, 0, 0].float()

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
NAME = "transformer"  # names the folder in out/ and marks checkpoints
Model = PixelTransformer
EPOCHS = 4
BATCH_SIZE = 64
LR = 1e-2


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
    """Muon for the matrices in the blocks, AdamW for all other weights."""
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
