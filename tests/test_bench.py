"""bench/: the distances are right, and what is known is neither trained nor measured again."""

import importlib
import itertools
import subprocess
from pathlib import Path

import measure
import pytest
import report
import torch
import train_all
from PIL import Image

import common

SIZES = {"vae": dict(channels=8, hidden=64, z_dim=8), "gan": dict(channels=4, z_dim=16)}
TIMES = {"s/epoch": 3.0, "100 in": 0.5, "machine": "this one"}


def mean(values):
    return sum(values) / len(values)


def distance(a, b):
    return (a - b).norm().item()


def save_run(script, folder, n_classes=0, n_epochs=3):
    """Write the checkpoint of a tiny model with random weights into out/<folder>."""
    torch.manual_seed(0)
    config = {**SIZES[script], "n_classes": n_classes}
    model = importlib.import_module(script).Model(**config)
    log = [{"epoch": epoch} for epoch in range(1, n_epochs + 1)]
    Path("out", folder).mkdir(parents=True)
    checkpoint = {"model": model.state_dict(), "config": config, "log": log}
    torch.save(checkpoint, f"out/{folder}/model.pt")


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Runs of vae and gan, the latter also with labels, and random images to measure them on."""
    monkeypatch.chdir(tmp_path)
    save_run("vae", "vae")
    save_run("gan", "gan")
    save_run("gan", "gan-labels", n_classes=10)
    torch.manual_seed(0)
    images = torch.rand(50, 1, 28, 28)
    labels = torch.arange(50) % 10
    monkeypatch.setattr(measure, "load_mnist", lambda device: (images, labels, images, labels))
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(measure, "SAMPLES", 50)
    monkeypatch.setattr(measure, "measure_times", lambda script, device: TIMES)


@pytest.fixture
def measured(monkeypatch):
    """A list of the scripts that measure.main measures from now on, instead of measuring them."""
    scripts = []

    def note(script, *_):
        scripts.append(script)
        return {"Frechet": 1.0}

    monkeypatch.setattr(measure, "measure", note)
    return scripts


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A folder with the two READMEs and an empty assets/, which report.main writes to."""
    monkeypatch.chdir(tmp_path)
    images = torch.rand(10, 1, 28, 28)
    monkeypatch.setattr(report, "load_mnist", lambda: (None, None, images, None))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "assets").mkdir()
    for name in ("README.md", "bench/README.md"):
        Path(name).write_text(f"before\n{report.START}old\n{report.END}after\n")
    return tmp_path


def rows_in(text):
    """The lines of the first table in a text, {column: cell} each."""
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    columns, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: dict(zip(columns, row)) for row in rows}


def compared(frechet):
    """Some figures of images, as results.json holds them."""
    return {"Frechet": frechet, "rarest": 0.09, "commonest": 0.11}


# ---------------------------------------------------------------- distances
def test_frechet_distance_of_a_scaled_and_shifted_copy_is_known():
    a = torch.randn(300, 4).double() @ torch.randn(4, 4).double()
    # of Gaussians whose covariances commute: |mean difference|^2 + tr (root a - root b)^2
    expected = (a.mean(0) + 3).square().sum() + a.T.cov().trace()
    assert measure.frechet(a, 2 * a + 3) == pytest.approx(expected.item())
    assert measure.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_kid_is_a_mean_of_the_kernel_over_pairs_of_different_images():
    a = torch.randn(20, 4).double()
    b = torch.randn(10, 4).double() + 1

    def kernel(p, q):
        return ((p @ q).item() / 4 + 1) ** 3

    within_a = mean([kernel(p, q) for p, q in itertools.permutations(a, 2)])
    within_b = mean([kernel(p, q) for p, q in itertools.permutations(b, 2)])
    between = mean([kernel(p, q) for p, q in itertools.product(a, b)])
    assert measure.kid(a, b) == pytest.approx(within_a + within_b - 2 * between)


