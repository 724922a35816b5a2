"""The head-to-head: measures the checkpoints in out/ alike, writes tables and pictures.

    python bench/compare.py                        # all runs in out/: bench/train_all.py makes them
    python bench/compare.py --scripts vae gan      # only these

The figures are kept in bench/results.json, with the log of the training. So the ten need not be
trained and measured in one go: the tables show all that is in that file, README.md with the most
important columns and bench/README.md with all of them. Checkpoints that have not changed are not
measured again, but their times are. With another number of --samples, the table is only printed.
assets/ gets samples.png, a row of each model, and those pictures of the runs that README.md shows.

What is measured of each model:
parameters  without the labels, if the model has not learnt any
s/epoch     seconds of training for 60,000 images: the median of 20 steps, times their number
nats        -log p(x), or a bound on it, of the 10,000 test images without labels, each pixel drawn
            from its grey level; bits/dim: the same / (784 log 2)
100 in      seconds for sample(100), the median of three
Frechet     distance of two Gaussians, fitted to the features of the samples and of the test images
ratio       that distance over the one of as many training images (a mean over five draws of
            these): 1 is as near as real data
KID         squared distance of the mean features under the kernel (a b / 64 + 1)^3, unbiased
precision   share of samples among the data: nearer to a test image than its third neighbour is
recall      share of test images among the samples, likewise
brightness  mean of all pixels, 0 black and 1 white: too low means that strokes are too thin
digits      shares of the rarest and of the commonest digit among the samples
labels      share of 1,000 samples that show the digit asked for, of out/<script>-labels/model.pt,
            with the guidance that sample() has by default
Features and digits are those of bench/classifier.py. gan.py and diffusion.py are compared with grey
digits, the others with binarised ones, to which end the mean images of vae.py and vqvae.py are
drawn from, too.
"""

import argparse
import hashlib
import importlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from classifier import WEIGHTS, load_classifier
from train_all import SCRIPTS, seconds, trainer

from common import load_mnist, save_images

GREY = "gan", "diffusion"
SAMPLES = 10_000  # distances fall with the number of samples, so they are compared at one only
START, END = "<!-- bench/compare.py writes from here -->\n", "<!-- to here -->\n"
SHORT = "model", "epochs", "nats", "s/epoch", "100 in", "ratio", "digits"  # columns in README.md
LONG = ("model", "parameters", "epochs", "s/epoch", "nats", "-ELBO", "bits/dim", "100 in",
        "Frechet", "ratio", "KID", "precision", "recall", "brightness", "digits",
        "labels")  # fmt: skip


def kind_of(script):
    """Which test images the samples of a script are compared with."""
    return "grey" if script in GREY else "binarised"


def frechet(a, b):
    """Frechet distance of the Gaussians fitted to features a (N, D) and b (M, D)."""
    # |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * root).item()


def kernel_sum(a, b):
    """Sum of the kernel (p q / D + 1)^3 over all pairs of p in a (N, D) and q in b (M, D)."""
    return sum(((part @ b.T / b.shape[1] + 1) ** 3).sum() for part in a.split(1000))


def kernel_mean(a):
    """Mean of that kernel over all pairs of two different rows of a (N, D)."""
    with_itself = ((a.square().sum(1) / a.shape[1] + 1) ** 3).sum()
    return (kernel_sum(a, a) - with_itself) / (len(a) * (len(a) - 1))


def kid(a, b):
    """Squared kernel distance of a (N, D) and b (M, D), unbiased (arXiv:1801.01401)."""
    between = kernel_sum(a, b) / (len(a) * len(b))
    return (kernel_mean(a) + kernel_mean(b) - 2 * between).item()


def manifold_coverage(a, b, k=3):
    """Share of the a (N, D) that lie in the manifold of b (M, D): nearer to some b than that one's
    k-th neighbour in b is. Of samples in data it is the precision, of data in samples the recall
    of arXiv:1904.06991."""
    radius = torch.cat([torch.cdist(part, b).kthvalue(k + 1).values for part in b.split(1000)])
    inside = [(torch.cdist(part, b) < radius).any(1) for part in a.split(1000)]
    return torch.cat(inside).double().mean().item()


