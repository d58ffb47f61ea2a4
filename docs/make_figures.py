"""Draws docs/figures/*.png from the real code, drawn images and committed logs; needs matplotlib.

From the code alone
    ddae_distance    masks, their distance maps (DDAE, figure 2), and the loss weights at three betas
    cim_windows      ResPix's target: an image, its windows' means (CIM, figure 4), what these leave
    revcol_columns   RevColV2's columns, levels and connections
From docs/logs and docs/runs
    mff_weights      softmax(w) of the fused blocks over a training (MFF, figure 1)
    ddae_beta        beta of each level, for three readings of eq. (6) and two starts (DDAE, figures 5, 6)
    losses           the loss of every run of benchmarks/replicate.py
    labels           top-1 by number of labelled images, with and without pre-training
From networks that learnt drawn shapes, in --runs: for each SCRIPT of mae_mff, ddae, cim, vision_electra the
files that `python SCRIPT.py --demo --out RUNS/SCRIPT` writes
    attention        the class token's in an early block; mean distance by block, MAE and DDAE (DDAE, 3 and 4)
    cim_samples      what the generator's tokens become: sampled, argmax, uniform
    electra_verdicts a composite, and what the discriminator says of each patch of it, and of the original

    python docs/make_figures.py          all; or the names of some
"""

import argparse
import gzip
import json
import statistics
import sys
from pathlib import Path

import matplotlib
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

import cim  # noqa: E402
import common  # noqa: E402
import ddae  # noqa: E402
import mae_mff  # noqa: E402
import revcol_v2  # noqa: E402
import vision_electra  # noqa: E402
from convert_dalle import load_tokenizer  # noqa: E402
from shapes import Shapes  # noqa: E402

DOCS = ROOT / "docs"
FIGURES = {}


def figure(draw):
    FIGURES[draw.__name__] = draw
    return draw


def new(rows, columns, width, height):
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def panel(axis, values, title="", **how):
    axis.imshow(values.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1) if values.ndim == 3 else values, **how)
    axis.set_title(title, fontsize=9)
    axis.set(xticks=[], yticks=[])


def panels(axes, columns):
    """{title: images} into the columns of axes, one image per row."""
    for column, (title, values) in enumerate(columns.items()):
        for row, image in enumerate(values):
            panel(axes[row, column], image, title if row == 0 else "")


def shapes(numbers, size=32, channels=3):
    """(N, channels, size, size) in [0, 1]: drawn images, as --demo learns from."""
    source = Shapes((size, size), channels, n=max(numbers) + 1)
    return torch.stack([source.read(i)[0] for i in numbers]).float() / 255


# ---- from the code alone


@figure
def ddae_distance(args):
    torch.manual_seed(0)
    betas = torch.tensor([-0.5, 0.0, 0.5])
    picture, axes = new(3, 5, 9, 5.8)
    for row, (ratio, block) in enumerate(((0.4, 0.3), (0.6, 0.45), (0.75, 120 / 196))):
        mask = ddae.block_mask((14, 14), int(196 * ratio), int(196 * block))
        distance = ddae.distance_map(mask)
        weights = ddae.dynamic_weights(distance[None], betas)[1][:, 0].view(-1, 14, 14)
        panel(axes[row, 0], mask, f"{ratio:.0%} hidden (black)", cmap="gray_r")
        panel(axes[row, 1], distance.view(14, 14), f"distance, up to {distance.max():.1f}", cmap="gray_r")
        for column, (beta, weight) in enumerate(zip(betas.tolist(), weights, strict=True), start=2):
            shown = weight.masked_fill(torch.from_numpy(~mask), torch.nan)
            panel(axes[row, column], shown, f"weights, beta {beta:+.1f}", cmap="viridis", vmin=0, vmax=1)
    picture.colorbar(axes[0, 4].images[0], ax=axes[:, 2:], shrink=0.6, label="weight (visible patches: none)")
    return picture


@figure
def cim_windows(args):
    pixels = shapes((0, 5, 7), 64)
    cfg = cim.Config(tokenizer="none needed", img_size=(64, 64), patch_size=8)
    normalize = common.Normalize(cfg.mean, cfg.std, torch.device("cpu"))
    images = normalize(pixels)
    columns = {"image": pixels}
    for kind, title in (("window", "what windows leave:\nResPix's target"),
                        ("patch", "what 8 x 8 patches leave")):
        cfg.pixel_norm = kind
        mean, deviation = cim.pixel_statistics(images, cfg)
        if kind == "window":
            columns["mean of the 8 x 8 window\naround each pixel"] = normalize.undo(mean.expand_as(images))
        columns[title] = (images - mean) / deviation / 5 + 0.5
    picture, axes = new(3, 4, 8, 6.4)
    panels(axes, columns)
    return picture


