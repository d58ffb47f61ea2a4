"""Fine-tuning, linear probing and kNN of a pre-trained Vision Transformer or ResNet-50.

finetune  the whole network, AdamW, layer-wise learning-rate decay, drop path, mixup / cutmix, RandAugment, random erasing,
          label smoothing, moving average. Defaults: MFF appendix, table 3. Head on the mean of the last block's patch tokens
          after a fresh LayerNorm (`--pool avg`, as MAE), or on the normalised class token (`--pool cls`).
linear    frozen network, BatchNorm without affine parameters + linear layer, LARS. Defaults: MAE's protocol, MFF appendix,
          table 2. `--augment none` computes the features once, which makes the probe a matter of seconds.
knn       frozen network, vote of the k nearest training features (cosine, weights exp(similarity / temperature)).

`--weights` takes encoder.pth or last.pth of any script here, official MAE files, timm's ViTs, torchvision's ResNet-50, `none`
(the baseline to compare with). Model, size and normalisation come from the file where it says them. Number of classes: from
the data, which needs train/ and val/ (or an .npz with `split`, or shapes, cifar10, cifar100, stl10, cars). A ResNet is read out
by the mean over its last map, without layer-wise decay (CIM table 15) and, so far, without drop path. A RevColV2 is fine-tuned
on the mean of the top level of its last top-down column, without the units that this does not depend on (so such a file serves
no dense task), and probed on that of its last bottom-up column (RevColV2's supplement, 2.2).

Differences from MAE's recipe (not in the papers, our choice): RandAugment has torchvision's operations (two, each with
probability 0.5, magnitude 9 of 10 without noise); random erasing draws one box per image without retries; mixup and cutmix
pair each image with its neighbour in the batch.

    python finetune.py --demo --mode linear --weights runs/mae_mff/encoder.pth
    torchrun --nproc_per_node 4 finetune.py --weights encoder.pth
    torchrun --nproc_per_node 4 finetune.py --weights encoder.pth --mode linear
    python finetune.py --weights encoder.pth --mode knn
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from common import (
    BESIDE_TRUNK,
    PARTS,
    EvalCrop,
    KeyedBatches,
    Normalise,
    RandomResizedCrop,
    Refused,
    ResNet50,
    RunConfig,
    Views,
    ViT,
    VitSize,
    adamw,
    autocast,
    check_data,
    finish_update,
    gradient_sync,
    launch,
    load_weights,
    make_loader,
    make_plan,
    normalisation,
    open_data,
    opt,
    parameter_groups,
    patch_grid,
    read_file,
    remember_statistics,
    set_lr,
    warmup_cosine,
)
from revcol_v2 import SIZES, RevColV2, cell_grid


@dataclass
class Config(RunConfig):
    # model
    mode: Literal["finetune", "linear", "knn"] = opt("finetune", "what to do with the weights")
    weights: str | None = opt(None, "file of weights, or none for random ones")
    model: Literal[*get_args(VitSize), "resnet50", *(f"revcol_{size}" for size in SIZES)] = opt(
        "base", "ViT, resnet50 or RevColV2; default: what the file says")
    patch_size: int = opt(16, "pixels; likewise")
    resnet_width: int = opt(64, "ResNet: channels of its stem; likewise")
    columns: int = opt(2, "RevColV2: bottom-up, and as many top-down, columns; likewise")
    recompute: bool = opt(False, "RevColV2: compute a column's inside again in the backward pass: less memory, more time")
    pool: Literal["avg", "cls"] | None = opt(None, "patch mean or class token; default avg to fine-tune, cls to probe a ViT")
    drop_path: float = opt(0.1, "stochastic depth of the last block (fine-tuning)")
    # optimisation; defaults by mode (MODES)
    epochs: float = opt(100.0, "passes over the data")
    batch_size: int = opt(1024, "images per update, over all processes")
    micro_batch: int | None = opt(None, "images per forward pass of one process; default: the largest that fits, up to 256")
    base_lr: float = opt(1e-3, "learning rate per 256 images")
    min_lr: float = opt(1e-6, "where the cosine ends")
    warmup_epochs: float = opt(5.0, "linear warm-up")
    weight_decay: float = opt(0.05, "AdamW, LARS")
    betas: tuple[float, float] = opt((0.9, 0.999), "AdamW")
    layer_decay: float = opt(0.75, "learning rate of a block = that of the next one times this")
    clip_grad: float = opt(0.0, "largest gradient norm; 0 = no clipping")
    ema: float = opt(0.0, "weight of the old value in the moving average that is evaluated; 0 = none")
    # augmentation
    augment: Literal["none", "crop", "full"] = opt("full", "centre crop; random resized crop, flip; and RandAugment")
    mixup: float = opt(0.8, "Beta parameter; 0 = off")
    cutmix: float = opt(1.0, "Beta parameter; 0 = off")
    smoothing: float = opt(0.1, "label smoothing")
    erasing: float = opt(0.25, "probability of random erasing")
    # evaluation
    k: int = opt(20, "neighbours (kNN)")
    temperature: float = opt(0.07, "of the vote (kNN)")
    eval_every: int = opt(1, "epochs between evaluations")

    def __post_init__(self):
        super().__post_init__()
        if self.weights is None and not self.check_data:
            raise ValueError("--weights FILE is needed; --weights none is the baseline with random weights")
        resnet = self.model == "resnet50"
        revcol = self.model.startswith("revcol")
        if not resnet:
            (cell_grid if revcol else patch_grid)(self.img_size, self.patch_size)  # ValueError unless they fit
        no_cls = resnet or revcol
        self.pool = self.pool or ("avg" if self.mode == "finetune" or no_cls else "cls")
        if no_cls and self.pool == "cls":
            raise ValueError(f"--pool cls: {self.model} has no class token")
        if resnet and (self.layer_decay != 1 or self.drop_path):
            raise ValueError("--layer_decay and --drop_path are for ViTs and RevColV2")
        if self.recompute and not revcol:
            raise ValueError(f"--recompute is for RevColV2, not {self.model}")
        if self.ema and self.mode != "finetune":
            raise ValueError("--ema is for --mode finetune")


# What a file of weights says of its network and of the images that it was trained on.
NETWORK = ("model", "patch_size", "resnet_width", "columns", "in_chans", "mean", "std")
PLAIN = {"augment": "crop", "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "erasing": 0.0, "drop_path": 0.0}
MODES = {
    "finetune": {},
    "linear": PLAIN | {"epochs": 90.0, "batch_size": 16384, "base_lr": 0.1, "min_lr": 0.0, "warmup_epochs": 10.0,
                       "weight_decay": 0.0},
    "knn": PLAIN,
}
DEMO = {
    "finetune": PLAIN | {"epochs": 2.0, "batch_size": 128, "base_lr": 2e-3, "warmup_epochs": 0.5},
    "linear": {"epochs": 30.0, "batch_size": 512, "augment": "none", "warmup_epochs": 3.0, "pool": "avg", "base_lr": 4.0},
    "knn": {"pool": "avg"},
}


def presets(flags):
    """Defaults by --mode, then by --demo, then by what the file of weights says."""
    values = dict(MODES[flags.mode])
    if flags.demo:
        values |= {"data": "shapes", "img_size": (32, 32), "model": "nano", "patch_size": 4} | DEMO[flags.mode]
    if flags.weights not in (None, "none"):
        content = read_file(flags.weights)
        values |= {k: content["meta"][k] for k in (*NETWORK, "img_size") if k in content.get("meta", {})}
    if "resnet50" in (flags.model, values.get("model")):
        values |= {"layer_decay": 1.0, "drop_path": 0.0}
    return values


# ---- model -----------------------------------------------------------------------------------------------------------


def init_head(linear, probe):
    """Initial values of the classifier; `probe`: with BatchNorm without affine parameters in front of it (MAE's protocol)."""
    nn.init.trunc_normal_(linear.weight, std=0.01 if probe else 2e-5)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6), linear) if probe else linear


