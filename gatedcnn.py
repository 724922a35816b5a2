"""Gated PixelCNN: one stack of convolutions for the rows above, one for the pixel's own row.

    python gatedcnn.py
    # 5 epochs, seed 0: test nll 79.44; an epoch takes 3 minutes on two CPU cores (bfloat16)

Van den Oord et al. 2016, arXiv:1606.05328; fast sampling: Ramachandran et al. 2017,
arXiv:1704.06001. Differences from the paper: binary pixels, where the paper has 256 levels; skips,
so that each layer also feeds the output directly (as in WaveNet); labels at the input only, not in
each gate; dilated kernels (see Dilation) and row and column embeddings; images binarised anew each
time they are used (see Shapes); the matrices and kernels of the blocks trained by Muon, an
optimizer explained in the train section; evaluation with an exponential moving average of the
weights (EMA).

Idea
  Like PixelCNN (read pixelcnn.py first), this model predicts each pixel from those before it, row
  by row, with convolutions that must see neither the pixel itself nor any later one. PixelCNN has a
  blind spot to the upper right, because one masked convolution does two jobs. It looks at the rows
  above, to both sides, and at the row of the pixel, but there only to the left. In the row of the
  predicted pixel that has to be so. But the same kernel also computes the vectors in the rows
  above, so these, too, know nothing of what lies to their right in their own row, although all of
  that row comes before the pixel.
  Here each job has a stack of layers of its own. The vertical stack v reads the rows above the
  pixel, to both sides. The horizontal stack h reads the row itself, left of the pixel, and takes in
  the features of v at each layer. h makes the predictions. Nothing goes from h to v, so v never
  learns about the row that is being predicted.
  The second idea is gating. For each channel, a layer computes a value in (-1, 1), by a tanh, and a
  gate in (0, 1), by a sigmoid, and passes on their product. So it can pass, weaken or block each
  channel, depending on what it sees.

Maths
      p(x) = p(x_0) p(x_1 | x_0) p(x_2 | x_0, x_1) ... = prod_i p(x_i | x_<i)    (the chain rule)
      p(x_i = 1 | x_<i) = sigmoid(logits_i) = 1 / (1 + exp(-logits_i))
  x_<i stands for pixels 0 to i - 1. The loss is the negative log-likelihood,
      nll = -log p(x) = -sum_i log p(x_i | x_<i),
  which is computed exactly. (Not every model can do that: vae.py only has a bound.) With q =
  sigmoid(logits_i), a term is -log q if x_i = 1 and -log(1 - q) if x_i = 0: the binary
  cross-entropy of one pixel. Averaged over images x from the distribution of the data, p_data, the
  nll is
      E[-log p(x)] = E[-log p_data(x)] + E[log(p_data(x) / p(x))] = entropy + KL(p_data || p).
  No model can change the entropy of the data. The second term, the Kullback-Leibler divergence,
  says how far the model is from the data: it is 0 if the two distributions are equal, and positive
  otherwise.
  In a layer, vertical and horizontal are convolutions; v_to_h and out are linear layers, applied to
  each pixel's vector by itself. The output of each has two halves. For out, these are the change of
  h and the skip. For the others they are values and gates, which are combined by activate(pair) =
  tanh(values) * sigmoid(gates):
      pair = vertical(v)
      mix = activate(horizontal(h) + v_to_h(pair))
      change, skip = out(mix)
      v <- activate(pair),   h <- h + change
  and finally logits = head(relu(h + sum of the skips of all layers)).
  Shifts instead of masks. v starts from a copy of the image that is moved down by one row: at X,
  v's copy holds the pixel above X. Its kernels are k columns wide, k odd, and k // 2 + 1 rows high:
  they read their own row and the rows above, to both sides. That is safe: everywhere in the row of
  X, even to the right of X, v knows only rows above X. h starts from a copy that is moved right by
  one pixel. Its kernels, 1 x (k // 2 + 1), read their own place and those to the left. For example,
  kernels with k = 5, applied to the two copies, cover these pixels of the image:
        v v v v v      The three rows of v end above X, because v's copy is moved down. The
        v v v v v      three places of h end left of X, because h's copy is moved right.
        v v v v v
      h h h X
  The stem, a first convolution for each stack, reads the copies, with a kernel of 4 x 7 (k = 7) for
  v and of 1 x 3 (k = 5) for h. v gets embeddings of row and column, so that a prediction can depend
  on where it is, and h gets a linear function of v. The layers follow, four with k = 5 by default.
  Dilation. The places that the kernel of a layer reads need not be next to each other. Here they
  are 1, 2, 4 and again 1 pixels apart in the four layers (the example above has dilation 1).
  So the layers together reach twice as far, at the same cost. A layer skips places, but each vector
  that it reads already holds what earlier layers have seen around it, skipped places included.
  No blind spot. A layer of v reads its own row to both sides, so each layer widens the view even in
  the row just above X. The stem reaches 4 rows up and 3 pixels to either side. The four layers
  reach k // 2 * dilation = 2, 4, 8 and 2 more, upwards and to either side. So X is predicted from
  20 rows above, in each of these up to 19 pixels to either side. The stem of h reaches 3 pixels to
  the left, and the layers again 16 more: 19 pixels in the row of X. Part of that (#):
      # # # # # # # # # # # # # #
      # # # # # # # # # # # # # #
      # # # # # X
  Sampling. v is computed once for each row, as soon as the rows above are drawn, and h once for
  each pixel. Caches keep what later steps read, so nothing is computed twice: all 784 steps
  together take about as much arithmetic as one forward pass, which in training makes all 784
  predictions at once. Sampling is still slow, because the steps run one after the other.
  Each pixel is drawn at random with its predicted probability. Always taking the likelier value
  would draw the same image every time, a blank one: as long as all pixels are black, it is likelier
  at each single one that no stroke starts there than that one does.
  Labels. With --class-cond, an embedding of the label is added to every vector of v after its first
  convolution. In training, a label is replaced with probability 1/10 by "no label", which has an
  embedding of its own. So one model learns both p(x | y), where y is the label, and p(x). (Without
  --class-cond, every image has "no label".) If the argument guidance of sample() is above 1, it
  exaggerates what the label adds (classifier-free guidance, Ho and Salimans 2022,
  arXiv:2207.12598):
      logits <- logits(no label) + guidance * (logits(label) - logits(no label))

Shapes
  x (B, 1, 28, 28), images of handwritten digits (MNIST): loss() takes grey levels, from 0 (black)
  to 1 (white), but the network sees binary pixels. A grey level of 0.7 becomes 1 with probability
  0.7, drawn anew each time an image is used (dynamic binarisation). v, h (B, 28, 28, channels): two
  vectors for each pixel, channels last, as the linear layers need them.

What to expect
  nll is in nats (natural logarithms) per image: summed over pixels, averaged over images. bpd (bits
  per dimension) = nll / (784 log 2) is the same quantity per pixel, in bits. A model that gives
  every pixel probability 1/2 has an nll of 784 log 2 = 543; one that predicts, for each pixel, how
  often that pixel is white in the training images has 206. With its defaults, this script reaches
  79.4. The best published figure in bench/README.md, of a PixelSNAIL (convolutions with attention)
  after 457 epochs, is 78.6. If your test nll falls far below that, there is most likely a leak:
  predictions see their own pixels; check how forward moves the image. (No model without a leak gets
  below 45, on average: even one that knew the grey levels would have to predict the coin flips that
  make an image binary, and 45 is their entropy.)
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
class GatedBlock(nn.Module):
    """One layer of the vertical stack v and of the horizontal stack h, which receives v's features.

    The places that a kernel reads are dilation pixels apart. With pad = k // 2 * dilation, v looks
    at its own row and rows up to pad above, to pad pixels on both sides, h at its own pixel and
    pixels up to pad to its left. Nothing leaks, as the image was moved down for v, right for h.
    """

    def __init__(self, channels, k, dilation):
        super().__init__()
        self.pad = k // 2 * dilation
        self.vertical = nn.Conv2d(channels, 2 * channels, (k // 2 + 1, k), dilation=dilation)
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, k // 2 + 1), dilation=dilation)
        self.v_to_h = nn.Linear(2 * channels, 2 * channels)
        self.out = nn.Linear(channels, 2 * channels)

    def activate(self, pair):
        """pair (..., 2 C): C values, then C gates -> tanh(value) * sigmoid(gate) (..., C)."""
        value, gate = pair.chunk(2, dim=-1)
        # tanh and sigmoid are faster on contiguous memory
        return value.contiguous().tanh() * gate.contiguous().sigmoid()

    def forward_v(self, padded_v):
        """padded_v (B, pad + H, pad + W + pad, C) -> the next v (B, H, W, C), and v's contribution
        to h, a linear function of the pair before gating (B, H, W, 2 C)."""
        pair = self.vertical(padded_v.movedim(3, 1)).movedim(1, 3)
        return self.activate(pair), self.v_to_h(pair)

    def forward_h(self, padded_h, from_v):
        """padded_h (B, H, pad + W, C), the contribution of v (B, H, W, 2 C) -> the change of h, and
        the skip, which goes to the head, both (B, H, W, C)."""
        pair = self.horizontal(padded_h.movedim(3, 1)).movedim(1, 3) + from_v
        return self.out(self.activate(pair)).chunk(2, dim=-1)


class GatedPixelCNN(nn.Module):
    """A vertical and a horizontal stack of gated convolutions over the image.

    channels: length of a pixel's vector in each stack; n_layer: blocks; kernel: width k of
    the kernels of v, odd, at least 3; size: pixels per side; n_classes: number of labels, or 0
    """

    def __init__(self, *, channels=32, n_layer=4, kernel=5, size=28, n_classes=10):
        super().__init__()
        if min(channels, n_layer) < 1 or size < 2 or n_classes < 0:
            raise ValueError(
                "channels and n_layer must be at least 1, size at least 2, n_classes at least 0"
            )
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
        self.label = nn.Embedding(n_classes + 1, channels)  # the last entry is "no label"
        nn.init.zeros_(self.label.weight)  # at first labels change nothing
        dilations = [2 ** (b % 3) for b in range(n_layer)]  # 1, 2, 4, then again 1, 2, 4
        self.blocks = nn.ModuleList(GatedBlock(channels, kernel, d) for d in dilations)

    def embed(self, x, y):
        """A vector for each label in y (B,), or for "no label" if y is None, with B = len(x)."""
        if y is None:
            y = torch.full((len(x),), self.n_classes, device=x.device)
        return self.label(y)

    def forward(self, x, y=None):  # x (B, 1, H, W) in {0, 1} -> logits (B, 1, H, W)
        # For a kernel of 4 rows, 3 rows of zeros on top would keep the image in place. The 4th row
        # moves it down by one, and -1 crops its last row.
        v = self.stem_v(F.pad(x, (3, 3, 4, -1))).movedim(1, 3)  # (B, H, W, channels)
        pos_emb = self.row + self.col  # (H, W, channels)
        # type_as: under autocast v is bfloat16, and adding float32 would make it float32
        v = v + (pos_emb + self.embed(x, y)[:, None, None]).type_as(v)
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

    def new_cache(self, n):
        """What later steps read: for each block its inputs, v of all rows so far and h of this row,
        zero-padded.

        from_stem, from_v: what v contributes to this row of h, from its stem and from each block
        """
        size = self.size
        channels = self.label.embedding_dim
        weight = self.label.weight  # for its device and dtype
        cache = {"v": [], "h": [], "from_v": [], "from_stem": None}
        for block in self.blocks:
            pad = block.pad
            cache["v"].append(weight.new_zeros(n, pad + size, pad + size + pad, channels))
            cache["h"].append(weight.new_zeros(n, 1, pad + size, channels))
            cache["from_v"].append(None)
        return cache

    def update_v(self, x, y, r, cache):
        """Compute row r of v in all blocks, from the rows above, and store it in cache."""
        rows_above = F.pad(x, (3, 3, 4, 0))[:, :, r : r + 4]  # (B, 1, 4, 3 + W + 3)
        v = self.stem_v(rows_above).movedim(1, 3)  # (B, 1, W, channels)
        v = v + (self.row[r] + self.col + self.embed(x, y)[:, None, None])
        cache["from_stem"] = self.stem_to_h(v)
        for b, block in enumerate(self.blocks):
            pad = block.pad
            cache["v"][b][:, pad + r, pad:-pad] = v[:, 0]
            padded_v = cache["v"][b][:, r : r + pad + 1]  # the rows that the kernel covers
            v, cache["from_v"][b] = block.forward_v(padded_v)

    def logits_at(self, x, y, i, cache):
        """Logits (B,) of pixel i given those before it. Call it for i = 0, 1, 2, ... in turn.

        Adds to cache each block's h at pixel i and, when a row starts, each block's v for that row.
        """
        r, c = divmod(i, self.size)
        if c == 0:
            self.update_v(x, y, r, cache)
        pixels_left = F.pad(x, (3, 0))[:, :, r : r + 1, c : c + 3]  # (B, 1, 1, 3)
        h = self.stem_h(pixels_left).movedim(1, 3) + cache["from_stem"][:, :, c : c + 1]
        skips = 0
        for b, block in enumerate(self.blocks):
            pad = block.pad
            cache["h"][b][:, :, pad + c] = h[:, :, 0]
            # only up to this pixel: what is further right is left over from the previous row
            padded_h = cache["h"][b][:, :, c : c + pad + 1]
            change, skip = block.forward_h(padded_h, cache["from_v"][b][:, :, c : c + 1])
            h = h + change  # (B, 1, 1, channels)
            skips = skips + skip
        return self.head((h + skips).relu()).flatten().float()

    def hidden_weights(self):
        """The weights that Muon trains: the matrices and kernels in the blocks."""
        return [weight for weight in self.blocks.parameters() if weight.ndim > 1]

    def loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> mean of -log p(x | y) in nats/image; metrics.

        In training, one label in ten is replaced by "no label".
        """
        self.check(x, y)
        x = torch.bernoulli(x)
        if y is not None and self.training:  # hide 1 label in 10, to learn p(x) as well
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.n_classes, y)
        logits = self(x, y)
        # nll = -sum_i log p(x_i | x_<i)
        nll = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        bpd = nll / (x[0].numel() * math.log(2))
        return nll, {"nll": nll, "bpd": bpd}

    @torch.no_grad()
    def sample(self, n, y=None, top=None, guidance=1.0):
        """Draw n binary images (n, 1, H, W), each pixel given those before it.

        y:        (n,) labels, or None
        top:      (n, 1, rows, W) in {0, 1}, the first rows, or None to draw them as well
        guidance: 0 ignores y, 1 draws from p(x | y), above 1 exaggerates what y adds
        """
        x = self.label.weight.new_zeros(n, 1, self.size, self.size)
        pixels = x.view(n, -1)  # (n, H * W), the same memory
        n_given = 0
        if top is not None:
            x[:, :, : top.shape[2]] = top
            n_given = top[0].numel()
        guided = y is not None and guidance != 1
        cache = self.new_cache(n)
        if guided:
            uncond_cache = self.new_cache(n)
        for i in range(self.size**2):
            # also for given pixels: it fills the cache, which later pixels read
            logits = self.logits_at(x, y, i, cache)  # (n,)
            if guided:
                uncond = self.logits_at(x, None, i, uncond_cache)
                logits = uncond + guidance * (logits - uncond)
            if i >= n_given:
                pixels[:, i] = torch.bernoulli(logits.sigmoid())
        return x

    @torch.no_grad()
    def pictures(self, x):
        """x (N, 1, H, W) images, of which the first ten are used -> {name: pictures}:

        sampling    (frames, 20, 1, H, W): 20 images as they are drawn, half a row per frame
        completion  (60, 1, H, W): ten images, their upper halves, four completions of each
        field       (1, 1, 8 H, 8 W): how much the logit of the middle pixel depends on each pixel;
                    black: not at all
        """
        x = torch.bernoulli(x[:10])
        half = self.size // 2
        index = torch.arange(self.size**2, device=x.device).view(self.size, self.size)
        samples = self.sample(20)
        steps = range(0, self.size**2 + half, half)  # the last frame shows the whole image
        frames = [samples.where(index < n_drawn, 0.5) for n_drawn in steps]  # grey: not drawn yet
        upper = x.where(index < half * self.size, 0.5)
        top = x[:, :, :half].repeat(4, 1, 1, 1)
        completion = torch.cat([x, upper, self.sample(len(top), top=top)])

        with torch.enable_grad():
            x.requires_grad_()
            middle = self(x)[..., half, half].sum()
            slope = torch.autograd.grad(middle, x)[0].abs().mean(0, keepdim=True)  # (1, 1, H, W)
        field = (slope > 0) * (0.3 + 0.7 * slope / slope.max())  # 0.3: weak ones show, too
        field = F.interpolate(field, scale_factor=8)
        return {"sampling": torch.stack(frames), "completion": completion, "field": field}

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
NAME = "gatedcnn"  # of the folder in out/; saved in checkpoints, so that others are refused
Model = GatedPixelCNN
EPOCHS = 5
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
