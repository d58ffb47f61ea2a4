"""Recipes of finetune.py: the page against the code value by value, each one run for three steps, and what they are made of."""

import json
import math
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_script
from PIL import Image
from torch import nn

import common
import finetune

PAGE = (ROOT / "docs/RECIPES.md").read_text()


def config(*flags):
    return common.parse_config(finetune.Config, finetune.presets, [str(flag) for flag in flags])


# ---- the tables


def page_tables():
    """{recipe: {row: cell}} of the page."""
    recipes = {}
    for table in re.findall(r"\| setting .*(?:\n\|.*)+", PAGE):
        names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        for column, name in enumerate(names[1:], start=1):
            recipes[name] = {row[0]: row[column] for row in rows}
    return recipes


def value_of(cell):
    """Cell without its mark -> number, tuple of numbers, word, or None for a dash."""
    parts = []
    for part in cell.rstrip("†‡").split(","):
        try:
            parts.append(float(part))
        except ValueError:
            parts.append(None if part == "—" else part)
    return tuple(parts) if len(parts) > 1 else parts[0]


def test_the_page_has_all_recipes_and_the_code_all_of_the_page():
    assert page_tables().keys() == finetune.RECIPES.keys()


@pytest.mark.parametrize("name", finetune.RECIPES)
def test_the_page_equals_the_code_value_by_value(name):
    recipe, page = finetune.recipe_of(name), page_tables()[name]
    head = page.pop("from")
    assert not recipe.keys() - page.keys()
    for field, cell in page.items():
        value, source = recipe.get(field, (None, None))
        assert value_of(cell) == value, field
        if value is not None:
            mark = cell[-1] if cell[-1] in "†‡" else ""
            expected = "‡" if source == "our choice" else "†" if source.endswith("code") or source == "RSB" else ""
            assert mark == expected, f"{field} is from {source}"
            if not mark and (name.removesuffix("_l"), field) not in {("revcol_scratch", "ema"), ("revcol_scratch", "weights")}:
                assert head.split(",")[-1].strip() in source or name == "demo_linear", f"{field} is from {source}"


@pytest.mark.parametrize("name", finetune.RECIPES)
def test_print_recipe_names_values_and_sources(name, capsys):
    cfg = config("--recipe", name, "--print_recipe")
    finetune.print_recipe(cfg)
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: line for line in lines[1:]}
    for field, (value, source) in finetune.recipe_of(name).items():
        assert found[field].endswith(source) and (value is None or str(value) in found[field])
        assert getattr(cfg, field) == value
    changed = config("--recipe", name, "--print_recipe", "--epochs", 7, "--lr", 0.25)
    finetune.print_recipe(changed)
    output = capsys.readouterr().out
    assert re.search(r"epochs +7.0 +a flag, the file or the network's kind; [\d.]+ in ", output)
    assert re.search(r" lr +0.25 +a flag", output)


def test_print_recipe_is_a_command_that_needs_nothing(tmp_path):
    output = run_script(["finetune.py", "--recipe", "cim_resnet_300", "--print_recipe"], tmp_path)
    assert re.search(r"lr +0.012 +CIM, table 15\n", output) and not list(tmp_path.iterdir())


def test_defaults_of_the_command_line_are_the_recipe_mff():
    assert config("--weights", "none") == config("--weights", "none", "--recipe", "mff")
    own = finetune.Config(weights="none")
    for field, (value, _) in finetune.recipe_of("mff").items():
        assert getattr(own, field) == value, field


# ---- what wins


def test_what_wins_flag_file_or_recipe(tmp_path):
    model = common.ViT("tiny", (32, 48), 8, 1)
    meta = {"model": "tiny", "img_size": (32, 48), "patch_size": 8, "in_chans": 1, "mean": (0.5,), "std": (0.5,)}
    torch.save({"model": model.state_dict(), "meta": meta}, tmp_path / "encoder.pth")
    cfg = config("--weights", tmp_path / "encoder.pth", "--recipe", "ddae_b")
    assert (cfg.model, cfg.img_size, cfg.mean, cfg.lr, cfg.base_lr) == ("tiny", (32, 48), (0.5,), 8e-3, None)
    cfg = config("--weights", tmp_path / "encoder.pth", "--recipe", "cim_vit_s", "--base_lr", 1e-3)
    assert (cfg.img_size, cfg.lr, cfg.base_lr, cfg.peak_lr) == ((224, 224), None, 1e-3, 4e-3)
    assert config("--weights", tmp_path / "encoder.pth", "--recipe", "cim_vit_s", "--img_size", 32).eval_size == (32, 32)
    cfg = config("--demo", "--weights", "none")
    assert (cfg.recipe, cfg.epochs, cfg.model, cfg.augment) == ("demo", 2.0, "nano", "crop")
    assert config("--demo", "--mode", "linear", "--weights", "none").recipe == "demo_linear"
    cfg = config("--demo", "--recipe", "mff", "--weights", "none")
    assert (cfg.epochs, cfg.model, cfg.augment) == (100.0, "nano", "full")
    cfg = config("--weights", "none", "--model", "resnet50")
    assert (cfg.recipe, cfg.layer_decay, cfg.drop_path) == ("mff", 1.0, 0.0)
    assert config("--recipe", "linear_mae", "--weights", "none").mode == "linear"
    assert config("--recipe", "revcol_scratch").weights == "none"


