"""What transfer_seg_det.py does with a finished model.pth: `--predict IMAGES` and `--mode evaluate`.

Task, network, size, normalisation and classes come from the file.
"""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import overlay
import transfer_data as data
from coco import coco_results, coco_truth, count_objects
from common import (
    EXTENSIONS,
    UserError,
    eval_keys,
    load_weights,
    network_of,
    open_data,
    print0,
    read_file,
    write_atomically,
)
from predict import write_confusion, write_csv


def load_finished(cfg, run, make_model):
    """(model, what the file says of itself)"""
    content = read_file(cfg.weights)
    meta = network_of(content)
    model = make_model(cfg, len(meta["classes"]), meta.get("masks", True))
    load_weights(model, cfg.weights, prefix="", content=content)
    return model.to(run.device).eval(), meta


def evaluate_file(cfg, run, script, make_model):
    """--mode evaluate: scores of the held-out images, per_class.csv and, for segmentation, confusion.csv."""
    held_out = script.open_scenes(cfg, "val")
    run.start(None)
    run.load()  # nothing to resume; writes config.json
    model, meta = load_finished(cfg, run, make_model)
    classes = held_out.classes
    if list(classes) != list(meta["classes"]):
        ours, theirs = (", ".join(names[:4]) for names in (meta["classes"], classes))
        raise UserError(f"{cfg.weights} has the classes {ours} ..., --data {cfg.data} {theirs} ...: expected "
                        "the same, in the same order")
    samples = data.Scenes(run.samples(held_out, data.Fit(cfg)))
    truth = coco_truth(held_out) if cfg.task == "det" and run.is_main else None
    scores, matrix = script.evaluate(model, samples, truth, run)
    if not run.is_main:
        return
    script.report(scores, held_out, run)
    names = ("iou",) if cfg.task == "seg" else ("box_ap", "mask_ap")
    rows = [[name, *(scores.get(f"eval/{score}/{name}", "") for score in names)] for name in classes]
    write_csv(run.out / "per_class.csv", [["class", *names], *rows])
    if cfg.task == "seg":
        write_confusion(run.out, classes, matrix)
    more = ", confusion.csv (pixels: a line per class, a column per answer)" if cfg.task == "seg" else ""
    print0(f"done: {run.out}/per_class.csv, log.jsonl{more}")


class Photos:
    """Images without targets as transfer_seg_det.py evaluates them: the image as it is stands for its target,
    for detection in a dict, as such targets are."""

    def __init__(self, source, det):
        self.source, self.det, self.in_chans, self.name = source, det, source.in_chans, source.name

    def __len__(self):
        return len(self.source)

    def read(self, index):
        image, _ = self.source.read(index)
        return image, {"image": image} if self.det else image


def names_of(source):
    """A path below --out for each image: its own below the folder that all are in, as .png."""
    names = [source.name(i) for i in range(len(source))]
    root = os.path.commonpath([os.path.dirname(name) or "." for name in names])
    paths, taken = [], set()
    for name in names:
        path = Path(os.path.relpath(name, root))
        path = path.with_suffix(".png") if path.suffix.lower() in EXTENSIONS else Path(f"{path}.png")
        while path in taken:
            path = Path(f"{path}.png")
        taken.add(path)
        paths.append(path)
    return paths


def image_ids(source):
    """COCO's: the numbers that files are named by, if all are and they differ; else counted from 1."""
    stems = [Path(source.name(i)).stem for i in range(len(source))]
    numbers = [int(stem) for stem in stems if stem.isdecimal()]
    return numbers if len(set(numbers)) == len(stems) else list(range(1, len(stems) + 1))


def label_image(labels, codes):
    """(H, W) class numbers -> a PNG of the numbers that the training's maps had, shown in colours; of the
    colours themselves if those were coloured. codes: {label: number or r << 16 | g << 8 | b}."""
    coloured = max(codes.values()) > 255
    numbers = np.array([i if coloured else codes[i] for i in range(len(codes))], np.uint8)
    image, palette = Image.fromarray(numbers[labels.numpy()], "P"), [0] * 768
    for i, number in enumerate(numbers.tolist()):
        colour = codes[i].to_bytes(3, "big") if coloured else overlay.colour_of(i + 1)
        palette[3 * number : 3 * number + 3] = colour
    image.putpalette(palette)
    return image


def with_legend(image, target, classes):
    """(3, h, w) uint8: the image under the target, and the names of its classes."""
    side = max(512, min(1024, max(image.shape[1:])))
    picture, names = overlay.paint(image, target, side), overlay.legend([target], classes)
    height = max(picture.shape[1], names.shape[1])
    parts = [TF.pad(x, [0, 0, 8, height - x.shape[1]], fill=255) for x in (picture, names)]
    return TF.to_pil_image(torch.cat(parts, dim=2))


def save_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: image.save(file, "png"))


@torch.inference_mode()
def predict_scenes(cfg, run, script, make_model):
    """--predict: of each image pictures/NAME.png, the prediction on it; and labels/NAME.png, or of all
    detections results.json, in COCO's format, with images.json, which explains its ids."""
    cfg.data = cfg.predict
    det = cfg.task == "det"
    source = Photos(open_data(cfg, "all"), det)
    run.start(None)
    model, meta = load_finished(cfg, run, make_model)
    paths, ids, classes = names_of(source), image_ids(source), list(meta["classes"])
    codes = meta.get("codes", {i: i + cfg.zero_is_ignore for i in range(len(classes))})
    categories = meta.get("categories", list(range(1, len(classes) + 1)))
    samples = data.Scenes(run.samples(source, data.Fit(cfg)))
    run.bad_limit, samples.samples.tries = len(source), 1  # what cannot be read is named, and left out
    results, images, counts = [], [], Counter()
    for batch in run.load_batches(samples, eval_keys(len(source), run, batch=1), data.collate_scenes):
        if batch["bad"]:
            continue
        i, found = batch["index"].item(), script.predict(model, batch, run)
        image = batch["target"][0]["image"] if det else batch["target"][0]
        image = TF.to_dtype(image, torch.uint8, scale=True)
        height, width = image.shape[1:]
        images.append({"id": ids[i], "file_name": source.name(i), "height": height, "width": width})
        if det:
            results += coco_results(ids[i], found, categories)
            target = overlay.sure(found)
            counts += count_objects(target)
        else:
            found = found.cpu()
            save_image(run.out / "labels" / paths[i], label_image(found, codes))
            target = overlay.regions(found, image)
            counts += data.count_pixels(found)
        save_image(run.out / "pictures" / paths[i], with_legend(image, target, classes))
    run.share_bad_files()
    results, images = (sum(run.gather(part), []) for part in (results, images))
    images.sort(key=lambda image: image["id"])
    total = sum(run.gather(counts), Counter())
    if not images:
        raise UserError(f"none of the {len(source)} images of --predict {cfg.predict} can be read")
    if det and run.is_main:
        run.write("results.json", json.dumps(results, default=bytes.decode))  # run lengths are bytes
        names = [{"id": i, "name": name} for i, name in zip(categories, classes, strict=True)]
        run.write("images.json", json.dumps({"images": images, "categories": names}))
    unit = "objects of a score above 0.5" if det else "pixels, of all"
    shares = [(classes[kind], n if det else f"{n / total.total():.1%}") for kind, n in total.most_common(8)]
    print0(f"{len(images)} images; {unit}: {', '.join(f'{name} {n}' for name, n in shares) or 'none'}")
    files = "results.json, images.json" if det else "labels/"
    print0(f"done: {run.out}/pictures/, {files}; unreadable images, left out: {len(source) - len(images)}")
