"""recipes/ of finetune.py: the papers' numbers, what wins over what, three steps with all ingredients."""

import json
import math
from dataclasses import asdict
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT

import augment
import backbones
import common
import evaluate
import finetune

# Typed from the papers' tables: rate (per 256 images, or fixed), batch, epochs, warm-up, weight decay, layer
# decay, drop path, RandAugment, smoothing, mixup, cutmix; then what differs from MAE's and BEiT's code.
B256, FIXED = "base_lr", "lr"
REVCOL, REVCOL_L = {"model": "revcol_base"}, {"model": "revcol_large"}
AVERAGED, AVERAGED_L = REVCOL | {"ema": 0.9999}, REVCOL_L | {"ema": 0.9999}
SCRATCH = {"ema": 0.999, "betas": (0.9, 0.95), "weights": "none"}
CIM = {"img_size": (224, 224), "test_crop": 0.95}
RSB = CIM | {"model": "resnet50", "loss": "bce", "erasing": 0.0, "test_size": (224, 224)}
PAPERS = {
    "mff": (B256, 1e-3, 1024, 100, 5, 0.05, 0.75, 0.1, 9, 0.1, 0.8, 1.0, {}),
    "mae": (B256, 5e-4, 1024, 100, 5, 0.05, 0.65, 0.1, 9, 0.1, 0.8, 1.0, {}),
    "mae_l": (B256, 1e-3, 1024, 50, 5, 0.05, 0.75, 0.2, 9, 0.1, 0.8, 1.0, {"model": "large"}),
    "ddae_s": (FIXED, 1.6e-2, 1024, 100, 5, 0.05, 0.75, 0.1, 9, 0.1, 0.8, 1.0, {"model": "small"}),
    "ddae_b": (FIXED, 8e-3, 1024, 100, 5, 0.05, 0.65, 0.1, 9, 0.1, 0.8, 1.0, {}),
    "cim_vit_s": (FIXED, 3e-3, 1024, 200, 5, 0.05, 0.8, 0.1, 9, 0.1, 0.8, 1.0, CIM | {"model": "small"}),
    "cim_vit_b_respix": (FIXED, 3e-3, 1024, 100, 5, 0.05, 0.8, 0.1, 9, 0.1, 0.8, 1.0, CIM),
    "cim_vit_b_revdet": (FIXED, 5e-3, 1024, 100, 5, 0.05, 0.8, 0.1, 9, 0.1, 0.8, 1.0, CIM),
    "cim_resnet_100": (FIXED, 12e-3, 2048, 100, 5, 0.02, 1, 0, 6, 0.1, 0.1, 1.0,
                       RSB | {"img_size": (160, 160)}),
    "cim_resnet_300": (FIXED, 12e-3, 2048, 300, 5, 0.02, 1, 0, 7, 0, 0.1, 1.0, RSB | {"repeats": 3}),
    "cim_resnet_600": (FIXED, 12e-3, 2048, 600, 5, 0.01, 1, 0.05, 7, 0.1, 0.2, 1.0, RSB | {"repeats": 3}),
    "ve": (B256, 1.25e-3 / 2, 160 * 4, 100, 20, 0.05, 0.9, 0.1, 9, 0.1, 0.8, 1.0,
           {"clip_grad": 5.0, "min_lr": 3.125e-7}),
    "revcol_in22k": (B256, 2.5e-4, 4096, 90, 5, 0.05, 0.8, 0.1, 9, 0.1, 0.8, 1.0, REVCOL),
    "revcol_in22k_l": (B256, 2.5e-4, 4096, 90, 5, 0.05, 0.8, 0.2, 9, 0.1, 0.8, 1.0, REVCOL_L),
    "revcol_in1k_b": (B256, 5e-4, 1024, 100, 5, 0.05, 0.75, 0.1, 9, 0.1, 0.8, 1.0, AVERAGED),
    "revcol_in1k_l": (B256, 5e-4, 1024, 50, 5, 0.05, 0.75, 0.1, 9, 0.1, 0.8, 1.0, AVERAGED_L),
    "revcol_in1k_after22k": (B256, 2.5e-5, 512, 30, 0, 0.01, 0.9, 0.1, 9, 0.1, 0, 0, AVERAGED),
    "revcol_in1k_after22k_l": (B256, 2.5e-5, 512, 30, 0, 0.01, 0.9, 0.2, 9, 0.1, 0, 0, AVERAGED_L),
    "revcol_scratch": (B256, 1e-4, 4096, 300, 20, 0.3, 1, 0.1, 9, 0.1, 0.8, 1.0,
                       REVCOL | SCRATCH),
    "revcol_scratch_l": (B256, 1e-4, 4096, 200, 20, 0.3, 1, 0.2, 9, 0.1, 0.8, 1.0,
                         REVCOL_L | SCRATCH),
    "cifar_transfer": (B256, 7.5e-6 / 2, 768, 1000, 5, 0.05, 1, 0.1, 9, 0.1, 0.8, 1.0,
                       {"img_size": (224, 224), "repeats": 3, "erasing": 0.0}),
    "linear_mae": (B256, 0.1, 16384, 90, 10, 0, 0.75, 0, 9, 0, 0, 0,
                   {"mode": "linear", "augment": "crop", "min_lr": 0.0, "head_init": 0.5, "erasing": 0.0}),
}
CODE = {"mode": "finetune", "model": "base", "loss": "ce", "betas": (0.9, 0.999), "min_lr": 1e-6, "ema": 0.0,
        "clip_grad": 0.0, "head_init": 0.001, "augment": "full", "repeats": 1, "erasing": 0.25,
        "test_crop": None, "img_size": (224, 224), "test_size": (224, 224), "weights": None}


