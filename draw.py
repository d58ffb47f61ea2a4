"""Pictures of what is finished: --draw FILE of the pre-training scripts, a run's curves.png, and where a ViT
looks:

    python draw.py --attention encoder.pth --data PHOTOS --out attention.png
"""

import dataclasses
import json
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageFont

from common import (
    NETWORK,
    VIT_SIZES,
    RunConfig,
    UserError,
    ViT,
    launch,
    load_weights,
    network_of,
    new_file,
    open_data,
    patches_to_pixels,
    print0,
    read_file,
    save_image_grid,
    weights_of,
    write_atomically,
)

# ---- --draw: what a file of weights predicts ---------------------------------------------------------------

# Of the settings in a checkpoint those that say what is predicted; the others are of that run, not of this.
KEPT = {"img_size", "in_chans", "mean", "std", "exif", "seed"}
LEFT = {"draw", "pictures", "micro_batch", "freeze_generator"}


def settings_of(path, config_type):
    """Defaults of a script's `config_type` for --draw: those of the run that wrote last.pth. mae_mff.py and
    vision_electra.py also take MAE's own files, which show their sizes."""
    script = Path(sys.modules[config_type.__module__].__file__).stem
    content = read_file(path)
    fields = {field.name for field in dataclasses.fields(config_type)}
    if content.get("method") == script and "config" in content:
        shared = {field.name for field in dataclasses.fields(RunConfig)} - KEPT
        names = fields - shared - LEFT - set(config_type.start_from)
        known = {name: value for name, value in content["config"].items() if name in names}
        known["data"] = content["config"]["data"]
    else:
        known = official_settings(path, content, script)
    return {"out": f"{script}.png", **{name: value for name, value in known.items() if name in fields}}


def official_settings(path, content, script):
    """Of an official MAE: its sizes, and whether it predicts raw pixels, as mae_visualize_... do."""
    network = network_of(content)
    if script not in ("mae_mff", "vision_electra") or network.get("model") not in VIT_SIZES:
        what = content.get("method") or network.get("model", "an unknown network")
        raise UserError(f"--draw {path} holds {what}: expected last.pth of {script}.py")
    raw = not getattr(content.get("args"), "norm_pix_loss", "visualize" not in Path(path).name)
    if script == "vision_electra" and not raw:
        raise UserError(f"--draw {path} predicts normalised patches, or does not say: mae_mff.py draws these")
    last_block = VIT_SIZES[network["model"]][1] - 1
    return {**network, "target": "raw" if raw else "mae", "fuse_layers": (last_block,), "levels": "none",
            "noise": 0.0}


def examples_of(run, source, sample_noise, normalize=None):
    """run.examples; what cannot be read is named, and UserError if that is all."""
    if not run.cfg.pictures:
        raise UserError("--pictures 0: how many are to be drawn?")
    examples = run.examples(source, sample_noise, normalize)
    for name, why in run.new_bad_files.items():
        print0(f"unreadable: {name}: {why}")
    if len(run.new_bad_files) == len(source):
        raise UserError(f"none of the {len(source)} images of --data {run.cfg.data} can be read")
    return examples


def draw_file(run, model, source, sample_noise, save_pictures, normalize=None):
    """One picture, --out, of what --draw's weights make of --pictures images of `source`."""
    path, content = run.cfg.draw, read_file(run.cfg.draw)
    if not run.is_main:
        return
    generator = getattr(model, "generator", None)
    network = model if "config" in content or generator is None else generator
    names = {name for name in network.state_dict() if "decoder" in name or "mask_token" in name}
    found = len(weights_of(content, "").keys() & names)
    if found < len(names):
        raise UserError(f"{path} has {found} of {len(names)} decoder tensors: use last.pth, or MAE's "
                        "mae_visualize_... or mae_pretrain_..._full.pth")
    out = new_file(run.cfg.out, ".png")
    load_weights(network, path, prefix="", content=content)
    examples = examples_of(run, source, sample_noise, normalize)
    save_pictures(out, model.to(run.device), examples, run)
    print0(f"{out}: {len(examples[0])} images of {run.cfg.data}")


# ---- charts ------------------------------------------------------------------------------------------------

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8e5aa8", "#c97b12", "#13a2a2", "#555555", "#8b4513")
WIDTH, HEIGHT, LEFT_EDGE, RIGHT_EDGE, LINE = 520, 300, 62, 14, 16  # pixels of a panel


