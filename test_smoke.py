"""What a newcomer runs first: every script and every command of the README, end to end.

python -m pytest -q test_smoke.py      # a minute; python -m pytest -q also runs tests/
"""

import csv
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common

ROOT = Path(__file__).parent
SCRIPTS = "made pixelcnn gatedcnn rnn wavenet transformer vae vqvae gan diffusion".split()


def run(monkeypatch, capsys, name, *flags):
    """Run a script as a command in this process -> what it printed. It has to end well."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_trains_and_samples(name, monkeypatch, capsys, tmp_path):
    """Two batches of everything, from another folder than the script's.

    For the autoregressive ones the images have half the resolution, as they draw pixel by pixel.
    """
    size = 28
    if name in ("made", "pixelcnn", "gatedcnn", "rnn", "wavenet", "transformer"):
        size = 14
        data = [part[..., ::2, ::2] if part.ndim == 4 else part for part in common.load_mnist()]
        monkeypatch.setattr(common, "load_mnist", lambda *_: data)
    monkeypatch.chdir(tmp_path)
    flags = ["--dry-run", "--class-cond", "--batch-size", "16", "--device", "cpu"]
    if name in ("pixelcnn", "gatedcnn", "wavenet", "diffusion"):
        flags += ["--channels", "8"]
    if name == "diffusion":
        flags += ["--n-inner", "1"]  # its pictures take 20,000 passes
    out = run(monkeypatch, capsys, name, *flags, "--epochs", "1")
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
    with Image.open(folder / "samples.png") as image:
        assert image.size == (3 * (size + 2) + 2, size + 4)

    # the README's three lines
    module = __import__(name)
    saved = torch.load(folder / "model.pt", weights_only=True)
    model = module.Model(**saved["config"]).eval()
    model.load_state_dict(saved["model"])
    assert model.sample(2, torch.tensor([3, 7])).shape == (2, 1, size, size)


def test_help_explains_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, "vae", "-h")
    assert stop.value.code == 0
    flags = (
        "epochs batch-size lr seed device dataset data-dir out-dir class-cond compile dry-run "
        "tensorboard resume sample channels hidden z-dim n-embd"
    )
    assert re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.M) == flags.split()


def test_readme_commands(monkeypatch, capsys, tmp_path):
    """Each in its order, as a dry run of a small model; the slow ones are in the test above."""
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^(?:pip install .* && )?python (\w+)\.py(.*?)(?:#.*)?$", readme, re.M)
    assert ("diffusion", " --epochs 10") in [(name, flags.rstrip()) for name, flags in commands]
    monkeypatch.chdir(tmp_path)
    data = common.load_mnist()
    monkeypatch.setattr(common, "load_mnist", lambda *_: data)  # FashionMNIST needs a network
    ran = 0
    for name, flags in commands:
        if name != "diffusion" and re.fullmatch(r" --epochs \d+\s*", flags):
            continue
        flags = [*shlex.split(flags), "--dry-run", "--batch-size", "4", "--channels", "8"]
        if name == "diffusion":
            flags += ["--n-inner", "1"]
        if "--sample" not in flags and "--epochs" not in flags:
            flags += ["--epochs", "1"]
        run(monkeypatch, capsys, name, *flags)
        ran += 1
    assert ran > 5


def test_things_to_try(tmp_path):
    """The README's commands of each model are understood, and its broken lines stand in the script.

    A broken variant is a model that still trains: loss and gradients are finite.
    """
    readme = (ROOT / "README.md").read_text()
    n_commands = 0
    n_broken = 0
    for name, text in re.findall(r"^### (\w+)\.py\n(.*?)(?=^##)", readme, re.M | re.S):
        module = importlib.import_module(name)
        for flags in re.findall(rf"`python {name}\.py ([^`]*)`", text):
            module.parse_args(shlex.split(flags))
            n_commands += 1
        for old, new in re.findall(r"`([^`]+)` becomes\s+`([^`]+)`", text):
            script = (ROOT / f"{name}.py").read_text()
            assert script.count(old) == 1, old
            path = tmp_path / f"{name}.py"
            path.write_text(script.replace(old, new))
            broken = runpy.run_path(str(path))["Model"]()
            loss, _ = broken.loss(torch.rand(2, 1, 28, 28))
            loss.backward()
            assert loss.isfinite()
            assert all(w.grad.isfinite().all() for w in broken.parameters() if w.grad is not None)
            n_broken += 1
    assert n_commands >= 10
    assert n_broken >= 8


def test_readme_code_runs(monkeypatch, capsys, tmp_path):
    """Its Python blocks, as written but for the numbers of samples."""
    import diffusion
    import made

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    given, train, load, notebook, _ = blocks
    monkeypatch.chdir(tmp_path)
    images = (common.load_mnist()[2][:4] > 127).float()

    model = made.MADE(hidden=20)
    space = {"model": model, "images": images}
    exec(given.replace("64", "4"), space)
    assert torch.equal(space["whole_images"][:, :, :14], images[:, :, :14])

    space = {"batches": [(images, torch.arange(4))]}
    exec(train.replace("sample(64)", "sample(2)"), space)
    assert space["samples"].shape == (2, 1, 28, 28)

    small = ["--channels", "8", "--n-inner", "1", "--batch-size", "4", "--epochs", "1"]
    diffusion.main(["--dry-run", *small])
    space = {"torch": torch, "Diffusion": diffusion.Diffusion}
    exec(load.replace("out/diffusion/", "out/diffusion-dry/"), space)
    assert space["model"].sample(1).shape == (1, 1, 28, 28)

    monkeypatch.setattr(diffusion, "main", lambda flags: space.update(flags=flags))
    exec(notebook)
    assert space["flags"] == ["--epochs", "1", "--out-dir", "out/notebook"]


def test_readme_trains_with_two_processes(tmp_path):
    """Its example of DistributedDataParallel, as written but for its length and size."""
    code = re.search(r"```python\n(# train_ddp.py.*?)```", (ROOT / "README.md").read_text(), re.S)[
        1
    ]
    code = code.replace("range(1, 101)", "range(1, 21)").replace("hidden=400", "hidden=20")
    (tmp_path / "train_ddp.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "train_ddp.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment["OMP_NUM_THREADS"] = "1"
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"^step 20 \| loss \d+\.\d$", result.stdout, re.M)
    from made import MADE

    model = MADE(hidden=20)
    saved = torch.load(tmp_path / "ddp.pt", weights_only=True)
    model.load_state_dict(saved["model"])


def test_ci_runs_the_commands_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    commands = (ROOT / ".ci/run").read_text().split("\n")
    commands = [line for line in commands if line.startswith(("pip", "python -m", "ruff"))]
    assert len(commands) == 4
    for command in commands:
        assert f"\n{command.replace(' -q -r', ' -r')}\n" in readme
