"""What --data takes other than a folder of images (a list, an .npz, torchvision's data sets), and which
labelled images are held out."""

import csv
import hashlib
import os
import zipfile

import numpy as np
from torchvision import datasets

from common import (
    EXTENSIONS,
    ImageArray,
    ImageFiles,
    UserError,
    data_path,
    first_line,
    open_folder,
    print0,
    tell_others,
)
from shapes import Shapes
from shards import find_shards, open_shards

NAMED_DATA = ("cifar10", "cifar100", "stl10", "cars")
HELD_OUT = ("val", "validation", "valid", "test")  # folders next to train/, the first one that is there
LABELS = {"label", "labels", "class", "category", "target"}  # heads of a list's column


# ---- with labels -------------------------------------------------------------------------------------------


def open_labelled(cfg):
    """{"train": images, "val": held-out ones} of --data, labelled, with the same classes. Held out are those
    of --val, a share --val_split of each class, or what the data name so."""
    if not cfg.val and not cfg.val_split:
        source = open_part(cfg, cfg.data, "train")
        return {"train": source, "val": open_part(cfg, cfg.data, "val", source.classes)}
    source = open_part(cfg, cfg.data, "rest")
    if cfg.val:
        return {"train": source, "val": open_part(cfg, cfg.val, "all", source.classes)}
    return hold_out(source, cfg.val_split)


def held_out_folder(root):
    """The first of HELD_OUT in the folder `root`, or None"""
    return next((root / name for name in HELD_OUT if (root / name).is_dir()), None)


def open_part(cfg, data, split, classes=None):
    """Labelled images of `data`: "train" or "val", where there are both, or "all"; "rest" is "train" if there
    is one, else "all". classes: those that `data` may have."""
    root, held_out = data_path(data), None
    part = root
    if root and root.is_dir() and split != "all":
        held_out = held_out_folder(root)
        train = root / "train" if (root / "train").is_dir() else None
        part = held_out if split == "val" else train or (root if split == "rest" else None)
        if not part:
            lacks = "train/" if split == "train" else "val/, validation/, valid/ or test/"
            raise UserError(f"--data {root} has no {lacks}: expected train/CLASS/*.jpg and "
                            "val/CLASS/*.jpg, or CLASS/*.jpg and --val_split 0.2 or --val DIR")
        if split == "val":
            print0(f"held out: {part}")
        elif part == train:
            tell_others(part, held_out if split == "train" else None)
    if part and part.is_dir():
        source = open_folder(part, cfg.in_chans, cfg.exif != "ignore")
    elif data == "shapes":
        if split not in ("train", "val"):
            raise UserError("--data shapes says itself what is held out: leave out --val and --val_split")
        source = Shapes(cfg.img_size, cfg.in_chans, split)
    else:
        source = open_source(cfg, root, "train" if split == "rest" else split, data)
    where = part or data
    if not source.classes:
        some = [source.name(i) for i in range(len(source)) if os.path.dirname(source.name(i)) == str(part)]
        if 0 < len(some) < len(source):
            raise UserError(f"{some[0]} is in no class's folder ({len(some)} such images): move it into one, "
                            "or remove it")
        raise UserError(f"{where} has no labels: expected CLASS/*.jpg, a list of lines path,label, or an "
                        ".npz with `labels`")
    if source.labels.min() < 0 and data != "shapes":
        raise UserError(f"{where}: {(source.labels < 0).sum()} of {len(source)} `labels` are -1, none")
    if classes and source.classes != classes:
        if unknown := sorted(set(source.classes) - set(classes)):
            raise UserError(f"{where}: {unknown[0]} is no class of the training images")
        place = np.array([classes.index(name) for name in source.classes])
        source.labels, source.classes = place[source.labels], classes
    return source


def open_held_out(cfg, classes=None):
    """The images to evaluate on: those of open_labelled's "val", or all of --data that hold none out."""
    if cfg.val:
        return open_part(cfg, cfg.val, "all", classes)
    if cfg.val_split:
        return hold_out(open_part(cfg, cfg.data, "rest", classes), cfg.val_split)["val"]
    root = data_path(cfg.data)
    whole = root and root.suffix != ".npz" and not ((root / "train").is_dir() or held_out_folder(root))
    if whole:
        print0(f"all of {cfg.data} is evaluated, as nothing says what is held out")
    return open_part(cfg, cfg.data, "all" if whole else "val", classes)


def next_steps(run):
    """Commands to type after pre-training, which fit the data: to fine-tune where there are labels, else to
    look at predictions and features."""
    cfg, weights, out = run.cfg, f"{run.out}/encoder.pth", f"{run.out}_finetune"
    if cfg.demo and cfg.data == "shapes":
        return [run.command("finetune.py", mode="linear", weights=weights, out=out) + " --demo"]
    root, held_out = data_path(cfg.data), cfg.data in NAMED_DATA or cfg.data == "shapes"
    if root and root.is_dir():
        held_out = (root / "train").is_dir() and held_out_folder(root)
    elif root and root.suffix == ".npz":
        held_out = "split" in np.load(root).files
    if run.source.classes and len(run.source.classes) > 1:
        share = None if held_out else 0.2
        return [run.command("finetune.py", data=cfg.data, val_split=share, weights=weights, out=out)]
    picture, features = f"{run.out}/drawn.png", f"{run.out}/features.npy"
    return [run.command(f"{run.method}.py", draw=f"{run.out}/last.pth", data=cfg.data, out=picture),
            run.command("finetune.py", mode="features", weights=weights, data=cfg.data, out=features)]


