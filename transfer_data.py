"""What transfer_seg_det.py trains on: images with label maps (ADE20K's layout) or boxes and masks (COCO's), transforms of both
together, and pictures of what a network made of them. A file of its own, because it reads alone: no network in here.

A target is a dict: segmentation {"labels": (H, W) uint8, IGNORE = does not count}; detection {"boxes": (n, 4) float x1 y1 x2 y2
in pixels, "labels": (n,) int64 from 1, "masks": (n, H, W) uint8}. They are plain tensors: torchvision's tv_tensors would resize
masks by its older nearest-neighbour rule, which moves them by up to half a pixel against the image.
"""

import colorsys
import json
import math
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from common import Refused, Shapes, Views, collate, data_path, list_images, read_image, stable_seed, write_atomically

IGNORE = 255  # label of pixels that do not count
SPLITS = {"train": ("training", "train", "train2017"), "val": ("validation", "val", "val2017")}


# ---- sources: len(), name(i), read(i) -> image (C, H, W), target; classes ------------------------------------------------


def folder_of(root, split):
    """The folder of a split's images."""
    for path in (root / "images" / name for name in SPLITS[split]):
        if path.is_dir():
            return path
    raise Refused(f"--data {root}: none of the folders " + ", ".join(f"images/{name}/" for name in SPLITS[split]) + " is there")


class LabelMaps:
    """images/SPLIT/**/NAME.jpg with annotations/SPLIT/**/NAME.png, one channel of class numbers, and classes.txt, a name per
    line (or ADE20K's objectInfo150.txt). zero_is_ignore: 0 is no class there, and 1 the first."""

    det, dropped = False, 0

    def __init__(self, root, split, in_chans, zero_is_ignore):
        self.images, self.in_chans, self.zero_is_ignore = folder_of(root, split), in_chans, zero_is_ignore
        self.paths = list_images(self.images)
        missing = [path for path in self.paths if not self.map_of(path).exists()]
        if missing:
            raise Refused(f"{len(missing)} of the {len(self.paths)} images in {self.images} have no label map, for one "
                          f"{missing[0]}: expected {self.map_of(missing[0])}")
        lists = [path for name in ("classes.txt", "objectInfo150.txt") if (path := root / name).exists()]
        if not lists:
            raise Refused(f"--data {root} has no classes.txt: expected a name per line, in the order of the maps' numbers")
        text = lists[0].read_text("utf-8-sig", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        self.classes = lines
        if lists[0].name == "objectInfo150.txt":
            self.classes = [line.split("\t")[-1] for line in lines[1:]]
            if not zero_is_ignore:
                raise Refused(f"--data {root} is ADE20K, whose class numbers begin with 1: add --zero_is_ignore")
        if len(self.classes) > IGNORE - zero_is_ignore:
            raise Refused(f"{lists[0]} has {len(self.classes)} classes, more than {IGNORE - zero_is_ignore}: {IGNORE} in a map "
                          "stands for no class")

    def map_of(self, path):
        return self.images.parent.parent / "annotations" / Path(path).relative_to(self.images.parent).with_suffix(".png")

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        return self.paths[index]

    def read(self, index):
        image = read_image(self.paths[index], self.in_chans)
        with Image.open(self.map_of(self.paths[index])) as file:
            labels = torch.from_numpy(np.array(file).astype(np.int64))
        if labels.shape != image.shape[1:]:
            raise ValueError(f"the label map is {tuple(labels.shape)}, the image {tuple(image.shape[1:])}; expected the same "
                             "height and width, one channel")
        wrong = labels[(labels >= len(self.classes) + self.zero_is_ignore) & (labels != IGNORE)]
        if len(wrong):
            hint = "" if self.zero_is_ignore else " from 0 on; list the background too, or ignore it: --zero_is_ignore"
            raise ValueError(f"the label map has number {int(wrong.max())}, {len(self.classes)} classes are listed{hint}")
        if self.zero_is_ignore:
            labels = torch.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1)
        return image, {"labels": labels.to(torch.uint8)}


