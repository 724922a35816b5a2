"""All tests, on the CPU and without a network. A new script joins by one line in SCRIPTS.

python -m pytest -q test_smoke.py
"""

import ast
import difflib
import importlib
import io
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common

ROOT = Path(__file__).parent
# What the train section does alone is tested with vae: its text is the same in all scripts.
# script: sizes of a tiny model; metric, and the figure it has to beat in 300 steps of 64 images
# (autoregressive models: 200 steps of 32 images of 14 x 14 pixels)
SCRIPTS = {
    "rnn": (dict(n_embd=16, n_layer=1), "nll", 44),
    "made": (dict(hidden=800, n_layer=1), "nll", 44),
    "wavenet": (dict(channels=16), "nll", 43),
    "pixelcnn": (dict(channels=8, n_layer=3), "nll", 42),
    "gatedcnn": (dict(channels=8, n_layer=3), "nll", 44),
    "transformer": (dict(n_embd=16, n_head=2, n_layer=1), "nll", 40),
    "vae": (dict(channels=16, hidden=64, z_dim=8), "neg_elbo", 150),
    "vqvae": (dict(channels=16, code_dim=4, n_codes=8, n_embd=16, n_layer=1), "neg_elbo", 200),
    "gan": (dict(channels=8, z_dim=16), "d_loss", 1.4),
    "diffusion": (dict(channels=8, n_inner=1, n_embd=32), "loss", 0.4),
}
AUTOREGRESSIVE = [name for name in SCRIPTS if SCRIPTS[name][1] == "nll"]
IMAGES = common.load_mnist(ROOT / "data")
SMALL = [F.pad(d[..., ::2, ::2], (1, 1, 1, 1)) if d.ndim == 4 else d for d in IMAGES]  # 16 x 16


def model_class(name):
    """The class that the script's main trains."""
    return importlib.import_module(name).main.__defaults__[1]


def tiny(name, **changes):
    torch.manual_seed(0)
    return model_class(name)(**{**SCRIPTS[name][0], **changes})


def perturb(model, scale=0.2):
    """Random weights everywhere, also where a layer starts at zero."""
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn_like(p)
    return model


