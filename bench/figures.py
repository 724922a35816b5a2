"""Draws the charts and figures of README.md into assets/.

    python bench/figures.py                        # all whose runs are in out/
    python bench/figures.py --only masks fields

nats       test nats against training time, a line for each model; lines for published figures
speed      ratio of Fréchet distances against the time to draw 100 images
masks      made.py: which input reaches which output, for an image of 2 x 2 pixels
fields     pixelcnn.py, gatedcnn.py: the pixels that the prediction of the middle one depends on
posteriors vae.py: q(z | x) of a thousand test digits over p(z), for two numbers in z; needs the run
           python vae.py --z-dim 2 --epochs 2 --out-dir out/vae-2d
codes      vqvae.py: a digit, its codes, what they decode to, and what each code looks like
denoising  diffusion.py: x_t above the predicted x0, along t

nats and speed show what is in bench/results.json. Needs matplotlib (bench/requirements.txt).
"""

import argparse
import importlib
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Ellipse
from measure import GREY, kind_of, load, read_results
from train_all import SCRIPTS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from common import load_mnist
from made import MADE

# published: dynamic binarisation, test nats; sources in bench/README.md
PUBLISHED = {"MADE": 84.87, "PixelCNN": 81.45, "Image GPT": 79.17, "PixelSNAIL": 78.61}
TEN_COLORS = plt.get_cmap("tab10")
COLORS = {script: TEN_COLORS(i) for i, script in enumerate(SCRIPTS)}


# ---------------------------------------------------------------- charts of all models
def minutes_and_nats(figures):
    """Two lists, of minutes of training and of test nats, after each epoch of a measured run."""
    metric = "nll" if "nll" in figures else "neg_elbo"
    values = [row[metric] for row in figures["log"]]
    minutes = [epoch * figures["s/epoch"] / 60 for epoch in range(1, len(values) + 1)]
    return minutes, values


def spread(places, gap):
    """Move numbers in ascending order upwards until each is at least gap above the last."""
    spread_places = places[:1]
    for place in places[1:]:
        spread_places.append(max(place, spread_places[-1] + gap))
    return spread_places


def hide_frame(axes):
    """Leave only the axes themselves, left and below."""
    axes.spines[["top", "right"]].set_visible(False)


def nats():
    curves = {}
    for script, figures in read_results().items():
        if script in SCRIPTS and script not in GREY:
            curves[script] = minutes_and_nats(figures)
    final = {script: values[-1] for script, (_, values) in curves.items()}
    scripts = sorted(final, key=final.get)  # the best first
    end = 1.15 * max(minutes[-1] for minutes, _ in curves.values())
    names_at = spread([final[script] for script in scripts], 0.65)

    figure, axes = plt.subplots(figsize=(8, 5.5))
    for script, name_at in zip(scripts, names_at):
        minutes, values = curves[script]
        color = COLORS[script]
        name = f"{script} {values[-1]:.1f}"
        if script in ("vae", "vqvae"):
            name += " (bound)"
        axes.plot(minutes, values, ".-", color=color)
        axes.plot([minutes[-1], end], [values[-1], name_at], ":", color=color, linewidth=0.8)
        axes.text(1.03 * end, name_at, name, color=color, va="center")
    left = axes.get_yaxis_transform()  # x as a share of the width, y as the data
    for name, value in PUBLISHED.items():
        axes.axhline(value, color="0.85", zorder=0)
        text = f"{name} {value}"
        axes.text(0.01, value, text, color="0.5", fontsize=8, va="bottom", transform=left)
    axes.set(xscale="log", xlim=(0.6, end), ylim=(78, 96))
    axes.set(xlabel="minutes of training on a CPU", ylabel="-log p(x) of test images, nats")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    hide_frame(axes)
    return figure


