"""Gated PixelCNN: one stack of convolutions looks up, one looks left, and no blind spot.

    python gatedcnn.py --epochs 2      # 8 minutes on 2 CPU cores: test nll 83.56 nats (seed 0)

Van den Oord et al. 2016, arXiv:1606.05328; the sampler: Ramachandran et al. 2017, arXiv:1704.06001.
Departures: a shift of the input instead of masks, embeddings of row and column, EMA.

Idea    A convolution sees all around a pixel, but a guess must rest on the pixels before it alone:
        v looks up, h looks left, and v tells h. Training makes all 784 guesses in one pass;
        sampling takes 784 steps, which cost one pass: v runs once a row, and h once a pixel.
Maths   log p(x) = sum_i log p(x_i | x_<i),  p(x_i = 1 | x_<i) = sigmoid(logits_i): exact, no bound
            v v v v v     v reads the image moved down a row: at X, it knows rows above alone, so
            h h X         its kernels need no mask. h reads it moved right: it knows what is left.
        No blind spot, unlike pixelcnn.py: X is guessed from all of #, 12 rows up and 11 pixels
            # # # # # # # # # # # # # #     aside. v widens in each layer, but moves down only
            # # # # # X                     once: moved in each, it could go right only going up.
Shapes  x (B, 1, 28, 28) in [0, 1] outside, {0, 1} inside: 1 with a probability of the grey level,
        drawn anew each time; v, h (B, 28, 28, channels), channels last for the linear layers.
Units   nll: nats/image, sum over pixels, mean over images; bpd = nll / (784 log 2): bits a pixel.
Healthy Knowing nothing costs 543 nats; one epoch brings the nll to 84.6, two to 83.6.
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
class GatedBlock(nn.Module):
    """One layer of the vertical stack, and one of the horizontal stack, which listens to it."""

    def __init__(self, channels, k):
        super().__init__()
        self.vertical = nn.Conv2d(channels, 2 * channels, (k // 2 + 1, k))
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, k // 2 + 1))
        self.tell = nn.Linear(2 * channels, 2 * channels)
        self.out, self.skip = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def gate(self, pair):  # (..., 2 C) -> (..., C): values, let through by as many gates
        value, gate = pair.unflatten(-1, (2, -1)).movedim(-2, 0).contiguous()  # faster than chunk
        return value.tanh() * gate.sigmoid()

    def up(self, seen):  # v and its edge on three sides -> the next v, and what h is told
        pair = self.vertical(seen.movedim(3, 1)).movedim(1, 3)
        return self.gate(pair), self.tell(pair)

    def left(self, h, skips, told, seen):  # seen: h and its edge on the left; skips: for the head
        mix = self.gate(self.horizontal(seen.movedim(3, 1)).movedim(1, 3) + told)
        return h + self.out(mix), skips + self.skip(mix)


class GatedPixelCNN(nn.Module):
    """A vertical and a horizontal stack of gated convolutions over the image."""

    def __init__(self, *, channels=32, n_layer=4, kernel=5, size=28, n_classes=10):
        super().__init__()
        self.size, self.n_classes, self.kernel = size, n_classes, kernel
        self.to_v, self.to_h = nn.Conv2d(1, channels, (4, 7)), nn.Conv2d(1, channels, (1, 3))
        self.tell, self.head = nn.Linear(channels, channels), nn.Linear(channels, 1)
        self.row = nn.Parameter(0.02 * torch.randn(size, 1, channels))
        self.col = nn.Parameter(0.02 * torch.randn(1, size, channels))
        self.label = nn.Embedding(n_classes + 1, channels)  # the last entry is "no label"
        nn.init.zeros_(self.label.weight)
        self.blocks = nn.ModuleList(GatedBlock(channels, kernel) for _ in range(n_layer))

    def embed(self, x, y):
        """y (B,) labels, or None for "no label" -> a vector each (B, ...), on the device of x."""
        if y is None:
            y = torch.full((len(x),), self.n_classes, device=x.device)
        return self.label(y)

    def forward(self, x, y=None):  # x (B, 1, H, W) in {0, 1} -> logits (B, 1, H, W)
        place, p = self.row + self.col + self.embed(x, y)[:, None, None], self.kernel // 2
        v = self.to_v(F.pad(x, (3, 3, 4, -1))).movedim(1, 3)  # the rows above, (B, H, W, channels)
        v = v + place.type_as(v)
        h, skips = self.to_h(F.pad(x, (3, -1))).movedim(1, 3) + self.tell(v), 0
        for block in self.blocks:
            v, told = block.up(F.pad(v, (0, 0, p, p, p, 0)))
            h, skips = block.left(h, skips, told, F.pad(h, (0, 0, p, 0)))
        return self.head((h + skips).relu()).movedim(3, 1).float()

    def scan(self, x, y):
        """Yields the logits (B,) of each pixel in order; the caller then writes it into x."""
        place, p = self.row + self.col + self.embed(x, y)[:, None, None], self.kernel // 2
        vs, hs = ([F.pad(0 * place, (0, 0, p, p, p, 0)) for _ in self.blocks] for _ in "vh")
        for r in range(self.size):  # the rows above are drawn
            v = self.to_v(F.pad(x, (3, 3, 4, 0))[:, :, r : r + 4]).movedim(1, 3) + place[:, r, None]
            tells = [self.tell(v)]  # v (B, 1, W, channels)
            for block, seen in zip(self.blocks, vs):
                seen[:, p + r, p:-p] = v[:, 0]
                v, told = block.up(seen[:, r : r + p + 1])
                tells.append(told)
            for c in range(self.size):
                h = self.to_h(F.pad(x, (3, 0))[:, :, r, None, c : c + 3]).movedim(1, 3)
                h, skips = h + tells[0][:, :, c, None], 0  # (B, 1, 1, channels)
                for block, seen, told in zip(self.blocks, hs, tells[1:]):
                    seen[:, :1, p + c] = h[:, :, 0]  # the first row of hs serves all r
                    h, skips = block.left(h, skips, told[:, :, c, None], seen[:, :1, c : c + p + 1])
                yield self.head((h + skips).relu()).flatten().float()

    def loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> -log p(x) in nats/image, {"nll", "bpd"}."""
        x = torch.bernoulli(x)
        if y is not None and self.training:  # hide 1 label in 10: one model with and without them
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.n_classes, y)
        nll = F.binary_cross_entropy_with_logits(self(x, y), x, reduction="sum") / len(x)
        return nll, {"nll": nll, "bpd": nll / (x[0].numel() * math.log(2))}

    @torch.no_grad()
    def sample(self, n, y=None, top=None, guidance=1.0):
        """n binary images (n, 1, H, W), each pixel drawn given those before it; y (n,) or None.

        top (n, 1, h, W): the first h rows in {0, 1}, or None to draw these, too
        guidance: 0 ignores y, 1 draws from p(x | y), more exaggerates what y adds
        """
        top = self.label.weight.new_zeros(n, 1, 0, self.size) if top is None else top
        x = F.pad(top, (0, 0, 0, self.size - top.shape[2]))  # (n, 1, H, W), still empty below
        scans = [self.scan(x, y)] + [self.scan(x, None)] * (y is not None and guidance != 1)
        for i, (logits, *free) in enumerate(zip(*scans)):
            if free:
                logits = free[0] + guidance * (logits - free[0])
            if i >= top[0].numel():
                x.view(n, -1)[:, i] = torch.bernoulli(logits.sigmoid())
        return x

    @torch.no_grad()
    def pictures(self, x):
        """x (N, 1, H, W) images -> sampling, a frame each half row (57, 20, 1, H, W); completion:
        10 images, their upper halves, and 4 draws of each lower half (60, 1, H, W); field: how
        much the guess of the middle pixel depends on each pixel, black: not (1, 1, 8 H, 8 W)."""
        x, half = torch.bernoulli(x[:10]), self.size // 2
        order = torch.arange(self.size**2, device=x.device).view(self.size, -1)
        top, drawn = x[:, :, :half].repeat(4, 1, 1, 1), self.sample(20)
        frames = [drawn.where(order < i, 0.5) for i in range(0, self.size**2 + 1, half)]
        rows = [x, x.where(order < half * self.size, 0.5), self.sample(len(top), top=top)]
        slope = torch.func.grad(lambda x: self(x)[..., half, half].sum())(x).abs().mean(0, True)
        field = F.interpolate((slope > 0) * (0.3 + 0.7 * slope / slope.max()), scale_factor=8)
        return {"sampling": torch.stack(frames), "completion": torch.cat(rows), "field": field}


# ---------------------------------------------------------------- train
def evaluate(measure, images, batch_size=500):
    """Mean of each metric of measure(x) over uint8 images (N, 1, H, W); equal noise every time."""
    total, n = Counter(), len(images)
    for i, x in enumerate(images.split(batch_size)):
        torch.manual_seed(i)
        total.update({k: float(v) * len(x) / n for k, v in measure(x / 255)[1].items()})  # adds
    return dict(total)


def main(argv=None, Model=GatedPixelCNN, epochs=20, batch_size=64, lr=1e-2):  # to suit Model
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
