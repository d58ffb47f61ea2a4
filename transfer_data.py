"""The data of transfer_seg_det.py: label maps in ADE20K's layout, transforms of image and target together.

A target is a label map (H, W) uint8, in which IGNORE does not count, or, for detection, boxes and masks
(coco.py). They are plain tensors: torchvision resizes its tv_tensors.Mask by a rule that moves masks by up to
half a pixel."""

import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.ops import clip_boxes_to_image, masks_to_boxes, remove_small_boxes
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from common import (
    FORMATS,
    ImageFiles,
    UserError,
    collate,
    list_images,
    orientation,
    print0,
    stable_seed,
    time_limit,
)

IGNORE = 255  # label of pixels that do not count
SPLITS = {"train": ("training", "train", "train2017"), "val": ("validation", "val", "val2017")}


# ---- sources: len(), name(i), read(i) -> image (C, H, W), target; classes, in_chans, det -------------------
# And for --check_data: count(target), {class, or -1 where nothing is labelled: number}, of which `unit`.


def image_folder(root, split):
    found = [path for name in SPLITS[split] if (path := root / "images" / name).is_dir()]
    if not found:
        names = ", ".join(f"images/{name}/" for name in SPLITS[split])
        raise UserError(f"--data {root}: none of the folders {names} is there")
    return found[0]


def count_pixels(target):
    counts = torch.bincount(target.flatten(), minlength=IGNORE + 1).tolist()
    return Counter({-1 if kind == IGNORE else kind: n for kind, n in enumerate(counts) if n})


def labels_fit_stored(exif, paths, label_size, name):
    """Whether labels are drawn on pixels as stored, not as EXIF turns them. exif: "ignore", "apply", or
    "auto": judged by up to 2,000 images that a tag turns by 90 degrees. label_size(i) -> (height, width)."""
    if exif != "auto":
        return exif == "ignore"
    fits = {"stored": 0, "turned": 0}
    for i in np.linspace(0, len(paths), min(len(paths), 2000), endpoint=False, dtype=int):
        with suppress(OSError, ValueError), Image.open(paths[i], formats=FORMATS) as image:
            (w, h), size = image.size, None
            if orientation(image) >= 5 and w != h and image.format != "TIFF":  # Pillow turns TIFF itself
                size = label_size(i)
            fits["stored"] += size == (h, w)
            fits["turned"] += size == (w, h)
    if fits["stored"]:
        print0(f"{name}: the labels of {fits['stored']} rotated photographs fit the pixels as stored, of "
               f"{fits['turned']} as turned: all are read as {max(fits, key=fits.get)} (see --exif)")
    return fits["stored"] > fits["turned"]


def sizes_differ(what, labels, image):
    """ValueError unless two (height, width) are equal."""
    labels, image = tuple(labels), tuple(image)
    if labels != image:
        hint = "; if it has a rotation tag: --exif ignore, or apply" if labels[::-1] == image else ""
        raise ValueError(f"{what} {labels[0]} x {labels[1]} pixels, the image {image[0]} x {image[1]}{hint}")


