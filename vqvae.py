"""VQ-VAE: write an image as 7 x 7 codes out of 64, and learn which codes go together.

    python vqvae.py --epochs 10      # 9 minutes on 2 CPU cores: test neg_elbo 94.66 nats (seed 0)

Van den Oord et al. 2017, arXiv:1711.00937; restarts: Dhariwal et al. 2020, arXiv:2005.00341; rate:
Chou et al. 1989 (entropy-constrained VQ). Departures: a transformer as the prior, trained in the
same run; the encoder is charged for unlikely codes and has an offset a place; EMA of the weights.

Idea    A VAE with symbols for numbers: the encoder makes a vector z_e for each of 7 x 7 places, and
        the nearest of 64 vectors, the codebook, replaces it: z_q. The decoder makes the image from
        these. Codes at random make scribbles, so a transformer, the prior, learns which are likely.
        To sample, draw 49 codes from the prior, one by one, and decode them once.
Maths   log p(x) >= log p(x | codes) + log p(codes) = -(recon + prior) = -neg_elbo, for any codes
            loss = recon + |sg(z_e) - z_q|^2 + beta |z_e - sg(z_q)|^2 + prior + charge * rate
        sg stops the gradient: the second term moves the codebook, as k-means would; the third, the
        commitment, keeps z_e near its code. To choose the nearest has no gradient, so recon hands
        its gradient at z_q to z_e, as if the two were equal (straight-through). prior trains the
        transformer only. With recon alone, the encoder would use all it can, 49 log 64 = 204 nats;
        rate, the mean price of the codes near z_e under the prior, draws z_e to the cheaper ones.
Shapes  x (B, 1, 28, 28) in [0, 1] outside, {0, 1} inside: 1 with a probability of the grey level,
        drawn anew each time; z_e, z_q (B, 49, code_dim); codes (B, 49). size: a multiple of 4.
Units   nats/image: sums over pixels or codes, a mean over images; commit: a squared distance.
        perplexity: exp(entropy) of the codes in a batch, 64 if all are used alike, 1 if only one.
Healthy neg_elbo falls to 100 nats in one epoch and to 95 in ten, 52 of them recon; perplexity is
        near 50 from epoch 2 on (below 10: the codebook has collapsed); commit grows, 36 to 54.
"""

import argparse
import io
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


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
        for last in self.proj, self.shrink:
            nn.init.zeros_(last.weight)  # at first the block is the identity

    def forward(self, x, cache=None):  # x (B, T, n_embd); cache (2, B, n_head, i + 1, head size)
        h = self.qkv(F.layer_norm(x, x.shape[-1:])).unflatten(2, (3, self.n_head, -1))
        q, k, v = h.permute(2, 0, 3, 1, 4)  # (B, n_head, T, head size) each
        q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        if cache is not None:  # T = 1: token i; keys and values of tokens 0..i, so no mask
            cache[0, ..., -1:, :], cache[1, ..., -1:, :] = k, v
            k, v = cache
        h = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.proj(h.transpose(1, 2).flatten(2))
        return x + self.shrink(self.expand(F.layer_norm(x, x.shape[-1:])).relu().square())


