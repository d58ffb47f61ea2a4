"""Pictures of label maps, boxes and masks on their images, for transfer_seg_det.py."""

import colorsys
import textwrap

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from transfer_data import IGNORE, crop, nearest

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


def sure(found, least=0):
    """The detections of a score above 0.5, and the `least` best -> a target of detection, with "scores"."""
    scores = found["scores"]
    shown = (scores > 0.5) | (scores.argsort(descending=True).argsort() < least)
    found = {name: value[shown].cpu() for name, value in found.items()}
    return found | ({"masks": found["masks"][:, 0] > 0.5} if "masks" in found else {})


def show(image, target=None):
    """Image uint8 (C, H, W) -> (3, SHOWN, SHOWN), fitted in, under its target: see paint."""
    return crop(paint(image, target, SHOWN), (0, 0), (SHOWN, SHOWN), False, 255)


def paint(image, target, side):
    """Image uint8 (C, H, W) -> (3, h, w), the longer one `side`, under the masks and boxes of a target of
    detection, in the colours of their classes, with the scores if there are any."""
    factor = side / max(image.shape[1:])
    size = [max(1, round(factor * side)) for side in image.shape[1:]]
    image = TF.resize(image if len(image) == 3 else image[:1].expand(3, -1, -1), size)
    if target:
        colours = [colour_of(kind) for kind in target["labels"].tolist()]
        masks = nearest(target["masks"].to(torch.uint8), size).bool() if "masks" in target else ()
        for mask, colour in reversed([*zip(masks, colours, strict=False)]):  # one by one, the best on top
            image = draw_segmentation_masks(image, mask, alpha=0.65, colors=colour)
        words = [f"{score:.2f}" for score in target["scores"]] if "scores" in target else None
        if len(target["boxes"]):
            image = draw_bounding_boxes(image, target["boxes"] * factor, words, colours)
    return image


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