class CocoScenes:
    """images/SPLIT/ with annotations/instances_SPLIT.json in COCO's format. Crowds are no training targets, and count neither
    for nor against a detector (pycocotools' rule). Boxes under a pixel or without a mask are left out, counted in `dropped`."""

    det = True

    def __init__(self, root, split, in_chans):
        self.folder, self.in_chans = folder_of(root, split), in_chans
        self.path, self.dropped, place = root / f"annotations/instances_{self.folder.name}.json", 0, "its top level"
        try:
            content = json.loads(self.path.read_bytes())
            categories = sorted(content["categories"], key=lambda category: category["id"])
            self.classes, self.categories = [c["name"] for c in categories], [c["id"] for c in categories]
            records = {image["id"]: [image["file_name"], image["height"], image["width"], []] for image in content["images"]}
            for entry in content["annotations"]:
                place = f"annotation {entry.get('id')}"
                x, y, w, h = entry["bbox"]
                shape, crowd = entry["segmentation"], bool(entry.get("iscrowd"))
                if isinstance(shape, list):
                    shape = [polygon for polygon in shape if len(polygon) >= 6]
                if not shape or min(w, h) < 1 and not crowd:
                    self.dropped += 1
                    continue
                if entry["category_id"] not in self.categories or entry["image_id"] not in records:
                    raise ValueError(f"no category {entry['category_id']}, or no image {entry['image_id']}, is listed")
                kind, area = self.categories.index(entry["category_id"]), entry.get("area")
                records[entry["image_id"]][3].append([kind, [x, y, w, h], shape, crowd, w * h if area is None else area])
            self.ids = sorted(records)
        except OSError as error:
            raise Refused(f"cannot read {self.path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(f"{self.path} is not in COCO's format, see {place}: {type(error).__name__} {error}") from None
        if all(entry[3] for record in records.values() for entry in record[3]):
            raise Refused(f"{self.path} has no object to learn: of {len(content['annotations'])} annotations {self.dropped} "
                          "are degenerate, the others iscrowd")
        # One buffer: a million Python objects would be copied into every loader worker as their reference counts change.
        packed = [json.dumps(records[i]).encode() for i in self.ids]
        self.buffer, self.ends = b"".join(packed), np.cumsum([0, *map(len, packed)])

    def __len__(self):
        return len(self.ids)

    def record(self, index):
        """[file name, height, width, [[class, [x, y, w, h], segmentation, is a crowd, area], ...]]"""
        return json.loads(self.buffer[self.ends[index] : self.ends[index + 1]])

    def name(self, index):
        return str(self.folder / self.record(index)[0])

    def read(self, index):
        name, height, width, objects = self.record(index)
        image = read_image(str(self.folder / name), self.in_chans)
        if image.shape[1:] != (height, width):
            raise ValueError(f"{height} x {width} pixels in {self.path.name}, {image.shape[1]} x {image.shape[2]} in the file")
        if max(height, width) > 32 * min(height, width):
            raise ValueError(f"{height} x {width} pixels: longer than 32 times its width")
        objects = [entry for entry in objects if not entry[3]]
        boxes = [[x, y, x + w, y + h] for _, (x, y, w, h), *_ in objects]
        masks = [torch.from_numpy(decode_mask(shape, height, width)) for _, _, shape, *_ in objects]
        return image, scene(image, boxes, [entry[0] + 1 for entry in objects], masks)

    def truth(self):
        """pycocotools' object to judge detections by."""
        return coco_truth(self, [self.record(i)[1:] for i in range(len(self))])


class DrawnScenes:
    """common.Shapes with label maps (background is class 0), or boxes and masks."""

    dropped = 0

    def __init__(self, cfg, split):
        self.shapes = Shapes(cfg.img_size, cfg.in_chans, split, n={"train": 4000, "val": 200}[split])
        self.det, self.in_chans = cfg.task == "det", cfg.in_chans
        self.classes = self.shapes.classes if self.det else ["background", *self.shapes.classes]
        self.ids, self.categories = range(len(self.shapes)), range(1, len(self.classes) + 1)

    def __len__(self):
        return len(self.shapes)

    def name(self, index):
        return self.shapes.name(index)

    def read(self, index):
        image, _ = self.shapes.read(index)
        labels, boxes, masks, kinds = self.shapes.annotations(index)
        return image, scene(image, boxes.tolist(), kinds + 1, masks) if self.det else {"labels": labels.to(torch.uint8)}

    def truth(self):
        records = []
        for index in self.ids:
            _, boxes, masks, kinds = self.shapes.annotations(index)
            records.append([*self.shapes.size, [
                [kind, [x1, y1, x2 - x1, y2 - y1], rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8))), False,
                 int(mask.sum())] for (x1, y1, x2, y2), mask, kind in zip(boxes.tolist(), masks, kinds.tolist(), strict=True)]])
        return coco_truth(self, records)


