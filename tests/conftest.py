"""Fixtures for all tests."""

import pytest
import torch
from helpers import SMALL, main_of, size_flags

import common

torch.set_num_threads(1)  # the models are tiny: threads would mostly wait for each other


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A function that runs a script's main on 300 + 100 images of 8 x 8 and a tiny model, in an
    empty folder: small("vae", "--epochs", 2)."""
    data = [part[:n] for part, n in zip(SMALL, (300, 300, 100, 100))]
    monkeypatch.setattr(common, "load_mnist", lambda *_: data)
    monkeypatch.chdir(tmp_path)

    def run(name, *flags):
        main_of(name)(["--device", "cpu", *size_flags(name), *map(str, flags)])

    return run


@pytest.fixture
def float64():
    """Models and random numbers of the test are in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
