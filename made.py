"""MADE: one plain network over all pixels, masked so that guess i sees only the pixels before i.

    python made.py --epochs 5      # 3 minutes on 1 CPU core: test nll 87.64 nats (seed 0)

Germain et al. 2015, arXiv:1502.03509; residual blocks: Nash and Durkan 2019, arXiv:1904.05626.
Departures: a single order, sorted degrees, a sampler with the arithmetic of a single pass; EMA.

Idea    A network from 784 pixels to 784 guesses is no model of images as long as guess i can see
        pixel i. So give each hidden unit a degree m, let it see only pixels 0 to m - 1, and let
        guess i see only units of degree i or less. Then one pass makes all 784 guesses at once.
        Sampling has to draw pixel i before it can make the next guess: 784 steps.
Maths   log p(x) = sum_i log p(x_i | x_<i),  p(x_i = 1 | x_<i) = sigmoid(logits_i): exact, no bound
        One rule masks all layers: k sees j if degree j <= degree k, where pixel i has degree i + 1
        as an input and i as an output. Equal degrees before and after: a block may add to h.
        The degrees are spread evenly over 1..783. At random, 1568 units miss 1 degree in 7, and
        the output of that degree hears of its left neighbour through `direct` alone.
        They are sorted, too: once pixel i - 1 is drawn, the units of degree i are final, and they
        are a slice. So a step of the sampler computes a slice of each layer, and nothing twice.
Shapes  x (B, 1, 28, 28) in [0, 1] outside, {0, 1} inside: 1 with a probability of the grey level,
        drawn anew each time; pixels (B, 784), hidden units (B, hidden).
Units   nll: nats/image, sum over pixels, mean over images; bpd = nll / (784 log 2): bits a pixel.
Healthy Knowing nothing costs 543 nats; one epoch brings the nll to 93, five to 88.
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
class MaskedLinear(nn.Linear):
    """A linear layer in which output k sees input j if, and only if, degree j <= degree k."""

    def __init__(self, before, after):  # the degrees of inputs and of outputs, in ascending order
        super().__init__(len(before), len(after))
        self.register_buffer("mask", before <= after[:, None], persistent=False)

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)

    def part(self, x, rows):
        """The outputs `rows` (a slice) from x (B, K): all inputs they may see are the first K."""
        return F.linear(x, self.weight[rows, : x.shape[1]], self.bias[rows])


class MADE(nn.Module):
    """A masked residual network from all pixels to the logits of all pixels."""

    def __init__(self, *, hidden=1568, n_layer=1, size=28, n_classes=10):
        super().__init__()
        self.size, self.n_classes, pixel = size, n_classes, torch.arange(size**2)
        degree = 1 + torch.arange(hidden) * (len(pixel) - 1) // hidden  # 1, 1, 1, 2, 2, 3, ...
        self.ends = (degree <= pixel[:, None]).sum(1).tolist()  # number of units of degree <= i
        self.label = nn.Embedding(n_classes + 1, hidden)  # the last entry is "no label"
        nn.init.zeros_(self.label.weight)
        self.stem, self.head = MaskedLinear(pixel + 1, degree), MaskedLinear(degree, pixel)
        self.direct = MaskedLinear(pixel + 1, pixel)
        self.blocks = nn.ModuleList()
        for _ in range(n_layer):
            first, last = MaskedLinear(degree, degree), MaskedLinear(degree, degree)
            nn.init.zeros_(last.weight)
            self.blocks.append(nn.Sequential(nn.ReLU(), first, nn.ReLU(), last))

    def embed(self, x, y):
        """y (B,) labels, or None for "no label" -> a vector each (B, ...), on the device of x."""
        if y is None:
            y = torch.full((len(x),), self.n_classes, device=x.device)
        return self.label(y)

    def forward(self, x, y=None):  # x (B, 1, H, W) in {0, 1} -> logits (B, 1, H, W)
        pixels = x.flatten(1)  # (B, H * W)
        h = self.stem(pixels) + self.embed(x, y)  # (B, hidden)
        for block in self.blocks:
            h = h + block(h)
        return (self.direct(pixels) + self.head(h.relu())).view_as(x).float()

    def scan(self, x, y):
        """Yields the logits (B,) of each pixel in order; the caller then writes it into x."""
        label, start = self.embed(x, y), 0
        units = label.new_empty(2 * len(self.blocks) + 1, *label.shape)  # each later layer's input
        for i, end in enumerate(self.ends):
            pixels, new = x.flatten(1)[:, :i], slice(start, end)  # new: the units of degree i
            h = self.stem.part(pixels, new) + label[:, new]
            for block, a, b in zip(self.blocks, units[::2], units[1::2]):
                a[:, new] = h.relu()
                b[:, new] = block[1].part(a[:, :end], new).relu()
                h = h + block[3].part(b[:, :end], new)
            units[-1, :, new] = h.relu()
            one, start = slice(i, i + 1), end
            logits = self.direct.part(pixels, one) + self.head.part(units[-1, :, :end], one)
            yield logits[:, 0].float()

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
        10 images, their upper halves, and 4 draws of each lower half (60, 1, H, W)."""
        x, half = torch.bernoulli(x[:10]), self.size // 2
        order = torch.arange(self.size**2, device=x.device).view(self.size, -1)
        top, drawn = x[:, :, :half].repeat(4, 1, 1, 1), self.sample(20)
        frames = [drawn.where(order < i, 0.5) for i in range(0, self.size**2 + 1, half)]
        rows = [x, x.where(order < half * self.size, 0.5), self.sample(len(top), top=top)]
        return {"sampling": torch.stack(frames), "completion": torch.cat(rows)}


# ---------------------------------------------------------------- train
def evaluate(measure, images, batch_size=500):
    """Mean of each metric of measure(x) over uint8 images (N, 1, H, W); equal noise every time."""
    total, n = Counter(), len(images)
    for i, x in enumerate(images.split(batch_size)):
        torch.manual_seed(i)
        total.update({k: float(v) * len(x) / n for k, v in measure(x / 255)[1].items()})  # adds
    return dict(total)


def main(argv=None, Model=MADE, epochs=20, batch_size=128, lr=5e-3):  # to suit Model
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