def config(*flags):
    return common.parse_config(finetune.Config, finetune.presets, [str(flag) for flag in flags])


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_have_the_papers_numbers(name):
    rate, lr, batch, *numbers, others = PAPERS[name]
    names = ("epochs", "warmup_epochs", "weight_decay", "layer_decay", "drop_path", "randaug", "smoothing",
             "mixup", "cutmix")
    expected = CODE | {"batch_size": batch} | dict(zip(names, numbers, strict=True)) | others
    cfg = config("--recipe", name, "--check_data")
    assert {field: getattr(cfg, field) for field in expected} == expected
    assert (getattr(cfg, rate), cfg.peak_lr) == (lr, lr if rate == FIXED else pytest.approx(lr * batch / 256))
    lines = (ROOT / f"recipes/{name}.txt").read_text().splitlines()
    assert all(line.startswith("# ") or "# " in line for line in lines)  # each flag has its source


def test_every_recipe_is_in_the_table_and_on_the_page():
    files = {path.stem for path in (ROOT / "recipes").glob("*.txt")}
    files = {name for name in files if not name.endswith(("_seg", "_det", "_m2f"))}
    assert files == PAPERS.keys() | {"demo", "demo_linear"}
    page = (ROOT / "docs/RECIPES.md").read_text()
    assert all(f"`{name}`" in page for name in files)
    recipe, fields = config("--weights", "none", "--recipe", "mff"), config("--weights", "none")
    assert asdict(recipe) == asdict(fields) | {"recipe": "mff"}


# ---- what wins


def test_what_wins_flag_file_demo_or_recipe(tmp_path):
    size = {"model": "tiny", "img_size": (32, 48), "patch_size": 8}
    meta = size | {"method": "mae_mff", "in_chans": 1, "mean": (0.5,), "std": (0.5,)}
    content = {"model": common.ViT("tiny", (32, 48), 8, 1).state_dict(), "meta": meta}
    torch.save(content, tmp_path / "encoder.pth")
    file = ["--weights", tmp_path / "encoder.pth"]
    cfg = config(*file, "--recipe", "ddae_b")
    assert (cfg.model, cfg.img_size, cfg.mean, cfg.lr, cfg.base_lr) == ("tiny", (32, 48), (0.5,), 8e-3, None)
    cfg = config(*file, "--recipe", "cim_vit_s", "--base_lr", 1e-3)
    assert (cfg.img_size, cfg.lr, cfg.base_lr, cfg.peak_lr) == ((224, 224), None, 1e-3, 4e-3)
    assert config(*file, "--recipe", "cim_vit_s", "--img_size", 32).test_size == (32, 32)
    assert config(*file, "--demo").img_size == (32, 48)
    for mode, found in (("finetune", (2.0, "avg")), ("linear", (30.0, "avg")), ("knn", (100.0, "avg"))):
        cfg = config("--demo", "--mode", mode, "--weights", "none")
        assert (cfg.epochs, cfg.pool, cfg.model, cfg.data) == (*found, "nano", "shapes")
    cfg = config("--demo", "--recipe", "cim_vit_s", "--weights", "none")
    assert (cfg.epochs, cfg.model, cfg.augment, cfg.img_size) == (200.0, "nano", "full", (32, 32))
    cfg = config("--weights", "none", "--model", "resnet50")
    assert (cfg.layer_decay, cfg.drop_path) == (1.0, 0.0)
    cfg = config("--weights", "none", "--mode", "linear")
    assert (cfg.recipe, cfg.pool, cfg.peak_lr) == ("linear_mae", "cls", pytest.approx(6.4))
    config("--mode", "knn", "--weights", "none", "--in_chans", 5)  # nothing is augmented