def test_precision_counts_samples_nearer_than_a_third_neighbour():
    torch.manual_seed(0)
    a = torch.randn(20, 4).double()
    b = torch.randn(20, 4).double()
    # sorted: the distance to itself, then to the first, second and third neighbour
    radius = [sorted(distance(q, other) for other in b)[3] for q in b]
    near = [any(distance(p, q) < r for q, r in zip(b, radius)) for p in a]
    assert 0.1 < mean(near) < 1
    assert measure.manifold_coverage(a, b) == pytest.approx(mean(near))


# ---------------------------------------------------------------- measure.py
def test_measuring_asks_for_a_run_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="train first"):
        measure.main([])


def test_measuring_writes_all_figures_of_all_runs(runs):
    measure.main([])
    results = measure.read_results()
    assert set(results) == {"grey", "binarised", "vae", "gan"}
    compared = {"Frechet", "KID", "precision", "recall", "brightness", "rarest", "commonest"}
    of_a_run = {"epochs", "log", "parameters", "key", *TIMES}
    assert set(results["grey"]) == compared | {"key"}
    assert set(results["vae"]) == compared | of_a_run | {"neg_elbo", "iwae"}
    assert set(results["gan"]) == compared | of_a_run | {"labels"}
    assert results["gan"]["epochs"] == 3


def test_nats_are_those_of_the_scripts_own_test(runs):
    measure.main(["--scripts", "vae"])
    figures = measure.read_results()["vae"]
    module, model, _ = measure.load("vae", "vae", "cpu")
    _, _, x, y = measure.load_mnist("cpu")
    assert figures["neg_elbo"] == pytest.approx(module.evaluate(model, x, y)["neg_elbo"])
    assert figures["iwae"] < figures["neg_elbo"]


def test_the_bound_of_draws_is_a_mean_over_images_not_over_batches():
    class Model:
        def bound(self, x):
            return x.mean()

    x = torch.zeros(150, 1, 28, 28)
    x[100:] = 3
    assert measure.iwae(Model(), x) == pytest.approx(1)


def test_the_digit_asked_for_is_counted_in_the_labels(runs, monkeypatch):
    monkeypatch.setattr(measure, "draw", lambda model, n, y: y)
    judge = type("Judge", (), {"look_at": lambda self, y: (None, y.clamp(max=6))})()
    assert measure.label_accuracy("gan", judge, "cpu") == pytest.approx(0.7)


def test_what_is_known_is_not_measured_again_but_timed(runs, measured, monkeypatch):
    measure.main([])
    assert measured == ["vae", "gan"]
    monkeypatch.setattr(measure, "measure_times", lambda script, device: {"100 in": 7.0})
    measure.main([])
    assert measured == ["vae", "gan"]
    assert measure.read_results()["vae"]["100 in"] == 7.0


def test_a_changed_checkpoint_is_measured_again(runs, measured):
    measure.main([])
    Path("out/gan-labels/model.pt").unlink()
    measure.main([])
    assert measured == ["vae", "gan", "gan"]