class Classifier(ViT):
    """ViT with a linear head on one vector per image. `probe`: frozen, with the final LayerNorm it was trained with and
    BatchNorm in front of the head (MAE's protocol); else everything learns."""

    def __init__(self, cfg, num_classes):
        super().__init__(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans, cfg.drop_path)
        self.pool, self.probe = cfg.pool, cfg.mode != "finetune"
        self.head = nn.Linear(self.embed_dim, num_classes)
        self.init_weights()
        self.requires_grad_(not self.probe)
        self.head = init_head(self.head.requires_grad_(), self.probe)
        self.beside = []  # names in a file of weights that it has no use for
        if self.pool == "avg" and not self.probe:
            self.norm, self.fc_norm, self.beside = nn.Identity(), nn.LayerNorm(self.embed_dim, eps=1e-6), ["norm."]

    def features(self, images):
        """(B, C, H, W) -> (B, D): whole images, no masking, deterministic in eval mode."""
        x = super().forward(images)
        x = x[:, 1:].mean(1) if self.pool == "avg" else x[:, 0]
        return x if self.probe or self.pool == "cls" else self.fc_norm(x)

    def layer(self, name):
        return layer_id(name, self.depth)

    def forward(self, images):
        return self.head(self.features(images))


class RevColClassifier(RevColV2):
    """RevColV2 with a linear head: to be fine-tuned, on the mean of the last column's top level after a LayerNorm; `probe`: on
    that of the last bottom-up column, frozen, with BatchNorm in front of the head."""

    def __init__(self, cfg, num_classes):
        probe = cfg.mode != "finetune"
        super().__init__(cfg.model.removeprefix("revcol_"), cfg.img_size, cfg.patch_size, cfg.in_chans, cfg.drop_path,
                         cfg.columns, "column" if cfg.recompute else "plain", read="bottom_up" if probe else "top")
        self.requires_grad_(not probe)
        self.fc_norm = nn.Identity() if probe else nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.head = init_head(nn.Linear(self.embed_dim, num_classes), probe)

    def features(self, images):
        """(B, C, H, W) -> (B, D)"""
        return self.fc_norm(super().features(images))

    def forward(self, images):
        return self.head(self.features(images))


