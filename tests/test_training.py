"""The train section: flags, schedule, averages, checkpoints, resuming, and what can go wrong."""

import ast
import copy
import errno
import importlib
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import (
    IMAGES,
    METRIC,
    ROOT,
    SCRIPTS,
    SIZES,
    cli,
    main_of,
    model_class,
    size_flags,
    tiny,
)
from PIL import Image

import common
import vae

RULER = "# ---------------------------------------------------------------- train\n"


def load(folder):
    return torch.load(f"{folder}/model.pt", weights_only=True)


def message_of(capsys, run, *args):
    """The text with which run(*args) ends, which must be one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*args)
    text = stop.value.code
    if not isinstance(text, str):  # argparse has printed it
        text = capsys.readouterr().err.strip()
    assert text
    assert "\n" not in text
    return text


# ---------------------------------------------------------------- the same text ten times
def train_section(name):
    """Its statements {name or text: source}, and the constants' names -> values."""
    source = (ROOT / f"{name}.py").read_text().split(RULER)[1]
    statements, constants = {}, {}
    for node in ast.parse(source).body:
        lines = source.split("\n")[node.lineno - 1 - len(getattr(node, "decorator_list", [])) :]
        text = "\n".join(lines[: node.end_lineno - node.lineno + 1])
        if isinstance(node, ast.Assign):
            constants[ast.unparse(node.targets[0])] = ast.unparse(node.value)
        else:
            statements[getattr(node, "name", "guard")] = text
    comments = [line for line in source.split("\n") if line.startswith("#")]
    return statements, constants, comments


@pytest.mark.parametrize("name", SCRIPTS)
def test_train_section_is_the_same_text(name):
    statements, constants, comments = train_section(name)
    expected, _, expected_comments = train_section("diffusion")
    if name == "gan":  # which has optimizers and a training step of its own
        own = ("Muon", "orthogonalise", "make_optimizers", "train_step")
        for part in (statements, expected):
            for key in own:
                part.pop(key, None)
    assert statements == expected
    assert list(statements) == list(expected)
    assert comments == expected_comments
    assert list(constants) == ["NAME", "Model", "EPOCHS", "BATCH_SIZE", "LR"]
    assert constants["NAME"] == repr(name)


# ---------------------------------------------------------------- its parts
@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 6, 6)])
def test_orthogonalise_keeps_directions_and_evens_out_their_sizes(shape):
    torch.manual_seed(0)
    rank = min(shape[1:])
    u = torch.linalg.qr(torch.randn(shape[0], shape[1], rank))[0]
    v = torch.linalg.qr(torch.randn(shape[0], shape[2], rank))[0]
    sizes = torch.logspace(0, -2, rank)  # a hundredfold difference
    x = vae.orthogonalise(u * sizes @ v.mT)
    core = u.mT @ x @ v / (0.2 * max(shape[1:]) ** 0.5)  # U^T U S V^T V = S
    after = core.diagonal(dim1=1, dim2=2)
    assert after.min() > 0.6 and after.max() < 1.25
    assert (core - torch.diag_embed(after)).abs().max() < 0.01
    assert abs(x.square().mean().sqrt() - 0.2) < 0.04


def test_muon_moves_each_matrix_against_its_own_gradient():
    torch.manual_seed(0)
    weights = [torch.randn(4, 6), torch.randn(3, 2, 3, 3), torch.randn(4, 6)]
    grads = [torch.randn_like(weight) for weight in weights]
    alone = []
    for weight, grad in zip(weights, grads):
        weight = nn.Parameter(weight.clone())
        weight.grad = grad.clone()
        optimizer = vae.Muon([weight])
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        alone.append(weight.detach())
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = vae.Muon(parameters)
    for parameter, grad in zip(parameters, grads):
        parameter.grad = grad.clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    for parameter, weight, grad, expected in zip(parameters, weights, grads, alone):
        torch.testing.assert_close(parameter.detach(), expected)
        update = (weight - parameter.detach()).flatten(1)
        expected = 0.5 * vae.orthogonalise(grad.flatten(1)[None])[0]
        torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-4)
    for parameter in parameters:  # a second step, against the gradient, still moves on: momentum
        parameter.grad = torch.zeros_like(parameter)
    before = parameters[0].detach().clone()
    optimizer.step()
    assert ((before - parameters[0]) * grads[0]).sum() > 0.1


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_weight_has_one_optimizer(name):
    module = importlib.import_module(name)
    model = tiny(name)
    trained = []
    for optimizer in module.make_optimizers(model):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        trained += weights
        if type(optimizer).__name__ == "Muon":
            assert all(weight.ndim > 1 for weight in weights)
        else:
            assert isinstance(optimizer, torch.optim.AdamW)
    assert sorted(map(id, trained)) == sorted(map(id, model.parameters()))


