"""The train section: its parts, flags, checkpoints, resuming, and what can go wrong."""

import copy
import csv
import errno
import importlib
import itertools
import math
import os
import random
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import ROOT, SCRIPTS, SIZES, SMALL, cli, main_of, size_flags, tiny
from PIL import Image

import common
import vae

RULER = "# ---------------------------------------------------------------- train\n"


def load(folder="out/vae"):
    return torch.load(f"{folder}/model.pt", weights_only=True)


def contents(folder="out/vae"):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def column(name):
    with open("out/vae/log.csv") as file:
        return [row[name] for row in csv.DictReader(file)]


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def again(flags, name="vae"):
    """Run a script's main without the sizes of the model, which --resume and --sample know."""
    main_of(name)(["--device", "cpu", *flags.split()])


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function that runs vae.py as a command, which must fail with one line, and returns it."""

    def run(flags):
        status, _, err = cli(monkeypatch, capsys, "vae", *flags.split())
        assert status in (1, 2)
        assert err.count("\n") == 1, err
        return err

    return run


@contextmanager
def interrupt(name, n):
    """Within it, a run of the script ends by Ctrl-C before its step n."""
    module = importlib.import_module(name)
    train_step = module.train_step
    count = itertools.count(1)

    def step(*args):
        if next(count) == n:
            raise KeyboardInterrupt
        return train_step(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "train_step", step)
        yield


@contextmanager
def full_disk(after):
    """Within it, `after` files are written whole, and half of the next one."""
    count = itertools.count()
    write = Path.write_bytes

    def write_bytes(path, data):
        if next(count) < after:
            return write(path, data)
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_bytes", write_bytes)
        yield


def test_train_sections_are_equal():
    sections = {(ROOT / f"{name}.py").read_text().split(RULER)[1] for name in SCRIPTS}
    assert len(sections) == 1


# ---------------------------------------------------------------- optimizers
@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 6, 6)])
def test_orthogonalise_keeps_directions_and_evens_out_their_sizes(shape):
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    sizes = torch.logspace(0, -2, min(shape[1:]))  # a hundredfold difference
    x = vae.orthogonalise(u * sizes @ vt)
    core = u.mT @ x @ vt.mT / (0.2 * max(shape[1:]) ** 0.5)  # U^T U S V^T V = S
    after = core.diagonal(dim1=1, dim2=2)
    assert after.min() > 0.6 and after.max() < 1.25
    assert (core - torch.diag_embed(after)).abs().max() < 0.01


def with_gradients(*shapes):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return weights


def test_muon_moves_each_matrix_against_its_own_gradient():
    weights = with_gradients((4, 6), (3, 2, 3, 3), (4, 6))
    before = copy.deepcopy(weights)
    vae.Muon(weights, 0.5).step()
    for weight, start in zip(weights, before):
        update = (start - weight).detach().flatten(1)
        expected = 0.5 * vae.orthogonalise(weight.grad.flatten(1)[None])[0]
        torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-4)


def test_muon_has_momentum():
    (weight,) = with_gradients((4, 6))
    optimizer = vae.Muon([weight], 0.5)
    optimizer.step()
    before = weight.detach().clone()
    gradient, weight.grad = weight.grad, torch.zeros(4, 6)
    optimizer.step()
    assert ((before - weight) * gradient).sum() > 0.1


def test_muon_keeps_the_state_of_a_group_with_its_first_weight():
    weights = with_gradients((4, 6), (3, 5), (4, 6))
    optimizer = vae.Muon(weights, 0.5)
    optimizer.step()
    shapes = {weight: state["momentum"].shape for weight, state in optimizer.state.items()}
    assert shapes == {weights[0]: (2, 4, 6), weights[1]: (1, 3, 5)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_weight_has_one_optimizer_unless_it_is_frozen(name):
    model = tiny(name)
    frozen, *others = model.parameters()
    frozen.requires_grad = False
    optimizers = importlib.import_module(name).make_optimizers(model, 1e-3)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = [weight for group in groups for weight in group["params"]]
    assert sorted(map(id, trained)) == sorted(map(id, others))
    assert {group["lr"] for group in groups} == {1e-3}


def test_learning_rate_rises_to_the_peak_and_falls_to_zero():
    rates = [vae.learning_rate(step, 1000, 0.5) for step in range(1, 1001)]
    assert max(rates) == rates[19] == 0.5  # after 2 % of the steps
    assert np.allclose(np.diff([0, *rates[:20]]), 0.5 / 20)
    assert np.allclose(np.diff([*rates[19:], 0]), -0.5 / 981)
    assert vae.learning_rate(1, 1, 0.5) == 0.5


def test_learning_rate_is_that_of_all_epochs_together(small, monkeypatch):
    monkeypatch.setattr(vae, "learning_rate", Mock(wraps=vae.learning_rate))
    small("vae", "--epochs", 2, "--batch-size", 100, "--lr", 0.1)
    steps = {call.args: None for call in vae.learning_rate.call_args_list}
    assert list(steps) == [(step, 6, 0.1) for step in range(1, 7)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_training_in_bfloat16_is_close_to_float32(name):
    module = importlib.import_module(name)
    if name == "rnn" and not vae.bfloat16_autocast("cpu")._enabled:
        pytest.skip("this CPU has no LSTM in bfloat16")
    losses = []
    for enabled in (False, True):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        model = tiny(name, size=8, n_classes=10)
        optimizers = module.make_optimizers(model, module.LR)
        for i in range(4):
            x, y = (part[64 * i : 64 * (i + 1)] for part in SMALL[:2])
            loss = module.train_step(model, optimizers, autocast, x, y)
        losses.append(float(loss))
    assert 0 < abs(losses[0] - losses[1]) < 0.005 * losses[0]


# ---------------------------------------------------------------- averages
def test_ema_is_an_average_over_the_last_steps():
    """Of weights that are 0 up to step 190, and 1 from then to step 200, half is 1."""
    model = nn.Linear(1, 1)
    ema = copy.deepcopy(model)
    for step in range(1, 201):
        model.weight.data.fill_(step > 190)
        vae.update_ema(ema, model, step)
    assert abs(ema.weight.item() - 0.5) < 0.02


def test_ema_forgets_the_untrained_weights_and_copies_buffers():
    model = nn.BatchNorm1d(1)
    ema = copy.deepcopy(model)
    model.weight.data.fill_(7)
    model.running_mean.fill_(7)
    vae.update_ema(ema, model, 1)
    assert abs(ema.weight.item() - 7) < 1e-4
    assert ema.running_mean == 7


def test_average_of_the_weights_is_saved_and_tested(small):
    small("vae", "--epochs", 1)
    saved = load()
    assert not equal(saved["model"], saved["model_in_training"])
    model = tiny("vae", size=8)
    model.load_state_dict(saved["model"])
    metrics = vae.evaluate(model, *common.load_mnist()[2:])
    assert {name: saved["log"][0][name] for name in metrics} == pytest.approx(metrics, rel=1e-5)


def test_train_loss_is_the_mean_over_the_steps(small, monkeypatch):
    monkeypatch.setattr(vae, "train_step", Mock(side_effect=torch.tensor([1.0, 2.0, 6.0])))
    small("vae", "--epochs", 1, "--batch-size", 100)
    assert load()["log"][0]["train_loss"] == 3


def test_evaluate_counts_every_image_once():
    model = SimpleNamespace(n_classes=0, loss=lambda x, y: (None, {"mean": x.mean()}))
    x = torch.zeros(1050, 1, 8, 8)
    x[1000:] = 1
    assert vae.evaluate(model, x, None)["mean"] == pytest.approx(50 / 1050)


def test_evaluate_sees_the_same_noise_at_each_call():
    data = SMALL[2][:150], SMALL[3][:150]
    model = tiny("vae", size=8)
    assert vae.evaluate(model, *data) == vae.evaluate(model, *data)


@pytest.mark.parametrize("n_classes", [0, 10])
def test_evaluate_uses_the_labels_if_the_model_has_them(n_classes):
    seen = []
    model = SimpleNamespace(n_classes=n_classes, loss=lambda x, y: (seen.append(y), {}))
    vae.evaluate(model, SMALL[2][:150], SMALL[3][:150])
    first, second = SMALL[3][:150].split(100) if n_classes > 0 else (None, None)
    assert equal(seen, [first, second])


def test_evaluation_is_in_float32_where_training_is_in_bfloat16(small, monkeypatch):
    seen = set()
    decode = vae.VAE.decode

    def watched_decode(self, z, y=None):
        seen.add((self.training, torch.is_autocast_enabled("cpu")))
        return decode(self, z, y)

    monkeypatch.setattr(vae.VAE, "decode", watched_decode)
    autocast = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(vae, "bfloat16_autocast", lambda _: autocast)
    small("vae", "--epochs", 2)
    assert seen == {(True, True), (False, False)}


# ---------------------------------------------------------------- data
def test_an_epoch_trains_on_every_image_once_as_it_was_loaded(small, monkeypatch):
    def pairs(x, y):
        return [(image.numpy().tobytes(), int(label)) for image, label in zip(x, y)]

    monkeypatch.setattr(vae, "train_step", Mock(wraps=vae.train_step))
    small("vae", "--epochs", 2, "--batch-size", 100, "--class-cond")
    x, y = zip(*[call.args[3:] for call in vae.train_step.call_args_list])
    first = pairs(torch.cat(x[:3]), torch.cat(y[:3]))
    second = pairs(torch.cat(x[3:]), torch.cat(y[3:]))
    assert first != second  # another order
    assert sorted(first) == sorted(second) == sorted(pairs(*common.load_mnist()[:2]))
    assert torch.cat(x).max() == 1  # as loaded, in [0, 1]


@pytest.mark.parametrize("n_classes", [3, 26])
def test_number_of_classes_is_counted(small, monkeypatch, n_classes):
    x = common.load_mnist()[0]
    y = torch.arange(300) % n_classes
    monkeypatch.setattr(common, "load_mnist", lambda *_: [x, y, x[:100], y[:100]])
    small("vae", "--epochs", 1, "--class-cond")
    assert load()["config"]["n_classes"] == n_classes


def test_seeds_and_epochs_all_shuffle_differently():
    orders = set()
    for seed, epoch in itertools.product((0, 1, 2, 4096, 2**31), (0, 1, 2, 50)):
        vae.set_seed(seed, epoch)
        orders.add(tuple(torch.randperm(20).tolist()))
    assert len(orders) == 20


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_any_seed_will_do(small, seed):
    small("vae", "--epochs", 1, "--seed", seed)
    again("--sample 3")
    again("--resume --epochs 2")
    assert load()["settings"]["seed"] == seed


# ---------------------------------------------------------------- flags
WRONG_USE = {
    "--epochs 0": "--epochs must be positive and finite",
    "--batch-size 0": "--batch-size must be positive and finite",
    "--lr nan": "--lr must be positive and finite",
    "--lr inf": "--lr must be positive and finite",
    "--sample 0": "--sample must be positive and finite",
    "--epochs x": "invalid int value",
    "--device warp": "--device warp: ",
    "--device cuda:7": "--device cuda:7: ",
    "--dataset CIFAR": "invalid choice",
    "--sample 3 --resume": "not allowed with",
    "--size 14": "unrecognized",
    "--bogus": "unrecognized",
    "--batch-size 301": "--batch-size 301 exceeds the 300 training images",
    "--z-dim 0": "z_dim must be at least 1",
    "--hidden -5": "hidden and z_dim must be at least 1",
    "--resume": "No such file or directory: 'out/vae/model.pt'",
    "--sample 3": "No such file or directory: 'out/vae/model.pt'",
}


@pytest.mark.parametrize("flags", WRONG_USE)
def test_wrong_use_gets_one_line_and_leaves_nothing(small, refused, flags):
    assert WRONG_USE[flags] in refused(flags)
    assert os.listdir() == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_size_is_a_flag(name):
    args, _ = importlib.import_module(name).parse_args(size_flags(name))
    assert {**vars(args), **SIZES[name]} == vars(args)


def test_home_folder_and_trailing_slash_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert vae.parse_args(["--out-dir", "~/x"])[0].out_dir == Path("/somewhere/x")
    assert vae.parse_args(["--out-dir", "x/", "--dry-run"])[0].out_dir == Path("x-dry")


def test_dry_run_is_one_epoch_of_two_batches_of_everything(small, monkeypatch):
    monkeypatch.setattr(common, "load_mnist", lambda *_: [part[:1000] for part in SMALL])
    monkeypatch.setattr(vae, "train_step", Mock(wraps=vae.train_step))
    monkeypatch.setattr(vae, "evaluate", Mock(wraps=vae.evaluate))
    small("vae", "--dry-run", "--epochs", 5)
    assert vae.train_step.call_count == 2
    assert [len(call.args[1]) for call in vae.evaluate.call_args_list] == [128]


def test_dry_run_can_be_repeated_and_leaves_the_run_alone(small):
    small("vae", "--epochs", 1)
    before = contents()
    small("vae", "--dry-run")
    small("vae", "--dry-run")
    assert contents() == before
    assert "model.pt" in contents("out/vae-dry")


def test_number_of_parameters_is_printed_first(small, capsys):
    small("vae", "--epochs", 1)
    n_parameters = sum(weight.numel() for weight in tiny("vae", size=8).parameters())
    assert capsys.readouterr().out.startswith(f"{n_parameters:,} parameters, ")


# ---------------------------------------------------------------- checkpoints
def test_sample_needs_no_flags_of_the_run(small):
    small("vae", "--epochs", 1, "--class-cond", "--seed", 3)
    before = contents()
    again("--sample 100")
    after = contents()
    del after["samples.npy"]
    assert after == before  # samples.png, too: the seed of the run draws the same again


def test_sample_draws_as_many_as_asked_for_with_any_seed(small, capsys):
    small("vae", "--epochs", 1)
    before = contents()["samples.png"]
    again("--sample 1100 --seed 1")
    assert capsys.readouterr().out.endswith("samples.png, drawn after 1 epochs\n")
    assert np.load("out/vae/samples.npy").shape == (1100, 8, 8)
    with Image.open("out/vae/samples.png") as picture:
        assert picture.size == (102, 102)  # the first hundred
    assert contents()["samples.png"] != before


@pytest.mark.parametrize("name", SCRIPTS)
def test_config_and_model_are_enough_to_sample_from(name, tmp_path):
    config = {**SIZES[name], "size": 8, "n_classes": 0}
    torch.save({"config": config, "model": tiny(name, size=8).state_dict()}, tmp_path / "model.pt")
    again(f"--sample 3 --out-dir {tmp_path}", name)
    assert np.load(tmp_path / "samples.npy").shape == (3, 8, 8)


def test_file_that_is_no_checkpoint_of_the_script_is_refused(small, refused):
    small("made", "--epochs", 1)
    made = load("out/made")
    for content in (made, {"model": made["model"]}):
        torch.save(content, "model.pt")
        for flag in ("--resume", "--sample 3"):
            text = refused(f"{flag} --out-dir .")
            assert "model.pt is no checkpoint of vae.py" in text


CONTRADICTIONS = {
    "--resume --z-dim 9": "--z-dim 9: the run in out/vae has 8",
    "--resume --dataset KMNIST": "--dataset KMNIST: the run in out/vae has MNIST",
    "--resume --seed 4": "--seed 4: the run in out/vae has 0",
    "--resume --class-cond": "--class-cond: the run in out/vae was trained without labels",
    "--resume --epochs 1": "--epochs 1: the run in out/vae has done 2 already",
    "--sample 3 --z-dim 9": "--z-dim 9: the run in out/vae has 8",
    "--sample 3 --class-cond": "--class-cond: the run in out/vae was trained without labels",
    "--epochs 2": "out/vae holds a run: --resume it, or choose another --out-dir",
}


def test_flags_that_contradict_the_run_are_refused_and_change_nothing(small, refused):
    small("vae", "--epochs", 2)
    before = contents()
    for flags, message in CONTRADICTIONS.items():
        assert message in refused(flags)
    assert contents() == before


# ---------------------------------------------------------------- resume
@pytest.mark.parametrize("name, last", [("vae", 2), *((name, 4) for name in SCRIPTS)])
def test_resume_is_bit_identical(name, last, small):
    """As if there had been no interruption after the last step: of 4 in an epoch."""
    args = (name, "--epochs", 2, "--batch-size", 64, "--class-cond", "--out-dir")
    small(*args, "straight")
    with interrupt(name, last + 1):
        small(*args, "broken")
    assert len(load("broken")["log"]) == last // 4
    again("--resume --out-dir broken", name)
    a, b = load("straight"), load("broken")
    for row in a["log"] + b["log"]:
        del row["seconds"]
    assert equal(a, b)
    a, b = contents("straight"), contents("broken")
    assert len(a) >= 6 and a.keys() == b.keys()
    assert all(a[file] == b[file] for file in a if file not in ("model.pt", "log.csv"))


def test_resume_goes_on_as_the_run_was_started(small):
    small("vae", "--epochs", 1, "--batch-size", 50, "--class-cond", "--seed", 3, "--lr", 1e-3)
    again("--resume --epochs 2")
    saved = load()
    expected = dict(
        epochs=2, batch_size=50, lr=1e-3, seed=3, dataset="MNIST", data_dir=None, dry_run=False
    )
    assert saved["settings"] == expected
    assert saved["config"] == {**SIZES["vae"], "size": 8, "n_classes": 10}
    assert [row["epoch"] for row in saved["log"]] == [1, 2]


def test_epochs_lr_and_batch_size_may_differ_and_are_kept(small, monkeypatch):
    small("vae", "--epochs", 1)
    with interrupt("vae", 1):
        again("--resume --epochs 2 --lr 1e-3 --batch-size 30")
    monkeypatch.setattr(vae, "train_step", Mock(wraps=vae.train_step))
    again("--resume")
    assert [len(call.args[3]) for call in vae.train_step.call_args_list] == [30] * 10
    assert len(load()["log"]) == 2
    assert load()["settings"]["lr"] == 1e-3


def test_resume_of_a_finished_run_makes_the_pictures_again(small, capsys):
    small("vae", "--epochs", 1)
    before = contents()
    Path("out/vae/interpolation.png").unlink()
    again("--resume")
    assert "\n1 epochs are done, 0 are left\n" in capsys.readouterr().out
    assert contents()["interpolation.png"] == before["interpolation.png"]


def test_metric_added_between_two_parts_of_a_run_gets_its_column(small, monkeypatch):
    small("vae", "--epochs", 1)
    loss = vae.VAE.loss

    def with_another(self, x, y=None):
        value, metrics = loss(self, x, y)
        return value, {**metrics, "another": torch.tensor(5.0)}

    monkeypatch.setattr(vae.VAE, "loss", with_another)
    again("--resume --epochs 2")
    assert column("another") == ["", "5.0"]


# ---------------------------------------------------------------- what can go wrong
@pytest.mark.parametrize("flag", ["--out-dir=a", "--dry-run"])
def test_interrupted_run_promises_what_it_holds(small, monkeypatch, capsys, flag):
    """Ctrl-C in the first epoch: one line, and the printed flags continue the run."""
    with monkeypatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", Mock(side_effect=KeyboardInterrupt))
        status, out, err = cli(monkeypatch, capsys, "vae", "--device=cpu", "--epochs=1", flag)
    assert (status, err) == (1, "interrupted\n")
    again(re.search("to continue after an interruption: (.*)", out)[1])
    assert re.search(r"0 epochs are done, 1 are left\n.*\nepoch   1/1 \|", capsys.readouterr().out)


RUN = """if 1:
    import sys, types
    sys.path.insert(0, {root!r})
    common = sys.modules["common"] = types.ModuleType("common")  # which would import torchvision
    import torch, vae
    images = torch.rand(64, 1, 28, 28)
    common.load_mnist = lambda *_: [images, torch.zeros(64).long()] * 2
    common.save_images = lambda images, path: None
    vae.main(["--batch-size", "64", "--channels", "8", *sys.argv[1:]])
