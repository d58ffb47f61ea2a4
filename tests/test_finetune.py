"""finetune.py: LARS, augmentation, losses, kNN and read-outs against slow versions; split runs."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from PIL import Image
from torch import nn
from torture import log

import augment
import common
import finetune


def load(*flags, classes=10):
    flags = ["--weights", "none", "--model", "nano", "--img_size", "32", "--patch_size", "8", *flags]
    return finetune.load_model(common.parse_config(finetune.Config, finetune.presets, flags), classes)


def test_lars_against_its_formula():
    p, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    optimizer = finetune.LARS([p, b], weight_decay=0.1)
    common.set_lr(optimizer, 0.5)
    expected, m = [p.detach().clone(), b.detach().clone()], [0.0, 0.0]
    for _ in range(3):
        gradients = [torch.randn(4, 3), torch.randn(4)]
        p.grad, b.grad = (g.clone() for g in gradients)
        optimizer.step()
        g = gradients[0] + 0.1 * expected[0]
        gradients[0] = g * 0.001 * math.sqrt((expected[0] ** 2).sum()) / math.sqrt((g**2).sum())
        for i in range(2):
            m[i] = 0.9 * m[i] + gradients[i]
            expected[i] = expected[i] - 0.5 * m[i]
    torch.testing.assert_close([p.detach(), b.detach()], expected)
    p.data.zero_(), optimizer.state.clear(), optimizer.param_groups[0].update(weight_decay=0.0)
    optimizer.step()  # a norm of zero: no trust factor
    torch.testing.assert_close(p.detach(), -0.5 * p.grad)


def test_layer_ids_and_scales():
    model = load("--drop_path", "0.3")
    groups = common.parameter_groups(model, 0.05, ("pos_embed", "cls_token"), model.layer_id, 0.75)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == len(names)  # everything learns, positions included
    for name, exponent in (("pos_embed", 5), ("patch_embed.proj.weight", 5), ("blocks.0.norm1.bias", 4),
                           ("blocks.3.mlp.fc2.weight", 1), ("fc_norm.weight", 0), ("head.weight", 0)):
        assert found[name]["lr_scale"] == pytest.approx(0.75**exponent)
    free = {name for name, p in model.named_parameters() if p.ndim == 1} | {"pos_embed", "cls_token"}
    assert {name for name, group in found.items() if not group["weight_decay"]} == free


def test_a_probe_trains_the_head_alone_on_normalised_features():
    model = load("--mode", "linear")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    images = torch.randn(6, 3, 32, 32)
    features = model.features(images)
    torch.testing.assert_close(features, common.ViT.forward(model, images)[:, 0])
    expected = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    expected = expected @ model.head[1].weight.T
    torch.testing.assert_close(model.head(features), expected, atol=1e-4, rtol=1e-4)


def test_drop_path_of_a_resnet():
    flags = ["--model", "resnet50", "--resnet_width", "8", "--drop_path"]
    model, plain = load(*flags, "0.4").train(), load(*flags, "0")
    norm, x = model.layer4[2].bn3, torch.randn(400, 256, 1, 2)
    whole, out = F.batch_norm(x, None, None, training=True), norm(x)
    dropped = (out == 0).flatten(1).all(1)
    assert 0.3 < dropped.float().mean() < 0.5
    torch.testing.assert_close(out[~dropped], whole[~dropped] / 0.6)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), plain.eval()(images))


def test_knn_against_a_loop():
    queries, features, labels = torch.randn(7, 5), torch.randn(30, 5), torch.arange(30) % 4
    scores = finetune.knn_scores(queries, F.normalize(features, dim=1), labels, 4, k=6, temperature=0.1)
    for q in range(7):
        cosine = [F.cosine_similarity(queries[q], features[j], dim=0).item() for j in range(30)]
        expected = [0.0] * 4
        for j in sorted(range(30), key=lambda j: -cosine[j])[:6]:
            expected[labels[j]] += math.exp((cosine[j] - max(cosine)) / 0.1)
        torch.testing.assert_close(scores[q], torch.tensor(expected), rtol=1e-4, atol=1e-4)


# ---- augmentation and loss


def test_randaugment_has_timms_operations():
    """Pixel for pixel; slopes, of which one is computed through its angle, may differ in the last digit."""
    timms = pytest.importorskip("timm.data.auto_augment")
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60), Image.BICUBIC)
    names = {"color": "ColorIncreasing", "shear_x": "ShearX", "shear_y": "ShearY", "rotate": "Rotate",
             "translate_x": "TranslateXRel", "translate_y": "TranslateYRel", "solarize_add": "SolarizeAdd",
             "invert": "Invert", "autocontrast": "AutoContrast", "equalize": "Equalize"}
    names = {name: names.get(name, f"{name.title()}Increasing") for name in augment.OPERATIONS}
    assert set(names.values()) == set(timms._RAND_INCREASING_TRANSFORMS)
    hparams = {"img_mean": (124, 116, 104), "interpolation": Image.BICUBIC}
    for name, ours in augment.OPERATIONS.items():
        for magnitude in (0.0, 3.3, 9.9):
            operation = timms.AugmentOp(names[name], 1.0, magnitude, hparams)
            theirs = [np.asarray(operation(smooth), int) for _ in range(12)]  # both signs, as they are drawn
            mine = [np.asarray(ours(smooth, m * magnitude / 10, [124, 116, 104]), int) for m in (1, -1)]
            distance = np.array([[np.abs(a - b).mean() for b in theirs] for a in mine])
            limit = 0.05 if name.startswith("shear") else 0.0
            assert (distance.min(0) <= limit).all() and (distance.min(1) <= limit).all(), (name, magnitude)


def test_randaugment_draws_two_operations_each_half_of_the_time(monkeypatch):
    drawn, image = [], torch.zeros(3, 8, 8, dtype=torch.uint8)
    note = dict.fromkeys(augment.OPERATIONS, lambda image, m, fill: drawn.append(m) or image)
    monkeypatch.setattr(augment, "OPERATIONS", note)
    for _ in range(2000):
        assert torch.equal(augment.RandAugment(7.0, [0, 0, 0])(image), image)
    m = 10 * np.array(drawn)
    found = [len(m) / 2000, np.abs(m).mean(), np.abs(m).std(), (m > 0).mean()]
    assert found == pytest.approx([1, 7, 0.5, 0.5], abs=0.05)


def test_random_erasing_fills_boxes_of_the_stated_area():
    images = torch.full((500, 3, 64, 48), 9.0)
    changed = (augment.random_erasing(images, 0.25) != 9).all(1)
    share = changed.float().mean((1, 2))
    assert 0.18 < (share > 0).float().mean() < 0.32 and share.max() < 0.36
    for box in changed[share > 0]:
        rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
        assert box.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)


def test_mixing_keeps_labels_in_proportion_and_bce_equals_a_loop():
    cfg = SimpleNamespace(mixup=0.0, cutmix=1.0, erasing=0.0, loss="bce", smoothing=0.2)
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 32, 32), torch.eye(4, dtype=torch.int64)
    mixed, soft = augment.erase_and_mix(images.clone(), labels, cfg)
    shares = torch.stack([(mixed == c).float().mean((1, 2, 3)) for c in range(4)], dim=1)
    torch.testing.assert_close(shares, soft)
    scores = torch.randn(4, 4)
    for target in (soft, torch.tensor([0, 3, 1, 1])):
        total = 0.0
        for b in range(4):
            for c in range(4):
                share = soft[b, c] if target.ndim == 2 else float(target[b] == c)
                t, p = share * 0.8 + 0.2 / 4, 1 / (1 + math.exp(-scores[b, c]))
                total -= t * math.log(p) + (1 - t) * math.log(1 - p)
        assert finetune.loss_of(scores, target, cfg).item() == pytest.approx(float(total) / 16, rel=1e-5)


@pytest.mark.parametrize("repeats, n, batch, processes", [(3, 50, 20, 1), (2, 7, 6, 3), (1, 9, 4, 2)])
def test_repeated_keys(repeats, n, batch, processes):
    """Position by position; a resumed run goes on in the same sequence."""
    steps = 4 * n // batch + 1
    cfg = SimpleNamespace(repeats=repeats, batch_size=batch, seed=5)
    plan = {"cfg": cfg, "n": n, "steps": steps, "accum_steps": 1, "micro_batch": batch // processes}
    runs = [SimpleNamespace(**plan, step=0, rank=rank, world_size=processes) for rank in range(processes)]
    updates = [sum(micro, []) for micro in zip(*map(augment.repeated_keys, runs), strict=True)]
    images = -(-batch // repeats)
    for step, update in enumerate(updates):
        for place, (epoch, index) in enumerate(update):
            position = step * images + place % images
            assert epoch == position // n * repeats + place // images
            assert index == common.epoch_order(n, 5, position // n)[position % n]
    assert len(updates) == steps and len({key for update in updates for key in update}) == steps * batch
    runs[0].step = 2
    assert list(augment.repeated_keys(runs[0]))[0] == updates[2][: batch // processes]


# ---- runs


PROBE = ["finetune.py", "--demo", "--mode", "linear", "--weights", "none", "--amp", "off", "--workers", 0,
         "--batch_size", 48, "--epochs", 1, "--warmup_epochs", 0, "--base_lr", 1, "--log_every", 1]


@pytest.mark.parametrize("augment, processes, micro_batch", [("crop", 2, 6), ("none", 2, 24), ("crop", 1, 6)])
def test_a_probe_does_not_depend_on_how_it_is_split(augment, processes, micro_batch, small_npz, tmp_path):
    command = [*PROBE, "--data", small_npz, "--augment", augment]
    run_script([*command, "--out", "whole"], tmp_path)
    run_script([*command, "--micro_batch", micro_batch, "--out", "split"], tmp_path, processes)
    whole, split = ([line.get("train/loss", line.get("eval/top1")) for line in log(tmp_path / name)]
                    for name in ("whole", "split"))
    assert len(whole) == 6 and whole == pytest.approx(split, rel=1e-5)


def test_ema_is_the_average_of_the_updates():
    ema, model = (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2))
    model[1].running_mean.fill_(3.0)
    expected = 0.9 * ema[0].weight.data + 0.1 * model[0].weight.data
    finetune.update_ema(ema, model, 0.9)
    torch.testing.assert_close(ema[0].weight.data, expected)
    assert torch.equal(ema[1].running_mean, model[1].running_mean)