class LabelMaps(ImageFiles):
    """images/SPLIT/**/NAME.jpg with annotations/SPLIT/**/NAME.png, one channel of class numbers, and a name
    per line in classes.txt (or ADE20K's objectInfo150.txt). zero_is_ignore: 0 stands for no class, 1 for the
    first. With lines `name r g b` maps are colours; that of the name `ignored` does not count. Where there
    are two classes and the training maps hold 0 and 255 alone, 255 is the second."""

    det, unit, count = False, "pixels", staticmethod(count_pixels)

    def __init__(self, root, split, cfg):
        self.images, self.zero_is_ignore = image_folder(root, split), cfg.zero_is_ignore
        paths = list_images(self.images)
        missing = [path for path in paths if not self.map_of(path).exists()]
        if missing:
            raise UserError(f"{len(missing)} of {len(paths)} images in {self.images} have no label map: "
                            f"expected {self.map_of(missing[0])}, for one")
        stored = labels_fit_stored(cfg.exif, paths, lambda i: self.map_size(paths[i]), self.images)
        classes, self.colours = self.read_classes(root)
        super().__init__(paths, [-1] * len(paths), classes, cfg.in_chans, turn=not stored)
        codes = self.colours or self.numbers(root)
        # By label, how a map shows it: a number, or r << 16 | g << 8 | b.
        self.codes = {label: code for code, label in reversed(codes.items()) if label != IGNORE}
        # By number, or by colour; the last place is that of all others.
        self.label_of = np.full((2**24 if self.colours else 2**8) + 1, -1, np.int16)
        self.label_of[list(codes)] = list(codes.values())

    def read_classes(self, root):
        """Names of the classes, and {r << 16 | g << 8 | b: label} or None."""
        lists = [path for name in ("classes.txt", "objectInfo150.txt") if (path := root / name).exists()]
        if not lists:
            raise UserError(f"--data {root} has no classes.txt: expected a name per line, in the maps' order")
        lines = lists[0].read_text("utf-8-sig", errors="replace").splitlines()
        names, most = [line.strip() for line in lines if line.strip()], IGNORE - self.zero_is_ignore
        if lists[0].name == "objectInfo150.txt":
            names = [line.split("\t")[-1] for line in names[1:]]
            if not self.zero_is_ignore:
                raise UserError(f"--data {root} is ADE20K, whose numbers begin with 1: add --zero_is_ignore")
        coloured = [re.fullmatch(r"(.*\S)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\d+)", name) for name in names]
        colours = None
        if any(coloured):
            if not all(coloured) or self.zero_is_ignore:
                raise UserError(f"{lists[0]}: expected `name r g b` in every line or in none, and a line "
                                "`ignored r g b` in place of --zero_is_ignore")
            codes = [int(match[2]) << 16 | int(match[3]) << 8 | int(match[4]) for match in coloured]
            every = [match[1] for match in coloured]
            names = [name for name in dict.fromkeys(every) if name != "ignored"]
            colours = {code: names.index(name) if name in names else IGNORE
                       for name, code in zip(every, codes, strict=True)}
        if not 0 < len(names) <= most:
            raise UserError(f"{lists[0]} has {len(names)} classes, expected 1 to {most}")
        return names, colours

    def numbers(self, root):
        """{number in a map: label}"""
        if self.holds_0_and_255(root):
            return {0: 0, 255: 1}
        classes = {int(self.zero_is_ignore) + i: i for i in range(len(self.classes))}
        return {0: IGNORE, 255: IGNORE, **classes}

    def map_of(self, path):
        annotations = self.images.parent.parent / "annotations"
        return annotations / Path(path).relative_to(self.images.parent).with_suffix(".png")

    def map_size(self, path):
        with Image.open(self.map_of(path), formats=FORMATS) as image:
            return image.height, image.width

    def holds_0_and_255(self, root):
        """Looks at up to 100 maps of the training images, for the held-out ones too."""
        maps = sorted((root / "annotations" / image_folder(root, "train").name).rglob("*.png"))
        values = set()
        for i in np.linspace(0, len(maps), min(len(maps), 100), endpoint=False, dtype=int):
            with suppress(OSError, ValueError), Image.open(maps[i], formats=FORMATS) as image:
                values |= set(np.unique(np.array(image)).tolist())
            if values - {0, 255}:
                return False
        if 255 not in values:
            return False
        if len(self.classes) != 2 or self.zero_is_ignore:
            raise UserError(f"the label maps of {root} hold 0 and 255 alone: expected two lines in "
                            "classes.txt, for 0 and for 255, and no --zero_is_ignore")
        print0(f"{self.images}: the label maps hold 0 and 255 alone: 255 is read as {self.classes[1]}")
        return True

    def read(self, index):
        image, _ = super().read(index)
        with time_limit(60), Image.open(self.map_of(self.name(index)), formats=FORMATS) as file:
            array = np.array(file.convert("RGB") if self.colours else file)
        if array.ndim != (3 if self.colours else 2):
            raise ValueError(f"the label map has the shape {array.shape}, expected one channel of class "
                             "numbers; for colours: lines `name r g b` in classes.txt")
        sizes_differ("the label map has", array.shape[:2], image.shape[1:])
        codes = array.astype(np.int32)
        codes = codes @ (65536, 256, 1) if self.colours else codes
        labels = self.label_of[codes.clip(-1, len(self.label_of) - 1)]
        if (labels < 0).any():
            code = int(codes[labels < 0].max())
            if self.colours:
                r, g, b = code.to_bytes(3, "big")
                raise ValueError(f"the label map has the colour {r} {g} {b}, which classes.txt does not list "
                                 "(`ignored r g b` for one that does not count)")
            hint = "" if self.zero_is_ignore else " from 0 on; list the background, or --zero_is_ignore"
            raise ValueError(f"the label map has number {code}, {len(self.classes)} classes are listed{hint}")
        return image, torch.from_numpy(labels.astype(np.uint8))


