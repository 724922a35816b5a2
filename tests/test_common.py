"""common.py: the data is what it should be, and pictures are written whole or not at all."""

import gzip
import math
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from helpers import IMAGES, ROOT, cli
from PIL import Image

import common


def test_load_mnist():
    train_x, train_y, test_x, test_y = IMAGES
    assert train_x.shape == (60000, 1, 28, 28)
    assert test_x.shape == (10000, 1, 28, 28)
    assert train_x.dtype == test_x.dtype == torch.uint8
    assert train_y.dtype == test_y.dtype == torch.int64
    assert train_x.sum() == 1_567_298_545
    assert train_y[:5].tolist() == [5, 0, 4, 1, 9]
    assert test_y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


class Mirror:
    """A folder with the data, and a mirror to download it from; down: there is no network."""

    def __init__(self, root):
        self.root = root
        self.raw = root / "MNIST" / "raw"
        self.down = False
        shutil.copytree(ROOT / "data/MNIST/raw", self.raw, ignore=shutil.ignore_patterns("*ubyte"))

    def fetch(self, url):
        if self.down:
            raise OSError("<urlopen error no network>\nsecond line")
        time.sleep(0.1)
        return (ROOT / "data/MNIST/raw" / url.split("/")[-1]).read_bytes()


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    mirror = Mirror(tmp_path)
    monkeypatch.setattr(common, "_fetch", mirror.fetch)
    return mirror


def test_missing_file_is_downloaded_or_gets_one_line(mirror):
    path = mirror.raw / "t10k-images-idx3-ubyte.gz"
    data = path.read_bytes()
    path.unlink()
    mirror.down = True
    with pytest.raises(OSError, match="no network") as error:
        common.load_mnist(mirror.root)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    mirror.down = False
    assert torch.equal(common.load_mnist(mirror.root)[2], IMAGES[2])
    assert path.read_bytes() == data
    assert len(os.listdir(mirror.raw)) == 4  # and no leftovers


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "no gzip"])
def test_damaged_file_is_named_and_kept(mirror, damage):
    path = mirror.raw / "t10k-images-idx3-ubyte.gz"
    data = path.read_bytes()
    bad = {
        "truncated": data[:5000],
        "altered": data[:9000] + b"x" + data[9001:],
        "empty": b"",
        "no gzip": b"<html>404</html>",
    }[damage]
    path.write_bytes(bad)
    with pytest.raises(OSError, match="damaged") as error:
        common.load_mnist(mirror.root)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert path.read_bytes() == bad


def test_same_data_packed_otherwise_is_good_and_kept(mirror):
    path = mirror.raw / "t10k-labels-idx1-ubyte.gz"
    packed = gzip.compress(gzip.decompress(path.read_bytes()), mtime=7)
    path.write_bytes(packed)
    assert torch.equal(common.load_mnist(mirror.root)[3], IMAGES[3])
    assert path.read_bytes() == packed


def test_other_data_of_that_name_is_refused_and_kept(mirror):
    path = mirror.raw / "t10k-labels-idx1-ubyte.gz"
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[100] ^= 1
    packed = gzip.compress(bytes(data))
    path.write_bytes(packed)
    with pytest.raises(OSError, match="original data"):
        common.load_mnist(mirror.root)
    assert path.read_bytes() == packed


def test_wrong_data_dir_is_one_line_and_leaves_no_folders(monkeypatch, capsys, tmp_path):
    def fetch(url):
        raise OSError("no network")

    monkeypatch.setattr(common, "_fetch", fetch)
    folders = "--data-dir", tmp_path / "none", "--out-dir", tmp_path / "out"
    status, _, err = cli(monkeypatch, capsys, "vae", *folders)
    assert status == 1
    assert err.count("\n") == 1
    assert "train-images-idx3-ubyte.gz" in err
    assert os.listdir(tmp_path) == []


def test_home_folder(mirror, monkeypatch):
    monkeypatch.setenv("HOME", str(mirror.root.parent))
    assert torch.equal(common.load_mnist(f"~/{mirror.root.name}")[3], IMAGES[3])


def test_unpacked_copies_are_never_trusted(mirror):
    (mirror.raw / "train-images-idx3-ubyte").write_bytes(b"short")
    assert torch.equal(common.load_mnist(mirror.root)[0][-1], IMAGES[0][-1])


def test_four_loads_at_once(mirror):
    for name in os.listdir(mirror.raw):
        if not name.startswith("train-images"):
            (mirror.raw / name).unlink()
    results = []

    def load():
        results.append(common.load_mnist(mirror.root))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result[2], IMAGES[2]) for result in results)
    assert len(os.listdir(mirror.raw)) == 4  # and no leftovers


def test_save_png(tmp_path):
    path = tmp_path / "new" / "grid.png"
    common.save_images(IMAGES[2][:25] / 255, path)
    with Image.open(path) as picture:
        assert picture.size == (302, 92)
        assert picture.mode == "L"
        first = np.asarray(picture)[2:30, 2:30]
    assert (first == IMAGES[2][0, 0].numpy()).all()


def test_save_npy(tmp_path):
    common.save_images(IMAGES[2][:25] / 255, tmp_path / "all.npy")
    images = np.load(tmp_path / "all.npy")
    assert images.dtype == np.uint8
    assert (images == IMAGES[2][:25, 0].numpy()).all()


def test_save_gif(tmp_path):
    frames = torch.rand(60, 30, 1, 28, 28)
    frames[-1] = 1
    path = tmp_path / "film.gif"
    common.save_images(frames, path)
    assert path.stat().st_size < 1_000_000
    with Image.open(path) as film:
        assert film.info["loop"] == 0
        assert film.n_frames >= 10
        assert film.info["duration"] == 80
        film.seek(film.n_frames - 1)
        assert film.info["duration"] == 2000  # rests on the last
        assert film.convert("L").getpixel((10, 10)) == 255


def test_save_images_refuses_and_keeps(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    good = torch.zeros(1, 1, 8, 8)
    common.save_images(good, path)
    before = path.read_bytes()
    nan = good.clone()
    nan[0, 0, 0, 0] = math.nan
    shapes = torch.zeros(4, 28, 28), torch.zeros(1, 3, 8, 8), torch.zeros(2, 1, 1, 8, 8)
    for bad in (nan, good - 0.1, good + 1.1, good[:0], *shapes):
        with pytest.raises(ValueError, match="images"):
            common.save_images(bad, path)
    for name in ("film.gif", "grid.jpg", "grid"):
        with pytest.raises(ValueError, match="gif|must end in"):
            common.save_images(good, tmp_path / name)

    def replace(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk"):
        common.save_images(good + 1, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["grid.png"]
