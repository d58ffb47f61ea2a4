"""Pictures of what is finished: `--draw FILE` of the pre-training scripts."""

import dataclasses
import sys
from pathlib import Path

from common import (
    VIT_SIZES,
    RunConfig,
    UserError,
    load_weights,
    network_of,
    new_file,
    print0,
    read_file,
    weights_of,
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


def draw_file(run, model, source, sample_noise, save_pictures, normalize=None):
    """One picture, --out, of what --draw's weights make of --pictures images of `source`."""
    path, content = run.cfg.draw, read_file(run.cfg.draw)
    if not run.cfg.pictures:
        raise UserError("--draw and --pictures 0: how many?")
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
    examples = run.examples(source, sample_noise, normalize)
    for name, why in run.new_bad_files.items():
        print0(f"unreadable: {name}: {why}")
    if len(run.new_bad_files) == len(source):
        raise UserError(f"none of the {len(source)} images of --data {run.cfg.data} can be read")
    save_pictures(out, model.to(run.device), examples, run)
    print0(f"{out}: {len(examples[0])} images of {run.cfg.data}")
