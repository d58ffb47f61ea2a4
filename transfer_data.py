"""The data of transfer_seg_det.py: images with label maps (ADE20K's layout) or with boxes and masks (COCO's),
transforms of image and target together, pictures of targets.

A target is a label map (H, W) uint8, in which IGNORE does not count, or, for detection, a dict {"boxes":
(n, 4) float32 x1 y1 x2 y2 in pixels, "labels": (n,) int64 from 1, "masks": (n, H, W) uint8}. They are plain
tensors: torchvision resizes its tv_tensors.Mask by a rule that moves masks by up to half a pixel."""

import colorsys
import json
from contextlib import redirect_stdout
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
    ImageFiles,
    UserError,
    collate,
    data_path,
    list_images,
    print0,
    read_image,
    stable_seed,
)
from shapes import Shapes

IGNORE = 255  # label of pixels that do not count
SPLITS = {"train": ("training", "train", "train2017"), "val": ("validation", "val", "val2017")}


# ---- sources: len(), name(i), read(i) -> image (C, H, W), target; classes, in_chans, det -------------------


def open_scenes(cfg, split):
    """The images and targets of --data for --task; split: "train" or "val"."""
    if cfg.data == "shapes":
        return DrawnScenes(cfg, split)
    root, layout = data_path(cfg.data), "ADE20K" if cfg.task == "seg" else "COCO"
    if root is None or not root.is_dir():
        raise UserError(f"--data {cfg.data} is no folder: expected one laid out as {layout}, or shapes")
    return (LabelMaps if cfg.task == "seg" else CocoScenes)(root, split, cfg.in_chans, cfg.zero_is_ignore)


def image_folder(root, split):
    found = [path for name in SPLITS[split] if (path := root / "images" / name).is_dir()]
    if not found:
        names = ", ".join(f"images/{name}/" for name in SPLITS[split])
        raise UserError(f"--data {root}: none of the folders {names} is there")
    return found[0]


class LabelMaps(ImageFiles):
    """images/SPLIT/**/NAME.jpg with annotations/SPLIT/**/NAME.png, one channel of class numbers, and a name
    per line in classes.txt (or ADE20K's objectInfo150.txt). zero_is_ignore: 0 stands for no class, 1 for the
    first."""

    det = False

    def __init__(self, root, split, in_chans, zero_is_ignore):
        self.images, self.zero_is_ignore = image_folder(root, split), zero_is_ignore
        paths = list_images(self.images)
        missing = [path for path in paths if not self.map_of(path).exists()]
        if missing:
            raise UserError(f"{len(missing)} of {len(paths)} images in {self.images} have no label map: "
                            f"expected {self.map_of(missing[0])}, for one")
        lists = [path for name in ("classes.txt", "objectInfo150.txt") if (path := root / name).exists()]
        if not lists:
            raise UserError(f"--data {root} has no classes.txt: expected a name per line, in the maps' order")
        lines = lists[0].read_text("utf-8-sig", errors="replace").splitlines()
        classes, most = [line.strip() for line in lines if line.strip()], IGNORE - zero_is_ignore
        if lists[0].name == "objectInfo150.txt":
            classes = [line.split("\t")[-1] for line in classes[1:]]
            if not zero_is_ignore:
                raise UserError(f"--data {root} is ADE20K, whose numbers begin with 1: add --zero_is_ignore")
        if len(classes) > most:
            raise UserError(f"{lists[0]} has {len(classes)} classes, more than {most}")
        super().__init__(paths, [-1] * len(paths), classes, in_chans)

    def map_of(self, path):
        annotations = self.images.parent.parent / "annotations"
        return annotations / Path(path).relative_to(self.images.parent).with_suffix(".png")

    def read(self, index):
        image, _ = super().read(index)
        with Image.open(self.map_of(self.name(index))) as file:
            labels = torch.from_numpy(np.array(file).astype(np.int64))
        if labels.shape != image.shape[1:]:
            raise ValueError(f"the label map is {tuple(labels.shape)}, the image {tuple(image.shape[1:])}; "
                             "expected the same height and width, one channel")
        n = len(self.classes)
        unknown = labels[(labels >= n + self.zero_is_ignore) & (labels != IGNORE)]
        if len(unknown):
            hint = "" if self.zero_is_ignore else " from 0 on; list the background, or --zero_is_ignore"
            raise ValueError(f"the label map has number {unknown.max()}, {n} classes are listed{hint}")
        if self.zero_is_ignore:
            labels = torch.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1)
        return image, labels.to(torch.uint8)


