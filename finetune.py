"""Fine-tuning, linear probing, kNN and features of a pre-trained ViT, Swin, ResNet-50 or RevColV2.

finetune  the whole network, AdamW, MAE's recipe with MFF's numbers (its appendix, table 3). `--recipe NAME`
          reads a paper's flags from recipes/NAME.txt; flags next to it win.
linear    frozen network, BatchNorm without affine parameters, linear layer, LARS: MAE's protocol (MFF, table
          2). The head sees the whole batch at once: micro-batches and processes do not change the result.
          `--augment none` computes all features once: the probe then takes seconds.
knn       frozen network, vote of the k nearest training features.
layers    linear and knn on every block's features: where in the network they are best.
features  what these two see of each image: `--out feats.npy` (N, D) float32, and feats.txt, the names.
evaluate  a finished classifier: scores, a table of its classes, their confusion.
--predict IMAGES  what it says of an image, a folder or a list: predictions.csv.

`--weights` takes encoder.pth or last.pth of any script here, official MAE files, timm's ViTs, torchvision's
ResNet-50 (docs/WEIGHTS.md), or none. Model, size and normalisation come from the file where it tells them.
--data needs labels, in train/ and val/ (or an .npz with `split`, or shapes, cifar10, cifar100, stl10, cars).

The head reads one vector per image. ViT: LayerNorm of the mean patch token (--pool avg, to fine-tune) or the
class token after the final LayerNorm (--pool cls, to probe). ResNet, Swin: mean of their last map. RevColV2:
the mean of the last column's top level (units that it does not depend on stay as they were, so that the file
serves dense tasks, too); a probe reads the last bottom-up column.

Our choice: the targets of `--loss bce` are the mixed, smoothed labels, without a threshold. augment.py has
the augmentation, evaluate.py what all modes measure.

    python finetune.py --demo --mode linear --weights runs/mae_mff/encoder.pth
    torchrun --nproc_per_node 4 finetune.py --weights encoder.pth
    torchrun --nproc_per_node 4 finetune.py --recipe cim_resnet_300 --weights encoder.pth
    torchrun --nproc_per_node 4 finetune.py --mode linear --weights encoder.pth
    python finetune.py --mode knn --weights encoder.pth
    python finetune.py --mode features --weights encoder.pth --data PHOTOS --out feats.npy
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from augment import erase_and_mix, repeated_keys, training_batches
from backbones import MODELS, Classifier, family, make_classifier
from beit import PRETRAINING, TABLE
from common import (
    NETWORK,
    RunConfig,
    UserError,
    adamw,
    batch_statistics,
    launch,
    load_weights,
    network_of,
    open_data,
    parameter_groups,
    patch_grid,
    print0,
    read_file,
    read_recipe,
    remember_statistics,
    set_lr,
    split_batch,
    warmup_cosine,
    weights_of,
)
from evaluate import batches_of_features, eval_batches, evaluate, extract, knn, write_features
from revcol_v2 import cell_grid
from sources import open_held_out, open_labelled


@dataclass
class Config(RunConfig):
    # data
    val: str | None = None  # held-out images, of data that have no val/: a folder or list
    val_split: float | None = None  # or the share of each class to hold out
    predict: str | None = None  # an image, folder or list: classify it, in place of --mode
    # model
    mode: Literal["finetune", "linear", "knn", "layers", "features", "evaluate"] | None = None  # see above
    recipe: str | None = None  # a paper's settings: the flags in recipes/NAME.txt
    weights: str | None = None  # file of weights, or none for random ones
    model: Literal[*MODELS] = "base"  # a ViT's SIZE, beit_, swin_, revcol_SIZE, resnet50; default: file's
    patch_size: int = 16  # pixels; likewise
    resnet_width: int = 64  # ResNet: channels of its stem; likewise
    columns: int = 2  # RevColV2: bottom-up columns, and as many top-down; likewise
    swin_window: int = 6  # Swin: side of its attention windows; likewise
    recompute: bool = False  # RevColV2: compute a column again in the backward pass: less memory, more time
    pool: Literal["avg", "cls"] | None = None  # patch mean or class token; default avg, to probe a ViT cls
    drop_path: float = 0.1  # stochastic depth of the last block (fine-tuning)
    head_init: float = 0.001  # the head's initial weights: this times N(0, .02)
    # optimisation; the defaults here and below are those of recipes/mff.txt
    epochs: float = 100.0  # passes over the data
    batch_size: int = 1024  # images per update, over all processes
    micro_batch: int | None = None  # images per forward pass of a process; default: what divides, at most 256
    base_lr: float | None = None  # learning rate per 256 images; default 1e-3
    lr: float | None = None  # in place of --base_lr: the learning rate, not scaled with the batch
    loss: Literal["ce", "bce"] = "ce"  # cross-entropy, or binary cross-entropy (mean over batch and classes)
    min_lr: float = 1e-6  # where the cosine ends
    warmup_epochs: float = 5.0  # linear warm-up
    weight_decay: float = 0.05  # AdamW, LARS
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    layer_decay: float = 0.75  # learning rate of a block = that of the next one times this
    clip_grad: float = 0.0  # largest gradient norm; 0 = no clipping
    ema: float = 0.0  # moving average that is evaluated: weight of the old value; grows to this; 0 = none
    # augmentation
    augment: Literal["none", "crop", "full"] = "full"  # centre crop; random crop, flip; and RandAugment
    randaug: float = 9.0  # RandAugment: mean of the magnitude, of 10; its deviation is 0.5
    repeats: int = 1  # repeated augmentation: crops of the same image in an update
    mixup: float = 0.8  # Beta parameter; 0 = off
    cutmix: float = 1.0  # Beta parameter; 0 = off
    smoothing: float = 0.1  # label smoothing
    erasing: float = 0.25  # probability of random erasing
    # evaluation
    test_size: tuple[int, int] | None = None  # pixels at evaluation; default --img_size
    test_crop: float | None = None  # crop's side / resized side; default 0.875 from 128 to 224 px, else 1
    k: int = 20  # neighbours (kNN)
    temperature: float = 0.07  # kNN weighs a vote by exp(similarity / temperature)
    eval_every: int = 1  # epochs between evaluations

    ranges = RunConfig.ranges | {
        "val_split": (0.001, 0.9), "drop_path": (0, 0.99), "layer_decay": (1e-6, 1), "ema": (0, 0.999999),
        "randaug": (0, 10), "smoothing": (0, 0.999), "erasing": (0, 1), "test_crop": (0.01, 1),
        "temperature": (1e-3, 1e3)}
    start_from = ("weights",)
    free_on_resume = RunConfig.free_on_resume | {"val", "recipe", "recompute"}

    def __post_init__(self):
        super().__post_init__()
        self.mode = "predict" if self.predict else self.mode or "finetune"
        self.data = self.predict or self.data
        if self.out is None and self.mode in ("linear", "knn", "layers", "evaluate"):
            self.out = f"runs/finetune_{self.mode}"
        self.test_size = self.test_size or self.img_size
        kind, finetune = family(self.model), self.mode == "finetune"
        trains = self.mode in ("finetune", "linear")
        self.pool = self.pool or ("cls" if kind == "ViT" and not finetune else "avg")
        self.base_lr = 1e-3 if self.lr is None and self.base_lr is None else self.base_lr
        meant = read_recipe(Config, self.recipe).get("model", self.model) if self.recipe else self.model
        if kind in ("ViT", "RevColV2"):  # ValueError unless the patches fit
            grid_of = patch_grid if kind == "ViT" else cell_grid
            grid_of(self.img_size, self.patch_size), grid_of(self.test_size, self.patch_size)
        for wrong, message in (
            (not self.weights and not self.check_data, "--weights FILE is needed (none: random ones)"),
            (self.weights == "none" and self.mode in ("evaluate", "predict"),
             "--mode evaluate and --predict need the --weights of a finished classifier"),
            (family(meant) != kind, f"--recipe {self.recipe} is for a {family(meant)}, not for {self.model}"),
            (kind == "ViT" and self.test_size != self.img_size,
             f"--test_size {self.test_size}: a ViT has positions for --img_size {self.img_size} alone"),
            (kind != "ViT" and self.pool == "cls", f"--pool cls: {self.model} has no class token"),
            (kind == "ResNet" and self.layer_decay != 1, "--layer_decay is not for ResNets"),
            (kind == "Swin" and self.mode == "layers", "--mode layers is not for Swin"),
            (kind != "RevColV2" and self.recompute, "--recompute is for RevColV2"),
            (None not in (self.lr, self.base_lr), "--base_lr and --lr: give one of them"),
            (self.val and self.val_split, "--val and --val_split: give one of them"),
            (trains and self.augment == "full" and self.in_chans not in (1, 3),
             "--augment full changes colours: it needs 1 or 3 channels; use --augment crop"),
            (not finetune and (self.ema or self.loss != "ce" or self.repeats > 1),
             "--ema, --loss bce and --repeats are for --mode finetune"),
            (self.mode == "linear" and self.augment == "none" and (self.mixup or self.cutmix or self.erasing),
             "--mixup, --cutmix and --erasing work on images: --augment none keeps only features"),
            (self.repeats > 1 and self.batch_size < 2 * self.repeats,
             f"--repeats {self.repeats}: expected a --batch_size of at least {2 * self.repeats}, two images"),
            (self.resume and not trains, f"--mode {self.mode} has nothing to resume"),
        ):
            if wrong:
                raise ValueError(message)

    @property
    def peak_lr(self):
        return self.lr if self.base_lr is None else self.base_lr * self.batch_size / 256


DEMO = {"data": "shapes", "img_size": (32, 32), "model": "nano", "patch_size": 4, "pool": "avg"}
DEMO_RECIPES = {"finetune": "demo", "linear": "demo_linear"}


def presets(flags):
    """Defaults by --mode, --recipe and --demo, then by what the file of weights says."""
    usual = DEMO_RECIPES if flags.demo else {"linear": "linear_mae"}  # without one: the fields' defaults
    finished = flags.predict or flags.mode == "evaluate"
    head = "linear" if flags.mode == "layers" else flags.mode or "finetune"  # layers: a probe of each
    name = flags.recipe or usual.get(head)
    recipe = read_recipe(Config, name) if name else {}
    mode = recipe.get("mode", "finetune") if name else head
    if flags.mode and head != mode:
        raise UserError(f"--recipe {name} is for --mode {mode}")
    values = {"recipe": name} | recipe | {"mode": flags.mode or mode} | (DEMO if flags.demo else {})
    if flags.weights not in (None, "none"):
        content = read_file(flags.weights)
        meta = network_of(content)
        if "img_size" in recipe:
            meta = {**meta, "img_size": values["img_size"]}
        names = (*NETWORK, "img_size", *(("pool", "test_size", "test_crop") if finished else ()))
        values |= {name: meta[name] for name in names if name in meta}
        if finished and "fc_norm.weight" in weights_of(content, ""):  # official files: of the mean patch
            values["pool"] = "avg"
    if "resnet50" in (flags.model, values.get("model")) and "model" not in recipe:
        values |= {"layer_decay": 1.0, "drop_path": 0.0}
    if flags.lr is not None or flags.base_lr is not None:
        values |= {"lr": None, "base_lr": None}
    return values


# ---- model -------------------------------------------------------------------------------------------------


def load_model(cfg, num_classes):
    """The network with --weights; all of it learns or, in a probe, the head alone."""
    torch.manual_seed(cfg.seed)
    model = make_classifier(cfg, num_classes)
    if cfg.weights != "none":
        content = read_file(cfg.weights)
        names = weights_of(content).keys()
        own_norm = "fc_norm.weight" in names and "norm.weight" not in names
        if own_norm and cfg.mode != "finetune" and isinstance(model, Classifier):
            model.norm_the_mean()
            cfg.pool = model.pool
            print0(f"{cfg.weights} is fine-tuned: read out as then, by its norm of the mean token (pool avg)")
        ignore = ["decoder", "mask_token", "fuse_", *PRETRAINING, "head.", "fc.", *model.unused_names]
        ignore += [] if "fc_norm.weight" in model.state_dict() else ["fc_norm."]  # kept if both have it
        missing = ("head.", "fc_norm.", "fc.", *getattr(model, "idle_names", ()))
        load_weights(model, cfg.weights, missing, ignore, content=content)
    model.requires_grad_(cfg.mode == "finetune")
    model.head.requires_grad_(True)
    return model


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) as MAE's linear probe uses it.

    Matrices: g += weight_decay * p; g *= 0.001 * |p| / |g| (factor 1 if either norm is 0).
    Then, vectors too: m = 0.9 * m + g; p -= lr * m.
    """

    def __init__(self, params, weight_decay=0.0):
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g = p.grad
                if p.ndim > 1:
                    g = g + group["weight_decay"] * p
                    ratio = 0.001 * p.norm() / g.norm()
                    g = g * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                m.mul_(0.9).add_(g)
                p.sub_(group["lr"] * m)


