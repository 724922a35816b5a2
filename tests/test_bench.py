"""bench/: the distances are right, and an interrupted head-to-head goes on."""

import shutil
import subprocess
from pathlib import Path

import compare
import pytest
import torch
import train_all
from helpers import IMAGES, SIZES, model_class, tiny
from PIL import Image

import common


def mean(values):
    return sum(values) / len(values)


def test_distances_know_the_answer():
    a, b = torch.randn(300, 4).double() @ torch.randn(4, 4).double(), torch.randn(200, 4).double()
    # of Gaussians whose covariances commute: |mean difference|^2 + tr (root a - root b)^2
    expected = (a.mean(0) + 3).square().sum() + a.T.cov().trace()
    assert abs(compare.frechet(a, 2 * a + 3) / expected - 1) < 1e-9
    assert abs(compare.frechet(a, a)) < 1e-9

    def kernel(x, y):
        return ((x @ y).item() / 4 + 1) ** 3

    a, b = a[:20], b[:10]
    inside_a = [kernel(p, q) for i, p in enumerate(a) for j, q in enumerate(a) if i != j]
    inside_b = [kernel(p, q) for i, p in enumerate(b) for j, q in enumerate(b) if i != j]
    between = [kernel(p, q) for p in a for q in b]
    expected = mean(inside_a) + mean(inside_b) - 2 * mean(between)
    assert abs(compare.kid(a, b) / expected - 1) < 1e-9

    b = torch.randn(20, 4).double()
    near = [any((p - q).norm() < sorted((q - o).norm() for o in b)[3] for q in b) for p in a]
    assert 0.1 < mean(near) < 1
    assert compare.manifold_coverage(a, b) == mean(near)


def test_compare_fills_the_readme_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "SCRIPTS", ["vqvae", "gan"])
    limited = [data[:n] for data, n in zip(IMAGES, (300, 300, 200, 200))]
    monkeypatch.setattr(compare, "load_mnist", lambda *_, **__: limited)
    (tmp_path / "bench").mkdir()
    readmes = [tmp_path / "README.md", tmp_path / "bench/README.md"]
    for path in readmes:
        path.write_text(f"before\n{compare.START}old\n{compare.END}after\n")
    with pytest.raises(SystemExit, match="train first"):
        compare.main(["--root", str(tmp_path)])
    with pytest.raises(SystemExit, match="no out/vqvae/model.pt"):
        compare.main(["--root", str(tmp_path), "--scripts", "vqvae"])
    monkeypatch.setattr(compare, "measure_times", lambda *_: {"s/epoch": 3.0, "100 in": 0.5})
    for folder, n_classes in (("vqvae", 0), ("gan", 0), ("gan-labels", 10)):
        name = folder.split("-")[0]
        model = tiny(name, n_classes=n_classes)
        config = {**SIZES[name], "n_classes": n_classes}
        log = [{"seconds": 2.0}, {"seconds": 3.0}, {"seconds": 9.0}]
        Path("out", folder).mkdir(parents=True)
        state = {"model": model.state_dict(), "config": config, "log": log}
        torch.save(state, f"out/{folder}/model.pt")
        for title in ("samples", "samples_0001", "samples_0002", "samples_0003"):
            common.save_images(model.eval().sample(10), f"out/{folder}/{title}.png")
    flags = ["--root", str(tmp_path)]
    compare.main([*flags, "--samples", "100"])
    assert "old" in readmes[0].read_text()  # too few samples for the tables
    monkeypatch.setattr(compare, "SAMPLES", 100)
    compare.main([*flags, "--scripts", "vqvae"])
    assert "| vqvae.py |" in readmes[0].read_text()
    assert "| gan.py |" not in readmes[0].read_text()
    compare.main([*flags, "--scripts", "gan"])
    texts = [path.read_text() for path in readmes]
    for text, columns in zip(texts, (compare.SHORT, compare.LONG)):
        assert text.startswith("before\n" + compare.START)
        assert text.endswith(compare.END + "after\n")
        lines = [line for line in text.split("\n") if line.startswith("| ")]
        names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert names == list(columns)
        assert len(rows) == 4  # two sorts of data, two models
        rows = [dict(zip(names, row)) for row in rows]
        assert [row["model"] for row in rows[2:]] == ["vqvae.py", "gan.py"]
        assert rows[0]["ratio"] == rows[1]["ratio"] == "1.0"
        ratios = [float(row["ratio"].strip("*")) for row in rows[2:]]
        assert min(ratios) > 10
        assert [row["ratio"].startswith("**") for row in rows[2:]] == [
            r == min(ratios) for r in ratios
        ]
        assert rows[2]["nats"].startswith("**< ") and not rows[3]["nats"]
    assert rows[3]["labels"].endswith("%") and not rows[2]["labels"]
    assert rows[2]["epochs"] == "3" and rows[2]["s/epoch"].strip("*") == "3"
    assert 0 < float(rows[2]["brightness"]) < 1
    with Image.open("assets/samples.png") as image:
        assert image.size == (748, 184)
        samples = image.tobytes()

    # what is known is not measured again; one model and the pictures of another may be gone
    monkeypatch.setattr(compare, "measure", None)
    shutil.rmtree("out/vqvae")
    compare.main(flags)
    assert [path.read_text() for path in readmes] == texts
    with Image.open("assets/samples.png") as image:
        assert image.tobytes() == samples
    with pytest.raises(TypeError):  # other weights are measured
        Path("out/gan-labels/model.pt").unlink()
        compare.main(flags)


def test_train_all_plans_and_goes_on(monkeypatch, tmp_path):
    ran = []
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


def test_trainer_takes_the_scripts_own_step(monkeypatch):
    monkeypatch.setattr(train_all, "DEVICE", "cpu")
    gan = model_class("gan").__module__
    calls = []
    module = __import__(gan)
    train_step = module.train_step

    def watched_step(*args):
        calls.append(args)
        return train_step(*args)

    monkeypatch.setattr(module, "train_step", watched_step)
    step, test, sample, steps = train_all.trainer("gan")
    step()
    assert len(calls) == 1
    assert len(calls[0][1]) == 2  # optimizers
    assert steps == 937
    assert test()["d_loss"] > 0
    assert sample() > 0


def test_profile_counts_operations():
    a = torch.ones(2, 3, requires_grad=True)
    with train_all.Counter() as counter:
        (a @ torch.ones(3, 4)).sum().backward()
    assert counter.total == 2 * 48  # 2 * 2 * 3 * 4 forward, as many backward: one input needs it


def test_figures_draw_the_masks(tmp_path):
    pytest.importorskip("matplotlib")
    import figures

    figures.main(["masks", "--assets", str(tmp_path)])
    with Image.open(tmp_path / "masks.png") as image:
        assert image.width > 500