def speed():
    results = read_results()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for script in SCRIPTS:
        if script not in results:
            continue
        figures = results[script]
        ratio = figures["Frechet"] / results[kind_of(script)]["Frechet"]
        point = (figures["100 in"], ratio)
        axes.plot(*point, "o", color=COLORS[script])
        style = {"ha": "left", "xytext": (7, 0)}
        if script in ("rnn", "wavenet"):  # their right neighbours are near
            style = {"ha": "right", "xytext": (-7, 0)}
        axes.annotate(script, point, textcoords="offset points", va="center", **style)
    right = axes.get_yaxis_transform()  # x as a share of the width, y as the data
    axes.axhline(1, color="0.85", zorder=0)
    axes.text(1, 1, "real digits", color="0.5", va="bottom", ha="right", transform=right)
    axes.set(xscale="log", yscale="log", xlim=(0.01, 10))
    axes.set(xlabel="seconds to draw 100 images on a CPU", ylabel="ratio of Fréchet distances")
    axes.set_xticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    axes.set_yticks([1, 10, 100], ["1", "10", "100"])
    hide_frame(axes)
    return figure


# ---------------------------------------------------------------- figures of one model
def show_matrix(axes, matrix, columns, rows, title):
    """A matrix of small integers as squares, filled where it is not 0, with named columns, rows."""
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
    last = model.head.mask.float()  # (outputs, units)
    n_paths = last @ first  # (outputs, pixels)
    pixels = [f"x{i}" for i in range(4)]
    units = [f"h{m}" for m in range(1, 4)]
    outputs = [f"out {i}" for i in range(4)]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), width_ratios=(4, 3, 4), layout="constrained")
    show_matrix(axes[0], first, pixels, units, "mask of the first layer")
    show_matrix(axes[1], last, units, outputs, "mask of the last layer")
    show_matrix(axes[2], n_paths, pixels, outputs, "their product: number of paths")
    return figure


def is_seen(model):
    """(28, 28) bool: the pixels that the logit of the middle pixel depends on."""
    x = torch.full((1, 1, 28, 28), 0.5, requires_grad=True)
    with torch.enable_grad():
        logit = model(x)[0, 0, 14, 14]
        (gradient,) = torch.autograd.grad(logit, x)
    return gradient[0, 0] != 0


def fields():
    names = ["future", "blind spot", "seen", "X: predicted here"]
    colors = ["#f0f0f0", "#d9534f", "#4c72b0", "#ffd92f"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.8))
    index = torch.arange(784).view(28, 28)
    for ax, script in zip(axes, ("pixelcnn", "gatedcnn")):
        torch.manual_seed(0)
        model = importlib.import_module(script).Model()  # any weights will do
        kind = torch.zeros(28, 28)  # the index of a name and a colour
        kind[index < index[14, 14]] = 1  # all of the past is blind, unless it is seen
        kind[is_seen(model)] = 2
        kind[14, 14] = 3
        ax.imshow(kind, cmap=ListedColormap(colors), vmin=0, vmax=3)
        ax.set_xticks([x - 0.5 for x in range(29)], [])
        ax.set_yticks([y - 0.5 for y in range(29)], [])
        ax.grid(color="white", linewidth=0.5)
        ax.tick_params(length=0)
        ax.text(14, 14, "X", ha="center", va="center", fontweight="bold")
        ax.set_title(f"{script}.py")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors]
    figure.legend(handles, names, ncols=4, loc="lower center", frameon=False)
    return figure


def show_posteriors(axes, mu, sigma, y):
    """An ellipse of one sigma for each of mu (N, 2), in the colour of its digit in y (N,)."""
    for radius in (1, 2, 3):
        circle = plt.Circle((0, 0), radius, fill=False, color="0.7", linestyle="--", zorder=0)
        axes.add_patch(circle)
    for center, radii, digit in zip(mu.tolist(), sigma.tolist(), y.tolist()):
        width = 2 * radii[0]
        height = 2 * radii[1]
        axes.add_patch(Ellipse(center, width, height, alpha=0.5, color=TEN_COLORS(digit)))
    for digit in range(10):
        axes.plot([], [], "o", color=TEN_COLORS(digit), label=digit)
    axes.legend(loc="center right", bbox_to_anchor=(-0.12, 0.5), title="digit")
    axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xlabel="z[0]", ylabel="z[1]")
    axes.set_title("q(z | x) of 1,000 test digits, over p(z)")


