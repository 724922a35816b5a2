"""README.md and docs/ are true: their commands and their code run, and stand for what they say."""

import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from helpers import IMAGES, ROOT, SCRIPTS, cli

import common
import diffusion
import gan
import made

README = (ROOT / "README.md").read_text()
EXPERIMENTS = (ROOT / "docs/experiments.md").read_text()
# one section per model: (name, text)
SECTIONS = re.findall(r"^### (\w+)\.py\n(.*?)(?=^### |\Z)", EXPERIMENTS, re.M | re.S)
SMALL_DIFFUSION = ["--channels", "8", "--n-inner", "1"]


def code_block(start):
    """The README's Python block that contains this text."""
    [block] = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if start in b]
    return block


def commands():
    """[(script, flags), ...] of the README's code blocks."""
    found = re.findall(r"^(?:pip install .* && )?python (\w+)\.py(.*?)(?:  #.*)?$", README, re.M)
    return [(name, shlex.split(flags)) for name, flags in found]


def test_commands_run_in_their_order(monkeypatch, capsys, tmp_path):
    """Each as a dry run of a small model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_mnist", lambda *_: IMAGES)  # FashionMNIST needs a network
    assert ("diffusion", ["--epochs", "10"]) in commands()
    for name, flags in commands():
        if "--resume" not in flags and "--sample" not in flags:
            flags = flags + ["--channels", "8", "--batch-size", "4"]
            if name == "diffusion":
                flags += ["--n-inner", "1"]
        status, _, err = cli(monkeypatch, capsys, name, *flags, "--dry-run", "--device", "cpu")
        assert (status, err) == (0, ""), flags


def test_readme_and_experiments_have_what_is_tested_here():
    assert len(commands()) >= 9
    assert sorted(name for name, _ in SECTIONS) == sorted(SCRIPTS)


@pytest.mark.parametrize("name, text", SECTIONS)
def test_flags_of_experiments_are_understood(name, text):
    for flags in re.findall(rf"`python {name}\.py ([^`]*)`", text):
        importlib.import_module(name).parse_args(shlex.split(flags))


BROKEN = [
    (name, old, new)
    for name, text in SECTIONS
    for old, new in re.findall(r"`([^`]+)` becomes\s+`([^`]+)`", text)
]


@pytest.mark.parametrize("name, old, new", BROKEN)
def test_changed_line_of_an_experiment_stands_in_the_script_and_trains(name, old, new, tmp_path):
    script = (ROOT / f"{name}.py").read_text()
    assert script.count(old) == 1
    path = tmp_path / f"{name}.py"
    path.write_text(script.replace(old, new))
    model = runpy.run_path(str(path))["Model"]()
    x = torch.rand(2, 1, 28, 28)
    loss = model.g_loss(2)[0] if name == "gan" else model.loss(x)[0]
    loss.backward()
    assert loss.isfinite()
    assert all(w.grad.isfinite().all() for w in model.parameters() if w.grad is not None)


def test_training_loop_of_the_readme_runs():
    space = {"batches": [(IMAGES[0][:4], IMAGES[1][:4])]}
    code = code_block("loss, metrics = model.loss(images, labels)")
    exec(code.replace("64", "2"), space)
    assert space["samples"].shape == (2, 1, 28, 28)


def test_training_loop_for_gan_moves_both_players():
    torch.manual_seed(0)
    before = gan.GAN().state_dict()
    torch.manual_seed(0)
    space = {"batches": [(IMAGES[0][:4], None)] * 2}
    exec(code_block("from gan import"), space)
    after = space["model"].state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"generator", "discriminator"}


def test_loading_lines_of_the_readme_complete_an_image(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = ["--hidden", "20", "--dry-run", "--batch-size", "4", "--device", "cpu"]
    made.main(flags)
    code = code_block("from made import").replace("out/made/", "out/made-dry/")
    space = {}
    exec(code.replace("64", "4"), space)
    assert space["nll"] > 0
    given = space["images"][:, :, :14]
    certain = given == given.round()  # binarising leaves these as they are
    assert torch.equal(space["whole_images"][:, :, :14][certain], given[certain])


def test_notebook_lines_of_the_readme_call_main(monkeypatch):
    calls = []
    monkeypatch.setattr(diffusion, "main", calls.append)
    exec(code_block("import diffusion\n"))
    assert calls == [["--epochs", "1", "--out-dir", "out/notebook"]]


def test_example_for_two_gpus_trains_with_two_processes(tmp_path):
    code = (ROOT / "docs/train_ddp.py").read_text()
    code = code.replace("range(1, 101)", "range(1, 21)").replace("hidden=400", "hidden=20")
    (tmp_path / "train_ddp.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "train_ddp.py"]
    variables = dict(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"^step 20 \| loss \d+\.\d$", result.stdout, re.M)
    made.MADE(hidden=20).load_state_dict(
        torch.load(tmp_path / "ddp.pt", weights_only=True)["model"]
    )


def test_ci_runs_the_commands_of_the_readme():
    lines = (ROOT / ".ci/run").read_text().split("\n")
    commands = [line for line in lines if line.startswith(("pip", "python -m", "ruff"))]
    assert len(commands) == 4
    for command in commands:
        assert f"\n{command.replace(' -q -r', ' -r')}\n" in README


def test_links_lead_somewhere():
    for path in [ROOT / "README.md", ROOT / "bench/README.md", *ROOT.glob("docs/*.md")]:
        text = path.read_text()
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
        for link in links:
            assert link.startswith("https://") or (path.parent / link).exists(), link