# ---- transforms: (image, target) -> (image, target) --------------------------------------------------------


def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def nearest(masks, size):
    """Resize (n, H, W)"""
    return TF.resize(masks, size, InterpolationMode.NEAREST_EXACT)


def random_corner(old, new):
    """[top, left] of a crop of the size `new`"""
    return [int(torch.randint(max(have - want, 0) + 1, ())) for have, want in zip(old, new, strict=True)]


def crop(x, corner, size, flip, fill, change=lambda x: x):
    """(C, h, w) -> (C, *size): cut out, changed, flipped, filled up on the right and below."""
    x = change(x[:, corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]])
    x = x.flip(-1) if flip else x
    return TF.pad(x, [0, 0, size[1] - x.shape[2], size[0] - x.shape[1]], fill=fill)


def mean_colour(image, mean):
    """In the image's own range."""
    return [round(255 * value) for value in mean] if image.dtype == torch.uint8 else list(mean)


def fit_short_side(image, short):
    """[height, width] with a short side of `short`, or, for long images, a long one of 4 times that."""
    h, w = image.shape[1:]
    scale = min(4 * short / max(h, w), short / min(h, w))
    return [max(1, round(scale * side)) for side in (h, w)]


def distort(image):
    """mmsegmentation's photometric distortion, each part with probability 1/2: brightness (plus up to 32 of
    255), contrast (a factor; before or after the next two), saturation (towards grey; there in HSV), hue.
    That of torchvision multiplies the brightness, takes contrast around the mean, and swaps channels."""
    brightness, contrast, saturation, hue, first = (torch.rand(5) < 0.5).tolist()
    x = TF.to_dtype(image, torch.float32, scale=True)
    factor = uniform(0.5, 1.5) if contrast else 1.0
    x = (x + uniform(-32, 32) / 255).clamp(0, 1) if brightness else x
    x = (x * factor).clamp(0, 1) if first else x
    if image.shape[0] == 3:
        x = TF.adjust_saturation(x, uniform(0.5, 1.5)) if saturation else x
        x = TF.adjust_hue(x, uniform(-0.1, 0.1)) if hue else x
    x = x if first else (x * factor).clamp(0, 1)
    return TF.to_dtype(x, image.dtype, scale=True)


def segmentation_crop(image, labels, cfg):
    """Resize to --jitter times the short side of --img_size; crop to it so that no class has 75 % (ten
    tries); flip; distort the colours; fill up with the mean colour and IGNORE (BEiT's and MAE's code)."""
    size, scale = cfg.img_size, uniform(*cfg.jitter)
    new = [max(1, round(scale * side)) for side in fit_short_side(image, min(size))]
    image, labels = TF.resize(image, new), nearest(labels[None], new)
    for _ in range(10):
        corner = random_corner(new, size)
        part = crop(labels, corner, size, False, IGNORE)
        counts = torch.bincount(part[part != IGNORE], minlength=2)
        if counts.max() < 0.75 * counts.sum():
            break
    flip = torch.rand(()) < 0.5
    image = crop(image, corner, size, flip, mean_colour(image, cfg.mean), distort)
    return image, crop(labels, corner, size, flip, IGNORE)[0]