"""


def test_killed_run_can_be_resumed(tmp_path, monkeypatch):
    command = [sys.executable, "-c", RUN.format(root=str(ROOT)), "--epochs=100000"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    folder = tmp_path / "out/vae"
    while not (folder / "model.pt").exists() or not load(folder)["log"]:
        assert run.poll() is None
        time.sleep(0.1)
    time.sleep(random.Random(0).random())
    run.kill()  # SIGKILL
    run.wait()
    n_epochs = len(load(folder)["log"])  # it can still be loaded
    monkeypatch.chdir(tmp_path)
    images = torch.rand(64, 1, 28, 28)
    monkeypatch.setattr(common, "load_mnist", lambda *_: [images, torch.zeros(64).long()] * 2)
    again(f"--resume --epochs {n_epochs + 1}")
    assert len(load(folder)["log"]) == n_epochs + 1


def test_folder_that_cannot_be_written_is_noticed_before_the_first_step(small, monkeypatch):
    monkeypatch.setattr(vae, "train_step", None)
    Path("file").write_text("")
    with pytest.raises(OSError, match="file/out"):
        small("vae", "--out-dir", "file/out")


def test_full_disk_is_noticed_before_the_first_step(small, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(vae, "train_step", None)
        with full_disk(after=0):
            small("vae", "--epochs", 1)
    assert os.listdir("out/vae") == ["model.pt.part"]
    small("vae", "--epochs", 1)  # what was left there does no harm
    assert len(load()["log"]) == 1


def test_full_disk_later_keeps_the_last_checkpoint(small):
    with full_disk(after=1):
        small("vae", "--epochs", 1)
    assert load()["log"] == []
    again("--resume")
    assert len(load()["log"]) == 1


def test_log_that_cannot_be_written_costs_no_epoch(small, refused):
    small("vae", "--epochs", 1)
    log = Path("out/vae/log.csv")
    log.unlink()
    log.mkdir()
    assert "log.csv" in refused("--device cpu --resume --epochs 3")
    assert len(load()["log"]) == 2
    log.rmdir()
    again("--resume")
    assert column("epoch") == ["1", "2", "3"]


def test_missing_tensorboard_is_noticed_before_the_first_step(small, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert "tensorboard" in refused("--tensorboard")
    assert os.listdir() == []


def test_tensorboard_is_given_every_figure(small, monkeypatch):
    tensorboard = SimpleNamespace(SummaryWriter=Mock())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    small("vae", "--epochs", 2, "--tensorboard")
    tensorboard.SummaryWriter.assert_called_once_with(Path("out/vae"))
    writer = tensorboard.SummaryWriter.return_value
    figures = [(name, value, row["epoch"]) for row in load()["log"] for name, value in row.items()]
    assert [call.args for call in writer.add_scalar.call_args_list] == figures
    assert [call.args[2] for call in writer.add_images.call_args_list] == [1, 2]


def test_loss_that_is_not_finite_is_not_saved_and_a_smaller_lr_goes_on(small, refused):
    small("vae", "--epochs", 1)
    before = load()
    text = refused("--device cpu --resume --epochs 2 --lr 1e30")
    assert "the loss of epoch 2 is not finite: --resume with a smaller --lr" in text
    assert all(equal(load()[name], before[name]) for name in ("model", "model_in_training", "log"))
    again("--resume --lr 1e-3")
    assert len(load()["log"]) == 2


def test_samples_that_are_not_finite_are_not_saved(small, monkeypatch):
    monkeypatch.setattr(vae.VAE, "sample", lambda self, n, y: torch.full((n, 1, 8, 8), math.nan))
    with pytest.raises(SystemExit, match="the samples of epoch 1 are not finite.*smaller --lr"):
        small("vae", "--epochs", 1)
    assert load()["log"] == []


@pytest.mark.parametrize(
    "terminal, seconds, expected",
    [
        (True, 2, [("1", "4", "\r"), ("2", "2", "\r"), ("3", "0", "\r")]),
        (False, 35, [("2", "35", "\n")]),
    ],
)
def test_progress_is_live_on_a_terminal_and_a_line_a_minute_elsewhere(
    small, monkeypatch, capsys, terminal, seconds, expected
):
    """Of three steps that take some seconds each."""
    clock = itertools.count(0, seconds)
    monkeypatch.setattr(vae, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    small("vae", "--epochs", 1, "--batch-size", 100)
    pattern = r"step (\d)/3 \| loss [\d.]+ \| [\d,]+ img/s \| (\d+) s left *([\r\n])"
    assert re.findall(pattern, capsys.readouterr().out) == expected