# ---- training ----------------------------------------------------------------------------------------------


def loss_of(scores, labels, cfg):
    """Mean loss of scores (B, classes) and labels, (B,) or soft (B, classes); bce: over classes, too."""
    if cfg.loss == "ce":
        return F.cross_entropy(scores, labels, label_smoothing=cfg.smoothing)
    classes = scores.shape[1]
    target = labels if labels.ndim == 2 else F.one_hot(labels, classes)
    return F.binary_cross_entropy_with_logits(scores, target * (1 - cfg.smoothing) + cfg.smoothing / classes)


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema = d * ema + (1 - d) * model, with d = min(decay, (1 + step) / (10 + step)) after `step` updates: a
    short run's average holds none of its initial weights. BatchNorm's statistics are averages: copied."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for average, statistic in zip(batch_statistics(ema), batch_statistics(model), strict=True):
        average.copy_(statistic)


def batches_of_rows(features, labels, keys):
    """A probe's micro-batches from features that are computed once, in place of images."""
    for batch in keys:
        numbers = torch.tensor([index for _, index in batch]) % len(labels)  # fewer, if some are unreadable
        rows = numbers.pin_memory() if features.is_cuda else numbers
        rows = rows.to(features.device, non_blocking=True)
        yield features[rows], labels[rows], numbers


