"""Loading MNIST and saving images, for all ten scripts."""

import gzip
import io
import os
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url
from torchvision.utils import make_grid


def load_mnist(data_dir=None, dataset="MNIST", device="cpu"):
    """Return train_x, train_y, test_x, test_y: 60,000 + 10,000 images and their labels.

    x is float32 (N, 1, 28, 28) in [0, 1], y is int64 (N,); all are on the given device.
    dataset is MNIST, FashionMNIST or KMNIST. Its four .gz files are read from data_dir/dataset/raw;
    data_dir is the folder data beside this file unless given. Missing files are downloaded.
    Raises OSError if that fails, or if a file is not the original. No file is ever replaced.
    """
    if data_dir is None:
        data_dir = Path(__file__).parent / "data"
    folder = Path(data_dir).expanduser() / dataset / "raw"
    source = getattr(datasets, dataset)
    tensors = []
    for name, md5 in source.resources:  # train images, train labels, test images, test labels
        path = folder / name
        if not path.exists():
            _download(path, md5, source.mirrors)
        if not check_integrity(path, md5):
            raise OSError(f"{path} is not the original: move it away to download the original")
        tensors.append(_read(path).to(device))
    return tensors


def _read(path):
    with gzip.open(path) as file:
        data = file.read()
    if "images" in path.name:
        pixels = np.frombuffer(data, np.uint8, offset=16)  # after the header
        return torch.tensor(pixels).view(-1, 1, 28, 28).float() / 255
    labels = np.frombuffer(data, np.uint8, offset=8)
    return torch.tensor(labels).long()


def _download(path, md5, mirrors):
    reasons = []
    for mirror in mirrors:
        try:
            data = _fetch(mirror + path.name, md5)
        except (OSError, RuntimeError, HTTPException) as error:
            reasons.append(f"{mirror}: {error}")
            continue
        _write(path, data)
        return
    reason = " ".join("; ".join(reasons).split())  # some errors end with a newline
    raise OSError(
        f"{path} is missing, and downloading it failed ({reason}): "
        f"connect to the network, or put the four .gz files into {path.parent}"
    )


def _fetch(url, md5):
    with TemporaryDirectory() as folder:
        download_url(url, folder, "part", md5)
        return Path(folder, "part").read_bytes()


def _write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as folder:  # os.replace needs the same disk
        part = Path(folder, path.name)
        part.write_bytes(data)
        os.replace(part, path)  # in one step: nobody ever sees half a file


def save_images(images, path):
    """Write images in [0, 1]; the suffix of path chooses the format.

    .png  (N, 1, H, W): a grid, ten images per row
    .gif  (T, N, 1, H, W): an animation of such grids, in 16 greys; it rests on the last frame
    .npy  (N, 1, H, W): an array (N, H, W) of uint8, 0 to 255

    The folder is created. A file of that name is replaced.
    Raises ValueError for another suffix or shape, for NaN and for values outside [0, 1].
    """
    path = Path(path)
    images = images.detach().float().cpu()
    _check(images, path.suffix)
    file = io.BytesIO()
    if path.suffix == ".npy":
        np.save(file, _to_bytes(images[:, 0]))
    elif path.suffix == ".png":
        _grid(images).save(file, "png")
    else:
        coarse = (images * 15).round() / 15  # fewer greys make a smaller file
        frames = [_grid(frame) for frame in coarse]
        times = [80] * len(frames)  # milliseconds
        times[-1] = 2000
        frames[0].save(file, "gif", save_all=True, append_images=frames[1:], duration=times, loop=0)
    _write(path, file.getvalue())


def _check(images, suffix):
    dimensions = {".png": 4, ".gif": 5, ".npy": 4}
    if suffix not in dimensions:
        raise ValueError(f"images are saved as .png, .gif or .npy, not as {suffix!r}")
    if images.ndim != dimensions[suffix] or images.shape[-3] != 1 or images.numel() == 0:
        raise ValueError(f"images of shape {tuple(images.shape)} do not fit a {suffix} file")
    if images.isnan().any() or images.min() < 0 or images.max() > 1:
        raise ValueError("images must lie in [0, 1] and hold no NaN")


def _grid(images):
    grid = make_grid(images, nrow=10, pad_value=0.5)
    return Image.fromarray(_to_bytes(grid[0]))  # its three channels are equal


def _to_bytes(images):
    return (255 * images).round().byte().numpy()