class ResNetClassifier(ResNet50):
    """The same for a ResNet-50, under torchvision's names: `fc` on the mean over the last map's positions."""

    def __init__(self, cfg, num_classes):
        super().__init__(cfg.resnet_width, cfg.in_chans)
        self.requires_grad_(cfg.mode == "finetune")
        self.fc = init_head(nn.Linear(self.embed_dim, num_classes), cfg.mode != "finetune")
        self.to(memory_format=torch.channels_last)
        self.beside = []

    @property
    def head(self):
        return self.fc

    def features(self, images):
        """(B, C, H, W) -> (B, D)"""
        return super().forward(images).mean((2, 3))

    def forward(self, images):
        return self.fc(self.features(images))


def layer_id(name, depth):
    """0: tokens, positions, patch embedding; k + 1: block k; depth + 1: the rest (MAE's and BEiT's numbering)."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) as MAE's linear probe uses it.

    Matrices: g += weight_decay * p; g *= 0.001 * |p| / |g| (factor 1 if either norm is 0). Vectors: neither.
    Then m = 0.9 * m + g; p -= lr * m.
    """

    def __init__(self, params, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad
                if p.ndim > 1:
                    g = g + group["weight_decay"] * p
                    p_norm, g_norm = p.norm(), g.norm()
                    ratio = group["trust"] * p_norm / g_norm
                    g = g * torch.where((p_norm > 0) & (g_norm > 0), ratio, torch.ones_like(ratio))
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * m)


# ---- augmentation on the device --------------------------------------------------------------------------------------


