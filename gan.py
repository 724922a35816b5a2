"""GAN: a generator makes digits out of noise, a discriminator tries to tell them from real ones.

    python gan.py --epochs 10      # 8 minutes on 2 CPU cores: all ten digits appear (seed 0)

Goodfellow et al. 2014, arXiv:1406.2661; DCGAN: Radford et al. 2015, arXiv:1511.06434; r1: Mescheder
et al. 2018, arXiv:1801.04406. Departures: layer norm in G, no norm in D; EMA of the weights.

Idea    The generator G never sees a digit. The discriminator D tells it, by gradients, how to
        change its pixels to look more real; D itself learns to tell digits from the newest fakes.
        They take turns. Once even the best D can only guess, fakes are distributed as the data.
        A sample takes one pass; p(x) remains unknown.
Maths   z ~ N(0, 1); D(x) is a logit: D takes x for real with probability sigmoid(D(x)).
            d_loss = E[-log sigmoid(D(x))] + E[-log(1 - sigmoid(D(G(z))))] + gamma / 2 r1
            g_loss = E[-log sigmoid(D(G(z)))]
        Why not g_loss = E[log(1 - sigmoid(D(G(z))))], minus D's second term? Its slope is almost 0
        for a fake that D sees through, just where G has most to learn ("it saturates").
        r1 = E |dD(x)/dx|^2 keeps D flat around the data. Else D becomes ever steeper between data
        and fakes, and drives the fakes past the data, back, and past it again.
Shapes  x (B, 1, 28, 28) in [0, 1] outside, [-1, 1] inside; z (B, z_dim). size: a multiple of 4.
Units   d_loss, g_loss: nats; d_real, d_fake: mean sigmoid(D) of test digits, of fakes.
Healthy No loss falls for long: the opponent learns, too. Judge by the samples. If D only guessed,
        d_loss would be 2 log 2 = 1.386 and g_loss log 2 = 0.693; a good run keeps within 0.15 of
        both. Where d_loss nears 0, G has lost; where fakes are alike, G has collapsed.
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
class Generator(nn.Module):
    """z (B, z_dim), y (B,) -> images (B, 1, H, W) in [-1, 1]."""

    def __init__(self, channels, z_dim, size, n_classes):
        super().__init__()
        self.grid = size // 4, size // 4, 2 * channels
        self.label = nn.Embedding(n_classes + 1, z_dim)  # the last entry is "no label"
        nn.init.zeros_(self.label.weight)
        self.stem = nn.Linear(z_dim, math.prod(self.grid))
        self.mix = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1)
        self.head = nn.ConvTranspose2d(channels, 1, 4, stride=2, padding=1)

    def forward(self, z, y):
        h = self.stem(z + self.label(y)).view(-1, *self.grid)  # (B, 7, 7, 2 C)
        for layer in self.mix, self.up, self.head:  # 7, 14, 28 wide; norm of a pixel's channels
            h = layer(F.layer_norm(h, h.shape[-1:]).relu().movedim(3, 1)).movedim(1, 3)
        return h.movedim(3, 1).tanh()  # (B, 1, 28, 28)


class Discriminator(nn.Module):
    """x (B, 1, H, W) in [-1, 1], y (B,) -> logits (B,): is this a real image with this label?"""

    def __init__(self, channels, size, n_classes):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 4, stride=2, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1)
        self.mix = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.head = nn.Linear(2 * channels * (size // 4) ** 2, n_classes + 1)

    def forward(self, x, y):
        for layer in self.stem, self.down, self.mix:  # (B, C, 14, 14), then (B, 2 C, 7, 7) twice
            x = F.leaky_relu(layer(x), 0.2)
        return self.head(x.flatten(1)).gather(1, y[:, None])[:, 0].float()  # the logit of label y


class GAN(nn.Module):
    """Two players, and what each of them minimises."""

    def __init__(self, *, channels=32, z_dim=64, gamma=1.0, size=28, n_classes=10):
        super().__init__()
        self.z_dim, self.n_classes, self.gamma = z_dim, n_classes, gamma
        self.generator = Generator(channels, z_dim, size, n_classes)
        self.discriminator = Discriminator(channels, size, n_classes)

    def labels(self, x, y, hide=0):
        """y (B,), each hidden with probability `hide`; y None: "no label" for each of the x."""
        if y is None:
            y = torch.full((len(x),), self.n_classes, device=x.device)
        return torch.where(torch.rand(len(y), device=y.device) < hide, self.n_classes, y)

    def forward(self, y):  # a fake (B, 1, H, W) in [-1, 1] for each label in y (B,)
        return self.generator(torch.randn(len(y), self.z_dim, device=y.device), y)

    def d_loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> the discriminator's loss, metrics."""
        x, y = (2 * x - 1).requires_grad_(), self.labels(x, y, 0.1 * self.training)
        real, fake = self.discriminator(x, y), self.discriminator(self(y).detach(), y)
        # r1 = E |dD(x)/dx|^2: no D(x) depends on another x, so their sum gives each x its slope
        r1 = torch.autograd.grad(real.sum(), x, create_graph=True)[0].square().sum() / len(x)
        # -log sigmoid(a) = softplus(-a) and -log(1 - sigmoid(a)) = softplus(a), but never infinite
        d_loss = F.softplus(-real).mean() + F.softplus(fake).mean() + self.gamma / 2 * r1
        d_real, d_fake = real.detach().sigmoid().mean(), fake.detach().sigmoid().mean()
        return d_loss, {"d_loss": d_loss.detach(), "d_real": d_real, "d_fake": d_fake}

    def g_loss(self, x, y=None):
        """As many fakes as there are x, of labels y -> the generator's loss, metrics."""
        y = self.labels(x, y, 0.1 * self.training)  # one model with labels and without
        g_loss = F.softplus(-self.discriminator(self(y), y)).mean()
        return g_loss, {"g_loss": g_loss}

    def loss(self, x, y=None):
        """The sum of both losses, for tests (r1 needs gradients); training takes them in turns."""
        (d_loss, d_metrics), (g_loss, g_metrics) = self.d_loss(x, y), self.g_loss(x, y)
        return d_loss + g_loss, d_metrics | g_metrics

    @torch.no_grad()
    def sample(self, n, y=None):
        """n images (n, 1, H, W) in [0, 1]; y (n,) labels or None."""
        return (self(self.labels(self.generator.label.weight.new_empty(n), y)) + 1) / 2

    @torch.no_grad()
    def pictures(self, x):
        """x (N, 1, H, W) images -> interpolation (10 N, 1, H, W): N fakes, each to the next."""
        a, w = torch.randn(len(x), 1, self.z_dim), torch.linspace(0, math.pi / 2, 10)[:, None]
        z = (w.cos() * a + w.sin() * a.roll(-1, 0)).flatten(0, 1).to(x.device)  # still ~ N(0, 1)
        return {"interpolation": (self.generator(z, self.labels(z, None)) + 1) / 2}


