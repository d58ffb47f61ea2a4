"""--mode layers of finetune.py: linear probe and kNN of every block, so where in a network the features are.
It prints a table and writes layers.csv and layers.png.

    ViT        each block's class token and mean patch token, after the network's last LayerNorm
    ResNet-50  mean of the map at the end of each of the four stages
    RevColV2   mean of each level, 0 (the finest) to 3, of each bottom-up column

All features are computed once, of centre crops; the last row's kNN is that of --mode knn. The linear probes
are trained as in --mode linear --augment none, but in float32 and without --clip_grad: all at once, and still
independent. They start from the same weights and see the same batches; BatchNorm and LARS work head by head.
Our choice: the last LayerNorm, which was trained for the last block, normalises the earlier ones as well.
"""

import copy
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from backbones import make_head
from common import ResNet50, UserError, ViT, epoch_order, print0, set_lr, warmup_cosine, write_atomically
from draw import chart
from evaluate import batches_of_features, evaluate, extract, knn_scores
from finetune import LARS, loss_of  # a second copy of it, as it runs as __main__: harmless
from predict import write_csv

LIMIT = 8  # GiB of features; while they are gathered, there are two copies


def blocks_of(model):
    """{name: module}, in the order of the network"""
    if isinstance(model, ViT):
        return {str(i): block for i, block in enumerate(model.blocks, start=1)}
    if isinstance(model, ResNet50):
        return {f"stage {i}": getattr(model, f"layer{i}") for i in range(1, 5)}
    return {f"column {i}": column for i, column in enumerate(model.bottom_up, start=1)}


class AllBlocks(nn.Module):
    """A frozen network with the features of all blocks side by side, in the form that evaluate.extract takes.
    places: (block, pool) of each vector; widths: its length, found with `images`, of any content."""

    def __init__(self, model, images):
        super().__init__()
        self.model, self.found = model.eval(), {}
        for name, block in blocks_of(model).items():
            block.register_forward_hook(partial(self.read, name))
        self.embed_dim = self.features(images).shape[1]
        self.places, self.widths = list(self.found), [x.shape[1] for x in self.found.values()]

    def read(self, name, block, inputs, x):
        """x: what the block returns, tokens (B, 1 + L, D), a map (B, D, h, w) or levels (B, N, D)"""
        if isinstance(x, tuple):
            self.found |= {(f"{name} level {i}", "mean"): level.mean(1) for i, level in enumerate(x)}
        elif x.ndim == 4:
            self.found[name, "mean"] = x.mean((2, 3))
        else:  # a fine-tuned file has fc_norm in place of norm; the other one is the identity
            x, fc_norm = self.model.norm(x), self.model.fc_norm
            self.found |= {(name, "cls"): fc_norm(x[:, 0]), (name, "mean"): fc_norm(x[:, 1:].mean(1))}

    def features(self, images):
        """(B, C, H, W) -> (B, sum of widths) float32"""
        self.model.features(images)
        return torch.cat([x.float() for x in self.found.values()], dim=1)


def train_heads(features, labels, widths, num_classes, cfg):
    """A linear probe for each part, of these widths, of features (n, sum of widths); labels (n,)."""
    n, B = len(labels), min(cfg.batch_size, len(labels))
    steps, heads, built = int(cfg.epochs * n // B), nn.ModuleList(), copy.copy(cfg)
    if B < 2 or steps < 1:
        raise UserError(f"{n} images, batch {B}, {cfg.epochs} epochs: a probe needs two images per update")
    built.mode = "linear"
    for width in widths:
        torch.manual_seed(cfg.seed)
        heads.append(make_head(width, num_classes, built).to(features.device))
    optimizer = LARS(heads.parameters(), cfg.weight_decay)
    for step in range(steps):
        epoch, first = divmod(step * B, n)  # as in training: an update may go on into the next pass
        order = np.concatenate([epoch_order(n, cfg.seed, epoch), epoch_order(n, cfg.seed, epoch + 1)])
        rows = torch.from_numpy(order[first : first + B].astype(np.int64)).to(features.device)
        set_lr(optimizer, warmup_cosine(step * B / n, cfg.peak_lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs))
        parts = features[rows].split(widths, dim=1)
        optimizer.zero_grad(set_to_none=True)
        sum(loss_of(head(x), labels[rows], cfg) for head, x in zip(heads, parts, strict=True)).backward()
        optimizer.step()
    return heads.eval()


def probe_layers(model, source, held_out, run):
    """--mode layers"""
    cfg, num_classes, n = run.cfg, len(source.classes), len(source) + len(held_out)
    network = AllBlocks(model, torch.zeros(1, cfg.in_chans, *cfg.test_size, device=run.device))
    size = 4 * network.embed_dim * n / 2**30
    if size > LIMIT:
        raise UserError(f"features of all blocks of {n} images need {size:.1f} GiB, more than {LIMIT}: give "
                        f"a smaller --data, at most {int(n * LIMIT / size)} images with those held out")
    features, labels, _ = extract(network, source, run)
    batches, parts = batches_of_features(network, held_out, run), features.split(network.widths, dim=1)
    vote = partial(knn_scores, labels=labels, num_classes=num_classes, k=cfg.k, temperature=cfg.temperature)
    kinds = {"linear": train_heads(features, labels, network.widths, num_classes, cfg),
             "kNN": (partial(vote, features=F.normalize(x, dim=1)) for x in parts)}

    def scores(classify, place):
        return evaluate(lambda x: classify(x.split(network.widths, dim=1)[place]), batches, held_out, run)

    table = {}  # {column: [top-1 of each block]}
    for kind, classifiers in kinds.items():
        for i, classify in enumerate(classifiers):
            result = scores(classify, i)
            table.setdefault(f"{kind} {network.places[i][1]}", []).append(result["eval/top1"])
    blocks, commonest, n = list(dict(network.places)), result["eval/commonest"], result["eval/n"]
    print0(f"layers of {cfg.weights}: top-1 in %, * best of its column; commonest class {commonest:.2f} %; "
           f"{n} images held out, {result['eval/unreadable']} unreadable, {len(labels)} training images")
    print0(f"{'block':16}" + "".join(f"{name:>12} " for name in table))
    for block, *row in zip(blocks, *table.values(), strict=True):
        best = (" *"[x == max(column)] for x, column in zip(row, table.values(), strict=True))
        print0(f"{block:16}" + "".join(f"{x:12.2f}{mark}" for x, mark in zip(row, best, strict=True)))
    if run.is_main:
        head = ["block", *(name.lower().replace(" ", "_") for name in table)]
        write_csv(run.out / "layers.csv", [head, *zip(blocks, *table.values(), strict=True)])
        lines = {name: list(enumerate(column, start=1)) for name, column in table.items()}
        lines["commonest class"] = [(0.5, commonest), (len(blocks) + 0.5, commonest)]
        picture = chart(f"{cfg.model}: top-1 in % of {n} held-out images", lines, "block (row of the table)")
        write_atomically(run.out / "layers.png", lambda file: picture.save(file, "png"))
    print0(f"done: {run.out}/layers.csv, layers.png")