def decode_mask(shape, height, width):
    """COCO's segmentation (polygons, or run lengths packed or not) -> uint8 (height, width)"""
    packed = isinstance(shape, dict) and isinstance(shape["counts"], str)
    runs = shape if packed else rle.frPyObjects(shape, height, width)
    mask = rle.decode(rle.merge(runs) if isinstance(runs, list) else runs)
    if mask.shape != (height, width):
        was = f"{mask.shape[0]} x {mask.shape[1]}"
        raise ValueError(f"the run lengths of a mask are those of {was} pixels, not {height} x {width}")
    return mask


def coco_truth(source, records):
    """pycocotools' object of a source's images; records: [height, width, objects] of each, as in CocoScenes."""
    coco, annotations = COCO(), []
    for image_id, (_, _, objects) in zip(source.ids, records, strict=True):
        for kind, box, shape, crowd, area in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": source.categories[kind],
                                "bbox": box, "segmentation": shape, "iscrowd": int(crowd), "area": area})
    coco.dataset = {
        "images": [{"id": i, "height": record[0], "width": record[1]} for i, record in zip(source.ids, records, strict=True)],
        "categories": [{"id": i, "name": name} for i, name in zip(source.categories, source.classes, strict=True)],
        "annotations": annotations}
    with redirect_stdout(None):
        coco.createIndex()
    return coco


def scene(image, boxes, kinds, masks):
    """A detection target; every list may be empty."""
    empty = torch.zeros(0, *image.shape[1:], dtype=torch.uint8)
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.as_tensor(kinds, dtype=torch.int64),
            "masks": torch.stack([mask.to(torch.uint8) for mask in masks]) if len(masks) else empty}


def open_scenes(cfg, split):
    """The images and targets of --data for --task; split: "train" or "val"."""
    if cfg.data == "shapes":
        return DrawnScenes(cfg, split)
    root = data_path(cfg.data)
    if root is None or not root.is_dir():
        layout = "ADE20K" if cfg.task == "seg" else "COCO"
        raise Refused(f"--data {cfg.data} is no folder: expected one laid out as {layout} (docs/TRANSFER.md), or shapes")
    if cfg.task == "seg":
        return LabelMaps(root, split, cfg.in_chans, cfg.zero_is_ignore)
    return CocoScenes(root, split, cfg.in_chans)


# ---- transforms: (image, target) -> (image, target) ----------------------------------------------------------------------


def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def integer(n):
    """0 ... n - 1"""
    return int(torch.randint(n, ()))


def nearest(masks, size):
    """Resize (n, H, W)"""
    return TF.resize(masks, size, InterpolationMode.NEAREST_EXACT)


def fill_of(image, mean):
    """The mean colour in the image's own range."""
    return [round(255 * value) for value in mean] if image.dtype == torch.uint8 else list(mean)


def fit_short_side(image, short):
    """[height, width] with a short side of `short`, or, for long images, a long one of 4 times that."""
    h, w = image.shape[1:]
    scale = min(4 * short / max(h, w), short / min(h, w))
    return [max(1, round(scale * side)) for side in (h, w)]