def ticks(low, high, most=6):
    """Round numbers from low to high"""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(n for n in (1, 2, 5, 10) if (high - low) / (n * step) <= most)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(title, lines, x_label, log_scale=False):
    """A panel (PIL image) of lines {name: [(x, y), ...]}, of which NaN breaks one; the names on top."""
    image, font = Image.new("RGB", (WIDTH, HEIGHT), "white"), ImageFont.load_default()
    pen, x, top = ImageDraw.Draw(image), LEFT_EDGE, 4
    pen.text((x, top), title, "black", font)
    top += LINE
    for name, colour in zip(lines, COLOURS, strict=False):
        wide = pen.textlength(name, font)
        x, top = (x, top) if x + 24 + wide < WIDTH or x == LEFT_EDGE else (LEFT_EDGE, top + LINE)
        pen.line((x, top + 6, x + 14, top + 6), colour, 3)
        pen.text((x + 18, top), name, "black", font)
        x += 30 + wide
    scale = math.log10 if log_scale else float
    points = [(x, scale(y)) for line in lines.values() for x, y in line if not math.isnan(y)]
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*points, strict=True))
    x0, x1 = (x0 - 0.5, x1 + 0.5) if x0 == x1 else (x0, x1)
    y0, y1 = (y0 - 0.05 * (y1 - y0 or abs(y0) or 1), y1 + 0.05 * (y1 - y0 or abs(y1) or 1))
    left, right, top, bottom = LEFT_EDGE, WIDTH - RIGHT_EDGE, top + LINE + 8, HEIGHT - 2 * LINE - 4

    def place(x, y):
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    for y in ticks(y0, y1):
        height, text = place(x0, y)[1], f"{10**y if log_scale else y:.4g}"
        pen.line((left, height, right, height), "#dddddd")
        pen.text((left - 6 - pen.textlength(text, font), height - 6), text, "black", font)
    for x in (x for x in ticks(x0, x1) if x_label == "epoch" or x == int(x)):
        across, text = place(x, y0)[0], f"{x:.4g}"
        pen.line((across, bottom, across, bottom + 4), "black")
        pen.text((across - pen.textlength(text, font) / 2, bottom + 6), text, "black", font)
    pen.rectangle((left, top, right, bottom), outline="#888888")
    pen.text(((left + right - pen.textlength(x_label, font)) / 2, HEIGHT - LINE), x_label, "black", font)
    for line, colour in zip(lines.values(), COLOURS, strict=False):
        spots = [None if math.isnan(y) else place(x, scale(y)) for x, y in line]
        for before, spot in zip([None, *spots], spots, strict=False):
            if before and spot:
                pen.line((*before, *spot), colour, 2)
            elif spot:
                pen.ellipse((spot[0] - 2, spot[1] - 2, spot[0] + 2, spot[1] + 2), colour)
    return image


