"""Boxes and masks in COCO's format, read, drawn and scored: what --task det of transfer_seg_det.py needs.

A target is a dict {"boxes": (n, 4) float32 x1 y1 x2 y2 in pixels, "labels": (n,) int64 from 1, "masks":
(n, H, W) uint8}; without masks where the annotations have boxes alone."""

import json
import math
from collections import Counter
from contextlib import redirect_stdout

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_convert

from common import UserError, list_images, print0, read_image
from shapes import Shapes
from transfer_data import IGNORE, boxes_around, count_pixels, image_folder, labels_fit_stored, sizes_differ


def count_objects(target):
    return Counter((target["labels"] - 1).tolist())


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
    """COCO's entry with iscrowd of 0 or 1, an area, and its segmentation or None; None if its box is under a
    pixel."""
    *_, w, h = bounded(entry["bbox"], 4, 2 * max(height, width))
    if len(entry["bbox"]) != 4:
        raise ValueError(f"bbox {entry['bbox']}, expected x, y, width, height")
    crowd = whole(entry.get("iscrowd") or 0, 0, 1)
    area = w * h if entry.get("area") is None else entry["area"]
    if not isinstance(area, int | float) or not 0 <= area <= 2**40:
        raise ValueError(f"area {area!r}, expected a number")
    shape = check_mask(entry.get("segmentation"), height, width)
    if min(w, h) < 1 and not crowd:
        return None
    return entry | {"segmentation": shape, "iscrowd": crowd, "area": area}


class CocoScenes:
    """images/SPLIT/ with annotations/instances_SPLIT.json in COCO's format. Crowds are no training targets
    and count neither for nor against a detector. Boxes under a pixel are left out, and those without a mask
    unless none has one: masks, whether there are."""

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
                    left_out["boxes under a pixel"] += 1
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
        self.masks = any(entry["segmentation"] for *_, found in records.values() for entry in found)
        for *_, found in records.values():
            if self.masks:
                left_out["boxes without a mask"] += sum(not entry["segmentation"] for entry in found)
                found[:] = [entry for entry in found if entry["segmentation"]]
        objects = [entry for *_, found in records.values() for entry in found]
        left = ", ".join(f"{n} {what}" for what, n in left_out.items() if n)
        if all(entry["iscrowd"] for entry in objects):
            raise UserError(f"{self.path} has no object to learn: {len(objects)} are iscrowd; left out: "
                            f"{left or 'nothing'}")
        if not self.masks:
            print0(f"{self.path}: no object has a mask: boxes alone are learned and scored")
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
        return image, coco_target(height, width, objects, self.categories, self.masks)


class DrawnScenes(Shapes):
    """Drawn shapes with label maps (background is class 0), or boxes and masks."""

    def __init__(self, cfg, split):
        super().__init__(cfg.img_size, cfg.in_chans, split, n={"train": 4000, "val": 200}[split])
        self.det = cfg.task == "det"
        self.unit, self.count = ("objects", count_objects) if self.det else ("pixels", count_pixels)
        self.most, self.masks, self.codes = 4, True, {i: i for i in range(IGNORE)}
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


def coco_target(height, width, objects, categories, masks=True):
    """COCO's annotations of one image -> a target of detection, without the crowds."""
    objects = [x for x in objects if not x["iscrowd"]]
    boxes = torch.tensor([x["bbox"] for x in objects], dtype=torch.float64).reshape(-1, 4)
    kinds = [categories.index(x["category_id"]) + 1 for x in objects]
    target = {"boxes": box_convert(boxes, "xywh", "xyxy").float(),
              "labels": torch.tensor(kinds, dtype=torch.int64)}
    if masks:
        decoded = np.array([decode_mask(x["segmentation"], height, width) for x in objects], np.uint8)
        target["masks"] = torch.from_numpy(decoded.reshape(-1, height, width))
    return target


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


def coco_results(image_id, output, categories):
    """Detections in one image -> COCO's result format: boxes x, y, w, h; masks, if any, as run lengths."""
    found = zip(*(output[name].tolist() for name in ("boxes", "labels", "scores")), strict=True)
    results = [{"image_id": image_id, "category_id": categories[kind - 1], "score": score,
                "bbox": [x1, y1, x2 - x1, y2 - y1]} for (x1, y1, x2, y2), kind, score in found]
    masks = (output["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy() if "masks" in output else ()
    for result, mask in zip(results, masks, strict=False):
        result["segmentation"] = rle.encode(np.asfortranarray(mask))
    return results


def average_precision(truth, results, image_ids, most=100, classes=()):
    """Per cent, by pycocotools: AP over the overlaps 0.5 to 0.95, and AP at 0.5, of boxes and, if there are
    any, of masks in these images, of the `most` best detections of each; for `classes` also the AP of each.
    No results: 0."""
    scores, kinds = {}, {"bbox": "box", "segm": "mask"}
    if not all(entry.get("segmentation") for entry in (*truth.dataset["annotations"][:1], *results[:1])):
        kinds.pop("segm")
    for kind, name in kinds.items():
        precision = np.full((10, 1), -1.0)
        if results:
            with redirect_stdout(None):
                evaluation = COCOeval(truth, truth.loadRes(results), kind)
                evaluation.params.imgIds, evaluation.params.maxDets = sorted(image_ids), [most]
                evaluation.evaluate()
                evaluation.accumulate()
            precision = evaluation.eval["precision"][..., 0, 0]  # (overlaps, recalls, classes), all areas
        for key, part in ((f"eval/{name}_ap", precision), (f"eval/{name}_ap50", precision[0])):
            part = part[part > -1]  # what there is to find
            scores[key] = 100 * float(part.mean()) if part.size else 0.0
        for i, one in enumerate(classes if results else ()):
            part = precision[..., i]
            if (part > -1).any():
                scores[f"eval/{name}_ap/{one}"] = 100 * float(part[part > -1].mean())
    return scores


