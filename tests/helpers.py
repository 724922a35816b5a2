"""What several test files share: tiny models, small images, running a script as a command."""

import importlib
import runpy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import common

ROOT = Path(__file__).parents[1]
SIZES = {
    "rnn": dict(n_embd=16, n_layer=1),
    "made": dict(hidden=800, n_layer=1),
    "wavenet": dict(channels=16),
    "pixelcnn": dict(channels=16, n_layer=3),
    "gatedcnn": dict(channels=8, n_layer=3),
    "transformer": dict(n_embd=16, n_head=2, n_layer=1),
    "vae": dict(channels=8, hidden=64, z_dim=8),
    "vqvae": dict(channels=16, code_dim=4, n_codes=8, n_embd=16, n_layer=1),
    "gan": dict(channels=4, z_dim=16),
    "diffusion": dict(channels=4, n_inner=1, n_embd=32),
}
SCRIPTS = list(SIZES)
AUTOREGRESSIVE = SCRIPTS[:6]
METRIC = dict.fromkeys(AUTOREGRESSIVE, "nll") | {
    "vae": "neg_elbo",
    "vqvae": "neg_elbo",
    "gan": "d_loss",
    "diffusion": "loss",
}
IMAGES = common.load_mnist()
# the middle of each digit at half the resolution: 8 x 8 pixels
SMALL = [data[..., 6:22:2, 6:22:2] if data.ndim == 4 else data for data in IMAGES]


def model_class(name):
    return importlib.import_module(name).Model


def main_of(name):
    return importlib.import_module(name).main


def size_flags(name):
    """The sizes of the tiny model as flags: ["--n-embd", "16", ...]"""
    flags = []
    for key, value in SIZES[name].items():
        flags += ["--" + key.replace("_", "-"), str(value)]
    return flags


def tiny(name, **changes):
    """The tiny model with the weights of seed 0, without labels."""
    torch.manual_seed(0)
    return model_class(name)(**{**SIZES[name], **changes})


def perturb(model, scale=0.2):
    """Random weights everywhere, also where a layer starts at zero."""
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn_like(p)
    return model


def binary(*shape):
    """Random images of 0 and 1."""
    return (torch.rand(*shape) > 0.5).to(torch.get_default_dtype())


def trained(name, **changes):
    """A tiny model after a few steps on digits, cut to its size."""
    model = perturb(tiny(name, **changes), 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    k = (28 - model.size) // 2
    for _ in range(10):
        idx = torch.randint(60_000, (32,))
        x = IMAGES[0][idx, :, k : k + model.size, k : k + model.size].to(torch.get_default_dtype())
        y = IMAGES[1][idx] if model.n_classes > 0 else None
        optimizer.zero_grad()
        model.loss(x, y)[0].backward()
        optimizer.step()
    return model.eval()


def nll_of(logits, x):
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def cli(monkeypatch, capsys, name, *args):
    """Run a script as a command in this process -> (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
    status = 0
    message = ""
    try:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
        if isinstance(stop.code, str):  # the interpreter prints it and exits with 1
            status = 1
            message = f"{stop.code}\n"
    captured = capsys.readouterr()
    return status, captured.out, captured.err + message