def random_erasing(images, probability):
    """Per image, with the given probability, fill a box of 2 to 33 % of the area and aspect 0.3 to 3.3 with N(0, 1) noise."""
    B, _, H, W = images.shape
    u = torch.rand(5, B, device=images.device)
    area, aspect = H * W * (0.02 + 0.31 * u[0]), torch.exp((2 * u[1] - 1) * math.log(3.3))
    h, w = (area * aspect).sqrt().clamp(max=H), (area / aspect).sqrt().clamp(max=W)
    top, left = u[2] * (H - h), u[3] * (W - w)
    rows, columns = torch.arange(H, device=images.device), torch.arange(W, device=images.device)
    inside = ((rows >= top[:, None]) & (rows < (top + h)[:, None]))[:, :, None] & (
        (columns >= left[:, None]) & (columns < (left + w)[:, None]))[:, None, :]
    erased = (inside & (u[4] < probability)[:, None, None])[:, None]
    return torch.where(erased, torch.randn_like(images), images)


def mixer(cfg, num_classes):
    """Mixup or cutmix, each half of the time, one lambda per batch: (images, labels) -> (images, soft labels)."""
    kinds = [kind(alpha=alpha, num_classes=num_classes)
             for kind, alpha in ((v2.MixUp, cfg.mixup), (v2.CutMix, cfg.cutmix)) if alpha > 0]
    return v2.RandomChoice(kinds) if kinds else None


# ---- evaluation ------------------------------------------------------------------------------------------------------


def own_share(n, run, batch=256):
    """Batches of keys that cover range(n) once over all processes: no padding, no sample counted twice."""
    indices = range(run.rank, n, run.world_size)
    return [[(0, i) for i in indices[start : start + batch]] for start in range(0, len(indices), batch)]


def eval_batches(source, cfg, run):
    """This process's share of a data set, centre-cropped."""
    views = Views(source, EvalCrop(cfg.img_size), cfg.seed, run.bad_files.allow(len(source)), flip=False)
    yield from run.timed(make_loader(views, own_share(len(source), run), run))
    run.bad_files.share()


@torch.inference_mode()
def evaluate(model, batches, to_inputs, run):
    """Accuracy over the batches of all processes: {"eval/top1": %, "eval/top5": %, "eval/n": images counted}.

    model: inputs -> scores (B, classes).
    """
    hits = torch.zeros(3, dtype=torch.float64, device=run.device)
    for batch in batches:
        labels = batch["label"].to(run.device)
        with autocast(run.device, run.amp_dtype):
            scores = model(to_inputs(batch)).float()
        hit = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        hits += torch.stack([hit[:, 0].sum(), hit.any(1).sum(), torch.tensor(len(labels), device=run.device)])
    if run.world_size > 1:
        dist.all_reduce(hits)
    top1, top5, n = hits.tolist()
    return {"eval/top1": round(100 * top1 / n, 3), "eval/top5": round(100 * top5 / n, 3), "eval/n": int(n)}


@torch.no_grad()  # not inference mode: a probe trains on what comes out
def extract(model, source, to_images, cfg, run):
    """features (N, D) float32 and labels (N,) of all of `source`, on every process."""
    model.eval()
    features = torch.zeros(len(source), model.embed_dim, device=run.device)
    labels = torch.zeros(len(source), dtype=torch.int64, device=run.device)
    for batch in eval_batches(source, cfg, run):
        index = batch["index"].to(run.device)
        with autocast(run.device, run.amp_dtype):
            features[index] = model.features(to_images(batch)).float()
        labels[index] = batch["label"].to(run.device)
    if run.world_size > 1:  # every row was filled by one process and is zero on the others
        dist.all_reduce(features)
        dist.all_reduce(labels)
    return features, labels


def knn_scores(queries, features, labels, num_classes, k, temperature):
    """Weighted vote of the k nearest training features by cosine similarity: (Q, num_classes).

    queries: (Q, D); features: (N, D), of length 1; labels: (N,).
    """
    with torch.autocast(queries.device.type, enabled=False):
        cosine = F.normalize(queries.float(), dim=1) @ features.T
    similarity, nearest = cosine.topk(min(k, len(features)), dim=1)
    votes = F.one_hot(labels[nearest], num_classes) * (similarity / temperature).exp()[..., None]
    return votes.sum(1)