def test_learning_rate_rises_to_the_peak_and_falls_to_zero():
    rates = [vae.learning_rate(step, 1000, 0.5) for step in range(1, 1001)]
    assert max(rates) == rates[19] == 0.5  # after 2 % of the steps
    assert rates[0] == 0.5 / 20
    rise, fall = np.diff(rates[:20]), np.diff(rates[19:])
    assert np.allclose(rise, 0.5 / 20)
    assert np.allclose(fall, -0.5 / 981)
    assert rates[-1] == pytest.approx(0.5 / 981)
    assert vae.learning_rate(1, 1, 0.5) == 0.5


def test_ema_is_an_average_over_the_last_steps():
    """Of weights that are 0 up to step 190, and 1 from then to step 200, half is 1."""
    model = torch.nn.BatchNorm1d(1)
    ema = copy.deepcopy(model)
    for step in range(1, 201):
        model.weight.data.fill_(step > 190)
        model.running_mean.fill_(step)
        vae.update_ema(ema, model, step)
    assert abs(ema.weight.item() - 0.5) < 0.02
    assert ema.running_mean == 200  # buffers are no averages
    model.weight.data.fill_(7)
    vae.update_ema(ema, model, 1)
    assert abs(ema.weight.item() - 7) < 1e-4  # the start is forgotten at once


def test_evaluate_counts_every_image_once():
    batches = []

    def loss_fn(x):
        batches.append(x)
        return None, {"mean": x.mean(), "noise": torch.rand(())}

    autocast = torch.autocast("cpu", enabled=False)
    first = vae.evaluate(loss_fn, IMAGES[2][:1100], autocast)
    assert [len(batch) for batch in batches] == [500, 500, 100]
    assert vae.evaluate(loss_fn, IMAGES[2][:1100], autocast) == first
    assert abs(first["mean"] - (IMAGES[2][:1100] / 255).mean()) < 1e-6


def test_every_image_is_trained_on_once_an_epoch(small, monkeypatch):
    seen = []
    train_step = vae.train_step

    def watched_step(model, optimizers, autocast, x, y):
        seen.append(x)
        return train_step(model, optimizers, autocast, x, y)

    monkeypatch.setattr(vae, "train_step", watched_step)
    small("vae", "--epochs", 2, "--batch-size", 100)
    images = common.load_mnist()[0] / 255
    epochs = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert torch.equal(epoch.flatten(1).unique(dim=0), images.flatten(1).unique(dim=0))


# ---------------------------------------------------------------- flags
WRONG_USE = {
    "--epochs -3": "must be positive and finite",
    "--epochs 0": "must be positive and finite",
    "--batch-size 0": "must be positive and finite",
    "--lr -1": "must be positive and finite",
    "--lr nan": "must be positive and finite",
    "--lr inf": "must be positive and finite",
    "--sample 0": "must be positive and finite",
    "--epochs x": "invalid int value",
    "--device warp": "invalid choice",
    "--dataset CIFAR": "invalid choice",
    "--sample 3 --resume": "not allowed with",
    "--size 14": "unrecognized",
    "--bogus": "unrecognized",
    "--batch-size 99999999": "--batch-size",
    "--z-dim 0": "z_dim",
    "--hidden -5": "hidden",
}


