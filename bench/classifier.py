"""The judge: a small convolutional classifier whose features the head-to-head compares images in.

    python bench/classifier.py      # trains it anew and overwrites bench/classifier.pt

The weights are in the repository, so that figures of two machines compare. It is trained on grey
digits and on binarised ones (1 with a probability of the grey level) in equal parts, slightly
shifted, turned and scaled, so that it is at home with the images of all ten models. Of the test
digits it knows 99.7 % in grey and 99.5 % binarised.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import load_mnist

WEIGHTS = Path(__file__).with_name("classifier.pt")


class Classifier(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] -> features (B, 64), and from these logits (B, 10)."""

    def __init__(self):
        super().__init__()
        layers, sizes = [], [(1, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2), (64, 96, 1)]
        for n_in, n_out, stride in sizes:  # 28 x 28 -> 14 x 14 -> 7 x 7
            conv = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(n_out), nn.ReLU()]
        flat = nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 9, 64)
        self.features = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(3), *flat)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.features(x).relu())


def load_classifier(device="cpu"):
    """The Classifier with the weights of the repository, in evaluation mode, without gradients."""
    classifier = Classifier().to(device).eval().requires_grad_(False)
    classifier.load_state_dict(torch.load(WEIGHTS, device, weights_only=True))
    return classifier


def distort(x):
    """Shifts x (B, 1, H, W) by up to 2 pixels, turns by up to 11 degrees, scales by about 10 %."""
    low = torch.tensor([-0.2, 0.9, -0.15, -0.15], device=x.device)
    high = torch.tensor([0.2, 1.1, 0.15, 0.15], device=x.device)
    angle, scale, *shift = (low + (high - low) * torch.rand(len(x), 4, device=x.device)).unbind(1)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False).clamp(0, 1)


@torch.no_grad()
def accuracy(classifier, x, y):
    """Share of the images x (N, 1, 28, 28) in [0, 1] that the classifier takes for a y (N,)."""
    guesses = torch.cat([classifier(part).argmax(1) for part in x.split(1000)])
    return (guesses == y).float().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=12, help="(default %(default)s)")
    parser.add_argument("--data-dir", help="(default: data, beside common.py)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_x, train_y, test_x, test_y = load_mnist(args.data_dir, device=device)
    classifier = Classifier().to(device, memory_format=torch.channels_last)
    steps = args.epochs * (len(train_x) // 128)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    amp = torch.autocast(device, torch.bfloat16)
    for epoch in range(args.epochs):
        start = time.time()
        classifier.train()
        for i in torch.randperm(len(train_x)).split(128)[: steps // args.epochs]:
            x = distort(train_x[i] / 255)
            x[::2] = torch.bernoulli(x[::2])
            with amp:
                loss = F.cross_entropy(classifier(x).float(), train_y[i], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        classifier.eval()
        grey = test_x / 255
        torch.manual_seed(epoch)  # of the binary test digits, and of the next epoch
        right = [accuracy(classifier, x, test_y) for x in (grey, torch.bernoulli(grey))]
        print(
            f"epoch {epoch + 1:3}/{args.epochs} | loss {loss:.4f} | test accuracy grey "
            f"{right[0]:.4f} binary {right[1]:.4f} | {time.time() - start:.1f} s",
            flush=True,
        )
    torch.save(classifier.state_dict(), WEIGHTS)


if __name__ == "__main__":
    main()
