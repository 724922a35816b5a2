"""VAE: write an image as 32 random numbers, read it back, and so learn a bound on log p(x).

    python vae.py --epochs 10      # 4 minutes on 2 CPU cores: test neg_elbo 89.95 nats (seed 0)

Kingma and Welling 2013, arXiv:1312.6114; the tighter bound: Burda et al. 2015, arXiv:1509.00519.
Departures: convolutions around the one hidden layer of either MLP, EMA of the weights.

Idea    An image is made in two steps: a code z of 32 numbers from a fixed Gaussian, then every
        pixel, given z, by a decoder. p(x) is an integral over all z, but almost every z draws
        something else than x. So an encoder learns where to look, q(z | x); the
        further that is from p(z), the higher the price, kl.
Maths   log p(x) >= E_q[log p(x | z)] - KL(q(z | x) || p(z)) = ELBO = -(recon + kl)
            q(z | x) = N(mu, sigma^2), p(z) = N(0, 1), p(x | z) = prod_i Bernoulli(logits_i)
        z = mu + sigma eps leaves the chance to eps ~ N(0, 1): gradients reach mu and sigma. The
        encoder gives logvar = log sigma^2: any number will do, sigma > 0 needs no clamp.
        With k draws from q the bound is tighter, and exact in the limit; the run ends with it:
            log p(x) >= E log(1/k sum_j p(x, z_j) / q(z_j | x)) = -iwae
        Sampling: z ~ N(0, 1), then the mean of p(x | z), which coin flips would only speckle.
Shapes  x (B, 1, 28, 28) in [0, 1] outside, {0, 1} inside: 1 with a probability of the grey level,
        drawn anew each time; mu, logvar, z (B, z_dim); logits like x. size: a multiple of 4.
Units   nats/image: sums over the pixels and over z, a mean over the batch alone. Means
        over both would weigh kl 784 / 32 = 24.5 times too much, and bound nothing.
Healthy recon falls from 73 nats after one epoch to 63 after ten, kl stays near 27, iwae ends at
        86.3. Reconstructions look better than samples: q uses only a part of what p(z) draws.
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
        h = self.conv1(F.silu(x)).permute(0, 2, 3, 1)  # (B, H, W, C): normalise each pixel's C
        h = F.layer_norm(h, h.shape[-1:]).permute(0, 3, 1, 2)  # (B, C, H, W)
        return x + self.conv2(F.silu(torch.addcmul(shift, h, 1 + scale)))


class VAE(nn.Module):
    """Encoder q(z | x), decoder p(x | z), and the bound that trains both."""

    def __init__(self, *, channels=64, hidden=512, z_dim=32, n_embd=16, size=28, n_classes=10):
        super().__init__()
        self.z_dim, self.n_classes, self.grid = z_dim, n_classes, (channels, size // 4, size // 4)
        self.label = nn.Embedding(n_classes + 1, n_embd)  # the last entry is "no label"
        self.stem = nn.Conv2d(16, channels, 3, padding=1)
        self.encoder = ResBlock(channels, n_embd)
        flat, to_z = math.prod(self.grid), nn.Linear(hidden, 2 * z_dim)  # mu and logvar
        self.shrink = nn.Sequential(nn.Linear(flat, hidden), nn.SiLU(), to_z)
        self.expand = nn.Sequential(nn.Linear(z_dim, hidden), nn.SiLU(), nn.Linear(hidden, flat))
        self.decoder = ResBlock(channels, n_embd)
        self.head = nn.Conv2d(channels, 16, 3, padding=1)

    def embed(self, x, y):
        """y (B,) labels, or None for "no label" -> a vector each (B, ...), on the device of x."""
        if y is None:
            y = torch.full((len(x),), self.n_classes, device=x.device)
        return self.label(y)

    def encode(self, x, y=None):
        """x (B, 1, H, W) in {0, 1} -> mu, logvar (B, z_dim) of q(z | x)."""
        h = self.stem(F.pixel_unshuffle(2 * x - 1, 4))  # (B, 16, 7, 7) -> (B, C, 7, 7)
        h = self.encoder(h, self.embed(x, y))
        return self.shrink(F.silu(h).flatten(1)).float().chunk(2, dim=1)

    def decode(self, z, y=None):
        """z (B, z_dim) -> logits (B, 1, H, W) of p(x | z)."""
        h = self.decoder(self.expand(z).view(-1, *self.grid), self.embed(z, y))  # (B, C, 7, 7)
        return F.pixel_shuffle(self.head(F.silu(h)), 4).float()  # (B, 16, 7, 7) -> (B, 1, 28, 28)

    def forward(self, x, y=None):  # x in {0, 1} -> logits like x; mu, logvar (B, z_dim)
        mu, logvar = self.encode(x, y)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        return self.decode(z, y), mu, logvar

    def loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> what to minimise, -ELBO, and its parts."""
        x = torch.bernoulli(x)
        if y is not None and self.training:  # hide 1 label in 10: one model with and without them
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.n_classes, y)
        logits, mu, logvar = self(x, y)
        recon = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        # kl = 1/2 sum_j (mu_j^2 + sigma_j^2 - 1 - log sigma_j^2)
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1).mean()
        return recon + kl, {"neg_elbo": recon + kl, "recon": recon, "kl": kl}

    @torch.no_grad()
    def bound(self, x, y=None, k=64):
        """As loss, on x, with iwae: minus the bound of k draws (importance-weighted), in nats."""
        x = torch.bernoulli(x)
        metrics = self.loss(x, y)[1]  # draws x again, which leaves {0, 1} as it is
        mu, logvar = self.encode(x, y)
        log_w = []
        for _ in range(k):  # one draw at a time: all that has to fit into memory
            eps = torch.randn_like(mu)
            z = mu + (0.5 * logvar).exp() * eps
            nll = F.binary_cross_entropy_with_logits(self.decode(z, y), x, reduction="none")
            # log w = log p(z) - log q(z | x) + log p(x | z)
            log_w.append(0.5 * (eps**2 + logvar - z**2).sum(1) - nll.flatten(1).sum(1))  # (B,)
        iwae = math.log(k) - torch.stack(log_w).logsumexp(0).mean()
        return iwae, metrics | {"iwae": iwae}

    @torch.no_grad()
    def sample(self, n, y=None):
        """n mean images (n, 1, H, W) in [0, 1]; y (n,) labels or None."""
        return self.decode(torch.randn(n, self.z_dim, device=self.label.weight.device), y).sigmoid()

    @torch.no_grad()
    def pictures(self, x):
        """x (N, 1, H, W) images -> reconstruction (2 N, 1, H, W), interpolation (10 N, 1, H, W)."""
        x = torch.bernoulli(x)
        mu, _ = self.encode(x)
        rows = torch.cat(sum(zip(x.split(10), self.decode(mu).sigmoid().split(10)), ()))
        a, b = mu[:, None], mu.roll(-1, 0)[:, None]  # (N, 1, z_dim): each and the next
        line = a + (b - a) * torch.linspace(0, 1, 10, device=x.device)[:, None]  # (N, 10, z_dim)
        between = self.decode(line.flatten(0, 1)).sigmoid()
        return {"reconstruction": rows, "interpolation": between}


# ---------------------------------------------------------------- train
def evaluate(measure, images, batch_size=500):
    """Mean of each metric of measure(x) over uint8 images (N, 1, H, W); equal noise every time."""
    total, n = Counter(), len(images)
    for i, x in enumerate(images.split(batch_size)):
        torch.manual_seed(i)
        total.update({k: float(v) * len(x) / n for k, v in measure(x / 255)[1].items()})  # adds
    return dict(total)


def main(argv=None, Model=VAE, epochs=30, batch_size=64, lr=2e-3):  # to suit Model
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