@torch.no_grad()
def whole_batch(model, micro_batches, run):
    """Features and labels of an update's micro-batches of all processes. A probe's head takes one step on
    them: BatchNorm and gradients do not depend on how the batch was split, and DDP has nothing to do."""
    rows = []
    for images, labels in micro_batches:
        with run.autocast():
            rows.append((model.features(images).float(), labels))
    own = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    if run.world_size == 1:
        return own
    every = [x.new_empty(run.world_size * len(x), *x.shape[1:]) for x in own]
    for out, x in zip(every, own, strict=True):
        dist.all_gather_into_tensor(out, x.contiguous())
    return every


def train_step(model, batches, optimizer, scaler, run):
    """One update of run.accum_steps micro-batches, of a probe's head of the whole batch at once; returns the
    loss, its mean, and the gradient norm as floats."""
    cfg, learner, accum_steps = run.cfg, model, run.accum_steps
    optimizer.zero_grad(set_to_none=True)
    micro_batches = (erase_and_mix(*batch, cfg) for batch in run.micro_batches(model, batches))
    if cfg.mode == "linear":
        micro_batches, learner, accum_steps = [whole_batch(model, micro_batches, run)], model.head, 1
    restore_statistics, total = remember_statistics(learner), 0.0
    for inputs, labels in micro_batches:
        with run.autocast():
            scores = learner(inputs)
        loss = loss_of(scores.float(), labels, cfg)
        scaler.scale(loss / accum_steps).backward()
        total = total + loss.detach() / accum_steps
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(learner.parameters(), cfg.clip_grad or math.inf)
    terms, finite = run.agree({"loss": total}, grad_norm)  # the one host synchronisation
    if finite:
        scaler.step(optimizer)
        if cfg.ema:
            update_ema(run.state["ema"], model, cfg.ema, run.step)
    else:
        restore_statistics()
    scaler.update()
    return terms


