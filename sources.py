"""What --data takes other than a folder of images: a list of paths, an .npz, torchvision's data sets."""

import os

import numpy as np
from torchvision import datasets

from common import EXTENSIONS, ImageArray, ImageFiles, UserError, first_line

NAMED_DATA = ("cifar10", "cifar100", "stl10", "cars")


def open_source(cfg, root, split):
    """As common.open_data, for a `root` that is a file, or None if there is nothing of that name."""
    if cfg.data in NAMED_DATA:
        try:
            return open_torchvision(cfg.data, cfg.in_chans, split, cfg.download)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--data {cfg.data}: {first_line(error)} (--download)") from None
    if root is None:
        raise UserError(f"--data {cfg.data} does not exist: give a folder of images, a .txt list of paths, "
                        f"an .npz, or shapes|{'|'.join(NAMED_DATA)}; or try --demo")
    if root.suffix.lower() in EXTENSIONS:
        raise UserError(f"--data {root} is one image: give its folder")
    if root.suffix == ".npz":
        return open_npz(root, cfg.in_chans, split)
    return open_list(root, cfg.in_chans, split, cfg.exif != "ignore")


def open_list(path, in_chans, split, turn):
    """ImageFiles of a text file with one path per line, relative to it or absolute."""
    lines = [line.rstrip("\r") for line in os.fsdecode(path.read_bytes()).split("\n") if line.strip()]
    if not lines or split not in ("pretrain", "all"):
        raise UserError(f"--data {path}: a list of {len(lines)} paths, for pre-training: no labels")
    paths = [os.path.join(path.parent, line) for line in lines]
    return ImageFiles(paths, [-1] * len(paths), None, in_chans, turn)


def open_npz(path, in_chans, split):
    """One .npz: `images` uint8 (N, H, W[, C]); `labels`, (N,) or (N, 1), numbers (-1 = none) or words;
    `split` (N,): 0 or "train", else held out."""
    arrays = dict(np.load(path, allow_pickle=False))
    images = arrays.get("images", np.empty(0))
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.dtype != np.uint8:
        raise UserError(f"{path} has {sorted(arrays)}; expected `images`, uint8 (N, H, W, C)")
    marks = arrays.get("split", np.zeros(len(images), np.int64))
    labels = arrays.get("labels", np.full(len(images), -1))
    for name, values in (("split", marks), ("labels", labels)):
        if values.size != len(images) or len(values) != len(images) or values.dtype.kind not in "iubUS":
            raise UserError(f"{path}: `{name}` is {values.dtype} {values.shape}; expected a whole number or "
                            f"a word for each of {len(images)} images")
    marks, labels = marks.ravel(), labels.ravel()
    held_out = (marks.astype(str) != "train") if marks.dtype.kind in "US" else (marks != 0)
    if labels.dtype.kind in "US":
        classes, labels = np.unique(labels.astype(str), return_inverse=True)
        classes = classes.tolist()
    else:
        labels = labels.astype(np.int64)
        if len(labels) and not -1 <= labels.min() <= labels.max() < 100_000:
            raise UserError(f"{path}: `labels` are {labels.min()} to {labels.max()}; expected -1 to 99,999")
        classes = [str(i) for i in range(labels.max(initial=-1) + 1)] or None
    chosen = np.flatnonzero({"val": held_out, "all": held_out | True}.get(split, ~held_out))
    if not len(chosen):
        raise UserError(f"{path} has no image for {split}: mark them in `split` (N,), 0 = train, 1 = val")
    if classes and split in ("train", "val") and labels[chosen].min() < 0:
        raise UserError(f"{path}: `labels` are -1, none, of {(labels[chosen] < 0).sum()} images for {split}")
    images = images if len(chosen) == len(images) else images[chosen]  # no copy of all of them
    names = [f"{path.name}[{i}]" for i in chosen]
    return ImageArray(images, names, labels[chosen], classes, in_chans)


def open_torchvision(name, in_chans, split, download):
    """One of NAMED_DATA, in data/; all but cars are fetched there with --download."""
    if download and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--download: fetch the data with one process first (python, not torchrun)")
    part = "test" if split == "val" else "train"
    if name == "cars":  # its `loader` hands over paths in place of decoded images
        data = datasets.StanfordCars("data", split=part, loader=str)
        paths, labels = zip(*((path, label) for path, label in data), strict=True)
        return ImageFiles(paths, labels, data.classes, in_chans)
    if name == "stl10":
        part = "train+unlabeled" if split == "pretrain" else part
        data = datasets.STL10("data", part, download=download)
        images, labels = data.data.transpose(0, 2, 3, 1), data.labels
    else:
        data = getattr(datasets, name.upper())("data", train=part == "train", download=download)
        images, labels = data.data, data.targets
    return ImageArray(images, [f"{name}[{i}]" for i in range(len(data))], labels, data.classes, in_chans)
