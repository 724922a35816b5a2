"""The judge: a small convolutional classifier, in whose features images are compared.

    python bench/classifier.py      # trains it anew and overwrites bench/classifier.pt

The weights are in the repository, so that figures of two machines compare. It is trained on grey
digits and on binarised ones (1 with a probability of the grey level) in equal parts, slightly
shifted, turned and scaled, so that it is at home with the images of all ten models. It recognises
99.7 % of the test digits in grey, and 99.5 % of them binarised.
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
BATCH_SIZE = 128
LR = 4e-3


class Classifier(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] -> features (B, 64), and from these logits (B, 10)."""

    def __init__(self):
        super().__init__()
        layers = []
        n_in = 1
        for n_out, stride in [(32, 1), (32, 2), (64, 1), (64, 2), (96, 1)]:
            layers.append(nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(n_out))
            layers.append(nn.ReLU())
            n_in = n_out
        # the last layer's output (B, 96, 7, 7) becomes (B, 96, 3, 3)
        layers += [nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 9, 64)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.features(x).relu())


def load_classifier(device="cpu"):
    """The Classifier with the weights of the repository, in evaluation mode, without gradients."""
    classifier = Classifier().to(device).eval().requires_grad_(False)
    classifier.load_state_dict(torch.load(WEIGHTS, device, weights_only=True))
    return classifier


def distort(x):
    """Shift x (B, 1, 28, 28) by up to 2 pixels, turn by up to 11 degrees, scale by up to 10 %."""
    low = torch.tensor([-0.2, 0.9, -0.15, -0.15], device=x.device)
    high = torch.tensor([0.2, 1.1, 0.15, 0.15], device=x.device)
    numbers = low + (high - low) * torch.rand(len(x), 4, device=x.device)
    angle, scale, shift_x, shift_y = numbers.unbind(1)  # (B,) each
    cos = scale * angle.cos()
    sin = scale * angle.sin()
    matrices = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False).clamp(0, 1)


@torch.no_grad()
def accuracy(classifier, x, y):
    """Share of the images x (N, 1, 28, 28) in [0, 1] that the classifier takes for their y (N,)."""
    guesses = torch.cat([classifier(part).argmax(1) for part in x.split(1000)])
    return (guesses == y).float().mean().item()


def train_epoch(classifier, optimizer, schedule, x, y):
    """Train on images x (N, 1, 28, 28), half of each batch binarised -> the last loss."""
    classifier.train()
    for idx in torch.randperm(len(x)).split(BATCH_SIZE):
        if len(idx) < BATCH_SIZE:  # the rest, for which the schedule has no step
            break
        images = distort(x[idx])
        images[::2] = torch.bernoulli(images[::2])
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = classifier(images).float()
        loss = F.cross_entropy(logits, y[idx], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=12, help="(default %(default)s)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_x, train_y, test_x, test_y = load_mnist(device=device)
    classifier = Classifier().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05, fused=True)
    steps = args.epochs * (len(train_x) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps)
    for epoch in range(args.epochs):
        start = time.time()
        loss = train_epoch(classifier, optimizer, schedule, train_x, train_y)
        classifier.eval()
        torch.manual_seed(epoch)  # of the binary test digits, and of the next epoch
        grey = accuracy(classifier, test_x, test_y)
        binarised = accuracy(classifier, torch.bernoulli(test_x), test_y)
        print(
            f"epoch {epoch + 1:3}/{args.epochs} | loss {loss:.4f} | "
            f"test accuracy grey {grey:.4f} binarised {binarised:.4f} | "
            f"{time.time() - start:.1f} s",
            flush=True,
        )
    torch.save(classifier.state_dict(), WEIGHTS)


if __name__ == "__main__":
    main()
