"""COCO files as they should not be: a change of a good one each. "counted:" ones are read, and what is wrong
is left out; "read:" ones are sound; the others are refused."""

import json
import math

import numpy as np
from PIL import Image

BOX = [[10, 10, 40, 10, 40, 30, 10, 30]]  # x, y of the corners


def write_set(root, spoil, **tags):
    """A folder in COCO's layout: 2 + 2 images of 48 x 64 pixels, two objects each, one of each category; the
    training file's content goes through spoil(content) first. Returns the folder."""
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in
                                                                   enumerate(("thing", "other"), start=1)]}
        for i in range(2):
            noise = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / f"images/{split}/{i}.jpg", **tags)
            content["images"].append({"id": i, "file_name": f"{i}.jpg", "height": 48, "width": 64})
            for kind in (1, 2):
                content["annotations"].append({
                    "id": 2 * i + kind, "image_id": i, "category_id": kind, "iscrowd": 0, "area": 600,
                    "bbox": [10, 10, 30, 20], "segmentation": BOX})
        if split == "train":
            spoil(content)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


def entry(**values):
    return lambda content: content["annotations"][0].update(values)


def image(**values):
    return lambda content: content["images"][0].update(values)


def without(key):
    return lambda content: content["annotations"][0].pop(key)


def runs(counts, size=(48, 64)):
    return entry(segmentation={"size": list(size), "counts": counts})


MALFORMED = {
    "a coordinate that is not a number": entry(segmentation=[[math.nan, *BOX[0][1:]]]),
    "a coordinate of 1e308": entry(segmentation=[[1e308, *BOX[0][1:]]]),
    "a coordinate of 400 digits": entry(segmentation=[[10**400, *BOX[0][1:]]]),
    "a coordinate in text": entry(segmentation=[["10", *BOX[0][1:]]]),
    "a polygon of seven numbers": entry(segmentation=[BOX[0][:7]]),
    "a flat polygon": entry(segmentation=BOX[0]),
    "a polygon of pairs": entry(segmentation=[[[10, 10], [40, 10], [40, 30], [10, 30], [9, 9], [8, 8]]]),
    "a mask that is a number": entry(segmentation=7),
    "run lengths that are too short": runs([100, 200]),
    "run lengths of 2**40": runs([2**40]),
    "negative run lengths": runs([4000, -928]),
    "run lengths with a fraction": runs([1000.5, 2071.5]),
    "compressed run lengths cut off": runs("PPP"),
    "compressed run lengths of other letters": runs("\u00e9\u20ac"),
    "run lengths of another size": runs([3072], (64, 48)),
    "run lengths of a huge size": runs([2**60], (2**30, 2**30)),
    "run lengths without size": entry(segmentation={"counts": [3072]}),
    "run lengths of null": runs(None),
    "a box of three numbers": entry(bbox=[1, 2, 3]),
    "a box of five numbers": entry(bbox=[1, 2, 3, 4, 5]),
    "a box with NaN": entry(bbox=[math.nan, 2, 3, 4]),
    "no box": without("bbox"),
    "an area in text": entry(area="600"),
    "an area of NaN": entry(area=math.nan),
    "iscrowd of 7": entry(iscrowd=7),
    "a category that is not listed": entry(category_id=9),
    "an image that is not listed": entry(image_id=77),
    "an image that is a list": entry(image_id=[0]),
    "a height of 0": image(height=0),
    "a width of 2**40": image(width=2**40),
    "a height with a fraction": image(height=47.5),
    "no file name": lambda content: content["images"][0].pop("file_name"),
    "two images of one id": image(id=1),
    "an id in text among numbers": image(id="0"),
    "two categories of one id": lambda content: content["categories"][0].update(id=2),
    "no categories": lambda content: content.update(categories=[]),
    "annotations that are an object": lambda content: content.update(annotations={"0": 1}),
    "counted: a box without a mask": without("segmentation"),
    "counted: a polygon of two corners": entry(segmentation=[[1, 2, 3, 4]]),
    "counted: a box of no width": entry(bbox=[10, 10, 0, 20]),
    "counted: a box of negative width": entry(bbox=[10, 10, -5, 20]),
    "read: run lengths": runs([490, *[20, 28] * 29, 20, 1170]),
    "read: sizes as text": image(height="48", width="64"),
    "read: no area, and numbers as text": entry(area=None, iscrowd="0", category_id="1"),
}