# ---- training --------------------------------------------------------------------------------------------------------


def train_transform(cfg, mean):
    """What the loader does to a training image; the flip follows on the device."""
    if cfg.augment == "none":
        return EvalCrop(cfg.img_size)
    crop = RandomResizedCrop(cfg.img_size, scale=(0.08, 1.0))
    if cfg.augment == "crop":
        return crop
    if cfg.in_chans not in (1, 3):
        raise Refused(f"--augment full changes colours: it needs 1 or 3 channels, not {cfg.in_chans}; use --augment crop")
    fill = [round(255 * value) for value in mean]
    # Two operations, each applied half of the time, at magnitude 9 of 10: 27 of torchvision's 30.
    operation = v2.RandomApply([v2.RandAugment(1, 27, interpolation=InterpolationMode.BILINEAR, fill=fill)], p=0.5)
    return v2.Compose([crop, v2.ToDtype(torch.uint8, scale=True), operation, operation])


def train_step(net, batches, to_inputs, mix, optimizer, scaler, step, cfg, plan, run):
    """One update from plan.accum_steps micro-batches; returns {name: float, mean over the update} and the sample numbers."""
    optimizer.zero_grad(set_to_none=True)
    total, samples = 0.0, []
    for micro_step in range(plan.accum_steps):
        batch = next(batches)
        run.seed(step, micro_step)
        inputs, labels = to_inputs(batch), batch["label"].to(run.device, non_blocking=True)
        if cfg.erasing:
            inputs = random_erasing(inputs, cfg.erasing)
        if mix:
            inputs, labels = mix(inputs, labels)
        with gradient_sync(net, micro_step == plan.accum_steps - 1):
            with autocast(run.device, run.amp_dtype):
                scores = net(inputs)
            loss = F.cross_entropy(scores.float(), labels, label_smoothing=cfg.smoothing)
            scaler.scale(loss / plan.accum_steps).backward()
        total = total + loss.detach() / plan.accum_steps
        samples += batch["index"].tolist()
    return finish_update(run, optimizer, scaler, {"loss": total}, cfg.clip_grad), samples