@figure
def revcol_columns(args):
    """Read off a real network: a box per unit, an arrow per term of its sum; mask tokens in words."""
    with torch.device("meta"):
        model = revcol_v2.RevColV2("base", (224, 224), 16)
    columns = [*model.bottom_up, *model.top_down]
    picture, axes = new(1, 1, 8.5, 4.9)
    axis = axes[0, 0]
    names = ["stride 4", "stride 8", "stride 16", "stride 16"]
    arrow = {"arrowstyle": "-|>", "shrinkA": 21, "shrinkB": 21, "linewidth": 1.2}
    for x in range(len(columns)):
        up = x < len(model.bottom_up)
        for y in range(4):
            blocks = f"{model.depths[y]} block{'s' * (model.depths[y] > 1)}"
            box = {"boxstyle": "round", "facecolor": "#d8e6f3" if up else "#f6e3c5", "edgecolor": "gray"}
            axis.text(x, y, f"{model.channels[y]} ch\n{blocks}", ha="center", va="center", fontsize=8,
                      bbox=box)
            if up and not y:
                axis.annotate("stem", (x, y), (x - 0.42, y - 0.42), ha="center", va="center", fontsize=8,
                              arrowprops=arrow | {"shrinkA": 2, "color": "#2e7d32"})
            if x:
                axis.annotate("", (x, y), (x - 1, y),
                              arrowprops=arrow | {"color": "#b03a2e", "linestyle": "--"})
            before = y - 1 if up else y + 1
            if 0 <= before <= 3:
                axis.annotate("", (x, y), (x, before), arrowprops=arrow | {"color": "#1f4e79"})
            other = y + 1 if up else y - 1
            if x and 0 <= other <= 3:
                axis.annotate("", (x, y), (x - 1, other), arrowprops=arrow | {"color": "gray"})
        title = f"bottom-up {x + 1}" if up else f"top-down {x + 1 - len(model.bottom_up)}"
        axis.text(x, -0.75, title, ha="center", fontsize=9)
    words = "mask tokens fill in\nthe hidden cells"
    axis.axvline(len(model.bottom_up) - 0.5, 0.1, 0.85, color="gray", linestyle=":", linewidth=1)
    axis.text(len(model.bottom_up) - 0.5, 3.42, words, ha="center", fontsize=8, style="italic")
    for y, name in enumerate(names):
        axis.text(-0.75, y, f"level {y}\n{name}", ha="center", va="center", fontsize=8)
    for color, style, words in (("#1f4e79", "-", "F: from the level before"),
                                ("gray", "-", "F: from the column before"),
                                ("#2e7d32", "-", "stem"),
                                ("#b03a2e", "--", "a times the same level before: can be inverted")):
        axis.plot([], [], color=color, linestyle=style, label=words)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=4, fontsize=8, frameon=False)
    axis.set(xlim=(-1.1, 3.6), ylim=(-1, 3.8))
    axis.set_axis_off()
    return picture


# ---- from logs


@figure
def mff_weights(args):
    lines = read_log(DOCS / "logs/cifar_mff.jsonl.gz")
    picture, axes = new(1, 1, 6, 3.4)
    names = [name for name in lines[0] if name.startswith("train/fuse_weight/")]
    for i, name in enumerate(names):
        layer = name.rsplit("/", 1)[1]
        axes[0, 0].plot([line["epoch"] for line in lines], [line[name] for line in lines],
                        color=plt.cm.viridis(i / len(names)),
                        label=f"block {layer}")
    axes[0, 0].axhline(1 / len(names), color="gray", linewidth=0.8, linestyle=":")
    axes[0, 0].set(xlabel="passes", ylabel="softmax(w)",
                   title="MFF, ViT-Tiny on CIFAR-10: what the decoder is given")
    axes[0, 0].legend(fontsize=8, ncols=2)
    return picture


@figure
def ddae_beta(args):
    readings = {"sqrt": "times the root of the number of hidden patches: our reading",
                "literal": "the norm of one image",
                "none": "without eq. (6)"}
    picture, axes = new(2, 3, 10, 5)
    for column, (name, words) in enumerate(readings.items()):
        for row, start in enumerate(("shallow", "deep")):
            lines, axis = read_log(DOCS / f"logs/cifar_ddae_beta_{name}_{start}.jsonl.gz"), axes[row, column]
            for level in range(1, 5):
                betas = [line[f"train/beta/{level}"] for line in lines]
                axis.plot([line["step"] for line in lines], betas, label=f"level {level}")
            axis.set_title(f"{words}\nsmaller for {start} levels at the start" if row == 0
                           else f"smaller for {start} levels",
                           fontsize=8)
            axis.grid(alpha=0.3)
            axis.set(xlabel="update" if row else "", ylabel="" if column else "beta")
            axis.sharey(axes[0, column])
    axes[0, 0].legend(fontsize=7)
    return picture