def test_wrong_use_gets_one_line_and_leaves_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_mnist", lambda *_: IMAGES)
    for args, message in WRONG_USE.items():
        status, _, err = cli(monkeypatch, capsys, "vae", *args.split())
        assert status in (1, 2)
        assert message in err, err
        assert err.count("\n") == 1, err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_size_is_a_flag(name):
    args, _ = importlib.import_module(name).parse_args(size_flags(name))
    for key, value in SIZES[name].items():
        assert getattr(args, key) == value
    defaults, _ = importlib.import_module(name).parse_args([])
    assert not hasattr(defaults, "size")
    assert not hasattr(defaults, "n_classes")


def test_home_folder_and_trailing_slash_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert vae.parse_args(["--out-dir", "~/x"])[0].out_dir == Path("/somewhere/x")
    assert vae.parse_args(["--out-dir", "x/", "--dry-run"])[0].out_dir == Path("x-dry")


@pytest.mark.parametrize("seed", [-1, 2**32 + 1, 1180591620717411303424, time.time_ns()])
def test_any_seed_will_do(small, seed):
    small("vae", "--epochs", 1, "--seed", seed, "--out-dir", "a")
    small("vae", "--sample", 3, "--out-dir", "a")
    small("vae", "--epochs", 2, "--resume", "--out-dir", "a")
    small("vae", "--epochs", 2, "--seed", 0, "--out-dir", "b")
    assert load("a")["log"][0]["train_loss"] != load("b")["log"][0]["train_loss"]


def test_seeds_and_epochs_all_shuffle_differently():
    orders = set()
    for seed in (0, 1, 2, 4096, 2**31):
        for epoch in (0, 1, 2, 50):
            vae.set_seed(seed, epoch)
            orders.add(tuple(torch.randperm(20).tolist()))
    assert len(orders) == 20


def test_help_needs_no_docstrings(monkeypatch):
    """python -OO strips them."""
    monkeypatch.setattr(vae, "__doc__", None)
    monkeypatch.setattr(vae.Model, "__doc__", None)
    assert "--z-dim" in vae.make_parser().format_help()


def test_log_that_can_only_write_and_flush(small, monkeypatch):
    class Logger:
        text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    logger = Logger()
    monkeypatch.setattr(sys, "stdout", logger)
    small("vae", "--epochs", 1)
    assert "epoch   1/1 | train loss" in logger.text


# ---------------------------------------------------------------- checkpoints
def test_sample_takes_everything_from_the_checkpoint(small, capsys):
    small("vae", "--epochs", 1, "--class-cond", "--seed", 3)
    before = Path("out/vae/model.pt").read_bytes()
    at_the_end = Path("out/vae/samples.png").read_bytes()
    vae.main(["--device", "cpu", "--sample", "100"])  # no size, no --class-cond
    assert Path("out/vae/samples.png").read_bytes() == at_the_end
    vae.main(["--device", "cpu", "--sample", "1100"])
    images = np.load("out/vae/samples.npy")
    assert images.shape == (1100, 8, 8)
    assert images.dtype == np.uint8
    with Image.open("out/vae/samples.png") as picture:
        assert picture.size == (102, 102)  # the first hundred
        first = np.asarray(picture)[2:10, 2:10]
    assert (first == images[0]).all()
    vae.main(["--device", "cpu", "--sample", "3", "--seed", "4"])
    assert (np.load("out/vae/samples.npy")[0] != images[0]).any()
    assert Path("out/vae/model.pt").read_bytes() == before

    for flags in ("--z-dim 9", "--dataset KMNIST"):
        text = message_of(capsys, vae.main, ["--sample", "3", *flags.split()])
        assert flags.split()[0] in text
    small("vae", "--epochs", 1, "--out-dir", "plain")
    text = message_of(capsys, vae.main, "--sample 3 --class-cond --out-dir plain".split())
    assert "--class-cond" in text


