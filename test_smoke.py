"""What a newcomer runs first: every script, end to end.

python -m pytest -q test_smoke.py      # a minute; python -m pytest -q also runs tests/
"""

import csv
import importlib
import os
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from helpers import AUTOREGRESSIVE, ROOT, SCRIPTS, SMALL
from PIL import Image

import common

SMALLER = {"diffusion": ["--channels", "8", "--n-inner", "1"], "gatedcnn": ["--channels", "8"]}


def run(monkeypatch, capsys, name, *flags):
    """Run a script as a command in this process -> what it printed. It has to end well."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_trains_and_samples(name, monkeypatch, capsys, tmp_path):
    """From another folder than the script's; pixel by pixel only on images of 8 x 8."""
    size = 28
    if name in AUTOREGRESSIVE:
        size = 8
        monkeypatch.setattr(common, "load_mnist", lambda *_: SMALL)
    monkeypatch.chdir(tmp_path)
    flags = ["--dry-run", "--class-cond", "--batch-size", "4", "--device", "cpu"]
    out = run(monkeypatch, capsys, name, *flags, *SMALLER.get(name, []))
    line = r"epoch   1/1 \| train loss [\d.]+ \| test (\w+ [\d.e-]+ )+\| [\d.]+ s \| [\d,]+ img/s"
    assert re.search(line, out)

    folder = tmp_path / "out" / f"{name}-dry"
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1
    assert float(rows[0]["train_loss"]) > 0
    files = {"model.pt", "log.csv", "samples.png", "samples_0001.png"}
    pictures = set(os.listdir(folder)) - files
    assert files <= set(os.listdir(folder))
    assert pictures
    for picture in pictures:
        with Image.open(folder / picture) as image:
            assert image.format in ("PNG", "GIF")

    run(monkeypatch, capsys, name, "--dry-run", "--sample", "3", "--device", "cpu")
    assert np.load(folder / "samples.npy").shape == (3, size, size)

    # the README's three lines
    saved = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
    model = importlib.import_module(name).Model(**saved["config"]).eval()
    model.load_state_dict(saved["model"])
    assert model.sample(2, torch.tensor([3, 7])).shape == (2, 1, size, size)


def test_help_explains_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, "vae", "-h")
    assert stop.value.code == 0
    flags = (
        "epochs batch-size lr seed device dataset data-dir out-dir class-cond compile dry-run "
        "tensorboard resume sample channels hidden z-dim"
    )
    text = capsys.readouterr().out
    assert re.findall(r"^  --([\w-]+)", text, re.M) == flags.split()
    assert re.search(r"--z-dim Z_DIM +see above \(default: 32\)", text)
