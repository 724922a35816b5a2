"""Loading data and saving pictures, for all ten scripts.

train_x, train_y, test_x, test_y = load_mnist()    # uint8 images (N, 1, 28, 28), int64 labels (N,)
save_images(images, "out/grid.png")                # .png a grid, .gif an animation, .npy an array
"""

import gzip
import hashlib
import io
import os
import urllib.request
import uuid
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from torchvision.utils import make_grid

# md5 of the unpacked files, to accept recompressed copies, such as some Linux distributions ship;
# torchvision knows the md5 of the published .gz files
UNPACKED_MD5 = {
    "MNIST": {
        "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte.gz": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte.gz": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte.gz": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte.gz": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}


def load_mnist(data_dir=None, dataset="MNIST", device="cpu"):
    """Load all 70,000 images as four tensors on one device; missing files are downloaded.

    The four .gz files in data_dir/dataset/raw are read directly and checked by md5 every time. The
    unpacked copies that torchvision makes beside them have no checksum, and are ignored.

    data_dir: folder that holds dataset/raw; None: the folder data beside this file
    dataset:  MNIST, FashionMNIST or KMNIST (names, md5 sums and mirrors are torchvision's)
    Returns   train_x (60000, 1, 28, 28) uint8, train_y (60000,) int64, and likewise test_x, test_y
    Raises    OSError, in one line, if a file is damaged, or is missing and cannot be downloaded;
              existing files are never replaced
    """
    if data_dir is None:
        data_dir = Path(__file__).parent / "data"
    raw = Path(data_dir).expanduser() / dataset / "raw"
    source = getattr(datasets, dataset)
    tensors = []
    for name, md5 in source.resources:  # train images, train labels, test images, test labels
        path = raw / name
        if not path.exists():
            _write(path, _download(source.mirrors, path, md5))
        unpacked_md5 = UNPACKED_MD5.get(dataset, {}).get(name)  # None for KMNIST
        data = np.frombuffer(_unpack(path, md5, unpacked_md5), np.uint8)
        if "images" in name:
            data = data[16:].reshape(-1, 1, 28, 28)  # skip the header of 16 bytes
        else:
            data = data[8:].astype(np.int64)
        tensors.append(torch.tensor(data, device=device))
    return tensors


def _md5(data):
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _unpack(path, md5, unpacked_md5):
    """The bytes inside a .gz file; OSError unless its content is the original."""
    packed = path.read_bytes()
    try:
        data = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise OSError(f"{path} is damaged ({error}): delete it to download it again") from error
    if _md5(packed) != md5 and _md5(data) != unpacked_md5:
        raise OSError(f"{path} does not hold the original data: move it away to download that")
    return data


def _download(mirrors, path, md5):
    """Download the file that is missing at path, from the first mirror that has it -> its bytes."""
    reasons = []
    for mirror in mirrors:
        try:
            data = _fetch(mirror + path.name)
        except (OSError, HTTPException) as error:
            reason = " ".join(str(error).split())  # on one line
            if not reason:
                reason = type(error).__name__
            reasons.append(reason)
            continue
        if _md5(data) == md5:
            return data
        reasons.append(f"{mirror} has another file of that name")
    raise OSError(
        f"{path} is missing, and downloading it failed ({'; '.join(reasons)}): "
        f"connect to the network, or put the data set's four .gz files into {path.parent}"
    )


def _fetch(url):
    """The bytes at a web address; it raises OSError if there is no answer for 30 seconds."""
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read()


def _write(path, data):
    """Write bytes to path atomically; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # unique: others may write, too
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_images(images, path):
    """Write images in [0, 1]; the suffix of path chooses the format.

    .png  (N, 1, H, W): a grid, ten images per row
    .gif  (T, N, 1, H, W): an animation of such grids, in 16 greys. It loops, and pauses on its last
          frame. Only every second, third, ... frame is shown if all would exceed 1 MB
    .npy  (N, 1, H, W): a uint8 array (N, H, W), 0 to 255

    The folder is created, and a file of that name is replaced atomically.
    Raises ValueError for another suffix or shape, for NaN and for values outside [0, 1]
    """
    images = images.detach().float().cpu()
    path = Path(path)
    dimensions = {".png": 4, ".gif": 5, ".npy": 4}
    if path.suffix not in dimensions:
        raise ValueError(f"{path} must end in .png, .gif or .npy")
    if images.ndim != dimensions[path.suffix] or images.shape[-3] != 1 or images.numel() == 0:
        raise ValueError(f"images of shape {tuple(images.shape)} do not fit a {path.suffix} file")
    if not ((images >= 0) & (images <= 1)).all():  # NaN fails both
        raise ValueError("images must lie in [0, 1] and hold no NaN")
    file = io.BytesIO()
    if path.suffix == ".npy":
        np.save(file, (255 * images[:, 0]).round().byte().numpy())
        data = file.getvalue()
    elif path.suffix == ".png":
        _grid(images, 256).save(file, format="png")
        data = file.getvalue()
    else:
        data = _animate([_grid(frame, 16) for frame in images])
    _write(path, data)


def _grid(images, n_greys):
    """Images (N, 1, H, W) -> a picture with ten of them in each row."""
    grid = make_grid(images, nrow=10, pad_value=0.5)[0]  # (H', W'): one of three equal channels
    levels = (grid * (n_greys - 1)).round()  # 0 to n_greys - 1
    return Image.fromarray((levels * (255 / (n_greys - 1))).byte().numpy())


def _animate(frames, limit=1_000_000):
    """Pictures -> the bytes of a GIF of all frames or, above the limit, every second, third, ..."""
    for stride in range(1, len(frames) + 1):
        first = (len(frames) - 1) % stride  # so that the last frame is always shown
        shown = frames[first::stride]
        durations = [80] * (len(shown) - 1) + [2000]  # milliseconds
        file = io.BytesIO()
        shown[0].save(
            file,
            format="gif",
            save_all=True,
            append_images=shown[1:],
            duration=durations,
            loop=0,
        )
        if file.tell() < limit:
            break
    return file.getvalue()
