"""The data of transfer_seg_det.py: images with label maps (ADE20K's layout) or with boxes and masks (COCO's),
transforms of image and target together, pictures of targets.

A target is a label map (H, W) uint8, in which IGNORE does not count, or, for detection, a dict {"boxes":
(n, 4) float32 x1 y1 x2 y2 in pixels, "labels": (n,) int64 from 1, "masks": (n, H, W) uint8}. They are plain
tensors: torchvision resizes its tv_tensors.Mask by a rule that moves masks by up to half a pixel."""

import colorsys
import json
import math
import re
import textwrap
from collections import Counter
from contextlib import redirect_stdout, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from common import (
    FORMATS,
    ImageFiles,
    UserError,
    collate,
    data_path,
    list_images,
    orientation,
    print0,
    read_image,
    stable_seed,
)
from shapes import Shapes

IGNORE = 255  # label of pixels that do not count
SPLITS = {"train": ("training", "train", "train2017"), "val": ("validation", "val", "val2017")}


# ---- sources: len(), name(i), read(i) -> image (C, H, W), target; classes, in_chans, det -------------------
# And for --check_data: count(target), {class, or -1 where nothing is labelled: number}, of which `unit`.


def open_scenes(cfg, split):
    """The images and targets of --data for --task; split: "train" or "val"."""
    if cfg.data == "shapes":
        return DrawnScenes(cfg, split)
    root, layout = data_path(cfg.data), "ADE20K" if cfg.task == "seg" else "COCO"
    if root is None or not root.is_dir():
        raise UserError(f"--data {cfg.data} is no folder: expected one laid out as {layout}, or shapes")
    return (LabelMaps if cfg.task == "seg" else CocoScenes)(root, split, cfg)


def image_folder(root, split):
    found = [path for name in SPLITS[split] if (path := root / "images" / name).is_dir()]
    if not found:
        names = ", ".join(f"images/{name}/" for name in SPLITS[split])
        raise UserError(f"--data {root}: none of the folders {names} is there")
    return found[0]


def count_pixels(target):
    counts = torch.bincount(target.flatten(), minlength=IGNORE + 1).tolist()
    return Counter({-1 if kind == IGNORE else kind: n for kind, n in enumerate(counts) if n})


def count_objects(target):
    return Counter((target["labels"] - 1).tolist())


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
        with Image.open(self.map_of(self.name(index)), formats=FORMATS) as file:
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


# ---- COCO's annotations: nothing of them reaches pycocotools' C code unseen


def whole(value, low, high):
    """An int of low to high; digits in text count, as converters from XML write them."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{value!r}, expected a whole number of {low} to {high}")
    return value


def bounded(values, least, bound):
    """ValueError unless a list has `least` numbers or more, all within -bound to bound."""
    text = f"{str(values)[:60]}, expected {least} numbers, of {-bound} to {bound}"
    if not isinstance(values, list) or len(values) < least:
        raise ValueError(text)
    try:
        inside = math.isfinite(sum(values)) and -bound <= min(values) and max(values) <= bound
    except (TypeError, OverflowError):
        inside = False
    if not inside:
        raise ValueError(text)
    return values


def run_lengths(text):
    """COCO's compressed run lengths -> list. A character holds five bits of a number, the lowest first, and
    whether more follow; from the fourth on, numbers are differences from the last but one."""
    runs, value, shift = [], 0, 0
    for code in text.encode():
        code -= 48
        if not 0 <= code < 64 or shift > 30:
            raise ValueError(f"counts {text[:40]!r} are no compressed run lengths")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code >> 4 & 1) << shift  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def check_mask(shape, height, width):
    """A `segmentation` that can be decoded, its polygons of fewer than three corners dropped, or None."""
    if not shape:
        return None
    if isinstance(shape, list):
        if not all(isinstance(polygon, list) for polygon in shape):
            raise ValueError("segmentation is no list of polygons [[x1, y1, x2, y2, ...], ...]")
        shape = [polygon for polygon in shape if len(polygon) >= 6]
        for polygon in shape:
            bounded(polygon, 6, 2 * max(height, width))
            if len(polygon) % 2:
                raise ValueError(f"a polygon has {len(polygon)} numbers, expected x and y of each corner")
        return shape or None
    if not isinstance(shape, dict) or not isinstance(shape.get("counts"), list | str):
        raise ValueError(f"segmentation {str(shape)[:60]}: expected polygons, or run lengths: counts, size")
    sizes_differ("the run lengths are those of", tuple(shape["size"]), (height, width))
    counts = shape["counts"]
    runs = run_lengths(counts) if isinstance(counts, str) else counts
    if not all(isinstance(run, int) and run >= 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(f"run lengths of {height * width} pixels in all are expected, none negative")
    return shape


def check_annotation(entry, height, width):
    """COCO's entry with iscrowd of 0 or 1 and an area; None if its box is under a pixel or it has no mask."""
    *_, w, h = bounded(entry["bbox"], 4, 2 * max(height, width))
    if len(entry["bbox"]) != 4:
        raise ValueError(f"bbox {entry['bbox']}, expected x, y, width, height")
    crowd = whole(entry.get("iscrowd") or 0, 0, 1)
    area = w * h if entry.get("area") is None else entry["area"]
    if not isinstance(area, int | float) or not 0 <= area <= 2**40:
        raise ValueError(f"area {area!r}, expected a number")
    shape = check_mask(entry.get("segmentation"), height, width)
    if not shape or min(w, h) < 1 and not crowd:
        return None
    return entry | {"segmentation": shape, "iscrowd": crowd, "area": area}