class VQVAE(nn.Module):
    """An autoencoder with a codebook in its middle, and a transformer over the codes."""

    def __init__(self, *, channels=64, code_dim=16, n_codes=64, n_embd=64, n_head=1, n_layer=2,
                 beta=0.25, charge=0.5, size=28, n_classes=10):
        super().__init__()
        self.side, self.n_classes, self.n_embd, self.n_head = size // 4, n_classes, n_embd, n_head
        self.n_codes, self.beta, self.charge = n_codes, beta, charge
        conv = lambda n_in, n_out: nn.Conv2d(n_in, n_out, 3, padding=1)
        self.encoder = nn.Sequential(nn.PixelUnshuffle(4), conv(16, channels), nn.SiLU(),
                                     conv(channels, channels), nn.SiLU(), conv(channels, code_dim))
        self.decoder = nn.Sequential(conv(code_dim, channels), nn.SiLU(), conv(channels, channels),
                                     nn.SiLU(), conv(channels, 16), nn.PixelShuffle(4))
        self.offset = nn.Parameter(10 * torch.randn(self.side**2, code_dim))  # at first it decides
        self.codebook = nn.Parameter(torch.zeros(n_codes, code_dim))  # restart will fill it
        self.register_buffer("usage", -n_codes * torch.ones(n_codes))  # 1: average, < 0: unfilled
        self.label = nn.Embedding(n_classes + 1, n_embd)  # the last entry is "no label"
        nn.init.zeros_(self.label.weight)
        self.token = nn.Embedding(n_codes + 1, n_embd)  # the last entry is "no code yet"
        self.place = nn.Parameter(0.02 * torch.randn(self.side**2, n_embd))
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, n_codes)

    def embed(self, x, y):
        """y (B,) labels, or None for "no label" -> a vector each (B, ...), on the device of x."""
        if y is None:
            y = torch.full((len(x),), self.n_classes, device=x.device)
        return self.label(y)

    def encode(self, x):
        """x (B, 1, H, W) in {0, 1} -> z_e (B, 49, code_dim), each of mean 0, variance 1."""
        z_e = self.encoder(2 * x - 1).flatten(2).transpose(1, 2) + self.offset
        return F.layer_norm(z_e, z_e.shape[-1:])

    def distance(self, z_e):  # |z_e - e|^2 for each e of the codebook: (B, 49, n_codes)
        return torch.cdist(z_e, self.codebook.detach()).square()

    def decode(self, z_q):
        """z_q (B, 49, code_dim) -> logits (B, 1, H, W) of p(x | codes)."""
        return self.decoder(z_q.transpose(1, 2).unflatten(2, (self.side, self.side))).float()

    def prior(self, codes, y=None, start=0, end=None, caches=None):
        """Logits (B, T, n_codes) of codes start to end - 1, each from those before it."""
        past = F.pad(codes, (1, -1), value=self.n_codes)[:, start:end]
        h = self.token(past) + self.place[start:end] + self.embed(codes, y)[:, None]
        caches = [None] * len(self.blocks) if caches is None else caches
        for block, cache in zip(self.blocks, caches):
            h = block(h, cache)
        return self.head(F.layer_norm(h, h.shape[-1:])).float()

    @torch.no_grad()
    def restart(self, z_e):
        """Move each code that is hardly ever used to one of these z_e (B, 49, code_dim)."""
        z_e, codes = z_e.flatten(0, 1), self.distance(z_e).argmin(2).flatten()
        share = codes.float().histc(self.n_codes, 0, self.n_codes) / len(codes)
        dead = self.usage.lerp_(share * self.n_codes, 0.01) < 0.02  # some 390 batches unused
        some = z_e[torch.randint(len(z_e), dead.shape, device=dead.device)]
        self.codebook.copy_(some.where(dead[:, None], self.codebook))
        self.usage.masked_fill_(dead, 1)

    def forward(self, x, y=None):  # x in {0, 1} -> z_e, codes (B, 49), logits of x, of the codes
        z_e = self.encode(x)
        if self.training:
            self.restart(z_e)
        codes = self.distance(z_e).argmin(2)
        z = z_e + (self.codebook[codes] - z_e).detach()  # equals z_q; its gradient goes to z_e
        return z_e, codes, self.decode(z), self.prior(codes, y)

    def scan(self, codes, y):
        """Yields the logits (B, n_codes) of each code in order; the caller then writes it."""
        shape = len(codes), self.n_head, codes[0].numel(), self.n_embd // self.n_head
        caches = self.label.weight.new_zeros(len(self.blocks), 2, *shape)
        for i in range(codes[0].numel()):
            yield self.prior(codes, y, i, i + 1, caches[..., : i + 1, :])[:, 0]

    def loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> what to minimise, and its parts."""
        x = torch.bernoulli(x)
        if y is not None and self.training:  # hide 1 label in 10: one model with and without them
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.n_classes, y)
        z_e, codes, logits, code_logits = self(x, y)
        recon = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        # codebook = |sg(z_e) - z_q|^2, commit = |z_e - sg(z_q)|^2: the same but for who moves
        z_q = F.embedding(codes, self.codebook)  # (B, 49, code_dim); [codes] adds in random order
        codebook = (z_e.detach() - z_q).square().sum() / len(x)
        commit = (z_e - z_q.detach()).square().sum() / len(x)
        # prior = -sum_i log p(codes_i | codes_<i)
        prior = F.cross_entropy(code_logits.transpose(1, 2), codes, reduction="sum") / len(x)
        # rate = -sum_i sum_k softmax_k(-|z_e_i - e_k|^2) sg(log p(k | codes_<i))
        choice = (-self.distance(z_e)).softmax(2)
        rate = -(choice * code_logits.detach().log_softmax(2)).sum() / len(x)
        loss = recon + codebook + self.beta * commit + prior + self.charge * rate
        share = codes.float().histc(self.n_codes, 0, self.n_codes) / codes.numel()
        perplexity = torch.special.entr(share).sum().exp()
        return loss, {"neg_elbo": recon + prior, "recon": recon, "prior": prior,
                      "commit": commit, "perplexity": perplexity}

    @torch.no_grad()
    def sample(self, n, y=None, top=None, guidance=1.0):
        """n mean images (n, 1, H, W) in [0, 1], of codes from the prior; y (n,) or None.

        top (n, h): the first h codes, or None to draw these, too
        guidance: 0 ignores y, 1 draws from p(codes | y), more exaggerates what y adds
        """
        top = self.label.weight.new_zeros(n, 0, dtype=torch.int64) if top is None else top
        codes = F.pad(top, (0, len(self.place) - top.shape[1]))  # (n, 49), still empty at the end
        scans = [self.scan(codes, y)] + [self.scan(codes, None)] * (y is not None and guidance != 1)
        for i, (logits, *free) in enumerate(zip(*scans)):
            if free:
                logits = free[0] + guidance * (logits - free[0])
            if i >= top[0].numel():
                codes[:, i] = logits.softmax(1).multinomial(1)[:, 0]
        return self.decode(self.codebook[codes]).sigmoid()

    @torch.no_grad()
    def pictures(self, x):
        """x (N, 1, H, W) images -> reconstruction (3 N, 1, H, W): rows of images, of their codes as
        greys, of reconstructions; completion (60, 1, H, W): 10 images, their first 3 rows of codes,
        4 draws of the others; interpolation (10 N, 1, H, W), from each z_e to the next."""
        x, s = torch.bernoulli(x), self.side
        z_e, codes, logits, _ = self(x)
        maps = F.interpolate(codes.view(-1, 1, s, s) / (self.n_codes - 1), scale_factor=4)  # as x
        rows = torch.cat(sum(zip(x.split(10), maps.split(10), logits.sigmoid().split(10)), ()))
        top, maps[:, :, s // 2 * 4 :] = codes[:10, : s // 2 * s].repeat(4, 1), 0.5
        halves = torch.cat([x[:10], maps[:10], self.sample(len(top), top=top)])
        a, b = z_e[:, None], z_e.roll(-1, 0)[:, None]  # (N, 1, 49, code_dim): each and the next
        line = a + (b - a) * torch.linspace(0, 1, 10, device=x.device)[:, None, None]
        z_q = self.codebook[self.distance(line.flatten(0, 1)).argmin(2)]  # (10 N, 49, code_dim)
        between = self.decode(z_q).sigmoid()
        return {"reconstruction": rows, "completion": halves, "interpolation": between}


# ---------------------------------------------------------------- train
def evaluate(measure, images, batch_size=500):
    """Mean of each metric of measure(x) over uint8 images (N, 1, H, W); equal noise every time."""
    total, n = Counter(), len(images)
    for i, x in enumerate(images.split(batch_size)):
        torch.manual_seed(i)
        total.update({k: float(v) * len(x) / n for k, v in measure(x / 255)[1].items()})  # adds
    return dict(total)


def main(argv=None, Model=VQVAE, epochs=20, batch_size=64, lr=5e-3):  # to suit Model
    kinds = ["mps"] * torch.mps.is_available() + ["cpu"] + ["cuda"] * torch.cuda.is_available()
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--epochs", type=int, default=epochs, help="passes over the images (default %(default)s)")
    flag("--batch-size", type=int, default=batch_size, help="images a step (default %(default)s)")
    flag("--lr", type=float, default=lr, help="peak learning rate of AdamW (default %(default)s)")
    flag("--seed", type=int, default=0, help="of weights, order, noise and samples (default 0)")
    flag("--device", default="auto", choices=["auto", *kinds], help="auto: cuda, or else cpu")
    flag("--dataset", default="MNIST", choices=["MNIST", "FashionMNIST", "KMNIST"], help="(MNIST)")
    flag("--data-dir", default="data", help="folder of the data sets (default %(default)s)")
    flag("--out-dir", default=f"out/{Path(__file__).stem}", help="for output (default %(default)s)")
    flag("--class-cond", action="store_true", help="learn labels too; grids have a column a class")
    flag("--compile", action="store_true", help="torch.compile: a slow start, then faster steps")
    flag("--resume", action="store_true", help="go on from model.pt; repeat the other flags")
    flag("--sample", type=int, metavar="N", help="do not train: N samples of model.pt")
    flag("--dry-run", action="store_true", help="two batches of everything, into OUT_DIR-dry")
    flag("--tensorboard", action="store_true", help="log figures and samples into OUT_DIR, too")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.lr, 1 if args.sample is None else args.sample) <= 0:
        parser.error("--epochs, --batch-size, --lr and --sample must be above 0")
    from common import load_mnist, save_images  # elsewhere: use your own tensors and pictures
    torch.manual_seed(args.seed)
    device, out = args.device.replace("auto", kinds[-1]), Path(args.out_dir + "-dry" * args.dry_run)
    config = Model.__init__.__kwdefaults__ | {"n_classes": 10 * args.class_cond}
    model = Model(**config).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)
    ema = AveragedModel(model, multi_avg_fn=lambda *a: get_ema_multi_avg_fn(0.5 ** (20 / step))(*a))
    net, kept = ema.module.eval().requires_grad_(False), {}  # net is what we test, sample and keep
    parts = {"model": net, "ema": ema, "weights": model, "optimizer": optimizer}
    try:
        if args.resume or args.sample: kept = torch.load(out / "model.pt", "cpu", weights_only=True)
        for key in kept and parts: parts[key].load_state_dict(kept[key])
    except Exception as error:  # a damaged or foreign file can raise anything
        sys.exit(f"cannot load {out}/model.pt: {' '.join(str(error).split())}")
    amp = torch.autocast(device, torch.bfloat16, torch.cuda.is_bf16_supported(False)
                         if device == "cuda" else torch.cpu._is_avx512_bf16_supported())

    def sample(n=4 if args.dry_run else 100):  # from the same noise each time
        torch.manual_seed(args.seed)
        return net.sample(n, torch.arange(n, device=device) % 10 if args.class_cond else None)
    if args.sample: return print("wrote", save_images(sample(args.sample), out / "samples"))
    cut, log = 2 * args.batch_size if args.dry_run else None, kept.get("log", [])
    train_x, train_y, test_x, _ = (d[:cut] for d in load_mnist(args.data_dir, args.dataset, device))
    steps = len(train_x) // args.batch_size or parser.error("--batch-size exceeds the images")
    last, loss_fn = args.epochs * steps, torch.compile(model.loss) if args.compile else model.loss
    print(f"{out}: epochs {len(log) + 1} to {args.epochs} of {steps} steps on {device}", flush=True)
    for epoch in range(len(log) + 1, args.epochs + 1):  # lr: up for 2 % of the run, then down to 0
        torch.manual_seed(args.seed << 20 | epoch)  # the same order and noise after --resume
        order, total, start = torch.randperm(len(train_x)).to(device), 0, time.time()
        for step, i in enumerate(order.split(args.batch_size)[:steps], (epoch - 1) * steps + 1):
            optimizer.param_groups[0]["lr"] = args.lr * min(50 * step, last + 1 - step) / last
            loss, _ = amp(loss_fn)(train_x[i] / 255, train_y[i] if args.class_cond else None)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.detach()
            ema.update_parameters(model)  # the last 5 % of all steps so far make up half of net
            if sys.stdout.isatty() and step % 10 == 0:
                pace = (time.time() - start) / (step - (epoch - 1) * steps)  # seconds a step
                print(f"step {step}/{last} | loss {loss:.4g} | {args.batch_size / pace:,.0f} img/s"
                      f" | {pace * (last - step):.0f} s left  ", end="\r", flush=True)
        train, seconds = float(total) / steps, time.time() - start  # then test, at last by bound
        test = evaluate(amp(epoch == args.epochs and getattr(net, "bound", 0) or net.loss), test_x)
        log.append({"epoch": epoch, "seconds": seconds, "train_loss": train} | test)
        if not math.isfinite(sum(log[-1].values())): sys.exit(f"loss {train}: try a smaller --lr")
        save_images(grid := sample(), out / f"samples_{epoch:04d}")
        state = {key: part.state_dict() for key, part in parts.items()}
        torch.save(state | {"config": config, "log": log}, buffer := io.BytesIO())
        (out / "model.pt.part").write_bytes(buffer.getvalue())
        os.replace(out / "model.pt.part", out / "model.pt")  # never a half-written model.pt
        rows = [max(log, key=len), *(row.values() for row in log)]  # names: of the longest row
        (out / "log.csv").write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
        figures = " ".join(f"{key} {value:.4g}" for key, value in test.items())
        print(f"epoch {epoch:3}/{args.epochs} | train loss {train:.4g} | test {figures} | "
              f"{seconds:.1f} s | {steps * args.batch_size / seconds:,.0f} img/s", flush=True)
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            with SummaryWriter(out) as board:
                board.add_images("samples", grid, epoch)
                for figure in log[-1].items(): board.add_scalar(*figure, epoch)
    for name, x in ({"samples": sample()} | net.pictures(test_x[::64][:20] / 255)).items():
        save_images(x, out / name)


if __name__ == "__main__":
    try: main()
    except (OSError, ImportError, KeyboardInterrupt) as error:
        sys.exit(f"{Path(__file__).name}: error: {str(error) or 'interrupted, --resume goes on'}")