class Subset:
    """Some images of a source."""

    def __init__(self, source, numbers):
        self.source, self.numbers, self.labels = source, numbers, source.labels[numbers]
        self.classes, self.in_chans, self.turn = source.classes, source.in_chans, source.turn

    def __len__(self):
        return len(self.numbers)

    def name(self, index):
        return self.source.name(self.numbers[index])

    def read(self, index):
        return self.source.read(self.numbers[index])


def hold_out(source, share):
    """{"train": ..., "val": ...}: of each class this share, rounded, at least one image and not all. Which
    ones depends on the files' names and folders alone, so every run with these images holds out the same."""
    names = [source.name(i) for i in range(len(source))]
    root = os.path.dirname(os.path.commonprefix(names))
    digests = [hashlib.blake2b(os.fsencode(os.path.relpath(name, root or None))).digest() for name in names]
    numbers = {"train": [], "val": []}
    for kind in range(len(source.classes)):
        members = sorted(np.flatnonzero(source.labels == kind), key=digests.__getitem__)
        n = min(max(1, round(share * len(members))), len(members) - 1) if members else 0
        numbers["val"] += members[:n]
        numbers["train"] += members[n:]
    lone = [name for name, n in zip(source.classes, np.bincount(source.labels), strict=True) if n == 1]
    print0(f"--val_split {share}: {len(numbers['val'])} of {len(source)} images are held out, of each class "
           "its share, the same ones in every run" + f"; {len(lone)} classes have one image, to train on: "
           f"{', '.join(lone[:5])}" * bool(lone))
    if not numbers["val"]:
        raise UserError(f"--val_split {share} of {len(source)} images: every class has one image alone")
    return {part: Subset(source, np.array(sorted(some))) for part, some in numbers.items()}


# ---- files and data sets -----------------------------------------------------------------------------------


def open_source(cfg, root, split, data=None):
    """As common.open_data, for a `root` that is a file, or None if there is nothing of that name."""
    data, turn = data or cfg.data, cfg.exif != "ignore"
    if shards := find_shards(root or data):
        if split == "val":
            raise UserError(f"--data {data}: a tar does not say what is held out: add --val TARS, or "
                            "--val_split 0.2")
        return open_shards(shards, cfg.in_chans, turn)
    if root is None and data not in NAMED_DATA:
        flag = "--predict" if getattr(cfg, "predict", None) else "--data"
        raise UserError(f"{flag} {data} does not exist: give a folder of images, a list of paths, .tar, "
                        f".npz, or shapes|{'|'.join(NAMED_DATA)}; or try --demo")
    try:
        if data in NAMED_DATA:
            return open_torchvision(data, cfg.in_chans, split, cfg.download)
        if root.suffix.lower() in EXTENSIONS:
            return ImageFiles([root], [-1], None, cfg.in_chans, turn)
        if root.suffix == ".npz":
            return open_npz(root, cfg.in_chans, split)
        return open_list(root, cfg.in_chans, split, turn)
    except (OSError, RuntimeError, ValueError, IndexError, csv.Error, zipfile.BadZipFile) as error:
        hint = " (--download)" if data in NAMED_DATA else ""
        raise UserError(f"--data {data}: {first_line(error)}{hint}") from None


def read_rows(path):
    """[[path, label], ...] or [[path], ...] of a list: .csv with `,`, `;` or tabs, under a head or not; else
    a path per line, with `,` or a tab before a label."""
    text = os.fsdecode(path.read_bytes()).removeprefix("\ufeff")
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    if path.suffix.lower() != ".csv":  # a path itself may have a comma
        return [[line] if not ("," in line or "\t" in line) or (path.parent / line).exists()
                else line.rsplit("\t" if "\t" in line else ",", 1) for line in lines]
    mark = max(",;\t", key=lambda mark: lines[0].count(mark)) if lines else ","
    rows, columns = list(csv.reader(lines, delimiter=mark, skipinitialspace=True)), [0, 1]
    if len(rows) > 1 and not (path.parent / rows[0][0]).exists() and (path.parent / rows[1][0]).exists():
        head = rows.pop(0)
        columns[1] = next((i for i, name in enumerate(head) if name.strip().lower() in LABELS), 1)
        print0(f"{path}: read are the columns {', '.join(head[i] for i in columns if i < len(head))}")
    return [[row[i].strip() for i in columns if i < len(row)] for row in rows]


def open_list(path, in_chans, split, turn):
    """ImageFiles of a text file: read_rows. Paths are relative to it, or absolute."""
    rows = read_rows(path)
    if split == "val":
        raise UserError(f"--data {path}: a list does not say what is held out: add --val LIST, or "
                        "--val_split 0.2")
    if not rows:
        raise UserError(f"{path} lists 0 paths: expected a line for each image")
    bare = [row[0] for row in rows if not any(row[1:])]
    if len(bare) == len(rows):
        paths = [str(path.parent / name) for name in bare]
        return ImageFiles(paths, [-1] * len(paths), None, in_chans, turn)
    if bare:
        raise UserError(f"{path} has {len(rows)} paths, {len(rows) - len(bare)} with a label; {bare[0]!r} "
                        "has none")
    labelled = dict(rows)
    if twice := [name for name, label in rows if labelled[name] != label]:
        raise UserError(f"{path}: {twice[0]!r} is listed with two labels")
    if len(labelled) < len(rows):  # else one could be trained on and held out
        print0(f"{path}: {len(rows) - len(labelled)} lines are there twice, and count once")
    numbers = all(label.isdecimal() for label in labelled.values())
    classes = sorted(set(labelled.values()), key=int if numbers else str)
    index = {name: i for i, name in enumerate(classes)}
    paths = [str(path.parent / name) for name in labelled]
    return ImageFiles(paths, [index[y] for y in labelled.values()], classes, in_chans, turn)


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
        raise UserError(f"{path} has no image for {split}: mark them in `split` (N,), 0 = train, 1 = val; "
                        "or --val_split 0.2")
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
