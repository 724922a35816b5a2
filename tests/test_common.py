"""common.py: the data is what it should be, and files are written whole or not at all."""

import gzip
import math
import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from helpers import IMAGES, ROOT
from PIL import Image
from torchvision import datasets

import common

RAW = ROOT / "data" / "MNIST" / "raw"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(monkeypatch):
    """The address of a web server with the four files, which stands for all mirrors."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(RAW)))
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
    yield address
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def raw(mirror, tmp_path):
    """A folder with a copy of the four files."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    shutil.copytree(RAW, raw, ignore=shutil.ignore_patterns("*ubyte"))
    return raw


def load(raw):
    return common.load_mnist(raw.parents[1])


def error_of(raw):
    """The message of load_mnist, which must fail with one line."""
    with pytest.raises(OSError, match=r"\A[^\n]+\Z") as error:
        load(raw)
    return str(error.value)


def as_bytes(images):
    return (255 * images).round().byte().numpy()


def names(folder):
    return sorted(os.listdir(folder))


def test_images_are_floats_in_0_to_1():
    train_x, _, test_x, _ = IMAGES
    assert train_x.shape == (60000, 1, 28, 28)
    assert test_x.shape == (10000, 1, 28, 28)
    assert train_x.dtype == test_x.dtype == torch.float32
    assert train_x.min() == test_x.min() == 0
    assert train_x.max() == test_x.max() == 1


def test_images_are_those_of_mnist():
    train_x, _, test_x, _ = IMAGES
    assert as_bytes(train_x).sum() == 1_567_298_545
    assert as_bytes(test_x).sum() == 264_923_200


def test_labels_are_those_of_mnist():
    _, train_y, _, test_y = IMAGES
    assert train_y.dtype == test_y.dtype == torch.int64
    assert train_y[:5].tolist() == [5, 0, 4, 1, 9]
    assert train_y.shape == (60000,)
    assert test_y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_images_go_to_the_device():
    assert {part.device.type for part in common.load_mnist(device="meta")} == {"meta"}


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST"])
def test_other_dataset_has_its_own_folder_and_files(monkeypatch, tmp_path, name):
    monkeypatch.setattr(getattr(datasets, name), "resources", datasets.MNIST.resources)
    shutil.copytree(RAW, tmp_path / name / "raw")
    test_x = common.load_mnist(tmp_path, name)[2]
    assert torch.equal(test_x, IMAGES[2])


def test_home_folder_is_expanded(raw, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [])
    monkeypatch.setenv("HOME", str(raw.parents[2]))
    assert torch.equal(common.load_mnist("~/data")[3], IMAGES[3])


def test_missing_file_is_downloaded(raw):
    (raw / TEST_IMAGES).unlink()
    assert torch.equal(load(raw)[2], IMAGES[2])
    assert (raw / TEST_IMAGES).read_bytes() == (RAW / TEST_IMAGES).read_bytes()
    assert len(names(raw)) == 4  # and no leftovers


def test_missing_folder_is_created(mirror, tmp_path):
    assert torch.equal(common.load_mnist(tmp_path / "new")[0], IMAGES[0])
    assert len(names(tmp_path / "new" / "MNIST" / "raw")) == 4


