"""VQ-VAE: write an image as 7 x 7 symbols from an alphabet of 64, and learn which symbols go
together.

    python vqvae.py
    # 20 epochs, seed 0: test neg_elbo 92.72; an epoch takes 48 seconds on two CPU cores (bfloat16)

Van den Oord et al. 2017, arXiv:1711.00937; restarts of unused vectors: Dhariwal et al. 2020,
arXiv:2005.00341; a price for codes that are hard to predict (rate, below): Chou, Lookabaugh and
Gray 1989. Differences from the paper: a transformer as the prior, not a PixelCNN, and trained in
the same run; that price; a learned offset for each position is added to the encoder's output, and
the sum is normalised; optional labels; images binarised anew each time they are used (see Shapes);
the matrices of the prior's blocks, and the kernels of convolutions with as many input as output
channels, trained by Muon, an optimizer explained in the train section; evaluation with an
exponential moving average of the weights (EMA).

Idea
  A VAE (see vae.py) describes an image by 32 real numbers, and fixes in advance how such numbers
  are distributed: the prior. Here the description is 49 symbols from an alphabet of 64, and the
  prior is learned. Written language works like this: a small alphabet, and rules for which letters
  follow which.
  An encoder turns the image into a vector z_e for each of 7 x 7 positions. Each z_e is replaced by
  the nearest of 64 learned vectors, which together are the codebook. The index of that vector is
  the code of the position; the vector itself is called z_q. A decoder rebuilds the image from the
  z_q alone, so the codes have to keep what matters. The prior is a transformer (the block of
  transformer.py) that learns to predict each code from those before it, row by row.
  To sample, draw 49 codes from the prior, one by one, then decode all of them in one pass. So only
  49 values are drawn in sequence, not 784 as in a model that draws pixel by pixel. Codes drawn
  uniformly, without the prior, decode to scribbles.
  The drawbacks: the codes that rebuild an image best are not the easiest to predict, so autoencoder
  and prior have to be balanced; a small change of z_e hardly ever changes which vector is nearest,
  so this choice has no useful gradient; and vectors may fall out of use.

Maths
  The decoder defines p(x | codes), the prior p(codes). Any of the 64^49 grids of codes could have
  produced an image:
      p(x) = sum over all grids of p(x | codes) p(codes)  >=  p(x | codes) p(codes)  for any grid,
  as no term of the sum is negative. So with the codes that the encoder chooses
      log p(x) >= log p(x | codes) + log p(codes) = -(recon + prior) = -neg_elbo,
      recon = -sum_i log p(x_i | codes)   with p(x_i = 1 | codes) = sigmoid(logits_i) for pixel i,
      prior = -sum_i log p(codes_i | codes_<i)   for position i.
  What is minimised has three more terms, which are not part of the bound. (sg, stop gradient,
  treats its argument as a constant; |.|^2 sums over all positions.)
      loss = recon + |sg(z_e) - z_q|^2 + beta |z_e - sg(z_q)|^2 + prior + rate_weight * rate
  recon trains the decoder and the encoder. As the choice of the nearest vector has no useful
  gradient, the gradient of recon with respect to z_q is handed to z_e unchanged (straight-through):
  the encoder is trained as if the decoder had seen z_e itself. That is reasonable while z_e and z_q
  are close; the commitment term, below, keeps them close.
  |sg(z_e) - z_q|^2 trains the codebook: each vector moves towards the mean of the z_e that chose
  it.
  |z_e - sg(z_q)|^2, the commitment, trains the encoder to stay near the vectors that it chooses.
  prior trains the transformer alone, as no gradient leads from the codes to the encoder.
  rate supplies what is missing: a gradient that tells the encoder which codes are predictable.
  Without it, the encoder would use whatever codes rebuild the image best, however hard they are to
  predict: up to 49 log 64 = 204 nats. Code k at position i costs -log p(k | codes_<i) nats. The
  choice of the nearest vector cannot be differentiated, so for this term alone we imagine a soft
  one: vector e_k is chosen with a probability that falls with its distance from z_e at position i.
  The expected cost of that,
      rate_i = -sum_k softmax_k(-|z_e_i - sg(e_k)|^2) sg(log p(k | codes_<i)),  rate = sum_i rate_i,
  has a gradient with respect to z_e. It moves z_e towards vectors whose codes the prior expects,
  wherever two vectors are about equally near. (Chou et al. add the price to the distance when they
  choose the vector; here the nearest is chosen, and the price only trains the encoder. rate ignores
  how a code affects the prediction of the codes after it. With rate_weight = 1 it would be a soft
  copy of prior; less leaves recon more say.)
  Restarts. A vector that is never the nearest gets no gradient and stays useless. So a vector whose
  use (a running average over about 100 batches) is below 0.02 times that of the average vector is
  moved onto one of the z_e of the batch. At the start, all vectors are placed in this way.
  Sampling. 49 steps of the transformer, with a cache of keys and values, then one pass of the
  decoder. The images shown are the probabilities of the pixels.
  Labels. With --class-cond, an embedding of the label is added to each token, the vector with which
  the transformer starts at a position. In training, a label is replaced with probability 1/10 by
  "no label", which has an embedding of its own. If the argument guidance of sample() is above 1, it
  exaggerates what the label adds to the logits of the next code (classifier-free guidance, Ho and
  Salimans 2022, arXiv:2207.12598):
      logits <- logits(no label) + guidance * (logits(label) - logits(no label))

Shapes
  x (B, 1, 28, 28), images of handwritten digits (MNIST): loss() takes grey levels, from 0 (black)
  to 1 (white), but the networks see binary pixels. A grey level of 0.7 becomes 1 with probability
  0.7, drawn anew each time an image is used (dynamic binarisation). z_e, z_q (B, 49, code_dim);
  codes (B, 49), integers. size: a multiple of 4, as the grid of codes has size / 4 positions per
  side.

What to expect
  recon, prior and neg_elbo are in nats per image: summed over pixels or codes, averaged over
  images. (ELBO is short for evidence lower bound, the right-hand side of the inequality above.) The
  train loss in the log is the whole loss, with all five terms, and far larger. commit is the
  squared distance |z_e - z_q|^2 of an image, summed over positions; it may grow slowly, because the
  other terms move z_e, too. perplexity is the effective number of codes in use, exp of the entropy
  of their shares in a batch: 64 if all are used equally often, 1 if only one is. Below about 10,
  most of the codebook is hardly used. With its defaults, this script reaches neg_elbo 92.72 (recon
  60.0, prior 32.7), with a perplexity of 50. For comparison, vae.py rebuilds images about as well
  (recon 60.4) from a code that costs 26 nats.
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
class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        self.expand = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.shrink = nn.Linear(4 * n_embd, n_embd, bias=False)
        nn.init.zeros_(self.proj.weight)  # at first the block is the identity
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
    n_codes: number of these; n_embd, n_head, n_layer: of the transformer (length of a token, heads,
    blocks); beta: weight of commit; rate_weight: weight of rate; size: pixels per side; n_classes:
    number of labels, or 0
    """

    def __init__(
        self,
        *,
        channels=32,
        code_dim=16,
        n_codes=64,
        n_embd=64,
        n_head=1,
        n_layer=2,
        beta=0.25,
        rate_weight=0.5,
        size=28,
        n_classes=10,
    ):
        super().__init__()
        if min(channels, n_embd, n_head) < 1 or n_codes < 2:
            raise ValueError("channels, n_embd, n_head must be >= 1, n_codes >= 2")
        if code_dim < 3:
            raise ValueError("code_dim must be >= 3: two numbers, normalised, are always 1 and -1")
        if min(n_layer, n_classes) < 0 or not (
            0 <= beta < math.inf and 0 <= rate_weight < math.inf
        ):
            raise ValueError("n_layer, n_classes, beta and rate_weight must be finite and >= 0")
        if n_embd % n_head != 0 or n_embd == n_head:
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
        # Added to the encoder's output, and at first much larger than that. So z_e differs from
        # position to position, and many codes are in use from the start. As the encoder's output
        # grows in training, the image decides more and more.
        self.offset = nn.Parameter(10 * torch.randn(self.side**2, code_dim))
        self.codebook = nn.Parameter(torch.zeros(n_codes, code_dim))  # the first batch will fill it
        # How often each vector is used, where 1 is the average. In the first batch all vectors are
        # equal, and one of them is chosen for every z_e. Usage starts so low that the first restart
        # finds even this one below 0.02, and places them all.
        self.register_buffer("usage", torch.full((n_codes,), -float(n_codes)))
        self.label = nn.Embedding(n_classes + 1, n_embd)  # the last entry is "no label"
        nn.init.zeros_(self.label.weight)  # at first labels change nothing
        self.token = nn.Embedding(n_codes + 1, n_embd)  # the last entry is "no code yet"
        self.pos_emb = nn.Parameter(0.02 * torch.randn(self.side**2, n_embd))
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, n_codes)

    def embed(self, x, y):
        """A vector for each label in y (B,), or for "no label" if y is None, with B = len(x)."""
        if y is None:
            y = torch.full((len(x),), self.n_classes, device=x.device)
        return self.label(y)

    def encode(self, x):
        """x (B, 1, H, W) in {0, 1} -> z_e (B, 49, code_dim), vectors of mean 0 and variance 1."""
        z_e = self.encoder(2 * x - 1).flatten(2).transpose(1, 2) + self.offset
        return F.layer_norm(z_e, z_e.shape[-1:])

    def distance(self, z_e):
        """z_e (B, 49, code_dim) -> |z_e - e|^2 for each e of the codebook (B, 49, n_codes)."""
        return torch.cdist(z_e, self.codebook.detach()).square()

    def decode(self, z_q):
        """z_q (B, 49, code_dim) -> logits (B, 1, H, W) of p(x | codes)."""
        return self.decoder(z_q.transpose(1, 2).unflatten(2, (self.side, self.side))).float()

    def usage_of(self, codes):
        """codes (B, 49) -> the share of each code (n_codes,). (bincount would wait for the GPU.)"""
        return codes.float().histc(self.n_codes, 0, self.n_codes) / codes.numel()

    @torch.no_grad()
    def restart(self, z_e):
        """Move each rarely used vector of the codebook onto one of the z_e (B, 49, code_dim)."""
        codes = self.distance(z_e).argmin(2)
        # a running average: an unused vector falls from 1 to 0.02 in about 390 batches
        self.usage.lerp_(self.usage_of(codes) * self.n_codes, 0.01)
        dead = self.usage < 0.02  # (n_codes,)
        z_e = z_e.flatten(0, 1)  # (49 B, code_dim)
        # A candidate for every vector, though only the dead take theirs: to draw as many as are
        # dead, the CPU would have to wait for the GPU to count them.
        candidates = z_e[torch.randint(len(z_e), dead.shape, device=dead.device)]
        self.codebook.copy_(torch.where(dead[:, None], candidates, self.codebook))
        self.usage.masked_fill_(dead, 1)

    def tokens(self, codes, y, start, end):
        """Tokens i = start, ..., end - 1, as (B, end - start, n_embd).

        Token i is the sum of embeddings of code i - 1, of position i, and of y.
        """
        # moved right by one: "no code yet" comes first, the last code drops out
        before = F.pad(codes, (1, -1), value=self.n_codes)[:, start:end]
        return self.token(before) + self.pos_emb[start:end] + self.embed(codes, y)[:, None]

    def prior(self, codes, y=None):
        """codes (B, 49) -> logits (B, 49, n_codes) of each code, given those before it."""
        h = self.tokens(codes, y, 0, codes.shape[1])
        for block in self.blocks:
            h = block(h)
        return self.head(F.layer_norm(h, h.shape[-1:])).float()

    def new_cache(self, n):
        """Room for the keys and values of all tokens in each block."""
        head_size = self.n_embd // self.n_head
        shape = (len(self.blocks), 2, n, self.n_head, self.side**2, head_size)
        return self.label.weight.new_zeros(shape)

    def logits_at(self, codes, y, i, cache):
        """Logits (B, n_codes) of code i, given those before it. Adds keys and values to cache."""
        h = self.tokens(codes, y, i, i + 1)  # (B, 1, n_embd)
        for block, block_cache in zip(self.blocks, cache):
            h = block(h, block_cache, i)
        return self.head(F.layer_norm(h, h.shape[-1:]))[:, 0].float()

    def forward(self, x, y=None):
        """x in {0, 1} -> z_e (B, 49, code_dim), codes (B, 49), squared distances of each z_e to all
        vectors (B, 49, n_codes), logits of x, logits of the codes by the prior.

        In training, it first encodes x, then restarts vectors that are hardly used (which changes
        the codebook), and then chooses the codes.
        """
        z_e = self.encode(x)
        if self.training:
            self.restart(z_e)
        distance = self.distance(z_e)
        codes = distance.argmin(2)
        z = z_e + (self.codebook[codes] - z_e).detach()  # equals z_q; its gradient goes to z_e
        return z_e, codes, distance, self.decode(z), self.prior(codes, y)

    def hidden_weights(self):
        """The weights that Muon trains: the matrices in the prior's blocks, and the convolutions of
        encoder and decoder that have equal numbers of input and output channels."""
        convolutions = []
        for layer in [*self.encoder, *self.decoder]:
            if isinstance(layer, nn.Conv2d) and layer.in_channels == layer.out_channels:
                convolutions += [layer.weight]
        return convolutions + [weight for weight in self.blocks.parameters() if weight.ndim > 1]

    def loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> the loss of the header; metrics."""
        self.check(x, y)
        x = torch.bernoulli(x)
        if y is not None and self.training:  # hide 1 label in 10, to learn p(x) as well
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.n_classes, y)
        z_e, codes, distance, logits, code_logits = self(x, y)
        # recon = -log p(x | codes)
        recon = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        # like codebook[codes], but on a CPU its gradient is summed in the same order each time, so
        # that a run can be repeated exactly
        z_q = F.embedding(codes, self.codebook)  # (B, 49, code_dim)
        # codebook_loss = |sg(z_e) - z_q|^2, commit = |z_e - sg(z_q)|^2, where sg stops the
        # gradient: equal in value, but one moves the vectors, the other moves the encoder
        codebook_loss = (z_e.detach() - z_q).square().sum() / len(x)
        commit = (z_e - z_q.detach()).square().sum() / len(x)
        # prior = -sum_i log p(codes_i | codes_<i)
        prior = F.cross_entropy(code_logits.transpose(1, 2), codes, reduction="sum") / len(x)
        # what codes whose vectors are near z_e cost under the prior, for the encoder to learn:
        # rate = -sum_i sum_k softmax_k(-|z_e_i - sg(e_k)|^2) sg(log p(k | codes_<i))
        choice = (-distance).softmax(2)
        rate = -(choice * code_logits.detach().log_softmax(2)).sum() / len(x)
        loss = recon + codebook_loss + self.beta * commit + prior + self.rate_weight * rate
        # perplexity = exp(-sum_k p_k log p_k), where p_k is the share of code k
        perplexity = torch.special.entr(self.usage_of(codes)).sum().exp()
        metrics = {"neg_elbo": recon + prior, "recon": recon, "prior": prior}
        return loss, {**metrics, "commit": commit, "perplexity": perplexity}

    @torch.no_grad()
    def sample(self, n, y=None, top=None, guidance=1.0):
        """Draw codes from the prior and decode them -> (n, 1, H, W), the probabilities of pixels.

        y:        (n,) labels, or None
        top:      (n, k) the first k codes, or None to draw them as well
        guidance: 0 ignores y, 1 draws from p(codes | y), above 1 exaggerates what y adds
        """
        codes = torch.zeros(n, self.side**2, dtype=torch.int64, device=self.label.weight.device)
        n_given = 0
        if top is not None:
            codes[:, : top.shape[1]] = top
            n_given = top.shape[1]
        guided = y is not None and guidance != 1
        cache = self.new_cache(n)
        if guided:
            uncond_cache = self.new_cache(n)
        for i in range(self.side**2):
            # also for given codes: it fills the cache, which later codes read
            logits = self.logits_at(codes, y, i, cache)  # (n, n_codes)
            if guided:
                uncond = self.logits_at(codes, None, i, uncond_cache)
                logits = uncond + guidance * (logits - uncond)
            if i >= n_given:
                codes[:, i] = logits.softmax(1).multinomial(1)[:, 0]
        return self.decode(self.codebook[codes]).sigmoid()

    @torch.no_grad()
    def pictures(self, x):
        """x (N, 1, H, W) images -> {name: pictures}:

        reconstruction  (3 N, 1, H, W): in turn, a row of ten images, one of their codes as greys,
                        and one of what these decode to
        completion      (60, 1, H, W): ten images; their first three rows of codes; four rows of
                        images, for which the other codes are drawn
        interpolation   (10 N, 1, H, W): a row from the z_e of each image to that of the next (from
                        the last to the first)
        """
        x = torch.bernoulli(x)
        side = self.side
        z_e, codes, _, logits, _ = self(x)
        maps = codes.view(-1, 1, side, side) / (self.n_codes - 1)
        maps = F.interpolate(maps, scale_factor=4)  # as large as x
        reconstruction = []
        for strips in zip(x.split(10), maps.split(10), logits.sigmoid().split(10)):
            reconstruction += strips

        n_rows = side // 2  # of codes that are given
        upper = maps[:10].clone()
        upper[:, :, 4 * n_rows :] = 0.5  # grey: not given
        top = codes[:10, : n_rows * side].repeat(4, 1)
        completion = torch.cat([x[:10], upper, self.sample(len(top), top=top)])

        a = z_e[:, None]  # (N, 1, 49, code_dim)
        b = z_e.roll(-1, 0)[:, None]  # the next
        w = torch.linspace(0, 1, 10, device=x.device)[:, None, None]
        z_e = (a + (b - a) * w).flatten(0, 1)  # (N, 10, 49, code_dim) -> (10 N, 49, code_dim)
        z_q = self.codebook[self.distance(z_e).argmin(2)]
        return {
            "reconstruction": torch.cat(reconstruction),
            "completion": completion,
            "interpolation": self.decode(z_q).sigmoid(),
        }

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
NAME = "vqvae"  # of the folder in out/; saved in checkpoints, so that others are refused
Model = VQVAE
EPOCHS = 20
BATCH_SIZE = 64
LR = 1e-2


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