def test_resume_goes_on_as_the_run_was_started(small, capsys):
    small("vae", "--epochs", 2, "--batch-size", 50, "--class-cond", "--seed", 3)
    before = Path("out/vae/model.pt").read_bytes()
    for flags in ("--batch-size 60", "--seed 4", "--z-dim 9", "--dataset FashionMNIST"):
        text = message_of(capsys, vae.main, ["--resume", *flags.split()])
        assert flags.split()[0] in text
    text = message_of(capsys, vae.main, ["--resume", "--epochs", "1"])
    assert "--epochs 1" in text
    assert Path("out/vae/model.pt").read_bytes() == before
    vae.main(["--device", "cpu", "--resume", "--epochs", "3"])
    saved = load("out/vae")
    assert len(saved["log"]) == 3
    expected = dict(epochs=3, batch_size=50, lr=vae.LR, seed=3, dataset="MNIST")
    assert saved["settings"] == expected
    assert saved["config"]["n_classes"] == 10
    assert len(Path("out/vae/log.csv").read_text().split()) == 4


@pytest.mark.parametrize("name", SCRIPTS)
def test_config_and_weights_are_enough_to_sample_from(name, tmp_path, monkeypatch, capsys):
    """A file with no more than the README's three lines read, as earlier versions wrote them."""
    monkeypatch.chdir(tmp_path)
    config = {**SIZES[name], "size": 8, "n_classes": 0}
    model = model_class(name)(**config)
    Path(f"out/{name}").mkdir(parents=True)
    torch.save({"config": config, "model": model.state_dict()}, f"out/{name}/model.pt")
    main_of(name)(["--device", "cpu", "--sample", "3"])
    assert np.load(f"out/{name}/samples.npy").shape == (3, 8, 8)
    text = message_of(capsys, main_of(name), ["--resume"])
    assert "optimizers" in text


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_bad_checkpoint_gets_one_line_and_stays(small, capsys):
    small("vae", "--epochs", 1)
    good = Path("out/vae/model.pt").read_bytes()
    Path("bad").mkdir()
    path = Path("bad/model.pt")
    bad = {
        "empty": b"",
        "short": good[: len(good) // 2],
        "text": b"hello",
        "list": [1, 2],
        "foreign": {"model": {"weight": torch.zeros(3)}, "config": {}},
        "no config": {"model": load("out/vae")["model"]},
        "evil": {"model": Malicious()},
        "other sizes": {**load("out/vae"), "config": {**load("out/vae")["config"], "z_dim": 9}},
        "other script": {**load("out/vae"), "script": "vqvae"},
    }
    for title, content in bad.items():
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        before = path.read_bytes()
        for flag in ("--resume", "--sample=3"):
            text = message_of(capsys, vae.main, [flag, "--out-dir", "bad"])
            assert text.startswith("vae.py: error: cannot load bad/model.pt: "), (title, text)
        assert path.read_bytes() == before
    path.unlink()
    assert "No such file" in message_of(capsys, vae.main, ["--resume", "--out-dir", "bad"])
    assert not Path("owned").exists()
    assert os.listdir("bad") == []


def test_another_scripts_checkpoint_is_refused(small, capsys):
    small("vae", "--epochs", 1)
    for name in SCRIPTS:
        if name != "vae":
            text = message_of(capsys, main_of(name), ["--resume", "--out-dir", "out/vae"])
            assert "vae.py" in text


def test_model_of_a_checkpoint_can_be_trained_on(small):
    """The averaged weights carry the model's buffers: VQ-VAE would else fill its codebook anew."""
    small("vqvae", "--epochs", 1)
    saved = load("out/vqvae")
    model = model_class("vqvae")(**saved["config"])
    model.load_state_dict(saved["model"])
    before = model.codebook.detach().clone()
    model.train().loss(common.load_mnist()[0][:64] / 255)
    assert (model.codebook != before).any(1).sum() < 4


# ---------------------------------------------------------------- resume
def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name, last", [("vae", 0), *((name, 1) for name in SCRIPTS)])
def test_resume_is_bit_identical(name, last, small, monkeypatch):
    """As if there had been no interruption, after the first epoch or within it."""
    args = ("--epochs", 2, "--batch-size", 64, "--class-cond")
    small(name, *args, "--out-dir", "straight")
    save_images = common.save_images

    def interrupt(images, path):
        if path.name == f"samples_{last + 1:04}.png":
            raise KeyboardInterrupt
        save_images(images, path)

    monkeypatch.setattr(common, "save_images", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small(name, *args, "--out-dir", "broken")
    monkeypatch.setattr(common, "save_images", save_images)
    before = load("broken")
    assert len(before["log"]) == last
    main_of(name)(["--device", "cpu", "--out-dir", "broken", "--resume"])
    a, b = load("straight"), load("broken")
    for row in a["log"] + b["log"]:
        del row["seconds"]
    assert equal(a, b)
    assert not equal(a["model_in_training"], before["model_in_training"])
    assert not equal(a["model_in_training"], a["model"])  # the EMA is something else
    pictures = [path.name for path in Path("straight").glob("*.png")]
    assert len(pictures) >= 3
    for picture in pictures:
        assert Path("straight", picture).read_bytes() == Path("broken", picture).read_bytes()


@pytest.mark.parametrize("name", SCRIPTS)
def test_bfloat16_run_is_close_to_float32(name, small, monkeypatch):
    module = importlib.import_module(name)
    if name == "rnn" and not vae.bfloat16_autocast("cpu")._enabled:
        pytest.skip("this CPU has no LSTM in bfloat16")
    rows = []
    for enabled in (False, True):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        monkeypatch.setattr(module, "bfloat16_autocast", lambda _, a=autocast: a)
        small(name, "--epochs", 1, "--class-cond", "--out-dir", str(enabled))
        rows.append(load(str(enabled))["log"][-1])
    a, b = (row[METRIC[name]] for row in rows)
    assert 0 < abs(a - b) < 0.02 * a


# ---------------------------------------------------------------- what can go wrong
def test_interrupted_run_promises_what_it_holds(small, monkeypatch, capsys):
    """Ctrl-C in the first epoch: one line, and --resume goes on."""
    monkeypatch.setattr(common, "save_images", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    flags = ["--device", "cpu", *size_flags("vae"), "--epochs", "1"]
    status, out, err = cli(monkeypatch, capsys, "vae", *flags)
    assert (status, err) == (1, "interrupted\n")
    assert "--resume" in out
    assert load("out/vae")["log"] == []
    monkeypatch.undo()


def test_interrupted_resume_keeps_its_flags(small, monkeypatch):
    """--resume --epochs 2, interrupted at once: --resume alone goes on to epoch 2."""
    small("vae", "--epochs", 1)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vae, "train_epoch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            vae.main(["--device", "cpu", "--resume", "--epochs", "2", "--lr", "1e-3"])
    assert load("out/vae")["settings"]["lr"] == 1e-3
    vae.main(["--device", "cpu", "--resume"])
    assert len(load("out/vae")["log"]) == 2


def test_second_run_does_not_touch_the_first(small, capsys):
    small("vae", "--epochs", 1)
    before = {path: path.read_bytes() for path in Path("out/vae").iterdir()}
    text = message_of(capsys, small, "vae", "--epochs", 1, "--lr", 1e-3)
    assert "out/vae" in text
    assert "--resume" in text
    assert {path: path.read_bytes() for path in Path("out/vae").iterdir()} == before
    for _ in range(2):  # but a dry run can be repeated
        small("vae", "--epochs", 1, "--dry-run")


RUN = """if 1:
    import sys, types
    sys.path.insert(0, {root!r})
    common = sys.modules["common"] = types.ModuleType("common")  # which would import torchvision
    import torch, vae
    images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8)
    common.load_mnist = lambda *_: [images, torch.zeros(64).long()] * 2
    common.save_images = lambda images, path: None
    vae.main(["--batch-size", "64", *sys.argv[1:]])
"""


def start(tmp_path, *flags):
    command = [sys.executable, "-c", RUN.format(root=str(ROOT)), *flags]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=tmp_path, **pipes)


def wait_for_epochs(run, folder, n):
    """Until more than n epochs are in the checkpoint."""
    while not (folder / "model.pt").exists() or len(load(folder)["log"]) <= n:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)


def test_two_starts_at_once_and_kills(tmp_path):
    """Of two runs that start at once into one folder, one stops; the other one is killed twice."""
    random.seed(0)
    folder = tmp_path / "out/vae"
    runs = [start(tmp_path, "--epochs", "100000") for _ in range(2)]
    while all(run.poll() is None for run in runs):
        time.sleep(0.01)
    runs.sort(key=lambda run: run.poll() is None)
    stopped, running = runs
    assert stopped.returncode == 1
    assert re.fullmatch("vae.py: error: out/vae holds a run: .*\n", stopped.stderr.read())
    n_epochs = 0
    for run in (running, None):
        if run is None:
            run = start(tmp_path, "--resume")
        wait_for_epochs(run, folder, n_epochs)
        time.sleep(random.random() / 2)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert len(load(folder)["log"]) > n_epochs  # it can still be loaded
        n_epochs = len(load(folder)["log"])


def no_training(*_):
    raise AssertionError("this has to fail before the first step")


def test_disk_that_cannot_be_written_is_noticed_before_the_first_step(small, monkeypatch, capsys):
    monkeypatch.setattr(vae, "train_epoch", no_training)
    Path("file").write_text("")
    with pytest.raises(NotADirectoryError):  # one line, by the guard
        small("vae", "--out-dir", "file/out")
    write = Path.write_bytes

    def full_disk(self, data):
        write(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        small("vae")
    assert os.listdir("out/vae") == []


def test_full_disk_later_keeps_the_last_checkpoint(small, monkeypatch):
    small("vae", "--epochs", 1)
    before = Path("out/vae/model.pt").read_bytes()
    write = Path.write_bytes

    def full_disk(self, data):
        write(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        main_of("vae")(["--device", "cpu", "--resume", "--epochs", "2"])
    assert Path("out/vae/model.pt").read_bytes() == before
    assert not list(Path("out/vae").glob("*.part"))


def test_missing_tensorboard_is_noticed_before_the_first_step(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(common, "load_mnist", no_training)
    status, _, err = cli(monkeypatch, capsys, "vae", "--tensorboard")
    assert status == 1
    assert err.count("\n") == 1
    assert "tensorboard" in err


def test_tensorboard_is_given_every_figure(small, monkeypatch):
    seen = []

    class Board:
        def __init__(self, folder):
            assert Path(folder, "model.pt").exists()  # the folder is ours by now

        def add_scalar(self, name, value, epoch):
            seen.append((name, epoch))

        def add_images(self, name, images, epoch):
            assert images.shape == (100, 1, 8, 8)

        def flush(self):
            pass

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    small("vae", "--epochs", 2, "--tensorboard")
    assert ("train_loss", 1) in seen
    assert ("neg_elbo", 2) in seen


def test_ends_where_the_loss_is_not_finite_and_goes_on_with_a_smaller_one(small, capsys):
    small("vae", "--epochs", 1)
    before = load("out/vae")
    text = message_of(
        capsys, vae.main, ["--device", "cpu", "--epochs", "2", "--resume", "--lr", "1e30"]
    )
    assert "smaller --lr" in text
    saved = load("out/vae")
    assert len(saved["log"]) == 1
    assert all(weight.isfinite().all() for weight in saved["model_in_training"].values())
    for name in ("model", "model_in_training"):
        assert all(map(torch.equal, saved[name].values(), before[name].values()))
    vae.main(["--device", "cpu", "--resume", "--epochs", "2", "--lr", "1e-3"])
    assert len(load("out/vae")["log"]) == 2


def test_ends_where_samples_are_not_finite(small, monkeypatch, capsys):
    def sample(self, n, y=None):
        return torch.full((n, 1, 8, 8), math.nan)

    monkeypatch.setattr(vae.VAE, "sample", sample)
    assert "smaller --lr" in message_of(capsys, small, "vae", "--epochs", 1)


def test_live_line_on_a_terminal(small, monkeypatch, capsys):
    monkeypatch.setattr(os, "isatty", lambda _: True)
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 2.0 * next(clock))
    small("vae", "--epochs", 1, "--batch-size", 100)
    out = capsys.readouterr().out
    lines = re.findall(r"step (\d)/3 \| loss [\d.]+ \| [\d,]+ img/s \| \d+ s left *\r", out)
    assert lines == ["1", "2", "3"]
    assert math.isfinite(load("out/vae")["log"][0]["seconds"])