def distort(image):
    """mmsegmentation's photometric distortion, each with probability 1/2: brightness (plus up to 32 of 255), contrast (a
    factor; before or after the next two), saturation (towards grey; there in HSV), hue. torchvision's class of this name
    multiplies the brightness, takes contrast around the mean, and swaps channels."""
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


class SegmentationCrop:
    """Resize to `jitter` times the short side of `size`; a crop of `size` in which no class has 75 % (or the tenth that was
    tried); flip; distorted colours; on the right and below, where the image ends, the mean colour and IGNORE: as in BEiT's and
    MAE's segmentation code."""

    def __init__(self, size, jitter, mean):
        self.size, self.jitter, self.mean = size, jitter, mean

    def __call__(self, image, target):
        (H, W), scale = self.size, uniform(*self.jitter)
        new = [max(1, round(scale * side)) for side in fit_short_side(image, min(H, W))]
        image, labels = TF.resize(image, new, antialias=True), nearest(target["labels"][None], new)
        h, w = new
        for _ in range(10):
            top, left = integer(max(h - H, 0) + 1), integer(max(w - W, 0) + 1)
            part = labels[:, top : top + H, left : left + W]
            counts = torch.bincount(part[part != IGNORE], minlength=2)
            if counts.max() < 0.75 * counts.sum():
                break
        image = image[:, top : top + H, left : left + W]
        if torch.rand(()) < 0.5:
            image, part = image.flip(-1), part.flip(-1)
        border = [0, 0, max(W - w, 0), max(H - h, 0)]
        image = TF.pad(distort(image), border, fill=fill_of(image, self.mean))
        return image, {"labels": TF.pad(part, border, fill=IGNORE)[0]}


class LargeScaleJitter:
    """Resize to `jitter` times what just fits `size`, a random crop where that is larger; flip; the mean colour on the right
    and below where it is smaller. Boxes are those of what is left of the masks; where nothing is left the object goes. Masks
    leave packed, eight pixels to a byte: they are most of what workers hand over."""

    def __init__(self, size, jitter, mean):
        self.size, self.jitter, self.mean = size, jitter, mean

    def __call__(self, image, target):
        (H, W), (h, w) = self.size, image.shape[1:]
        scale = uniform(*self.jitter) * min(H / h, W / w)
        h, w = new = [max(1, round(scale * side)) for side in (h, w)]
        top, left, flip = integer(max(h - H, 0) + 1), integer(max(w - W, 0) + 1), torch.rand(()) < 0.5

        def cut(x, fill):
            x = x[:, top : top + H, left : left + W]
            return TF.pad(x.flip(-1) if flip else x, [0, 0, max(W - w, 0), max(H - h, 0)], fill=fill)

        image = cut(TF.resize(image, new, antialias=True), fill_of(image, self.mean))
        masks = cut(nearest(target["masks"], new), 0)
        keep = masks.flatten(1).bool().any(1)
        boxes = masks_to_boxes(masks[keep]) + torch.tensor([0, 0, 1, 1])
        return image, {"boxes": boxes, "labels": target["labels"][keep], "masks": pack(masks[keep])}


def pack(masks):
    """(n, H, W) of 0 and 1 -> (n, H, W / 8) uint8"""
    return torch.from_numpy(np.packbits(masks.numpy(), axis=-1))


def unpack(masks):
    """Undoes `pack`, on the masks' device."""
    return (masks[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device) & 1).flatten(2)


class Fit:
    """For tests. Segmentation: the image (not the label map) to a short side of that of `size`; detection: nothing."""

    def __init__(self, size, task):
        self.short = min(size) if task == "seg" else None

    def __call__(self, image, target):
        image = TF.resize(image, fit_short_side(image, self.short), antialias=True) if self.short else image
        return image, target


class Scenes(Views):
    """Views whose transform changes the target with the image, and flips both."""

    def __getitem__(self, key):
        epoch, index = key
        image, target, bad = self.read(index)
        if isinstance(target, int):  # nothing could be read: the run stops before it uses this
            nothing = torch.full(image.shape[1:], IGNORE, dtype=torch.uint8)
            target = scene(image, [], [], []) if self.source.det else {"labels": nothing}
        torch.default_generator.manual_seed(stable_seed(self.seed, epoch, index))
        image, target = self.transform(image, target)
        return {"index": index, "bad": bad, "image": image, "target": target}