def test_measuring_goes_on_after_an_interruption(runs, measured, monkeypatch):
    def interrupt(script, device):
        if script == "gan":
            raise KeyboardInterrupt
        return TIMES

    monkeypatch.setattr(measure, "measure_times", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure.main([])
    monkeypatch.setattr(measure, "measure_times", lambda script, device: TIMES)
    measure.main([])
    assert measured == ["vae", "gan", "gan"]


def test_figures_of_a_run_that_is_gone_stay(runs, measured):
    measure.main(["--scripts", "vae"])
    Path("out/vae/model.pt").unlink()
    measure.main([])
    assert measured == ["vae", "gan"]
    assert set(measure.read_results()) == {"grey", "binarised", "vae", "gan"}


def test_an_epoch_is_timed_by_the_scripts_own_step(monkeypatch):
    gan = importlib.import_module("gan")
    calls = []
    own_step = gan.train_step

    def train_step(*args):
        calls.append(args)
        return own_step(*args)

    monkeypatch.setattr(gan, "train_step", train_step)
    monkeypatch.setattr(measure, "median_seconds", lambda function, n, warm_up: function())
    measure.seconds_of_step(gan, "cpu")
    _, optimizers, _, x, _ = calls[0]
    assert len(optimizers) == 2
    assert x.shape == (gan.BATCH_SIZE, 1, 28, 28)


def test_the_median_of_calls_leaves_the_first_out(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    durations = iter([0, 5, 1, 3])

    def function():
        clock[0] += next(durations)

    assert measure.median_seconds(function, n=3, warm_up=1) == 3


# ---------------------------------------------------------------- report.py
def test_each_readme_gets_its_own_columns(site):
    report.main()
    short = rows_in(Path("README.md").read_text())
    long = rows_in(Path("bench/README.md").read_text())
    assert list(short["[made.py](made.py)"]) == report.SHORT
    assert list(long["made.py"]) == report.LONG
    data = ["training images, grey", "training images, binarised"]
    assert list(long) == data + [f"{script}.py" for script in train_all.SCRIPTS]


def test_minutes_are_those_of_all_epochs():
    row = report.row_of("vae", {**compared(1), "epochs": 30, "s/epoch": 42.0}, real=1)
    assert report.cell(row, "minutes") == "21"


def test_only_the_text_between_the_lines_is_replaced(site):
    report.main()
    text = Path("README.md").read_text()
    assert text.startswith(f"before\n{report.START}\n| file |")
    assert text.endswith(f"\n{report.END}after\n")
    assert "old" not in text
    report.main()
    assert Path("README.md").read_text() == text


def test_a_readme_without_the_lines_is_left_alone(site):
    Path("README.md").write_text("nothing to replace\n")
    with pytest.raises(SystemExit, match="README.md has no lines"):
        report.main()


def test_ratios_are_to_the_distance_of_training_images():
    results = {
        "grey": compared(2),
        "binarised": compared(4),
        "gan": compared(6),
        "vae": compared(50),
    }
    rows = report.rows_of(results, ["vae", "gan"])
    assert [row["ratio"] for row in rows] == [1, 1, 12.5, 3]
    assert [report.cell(row, "ratio") for row in rows] == ["1.0", "1.0", "12", "3.0"]


def test_bounds_are_marked():
    row = report.row_of("vae", {**compared(1), "neg_elbo": 86.67, "iwae": 83.42}, real=1)
    assert report.cell(row, "nats") == "< 83.42"
    assert report.cell(row, "bits/dim") == "< 0.1535"
    assert report.cell(row, "-ELBO") == "86.67"


def test_exact_nats_are_not_marked():
    row = report.row_of("made", {**compared(1), "nll": 85.83}, real=1)
    assert report.cell(row, "nats") == "85.83"
    assert report.cell(row, "bits/dim") == "0.1579"
    assert report.cell(row, "-ELBO") == ""


def test_the_lowest_number_is_bold_not_the_lowest_text():
    values = {"vae.py": 0.0141, "gan.py": 0.0079, "rnn.py": 10.0}  # two are 0.01 s
    rows = [{"model": model, "100 in": seconds} for model, seconds in values.items()]
    assert report.best_cells(rows) == {("gan.py", "100 in")}


def test_grey_and_binarised_digits_have_a_best_ratio_each():
    values = {"training images, grey": 1, "vae.py": 9, "rnn.py": 8, "gan.py": 3, "diffusion.py": 2}
    rows = [{"model": model, "ratio": ratio} for model, ratio in values.items()]
    assert report.best_cells(rows) == {("rnn.py", "ratio"), ("diffusion.py", "ratio")}


def test_figures_of_another_classifier_are_not_shown():
    results = {"grey": {"key": [100, "new"]}, "gan": {"key": [100, "old", "model"]}}
    assert not report.is_current(results, "gan")
    results["gan"]["key"][1] = "new"
    assert report.is_current(results, "gan")
    assert not report.is_current(results, "diffusion")


def test_the_pictures_of_the_runs_are_collected(site):
    common.save_images(torch.rand(100, 1, 28, 28), "out/vae/samples.png")
    common.save_images(torch.rand(200, 1, 28, 28), "out/gan/interpolation.png")
    report.copy_pictures(site / "assets")
    assert Path("assets/vae.png").read_bytes() == Path("out/vae/samples.png").read_bytes()
    with Image.open("assets/gan_interpolation.png") as image:
        assert image.size == (302, 302)
    assert not Path("assets/gan.png").exists()


def test_the_row_of_a_run_that_is_gone_stays(site):
    path = site / "assets/samples.png"
    common.save_images(torch.rand(100, 1, 28, 28), "out/vae/samples.png")
    report.draw_sheet(path, torch.rand(10, 1, 28, 28))
    with Image.open(path) as image:
        row = image.crop((0, 420, 748, 480)).tobytes()
    Path("out/vae/samples.png").unlink()
    report.draw_sheet(path, torch.rand(10, 1, 28, 28))
    with Image.open(path) as image:
        assert image.size == (748, 664)
        assert image.crop((0, 420, 748, 480)).tobytes() == row
        assert len(set(row)) > 100


# ---------------------------------------------------------------- train_all.py
@pytest.fixture
def commands(monkeypatch, tmp_path):
    """A list of what train_all starts from now on, [script, flag, ...] each; gan.py fails."""
    monkeypatch.chdir(tmp_path)
    started = []

    def run(command):
        script = Path(command[1]).name
        started.append([script, *command[2:]])
        return subprocess.CompletedProcess(command, returncode=1 if script == "gan.py" else 0)

    monkeypatch.setattr(train_all.subprocess, "run", run)
    return started


def test_each_script_is_trained_with_its_defaults(commands):
    train_all.main(["--scripts", "made", "vae"])
    assert commands == [["made.py"], ["vae.py"]]


def test_runs_with_labels_are_short_and_get_folders_of_their_own(commands):
    train_all.main(["--scripts", "vae", "--labels"])
    flags = ["--class-cond", "--epochs", "3", "--out-dir", "out/vae-labels"]
    assert commands == [["vae.py", *flags]]


def test_a_finished_run_with_labels_is_not_trained_again(commands):
    save_run("vae", "vae-labels", n_epochs=3)
    train_all.main(["--scripts", "vae", "--labels"])
    assert commands == []


def test_training_stops_when_a_script_fails(commands):
    with pytest.raises(SystemExit, match="gan.py stopped"):
        train_all.main(["--scripts", "gan", "vae"])
    assert commands == [["gan.py"]]


def test_training_goes_on_where_it_was_interrupted(commands):
    save_run("vae", "vae", n_epochs=importlib.import_module("vae").EPOCHS)
    save_run("gan", "gan", n_epochs=1)
    with pytest.raises(SystemExit):
        train_all.main(["--scripts", "vae", "gan"])
    assert commands == [["gan.py", "--resume"]]


# ---------------------------------------------------------------- figures.py
@pytest.mark.parametrize("name", ["masks", "nats", "speed"])
def test_a_figure_is_drawn(name, tmp_path):
    pytest.importorskip("matplotlib")
    import figures

    figures.main(["--only", name, "--assets", str(tmp_path)])
    with Image.open(tmp_path / f"{name}.png") as image:
        assert image.width > 500


def test_a_figure_whose_run_is_missing_is_left_out(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    import figures

    monkeypatch.chdir(tmp_path)
    figures.main(["--only", "codes", "--assets", str(tmp_path)])
    assert "out/vqvae/model.pt is missing" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