class CocoScenes:
    """images/SPLIT/ with annotations/instances_SPLIT.json in COCO's format. Crowds are no training targets
    and count neither for nor against a detector. Boxes under a pixel or without a mask are left out."""

    det, unit, count = True, "objects", staticmethod(count_objects)

    def __init__(self, root, split, cfg):
        self.folder, self.in_chans, place = image_folder(root, split), cfg.in_chans, "its top level"
        self.path, left_out = root / f"annotations/instances_{self.folder.name}.json", Counter()
        on_disk = set(list_images(self.folder))
        try:
            content, records = json.loads(self.path.read_bytes()), {}
            categories = sorted(content["categories"], key=lambda category: category["id"])
            self.classes = [str(c["name"]) for c in categories]
            self.categories = [whole(c["id"], 0, 2**53) for c in categories]
            if not 0 < len(self.classes) == len(set(self.categories)) <= 100_000:
                raise ValueError(f"{len(self.classes)} categories, some ids twice")
            for image in content["images"]:
                place = f"image {image.get('id')!r}"
                if image["id"] in records:
                    raise ValueError("an image of this id is listed before")
                if records and type(image["id"]) is not type(next(iter(records))):
                    raise ValueError("numbers and text as ids of images")
                sides = [whole(image[side], 1, 2**15) for side in ("height", "width")]
                records[image["id"]] = [str(image["file_name"]), *sides, []]
            kinds = set(self.categories)
            for number, entry in enumerate(content["annotations"], start=1):
                place = f"annotation {entry.get('id')!r}, the {number}."
                kind, image = whole(entry["category_id"], 0, 2**53), entry["image_id"]
                if kind not in kinds or image not in records:
                    raise ValueError(f"no category {kind}, or no image {image!r}, is listed")
                _, height, width, objects = records[image]
                good = check_annotation(entry, height, width)
                if good is None:
                    left_out["boxes under a pixel or without a mask"] += 1
                else:
                    objects.append(good | {"category_id": kind})
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error}") from None
        except KeyError as error:
            raise UserError(f"{self.path}, {place}: {error} is missing") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.path}, {place}: {error}") from None
        paths = {i: str(self.folder / record[0]) for i, record in records.items()}
        listed = set(paths.values())
        left_out["images that are not in the folder"] = len(listed - on_disk)
        left_out["images in the folder that are not listed"] = len(on_disk - listed)
        records = {i: record for i, record in records.items() if paths[i] in on_disk}
        objects = [entry for *_, found in records.values() for entry in found]
        left = ", ".join(f"{n} {what}" for what, n in left_out.items() if n)
        if all(entry["iscrowd"] for entry in objects):
            raise UserError(f"{self.path} has no object to learn: {len(objects)} are iscrowd; left out: "
                            f"{left or 'nothing'} (boxes alone: write each as a polygon of its four corners)")
        if left:
            print0(f"{self.path}: left out: {left}")
        # One buffer: loader workers would copy a million Python objects as their reference counts change.
        self.ids = sorted(records)
        self.most = max(len(record[3]) for record in records.values())
        packed = [json.dumps(records[i]).encode() for i in self.ids]
        self.buffer, self.ends = b"".join(packed), np.cumsum([0, *map(len, packed)])
        self.turn = not labels_fit_stored(cfg.exif, [paths[i] for i in self.ids],
                                          lambda i: tuple(records[self.ids[i]][1:3]), self.folder)

    def __len__(self):
        return len(self.ids)

    def record(self, index):
        """[file name, height, width, annotations in COCO's format]"""
        return json.loads(self.buffer[self.ends[index] : self.ends[index + 1]])

    def name(self, index):
        return str(self.folder / self.record(index)[0])

    def read(self, index):
        _, height, width, objects = self.record(index)
        image = read_image(self.name(index), self.in_chans, self.turn)
        sizes_differ(f"{self.path.name} has", (height, width), image.shape[1:])
        if max(height, width) > 32 * min(height, width):
            raise ValueError(f"{height} x {width} pixels: longer than 32 times its width")
        return image, coco_target(height, width, objects, self.categories)