def stack(panels):
    """Panels in two columns"""
    rows = (len(panels) + 1) // 2
    canvas = Image.new("RGB", (WIDTH * min(2, len(panels)), HEIGHT * rows), "white")
    for i, panel in enumerate(panels):
        canvas.paste(panel, (i % 2 * WIDTH, i // 2 * HEIGHT))
    return canvas


def thinned(line, most=400):
    """Means of neighbouring points"""
    size = math.ceil(len(line) / most)
    parts = (line[i : i + size] for i in range(0, len(line), size))
    return [tuple(sum(values) / len(values) for values in zip(*part, strict=True)) for part in parts]


def save_curves(out):
    """curves.png of a run's log.jsonl: losses, other terms, learning rate, gradient norm, scores by epoch."""
    lines = {}
    for text in (out / "log.jsonl").read_bytes().split(b"\n") if (out / "log.jsonl").exists() else ():
        with suppress(ValueError):  # a line that a kill cut
            entry = json.loads(text)
            whole = isinstance(entry, dict) and isinstance(entry.get("epoch"), int | float)
            for name, value in entry.items() if whole else ():
                if isinstance(value, int | float):
                    value = float(value) if math.isfinite(value) else math.nan
                    lines.setdefault(name, []).append((entry["epoch"], value))
    groups = {"losses": {}, "other terms": {}, "learning rate": {}, "gradient norm": {}, "scores": {}}
    for name, line in lines.items():
        kind, _, rest = name.partition("/")
        term = "gradient norm" if "grad_norm" in name else "losses" if "loss" in rest else "other terms"
        group = {"lr": "learning rate", "grad_norm": term, "train": term,
                 "eval": "scores" if "/" not in rest else None}.get(kind)
        if group and rest not in ("n", "unreadable") and any(not math.isnan(y) for _, y in line):
            groups[group][rest or name] = thinned(line)
    panels = []
    for title, group in groups.items():
        shown = dict(list(group.items())[: len(COLOURS)])
        values = [y for line in shown.values() for _, y in line if not math.isnan(y)]
        if values:
            title += f" (and {len(group) - len(shown)} more)" if len(group) > len(shown) else ""
            wide = title.startswith("gradient") and min(values) > 0 and max(values) > 100 * min(values)
            panels.append(chart(title, shown, "epoch", log_scale=wide))
    if panels:
        write_atomically(out / "curves.png", lambda file: stack(panels).save(file, "png"))


# ---- --attention -------------------------------------------------------------------------------------------


def attention_weights(attention, x):
    """softmax(q k^T / sqrt(d)) of a common.Attention for its input x (B, N, D): (B, heads, N, N) float32"""
    B, N, D = x.shape
    heads = attention.num_heads
    q, k, _ = attention.qkv(x).float().reshape(B, N, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1) * (D // heads) ** -0.5).softmax(-1)


def patch_distances(grid, patch_size):
    """Between the centres of patches in pixels: (L, L)"""
    places = torch.cartesian_prod(*(torch.arange(n) * float(patch_size) for n in grid))
    return torch.cdist(places, places)


@torch.no_grad()
def attention_of(model, images):
    """Of each block of a ViT: the class token's attention to the patches, mean over heads (blocks, B, L), and
    the mean attention distance of each head in pixels (blocks, heads): over images and patches, the mean of
    the distances to the other patches weighted by the attention to them (Dosovitskiy et al. 2021, fig. 7)."""
    to_patches, distance = [], patch_distances(model.grid, model.patch_size).to(images.device)
    means = []

    def look(attention, inputs):
        weights = attention_weights(attention, inputs[0])
        to_patches.append(weights[:, :, 0, 1:].mean(1))
        between = weights[:, :, 1:, 1:]
        means.append((between * distance).sum(-1).div(between.sum(-1)).mean((0, 2)))

    hooks = [block.attn.register_forward_pre_hook(look) for block in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    return torch.stack(to_patches), torch.stack(means)


@dataclasses.dataclass
class Config(RunConfig):
    # what
    attention: str | None = None  # file of a ViT's weights: where its class token looks, how far its heads
    model: Literal[*VIT_SIZES] = "base"  # ViT; default: what the file says
    patch_size: int = 16  # pixels; likewise
    pictures: int = 4  # images drawn

    def __post_init__(self):
        super().__post_init__()
        if not self.attention:
            raise ValueError("--attention FILE is needed: the weights of a ViT")


def presets(flags):
    values = {"out": "attention.png"}
    if flags.attention:
        network = network_of(read_file(flags.attention))
        if network.get("model") not in VIT_SIZES:
            what = network.get("model", "an unknown network")
            raise UserError(f"--attention {flags.attention} holds {what}: expected a ViT")
        names = {field.name for field in dataclasses.fields(Config)} & {*NETWORK, "img_size"}
        values |= {name: network[name] for name in names & network.keys()}
    return values


def draw_attention(cfg, run):
    """--out X.png: images, and where the class token of up to six blocks looks; X_distance.png: how far."""
    source, out = open_data(cfg, "all"), new_file(cfg.out, ".png")
    chart_path = new_file(out.with_name(f"{out.stem}_distance.png"), ".png")
    model = ViT(cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans).to(run.device)
    ignore = ("decoder", "mask_token", "fuse_", "head.", "fc_norm.")
    load_weights(model, cfg.attention, ("norm.",), ignore)  # which follows what is looked at
    images, _ = examples_of(run, source, lambda: torch.zeros(0))
    to_patches, distances = attention_of(model, images)
    shown = sorted({round(i * (model.depth - 1) / 5) for i in range(6)})
    columns = [run.normalize.undo(images)]
    for i in shown:
        heat = to_patches[i] / to_patches[i].amax(1, keepdim=True)
        columns.append(patches_to_pixels(heat[..., None], model.patch_size, model.grid))
    save_image_grid(out, list(zip(*columns, strict=True)), ["image", *(f"block {i + 1}" for i in shown)],
                    "attention of the class token to the patches, mean of heads; white: most in this image")
    lines = {"mean": distances.mean(1), "head of the shortest": distances.amin(1),
             "head of the longest": distances.amax(1)}
    lines = {name: list(enumerate(line.tolist(), start=1)) for name, line in lines.items()}
    panel = chart(f"mean attention distance in pixels, {len(images)} images", lines, "block")
    write_atomically(chart_path, lambda file: panel.save(file, "png"))
    for i, line in enumerate(distances.tolist(), start=1):
        print0(f"block {i:2}: {sum(line) / len(line):6.1f} px, heads {min(line):.1f} to {max(line):.1f}")
    print0(f"{out}, {chart_path}")


if __name__ == "__main__":
    launch(Config, presets, draw_attention, "draw")
