"""PixelCNN: guess each pixel from a window of those before it, with masked convolutions.

    python pixelcnn.py --epochs 3      # 8 minutes on 2 CPU cores: test nll 84.03 nats (seed 0)

Van den Oord et al. 2016, arXiv:1601.06759; the sampler: Ramachandran et al. 2017, arXiv:1704.06001.
Departures: kernels without rows below the centre, embeddings of row and column, EMA.

Idea    A convolution sees all around a pixel, but a guess must rest on the pixels before it alone:
        a mask hides the others. Training makes all 784 guesses in one pass; sampling takes 784
        steps, which cost one pass: one place a layer, from the patch around it, kept for later.
Maths   log p(x) = sum_i log p(x_i | x_<i),  p(x_i = 1 | x_<i) = sigmoid(logits_i): exact, no bound
            1 1 1     The mask of a 3 x 3 kernel. A: no guess may see its own pixel, so in the first
            1 m 0     layer m is 0. B: later layers see features made of earlier pixels: m is 1.
        Blind spot: only a step up can go right. X is guessed from #, never from a dot. In the row
            # # # # # # # # # # # . . .     a above X, the last # is 2 a + 1 to the right: 3 from
            # # # # # # # # # . . . . .     the 7 x 7 kernel of the first layer, 2 from each
            # # # # # X                     5 x 5; 15 at most, as to all sides. See gatedcnn.py.
Shapes  x (B, 1, 28, 28) in [0, 1] outside, {0, 1} inside: 1 with a probability of the grey level,
        drawn anew each time; h (B, 28, 28, 2 * channels), channels last for the linear layers.
Units   nll: nats/image, sum over pixels, mean over images; bpd = nll / (784 log 2): bits a pixel.
Healthy Knowing nothing costs 543 nats; one epoch brings the nll to 86, three to 84.
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
class MaskedConv2d(nn.Conv2d):
    """A k x k convolution without what comes after its centre and, kind "A", the centre itself."""

    def __init__(self, n_in, n_out, k, kind):
        super().__init__(n_in, n_out, (k // 2 + 1, k))  # no rows below the centre
        self.register_buffer("mask", torch.ones(k // 2 + 1, k), persistent=False)
        self.mask[-1, k // 2 + (kind == "B") :] = 0

    def forward(self, x):
        """x (B, n_in, H + k // 2, W + k - 1), with its edge on three sides -> (B, n_out, H, W)."""
        return F.conv2d(x, self.weight * self.mask, self.bias)


class Bottleneck(nn.Module):
    """h + a masked convolution on half as many channels, between two linear layers."""

    def __init__(self, channels, k):
        super().__init__()
        self.squeeze = nn.Linear(2 * channels, channels)
        self.conv = MaskedConv2d(channels, channels, k, "B")
        self.expand = nn.Linear(channels, 2 * channels)

    def forward(self, h, seen=None):
        x, p = self.squeeze(h.relu()).relu(), self.conv.mask.shape[1] // 2
        if seen is None:
            seen = F.pad(x, (0, 0, p, p, p, 0))
        else:  # h (B, 1, 1, 2 * channels): one pixel, to be noted in seen, what its kernel covers
            seen[:, -1, p] = x[:, 0, 0]
        return h + self.expand(self.conv(seen.movedim(3, 1)).movedim(1, 3).relu())


class PixelCNN(nn.Module):
    """A stack of masked convolutions over the image."""

    def __init__(self, *, channels=32, n_layer=6, kernel=5, size=28, n_classes=10):
        super().__init__()
        self.size, self.n_classes, self.kernel = size, n_classes, kernel
        self.stem, self.head = MaskedConv2d(1, 2 * channels, 7, "A"), nn.Linear(2 * channels, 1)
        self.row = nn.Parameter(0.02 * torch.randn(size, 1, 2 * channels))
        self.col = nn.Parameter(0.02 * torch.randn(1, size, 2 * channels))
        self.label = nn.Embedding(n_classes + 1, 2 * channels)  # the last entry is "no label"
        nn.init.zeros_(self.label.weight)
        self.blocks = nn.ModuleList(Bottleneck(channels, kernel) for _ in range(n_layer))

    def embed(self, x, y):
        """y (B,) labels, or None for "no label" -> a vector each (B, ...), on the device of x."""
        if y is None:
            y = torch.full((len(x),), self.n_classes, device=x.device)
        return self.label(y)

    def forward(self, x, y=None):  # x (B, 1, H, W) in {0, 1} -> logits (B, 1, H, W)
        h = self.stem(F.pad(x, (3, 3, 3, 0))).movedim(1, 3)  # (B, H, W, 2 * channels)
        h = h + (self.row + self.col + self.embed(x, y)[:, None, None]).type_as(h)
        for block in self.blocks:
            h = block(h)
        return self.head(h.relu()).movedim(3, 1).float()

    def scan(self, x, y):
        """Yields the logits (B,) of each pixel in order; the caller then writes it into x."""
        place, p = self.row + self.col + self.embed(x, y)[:, None, None], self.kernel // 2
        inputs = [F.pad(0 * place[..., ::2], (0, 0, p, p, p, 0)) for _ in self.blocks]  # C channels
        for r in range(self.size):
            for c in range(self.size):
                h = self.stem(F.pad(x, (3, 3, 3, 0))[:, :, r : r + 4, c : c + 7]).movedim(1, 3)
                h = h + place[:, r, None, c, None]  # (B, 1, 1, 2 * channels)
                for block, seen in zip(self.blocks, inputs):
                    h = block(h, seen[:, r : r + p + 1, c : c + 2 * p + 1])
                yield self.head(h.relu()).flatten().float()

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


def main(argv=None, Model=PixelCNN, epochs=20, batch_size=64, lr=1e-2):  # to suit Model
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
