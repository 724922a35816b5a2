"""VQ-VAE: write an image as 7 x 7 symbols of an alphabet of 64, and learn which ones go together.

    python vqvae.py    # 30 epochs, 73 minutes on two CPU cores: test neg_elbo 91.5

Read vae.py first (encoder, decoder, prior, the bound), and transformer.py, for its block.

Idea
  A VAE describes an image by 32 real numbers, whose distribution, the prior, is fixed in advance.
  Here the description is 49 symbols, and the prior is learned. Written language works like this: a
  small alphabet, and rules for which letters follow which.
  An encoder turns the image into a vector z_e for each of 7 x 7 positions. Each z_e is replaced by
  the nearest of 64 learned vectors, the codebook. The index of that vector is the code of the
  position; the vector is z_q. A decoder rebuilds the image from the z_q. The prior, a transformer,
  learns to predict each code from those before it. To sample, draw 49 codes from it one by one,
  then decode all of them in one pass.
  Why symbols? A model of sequences can learn any distribution of theirs, whereas a VAE forces its
  numbers to look like noise. So samples come closer to real digits.
  The drawbacks: the codes that rebuild an image best are not the easiest to predict, the choice of
  the nearest vector has no gradient, and vectors may fall out of use.

      x --> encoder --> z_e --> nearest --> codes --> z_q --> decoder --> logits of x
                         ^         ^          |        |                     |
                         |      codebook    prior      |                     |
                         +-----------------------------+ straight-through <--+ recon

      (A digit, its codes, and what each code looks like: assets/codes.png.)

Maths
  Any of the 64^49 grids of codes could have produced an image, so
      p(x) = sum over all grids of p(x | codes) p(codes) >= p(x | codes) p(codes) for any one.
  With the codes that the encoder chooses, -log p(x) is at most neg_elbo = recon + prior, where
      recon = -sum_i log p(x_i | codes),          p(x_i = 1 | codes) = sigmoid(logits_i)
      prior = -sum_i log p(codes_i | codes_<i)    for position i, by the transformer
  The loss has three more terms (sg stops the gradient; |.|^2 is summed over positions):
      loss = recon + prior + |sg(z_e) - z_q|^2 + beta |z_e - sg(z_q)|^2 + rate_weight * rate
      term               trains           how
      recon              decoder          to rebuild x from z_q
                         encoder          the gradient at z_q is copied to z_e (straight-through)
      prior              transformer      to predict the codes; no gradient reaches the encoder
      |sg(z_e) - z_q|^2  codebook         `codebook_loss`: a vector moves to the z_e that chose it
      |z_e - sg(z_q)|^2  encoder          `commit`: z_e stays near the vector it chose
      rate               encoder          to prefer codes that the prior expects
  Why rate? Without it, the encoder would use whatever codes rebuild the image best, however hard
  they are to predict: random ones cost 49 log 64 = 204 nats. Code k at position i costs
  -log p(k | codes_<i). A choice has no gradient. So imagine, in this term alone, that the code is
  drawn at random, the nearer ones more often, and take the expected cost:
      rate = -sum_i sum_k softmax_k(-|z_e_i - sg(e_k)|^2) sg(log p(k | codes_<i))
  Say two vectors have squared distances 1.0 and 1.2, and cost 0.5 and 4 nats. They are chosen with
  probability 0.55 and 0.45: an expected 2.1 nats. The gradient moves z_e towards the cheap one.
  Sampling. 49 steps of the transformer, with a cache of keys and values, then one pass of the
  decoder, whose probabilities are shown as grey levels: 0.2 seconds for 100 images.

What to expect
  neg_elbo 91.5 = recon 58.0 + prior 33.5 nats per image. perplexity, the exp of the entropy of the
  codes' shares, is the effective number of codes in use: 45 of 64 here. Below 10, most of the
  codebook is hardly used. In half of the positions, the code is almost always the same: the decoder
  can do without them, and what the prior can predict costs nothing.

Differences from the paper (van den Oord et al. 2017, arXiv:1711.00937)
  - a transformer as the prior, not a PixelCNN, trained in the same run
  - rate (Chou, Lookabaugh and Gray 1989); restarts (Dhariwal et al. 2020, arXiv:2005.00341)
  - a learned offset for each position is added to the encoder's output, and the sum is normalised
  - with --class-cond, an embedding of the label is added to the prior's tokens: p(codes | label)
  - binary pixels, as in vae.py; some matrices and kernels trained with Muon (see recipe)
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


def conv3x3(n_in, n_out):
    return nn.Conv2d(n_in, n_out, 3, padding=1)


class VQVAE(nn.Module):
    """An autoencoder with a codebook in its middle, and a transformer over the codes.

    channels: at 14 x 14, twice as many at 7 x 7; code_dim: length of a vector of the codebook;
    n_codes: how many there are; n_embd, n_head, n_layer: of the transformer (length of a token,
    heads, blocks); beta: weight of commit; rate_weight: weight of rate; size: pixels per side;
    n_classes: number of labels, or 0
    """

    def __init__(
        self,
        *,
        channels=32,
        code_dim=16,
        n_codes=64,
        n_embd=64,
        n_head=1,
        n_layer=4,
        beta=0.25,
        rate_weight=0.5,
        size=28,
        n_classes=0,
    ):
        super().__init__()
        if min(channels, n_codes) < 1:
            raise ValueError("channels and n_codes must be at least 1")
        if code_dim < 3:
            raise ValueError("code_dim must be at least 3: two numbers, normalised, are 1 and -1")
        if n_head < 1 or n_embd <= n_head or n_embd % n_head != 0:
            raise ValueError("n_embd must be a multiple of n_head, and larger")
        if size < 4 or size % 4 != 0:
            raise ValueError(f"size must be a multiple of 4, not {size}")
        self.size = size
        self.n_classes = n_classes
        self.side = size // 4  # codes per side
        self.n_codes = n_codes
        self.n_embd = n_embd
        self.n_head = n_head
        self.beta = beta
        self.rate_weight = rate_weight
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),  # (B, 1, 28, 28) -> (B, 4, 14, 14): the pixels of 2 x 2 patches
            conv3x3(4, channels),
            nn.SiLU(),
            conv3x3(channels, channels),
            nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, 2, stride=2),  # -> (B, 2 C, 7, 7)
            nn.SiLU(),
            conv3x3(2 * channels, 2 * channels),
            nn.SiLU(),
            conv3x3(2 * channels, code_dim),
        )
        self.decoder = nn.Sequential(
            conv3x3(code_dim, 2 * channels),
            nn.SiLU(),
            conv3x3(2 * channels, 2 * channels),
            nn.SiLU(),
            nn.ConvTranspose2d(2 * channels, channels, 2, stride=2),  # -> (B, C, 14, 14)
            nn.SiLU(),
            conv3x3(channels, channels),
            nn.SiLU(),
            conv3x3(channels, 4),
            nn.PixelShuffle(2),  # -> (B, 1, 28, 28)
        )
        # Added to the encoder's output, and much larger at first. So z_e differs from position to
        # position, and many codes are in use from the start. As the encoder's output grows in
        # training, the image decides more and more.
        self.offset = nn.Parameter(10 * torch.randn(self.side**2, code_dim))
        self.codebook = nn.Parameter(torch.randn(n_codes, code_dim))
        # how often each vector is used; 1 is the average; at -1, the first batch replaces it
        self.register_buffer("usage", -torch.ones(n_codes))
        self.token = nn.Embedding(n_codes + 1, n_embd)  # the last entry is "no code yet"
        self.pos_emb = nn.Parameter(0.02 * torch.randn(self.side**2, n_embd))
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, n_codes)
        if n_classes > 0:
            self.label = nn.Embedding(n_classes, n_embd)
            nn.init.zeros_(self.label.weight)  # at first labels change nothing

    def encode(self, x):
        """x (B, 1, H, W) in {0, 1} -> z_e (B, 49, code_dim), vectors of mean 0 and variance 1."""
        z_e = self.encoder(2 * x - 1).flatten(2).transpose(1, 2) + self.offset
        return F.layer_norm(z_e, z_e.shape[-1:])

    def distance(self, z_e):
        """z_e (B, 49, code_dim) -> |z_e - e|^2 for each e of the codebook (B, 49, n_codes)."""
        return torch.cdist(z_e, self.codebook.detach()).square()

    def quantise(self, z_e):
        """z_e (B, 49, code_dim) -> codes (B, 49): the index of the nearest e of the codebook."""
        return self.distance(z_e).argmin(2)

    def decode(self, z_q):
        """z_q (B, 49, code_dim) -> logits (B, 1, H, W) of p(x | codes)."""
        return self.decoder(z_q.transpose(1, 2).unflatten(2, (self.side, self.side))).float()

    def usage_of(self, codes):
        """codes (B, 49) -> the share of each code (n_codes,)."""
        return codes.float().histc(self.n_codes, 0, self.n_codes) / codes.numel()

    @torch.no_grad()
    def restart(self, z_e):
        """Move each rarely used vector of the codebook onto one of the z_e (B, 49, code_dim)."""
        # a running average: an unused vector falls from 1 to 0.02 in about 390 batches
        self.usage.lerp_(self.usage_of(self.quantise(z_e)) * self.n_codes, 0.01)
        dead = self.usage < 0.02  # (n_codes,)
        z_e = z_e.flatten(0, 1)  # (49 B, code_dim)
        # a candidate for every vector, not only for the dead: to count those, the CPU would have to
        # wait for the GPU
        candidates = z_e[torch.randint(len(z_e), dead.shape, device=dead.device)]
        self.codebook.copy_(torch.where(dead[:, None], candidates, self.codebook))
        self.usage.masked_fill_(dead, 1)

    def tokens(self, codes, y, start, end):
        """Tokens i = start, ..., end - 1, as (B, end - start, n_embd).

        Token i is the sum of embeddings of code i - 1, of position i, and of y.
        """
        # shifted right by one: "no code yet" comes first, the last code drops out
        before = F.pad(codes, (1, -1), value=self.n_codes)[:, start:end]
        tokens = self.token(before) + self.pos_emb[start:end]
        if y is not None:
            tokens = tokens + self.label(y)[:, None]
        return tokens

    def prior(self, codes, y=None):
        """codes (B, 49) -> logits (B, 49, n_codes) of each code, given those before it."""
        h = self.tokens(codes, y, 0, codes.shape[1])
        for block in self.blocks:
            h = block(h)
        return self.head(F.layer_norm(h, h.shape[-1:])).float()

    def new_cache(self, n):
        """For each block, room for the keys and values of all tokens of n images."""
        shape = (2, n, self.n_head, self.side**2, self.n_embd // self.n_head)
        return [torch.zeros(shape, device=self.head.weight.device) for _ in self.blocks]

    def logits_at(self, codes, y, i, cache):
        """Logits (B, n_codes) of code i, given those before it. Adds keys and values to cache."""
        h = self.tokens(codes, y, i, i + 1)  # (B, 1, n_embd)
        for block, block_cache in zip(self.blocks, cache):
            h = block(h, block_cache, i)
        return self.head(F.layer_norm(h, h.shape[-1:]))[:, 0].float()

    def forward(self, z_e, y=None):
        """What follows the encoder: z_e (B, 49, code_dim) -> codes (B, 49), z_q like z_e, logits of
        x (B, 1, H, W), logits of the codes by the prior (B, 49, n_codes)."""
        codes = self.quantise(z_e)
        # like codebook[codes], but on a CPU its gradient is summed in the same order each time, so
        # that a run can be repeated exactly
        z_q = F.embedding(codes, self.codebook)
        straight_through = z_e + (z_q - z_e).detach()  # value of z_q; its gradient goes to z_e
        return codes, z_q, self.decode(straight_through), self.prior(codes, y)

    def loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> the loss of the header; metrics."""
        if x.shape[1:] != (1, self.size, self.size):
            raise ValueError(f"x must be (B, 1, {self.size}, {self.size}), not {tuple(x.shape)}")
        self.check_labels(len(x), y)
        x = torch.bernoulli(x)
        z_e = self.encode(x)  # (B, 49, code_dim)
        if self.training and self.codebook.requires_grad:
            self.restart(z_e)
        codes, z_q, logits, code_logits = self(z_e, y)
        # recon = -log p(x | codes)
        recon = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        # codebook_loss = |sg(z_e) - z_q|^2, commit = |z_e - sg(z_q)|^2, where sg stops the
        # gradient: equal in value, but one moves the vectors, the other moves the encoder
        codebook_loss = (z_e.detach() - z_q).square().sum() / len(x)
        commit = (z_e - z_q.detach()).square().sum() / len(x)
        # prior = -sum_i log p(codes_i | codes_<i)
        prior = F.cross_entropy(code_logits.transpose(1, 2), codes, reduction="sum") / len(x)
        # the expected cost of a code near z_e under the prior, which trains the encoder:
        # rate = -sum_i sum_k softmax_k(-|z_e_i - sg(e_k)|^2) sg(log p(k | codes_<i))
        choice = (-self.distance(z_e)).softmax(2)
        rate = -(choice * code_logits.detach().log_softmax(2)).sum() / len(x)
        loss = recon + codebook_loss + self.beta * commit + prior + self.rate_weight * rate
        # perplexity = exp(-sum_k p_k log p_k), where p_k is the share of code k
        perplexity = torch.special.entr(self.usage_of(codes)).sum().exp()
        metrics = {"neg_elbo": recon + prior, "recon": recon, "prior": prior, "commit": commit}
        metrics["perplexity"] = perplexity
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def sample(self, n, y=None):
        """Draw n grids of codes -> images (n, 1, H, W), means of p(x | codes); y (n,) or None."""
        self.check_labels(n, y)
        codes = torch.zeros(n, self.side**2, dtype=torch.int64, device=self.head.weight.device)
        cache = self.new_cache(n)
        for i in range(self.side**2):
            logits = self.logits_at(codes, y, i, cache)  # (n, n_codes)
            codes[:, i] = logits.softmax(1).multinomial(1)[:, 0]
        return self.decode(self.codebook[codes]).sigmoid()

    @torch.no_grad()
    def pictures(self, x, y=None):
        """x (N, 1, H, W) images, y (N,) or None -> {name: pictures}:

        reconstruction  (3 N, 1, H, W): ten images, their codes as greys, what these decode to; then
                        the next ten
        interpolation   (10 N, 1, H, W): a row from the z_e of each image to that of the next (from
                        the last to the first)
        """
        x = torch.bernoulli(x)
        z_e = self.encode(x)
        codes, _, logits, _ = self(z_e, y)
        maps = codes.view(-1, 1, self.side, self.side) / self.n_codes
        maps = F.interpolate(maps, scale_factor=4)  # as large as x
        reconstruction = []
        for strips in zip(x.split(10), maps.split(10), logits.sigmoid().split(10)):
            reconstruction += strips

        a = z_e[:, None]  # (N, 1, 49, code_dim)
        b = z_e.roll(-1, 0)[:, None]  # the next
        w = torch.linspace(0, 1, 10, device=x.device)[:, None, None]
        z_e = (a + (b - a) * w).flatten(0, 1)  # (N, 10, 49, code_dim) -> (10 N, 49, code_dim)
        z_q = self.codebook[self.quantise(z_e)]
        return {
            "reconstruction": torch.cat(reconstruction),
            "interpolation": self.decode(z_q).sigmoid(),
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
NAME = "vqvae"  # names the folder in out/ and marks checkpoints
Model = VQVAE
EPOCHS = 30
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
    """Muon for the matrices in the blocks and for the kernels of convolutions with equal numbers of
    input and output channels, AdamW for all other weights."""
    for_muon = set(model.blocks.parameters())
    for layer in [*model.encoder, *model.decoder]:
        if isinstance(layer, nn.Conv2d) and layer.in_channels == layer.out_channels:
            for_muon.add(layer.weight)
    matrices = []
    others = []
    for weight in model.parameters():
        if not weight.requires_grad:  # frozen
            continue
        if weight in for_muon:
            matrices.append(weight)
        else:
            others.append(weight)
    optimizers = [torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]
    if matrices:  # none if all of them are frozen
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