def test_second_mirror_is_asked_if_the_first_fails(raw, mirror, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{mirror}nowhere/", mirror])
    (raw / TEST_LABELS).unlink()
    assert torch.equal(load(raw)[3], IMAGES[3])


def test_failed_download_is_one_line_that_helps(raw, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody answers
    (raw / TEST_LABELS).unlink()
    message = error_of(raw)
    assert message.startswith(f"{raw / TEST_LABELS} is missing")
    assert "http://127.0.0.1:9/: <urlopen error" in message
    assert message.endswith(f"connect to the network, or put the four .gz files into {raw}")


def test_failed_download_creates_no_folders(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{mirror}nowhere/"])
    assert "404" in error_of(tmp_path / "none" / "MNIST" / "raw")
    assert names(tmp_path) == []


def test_answer_that_is_not_http_is_one_line(raw, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.wfile.write(b"nonsense\r\n"))
    (raw / TEST_LABELS).unlink()
    assert "nonsense" in error_of(raw)


def test_download_that_is_cut_off_leaves_nothing(raw, monkeypatch):
    monkeypatch.setattr(Handler, "copyfile", lambda self, file, out: out.write(file.read(1000)))
    (raw / TEST_LABELS).unlink()
    assert "corrupted" in error_of(raw)
    assert len(names(raw)) == 3


def test_other_file_on_the_mirror_is_refused(raw, monkeypatch):
    monkeypatch.setattr(Handler, "copyfile", lambda self, file, out: out.write(b"x" * 4542))
    (raw / TEST_LABELS).unlink()
    assert "corrupted" in error_of(raw)
    assert len(names(raw)) == 3


def test_two_runs_may_download_at_once(raw):
    (raw / TEST_IMAGES).unlink()
    results = []
    threads = [threading.Thread(target=lambda: results.append(load(raw))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert all(torch.equal(result[2], IMAGES[2]) for result in results)
    assert len(names(raw)) == 4


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "packed again"])
def test_wrong_file_is_named_and_kept(raw, damage):
    good = (raw / TEST_IMAGES).read_bytes()
    wrong = {
        "truncated": good[:5000],
        "altered": good[:9000] + b"x" + good[9001:],
        "empty": b"",
        "packed again": gzip.compress(gzip.decompress(good), 1),
    }[damage]
    (raw / TEST_IMAGES).write_bytes(wrong)
    assert f"{raw / TEST_IMAGES} is not the original" in error_of(raw)
    assert (raw / TEST_IMAGES).read_bytes() == wrong


def test_unpacked_copies_are_ignored(raw):
    (raw / "train-images-idx3-ubyte").write_bytes(b"short")
    assert torch.equal(load(raw)[0], IMAGES[0])


def test_png_is_a_grid_with_ten_per_row(tmp_path):
    path = tmp_path / "grid.png"
    common.save_images(IMAGES[2][:25], path)
    with Image.open(path) as picture:
        assert picture.size == (10 * 30 + 2, 3 * 30 + 2)  # 28 pixels and a line of 2
        assert picture.mode == "L"
        pixels = np.asarray(picture)
    assert (pixels[2:30, 2:30] == as_bytes(IMAGES[2][0, 0])).all()
    assert (pixels[32:60, 32:60] == as_bytes(IMAGES[2][11, 0])).all()


def test_npy_is_an_array_of_bytes(tmp_path):
    common.save_images(IMAGES[2][:25], tmp_path / "all.npy")
    images = np.load(tmp_path / "all.npy")
    assert images.dtype == np.uint8
    assert (images == as_bytes(IMAGES[2][:25, 0])).all()


def film_of(frames, path):
    """Save frames as a GIF and read it -> (pixels of each frame, milliseconds of each frame)."""
    common.save_images(frames, path)
    pixels = []
    times = []
    with Image.open(path) as film:
        assert film.info["loop"] == 0  # for ever
        for i in range(film.n_frames):
            film.seek(i)
            pixels.append(np.asarray(film.convert("L")))
            times.append(film.info["duration"])
    return pixels, times


def test_gif_has_all_frames_and_rests_on_the_last(tmp_path):
    _, times = film_of(torch.rand(60, 30, 1, 28, 28), tmp_path / "film.gif")
    assert times == [80] * 59 + [2000]


def test_gif_of_one_frame_rests_on_it(tmp_path):
    path = tmp_path / "film.gif"
    common.save_images(torch.rand(1, 30, 1, 28, 28), path)
    with Image.open(path) as film:
        assert film.n_frames == 1


def test_gif_shows_grids_in_16_greys(tmp_path):
    frames = torch.rand(3, 12, 1, 28, 28)
    pixels, _ = film_of(frames, tmp_path / "film.gif")
    for picture, frame in zip(pixels, frames):
        assert picture.shape == (2 * 30 + 2, 10 * 30 + 2)
        shown = picture[2:30, 2:30]
        assert np.abs(shown - 255 * frame[0, 0].numpy()).max() <= 9
        assert len(np.unique(shown)) == 16


def test_folder_is_created_and_holds_only_the_file(tmp_path):
    path = tmp_path / "new" / "folder" / "grid.png"
    common.save_images(IMAGES[2][:1], path)
    assert names(path.parent) == ["grid.png"]


def test_last_file_is_replaced(tmp_path):
    path = tmp_path / "all.npy"
    common.save_images(torch.zeros(1, 1, 8, 8), path)
    common.save_images(torch.ones(1, 1, 8, 8), path)
    assert np.load(path).min() == 255


@pytest.mark.parametrize("name", ["grid.jpg", "grid", "grid.PNG"])
def test_other_suffix_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"\A[^\n]+\.gif[^\n]+\Z"):
        common.save_images(torch.zeros(1, 1, 8, 8), tmp_path / name)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "name, shape",
    [
        ("grid.png", (28, 28)),
        ("grid.png", (1, 28, 28)),
        ("grid.png", (1, 3, 8, 8)),
        ("grid.png", (0, 1, 8, 8)),
        ("grid.png", (2, 1, 1, 8, 8)),
        ("film.gif", (2, 1, 8, 8)),
        ("all.npy", (1, 8, 8)),
    ],
)
def test_other_shape_is_refused(tmp_path, name, shape):
    with pytest.raises(ValueError, match="images of shape"):
        common.save_images(torch.zeros(shape), tmp_path / name)
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1])
def test_value_outside_the_range_is_refused_and_the_old_file_kept(tmp_path, value):
    path = tmp_path / "all.npy"
    images = torch.zeros(1, 1, 8, 8)
    common.save_images(images, path)
    images[0, 0, 3, 3] = value
    with pytest.raises(ValueError, match="NaN"):
        common.save_images(images, path)
    assert np.load(path).max() == 0


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "all.npy"
    common.save_images(torch.zeros(1, 1, 8, 8), path)

    def replace(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        common.save_images(torch.ones(1, 1, 8, 8), path)
    assert np.load(path).max() == 0
    assert names(tmp_path) == ["all.npy"]