class Data:
    """The features of the test images, and how near those of other images come to them."""

    def __init__(self, test_x, classifier, device, binary):
        self.classifier, self.device, self.binary = classifier, device, binary
        self.real, _ = self.features(test_x / 255)

    def features(self, x):
        """x (N, 1, 28, 28) in [0, 1] -> features (N, 64) float64, digits (N,)"""
        torch.manual_seed(0)
        x = torch.bernoulli(x) if self.binary else x
        features = torch.cat([self.classifier.features(p.to(self.device)) for p in x.split(500)])
        return features.double(), self.classifier.head(features.relu()).argmax(1)

    def compare(self, x):
        """-> {figure: number} of the images x (N, 1, 28, 28)"""
        a, digits = self.features(x)
        share = digits.bincount(minlength=10) / len(x)
        return {"Frechet": frechet(a, self.real), "KID": kid(a, self.real),
                "precision": manifold_coverage(a, self.real),
                "recall": manifold_coverage(self.real, a), "brightness": x.mean().item(),
                "rarest": share.min().item(), "commonest": share.max().item()}  # fmt: skip


def load(script, folder, device):
    """-> the module script.py, the model of out/<folder>/model.pt, and that checkpoint."""
    module = importlib.import_module(script)
    saved = torch.load(f"out/{folder}/model.pt", device, weights_only=True)
    model = module.Model(**saved["config"]).to(device).eval().requires_grad_(False)
    model.load_state_dict(saved["model"])
    return module, model, saved


def draw(model, n, title, y=None):
    """n samples (n, 1, 28, 28), 500 at a time, with a line of progress on a terminal."""
    parts = []
    for i in range(0, n, 500):
        parts.append(model.sample(min(500, n - i), None if y is None else y[i : i + 500]))
        if sys.stdout.isatty():
            print(f"{title}: {min(i + 500, n)} of {n} samples  ", end="\r", flush=True)
    return torch.cat(parts)


