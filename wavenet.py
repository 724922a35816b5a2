"""WaveNet: mix each token with one a few steps back, then twice as far back, until all are mixed.

    python wavenet.py --epochs 2      # 17 minutes on 1 CPU core: test nll 81.95 nats (seed 0)

Van den Oord et al. 2016, arXiv:1609.03499; the queues: Paine et al. 2016, arXiv:1611.09482.
Departures: dilations that fit the image, embeddings of row and column, EMA of the weights.

Idea    Read the image as a sequence of pixels, row by row, and give each pixel a token, made of the
        pixel before it. A layer with dilation d mixes token i with token i - d. After layers with
        d = 1, 2, 4, a token knows the 8 newest pixels: 3 layers, where d = 1 alone would need 7.
        Training knows the image and makes 784 guesses in one pass; sampling takes 784 steps.
Maths   log p(x) = sum_i log p(x_i | x_<i),  p(x_i = 1 | x_<i) = sigmoid(logits_i): exact, no bound
            h_i <- h_i + out(tanh(value_i) sigmoid(gate_i)),  value_i, gate_i of (h_{i-d}, h_i)
        Every way back has 28 r + c steps with r and c below 28, and these are sums of 1, 2, 4, 8,
        16: binary digits. So a layer for each digit of c and one for each of r, where d is 28
        times as large, and every token has seen all pixels before it. (d = 1, 2, 4, ..., 256 end
        512 pixels back: the last row never sees the first eight.)
        Step i needs token i - d of each layer: sampling keeps the last d tokens in a queue.
        Draw x_i, do not round it: the likeliest pixel each time soon makes an empty image.
Shapes  x (B, 1, 28, 28) in [0, 1] outside, {0, 1} inside: 1 with a probability of the grey level,
        drawn anew each time; tokens (B, 784, channels).
Units   nll: nats/image, sum over pixels, mean over images; bpd = nll / (784 log 2): bits a pixel.
Healthy Knowing nothing costs 543 nats; one epoch brings the nll to 83, two to 82.
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
class GatedLayer(nn.Module):
    """Mixes each token with an earlier one; a gate decides how much of the mix gets through."""

    def __init__(self, channels):
        super().__init__()
        self.value = nn.Linear(2 * channels, channels)
        self.gate = nn.Linear(2 * channels, channels)
        self.out = nn.Linear(channels, channels)
        self.skip = nn.Linear(channels, channels)

    def forward(self, h, past):  # both (..., channels) -> the next h, and a share for the head
        pair = torch.cat([past, h], -1)
        mix = self.value(pair).tanh() * self.gate(pair).sigmoid()
        return h + self.out(mix), self.skip(mix)


class WaveNet(nn.Module):
    """Causal dilated convolutions, of kernel size 2, over the pixels in raster order."""

    def __init__(self, *, channels=40, size=28, n_classes=10):
        super().__init__()
        self.size, self.n_classes = size, n_classes
        digits = [2**k for k in range((size - 1).bit_length())]  # 1, 2, 4, 8, 16
        self.dilations = digits + [size * digit for digit in digits]
        self.stem = nn.Linear(1, channels)
        self.row = nn.Parameter(0.02 * torch.randn(size, 1, channels))
        self.col = nn.Parameter(0.02 * torch.randn(1, size, channels))
        self.label = nn.Embedding(n_classes + 1, channels)  # the last entry is "no label"
        nn.init.zeros_(self.label.weight)
        self.layers = nn.ModuleList(GatedLayer(channels) for _ in self.dilations)
        wide = nn.Linear(channels, channels)
        self.head = nn.Sequential(nn.ReLU(), wide, nn.ReLU(), nn.Linear(channels, 1))

    def embed(self, x, y):
        """y (B,) labels, or None for "no label" -> a vector each (B, ...), on the device of x."""
        if y is None:
            y = torch.full((len(x),), self.n_classes, device=x.device)
        return self.label(y)

    def forward(self, x, y=None):  # x (B, 1, H, W) in {0, 1} -> logits (B, 1, H, W)
        place = (self.row + self.col).flatten(0, 1)  # (H * W, channels)
        h, skips = self.stem(F.pad(x.flatten(1), (1, -1))[..., None]), 0  # the pixel before each
        h = h + (place + self.embed(x, y)[:, None]).type_as(h)  # (B, H * W, channels)
        for layer, dilation in zip(self.layers, self.dilations):
            h, skip = layer(h, F.pad(h, (0, 0, dilation, -dilation)))
            skips = skips + skip
        return self.head(h + skips).view_as(x).float()

    def scan(self, x, y):
        """Yields the logits (B,) of each pixel in order; the caller then writes it into x."""
        place, label = (self.row + self.col).flatten(0, 1), self.embed(x, y)
        queues = [label.new_zeros(dilation, *label.shape) for dilation in self.dilations]
        for i in range(x[0].numel()):
            before = F.pad(x.flatten(1), (1, 0))[:, i : i + 1]  # (B, 1)
            h, skips = self.stem(before) + place[i] + label, 0
            for layer, queue in zip(self.layers, queues):
                token, j = h, i % len(queue)  # queue[j] still holds token i - dilation
                h, skip = layer(token, queue[j])
                queue[j], skips = token, skips + skip
            yield self.head(h + skips)[:, 0].float()

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


def main(argv=None, Model=WaveNet, epochs=20, batch_size=64, lr=1e-2):  # to suit Model
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
