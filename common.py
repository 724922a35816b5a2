"""Data in, pictures out: what the ten scripts import from here, and nothing else.

train_x, train_y, test_x, test_y = load_mnist()    # uint8 images (N, 1, 28, 28), int64 labels (N,)
save_images(images, "out/grid")                    # (N, 1, H, W) -> PNG, (T, N, 1, H, W) -> GIF
"""

import gzip
import io
import os
import socket
import tempfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url
from torchvision.utils import make_grid


def load_mnist(data_dir="data", dataset="MNIST", device="cpu"):
    """Load all 70,000 images as four tensors on one device; files that are missing are downloaded.

    The four .gz files in data_dir/dataset/raw are read directly and checked by md5 every time. The
    unpacked copies that torchvision makes beside them carry no checksum, so they are never used.

    data_dir: folder that holds dataset/raw, created if need be
    dataset:  MNIST, FashionMNIST or KMNIST (names, md5 sums and mirrors are torchvision's)
    Returns   train_x (60000, 1, 28, 28) uint8, train_y (60000,) int64, and likewise test_x, test_y
    Raises    OSError, in one line, if a file is missing or damaged and cannot be downloaded
    """
    source, raw = getattr(datasets, dataset), Path(data_dir) / dataset / "raw"
    tensors = []
    for name, md5 in source.resources:  # train images, train labels, test images, test labels
        if not check_integrity(raw / name, md5):
            _download(source, raw, name, md5)
        data = np.frombuffer(gzip.decompress((raw / name).read_bytes()), np.uint8)  # after a header
        data = data[16:].reshape(-1, 1, 28, 28) if "images" in name else data[8:].astype(np.int64)
        tensors.append(torch.tensor(data, device=device))
    return tensors


def _download(source, raw, name, md5):
    """Fetch one file into a private folder first: processes that start together cannot collide."""
    raw.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(30)  # seconds; without it a dead mirror hangs for ever
    with tempfile.TemporaryDirectory(dir=raw) as private:
        for mirror in source.mirrors:
            try:
                download_url(mirror + name, private, name, md5)
                return os.replace(Path(private) / name, raw / name)
            except (OSError, RuntimeError, HTTPException) as error:
                reason = str(error).partition("\n")[0] or type(error).__name__
    files = ", ".join(name for name, _ in source.resources)
    raise OSError(
        f"{raw / name} is missing or damaged, and downloading it failed ({reason}): "
        f"connect to the network, or put the four files {files} into {raw}"
    )


def save_images(images, path):
    """Write a grid of ten columns as PNG, or a sequence of such grids as an animated GIF.

    images: (N, 1, H, W) -> PNG;  (T, N, 1, H, W) -> GIF in 16 greys that loops and rests on its
            last frame, with as many of the T frames (each, each second, ...) as fit into 1 MB
    path:   without a suffix; the folder is created, a file of that name is replaced in one step
    Returns the path written
    Raises  ValueError for another shape, for NaN and for values outside [0, 1]
    """
    images = images.detach().float().cpu()
    if images.ndim not in (4, 5) or images.shape[-3] != 1 or 0 in images.shape:
        raise ValueError(f"not (N, 1, H, W) or (T, N, 1, H, W): {tuple(images.shape)}")
    if not ((images >= 0) & (images <= 1)).all():  # NaN fails both
        raise ValueError("images must lie in [0, 1] and hold no NaN")
    animated = images.ndim == 5
    levels = 15 if animated else 255
    frames = []
    for x in images if animated else images[None]:
        grid = make_grid(x, nrow=10, pad_value=0.5)[0]  # (H', W'), of three equal channels
        frames.append(Image.fromarray(((grid * levels).round() * (255 / levels)).byte().numpy()))
    for stride in range(1, len(frames) + 1):
        first, *others = frames[::-stride][::-1]  # counted from the last frame, which always stays
        data, durations = io.BytesIO(), [80] * len(others) + [2000]  # milliseconds
        options = dict(save_all=True, append_images=others, duration=durations, loop=0)
        first.save(data, **dict(options, format="gif") if animated else dict(format="png"))
        if data.tell() < 1_000_000:
            break
    path = Path(f"{path}.gif" if animated else f"{path}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        part.write_bytes(data.getvalue())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