class DrawnScenes(Shapes):
    """Drawn shapes with label maps (background is class 0), or boxes and masks."""

    def __init__(self, cfg, split):
        super().__init__(cfg.img_size, cfg.in_chans, split, n={"train": 4000, "val": 200}[split])
        self.det = cfg.task == "det"
        self.unit, self.count = ("objects", count_objects) if self.det else ("pixels", count_pixels)
        self.most = 4
        self.classes = self.classes if self.det else ["background", *self.classes]
        self.ids, self.categories = range(len(self)), range(1, len(self.classes) + 1)

    def record(self, index):
        """As CocoScenes.record; shapes that are hidden entirely are left out."""
        _, instances, kinds = self.draw(index)
        objects = []
        for number in np.unique(instances[instances > 0]):
            mask = instances == number
            box = boxes_around(torch.from_numpy(mask)[None])
            objects.append({"image_id": index, "category_id": int(kinds[number - 1]) + 1, "iscrowd": 0,
                            "bbox": box_convert(box, "xyxy", "xywh")[0].tolist(), "area": int(mask.sum()),
                            "segmentation": rle.encode(np.asfortranarray(mask, np.uint8))})
        return [self.name(index), *self.size, objects]

    def read(self, index):
        image, instances, kinds = self.draw(index)
        labels = torch.from_numpy(np.append(0, kinds + 1)[instances].astype(np.uint8))
        target = coco_target(*self.record(index)[1:], self.categories) if self.det else labels
        return torch.from_numpy(image).permute(2, 0, 1), target


def decode_mask(shape, height, width):
    """COCO's segmentation (polygons, or run lengths, compressed or not) -> uint8 (height, width)"""
    compressed = isinstance(shape, dict) and not isinstance(shape["counts"], list)
    runs = shape if compressed else rle.frPyObjects(shape, height, width)
    return rle.decode(rle.merge(runs) if isinstance(runs, list) else runs)


def coco_target(height, width, objects, categories):
    """COCO's annotations of one image -> a target of detection, without the crowds."""
    objects = [x for x in objects if not x["iscrowd"]]
    boxes = torch.tensor([x["bbox"] for x in objects], dtype=torch.float64).reshape(-1, 4)
    kinds = [categories.index(x["category_id"]) + 1 for x in objects]
    masks = np.array([decode_mask(x["segmentation"], height, width) for x in objects], np.uint8)
    return {"boxes": box_convert(boxes, "xywh", "xyxy").float(),
            "labels": torch.tensor(kinds, dtype=torch.int64),
            "masks": torch.from_numpy(masks.reshape(-1, height, width))}