def cli(monkeypatch, capsys, name, *args):
    """Run a script as a command in this process -> (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
    status, message = 0, ""
    try:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    except SystemExit as stop:  # the interpreter prints a text and exits with 1
        status, message = (
            (1, f"{stop.code}\n") if isinstance(stop.code, str) else (stop.code or 0, "")
        )
    captured = capsys.readouterr()
    return status, captured.out, captured.err + message


@pytest.fixture
def small(monkeypatch, tmp_path):
    """main(...) on 600 + 200 images of 16 x 16 and a tiny model, in an empty folder."""
    data = [d[:n] for d, n in zip(SMALL, (600, 600, 200, 200))]
    monkeypatch.setattr(common, "load_mnist", lambda *_: data)
    monkeypatch.chdir(tmp_path)

    def run(name, *args):
        cls, sizes = model_class(name), SCRIPTS[name][0]
        methods = {
            "__init__": lambda self, **sizes: cls.__init__(self, **sizes),
            "sample": lambda self, n, y=None: cls.sample(self, 10, None if y is None else y[:10]),
            "pictures": lambda self, x: {"first": x[:1]},  # test_dry_run... draws them all
        }
        Tiny = type(cls.__name__, (cls,), methods)
        Tiny.__init__.__kwdefaults__ = cls.__init__.__kwdefaults__ | sizes | {"size": 16}
        importlib.import_module(name).main(["--device", "cpu", *map(str, args)], Tiny)

    return run


# ------------------------------------------------------------------ 1. whole runs
@pytest.mark.parametrize("name", SCRIPTS)
def test_dry_run_writes_everything_and_samples_from_it(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    common_args = ("--dry-run", "--data-dir", ROOT / "data", "--class-cond", "--batch-size", 16)
    epochs = 1 if name in AUTOREGRESSIVE else 2
    status, out, err = cli(monkeypatch, capsys, name, *common_args, "--epochs", epochs)
    assert (status, err) == (0, "")
    folder = tmp_path / "out" / f"{name}-dry"
    lines = [line for line in out.split("\n") if f"/{epochs} | train " in line]
    line = r"epoch   1/\d \| train loss [\d.]+ \| test (\w+ [\d.e-]+ )+\| [\d.]+ s \| [\d,]+ img/s"
    assert len(lines) == epochs and re.fullmatch(line, lines[0].strip())
    header, *rows = (folder / "log.csv").read_text().strip().split("\n")
    assert (
        header.startswith("epoch,") and [row.split(",")[0] for row in rows] == ["1", "2"][:epochs]
    )
    written = {"model.pt", "samples.png", "samples_0001.png", f"samples_000{epochs}.png"}
    assert written <= set(os.listdir(folder))
    pictures = tiny(name, size=8).pictures(IMAGES[2][:4, :, 8:16, 8:16] / 255)
    for title, images in pictures.items():
        assert images.min() >= 0 and images.max() <= 1
        assert (folder / f"{title}.{'gif' if images.ndim == 5 else 'png'}").exists()

    (folder / "samples.png").unlink()
    before = (folder / "model.pt").read_bytes()
    status, out, err = cli(monkeypatch, capsys, name, *common_args, "--sample", 3)
    assert (status, err) == (0, "") and Image.open(folder / "samples.png").size == (3 * 30 + 2, 32)
    assert (folder / "model.pt").read_bytes() == before  # sampling trains nothing

    saved = torch.load(folder / "model.pt", weights_only=True)  # the README's three lines
    model = model_class(name)(**saved["config"])
    model.load_state_dict(saved["model"])
    assert model.eval().loss(IMAGES[2][:2] / 255, torch.tensor([3, 7]))[0].isfinite()


def test_readme_commands(monkeypatch, capsys, tmp_path):
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^(?:pip install .* && )?python (\w+)\.py(.*?)(?:#.*)?$", readme, re.M)
    assert ("diffusion", "--epochs 10") in [(name, args.strip()) for name, args in commands]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_mnist", lambda *_: IMAGES)  # FashionMNIST needs a network
    for name, args in commands:
        if name != "diffusion" and re.fullmatch(r" --epochs \d+\s*", args):
            continue  # slow, and test_dry_run... runs just these
        args = [*shlex.split(args), "--dry-run"]
        if "--sample" not in args:
            args += ["--epochs", "2" if "--resume" in args else "1"]
        status, _, err = cli(monkeypatch, capsys, name, *args)
        assert (status, err) == (0, ""), (name, args)
    test_command = (ROOT / ".ci/run").read_text().strip().split("\n")[-1].replace(" -q -r", " -r")
    assert test_command in readme


def test_help_explains_every_flag(monkeypatch, capsys, name="vae"):
    status, out, _ = cli(monkeypatch, capsys, name, "-h")
    flags = "epochs batch-size lr seed device dataset data-dir out-dir class-cond compile"
    flags = f"{flags} resume sample dry-run tensorboard".split()
    assert status == 0 and re.findall(r"^  --([\w-]+)", out, re.M) == flags


@pytest.mark.parametrize("name", SCRIPTS)
def test_copied_alone(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = f"""if 1:
        import sys, torch, {name}
        assert "common" not in sys.modules and "torchvision" not in sys.modules
        torch.manual_seed(0)
        model = {name}.{model_class(name).__name__}(**{SCRIPTS[name][0]})
        for p in model.parameters(): p.data += 0.1 * torch.randn_like(p)
        loss, metrics = model.loss(torch.rand(4, 1, 28, 28), torch.arange(4))
        assert loss.ndim == 0 and all(m.ndim == 0 for m in metrics.values())
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        small = {name}.{model_class(name).__name__}(**{SCRIPTS[name][0]}, size=16)
        assert small.loss(torch.rand(2, 1, 16, 16))[0] > 0
        for m, n, size in (model, 3, 28), (small, 1, 16), (small, 64, 16):
            images = m.eval().sample(n)
            assert images.shape == (n, 1, size, size) and not images.requires_grad
            assert 0 <= images.min() and images.max() <= 1
    """
    run = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == [f"{name}.py"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_gpu_is_never_waited_for(name):
    """On the meta device nothing has a value: to read one raises, like most uses of the CPU."""
    model = tiny(name, size=4).to("meta")
    x, y = torch.empty(4, 1, 4, 4, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    outputs = [model.sample(4, y), *model.pictures(x).values()]
    outputs += model.bound(x, k=2)[1].values() if hasattr(model, "bound") else []
    for labels in None, y:
        loss, metrics = model.loss(x, labels)
        loss.backward()
        outputs += metrics.values()
    assert {output.device.type for output in outputs} == {"meta"}


# ------------------------------------------------------------------ 3.-5. autoregressive models
@torch.no_grad()
def slow_sample(model, n, y=None, top=None, guidance=1.0):
    """The definition: a whole forward pass for each pixel."""
    x = torch.zeros(n, 1, model.size, model.size, dtype=next(model.parameters()).dtype)
    given = 0 if top is None else top[0].numel()
    x.view(n, -1)[:, :given] = 0 if top is None else top.flatten(1)
    for i in range(given, model.size**2):
        logits, free = model(x, y).flatten(1)[:, i], model(x).flatten(1)[:, i]
        if y is not None:
            logits = free + guidance * (logits - free)
        x.view(n, -1)[:, i] = torch.bernoulli(logits.sigmoid())
    return x


def jacobian(model):
    """Of all logits with respect to all pixels of a random image -> (H * W, H * W)."""
    x, n = (torch.rand(1, 1, model.size, model.size) > 0.5).double(), model.size**2
    return torch.autograd.functional.jacobian(lambda x: model(x).flatten(), x).view(n, n)


def trained(name, **changes):
    """A tiny model in float64 after a few steps on digits, cut to its size."""
    model = perturb(tiny(name, **changes), 0.1).double()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    k = (28 - model.size) // 2
    for step in range(10):
        i = torch.randint(60_000, (32,))
        x = IMAGES[0][i, :, k : k + model.size, k : k + model.size].double() / 255
        optimizer.zero_grad()
        model.loss(x, IMAGES[1][i])[0].backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_probabilities_of_all_images_sum_to_one(name):
    model = trained(name, size=3)
    x = torch.arange(512)[:, None].bitwise_and(2 ** torch.arange(9)).ne(0).double()
    for y in (None, torch.full((512,), 7)):
        logits = model(x.view(512, 1, 3, 3), y).flatten(1).double()
        p = torch.where(x == 1, logits, -logits).sigmoid().prod(1)
        assert abs(p.sum() - 1) < 1e-6 and p.std() > 3e-4, p.sum()


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_causal_and_nothing_out_of_sight(name):
    """The Jacobian of all logits: 0 at the pixel itself and later, nowhere 0 before."""
    seen = torch.ones(81, 81).tril(-1).bool()
    if name == "pixelcnn":  # but for its blind spot, as its header draws it
        row, col = torch.arange(81) // 9, torch.arange(81) % 9
        up, right = row[:, None] - row, col - col[:, None]
        seen &= (up == 0) | (right <= 2 * up + 1)
        assert (~seen).tril(-1).sum() > 100
    assert ((jacobian(trained(name, size=9)) != 0) == seen).all()


def test_pixelcnn_masks():
    """Of the 25 taps, A has the 12 before the centre, B the centre, too."""
    for kind, taps in ("A", 12), ("B", 13):
        conv = importlib.import_module("pixelcnn").MaskedConv2d(1, 1, 5, kind)
        seen = torch.autograd.functional.jacobian(conv, torch.zeros(1, 1, 3, 5)).flatten() != 0
        assert seen.int().tolist() == [1] * taps + [0] * (15 - taps)


@pytest.mark.parametrize("name", ["rnn", "made", "wavenet", "transformer"])
def test_last_pixel_sees_the_whole_image(name):
    model = perturb(tiny(name), 0.1).double()
    x = (torch.rand(1, 1, 28, 28) > 0.5).double().requires_grad_()
    model(x)[0, 0, -1, -1].backward()
    assert (x.grad.flatten()[:-1] != 0).all() and x.grad.flatten()[-1] == 0


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_fast_sampling_is_slow_sampling(name):
    model, y = trained(name, size=8), torch.tensor([3, 1, 4])
    top = (torch.rand(3, 1, 5, 8) > 0.5).double()
    for args in (dict(), dict(y=y), dict(y=y, guidance=2.5), dict(top=top), dict(y=y, top=top)):
        torch.manual_seed(1)
        fast = model.sample(3, **args)
        torch.manual_seed(1)
        assert torch.equal(fast, slow_sample(model, 3, **args)), args
        assert ((fast == 0) | (fast == 1)).all() and 0.02 < fast.mean() < 0.98
    assert torch.equal(model.sample(3, top=top)[:, :, :5], top)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_nll_is_in_nats_per_image(name):
    model, x = trained(name, size=8), (torch.rand(5, 1, 8, 8) > 0.5).double()
    loss, metrics = model.loss(x)  # binary images: nothing to draw
    p = model(x).sigmoid()
    nll = -torch.where(x == 1, p, 1 - p).log().sum() / 5
    assert abs(loss - nll) < 1e-4 * nll and metrics["nll"] == loss
    assert abs(metrics["bpd"] - nll / 64 / math.log(2)) < 1e-4


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_completions_keep_what_is_given(name):
    pictures = tiny(name).pictures(IMAGES[2][:10] / 255)
    frames, completion = pictures["sampling"], pictures["completion"].view(6, 10, 1, 28, 28)
    assert frames.shape == (57, 20, 1, 28, 28) and (frames[0] == 0.5).all()
    for i, frame in enumerate(frames):  # half a row more in each
        assert ((frame.flatten(1) != 0.5).sum(1) == 14 * i).all()
        assert ((frame == 0.5) | (frame == frames[-1])).all()
    assert (completion[:, :, :, :14] == completion[0, :, :, :14]).all()
    assert (completion[1, :, :, 14:] == 0.5).all() and (completion[2] != completion[3]).any()
    if "field" in pictures:  # what the middle pixel sees, enlarged
        seen = pictures["field"][0, 0, ::8, ::8] > 0
        assert seen.flatten()[397:406].all() and not seen.flatten()[406:].any()
        assert seen[13, 6:18].all() and seen[13, 18] == (name == "gatedcnn")


def test_made_tells_each_output_of_the_pixel_before_it():
    """Also without the direct weights: no degree may be missing."""
    model = tiny("made", hidden=80, n_layer=2, size=9).double()
    for p in model.parameters():  # all positive, so that every ReLU lets pass
        p.data.abs_().add_(0.01)
    model.direct.weight.data.zero_()
    assert (jacobian(model).diagonal(-1) != 0).all()


# ------------------------------------------------------------------ 6. units
def test_vae_loss_is_the_bound_in_nats():
    model, x = perturb(tiny("vae"), 0.05), (torch.rand(5, 1, 28, 28) > 0.5).float()
    torch.manual_seed(1)
    _, metrics = model.loss(x)
    torch.manual_seed(1)
    torch.bernoulli(x)  # the binarisation comes first
    logits, mu, logvar = model(x)
    p, sigma = logits.sigmoid(), logvar.exp().sqrt()
    recon = -(x * p.log() + (1 - x) * (1 - p).log()).sum() / 5
    q, prior = torch.distributions.Normal(mu, sigma), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(q, prior).sum() / 5
    assert mu.shape == (5, 8) and abs(logvar).max() > 0.01
    torch.testing.assert_close(metrics["recon"], recon, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(metrics["kl"], kl, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["neg_elbo"], recon + kl, rtol=1e-4, atol=1e-3)


def test_vae_bound_tightens_and_one_draw_is_the_elbo():
    model, x = perturb(tiny("vae"), 0.02).eval(), (torch.rand(64, 1, 28, 28) > 0.5).float()
    single = torch.stack([model.bound(x, k=1)[0] for _ in range(30)])
    elbo = torch.stack([model.loss(x)[0].detach() for _ in range(30)])
    iwae, metrics = model.bound(x, k=64)
    noise = (single.var() + elbo.var()).div(30).sqrt()
    assert noise < 0.5 and abs(single.mean() - elbo.mean()) < 4 * noise
    assert iwae < elbo.mean() - 4 * noise and metrics["iwae"] == iwae


def test_vae_bound_is_exact_for_a_known_integral():
    """A decoder that ignores z: p(x) is a product of coins, whatever the encoder does."""
    model = perturb(tiny("vae", z_dim=1), 0.02).double()
    model.decode = lambda z, y=None: torch.full((len(z), 1, 28, 28), 0.3, dtype=torch.float64)
    x = (torch.rand(8, 1, 28, 28) > 0.5).double()
    nll = F.binary_cross_entropy_with_logits(torch.full_like(x, 0.3), x, reduction="sum") / 8
    assert abs(model.bound(x, k=2_000)[0] - nll) < 0.02


def test_diffusion_marginals_and_both_ends():
    model = tiny("diffusion")
    x0, eps = torch.full((20_000, 1, 1, 1), 0.6), torch.randn(20_000, 1, 1, 1)
    for t in (0.0, 0.25, 0.9, 1.0):
        x_t, v = model.diffuse(x0, torch.full((20_000,), t), eps)
        c, s = math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)
        assert abs(x_t.mean() - 0.6 * c) < 0.03 and abs(x_t.std() - s) < 0.03
        torch.testing.assert_close(c * x_t - s * v, x0, atol=1e-5, rtol=0)
        torch.testing.assert_close(s * x_t + c * v, eps, atol=1e-5, rtol=0)
    times = []
    model.forward = lambda x_t, t, y: times.append(t) or x_t
    for _ in range(20):
        model.loss(torch.rand(128, 1, 28, 28))
    times = torch.stack(times)
    assert times.min() < 0.05 and 0.999 < times.max() <= 1
    assert abs(times.square().mean() - 0.5) < 0.005  # density 2 t


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 0.0), (-0.4, 0.5), (0.3, 2.0)])
def test_diffusion_sampler_recovers_a_gaussian(mean, std):
    """For data N(mean, std^2) the best v is known, and the ODE takes noise z to mean + std z."""
    model = tiny("diffusion").double()

    def best_v(x, t, y=None):
        c, s = (t[0] * math.pi / 2).cos(), (t[0] * math.pi / 2).sin()
        surprise = (x - c * mean) / (c**2 * std**2 + s**2).clamp(min=1e-12)
        return c * s * surprise - s * (mean + c * std**2 * surprise)

    model.forward = best_v
    z = torch.linspace(-3, 3, 61, dtype=torch.float64).view(-1, 1, 1, 1)
    errors = []
    for steps in (25, 100):
        for x, _ in model.ode(z, 1, 0, steps):
            pass
        errors.append((x - (mean + std * z)).abs().max().item())
    assert errors[0] < 0.03 and errors[1] < max(errors[0] / 8, 1e-6)
    if std == 1 and mean == 0:
        assert errors[0] < 1e-6
    if std:  # and backwards: from data to its noise
        for back, _ in model.ode(mean + std * z, 0, 1, 100):
            pass
        assert (back - z).abs().max() < 0.02


def test_diffusion_guidance():
    model, x, y = perturb(tiny("diffusion")), torch.randn(3, 1, 28, 28), torch.tensor([1, 2, 3])
    one = lambda **kw: next(model.ode(x, 1, 0, 10, **kw))[0]
    plain, label = one(), one(y=y, guidance=1)
    torch.testing.assert_close(one(y=y, guidance=0), plain)
    torch.testing.assert_close(one(y=y, guidance=3), plain + 3 * (label - plain))
    assert (label - plain).abs().max() > 1e-3


def test_frames_do_not_alias():
    process = tiny("diffusion").pictures(IMAGES[2][:4] / 255)["process"]
    assert (process[0] != process[-1]).any() and process.shape == (25, 4, 1, 28, 56)


def test_vqvae_each_term_moves_its_own_part():
    """The rest of the model has no gradient from it, or one of 0 up to rounding."""
    model, x = perturb(tiny("vqvae")).double().eval(), (torch.rand(5, 1, 28, 28) > 0.5).double()
    model.codebook.data.normal_()
    names, weights = zip(*model.named_parameters())

    def moved(term):
        grads = torch.autograd.grad(term, weights, allow_unused=True, retain_graph=True)
        moving = [g is not None and g.abs().max() > 1e-9 for g in grads]
        return {n.split(".")[0] for n, moves in zip(names, moving) if moves}

    losses = []
    for model.charge in (0, 1):
        torch.manual_seed(1)
        losses.append(model.loss(x))
    (without, terms), (loss, _) = losses
    encoder, transformer = {"encoder", "offset"}, {"label", "token", "place", "blocks", "head"}
    assert moved(terms["recon"]) == encoder | {"decoder"}
    assert moved(terms["commit"]) == encoder and moved(terms["prior"]) == transformer
    codebook = without - terms["recon"] - terms["prior"] - model.beta * terms["commit"]
    assert abs(codebook - terms["commit"]) < 1e-9 and model.beta == 0.25  # of the same value
    assert moved(codebook) == {"codebook"}
    grads = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in (loss, without)]
    rate = {n.split(".")[0] for n, a, b in zip(names, *grads) if (a - b).abs().max() > 1e-9}
    assert rate == encoder

    # straight-through: the encoder gets the gradient that recon has at z_q, unchanged
    z_e, codes, _, _ = model(x)
    z_q = model.codebook[codes].detach().requires_grad_()
    nll = F.binary_cross_entropy_with_logits(model.decode(z_q), x, reduction="sum") / 5
    torch.testing.assert_close(nll, terms["recon"])
    slope = torch.autograd.grad(nll, z_q)
    expected = torch.autograd.grad(z_e, model.offset, slope)
    torch.testing.assert_close(torch.autograd.grad(terms["recon"], model.offset), expected)


def test_vqvae_prior_sums_to_one_and_bounds_the_likelihood():
    model = perturb(tiny("vqvae", n_codes=3, size=8)).double().eval()
    model.codebook.data.normal_()
    codes = torch.arange(81)[:, None] // 3 ** torch.arange(4) % 3  # all maps of 2 x 2 codes
    for y in (None, torch.full((81,), 7)):
        logp = model.prior(codes, y).log_softmax(2).gather(2, codes[..., None]).sum((1, 2))
        assert abs(logp.exp().sum() - 1) < 1e-6 and logp.std() > 0.1
    x = (torch.rand(1, 1, 8, 8) > 0.5).double()
    logits = model.decode(model.codebook[codes])
    log_px = torch.where(x == 1, logits, -logits).sigmoid().log().sum((1, 2, 3))
    logp = model.prior(codes).log_softmax(2).gather(2, codes[..., None]).sum((1, 2))
    exact, terms = -(logp + log_px).logsumexp(0), model.loss(x)[1]
    mine = (codes == model(x)[1]).all(1)  # among all maps, that of the encoder
    assert abs(terms["prior"] + logp[mine][0]) < 1e-4 > abs(terms["recon"] + log_px[mine][0])
    assert terms["neg_elbo"] == terms["recon"] + terms["prior"] > exact


def test_vqvae_prior_is_causal_and_samples_fast():
    model = perturb(tiny("vqvae", size=16)).double().eval()
    model.codebook.data.normal_()
    codes = torch.randint(8, (1, 16))
    for j in range(16):
        other = codes.clone()
        other[:, j] += 1 - 2 * (other[:, j] > 3)
        changed = (model.prior(codes) != model.prior(other)).any(2)[0]
        assert changed.tolist() == [i > j for i in range(16)]
    y, top = torch.tensor([3, 1, 4]), torch.randint(8, (3, 6))
    for args in (dict(), dict(y=y), dict(y=y, guidance=2.5), dict(y=y, top=top)):
        torch.manual_seed(1)
        fast = model.sample(3, **args)
        torch.manual_seed(1)
        codes, label = F.pad(args.get("top", top[:, :0]), (0, 16)), args.get("y")
        for i in range(args.get("top", top[:, :0]).shape[1], 16):
            logits, free = model.prior(codes[:, :16], label)[:, i], model.prior(codes[:, :16])[:, i]
            logits = free + args.get("guidance", 1.0) * (logits - free)
            codes[:, i] = logits.softmax(1).multinomial(1)[:, 0]
        torch.testing.assert_close(fast, model.decode(model.codebook[codes[:, :16]]).sigmoid())


def test_vqvae_collapsed_codebook_recovers():
    model, x = tiny("vqvae"), IMAGES[0][:64] / 255
    model.codebook.data[:] = 100 * torch.randn(4)  # all z_e have the same nearest code
    model.usage.copy_(8 * F.one_hot(torch.tensor(0), 8))
    assert model.eval().loss(x)[1]["perplexity"] == 1
    assert model.train().loss(x)[1]["perplexity"] > 5
    before = model.codebook.detach().clone()
    model.eval().loss(x)
    assert torch.equal(model.codebook, before)  # only training moves codes


def test_gan_losses_and_whom_they_move():
    model, x = perturb(tiny("gan", gamma=3.0), 0.05).eval(), torch.rand(6, 1, 28, 28)
    discriminator, generator = model.discriminator, model.generator
    y = torch.full((6,), 10)
    torch.manual_seed(1)
    d_loss, d_metrics = model.d_loss(x)
    d_loss.backward()
    assert all(p.grad.any() for p in discriminator.parameters())
    assert all(p.grad is None for p in generator.parameters())
    torch.manual_seed(1)
    model.labels(x, None)
    real, fake = discriminator(2 * x - 1, y), discriminator(model(y), y)
    coin = F.binary_cross_entropy_with_logits
    r1 = 0
    for one in 2 * x - 1:
        slope = torch.autograd.functional.jacobian(lambda x: discriminator(x[None], y[:1]), one)
        r1 += slope.square().sum() / 6
    expected = coin(real, torch.ones(6)) + coin(fake, torch.zeros(6)) + 3 / 2 * r1
    torch.testing.assert_close(d_loss, expected)
    torch.testing.assert_close(d_metrics["d_fake"], fake.sigmoid().mean().detach())
    torch.manual_seed(1)
    g_loss, _ = model.g_loss(x)
    torch.testing.assert_close(g_loss, coin(fake, torch.ones(6)))
    assert r1 > 1e-4 and model.loss(x)[1].keys() == {"d_loss", "g_loss", "d_real", "d_fake"}


def test_gan_turns_move_one_player_each(small, monkeypatch):
    """What changes between two optimizer steps: the discriminator first, then the generator."""
    seen, step = [], torch.optim.AdamW.step

    def watch(self, *args):
        before = [p.detach().clone() for p in model.parameters()]
        step(self, *args)
        after = zip(model.named_parameters(), before)
        seen.append({name.split(".")[0] for (name, p), b in after if (p != b).any()})

    cls = model_class("gan")
    init = cls.__init__

    def build(self, **sizes):
        nonlocal model
        init(self, **sizes)
        model = self

    model = None
    build.__kwdefaults__ = init.__kwdefaults__
    monkeypatch.setattr(cls, "__init__", build)
    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    small("gan", "--epochs", 1, "--batch-size", 200)
    assert seen == [{"discriminator"}, {"generator"}] * 3


def test_gan_reaches_every_digit():
    judge = runpy.run_path(str(ROOT / "bench/classifier.py"))["load_classifier"]()
    torch.manual_seed(0)
    model = model_class("gan")(channels=16)
    players = [
        (model.d_loss, torch.optim.AdamW(model.discriminator.parameters(), betas=(0.0, 0.99))),
        (model.g_loss, torch.optim.AdamW(model.generator.parameters(), betas=(0.0, 0.99))),
    ]
    for step in range(200):
        x = IMAGES[0][torch.randint(60_000, (64,))] / 255
        for loss_fn, optimizer in players:
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 10, 2 - step / 100)
            loss, _ = loss_fn(x)
            optimizer.zero_grad()
            loss.backward(inputs=optimizer.param_groups[0]["params"])
            optimizer.step()
    digits = judge(model.eval().sample(1000)).argmax(1).bincount(minlength=10)
    assert digits.min() >= 10, digits


# ------------------------------------------------------------------ 7. learning
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "gan"])
def test_learns(name):
    sizes, metric, figure = SCRIPTS[name]
    model, stride, batch, steps = tiny(name), 1, 64, 300
    if name in AUTOREGRESSIVE:
        model, stride, batch, steps = tiny(name, size=14), 2, 32, 200
    train_x, test_x = (IMAGES[n][..., ::stride, ::stride] for n in (0, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        loss, _ = model.loss(train_x[torch.randint(4096, (batch,))] / 255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test = importlib.import_module(name).evaluate(
        model.eval().requires_grad_(False).loss, test_x[:1000]
    )
    print(name, test)
    assert test[metric] < figure


def test_evaluate_counts_every_image_once(name="vae"):
    module, batches = importlib.import_module(name), []

    def measure(x):
        batches.append(x)
        return None, {"mean": x.mean(), "noise": torch.rand(())}

    first, second = (
        module.evaluate(measure, IMAGES[2][:1100]),
        module.evaluate(measure, IMAGES[2][:1100]),
    )
    assert [len(b) for b in batches[:3]] == [500, 500, 100] and first == second
    assert abs(first["mean"] - (IMAGES[2][:1100] / 255).mean()) < 1e-6


# ------------------------------------------------------------------ 8. resume
@pytest.mark.parametrize("name", SCRIPTS)
def test_no_gradient_depends_on_the_order_of_threads(name):
    """That of a large x[i] with repeated i does on a CPU, and resuming would not be exact."""
    todo, seen = [tiny(name).loss(IMAGES[0][:4] / 255, IMAGES[1][:4])[0].grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert len(names) > 5 and not any("Index" in name for name in names), names


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", SCRIPTS)
def test_resume_is_bit_identical(name, small, monkeypatch, capsys):
    args = ("--epochs", 3, "--batch-size", 64, "--class-cond")
    small(name, *args, "--out-dir", "straight")
    write = common.save_images

    def interrupt(images, path):
        if path.name == "samples_0003":
            raise KeyboardInterrupt
        return write(images, path)

    monkeypatch.setattr(common, "save_images", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small(name, *args, "--out-dir", "broken")
    monkeypatch.setattr(common, "save_images", write)
    kept = torch.load("broken/model.pt", weights_only=True)
    assert len(kept["log"]) == 2
    small(name, *args, "--out-dir", "broken", "--resume")
    a, b = (
        torch.load(f"{folder}/model.pt", weights_only=True) for folder in ("straight", "broken")
    )
    for row in a["log"] + b["log"]:
        del row["seconds"]
    assert equal(a, b) and not equal(a["weights"], kept["weights"])
    assert not equal(a["weights"], a["model"])  # the EMA is something else
    assert Path("straight/samples.png").read_bytes() == Path("broken/samples.png").read_bytes()

    capsys.readouterr()
    small(name, "--epochs", 4, *args[2:], "--out-dir", "broken", "--resume")  # a longer schedule
    assert "epochs 4 to 4" in capsys.readouterr().out
    assert len(Path("broken/log.csv").read_text().strip().split("\n")) == 5


@pytest.mark.parametrize("name", SCRIPTS)
def test_bfloat16_run_is_close_to_float32(name, small, monkeypatch):
    rows = []
    for fast in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        small(name, "--epochs", 2, "--class-cond")
        rows.append(torch.load(f"out/{name}/model.pt", weights_only=True)["log"][-1])
    metric = SCRIPTS[name][1]
    assert 0 < abs(rows[0][metric] - rows[1][metric]) < 0.02 * rows[0][metric]


def test_ends_where_the_loss_is_not_finite(small, name="vae"):
    small(name, "--epochs", 1)
    before = Path(f"out/{name}/model.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        small(name, "--epochs", 2, "--resume", "--lr", 1e30)
    assert "smaller --lr" in stop.value.code and "\n" not in stop.value.code
    assert Path(f"out/{name}/model.pt").read_bytes() == before


def test_sigkill_leaves_a_model_that_loads(tmp_path):
    code = f"""if 1:
        import sys; sys.path.insert(0, {str(ROOT)!r})
        import torch, common, vae
        data = [torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8), torch.zeros(64).long()]
        common.load_mnist = lambda *_: data * 2
        common.save_images = lambda images, path: None
        vae.main(["--epochs", "100000", "--batch-size", "64"])
    """
    random.seed(0)
    path = tmp_path / "out/vae/model.pt"
    path.parent.mkdir(parents=True)
    for _ in range(3):
        path.unlink(missing_ok=True)
        run = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.DEVNULL
        )
        while not path.exists():
            assert run.poll() is None
            time.sleep(0.01)
        time.sleep(random.random())
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert torch.load(path, weights_only=True)["log"]


# ------------------------------------------------------------------ 9. shape of the project
def train_section(name):
    source = (ROOT / f"{name}.py").read_text()
    return source[
        source.index("# ---------------------------------------------------------------- train") :
    ].split("\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_train_section_is_the_same_text(name):
    first, this = train_section(next(iter(SCRIPTS))), train_section(name)
    changed = [line[2:] for line in difflib.ndiff(first, this) if line[:2] in ("- ", "+ ")]
    assert len(this[:-1]) <= 100 + 2 * (name == "gan")  # the last is what follows the last newline
    if name == "gan":  # two optimizers, and their turns in the update step
        update = r"optimizer|loss_fn|loss\.|clip_grad|ema\.update|\.compile\(|for p in|^def main"
        assert all(re.search(update, line) for line in changed) and len(changed) <= 30
    else:
        assert all(line.startswith("def main(argv=None, Model=") for line in changed)
        assert len(changed) <= 2


def test_blocks_of_the_same_name_are_the_same_text():
    seen = {}
    for name in SCRIPTS:
        source = (ROOT / f"{name}.py").read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name != "main":
                text = ast.get_source_segment(source, node)
                text = "\n".join(line for line in text.split("\n") if "# differs from" not in line)
                assert seen.setdefault(node.name, text) == text, f"{node.name} in {name}.py"


@pytest.mark.parametrize("name", SCRIPTS)
def test_shape_of_a_script(name):
    source = (ROOT / f"{name}.py").read_text()
    tree = ast.parse(source)
    for node in tree.body:  # importing runs nothing
        guard = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert (
            guard
            or text
            or isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom))
        )
    header = ast.get_docstring(tree)
    assert 20 <= len(header.split("\n")) <= 40
    for word in (
        f"python {name}.py --epochs",
        "arXiv:",
        "\nIdea ",
        "\nMaths ",
        "\nShapes ",
        "\nUnits ",
        "\nHealthy ",
    ):
        assert word in header
    assert (
        "cpu" in header.lower() or "gpu" in header.lower()
    )  # the measured result and its hardware
    assert max(map(len, source.split("\n"))) <= 100


def test_imports_and_layout():
    allowed = {"torch", "torchvision", "numpy", "PIL", "pytest", "common"}
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            tops = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names)
            assert tops <= allowed and (
                path.stem in ("common", "test_smoke") or tops <= {"torch", "common"}
            )
    models = (
        "rnn made wavenet pixelcnn gatedcnn transformer vae vqvae gan diffusion common test_smoke"
    )
    layout = {f"{m}.py" for m in models.split()} | {
        "requirements.txt",
        "README.md",
        "LICENSE",
        "data",
        "assets",
        "bench",
    }
    made = {"out", "__pycache__", "venv"}
    assert {p.name for p in ROOT.iterdir() if p.name[0] != "."} <= layout | made


# ------------------------------------------------------------------ 10. bad input
WRONG_USE = {
    "--epochs -3": "above 0",
    "--epochs 0": "above 0",
    "--batch-size 0": "above 0",
    "--lr -1": "above 0",
    "--sample 0": "above 0",
    "--epochs x": "invalid int value",
    "--device warp": "invalid choice",
    "--dataset CIFAR": "invalid choice",
    "--bogus": "unrecognized",
    "--batch-size 99999999": "--batch-size",
}


def test_wrong_use_gets_one_line_and_status_2(monkeypatch, capsys, tmp_path, name="vae"):
    monkeypatch.chdir(tmp_path)
    for args, message in WRONG_USE.items():
        status, _, err = cli(monkeypatch, capsys, name, *args.split(), "--data-dir", ROOT / "data")
        assert status == 2 and message in err and err.count("\n") == 1, err
    assert os.listdir(tmp_path) == []


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_bad_checkpoint_gets_one_line_and_stays(small, monkeypatch, capsys, name="vae"):
    small(name, "--epochs", 1)
    good = Path(f"out/{name}/model.pt").read_bytes()
    foreign, evil = io.BytesIO(), io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(3)}, "config": {}}, foreign)
    torch.save({"model": Malicious()}, evil)
    bad = {"missing": None, "empty": b"", "short": good[: len(good) // 2], "text": b"hello",
           "foreign": foreign.getvalue(), "evil": evil.getvalue(), "other sizes": good}  # fmt: skip
    for title, data in bad.items():
        Path("out/bad").mkdir(exist_ok=True)
        path = Path("out/bad/model.pt")
        path.unlink(missing_ok=True) if data is None else path.write_bytes(data)
        for flag in ("--resume", "--sample=3"):
            status, _, err = cli(monkeypatch, capsys, name, flag, "--out-dir", "out/bad")
            assert (
                status == 1 and err.count("\n") == 1 and err.startswith("cannot load out/bad/")
            ), (title, err)
        assert data is None or path.read_bytes() == data
    assert not Path("owned").exists() and os.listdir("out/bad") == ["model.pt"]


def test_another_scripts_checkpoint_is_refused(small, monkeypatch, capsys):
    for name in SCRIPTS:
        small(name, "--epochs", 1)
    names = list(SCRIPTS)
    for name, other in zip(names, names[1:] + names[:1]):
        with pytest.raises(SystemExit) as stop:
            small(name, "--out-dir", f"out/{other}", "--resume")
        assert "cannot load" in stop.value.code


def test_disk_that_cannot_be_written(monkeypatch, capsys, tmp_path, name="vae"):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setattr(common, "load_mnist", lambda *_: [d[:300] for d in IMAGES])
    status, _, err = cli(
        monkeypatch, capsys, name, "--out-dir", "file/out", "--batch-size", 300, "--epochs", 1
    )
    assert status == 1 and err.count("\n") == 1 and "Not a directory" in err
    cli(monkeypatch, capsys, name, "--batch-size", 300, "--epochs", 1)
    good = Path(f"out/{name}/model.pt").read_bytes()
    os.symlink(
        "/dev/full", f"out/{name}/model.pt.part"
    )  # every write to it fails with "no space left"
    status, _, err = cli(monkeypatch, capsys, name, "--batch-size", 300, "--epochs", 1)
    assert status == 1 and err.count("\n") == 1 and "No space left" in err
    assert Path(f"out/{name}/model.pt").read_bytes() == good


def test_tensorboard_is_optional(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_mnist", lambda *_: [d[:300] for d in IMAGES])
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    status, _, err = cli(
        monkeypatch, capsys, "vae", "--tensorboard", "--batch-size", 300, "--epochs", 1
    )
    assert status == 1 and err.count("\n") == 1 and "tensorboard" in err


# ------------------------------------------------------------------ common.py
def test_load_mnist():
    train_x, train_y, test_x, test_y = IMAGES
    assert train_x.shape == (60000, 1, 28, 28) and test_x.shape == (10000, 1, 28, 28)
    assert (
        train_x.dtype == test_x.dtype == torch.uint8
        and train_y.dtype == test_y.dtype == torch.int64
    )
    assert train_x.sum() == 1_567_298_545 and train_y[:5].tolist() == [5, 0, 4, 1, 9]
    assert test_y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """A folder with the data and a mirror to download it from; mirror.down: no network."""
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(ROOT / "data/MNIST/raw", raw)

    def download_url(url, folder, name, md5):
        if mirror.down:
            raise OSError("<urlopen error no network>\nsecond line")
        data = (ROOT / "data/MNIST/raw" / name).read_bytes()
        with open(Path(folder) / name, "wb") as file:  # slowly, in two halves
            file.write(data[:1000])
            file.flush()
            time.sleep(0.1)
            file.write(data[1000:])

    mirror = type("Mirror", (), {"down": False, "raw": raw, "root": tmp_path})
    monkeypatch.setattr(common, "download_url", download_url)
    return mirror


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "empty"])
def test_damaged_data_is_fetched_again_or_gets_one_line(mirror, damage):
    path = mirror.raw / "t10k-images-idx3-ubyte.gz"
    data = path.read_bytes()
    bad = {"truncated": data[:5000], "altered": data[:9000] + b"x" + data[9001:], "empty": b""}.get(
        damage
    )
    path.unlink() if bad is None else path.write_bytes(bad)
    mirror.down = True
    with pytest.raises(OSError) as error:
        common.load_mnist(mirror.root)
    message = str(error.value)
    assert "\n" not in message and "no network" in message and str(mirror.raw) in message
    assert all(
        name in message for name in os.listdir(ROOT / "data/MNIST/raw") if name.endswith(".gz")
    )
    assert bad is None or path.read_bytes() == bad
    mirror.down = False
    assert torch.equal(common.load_mnist(mirror.root)[2], IMAGES[2]) and path.read_bytes() == data


def test_missing_data_without_network_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        common, "download_url", lambda *_: (_ for _ in ()).throw(OSError("no network"))
    )
    status, _, err = cli(
        monkeypatch, capsys, "vae", "--data-dir", tmp_path / "none", "--out-dir", tmp_path / "out"
    )
    assert status == 1 and err.count("\n") == 1 and "train-images-idx3-ubyte.gz" in err


def test_unpacked_copies_are_never_trusted(mirror):
    (mirror.raw / "train-images-idx3-ubyte").write_bytes(b"short")
    assert torch.equal(common.load_mnist(mirror.root)[0][-1], IMAGES[0][-1])


def test_four_loads_at_once(mirror):
    for name in os.listdir(mirror.raw):
        (mirror.raw / name).unlink()
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(common.load_mnist(mirror.root)))
        for _ in range(4)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(results) == 4 and all(torch.equal(r[2], IMAGES[2]) for r in results)
    assert len(os.listdir(mirror.raw)) == 4  # and no leftovers


def test_save_images(tmp_path):
    path = common.save_images(IMAGES[2][:25] / 255, tmp_path / "new" / "grid")
    picture = Image.open(path)
    assert path.name == "grid.png" and picture.size == (302, 92) and picture.mode == "L"
    assert (
        torch.tensor(list(picture.crop((2, 2, 30, 30)).tobytes())).view(28, 28) == IMAGES[2][0, 0]
    ).all()

    frames = torch.rand(60, 30, 1, 28, 28)
    frames[-1] = 1
    path = common.save_images(frames, tmp_path / "film")
    film = Image.open(path)
    assert path.name == "film.gif" and path.stat().st_size < 1_000_000 and film.info["loop"] == 0
    film.seek(film.n_frames - 1)
    assert (
        film.info["duration"] == 2000 and film.convert("L").getpixel((10, 10)) == 255
    )  # rests on the last
    film.seek(0)
    assert film.info["duration"] == 80 and film.n_frames >= 10


def test_save_images_refuses_and_keeps(tmp_path, monkeypatch):
    path = common.save_images(torch.zeros(1, 1, 8, 8), tmp_path / "grid")
    before = path.read_bytes()
    nan = torch.zeros(1, 1, 8, 8)
    nan[0, 0, 0, 0] = math.nan
    for bad in (
        nan,
        nan.nan_to_num() - 0.1,
        nan.nan_to_num() + 1.1,
        torch.zeros(4, 28, 28),
        torch.zeros(1, 3, 8, 8),
    ):
        with pytest.raises(ValueError):
            common.save_images(bad, tmp_path / "grid")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError):
        common.save_images(torch.ones(1, 1, 8, 8), tmp_path / "grid")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["grid.png"]


# ------------------------------------------------------------------ bench/
def bench(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module(name)


def test_bench_distances_know_the_answer(monkeypatch):
    compare = bench("compare", monkeypatch)
    a, b = torch.randn(300, 4).double() @ torch.randn(4, 4).double(), torch.randn(200, 4).double()
    # of Gaussians whose covariances commute: |mean difference|^2 + tr (root a - root b)^2
    expected = (a.mean(0) + 3).square().sum() + a.T.cov().trace()
    assert abs(compare.frechet(a, 2 * a + 3) / expected - 1) < 1e-9
    assert abs(compare.frechet(a, a)) < 1e-9
    kernel = lambda x, y: ((x @ y).item() / 4 + 1) ** 3
    inside = [[kernel(p, q) for i, p in enumerate(s) for j, q in enumerate(s) if i != j]
              for s in (a[:20], b[:10])]  # fmt: skip
    between = [kernel(p, q) for p in a[:20] for q in b[:10]]
    mean = lambda values: sum(values) / len(values)
    expected = mean(inside[0]) + mean(inside[1]) - 2 * mean(between)
    assert abs(compare.kid(a[:20], b[:10]) / expected - 1) < 1e-9
    a, b = a[:20], b[:20]
    near = [any((p - q).norm() < sorted((q - o).norm() for o in b)[3] for q in b) for p in a]
    assert 0.1 < mean(near) < 1 and compare.among(a, b) == mean(near)


def test_bench_compare_fills_the_readme_and_goes_on(monkeypatch, tmp_path, capsys):
    compare = bench("compare", monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "SCRIPTS", ["vqvae", "gan"])
    cut = [d[:n] for d, n in zip(IMAGES, (300, 300, 200, 200))]
    monkeypatch.setattr(compare, "load_mnist", lambda *_, **__: cut)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{compare.START}old\n{compare.END}after\n")
    with pytest.raises(SystemExit, match="no out/vqvae/model.pt"):
        compare.main(["--readme", str(readme)])
    for folder, n_classes in (("vqvae", 0), ("gan", 0), ("gan-labels", 10)):
        name = folder.split("-")[0]
        model = tiny(name, n_classes=n_classes)
        config = type(model).__init__.__kwdefaults__ | SCRIPTS[name][0]
        log = [{"seconds": 2.0}, {"seconds": 3.0}, {"seconds": 9.0}]
        Path("out", folder).mkdir(parents=True)
        state = {"model": model.state_dict(), "config": config | {"n_classes": n_classes}}
        torch.save(state | {"log": log}, f"out/{folder}/model.pt")
        for name in ("samples", "samples_0001", "samples_0002", "samples_0003"):
            common.save_images(model.eval().sample(10), f"out/{folder}/{name}")
    compare.main(["--readme", str(readme), "--samples", "100"])
    text = readme.read_text()
    assert text.startswith("before\n" + compare.START) and text.endswith(compare.END + "after\n")
    rows = [line.split(" | ") for line in text.split("\n") if line.startswith("| ")]
    assert [len(row) for row in rows] == [14] * 5  # the names, two sorts of data, two models
    assert rows[1][8] == rows[2][8] == "1.0" and float(rows[4][8]) > 10  # ratios
    assert rows[4][13].endswith("% |") and "%" not in rows[3][13] and rows[3][2:4] == ["3", "3"]
    with Image.open("assets/samples.png") as samples, Image.open("assets/progress.gif") as progress:
        assert samples.size == (374, 92) and progress.n_frames > 1 and progress.format == "GIF"
    assert Path("assets/codes.gif").stat().st_size < 1_000_000
    monkeypatch.setattr(compare, "measure", None)  # all is kept
    compare.main(["--readme", str(readme), "--samples", "100"])
    assert readme.read_text() == text


def test_bench_train_all_plans_and_goes_on(monkeypatch, tmp_path):
    train_all, ran = bench("train_all", monkeypatch), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_all, "trainer", lambda script: (None, None, None, 500))
    monkeypatch.setattr(train_all, "seconds", lambda step, n, warm_up=3: 0.1)

    def run(command):
        ran.append([Path(command[1]).name, *command[2:]])
        return subprocess.CompletedProcess(command, 1 if len(ran) == 2 else 0)

    monkeypatch.setattr(train_all.subprocess, "run", run)
    flags = ["--minutes", "5", "--scripts", "vae", "gan"]
    with pytest.raises(SystemExit, match="gan.py stopped"):
        train_all.main(flags)
    planned = [[f"{n}.py", "--epochs", "2", "--out-dir", f"out/{n}"] for n in ("vae", "gan")]
    assert ran == planned  # two of 52.1 s fit into 135 s
    for name, n in (("vae", 2), ("gan", 1)):
        Path("out", name).mkdir()
        torch.save({"log": [{}] * n}, f"out/{name}/model.pt")
    train_all.main(flags)
    assert ran[2:] == [[*planned[1], "--resume"]]
    train_all.main([*flags[:4], "--labels"])
    assert ran[3:] == [["vae.py", "--epochs", "5", "--out-dir", "out/vae-labels", "--class-cond"]]


def test_bench_profile_counts_operations(monkeypatch):
    a = torch.ones(2, 3, requires_grad=True)
    with bench("train_all", monkeypatch).Counter() as counter:
        (a @ torch.ones(3, 4)).sum().backward()
    assert counter.total == 2 * 48  # 2 * 2 * 3 * 4 forward, as many backward: one input needs it