@figure
def losses(args):
    runs = {path.name.split(".")[0]: read_log(path) for path in sorted((DOCS / "runs").glob("*.jsonl.gz"))}
    kinds = {"MAE and MFF": ("mae", "mff", "mff_detach"), "MAE, other targets": ("pixmim", "raw", "raw_on"),
             "DDAE": ("ddae",), "its parts (loss with weights)": ("blocks", "d", "ds", "dds"),
             "CIM: ResPix": ("respix", "respix_none", "respix_patch", "respix_argmax", "respix_uniform",
                             "resnet_respix"),
             "CIM: RevDet": ("revdet", "resnet_revdet"), "Vision ELECTRA": ("ve", "ve_half"),
             "RevColV2": ("revcol",)}
    picture, axes = new(2, 4, 13, 5.6)
    for axis, (title, names) in zip(axes.flat, kinds.items(), strict=True):
        for i, name in enumerate(names):
            for seed in range(3):
                points = [(line["step"], line["train/loss"]) for line in runs.get(name, ())
                          if line["run"] == f"{name}/{seed}" and "train/loss" in line]
                if points:
                    axis.plot(*zip(*points, strict=True), color=f"C{i}", linewidth=0.9,
                              label=name if seed == 0 else None)
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("update")
    return picture


@figure
def labels(args):
    lines = [line for path in sorted((DOCS / "runs/shares").glob("*.jsonl.gz")) for line in read_log(path)]
    top1 = {}  # {(arm, share in %): of each seed}
    for line in lines:
        arm, _, share = line["run"].partition("_share_")
        if share and "eval/top1" in line:
            top1.setdefault((arm.split("/")[0], int(share)), {})[arm] = line["eval/top1"]
    kinds = {"ViT-nano": {"random weights": "scratch", "MAE": "mae", "MFF": "mff", "DDAE": "ddae",
                          "CIM, RevDet": "revdet", "CIM, ResPix": "respix_half_window"},
             "ResNet-50, a quarter of the width": {"random weights": "resnet_scratch",
                                                   "CIM, RevDet": "resnet_revdet"},
             "RevColV2-nano": {"random weights": "revcol_scratch", "pre-trained": "revcol"}}
    shares = sorted({share for _, share in top1})
    done = {arm for arm, _ in top1 if all((arm, share) in top1 for share in shares)}
    kinds = {title: {words: arm for words, arm in arms.items() if arm in done}
             for title, arms in kinds.items() if done & {*arms.values()}}
    picture, axes = plt.subplots(1, len(kinds), figsize=(1 + 3.5 * len(kinds), 3.4), layout="constrained",
                                 squeeze=False, sharey=True)
    for axis, (title, arms) in zip(axes[0], kinds.items(), strict=True):
        for i, (words, arm) in enumerate(arms.items()):
            means = [statistics.mean(top1[arm, share].values()) for share in shares]
            axis.plot([1000 * share for share in shares], means, marker="o", markersize=4, label=words,
                      **({"color": "gray", "linestyle": "--"} if i == 0 else {"color": f"C{i - 1}"}))
        axis.set(xscale="log", xlabel="labelled images", title=title)
        axis.title.set_fontsize(9)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="top-1, %", ylim=(0, None))
    return picture


def read_log(path):
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


# ---- from networks


def load(script, args, make):
    """(network, settings, its Normalize) of a demo; make: settings -> network."""
    path = args.runs / script.__name__ / "last.pth"
    if not path.exists():
        sys.exit(f"there is no {path}: make it with `python {script.__name__}.py --demo --out {path.parent}`")
    content = common.read_file(path)
    cfg = script.Config(**content["config"])
    model = make(cfg).eval()
    model.load_state_dict(content["model"])
    return model, cfg, common.Normalize(cfg.mean, cfg.std, torch.device("cpu"))


@torch.no_grad()
def attention_maps(model, images):
    """Attention of each block on whole images: (blocks, B, heads, 1 + L, 1 + L)."""
    maps = []

    def keep(module, inputs, output):
        q, k, _ = output.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))

    heads = model.blocks[0].attn.num_heads
    hooks = [block.attn.qkv.register_forward_hook(keep) for block in model.blocks]
    common.ViT.forward(model, images)
    for hook in hooks:
        hook.remove()
    return torch.stack(maps)