# ---------------------------------------------------------------- train
def evaluate(measure, images, batch_size=500):
    """Mean of each metric of measure(x) over uint8 images (N, 1, H, W); equal noise every time."""
    total, n = Counter(), len(images)
    for i, x in enumerate(images.split(batch_size)):
        torch.manual_seed(i)
        total.update({k: float(v) * len(x) / n for k, v in measure(x / 255)[1].items()})  # adds
    return dict(total)


def main(argv=None, Model=GAN, epochs=20, batch_size=64, lr=3e-3):  # to suit Model
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
    d_optimizer, g_optimizer = (torch.optim.AdamW(p.parameters(), betas=(0.0, 0.99), fused=True)
                                for p in (model.discriminator, model.generator))  # no momentum
    ema = AveragedModel(model, multi_avg_fn=lambda *a: get_ema_multi_avg_fn(0.5 ** (20 / step))(*a))
    net, kept = ema.module.eval().requires_grad_(False), {}  # net is what we test, sample and keep
    parts = {"model": net, "ema": ema, "weights": model, "d": d_optimizer, "g": g_optimizer}
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
    last, turns = args.epochs * steps, [(model.d_loss, d_optimizer), (model.g_loss, g_optimizer)]
    if args.compile: model.generator.compile()  # not D: r1 has a second derivative
    print(f"{out}: epochs {len(log) + 1} to {args.epochs} of {steps} steps on {device}", flush=True)
    for epoch in range(len(log) + 1, args.epochs + 1):  # lr: up for 2 % of the run, then down to 0
        torch.manual_seed(args.seed << 20 | epoch)  # the same order and noise after --resume
        order, total, start = torch.randperm(len(train_x)).to(device), 0, time.time()
        for step, i in enumerate(order.split(args.batch_size)[:steps], (epoch - 1) * steps + 1):
            for loss_fn, optimizer in turns:
                optimizer.param_groups[0]["lr"] = args.lr * min(50 * step, last + 1 - step) / last
                loss, _ = amp(loss_fn)(train_x[i] / 255, train_y[i] if args.class_cond else None)
                optimizer.zero_grad()
                loss.backward(inputs=optimizer.param_groups[0]["params"])  # not the opponent
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