def train(cfg, run):
    source = open_data(cfg, "train")
    if cfg.check_data:
        return check_data(source, run.workers)
    if not source.classes:
        raise Refused(f"--data {cfg.data} has no labels: expected {cfg.data}/train/CLASS/*.jpg and {cfg.data}/val/CLASS/*.jpg")
    held_out = open_data(cfg, "val", source.classes)
    mean, std = normalisation(cfg)
    to_images = Normalise(mean, std, run.device)
    plan = None if cfg.mode == "knn" else make_plan(len(source), cfg, run.world_size)
    if plan and plan.micro_batch < 2:
        raise Refused("mixup, cutmix and BatchNorm need two images per forward pass: raise --batch_size or --micro_batch")
    lr = cfg.base_lr * cfg.batch_size / 256
    torch.manual_seed(cfg.seed)
    resnet, revcol = cfg.model == "resnet50", cfg.model.startswith("revcol")
    model = (ResNetClassifier if resnet else RevColClassifier if revcol else Classifier)(cfg, len(source.classes))
    if cfg.weights != "none":
        load_weights(model, cfg.weights, allow_missing=("head.", "fc_norm.", "fc."), ignore=(*BESIDE_TRUNK, *model.beside),
                     part=PARTS)
    run.start(plan, f"lr {lr:.3g} = {cfg.base_lr:.3g} x {cfg.batch_size} / 256")
    model.to(run.device)

    def report(step, epoch, result):
        line = {"step": step, "epoch": epoch, **result, "train_images": len(source)}
        run.log(line)
        run.print(f"{cfg.mode} of {cfg.weights}: top-1 {result['eval/top1']:.2f} %, top-5 {result['eval/top5']:.2f} % on "
                  f"{result['eval/n']} images, {len(source)} training images")

    if cfg.mode == "knn":
        run.write_config()
        features, labels = extract(model, source, to_images, cfg, run)
        features = F.normalize(features, dim=1)

        def classify(images):
            return knn_scores(model.features(images), features, labels, len(source.classes), cfg.k, cfg.temperature)

        result = evaluate(classify, eval_batches(held_out, cfg, run), to_images, run)
        return report(0, 0, {**result, "k": cfg.k, "temperature": cfg.temperature})

    mix, flip = mixer(cfg, len(source.classes)), cfg.augment != "none"
    ema = copy.deepcopy(model).requires_grad_(False) if cfg.ema else None
    net, to_inputs, val_batches = model, to_images, None
    if cfg.mode == "linear":
        model.eval()
        net = model.head if cfg.augment == "none" else model
        optimizer = LARS(model.head.parameters(), cfg.weight_decay)
    else:
        groups = parameter_groups(model, cfg.weight_decay, ("pos_embed", "cls_token"),
                                  None if resnet else model.layer, cfg.layer_decay)
        optimizer = adamw(groups, cfg.betas)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler} | ({"ema": ema} if ema else {})
    start = run.load(state)
    keys = KeyedBatches(plan, cfg.seed, run, start)
    if net is model.head:  # no augmentation: every image's features once, then only the head runs
        with run.off_the_clock():
            features, labels = extract(model, source, to_images, cfg, run)
            held_features, held_labels = extract(model, held_out, to_images, cfg, run)
        train_rows = (torch.tensor([index for _, index in batch]) for batch in keys)
        val_rows = [torch.tensor([index for _, index in batch]) for batch in own_share(len(held_out), run)]
        batches = ({"image": features[i], "label": labels[i], "index": i} for i in train_rows)
        val_batches = [{"image": held_features[i], "label": held_labels[i]} for i in val_rows]

        def to_inputs(batch):
            return batch["image"]
    else:
        views = Views(source, train_transform(cfg, mean), cfg.seed, run.bad_files.allow(len(source)), flip=flip)
        batches = run.timed(make_loader(views, keys, run))
    ddp = run.prepare(net)
    meta = {"method": "finetune", "weights": cfg.weights, "model": cfg.model, "img_size": cfg.img_size,
            "patch_size": cfg.patch_size, "resnet_width": cfg.resnet_width, "columns": cfg.columns, "in_chans": cfg.in_chans,
            "mean": mean, "std": std, "classes": list(source.classes)}

    learner = model.head if cfg.mode == "linear" else model
    learner.train()
    for step in range(start, plan.steps):
        now = warmup_cosine(plan.epoch(step), lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, now)
        restore_statistics = remember_statistics(net)
        stats, samples = train_step(ddp, batches, to_inputs, mix, optimizer, scaler, step, cfg, plan, run)
        if stats["skipped"]:
            restore_statistics()
        elif ema:
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - cfg.ema)
                for averaged, buffer in zip(ema.buffers(), model.buffers(), strict=True):  # BatchNorm's are averages already
                    averaged.copy_(buffer)
        run.end_update(step + 1, stats, now, samples)
        epoch = plan.epoch(step + 1)
        with run.off_the_clock():
            if plan.ends_epoch(step + 1) and (int(epoch) % cfg.eval_every == 0 or step + 1 == plan.steps):
                judged = (ema or net).eval()
                run.share_statistics(judged)
                result = evaluate(judged, val_batches or eval_batches(held_out, cfg, run), to_inputs, run)
                learner.train()
                report(step + 1, epoch, result)
                if result["eval/top1"] > run.kept.get("best_top1", -1):
                    run.kept["best_top1"] = result["eval/top1"]
                    run.export("best.pth", (ema or model).state_dict(), {**meta, "epoch": epoch, **result})
            if run.save_due(step + 1):
                run.save(step + 1, state, {**meta, "epoch": epoch})
        if run.stopping:
            return run.print(f"stopped after step {step + 1} of {plan.steps}; the same command with --resume carries on")
    run.print(f"done: {run.out}/best.pth ({run.kept['best_top1']:.2f} % top-1), last.pth, log.jsonl")


if __name__ == "__main__":
    launch(Config, presets, train, "finetune")
