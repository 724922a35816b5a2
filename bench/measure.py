"""Measures the runs in out/, all in the same way, and keeps the figures in bench/results.json.

    python bench/measure.py                        # all runs in out/: bench/train_all.py makes them
    python bench/measure.py --scripts vae gan      # only these

Checkpoints that have not changed are not measured again, but their times are. Figures of runs that
are no longer in out/ stay. So the ten need not be trained and measured in one go.

bench/README.md says what the figures mean. In results.json, nll, neg_elbo and iwae (a tighter
bound, of vae.py) are in nats per image, and rarest and commonest are shares of a digit among the
samples. The key says what was measured: the number of samples, and hashes of the classifier and of
the checkpoints. Under grey and binarised are figures of training images.

gan.py and diffusion.py are compared with grey digits, the others with binarised ones. The mean
images of vae.py and vqvae.py are binarised for it, too.
"""

import argparse
import copy
import hashlib
import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from classifier import WEIGHTS, load_classifier
from train_all import SCRIPTS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from common import load_mnist

RESULTS = ROOT / "bench/results.json"
GREY = ["gan", "diffusion"]
SAMPLES = 10_000  # distances fall with the number of samples: compare them at the same one only


# ---------------------------------------------------------------- distances
def frechet(a, b):
    """Fréchet distance of the Gaussians fitted to features a (N, D) and b (M, D)."""
    # |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))
    cov_a = a.T.cov()
    cov_b = b.T.cov()
    means = (a.mean(0) - b.mean(0)).square().sum()
    root_trace = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * root_trace).item()


def kernel_sum(a, b):
    """Sum of the kernel (p q / D + 1)^3 over all pairs of p in a (N, D) and q in b (M, D)."""
    dim = a.shape[1]
    return sum(((part @ b.T / dim + 1) ** 3).sum() for part in a.split(1000))


def kernel_mean(a):
    """Mean of that kernel over all pairs of two different rows of a (N, D)."""
    dim = a.shape[1]
    with_itself = ((a.square().sum(1) / dim + 1) ** 3).sum()
    return (kernel_sum(a, a) - with_itself) / (len(a) * (len(a) - 1))


def kid(a, b):
    """Squared kernel distance of a (N, D) and b (M, D), unbiased (arXiv:1801.01401)."""
    between = kernel_sum(a, b) / (len(a) * len(b))
    return (kernel_mean(a) + kernel_mean(b) - 2 * between).item()


def manifold_coverage(a, b, k=3):
    """Share of a (N, D) that lies in the manifold of b (M, D).

    A row of a does if some row of b is nearer to it than to its own k-th neighbour in b. For
    samples in data, this is the precision of arXiv:1904.06991; for data in samples, the recall.
    """
    # the nearest row of b is the row itself, hence k + 1
    radius = torch.cat([torch.cdist(part, b).kthvalue(k + 1).values for part in b.split(1000)])
    inside = [(torch.cdist(part, b) < radius).any(1) for part in a.split(1000)]
    return torch.cat(inside).double().mean().item()


# ---------------------------------------------------------------- images
class Judge:
    """Compares images with the test images test_x (M, 1, 28, 28), by a classifier's features.

    All images are float in [0, 1]; binary: binarise them first
    """

    def __init__(self, classifier, test_x, binary):
        self.classifier = classifier
        self.binary = binary
        self.real, _ = self.look_at(test_x)

    def look_at(self, x):
        """x (N, 1, 28, 28) -> features (N, 64) float64, digits (N,)."""
        if self.binary:
            torch.manual_seed(0)
            x = torch.bernoulli(x)
        features = torch.cat([self.classifier.features(part) for part in x.split(500)])
        digits = self.classifier.head(features.relu()).argmax(1)
        return features.double(), digits

    def compare(self, x):
        """x (N, 1, 28, 28) -> {figure: number}"""
        features, digits = self.look_at(x)
        shares = digits.bincount(minlength=10) / len(x)
        return {
            "Frechet": frechet(features, self.real),
            "KID": kid(features, self.real),
            "precision": manifold_coverage(features, self.real),
            "recall": manifold_coverage(self.real, features),
            "brightness": x.mean().item(),
            "rarest": shares.min().item(),
            "commonest": shares.max().item(),
        }


def kind_of(script):
    """Which digits the samples of a script are compared with."""
    return "grey" if script in GREY else "binarised"


def compare_training_images(judge, train_x):
    """{figure: number} of as many training images as there are samples, a mean of five draws."""
    draws = []
    for seed in range(5):
        order = torch.randperm(len(train_x), generator=torch.manual_seed(seed))
        idx = order[:SAMPLES].to(train_x.device)
        draws.append(judge.compare(train_x[idx]))
    return {name: sum(draw[name] for draw in draws) / len(draws) for name in draws[0]}


