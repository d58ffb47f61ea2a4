"""What finetune.py does with a finished classifier: `--predict IMAGES` and `--mode evaluate`.

The classifier is best.pth of finetune.py, a fine-tuned file of MAE's code, or a classifier of timm or
torchvision. Network, size, normalisation and classes come from the file where it tells them.
"""

import copy
import csv
import io

import torch

from backbones import make_classifier
from common import (
    UserError,
    load_weights,
    network_of,
    new_file,
    open_data,
    print0,
    read_file,
    weights_of,
    write_atomically,
)
from evaluate import eval_batches, evaluate
from sources import open_held_out

TOP = 5  # classes per image in the CSV file


def load_finished(cfg):
    """--weights -> (the classifier, names of its classes, whether the file names them)."""
    content = read_file(cfg.weights)
    weights, built = weights_of(content, ""), copy.copy(cfg)
    heads = [name for name in ("head.weight", "head.1.weight", "fc.weight", "fc.1.weight") if name in weights]
    if not heads:
        raise UserError(f"{cfg.weights} has no classifier: train one, finetune.py --weights {cfg.weights}")
    n, names = len(weights[heads[0]]), network_of(content).get("classes")
    built.mode = "linear" if ".1." in heads[0] else "finetune"  # whose head begins with BatchNorm
    model = make_classifier(built, n)
    load_weights(model, cfg.weights, getattr(model, "idle_names", ()), ("decoder", "mask_token"), "", content)
    return model.eval(), names or [str(i) for i in range(n)], names is not None


def open_evaluated(cfg, classes, named):
    """The labelled images of --data, with the file's classes; where it names none, with as many, in order."""
    if named:
        return open_held_out(cfg, classes)
    source = open_held_out(cfg)
    if len(source.classes) != len(classes):
        raise UserError(f"{cfg.weights} names no classes and has {len(classes)}; --data {cfg.data} has "
                        f"{len(source.classes)}: expected all of them, in the order of training")
    return source


def write_csv(path, rows):
    """Names of files that are not UTF-8 keep their bytes."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))


def write_confusion(out, classes, matrix):
    """matrix: (classes, classes), by label and answer"""
    lines = [[name, *line] for name, line in zip(classes, matrix.tolist(), strict=True)]
    write_csv(out / "confusion.csv", [["class", *classes], *lines])


def evaluate_file(cfg, run, report):
    """--mode evaluate: scores, per_class.csv and confusion.csv in --out."""
    model, classes, named = load_finished(cfg)
    source = open_evaluated(cfg, classes, named)
    classes = source.classes
    run.start(None)
    run.load()  # nothing to resume; writes config.json
    model.to(run.device)
    matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=run.device)
    report(run, evaluate(model, eval_batches(source, run), source, run, matrix))
    if not run.is_main:
        return
    matrix = matrix.cpu()
    hits, counts, others = matrix.diag().tolist(), matrix.sum(1).tolist(), matrix.clone().fill_diagonal_(0)
    rows, confused = [], zip(*others.max(1), strict=True)
    for name, n, right, (times, other) in zip(classes, counts, hits, confused, strict=True):
        share, other = round(100 * right / n, 2) if n else "", classes[other] if times else ""
        rows.append([name, n, right, share, other, int(times)])
    head = ["class", "images", "right", "accuracy", "taken_for", "times"]
    write_csv(run.out / "per_class.csv", [head, *rows])
    write_confusion(run.out, classes, matrix)
    worst = sorted((row for row in rows if row[1]), key=lambda row: row[3])
    for name, n, right, _, other, times in worst[:5]:
        print0(f"  {name}: {right} of {n} right" + f"; {times} taken for {other}" * bool(times))
    print0(f"done: {run.out}/per_class.csv, confusion.csv (a line per class, a column per answer), log.jsonl")


@torch.inference_mode()
def predict_images(cfg, run):
    """--predict: --out, a CSV file, with the most probable classes of each image that can be read."""
    path = new_file(cfg.out or "predictions.csv", ".csv")
    model, classes, _ = load_finished(cfg)
    source, rows = open_data(cfg, "all"), []
    run.join()
    model.to(run.device)
    run.bad_limit = len(source)  # what cannot be read is named, and left out
    for images, _, numbers in eval_batches(source, run):
        with run.autocast():
            scores = model(images).float()
        top = scores.softmax(1).topk(min(TOP, len(classes)))
        rows += zip(numbers.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    rows = sorted(row for part in run.gather(rows) for row in part)
    head = ["file", "class", "probability"]
    head += [f"{name}_{i}" for i in range(2, min(TOP, len(classes)) + 1) for name in ("class", "probability")]
    lines = [[source.name(i), *(x for kind, p in zip(kinds, shares, strict=True)
                                for x in (classes[kind], f"{p:.4f}"))] for i, kinds, shares in rows]
    if run.is_main:
        write_csv(path, [head, *lines])
    for line in lines[:5]:
        print0(f"  {line[0]}: {line[1]} {line[2]}")
    size = " x ".join(map(str, cfg.test_size))
    print0(f"{path}: {len(lines)} images, seen at {size} pixels; unreadable ones, left out: "
           f"{len(source) - len(lines)}")