@pytest.mark.parametrize("flags, words", [
    (["--recipe", "rsb"], "--recipe rsb is none of: mff, mae"),
    (["--recipe", "cim_resnet_100", "--weights", "none", "--model", "base"], "is for a ResNet, not for base"),
    (["--recipe", "cim_vit_s", "--weights", "none", "--demo"], "--demo and --recipe cim_vit_s both set model or size"),
    (["--recipe", "cim_resnet_300", "--weights", "none", "--test_size", "0"], "any other above 0"),
    (["--recipe", "revcol_scratch", "--test_size", "230"], "230"),
    (["--recipe", "cim_resnet_300", "--weights", "none", "--batch_size", "5"], "expected a --batch_size of at least 6"),
    (["--weights", "none", "--mode", "linear", "--augment", "none", "--mixup", "1"], "--augment none keeps only features"),
    (["--recipe", "mff", "--mode", "linear", "--weights", "none"], "--recipe mff is for --mode finetune"),
    (["--recipe", "mff", "--weights", "none", "--lr", "1", "--base_lr", "1"], "give one of them"),
    (["--weights", "none", "--test_size", "256"], "expected --img_size 224,224, for which a ViT has positions"),
    (["--weights", "none", "--test_crop", "2"], "--test_crop 2.0, expected more than 0, at most 1"),
    (["--weights", "none", "--randaug", "15"], "--randaug 15.0, expected 0 to 10"),
    (["--weights", "none", "--mode", "linear", "--loss", "bce"], "are for --mode finetune"),
    (["--mode", "knn", "--print_recipe"], "--mode knn has no recipe"),
    (["--mode", "knn", "--weights", "none", "--resume"], "--mode knn has nothing to resume"),
    (["--mode", "knn", "--weights", "none", "--temperature", "0"], "--temperature 0.0, expected more than 0"),
])
def test_what_does_not_fit_is_refused_in_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as caught:
        config(*flags)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and error.count("\n") == 1