def large_scale_jitter(image, target, cfg):
    """Resize to --jitter times what just fits --img_size; crop to it; flip; fill up with the mean colour.
    Boxes are those of what is left of the masks; where nothing is left the object goes. Masks leave packed,
    eight pixels to a byte: they are most of what loader workers hand over. torchvision's ScaleJitter rounds
    sizes down."""
    (H, W), (h, w) = cfg.img_size, image.shape[1:]
    scale = uniform(*cfg.jitter) * min(H / h, W / w)
    new = [max(1, round(scale * side)) for side in (h, w)]
    corner, flip = random_corner(new, cfg.img_size), torch.rand(()) < 0.5
    image = crop(TF.resize(image, new), corner, cfg.img_size, flip, mean_colour(image, cfg.mean))
    if "masks" not in target:
        return image, boxes_left(target, (h, w), new, corner, cfg.img_size, flip)
    masks = crop(nearest(target["masks"], new), corner, cfg.img_size, flip, 0)
    keep = masks.flatten(1).bool().any(1)
    packed = torch.from_numpy(np.packbits(masks[keep].numpy(), axis=-1))
    return image, {"boxes": boxes_around(masks[keep]), "labels": target["labels"][keep], "masks": packed}


def boxes_left(target, old, new, corner, size, flip):
    """A target without masks, resized and cropped as its image: what of its boxes is inside."""
    (h, w), (top, left) = new, corner
    shape = [min(size[0], h - top), min(size[1], w - left)]  # of what is cut out
    boxes = target["boxes"] * torch.tensor([w / old[1], h / old[0]] * 2) - torch.tensor([left, top] * 2)
    boxes = clip_boxes_to_image(boxes, shape)
    if flip:
        boxes[:, [0, 2]] = shape[1] - boxes[:, [2, 0]]
    keep = remove_small_boxes(boxes, 1.0)
    return {"boxes": boxes[keep], "labels": target["labels"][keep]}


def boxes_around(masks):
    """(n, H, W) -> (n, 4): x1 y1 x2 y2, the last pixels included"""
    return masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])


def unpack(masks):
    """Masks of large_scale_jitter (n, H, W / 8) -> (n, H, W) uint8 of 0 and 1, on their device"""
    bits = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)
    return (masks[..., None] >> bits & 1).flatten(2)


class Fit:
    """Of held-out images. Segmentation: the image (not its labels) to the short side of --img_size."""

    def __init__(self, cfg):
        self.short = min(cfg.img_size) if cfg.task == "seg" else None

    def __call__(self, image, target=None):
        image = TF.resize(image, fit_short_side(image, self.short)) if self.short else image
        return image, target


class Scenes(torch.utils.data.Dataset):
    """common.KeyedSamples (`samples`) whose transform changes image and target together."""

    def __init__(self, samples):
        self.samples = samples

    def __getitem__(self, key):
        (epoch, index), samples = key, self.samples
        image, target, bad = samples.read(index)
        if bad and isinstance(target, int):  # nothing could be read: the run stops before it uses this
            labels = torch.full(image.shape[1:], IGNORE, dtype=torch.uint8)
            nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
            target = nothing | {"masks": labels[None][:0]} if samples.source.det else labels
        torch.default_generator.manual_seed(stable_seed(samples.seed, epoch, index))
        image, target = samples.transform(image, target)
        return {"index": index, "bad": bad, "image": image, "target": target}


def collate_scenes(samples):
    """As `collate`; "target" is (B, H, W), or for detection a list, as numbers of objects differ."""
    targets = [sample.pop("target") for sample in samples]
    return collate(samples) | {"target": targets if isinstance(targets[0], dict) else torch.stack(targets)}