@pytest.mark.parametrize("flags, words", [
    ("--recipe cim_resnet_100 --model base", "is for a ResNet, not for base"),
    ("--recipe mff --mode linear", "is for --mode finetune"),
    ("--recipe cim_resnet_300 --batch_size 5", "at least 6"),
    ("--mode linear --augment none --mixup 1", "keeps only features"),
    ("--recipe mff --lr 1 --base_lr 1", "give one of them"),
    ("--mixup -1", "--mixup"),
    ("--mode knn --resume", "nothing to resume"),
])
def test_what_does_not_fit_is_refused_in_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as caught:
        config("--weights", "none", *flags.split())
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and error.count("\n") == 1


# ---- recipes run, with all their ingredients


@pytest.mark.parametrize("name, flags", [
    ("mff", ["--model", "nano", "--patch_size", 8, "--img_size", 32]),
    ("cim_resnet_600", ["--resnet_width", 8, "--img_size", 32, "--test_size", 64]),
    ("revcol_in1k_after22k", ["--model", "revcol_nano", "--patch_size", 4, "--img_size", 32]),
    ("linear_mae", ["--model", "nano", "--patch_size", 8, "--img_size", 32]),
])
def test_three_steps_with_all_ingredients(name, flags, small_npz, tmp_path, monkeypatch):
    def calls(where, function):
        """Arguments of all calls of a function that goes on as before."""
        spy = Mock(wraps=getattr(where, function))
        monkeypatch.setattr(where, function, spy)
        return spy.call_args_list

    monkeypatch.setattr(common.Run, "catch_signals", lambda self: None)  # pytest keeps its own
    erased, augmented = (calls(augment, name) for name in ("random_erasing", "RandAugment"))
    losses, averaged = (calls(finetune, name) for name in ("loss_of", "update_ema"))
    resnet, others = calls(backbones, "drop_path"), calls(common, "drop_path")
    crops = calls(evaluate, "EvalCrop")
    cfg = config("--workers", 0, "--amp", "off", "--out", tmp_path / "run", "--data", small_npz, "--weights",
                 "none", "--recipe", name, *flags, "--batch_size", 24, "--epochs", 0.29)
    run = common.Run(cfg, "finetune")
    finetune.train(cfg, run)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3 and log[-1]["eval/n"] == 53 and math.isfinite(log[0]["train/loss"])
    recipe = config("--recipe", name, "--check_data")
    assert {p for (_, p), _ in erased} == {recipe.erasing} - {0}
    assert [c.args for c in augmented] == [(recipe.randaug, [124, 116, 104])] * (recipe.augment == "full")
    assert crops[-1].args == (cfg.test_size, recipe.test_crop) and len(averaged) == 3 * bool(recipe.ema)
    assert {labels.ndim for (_, labels, _), _ in losses} == {1 + bool(recipe.mixup or recipe.cutmix)}
    assert max(rate for (_, rate, _), _ in resnet + others) == pytest.approx(recipe.drop_path)
    assert len(set(run.sample_numbers)) == 24 // recipe.repeats
    if name != "linear_mae":
        groups = run.state["optimizer"].param_groups
        assert {group["weight_decay"] for group in groups} == {0.0, recipe.weight_decay}
        scales = {round(group["lr_scale"], 6) for group in groups}
        assert max(scales) == 1 and (len(scales) > 3) == (recipe.layer_decay < 1)