# ---- each recipe runs, with all its ingredients


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Run finetune.py within this process: run(*flags) -> (Config, folder)."""
    monkeypatch.setattr(common.Run, "catch_signals", lambda self: None)  # pytest keeps its own

    def run(*flags):
        cfg = config("--workers", 0, "--amp", "off", "--out", tmp_path / f"run{len(list(tmp_path.iterdir()))}", *flags)
        finetune.train(cfg, common.Run(cfg, "finetune"))
        return cfg, tmp_path / cfg.out

    return run


@pytest.mark.parametrize("name", finetune.RECIPES)
def test_three_steps_with_all_ingredients(name, here, small_npz, monkeypatch, capsys):
    model = finetune.recipe_of(name).get("model", ("base", ""))[0]
    size = {"ResNet": ["--resnet_width", 8], "RevColV2": ["--model", "revcol_nano", "--patch_size", 4],
            "ViT": ["--model", "nano", "--patch_size", 8]}[finetune.family(model)]
    if finetune.family(model) == "ResNet":  # 160 px training, 224 px test, in small
        size += ["--test_size", 64, "--img_size", 48 if name.endswith("100") else 64]
    else:
        size += ["--img_size", 32]
    seen, keys = {}, []

    def spy(where, function, note):
        original = getattr(where, function)

        def called(*args, **kwargs):
            note(*args, **kwargs)
            return original(*args, **kwargs)

        monkeypatch.setattr(where, function, called)

    spy(finetune, "random_erasing", lambda images, p: seen.update(erasing=p))
    spy(finetune.RandAugment, "__init__", lambda self, magnitude, fill: seen.update(randaug=magnitude, fill=tuple(fill)))
    spy(finetune.RandAugment, "__call__", lambda self, image: seen.update(augment="full"))
    spy(F, "binary_cross_entropy_with_logits", lambda scores, target: seen.update(loss="bce", target=target))
    spy(F, "cross_entropy", lambda scores, target, label_smoothing: seen.update(
        loss="ce", target=target, smooth=label_smoothing))
    spy(common, "drop_path", lambda x, rate, training: seen.update(drop_path=max(rate, seen.get("drop_path", 0))))
    spy(common.EvalCrop, "__init__", lambda self, size, ratio=None: seen.update(test_size=size, test_crop=ratio))
    spy(common.Views, "__getitem__", lambda self, key: keys.append(key) if self.flip else None)
    spy(finetune, "warmup_cosine", lambda epoch, *values: seen.update(schedule=values))
    cfg, out = here("--data", small_npz, "--weights", "none", "--recipe", name, *size, "--batch_size", 24, "--epochs", 0.29)
    assert ("the learning rate only rises" in capsys.readouterr().out) == (cfg.warmup_epochs > 0.29)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3 and log[-1]["eval/n"] == 53 and math.isfinite(log[0]["train/loss"])
    recipe = {field: value for field, (value, _) in finetune.recipe_of(name).items()}
    reduced = {"model", "img_size", "test_size", "batch_size", "epochs", "weights"}
    assert {f: getattr(cfg, f) for f in recipe.keys() - reduced} == {f: recipe[f] for f in recipe.keys() - reduced}
    assert seen.get("erasing", 0) == recipe["erasing"] and seen.get("augment", cfg.augment) == recipe["augment"]
    assert seen["loss"] == cfg.loss
    assert (seen["target"].ndim == 2) == bool(recipe["mixup"] or recipe["cutmix"] or cfg.loss == "bce")
    assert cfg.loss == "bce" or seen["smooth"] == recipe["smoothing"]
    assert seen.get("drop_path", 0) == pytest.approx(recipe["drop_path"])
    assert (seen["test_size"], seen["test_crop"]) == (cfg.eval_size, recipe["test_crop"])
    assert seen["schedule"] == (cfg.peak_lr, recipe["min_lr"], recipe["warmup_epochs"], 0.29)
    if recipe["augment"] == "full":
        assert seen["randaug"] == recipe["randaug"] and seen["fill"] == (124, 116, 104)
    if recipe["augment"] != "none":
        images = [index for _, index in keys]
        assert len(set(keys)) == len(keys) == 72 and len(set(images)) == 72 // cfg.repeats
    content = torch.load(out / "last.pth", weights_only=True)
    assert ("ema" in content) == bool(cfg.ema)
    if cfg.ema:
        a, b = (next(v for n, v in content[which].items() if n.endswith("head.weight")) for which in ("ema", "model"))
        assert not torch.equal(a, b)
    if cfg.mode == "finetune":
        groups = content["optimizer"]["param_groups"]
        assert {group["weight_decay"] for group in groups} == {0.0, recipe["weight_decay"]}
        assert {tuple(group["betas"]) for group in groups} == {recipe["betas"]}
        scales = {round(group["lr_scale"], 6) for group in groups}
        assert max(scales) == 1 and (len(scales) > 3) == (recipe["layer_decay"] < 1)


# ---- the ingredients


def test_randaugment_has_timms_operations():
    """Pixel for pixel; slopes, of which one is computed through its angle, may differ in the last digit."""
    augment = pytest.importorskip("timm.data.auto_augment")
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60), Image.BICUBIC)
    names = {"color": "ColorIncreasing", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateXRel",
             "translate_y": "TranslateYRel", "solarize_add": "SolarizeAdd", "rotate": "Rotate", "invert": "Invert",
             "autocontrast": "AutoContrast", "equalize": "Equalize"}
    theirs = {names.get(name, f"{name.title()}Increasing") for name in finetune.OPERATIONS}
    assert theirs == set(augment._RAND_INCREASING_TRANSFORMS)
    for name, ours in finetune.OPERATIONS.items():
        for magnitude in (0.0, 3.3, 9.0, 9.9):
            hparams = {"img_mean": (124, 116, 104), "interpolation": Image.BICUBIC}
            operation = augment.AugmentOp(names.get(name, f"{name.title()}Increasing"), 1.0, magnitude, hparams)
            theirs = [np.asarray(operation(smooth), int) for _ in range(20)]  # both signs, as they are drawn
            mine = [np.asarray(ours(smooth, sign * magnitude / 10, [124, 116, 104]), int) for sign in (1, -1)]
            distance = np.array([[np.abs(a - b).mean() for b in theirs] for a in mine])
            limit = 0.05 if name.startswith("shear") else 0.0
            assert (distance.min(0) <= limit).all() and (distance.min(1) <= limit).all(), (name, magnitude)


def test_randaugment_draws_two_operations_each_half_of_the_time(monkeypatch):
    drawn = []
    fakes = {name: lambda image, m, fill, name=name: drawn.append((name, m)) or image for name in finetune.OPERATIONS}
    monkeypatch.setattr(finetune, "OPERATIONS", fakes)
    augment, image = finetune.RandAugment(7.0, [0, 0, 0]), torch.zeros(3, 8, 8, dtype=torch.uint8)
    counts = []
    for _ in range(3000):
        before = len(drawn)
        assert torch.equal(augment(image), image)
        counts.append(len(drawn) - before)
    shares = np.bincount(counts) / 3000
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    names = [name for name, _ in drawn]
    assert {names.count(name) for name in fakes} <= set(range(140, 260)) and len(set(names)) == 15
    magnitudes = np.array([10 * m for _, m in drawn])
    assert abs(np.abs(magnitudes).mean() - 7) < 0.05 and abs(np.abs(magnitudes).std() - 0.5) < 0.03
    assert abs((magnitudes > 0).mean() - 0.5) < 0.04


def test_binary_cross_entropy_against_a_loop():
    scores, smoothing = torch.randn(5, 4), 0.2
    for labels in (torch.tensor([0, 3, 1, 1, 2]), torch.rand(5, 4).softmax(1)):
        total = 0.0
        for b in range(5):
            for c in range(4):
                share = float(labels[b] == c) if labels.ndim == 1 else labels[b, c].item()
                target, p = share * 0.8 + 0.2 / 4, 1 / (1 + math.exp(-scores[b, c].item()))
                total -= target * math.log(p) + (1 - target) * math.log(1 - p)
        cfg = types.SimpleNamespace(loss="bce", smoothing=smoothing)
        assert finetune.loss_of(scores, labels, cfg).item() == pytest.approx(total / 20, rel=1e-5)


@pytest.mark.parametrize("repeats, n, batch, processes", [
    (3, 100, 24, 1), (3, 100, 24, 2), (3, 50, 20, 1), (2, 7, 6, 3), (1, 9, 4, 2)])
def test_repeated_augmentation(repeats, n, batch, processes):
    """Each update: as many copies of an image as stated (one fewer of one image if they do not divide the batch), never two
    next to each other; images in the order of the passes, each with a crop of its own."""
    steps = 4 * n // batch + 1
    plan = common.Plan(n, batch, batch // processes, 1, steps)
    runs = [types.SimpleNamespace(rank=rank, world_size=processes) for rank in range(processes)]
    shares = [list(common.KeyedBatches(plan, 5, run, 0, repeats)) for run in runs]
    updates = [sum(micro, []) for micro in zip(*shares, strict=True)]
    keys = [key for update in updates for key in update]
    assert len(keys) == steps * batch
    unique = -(-batch // repeats)
    seen = []
    for update in updates:
        images = [index for _, index in update]
        drawn = [(epoch // repeats, index) for epoch, index in update]  # an image may end a pass and begin the next
        assert all(a != b for a, b in zip(drawn, drawn[1:], strict=False))
        seen += images[:unique]
        if n >= 2 * unique:
            assert sum(images.count(i) < repeats for i in set(images)) == unique * repeats - batch
    assert len(set(keys)) == len(keys)
    assert [sorted(seen[start : start + n]) for start in range(0, len(seen) - n + 1, n)] == [list(range(n))] * (len(seen) // n)


def test_resumed_repeats_go_on_where_they_were():
    plan, run = common.Plan(50, 12, 4, 3, 9), types.SimpleNamespace(rank=0, world_size=1)
    whole = list(common.KeyedBatches(plan, 1, run, 0, 3))
    assert list(common.KeyedBatches(plan, 1, run, 4, 3)) == whole[12:]


def test_test_crop_cuts_out_the_stated_share():
    image = torch.arange(400.0).expand(3, 400, 400)
    for size, ratio, margin in ((224, 0.95, 235), (224, None, 256), (32, None, 32), (384, None, 384), (160, 0.875, 182)):
        left, right = common.EvalCrop((size, size), ratio)(image)[0, 0, [0, -1]].tolist()
        assert (right - left) / 400 == pytest.approx((size - 1) / margin, abs=0.02)


def test_drop_path_of_a_resnet(monkeypatch):
    torch.manual_seed(0)
    model = common.ResNet50(8, drop_path=0.4).train()
    norms = [module for module in model.modules() if isinstance(module, common.LastNorm)]
    assert [norm.drop_path for norm in norms] == pytest.approx([0.4 * i / 15 for i in range(16)])
    x = torch.randn(400, 32, 2, 2)
    norm = common.LastNorm(32, 0.4)
    whole, out = F.batch_norm(x, None, None, training=True), norm(x)
    dropped = (out == 0).flatten(1).all(1)
    assert 0.3 < dropped.float().mean() < 0.5
    torch.testing.assert_close(out[~dropped], whole[~dropped] / 0.6)
    plain = common.ResNet50(8)
    plain.load_state_dict(model.state_dict())  # no name of its own
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), plain.eval()(images))


# ---- the probe: one step of the head on the whole batch


def test_the_probe_does_not_depend_on_micro_batches(here, small_npz):
    """Crops, BatchNorm and LARS: split into eight, the same losses and the same head."""
    heads, losses = [], []
    for micro_batch in (48, 6):
        _, out = here("--recipe", "linear_mae", "--data", small_npz, "--weights", "none", "--model", "nano", "--patch_size", 8,
                      "--img_size", 32, "--batch_size", 48, "--micro_batch", micro_batch, "--epochs", 1, "--warmup_epochs", 0,
                      "--base_lr", 1, "--log_every", 1, "--smoothing", 0.1, "--mixup", 0)
        heads.append(torch.load(out / "best.pth", weights_only=True)["model"])
        losses.append([json.loads(line)["train/loss"] for line in (out / "log.jsonl").open() if "train/loss" in line])
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_the_probe_is_the_same_on_two_processes(augment, small_npz, tmp_path):
    for processes in (1, 2):
        run_script(["finetune.py", "--demo", "--recipe", "linear_mae", "--amp", "off", "--workers", 0, "--data", small_npz,
                    "--weights", "none", "--batch_size", 48, "--epochs", 1, "--warmup_epochs", 0, "--base_lr", 1,
                    "--augment", augment, "--log_every", 1, "--out", f"run{processes}"], tmp_path, processes)
    logs = [[json.loads(line) for line in (tmp_path / f"run{n}/log.jsonl").open()] for n in (1, 2)]
    one, two = ([line.get("train/loss", line.get("eval/top1")) for line in log] for log in logs)
    assert len(one) == 6 and one == pytest.approx(two, rel=1e-5)


def test_lars_step_of_the_whole_batch_by_hand():
    """probe_step from three micro-batches, against the formula on all rows at once."""
    model = nn.Sequential(nn.BatchNorm1d(6, affine=False, eps=1e-6), nn.Linear(6, 3))
    rows, labels = torch.randn(12, 6), torch.arange(12) % 3
    batches = iter([{"x": rows[i : i + 4], "label": labels[i : i + 4], "index": torch.arange(i, i + 4)} for i in (0, 4, 8)])
    run = types.SimpleNamespace(device=torch.device("cpu"), amp_dtype=None, world_size=1, seed=lambda *_: None,
                                stop_requested=False, bad_files=types.SimpleNamespace(new={}))
    cfg = types.SimpleNamespace(erasing=0.0, smoothing=0.0, loss="ce", clip_grad=0.0)
    weight, bias = model[1].weight.detach().clone(), model[1].bias.detach().clone()
    optimizer, scaler = finetune.LARS(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    common.set_lr(optimizer, 0.5)
    stats, samples = finetune.probe_step(lambda x: x, model, batches, lambda batch: batch["x"], None, optimizer, scaler, 0, cfg,
                                         common.Plan(12, 12, 4, 3, 1), run)
    assert samples == list(range(12))
    x = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-6).sqrt()
    p = (x @ weight.T + bias).softmax(1)
    error = (p - F.one_hot(labels)) / 12
    g = error.T @ x
    torch.testing.assert_close(model[1].weight.data, weight - 0.5 * 0.001 * weight.norm() / g.norm() * g, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model[1].bias.data, bias - 0.5 * error.sum(0), rtol=1e-5, atol=1e-7)
    assert stats["loss"] == pytest.approx(-p[range(12), labels].log().mean().item(), rel=1e-5)
