"""Evaluation of finetune.py: accuracy on held-out images, features of a frozen network, kNN."""

import json

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import EvalCrop, UserError, eval_keys, new_file, print0, write_atomically


def eval_batches(source, run):
    """This process's share of a data set, centre-cropped. Unreadable images are left out, not replaced."""
    samples = run.samples(source, EvalCrop(run.cfg.test_size, run.cfg.test_crop), flip=False)
    samples.tries = 1
    for batch in run.load_batches(samples, eval_keys(len(source), run)):
        rows = [batch[name] for name in ("image", "label", "index")]
        if bad := {path for path, _ in batch["bad"]}:
            good = torch.tensor([source.name(i) not in bad for i in batch["index"].tolist()])
            rows = [x[good] for x in rows]
        images, labels, numbers = rows
        if len(numbers):
            labels, numbers = (x.to(run.device, non_blocking=True) for x in (labels, numbers))
            yield run.normalize(images), labels, numbers
    run.share_bad_files()
    if all(source.name(i) in run.bad_files for i in range(len(source))):
        raise UserError(f"none of the {len(source)} images to evaluate can be read")


@torch.inference_mode()
def evaluate(classify, batches, source, run, confusion=None):
    """Scores of classify (images -> (B, classes)) on the batches of all processes, in %: top1, top5 (of more
    than five classes), macc, the mean of the accuracies per class, and the share of the commonest class.
    confusion: (classes, classes), by label and answer, to which the images are added."""
    classes = len(source.classes)
    counts = torch.zeros(3, classes, dtype=torch.int64, device=run.device)  # images, hits, hits of top 5
    for images, labels, _ in batches:
        with run.autocast():
            scores = classify(images).float()
        best = scores.topk(min(5, classes)).indices
        hit = best == labels[:, None]
        if confusion is not None:
            confusion.index_put_((labels, best[:, 0]), torch.ones_like(labels), accumulate=True)
        counts.index_add_(1, labels, torch.stack([labels >= 0, hit[:, 0], hit.any(1)]).long())
    for x in (counts, confusion) if run.world_size > 1 else ():
        if x is not None:
            dist.all_reduce(x)
    counts = counts.cpu().double()
    n, top1, top5 = counts.sum(1)
    present = counts[0] > 0
    shares = {"top1": top1 / n, "macc": (counts[1] / counts[0])[present].mean(),
              "commonest": counts[0].max() / n} | ({"top5": top5 / n} if classes > 5 else {})
    scores = {f"eval/{name}": round(100 * share.item(), 3) for name, share in shares.items()}
    return scores | {"eval/n": int(n), "eval/unreadable": len(source) - int(n)}


@torch.no_grad()  # not inference mode: a probe trains on what comes out
def extract(model, source, run):
    """features (n, D) float32, labels (n,) and numbers (n,) of the images of `source` that can be read, on
    every process."""
    model.eval()
    features = torch.zeros(len(source), model.embed_dim, device=run.device)
    labels, seen = torch.zeros(2, len(source), dtype=torch.int64, device=run.device)
    for images, some_labels, numbers in eval_batches(source, run):
        with run.autocast():
            features[numbers] = model.features(images).float()
        labels[numbers], seen[numbers] = some_labels, 1
    for x in (features, labels, seen) if run.world_size > 1 else ():
        dist.all_reduce(x)  # every row was filled by one process and is zero on the others
    numbers = seen.nonzero()[:, 0]
    wrong = int((~features.isfinite().all(1)).sum())
    if wrong:
        raise UserError(f"features of {wrong} of {len(source)} images are not finite: {run.cfg.weights} is "
                        "damaged or of a run that diverged, or --amp off is needed")
    return features[numbers], labels[numbers], numbers


def batches_of_features(model, source, run):
    """What `evaluate` takes, from features that are computed once: this process's share."""
    shares = [x[run.rank :: run.world_size].split(256) for x in extract(model, source, run)]
    return [*zip(*shares, strict=True)]


def knn_scores(queries, features, labels, num_classes, k, temperature):
    """Weighted vote of the k nearest training features by cosine similarity: (Q, num_classes).
    queries: (Q, D); features: (N, D), of length 1; labels: (N,)."""
    with torch.autocast(queries.device.type, enabled=False):
        cosine = F.normalize(queries.float(), dim=1) @ features.T
    similarity, nearest = cosine.topk(min(k, len(features)), dim=1)
    weights = ((similarity - similarity[:, :1]) / temperature).exp()  # the nearest has 1: nothing overflows
    votes = F.one_hot(labels[nearest], num_classes) * weights[..., None]
    return votes.sum(1)


def knn(model, source, held_out, run):
    """--mode knn: what `evaluate` gives, for `source` as training images."""
    k, temperature = run.cfg.k, run.cfg.temperature
    features, labels, _ = extract(model, source, run)
    features = F.normalize(features, dim=1)

    def vote(queries):
        return knn_scores(queries, features, labels, len(source.classes), k, temperature)

    batches = batches_of_features(model, held_out, run)
    return evaluate(vote, batches, held_out, run) | {"k": k, "temperature": temperature}


def as_line(name):
    """A file's name as one line: as it is, or as a JSON string if it begins with a quotation mark or has line
    breaks, other characters that cannot be printed, or bytes that are no UTF-8."""
    return name if name.isprintable() and not name.startswith('"') else json.dumps(name)


def write_features(model, source, run):
    """--mode features: --out (N, D) float32 .npy, and next to it the images' names, one per line. What cannot
    be read is left out of both."""
    cfg = run.cfg
    path = new_file(cfg.out or "features.npy", ".npy")
    names_path = new_file(path.with_suffix(".txt"), ".txt")
    run.join()
    features, _, numbers = extract(model.to(run.device), source, run)
    if run.is_main:
        names = "".join(f"{as_line(source.name(i))}\n" for i in numbers.tolist())
        write_atomically(path, lambda file: np.save(file, features.cpu().numpy()))
        write_atomically(names_path, lambda file: file.write(names.encode()))
    print0(f"{path}: {len(features)} images x {model.embed_dim} ({cfg.test_size} px, pool {cfg.pool}), names "
           f"in {names_path}; unreadable ones, left out: {len(source) - len(features)}")