def open_sets(cfg):
    """{part: images}: to train and to evaluate on; of --mode features all of --data."""
    if cfg.mode in ("features", "predict"):
        return {"all": open_data(cfg, "all")}
    return {"val": open_held_out(cfg)} if cfg.mode == "evaluate" else open_labelled(cfg)


def report(run, result, training_images=None):
    """Print and log scores."""
    cfg, trained = run.cfg, f", {training_images} training images" if training_images else ""
    words = {"top1": "top-1", "top5": "top-5", "macc": "mean per class", "commonest": "commonest class"}
    shares = {word: result.get(f"eval/{name}") for name, word in words.items()}
    shares = ", ".join(f"{word} {x:.2f} %" for word, x in shares.items() if x is not None)
    print0(f"{cfg.mode} of {cfg.weights}: {shares}; {result['eval/n']} images held out, "
           f"{result['eval/unreadable']} unreadable{trained}")
    run.log({"step": run.step, "epoch": run.epoch if run.n else 0, **result, "train_images": training_images})


def train(cfg, run):
    if cfg.mode == "features":
        return write_features(load_model(cfg, 0), *open_sets(cfg).values(), run)
    if cfg.mode in ("evaluate", "predict"):
        from predict import evaluate_file, predict_images

        if cfg.mode == "predict":
            return predict_images(cfg, run)
        return evaluate_file(cfg, run, report)
    source, held_out = open_sets(cfg).values()
    run.fit_batch(source, max(16, 2 * cfg.repeats), 0.0 if cfg.mode in ("linear", "layers") else 0.5)
    if cfg.mode == "finetune" and split_batch(cfg.batch_size, cfg.micro_batch, run.world_size)[0] < 2:
        raise UserError("mixup, cutmix and BatchNorm need two images per forward pass: raise --micro_batch, "
                        "--batch_size")
    model = load_model(cfg, len(source.classes)).to(run.device)
    lr = f"lr {cfg.peak_lr:.3g}" + (f" = {cfg.base_lr:.3g} x {cfg.batch_size} / 256" if cfg.base_lr else "")
    settings = f"recipe {cfg.recipe}, {cfg.img_size} px, tested at {cfg.test_size}, {lr}"
    run.start(len(source) if cfg.mode in ("finetune", "linear") else None, settings)

    if cfg.mode in ("knn", "layers"):
        run.load()  # nothing to resume; writes config.json
        if cfg.mode == "knn":
            report(run, knn(model, source, held_out, run), len(source))
            return print0(f"done: {run.out}/log.jsonl")
        from layers import probe_layers  # a script that is copied elsewhere runs without it

        return probe_layers(model, source, held_out, run)
    learner, trained, average, rows = model, model, {}, None
    if cfg.mode == "linear":
        learner = model.head
        optimizer = LARS(learner.parameters(), cfg.weight_decay)
    else:
        no_decay = ("pos_embed", "cls_token", TABLE)
        groups = parameter_groups(model, cfg.weight_decay, no_decay, model.layer_id, cfg.layer_decay)
        optimizer = adamw(groups, cfg.betas)
        average = {"ema": copy.deepcopy(model).requires_grad_(False)} if cfg.ema else {}
        trained = run.prepare(model)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
    run.load(model=model, optimizer=optimizer, scaler=scaler, **average)
    batches = training_batches(source, run)
    if cfg.mode == "linear" and cfg.augment == "none":  # features once, then only the head runs
        features, labels, _ = extract(model, source, run)
        batches = batches_of_rows(features, labels, repeated_keys(run))
        rows = batches_of_features(model, held_out, run)
        vars(model)["features"] = lambda features: features  # Swin has a module of that name
    elif cfg.mode == "linear" and cfg.compile:
        vars(model)["features"] = torch.compile(model.features)
    meta = {"weights": cfg.weights, "recipe": cfg.recipe, "classes": list(source.classes), "pool": cfg.pool,
            "test_size": cfg.test_size, "test_crop": cfg.test_crop}
    scores = {step: line["eval/top1"] for step, line in run.evaluations().items()}

    def evaluate_if_due():
        """After the checkpoint, which a kill leaves whole. The line of the log comes last: it says "done"."""
        due = run.ends_epoch() and (int(run.epoch) % cfg.eval_every == 0 or run.step == run.steps)
        if not due or run.step in {0, *scores}:
            return
        evaluated = average.get("ema", model).eval()
        run.share_statistics(evaluated)
        result = evaluate(evaluated, rows or eval_batches(held_out, run), held_out, run)
        learner.train()
        if result["eval/top1"] > max(scores.values(), default=-1):
            run.export("best.pth", evaluated.state_dict(), run.meta(**meta, **result))
        scores[run.step] = result["eval/top1"]
        report(run, result, len(source))

    model.eval()
    learner.train()
    evaluate_if_due()  # a run that was killed inside its evaluation
    while run.step < run.steps and not run.stopping:
        lr = warmup_cosine(run.epoch, cfg.peak_lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)
        set_lr(optimizer, lr)
        terms = train_step(trained, batches, optimizer, scaler, run)
        run.end_update(terms, lr)
        if run.save_due():
            run.save(**meta)
        evaluate_if_due()
    best = max(scores.values(), default=math.nan)
    predict = {"predict": cfg.data, "weights": f"{run.out}/best.pth", "out": f"{run.out}/predictions.csv"}
    steps = [] if cfg.demo else [run.command("finetune.py", **predict)]
    run.finish(f"best.pth ({best:.2f} % top-1), last.pth, log.jsonl, curves.png", steps)


if __name__ == "__main__":
    launch(Config, presets, train, "finetune", open_sets)