def measure(script, n, data, test_x, device):
    """-> {figure: number} of out/<script>/model.pt, from n samples; without times"""
    module, model, saved = load(script, script, device)
    figures = {"epochs": len(saved["log"]), "log": saved["log"],
               "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip
    if script not in GREY:
        loss_fn = model.loss
        if script == "vae":
            loss_fn = model.bound  # the bound of 64 draws, too
        test = module.evaluate(loss_fn, test_x, module.bfloat16_autocast(device))
        figures |= {name: test[name] for name in ("nll", "neg_elbo", "iwae") if name in test}
    torch.manual_seed(0)
    figures |= data.compare(draw(model, n, script))
    if Path(f"out/{script}-labels/model.pt").exists():
        y = torch.arange(1000, device=device) % 10
        _, model, _ = load(script, f"{script}-labels", device)
        _, digits = data.features(draw(model, 1000, script, y))
        figures["labels"] = (digits == y).double().mean().item()
    return figures


def measure_times(script, device):
    """-> {figure: seconds} for an epoch, and for 100 samples of out/<script>/model.pt"""
    _, model, _ = load(script, script, device)
    with torch.enable_grad():
        step, _, _, steps = trainer(script)
        epoch = steps * seconds(step, 20)
    # .item() waits until a GPU is done
    samples = seconds(lambda: model.sample(100).sum().item(), 3, warm_up=1)
    return {"s/epoch": epoch, "100 in": samples}


def fingerprint(path):
    """The start of the SHA-256 of a file, by which one sees whether it has changed."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def save_json(results, path):
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)


def real_baseline(n, data, train_x):
    """-> {figure: number} of n training images, a mean over five draws."""
    draws = [torch.randperm(len(train_x), generator=torch.manual_seed(i))[:n] for i in range(5)]
    figures = [data.compare(train_x[i.to(train_x.device)] / 255) for i in draws]
    return {key: sum(f[key] for f in figures) / len(figures) for key in figures[0]}


def cells(name, figures, real):
    """{column: text} of a line of the table; real: Frechet distance of training images."""
    forms = {"s/epoch": "{:.0f}", "100 in": "{:.2f} s", "Frechet": "{:.2f}", "KID": "{:.1f}",
             "precision": "{:.2f}", "recall": "{:.2f}", "brightness": "{:.3f}"}  # fmt: skip
    show = {key: forms.get(key, "{:,}").format(figures[key]) for key in LONG if key in figures}
    show["model"] = f"{name}.py" if name in SCRIPTS else name
    ratio = figures["Frechet"] / real
    show["ratio"] = f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
    show["digits"] = f"{100 * figures['rarest']:.0f}-{100 * figures['commonest']:.0f} %"
    if "labels" in figures:
        show["labels"] = f"{100 * figures['labels']:.1f} %"
    nats = [figures[key] for key in ("nll", "neg_elbo", "iwae") if key in figures]
    if nats:
        bound = "" if "nll" in figures else "< "
        show["nats"] = f"{bound}{nats[-1]:.2f}"
        show["-ELBO"] = "" if "nll" in figures else f"{nats[0]:.2f}"
        show["bits/dim"] = f"{bound}{nats[-1] / 784 / math.log(2):.4f}"
    return show


def table(rows, columns):
    """Text of the table of rows, {column: text} each. What is best among models is bold."""
    rows = [dict(row) for row in rows]
    for column in ("nats", "s/epoch", "100 in", "ratio"):
        models = [row for row in rows if row["model"].endswith(".py") and row.get(column)]
        if models:
            values = [float(row[column].strip("< s").replace(",", "")) for row in models]
            for row, value in zip(models, values):
                if value == min(values):
                    row[column] = f"**{row[column]}**"
    lines = [columns, ["---"] * len(columns)]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_between(path, text):
    """Replace what stands between START and END in the file."""
    content = path.read_text()
    before, after = content.split(START)[0], content.split(END)[1]
    path.write_text(f"{before}{START}\n{text}\n{END}{after}")


def contact_sheet(rows, old):
    """{name: an image file with 10 columns} -> (1, 1, H, W): its first row of each, labelled.
    A file that is missing leaves its row as it is in the picture old."""
    canvas = Image.new("L", (374, 30 * len(rows) + 2), 128)
    if old.exists():
        with Image.open(old) as image:
            canvas.paste(image.convert("L").resize(canvas.size, Image.Resampling.NEAREST))
    for i, (name, path) in enumerate(rows.items()):
        if path.exists():
            canvas.paste(0, (0, 30 * i + 2, 70, 30 * i + 30))
            ImageDraw.Draw(canvas).text((4, 30 * i + 10), name, fill=255)
            canvas.paste(Image.open(path).convert("L").crop((0, 0, 302, 30)), (72, 30 * i))
    canvas = canvas.resize((2 * canvas.width, 2 * canvas.height), Image.Resampling.NEAREST)
    return torch.tensor(np.array(canvas))[None, None] / 255


def all_in_one(assets, test_x):
    """assets/samples.png: ten test images, and the first row of samples of each model"""
    save_images(test_x[:10] / 255, "out/bench/data.png")
    rows = {"test images": Path("out/bench/data.png")}
    rows |= {script: Path(f"out/{script}/samples.png") for script in SCRIPTS}
    save_images(contact_sheet(rows, assets / "samples.png"), assets / "samples.png")


def copy_pictures(assets):
    """Copy the pictures of the runs in out/ that the README shows."""
    pictures = {f"{script}.png": f"out/{script}/completion.png" for script in SCRIPTS[:6]}
    pictures |= {f"{script}.png": f"out/{script}/samples.png" for script in SCRIPTS[6:]}
    pictures |= {
        "sampling.gif": "out/transformer/sampling.gif",
        "reconstruction.png": "out/vae/reconstruction.png",
        "vqvae_reconstruction.png": "out/vqvae/reconstruction.png",
        "vqvae_completion.png": "out/vqvae/completion.png",
        "process.gif": "out/diffusion/process.gif",
    }
    for name, path in pictures.items():
        if Path(path).exists():
            shutil.copyfile(path, assets / name)
    if Path("out/gan/interpolation.png").exists():
        with Image.open("out/gan/interpolation.png") as image:
            image.crop((0, 0, image.width, 302)).save(assets / "gan_interpolation.png")


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--scripts", nargs="+", choices=SCRIPTS, help="(default: all whose run is in out/)")
    flag("--samples", type=int, default=SAMPLES, help="of each model (default %(default)s)")
    flag("--data-dir", help="folder of the data sets (default: data, beside common.py)")
    flag("--root", type=Path, default=ROOT, help="whose README.md, bench/ and assets/ to write")
    args = parser.parse_args(argv)
    if args.samples < 100:
        parser.error("--samples must be at least 100")
    scripts = args.scripts
    if scripts is None:
        scripts = [script for script in SCRIPTS if Path(f"out/{script}/model.pt").exists()]
    for script in scripts:
        if not Path(f"out/{script}/model.pt").exists():
            sys.exit(f"no out/{script}/model.pt: train it first, with python {script}.py")
    if not scripts:
        sys.exit("no out/*/model.pt: train first, with python bench/train_all.py")
    readmes = [args.root / "README.md", args.root / "bench/README.md"]
    for readme in readmes:
        text = readme.read_text()
        if START not in text or END not in text:
            sys.exit(f"{readme} has no lines {START.strip()} and {END.strip()}")
    path = args.root / "bench/results.json"
    if args.samples != SAMPLES:
        path = Path(f"out/bench/results-{args.samples}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}

    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    machine = f"torch {torch.__version__}, {machine}"
    n = args.samples
    key = [n, fingerprint(WEIGHTS)]
    train_x, _, test_x, _ = load_mnist(args.data_dir, device=device)
    classifier = load_classifier(device)
    sets = {"grey": Data(test_x, classifier, device, binary=False),
            "binarised": Data(test_x, classifier, device, binary=True)}  # fmt: skip
    for kind, data in sets.items():
        if results.get(kind, {}).get("key") != key:
            results[kind] = {**real_baseline(n, data, train_x), "key": key}
            save_json(results, path)
    for script in scripts:
        kind = kind_of(script)
        models = [Path(f"out/{script}/model.pt"), Path(f"out/{script}-labels/model.pt")]
        key_of_script = [*key, *[fingerprint(model) for model in models if model.exists()]]
        if results.get(script, {}).get("key") != key_of_script:
            results[script] = measure(script, n, sets[kind], test_x, device)
            results[script]["key"] = key_of_script
        results[script] |= {**measure_times(script, device), "machine": machine}
        save_json(results, path)
        row = cells(script, results[script], results[kind]["Frechet"])
        print("  ".join(f"{key} {row[key]}" for key in LONG if key in row), flush=True)

    rows = [
        cells(f"training images, {kind}", results[kind], results[kind]["Frechet"]) for kind in sets
    ]
    measured = [script for script in SCRIPTS if results.get(script, {}).get("key", [])[:2] == key]
    for script in measured:
        kind = kind_of(script)
        rows.append(cells(script, results[script], results[kind]["Frechet"]))
    machines = sorted({results[script]["machine"] for script in measured})
    note = f"{n:,} samples of each model; {'; '.join(machines)}.\n"
    if n != SAMPLES:
        print(table(rows, LONG) + "\n" + note)
        return
    all_in_one(args.root / "assets", test_x)
    copy_pictures(args.root / "assets")
    for readme, columns in zip(readmes, (SHORT, LONG)):
        write_between(readme, table(rows, columns) + "\n" + note)
    print(f"wrote {readmes[0]} and {readmes[1]}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; start again to continue")
