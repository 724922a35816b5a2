"""Diffusion: learn to take a little noise off an image, then turn pure noise into a digit.

    python diffusion.py --epochs 10      # 7 minutes on 2 CPU cores: test loss 0.1373 (seed 0)

Ho et al. 2020 (DDPM), arXiv:2006.11239; its ODE: Song et al. 2020 (DDIM), arXiv:2010.02502;
v-prediction: Salimans and Ho 2022, arXiv:2202.00512; guidance: Ho and Salimans 2022,
arXiv:2207.12598. Departures: continuous time on a quarter circle instead of 1000 betas, a two-step
solver, a U-Net of two resolutions without GroupNorm.

Idea    Mix an image with noise, more and more, until nothing of it is left. A network that sees
        the mixture can tell in which direction the image lies, on average over all images that
        may hide there, and following it for a small step undoes a little of the mixing. Training
        is one pass at one random time; a sample takes 25, each starting where the last one ended.
Maths   t runs from 0, the image x0, to 1, the noise eps ~ N(0, 1); training covers both ends.
            x_t = cos(a) x0 + sin(a) eps,  a = t pi / 2
        On this circle the velocity is v = dx_t/da = cos(a) eps - sin(a) x0; the network learns
            loss = E || v(x_t, t) - v ||^2 / 784,  t of density 2 t in [0, 1]
        whose minimum is, for any density, the mean of v given x_t. This one practises most where
        it is decided which digit will be drawn, and least where only its edges are left to do.
        Knowing v is knowing x0 and eps:
            x0 = cos(a) x_t - sin(a) v,  eps = sin(a) x_t + cos(a) v.
        To predict eps tells nothing at t = 1 (it is x_t), x0 nothing at t = 0; v is fair to both.
        Learning v is learning the score: grad log p(x_t) = -E[eps | x_t] / sin(a).
        If every x moves by the mean v there, all x keep the right density at every t. So
        sampling solves dx/da = v(x, t) from noise at t = 1 to t = 0: the noise decides the image,
        and the way back, from an image to its noise, is as easy. Where labels are used, it follows
            v(no label) + guidance (v(label) - v(no label)):
        0 ignores the label, 1 is the conditional model, more than 1 exaggerates what it adds.
Shapes  x (B, 1, 28, 28) in [0, 1] outside, x0 in [-1, 1] inside, like the noise around 0;
        x_t, v, eps (B, 1, 28, 28); t (B,) in [0, 1]; y (B,) in 0..9. size: a multiple of 4.
Units   loss: mean squared error of v a pixel. It is no likelihood and ranks no other models.
Healthy The loss falls fast to 0.15, then slowly, and stays far above 0, as x_t does not determine
        v. About half of the samples are digits after one epoch, and most after five.
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


def slerp(a, b, n=10):
    """n points on the arc from each a to its b: (B, ...) -> (B * n, D).

    Noise of D numbers has a norm of about sqrt(D); the arc keeps it, a straight line does not.
    """
    a, b = a.flatten(1)[:, None], b.flatten(1)[:, None]  # (B, 1, D)
    cosine = F.cosine_similarity(a, b, dim=2)[..., None]  # (B, 1, 1)
    angle = cosine.clamp(-1, 1).acos().clamp(min=1e-4)  # a = b shall give a, not 0 / 0
    w = torch.linspace(0, 1, n, device=a.device)[:, None]  # (n, 1)
    arc = (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()  # (B, n, D)
    return arc.flatten(0, 1)


class Diffusion(nn.Module):
    """A U-Net v(x_t, t, y) over two resolutions, and the process that it undoes."""

    def __init__(self, *, channels=32, n_inner=4, n_embd=128, size=28, n_classes=10):
        super().__init__()
        self.size, self.n_classes = size, n_classes
        self.register_buffer("freqs", torch.logspace(0, 3, n_embd // 2), persistent=False)
        self.time = nn.Sequential(nn.Linear(n_embd, n_embd), nn.SiLU(), nn.Linear(n_embd, n_embd))
        self.label = nn.Embedding(n_classes + 1, n_embd)  # the last entry is "no label"
        self.stem = nn.Conv2d(4, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self.inner = nn.ModuleList(ResBlock(2 * channels, n_embd) for _ in range(n_inner))
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.outer = ResBlock(channels, n_embd)
        self.head = nn.Conv2d(channels, 4, 3, padding=1)
        nn.init.zeros_(self.head.weight)  # start near v = 0

    def embed(self, x, y):
        """y (B,) labels, or None for "no label" -> a vector each (B, ...), on the device of x."""
        if y is None:
            y = torch.full((len(x),), self.n_classes, device=x.device)
        return self.label(y)

    def forward(self, x_t, t, y=None):  # x_t (B, 1, H, W), t (B,) in [0, 1] -> v like x_t
        angles = t[:, None] * self.freqs  # (B, n_embd / 2): t as the hands of slow and fast clocks
        emb = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.embed(x_t, y))
        skip = self.stem(F.pixel_unshuffle(x_t, 2))  # (B, 4, 14, 14) -> (B, C, 14, 14)
        h = self.down(skip)  # (B, 2 C, 7, 7)
        for block in self.inner:
            h = block(h, emb)
        h = self.outer(skip + self.up(h), emb)  # (B, C, 14, 14)
        return F.pixel_shuffle(self.head(h), 2).float()  # (B, 4, 14, 14) -> (B, 1, 28, 28)

    def diffuse(self, x0, t, eps):
        """x0, eps (B, 1, H, W), t (B,) -> x_t and its velocity v, both (B, 1, H, W)."""
        a = t[:, None, None, None] * math.pi / 2
        return a.cos() * x0 + a.sin() * eps, a.cos() * eps - a.sin() * x0

    def loss(self, x, y=None):
        """x (B, 1, H, W) in [0, 1], y (B,) or None -> mean squared error of v, {"loss": it}."""
        x0 = 2 * x - 1
        if y is not None and self.training:  # hide 1 label in 10: one model with and without them
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.n_classes, y)
        # one random u in each of B equal slices of [0, 1]: less variance than B independent ones
        u = (torch.arange(len(x), device=x.device) + torch.rand(len(x), device=x.device)) / len(x)
        t = u.sqrt()  # density 2 t: more often near 1, where it is decided what will be drawn
        x_t, v = self.diffuse(x0, t, torch.randn_like(x0))
        loss = F.mse_loss(self(x_t, t, y), v)
        return loss, {"loss": loss}

    @torch.no_grad()
    def ode(self, x, start, end, steps, y=None, guidance=1.5):
        """Solve dx/da = v from time start to end, in either direction.

        Yields for each step the x after it and the x0 predicted before it, (B, 1, H, W) each.
        A step follows v in the step's middle, extrapolated from this and the last v (the two-step
        Adams-Bashforth method: error O(1 / steps^2)). A network call a step; two, if y is given.
        """
        da, last = (end - start) / steps * math.pi / 2, None
        for i in range(steps):
            t = torch.full((len(x),), start + (end - start) * i / steps, device=x.device)
            v, a = self(x, t), start * math.pi / 2 + i * da
            if y is not None:
                v = v + guidance * (self(x, t, y) - v)
            x0 = math.cos(a) * x - math.sin(a) * v
            x = x + da * (v if last is None else 1.5 * v - 0.5 * last)  # at first Euler's step
            last = v
            yield x, x0

    @torch.no_grad()
    def sample(self, n, y=None, steps=25, guidance=1.5):
        """n images (n, 1, H, W) in [0, 1] by `steps` steps of the ODE; y (n,) labels or None."""
        x = torch.randn(n, 1, self.size, self.size, device=self.label.weight.device)
        for x, _ in self.ode(x, 1, 0, steps, y, guidance):
            pass
        return (x.clamp(-1, 1) + 1) / 2

    @torch.no_grad()
    def pictures(self, x):
        """x (N, 1, H, W) images -> process (25, N, 1, H, 2 W), interpolation (10 N, ...)."""
        noise = torch.randn_like(x)
        frames = [torch.cat(pair, -1) for pair in self.ode(noise, 1, 0, 25)]  # x_t, predicted x0
        for noise, _ in self.ode(2 * x - 1, 0, 1, 25):  # backwards: from the images to their noise
            pass
        arcs = slerp(noise, noise.roll(-1, 0)).view(-1, *x.shape[1:])  # each image and the next
        for between, _ in self.ode(arcs, 1, 0, 25):
            pass
        pictures = {"process": torch.stack(frames), "interpolation": between}
        return {name: (images.clamp(-1, 1) + 1) / 2 for name, images in pictures.items()}


# ---------------------------------------------------------------- train
def evaluate(measure, images, batch_size=500):
    """Mean of each metric of measure(x) over uint8 images (N, 1, H, W); equal noise every time."""
    total, n = Counter(), len(images)
    for i, x in enumerate(images.split(batch_size)):
        torch.manual_seed(i)
        total.update({k: float(v) * len(x) / n for k, v in measure(x / 255)[1].items()})  # adds
    return dict(total)


def main(argv=None, Model=Diffusion, epochs=10, batch_size=64, lr=5e-3):  # to suit Model
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