def posteriors():
    _, model, _ = load("vae", "vae-2d", "cpu")
    _, _, test_x, test_y = load_mnist()
    torch.manual_seed(0)
    mu, logvar = model.encode(torch.bernoulli(test_x[:1000]))
    sigma = (0.5 * logvar).exp()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    show_posteriors(axes[0], mu, sigma, test_y[:1000])

    side = torch.linspace(-2.85, 2.85, 20)
    z = torch.cartesian_prod(side.flip(0), side).flip(1)  # rows from the top: z[1] falls
    x = model.decode(z).sigmoid()  # (400, 1, 28, 28)
    grid = x.view(20, 20, 28, 28).permute(0, 2, 1, 3).reshape(560, 560)
    axes[1].imshow(grid, cmap="gray", extent=(-3, 3, -3, 3))
    axes[1].set(xlabel="z[0]", title="what each z decodes to")
    return figure


def codes():
    _, model, _ = load("vqvae", "vqvae", "cpu")
    _, _, test_x, _ = load_mnist()
    torch.manual_seed(0)
    x = torch.bernoulli(test_x[:1])
    image_codes = model.quantise(model.encode(x))  # (1, 49)
    decoded = model.decode(model.codebook[image_codes]).sigmoid()
    # each code in all 49 positions, of which the middle patch is shown
    everywhere = model.decode(model.codebook[:, None].expand(-1, 49, -1)).sigmoid()
    patches = everywhere[:, 0, 12:16, 12:16].view(8, 8, 4, 4)

    figure, axes = plt.subplots(1, 4, figsize=(12, 3.3))
    axes[0].imshow(x[0, 0], cmap="gray")
    axes[0].set_title("x, 28 x 28 pixels")
    axes[1].imshow(image_codes.view(7, 7), cmap="tab20")
    for i, code in enumerate(image_codes[0].tolist()):
        axes[1].text(i % 7, i // 7, code, ha="center", va="center", fontsize=8)
    axes[1].set_title("its codes, 7 x 7 of 0..63")
    axes[2].imshow(decoded[0, 0], cmap="gray")
    axes[2].set_title("what they decode to")
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
    times = model.times(50)
    frames = []
    model.move(noise, times, frames=frames)
    x_ts = [noise] + [x for x, _ in frames]  # at the start of each step, and at the end
    shown = [0, 4, 9, 14, 19, 24, 29, 34, 39, 44, 49]
    figure, axes = plt.subplots(2, len(shown), figsize=(11, 2.4))
    for column, i in enumerate(shown):
        _, x0 = frames[i]
        axes[0, column].imshow(x_ts[i][0, 0], cmap="gray", vmin=-1.5, vmax=1.5)
        axes[1, column].imshow(x0[0, 0], cmap="gray", vmin=-1, vmax=1)
        axes[0, column].set_title(f"t = {times[i]:.2f}", fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("x_t")
    axes[1, 0].set_ylabel("predicted x0")
    return figure


FUNCTIONS = [nats, speed, masks, fields, posteriors, codes, denoising]
FIGURES = {function.__name__: function for function in FUNCTIONS}


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=FIGURES, help="(default: all)")
    parser.add_argument("--assets", type=Path, default=ROOT / "assets", help="where to write")
    args = parser.parse_args(argv)
    args.assets.mkdir(parents=True, exist_ok=True)
    names = args.only
    if names is None:
        names = list(FIGURES)
    for name in names:
        try:
            figure = FIGURES[name]()
        except FileNotFoundError as error:
            print(f"{name}: not drawn, as {error.filename} is missing")
            continue
        path = args.assets / f"{name}.png"
        figure.savefig(path, dpi=100, bbox_inches="tight")
        plt.close(figure)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