def collate_scenes(samples):
    """As `collate`, with "labels" (B, H, W) for segmentation, a list "target" for detection: numbers of objects differ."""
    targets = [sample.pop("target") for sample in samples]
    if "masks" in targets[0]:
        return collate(samples) | {"target": targets}
    return collate(samples) | {"labels": torch.stack([target["labels"] for target in targets])}


# ---- pictures ------------------------------------------------------------------------------------------------------------


SHOWN = 288  # height of a picture, in pixels


def colour_of(number):
    """A colour per class: hues by the golden ratio, in three strengths, so that neighbours differ."""
    strength = ((0.4, 0.75), (1.0, 0.95), (0.6, 1.0))[number % 3]
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb((0.6 + number * 0.618034) % 1, *strength))


COLOURS = torch.tensor([colour_of(i) for i in range(IGNORE)] + [(0, 0, 0)], dtype=torch.uint8)  # IGNORE is black


def show_labels(labels):
    """Label map (H, W) -> (3, H, W) uint8"""
    return COLOURS[labels.long()].permute(2, 0, 1)


def show_objects(image, target, classes):
    """Image (3, H, W) uint8, SHOWN high, with boxes and masks, each with its class and, if the target has it, its score."""
    factor = SHOWN / image.shape[1]
    size = [SHOWN, max(1, round(image.shape[2] * factor))]
    image = TF.resize(image, size, InterpolationMode.NEAREST_EXACT if factor > 1 else InterpolationMode.BILINEAR)
    if not len(target["boxes"]):
        return image
    colours = [colour_of(int(kind)) for kind in target["labels"]]
    scores = [f" {score:.2f}" for score in target["scores"]] if "scores" in target else [""] * len(colours)
    words = [classes[int(kind) - 1] + score for kind, score in zip(target["labels"], scores, strict=True)]
    masks = nearest(target["masks"].to(torch.uint8), size).bool()
    for mask, colour in reversed([*zip(masks, colours, strict=True)]):  # best score on top; all at once: black where two meet
        image = draw_segmentation_masks(image, mask, alpha=0.5, colors=colour)
    return draw_bounding_boxes(image, target["boxes"] * factor, words, colors=colours, label_colors=["white"] * len(words),
                               label_background_colors=["black"] * len(words), fill_labels=True)


def save_scenes(path, rows, titles, legend=()):
    """PNG: rows of pictures (3, H, W) uint8 of any size, SHOWN high, under titles; below, a legend of (class number, name)."""
    gap, line, height, column = 4, 16, SHOWN, 150
    tiles = [[Image.fromarray(x.permute(1, 2, 0).numpy()) for x in row] for row in rows]
    tiles = [[x.resize((max(1, round(x.width * height / x.height)), height),
                       Image.NEAREST if x.height < height else Image.LANCZOS) for x in row] for row in tiles]
    widths = [max(row[i].width for row in tiles) + gap for i in range(len(titles))]
    columns = max(1, sum(widths) // column)
    lines = math.ceil(len(legend) / columns)
    canvas = Image.new("RGB", (sum(widths), line + (height + gap) * len(tiles) + line * lines), "white")
    pen = ImageDraw.Draw(canvas)
    for i, title in enumerate(titles):
        pen.text((sum(widths[:i]) + 2, 2), title, fill="black")
        for j, row in enumerate(tiles):
            canvas.paste(row[i], (sum(widths[:i]), line + j * (height + gap)))
    for i, (number, name) in enumerate(legend):
        left, top = i % columns * column, canvas.height - line * (lines - i // columns)
        pen.rectangle((left + 2, top + 2, left + 13, top + 13), fill=colour_of(number))
        pen.text((left + 18, top + 2), name[:21], fill="black")
    write_atomically(path, lambda file: canvas.save(file, "png"))