# ---------------------------------------------------------------- models
def load(script, folder, device):
    """The module script.py, and the model and the checkpoint of out/<folder>/model.pt."""
    module = importlib.import_module(script)
    checkpoint = torch.load(f"out/{folder}/model.pt", device, weights_only=True)
    model = module.Model(**checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    return module, model.to(device).eval().requires_grad_(False), checkpoint


def draw(model, n, y=None):
    """n samples (n, 1, 28, 28), always the same ones; y: (n,) labels, or None."""
    torch.manual_seed(0)
    parts = []
    for idx in torch.arange(n).split(500):  # to limit memory
        labels = None if y is None else y[idx]
        parts.append(model.sample(len(idx), labels))
    return torch.cat(parts)


def iwae(model, x):
    """The bound of 64 draws on -log p(x), a mean over x (N, 1, 28, 28), in nats per image."""
    torch.manual_seed(0)
    total = sum(len(part) * model.bound(part).item() for part in x.split(100))
    return total / len(x)


def label_accuracy(script, judge, device):
    """Share of the samples of out/<script>-labels/model.pt that show the digit asked for."""
    _, model, _ = load(script, f"{script}-labels", device)
    y = torch.arange(1000, device=device) % 10
    _, digits = judge.look_at(draw(model, len(y), y))
    return (digits == y).double().mean().item()


def measure(script, judge, test_x, test_y, device):
    """{figure: number} of out/<script>/model.pt, without times."""
    module, model, checkpoint = load(script, script, device)
    figures = {
        "epochs": len(checkpoint["log"]),
        "log": checkpoint["log"],
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }
    if script not in GREY:
        metrics = module.evaluate(model, test_x, test_y)
        figures |= {name: metrics[name] for name in ("nll", "neg_elbo") if name in metrics}
    if script == "vae":
        figures["iwae"] = iwae(model, test_x)
    figures |= judge.compare(draw(model, SAMPLES))
    if Path(f"out/{script}-labels/model.pt").exists():
        figures["labels"] = label_accuracy(script, judge, device)
    return figures


# ---------------------------------------------------------------- times
def median_seconds(function, n, warm_up):
    """Median of n calls, after some that do not count."""
    times = []
    for _ in range(warm_up + n):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times[warm_up:])[n // 2]


def seconds_of_step(module, device):
    """Seconds of the script's own training step, on random images."""
    model = module.Model().to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = module.make_optimizers(model, module.LR / 100)  # small, so that no loss explodes
    autocast = module.bfloat16_autocast(device)
    x = torch.rand(module.BATCH_SIZE, 1, 28, 28, device=device)

    def step():
        loss = module.train_step(model, optimizers, autocast, x, None)
        module.update_ema(ema, model, 1000)
        loss.item()  # waits until a GPU is done

    with torch.enable_grad():
        return median_seconds(step, n=20, warm_up=3)


def measure_times(script, device):
    """Seconds of an epoch, and of 100 samples of out/<script>/model.pt, and where that was."""
    module, model, _ = load(script, script, device)
    steps = 60_000 // module.BATCH_SIZE

    def sample():
        model.sample(100).sum().item()  # waits until a GPU is done

    return {
        "s/epoch": steps * seconds_of_step(module, device),
        "100 in": median_seconds(sample, n=3, warm_up=1),
        "machine": machine_name(module, device),
    }


def machine_name(module, device):
    """What the times depend on."""
    hardware = f"{os.cpu_count()} CPU cores"
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    with module.bfloat16_autocast(device):
        precision = "bfloat16" if torch.is_autocast_enabled(device) else "float32"
    return f"torch {torch.__version__}, {hardware}, {precision}"


# ---------------------------------------------------------------- results.json
def fingerprint(path):
    """The start of the SHA-256 of a file, by which one sees whether it has changed."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def read_results():
    """{script or kind of digits: {figure: number}}, as far as measured."""
    if not RESULTS.exists():
        return {}
    return json.loads(RESULTS.read_text())


def write_results(results):
    """Replace the file at once, so that an interruption leaves the old one or the new one."""
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, RESULTS)


def is_known(results, name, key):
    """Whether results hold the figures of what the key stands for."""
    return name in results and results[name]["key"] == key


@torch.no_grad()
def main(argv=None):
    trained = [script for script in SCRIPTS if Path(f"out/{script}/model.pt").exists()]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--scripts", nargs="+", choices=trained, default=trained, help="default: all in out/")
    scripts = parser.parse_args(argv).scripts
    if not scripts:
        sys.exit("no out/*/model.pt: train first, with python bench/train_all.py")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_x, _, test_x, test_y = load_mnist(device=device)
    classifier = load_classifier(device)
    judges = {
        "grey": Judge(classifier, test_x, binary=False),
        "binarised": Judge(classifier, test_x, binary=True),
    }
    results = read_results()
    common_key = [SAMPLES, fingerprint(WEIGHTS)]
    for kind, judge in judges.items():
        if not is_known(results, kind, common_key):
            results[kind] = compare_training_images(judge, train_x)
            results[kind]["key"] = common_key
            write_results(results)
    for script in scripts:
        paths = [Path(f"out/{script}/model.pt"), Path(f"out/{script}-labels/model.pt")]
        key = common_key + [fingerprint(path) for path in paths if path.exists()]
        if not is_known(results, script, key):
            print(f"{script}: drawing {SAMPLES:,} samples", flush=True)
            results[script] = measure(script, judges[kind_of(script)], test_x, test_y, device)
            results[script]["key"] = key
        results[script] |= measure_times(script, device)
        write_results(results)
        print(f"{script}: Fréchet distance {results[script]['Frechet']:.2f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; start again to continue")