def coco_truth(source):
    """pycocotools' object with all annotations of a source: what detections are compared with."""
    records = [source.record(i) for i in range(len(source))]
    objects = [entry for *_, found in records for entry in found]
    images = [{"id": i, "height": h, "width": w} for i, (_, h, w, _) in zip(source.ids, records, strict=True)]
    coco = COCO()
    coco.dataset = {"images": images, "categories": [{"id": i} for i in source.categories],
                    "annotations": [entry | {"id": i} for i, entry in enumerate(objects, 1)]}  # 0 means none
    with redirect_stdout(None):
        coco.createIndex()
    return coco


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
    masks = crop(nearest(target["masks"], new), corner, cfg.img_size, flip, 0)
    keep = masks.flatten(1).bool().any(1)
    packed = torch.from_numpy(np.packbits(masks[keep].numpy(), axis=-1))
    return image, {"boxes": boxes_around(masks[keep]), "labels": target["labels"][keep], "masks": packed}


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
            target = coco_target(*labels.shape, [], []) if samples.source.det else labels
        torch.default_generator.manual_seed(stable_seed(samples.seed, epoch, index))
        image, target = samples.transform(image, target)
        return {"index": index, "bad": bad, "image": image, "target": target}


def collate_scenes(samples):
    """As `collate`; "target" is (B, H, W), or for detection a list, as numbers of objects differ."""
    targets = [sample.pop("target") for sample in samples]
    return collate(samples) | {"target": targets if isinstance(targets[0], dict) else torch.stack(targets)}


# ---- pictures ----------------------------------------------------------------------------------------------

SHOWN = 288  # pixels of a side


def colour_of(number):
    """A colour per class from 1 on: hues in steps of the plastic number, in five strengths; 0 (ignored):
    black."""
    saturation, value = ((1.0, 0.95), (0.45, 1.0), (1.0, 0.55), (0.7, 0.8), (0.3, 0.65))[number % 5]
    hue = (0.6 + number * 0.754878) % 1
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, saturation, value)) if number else (0, 0, 0)


def regions(labels, image):
    """A label map as a target of detection for `image`: a mask per class, no boxes; 0 is "ignored"."""
    labels = nearest(labels[None], image.shape[1:])[0].long() + 1
    labels = torch.where(labels == IGNORE + 1, 0, labels)
    kinds = labels.unique()
    return {"boxes": torch.zeros(0, 4), "labels": kinds, "masks": labels == kinds[:, None, None]}


def show(image, target=None):
    """Image uint8 (C, H, W) -> (3, SHOWN, SHOWN), fitted in, under the masks, boxes and, if there are any,
    scores of a target of detection, in the colours of their classes."""
    factor = SHOWN / max(image.shape[1:])
    size = [max(1, round(factor * side)) for side in image.shape[1:]]
    image = TF.resize(image if len(image) == 3 else image[:1].expand(3, -1, -1), size)
    if target:
        colours = [colour_of(kind) for kind in target["labels"].tolist()]
        masks = nearest(target["masks"].to(torch.uint8), size).bool()
        for mask, colour in reversed([*zip(masks, colours, strict=True)]):  # one by one, the best on top
            image = draw_segmentation_masks(image, mask, alpha=0.65, colors=colour)
        words = [f"{score:.2f}" for score in target["scores"]] if "scores" in target else None
        if len(target["boxes"]):
            image = draw_bounding_boxes(image, target["boxes"] * factor, words, colours)
    return crop(image, (0, 0), (SHOWN, SHOWN), False, 255)


def legend(targets, classes):
    """(3, SHOWN, SHOWN): names and colours of the classes in these targets, of the first ones if many."""
    canvas = Image.new("RGB", (SHOWN, SHOWN), "white")
    pen, line = ImageDraw.Draw(canvas), 16
    kinds = list(dict.fromkeys(kind for target in targets for kind in target["labels"].tolist()))
    names = ["ignored (does not count)", *classes]
    rows = [(kind, part) for kind in kinds for part in textwrap.wrap(names[kind], 42) or [""]]
    rows = rows if len(rows) <= SHOWN // line else [*rows[: SHOWN // line - 1], (None, "and more classes")]
    for i, (kind, part) in enumerate(rows):
        if kind is not None:
            pen.rectangle((4, i * line + 2, 16, i * line + 14), fill=colour_of(kind))
        pen.text((24, i * line + 2), part, fill="black")
    return TF.pil_to_tensor(canvas)
