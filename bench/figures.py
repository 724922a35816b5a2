"""Draws the README's figures into assets/.

    python bench/figures.py                    # all whose runs are in out/
    python bench/figures.py masks fields       # only these

nats       test nats against training time, a line for each model; lines for published figures
speed      Frechet ratio against the time to draw 100; both are of bench/results.json
masks      made.py: which input reaches which output, for an image of 2 x 2 pixels
fields     pixelcnn.py, gatedcnn.py: the pixels that the prediction of the middle one depends on
posteriors vae.py: q(z | x) of a thousand test digits over p(z), for two numbers in z; needs the run
           python vae.py --z-dim 2 --epochs 2 --out-dir out/vae-2d
codes      vqvae.py: a digit, its codes, what they decode to, and what each code looks like
denoising  diffusion.py: x_t above the predicted x0, along t

Needs matplotlib (bench/requirements.txt).
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Ellipse

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from compare import GREY, kind_of, load
from train_all import SCRIPTS

from common import load_mnist
from made import MADE

# published: dynamic binarisation, test nats; sources in the README
PUBLISHED = {
    "MADE 84.87": 84.87,
    "PixelCNN 81.45": 81.45,
    "Image GPT 79.17": 79.17,
    "PixelSNAIL 78.61": 78.61,
}
COLORS = {script: plt.get_cmap("tab10")(i) for i, script in enumerate(SCRIPTS)}


def results():
    """-> {script: {figure: number}}, as bench/compare.py has written them"""
    return json.loads((ROOT / "bench/results.json").read_text())


def minutes_and_nats(figures):
    """-> minutes of training and test nats after each epoch, two lists, of a line of results()"""
    metric = "nll" if "nll" in figures else "neg_elbo"
    values = [row[metric] for row in figures["log"]]
    return [(i + 1) * figures["s/epoch"] / 60 for i in range(len(values))], values


def spread(places, gap):
    """Move numbers in ascending order upwards until each is at least gap above the last."""
    spread_places = places[:1]
    for place in places[1:]:
        spread_places.append(max(place, spread_places[-1] + gap))
    return spread_places


def nats():
    curves = {}
    for script, figures in results().items():
        if script in SCRIPTS and script not in GREY:
            curves[script] = minutes_and_nats(figures)
    scripts = sorted(curves, key=lambda script: curves[script][1][-1])  # the best first
    end = 1.15 * max(minutes[-1] for minutes, _ in curves.values())
    figure, axes = plt.subplots(figsize=(8, 5.5))
    names_at = spread([curves[script][1][-1] for script in scripts], 0.65)
    for script, name_at in zip(scripts, names_at):
        minutes, values = curves[script]
        color = COLORS[script]
        axes.plot(minutes, values, ".-", color=color)
        axes.plot([minutes[-1], end], [values[-1], name_at], ":", color=color, linewidth=0.8)
        bound = " (bound)" if script in ("vae", "vqvae") else ""
        axes.text(
            1.03 * end, name_at, f"{script} {values[-1]:.1f}{bound}", color=color, va="center"
        )
    for name, value in PUBLISHED.items():
        axes.axhline(value, color="0.85", zorder=0)
        axes.text(0.01, value, name, color="0.5", fontsize=8, va="bottom",
                  transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set(xscale="log", xlim=(0.3, end), ylim=(78, 96))
    axes.set(xlabel="minutes of training", ylabel="-log p(x) of test images, nats")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 40], ["0.5", "1", "2", "5", "10", "20", "40"])
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def speed():
    figure, axes = plt.subplots(figsize=(7, 4.5))
    measured = results()
    for script in SCRIPTS:
        if script not in measured:
            continue
        figures = measured[script]
        real = measured[kind_of(script)]["Frechet"]
        point = figures["100 in"], figures["Frechet"] / real
        axes.plot(*point, "o", color=COLORS[script])
        left = script == "rnn"  # its right neighbour is near
        axes.annotate(script, point, (-7 if left else 7, 0), textcoords="offset points",
                      va="center", ha="right" if left else "left")  # fmt: skip
    axes.axhline(1, color="0.85", zorder=0)
    axes.text(1, 1, "real digits", color="0.5", va="bottom", ha="right",
              transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(0.005, 6))
    axes.set(xlabel="seconds to draw 100 images", ylabel="ratio of Frechet distances")
    axes.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    axes.set_yticks([1, 10, 100], ["1", "10", "100"])
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def show_matrix(axes, matrix, columns, rows, title):
    """A matrix of zeros and ones as filled squares, with names of its columns and rows."""
    axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=1.6)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks([x - 0.5 for x in range(1, len(columns))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.xaxis.tick_top()
    axes.set_xlabel(title)
    for r in range(len(rows)):
        for c in range(len(columns)):
            color = "white" if matrix[r, c] > 1 else "black"
            axes.text(c, r, int(matrix[r, c]), ha="center", va="center", color=color)


def masks():
    model = MADE(hidden=3, n_layer=0, size=2)
    first = model.stem.mask.float()  # (units, pixels)
    second = model.head.mask.float()  # (outputs, units)
    pixels = [f"x{i}" for i in range(4)]
    units = [f"h{m}" for m in range(1, 4)]
    outputs = [f"out {i}" for i in range(4)]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), width_ratios=(4, 3, 4), layout="constrained")
    show_matrix(axes[0], first, pixels, units, "mask of the first layer")
    show_matrix(axes[1], second, units, outputs, "mask of the last layer")
    paths = second @ first  # how many paths lead from pixel to output
    show_matrix(axes[2], paths, pixels, outputs, "their product: number of paths")
    return figure


def visible(model):
    """(28, 28) bool: the pixels that the logit of the middle pixel depends on."""
    x = torch.full((1, 1, 28, 28), 0.5, requires_grad=True)
    with torch.enable_grad():
        logit = model(x)[0, 0, 14, 14]
        return torch.autograd.grad(logit, x)[0][0, 0] != 0


def fields():
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.8))
    index = torch.arange(784).view(28, 28)
    past = index < index[14, 14]
    names = ["future", "blind spot", "seen", "X: predicted here"]
    colors = ["#f0f0f0", "#d9534f", "#4c72b0", "#ffd92f"]
    for ax, script in zip(axes, ("pixelcnn", "gatedcnn")):
        torch.manual_seed(0)
        model = importlib.import_module(script).Model()  # any weights will do
        kind = torch.zeros(28, 28)
        kind[past] = 1  # from the middle, all that is not blind is within reach
        kind[visible(model)] = 2
        kind[14, 14] = 3
        picture = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colors])
        ax.imshow(picture[kind.long()] / 255)
        ax.set_xticks([x - 0.5 for x in range(29)], [])
        ax.set_yticks([y - 0.5 for y in range(29)], [])
        ax.grid(color="white", linewidth=0.5)
        ax.tick_params(length=0)
        ax.text(14, 14, "X", ha="center", va="center", fontweight="bold")
        ax.set_title(f"{script}.py")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors]
    figure.legend(handles, names, ncols=4, loc="lower center", frameon=False)
    return figure


def posteriors():
    _, model, _ = load("vae", "vae-2d", "cpu")
    _, _, test_x, test_y = load_mnist()
    torch.manual_seed(0)
    mu, logvar = model.encode(torch.bernoulli(test_x[:1000] / 255))
    sigma = (0.5 * logvar).exp()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    for radius in (1, 2, 3):
        circle = plt.Circle((0, 0), radius, fill=False, color="0.7", linestyle="--", zorder=0)
        axes[0].add_patch(circle)
    for m, s, label in zip(mu, sigma, test_y):
        color = plt.get_cmap("tab10")(int(label))
        axes[0].add_patch(Ellipse(m, 2 * s[0], 2 * s[1], alpha=0.5, color=color))
    for digit in range(10):
        axes[0].plot([], [], "o", color=plt.get_cmap("tab10")(digit), label=digit)
    axes[0].legend(loc="center right", bbox_to_anchor=(-0.12, 0.5), title="digit")
    axes[0].set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xlabel="z[0]", ylabel="z[1]")
    axes[0].set_title("q(z | x) of 1,000 test digits, over p(z)")
    side = torch.linspace(-2.85, 2.85, 20)
    z = torch.cartesian_prod(side.flip(0), side).flip(1)  # rows from the top: z[1] falls
    x = model.decode(z).sigmoid().view(20, 20, 28, 28).permute(0, 2, 1, 3).reshape(560, 560)
    axes[1].imshow(x, cmap="gray", extent=(-3, 3, -3, 3))
    axes[1].set(xlabel="z[0]", title="what each z decodes to")
    return figure


def codes():
    _, model, _ = load("vqvae", "vqvae", "cpu")
    _, _, test_x, _ = load_mnist()
    torch.manual_seed(0)
    x = torch.bernoulli(test_x[:1] / 255)
    _, maps, _, logits, _ = model(x)
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.3))
    axes[0].imshow(x[0, 0], cmap="gray")
    axes[0].set_title("x, 28 x 28 pixels")
    axes[1].imshow(maps.view(7, 7), cmap="tab20")
    for i, code in enumerate(maps[0].tolist()):
        axes[1].text(i % 7, i // 7, code, ha="center", va="center", fontsize=8)
    axes[1].set_title("its codes, 7 x 7 of 0..63")
    axes[2].imshow(logits[0, 0].sigmoid(), cmap="gray")
    axes[2].set_title("what they decode to")
    # each code in all 49 positions, of which the middle patch is shown
    everywhere = model.decode(model.codebook[:, None].expand(-1, 49, -1)).sigmoid()
    patches = everywhere[:, 0, 12:16, 12:16].view(8, 8, 4, 4)
    axes[3].imshow(patches.permute(0, 2, 1, 3).reshape(32, 32), cmap="gray")
    for line in range(1, 8):
        axes[3].axhline(4 * line - 0.5, color="#4c72b0", linewidth=1)
        axes[3].axvline(4 * line - 0.5, color="#4c72b0", linewidth=1)
    axes[3].set_title("the 64 codes, decoded alone")
    for ax in axes:
        ax.set_axis_off()
    return figure


def denoising():
    _, model, _ = load("diffusion", "diffusion", "cpu")
    torch.manual_seed(3)
    noise = torch.randn(1, 1, 28, 28)
    frames = []
    model.move(noise, 1, 0, 50, fresh=0.25, frames=frames)
    x_ts = [noise] + [x for x, _ in frames]  # at the start of each step, and at the end
    steps = [0, 4, 9, 14, 19, 24, 29, 34, 39, 44, 49]
    figure, axes = plt.subplots(2, len(steps), figsize=(11, 2.4))
    for column, i in enumerate(steps):
        axes[0, column].imshow(x_ts[i][0, 0], cmap="gray", vmin=-1.5, vmax=1.5)
        axes[1, column].imshow(frames[i][1][0, 0], cmap="gray", vmin=-1, vmax=1)
        axes[0, column].set_title(f"t = {1 - i / 50:.2f}", fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("x_t")
    axes[1, 0].set_ylabel("predicted x0")
    return figure


FUNCTIONS = nats, speed, masks, fields, posteriors, codes, denoising
FIGURES = {function.__name__: function for function in FUNCTIONS}


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*FIGURES, []], help="(default: all)")
    parser.add_argument("--assets", type=Path, default=ROOT / "assets", help="where to write")
    args = parser.parse_args(argv)
    args.assets.mkdir(parents=True, exist_ok=True)
    for name in args.names or FIGURES:
        try:
            figure = FIGURES[name]()
        except FileNotFoundError as error:
            print(f"{name}: not drawn, as {error.filename} is missing")
            continue
        figure.savefig(args.assets / f"{name}.png", dpi=100, bbox_inches="tight")
        plt.close(figure)
        print(f"wrote {args.assets / f'{name}.png'}")


if __name__ == "__main__":
    main()