@figure
def attention(args):
    networks = {"MAE": load(mae_mff, args, mae_mff.MaskedAutoencoder),
                "DDAE": load(ddae, args, ddae.DeepDynamicAutoEncoder)}
    images, block = shapes(range(64)), 1
    maps = {name: attention_maps(model, normalize(images))
            for name, (model, _, normalize) in networks.items()}
    (h, w), p = networks["MAE"][0].grid, networks["MAE"][1].patch_size
    places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"),
                         -1).reshape(-1, 2) * float(p)
    apart = torch.cdist(places, places)  # px
    picture = plt.figure(figsize=(10, 4), layout="constrained")
    left, right = picture.subfigures(1, 2, width_ratios=(1.5, 1))
    axes = left.subplots(3, 5)
    for column, i in enumerate((0, 5, 7, 8, 11)):
        panel(axes[0, column], images[i])
        for row, (_, values) in enumerate(maps.items(), start=1):
            panel(axes[row, column], values[block, i].mean(0)[0, 1:].view(h, w), cmap="viridis", vmin=0)
    for row, name in enumerate(("image", *maps)):
        axes[row, 0].text(-0.15, 0.5, name, transform=axes[row, 0].transAxes, rotation=90, va="center",
                          ha="right", fontsize=9)
    words = f"attention of the class token, block {block}, mean of heads (each map from 0 to its maximum)"
    left.suptitle(words, fontsize=9)
    axis = right.subplots()
    for name, values in maps.items():
        patches = values[..., 1:, 1:] / values[..., 1:, 1:].sum(-1, keepdim=True)
        distance = (patches * apart).sum(-1).mean((1, 3))  # (blocks, heads)
        line, = axis.plot(distance.mean(1), label=name)
        axis.plot(distance, ".", color=line.get_color(), alpha=0.6)
    axis.axhline(apart.mean(), color="gray", linestyle=":", linewidth=0.8)
    axis.text(0, apart.mean(), "attention to all alike", fontsize=7, va="bottom")
    axis.set(xlabel="block", ylabel="px", title="mean attention distance; dots: heads",
             xticks=range(len(distance)))
    axis.title.set_fontsize(9)
    axis.legend(fontsize=8)
    return picture


@figure
@torch.no_grad()
def cim_samples(args):
    def make(cfg):
        tokenizer = load_tokenizer(args.runs / "cim/tokenizer/tokenizer.pth", cfg.grid, cfg.in_chans)
        model = cim.CorruptedImageModel(cfg, cim.BEiTGenerator(cfg, tokenizer.vocab_size))
        model.__dict__["tokenizer"] = tokenizer
        return model

    model, cfg, _ = load(cim, args, make)
    images = shapes((0, 5, 7, 8), channels=cfg.in_chans)
    torch.manual_seed(0)
    noise = torch.rand(len(images), len(model.enhancer.pos_embed[0]) - 1)
    k = torch.tensor(sum(cfg.num_masked) // 2)
    columns = {"original": images, "masked": images}
    for title in ("softmax 1", "softmax 2", "softmax 3", "argmax", "uniform 1", "uniform 2"):
        cfg.sampling = title.split()[0]
        columns[title], mask = model.corrupt(images, noise, k)[:2]
    hidden = common.patches_to_pixels(mask[..., None].float(), cfg.patch_size, cfg.grid)
    columns["masked"] = torch.where(hidden > 0, torch.tensor([0.2, 0.35, 0.7]).view(3, 1, 1), images)
    picture, axes = new(4, len(columns), 10, 5.2)
    panels(axes, columns)
    return picture


@figure
@torch.no_grad()
def electra_verdicts(args):
    model, cfg, normalize = load(vision_electra, args, vision_electra.VisionElectra)
    pixels = shapes((0, 5, 7, 8))
    images, grid, p = normalize(pixels), model.discriminator.grid, cfg.patch_size
    torch.manual_seed(0)
    pred, mask, *_ = model.generate(images, torch.rand(len(images), grid[0] * grid[1]))
    composite, _ = model.compose(images, pred, mask)
    hidden = common.patches_to_pixels(mask[..., None], p, grid)
    shown = {"original": pixels, "masked": torch.where(hidden > 0, 0.5, pixels),
             "composite": normalize.undo(composite)}
    verdicts = {"composite": model.discriminator(composite), "original": model.discriminator(images)}
    picture, axes = new(4, 5, 8, 6.6)
    panels(axes, shown)
    for row in range(4):
        for column, (title, logits) in enumerate(verdicts.items(), start=3):
            image = f"image: {logits['image'][row].sigmoid():.2f}"
            panel(axes[row, column], logits["patch"][row].sigmoid().view(grid), f"on the {title}\n{image}"
                  if row == 0
                  else image, cmap="RdBu", vmin=0, vmax=1)
    picture.colorbar(axes[0, 4].images[0], ax=axes[:, 3:], shrink=0.5, label="probability of being original")
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/figures")
    parser.add_argument("--out", type=Path, default=DOCS / "figures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or FIGURES:
        FIGURES[name](args).savefig(args.out / f"{name}.png", dpi=110)
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