class CocoScenes:
    """images/SPLIT/ with annotations/instances_SPLIT.json in COCO's format. Crowds are no training targets
    and count neither for nor against a detector. Boxes under a pixel or without a mask are dropped."""

    det = True

    def __init__(self, root, split, in_chans, _=False):
        self.folder, self.in_chans, self.dropped = image_folder(root, split), in_chans, 0
        self.path, place = root / f"annotations/instances_{self.folder.name}.json", "its top level"
        try:
            content = json.loads(self.path.read_bytes())
            categories = sorted(content["categories"], key=lambda category: category["id"])
            self.classes, self.categories = [c["name"] for c in categories], [c["id"] for c in categories]
            records = {x["id"]: [x["file_name"], x["height"], x["width"], []] for x in content["images"]}
            for entry in content["annotations"]:
                place = f"annotation {entry.get('id')}"
                (_, _, w, h), shape, crowd = entry["bbox"], entry["segmentation"], entry.get("iscrowd")
                if isinstance(shape, list):
                    shape = [polygon for polygon in shape if len(polygon) >= 6]
                if not shape or min(w, h) < 1 and not crowd:
                    self.dropped += 1
                    continue
                if entry["category_id"] not in self.categories or entry["image_id"] not in records:
                    ids = f"category {entry['category_id']}, or no image {entry['image_id']}"
                    raise ValueError(f"no {ids}, is listed")
                entry |= {"segmentation": shape, "iscrowd": int(bool(crowd))}
                entry["area"] = w * h if entry.get("area") is None else entry["area"]
                records[entry["image_id"]][3].append(entry)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path} is not in COCO's format, see {place}: {error!r}") from None
        if all(entry["iscrowd"] for record in records.values() for entry in record[3]):
            raise UserError(f"{self.path} has no object to learn: {self.dropped} of its annotations are "
                            "degenerate, the others iscrowd")
        if self.dropped:
            print0(f"{self.path}: {self.dropped} degenerate boxes (under a pixel, or no mask) are dropped")
        # One buffer: loader workers would copy a million Python objects as their reference counts change.
        self.ids = sorted(records)
        packed = [json.dumps(records[i]).encode() for i in self.ids]
        self.buffer, self.ends = b"".join(packed), np.cumsum([0, *map(len, packed)])

    def __len__(self):
        return len(self.ids)

    def record(self, index):
        """[file name, height, width, annotations in COCO's format]"""
        return json.loads(self.buffer[self.ends[index] : self.ends[index + 1]])

    def name(self, index):
        return str(self.folder / self.record(index)[0])

    def read(self, index):
        _, height, width, objects = self.record(index)
        image = read_image(self.name(index), self.in_chans)
        if image.shape[1:] != (height, width):
            size = f"{image.shape[1]} x {image.shape[2]}"
            raise ValueError(f"{height} x {width} pixels in {self.path.name}, {size} in the file")
        if max(height, width) > 32 * min(height, width):
            raise ValueError(f"{height} x {width} pixels: longer than 32 times its width")
        return image, coco_target(height, width, objects, self.categories)


class DrawnScenes(Shapes):
    """Drawn shapes with label maps (background is class 0), or boxes and masks."""

    def __init__(self, cfg, split):
        super().__init__(cfg.img_size, cfg.in_chans, split, n={"train": 4000, "val": 200}[split])
        self.det = cfg.task == "det"
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
    mask = rle.decode(rle.merge(runs) if isinstance(runs, list) else runs)
    if mask.shape != (height, width):
        size = f"{mask.shape[0]} x {mask.shape[1]}"
        raise ValueError(f"the run lengths of a mask are those of {size} pixels, not {height} x {width}")
    return mask


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
    """A colour per class: hues by the golden ratio, in three strengths, so that neighbours differ."""
    strength = ((0.4, 0.75), (1.0, 0.95), (0.6, 1.0))[number % 3]
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb((0.6 + number * 0.618034) % 1, *strength))


def regions(labels, image):
    """A label map as a target of detection for `image`: a mask per class, no boxes."""
    labels = nearest(labels[None], image.shape[1:])[0]
    kinds = labels[labels != IGNORE].unique().long()
    return {"boxes": torch.zeros(0, 4), "labels": kinds + 1, "masks": labels == kinds[:, None, None]}


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
    kinds = dict.fromkeys(kind for target in targets for kind in target["labels"].tolist())
    for top, kind in zip(range(0, SHOWN, line), kinds, strict=False):
        pen.rectangle((4, top + 2, 16, top + 14), fill=colour_of(kind))
        pen.text((24, top + 2), classes[kind - 1], fill="black")
    return TF.pil_to_tensor(canvas)
