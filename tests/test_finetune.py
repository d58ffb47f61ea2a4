"""finetune.py, augment.py, evaluate.py: LARS, augmentation, losses, scores, kNN and read-outs against slow
versions; split and killed runs; files that cannot be read."""

import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import killed, run_script
from PIL import Image
from torch import nn
from torture import log, same, state

import augment
import common
import evaluate
import finetune

NANO = ["finetune.py", "--weights", "none", "--model", "nano", "--img_size", 32, "--patch_size", 8, "--amp",
        "off", "--workers", 0]


def config(*flags):
    flags = ["--weights", "none", "--model", "nano", "--img_size", "32", "--patch_size", "8", *flags]
    return common.parse_config(finetune.Config, finetune.presets, flags)


def load(*flags):
    return finetune.load_model(config(*flags), 10)


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
    p.data.zero_(), optimizer.state.pop(p), optimizer.param_groups[0].update(weight_decay=0.0)
    b.grad = None  # no gradient: skipped, whatever its momentum
    optimizer.step()  # a norm of zero: no trust factor
    torch.testing.assert_close([p.detach(), b.detach()], [-0.5 * p.grad, expected[1]])


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
    scores = evaluate.knn_scores(queries, F.normalize(features, dim=1), labels, 4, k=6, temperature=0.1)
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


def test_random_erasing_is_timms():
    """Sides of its boxes, on an image so flat that many draws do not fit."""
    timms = pytest.importorskip("timm.data.random_erasing")
    images, found = torch.full((10000, 1, 12, 80), 9.0), []
    theirs = timms.RandomErasing(probability=1.0, mode="pixel", device="cpu")
    for erased in (augment.random_erasing(images, 1.0), theirs(images.clone())):
        changed = (erased != 9).all(1)
        h, w = changed.any(2).sum(1).double(), changed.any(1).sum(1).double()
        assert torch.equal(h * w, changed.sum((1, 2)).double())  # a box
        sides = torch.stack([h, w, h * w])
        found.append([*sides.mean(1), *sides.std(1), *sides.amax(1), (h == 0).double().mean()])
    torch.testing.assert_close(*map(torch.tensor, found), rtol=0.03, atol=0.03)
    changed = augment.random_erasing(torch.full((3000, 3, 40, 40), 9.0), 0.25) != 9
    assert changed.any((1, 2, 3)).float().mean() == pytest.approx(0.25, abs=0.03)


def test_the_probes_crop_is_maes():
    """One box, sides cut to the image's: its mean area by integration, of a photograph and of a panorama."""
    u = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    crop = augment.train_transform(config("--mode", "linear"))
    for height, width in ((375, 500), (100, 1000)):
        area = (0.08 + 0.92 * u[:, None]) * height * width
        aspect = (3 / 4) * (16 / 9) ** u[None]
        h, w = (area / aspect).sqrt().clamp(max=height), (area * aspect).sqrt().clamp(max=width)
        boxes = [crop.box(height, width) for _ in range(4000)]
        found = np.mean([h * w for _, _, h, w in boxes])
        assert found == pytest.approx((h * w).mean().item(), abs=0.01 * height * width)
        assert all(0 <= y <= height - h and 0 <= x <= width - w for y, x, h, w in boxes)


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
    plan = {"cfg": SimpleNamespace(repeats=repeats, batch_size=batch, seed=5), "n": n, "steps": steps,
            "accum_steps": 1, "micro_batch": batch // processes, "world_size": processes}
    runs = [SimpleNamespace(**plan, step=0, rank=rank) for rank in range(processes)]
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


@pytest.mark.parametrize("augment, micro_batch", [("crop", 6), ("none", 24)])
def test_a_probe_does_not_depend_on_how_it_is_split(augment, micro_batch, small_npz, tmp_path):
    command = [*NANO, "--mode", "linear", "--data", small_npz, "--batch_size", 48, "--epochs", 1,
               "--warmup_epochs", 0, "--base_lr", 1, "--log_every", 1, "--augment", augment]
    run_script([*command, "--out", "whole"], tmp_path)
    run_script([*command, "--micro_batch", micro_batch, "--out", "split"], tmp_path, 2)
    whole, split = ([line.get("train/loss", line.get("eval/top1")) for line in log(tmp_path / name)]
                    for name in ("whole", "split"))
    assert len(whole) == 6 and whole == pytest.approx(split, rel=1e-5)


def test_ema_forgets_its_start_and_reaches_its_decay():
    ema, model = (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2))
    model[1].running_mean.fill_(3.0)
    nn.init.zeros_(ema[0].weight), nn.init.ones_(model[0].weight)
    for step in range(5):
        finetune.update_ema(ema, model, 0.9999, step)
    start = 5 * 4 * 3 * 2 / (10 * 11 * 12 * 13 * 14)  # the product of (1 + n) / (10 + n)
    torch.testing.assert_close(1 - ema[0].weight.data, torch.full((2, 2), start))
    finetune.update_ema(ema, model, 0.9, 1000)
    torch.testing.assert_close(1 - ema[0].weight.data, torch.full((2, 2), 0.9 * start))
    assert torch.equal(ema[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize("classes", [7, 4])
def test_scores_against_a_loop(classes):
    """Unbalanced classes, of which one has no image; two images could not be read."""
    labels = torch.tensor([0] * 30 + [1] * 6 + [3] * 4)
    scores = torch.randn(40, classes) + F.one_hot(labels, classes)
    run = SimpleNamespace(device="cpu", world_size=1, autocast=nullcontext)
    source = common.ImageFiles([""] * 42, [0] * 42, range(classes), 3)
    batches = [(scores[i::3], labels[i::3], None) for i in range(3)]
    found = evaluate.evaluate(lambda images: images, batches, source, run)
    rank = [sum(x > row[label] for x in row).item() for row, label in zip(scores, labels, strict=True)]
    shares = [np.mean([rank[i] == 0 for i in range(40) if labels[i] == c]) for c in (0, 1, 3)]
    expected = {"top1": np.mean([r == 0 for r in rank]), "macc": np.mean(shares), "commonest": 0.75}
    expected |= {"top5": np.mean([r < 5 for r in rank])} if classes > 5 else {}
    expected = {f"eval/{name}": pytest.approx(100 * share, abs=1e-3) for name, share in expected.items()}
    assert found == expected | {"eval/n": 40, "eval/unreadable": 2}


# ---- what cannot be read, or is cut short


def test_held_out_images_that_cannot_be_read_are_left_out_and_counted(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "held")
    for root in (folder, tmp_path / "held"):
        (root / "class1/nested/09.png").write_bytes(b"no image")
    command = [*NANO, "--data", folder, "--val", "held", "--mode", "knn", "--out"]
    for out, processes in (("one", 1), ("two", 2)):
        run_script([*command, out], tmp_path, processes)
    (tmp_path / "held/class1/nested/09.png").unlink()
    run_script([*command, "without"], tmp_path)
    one, two, without = (log(tmp_path / out)[-1] for out in ("one", "two", "without"))
    assert (one["eval/n"], one["eval/unreadable"]) == (39, 1)
    assert one == two == without | {"eval/unreadable": 1}


def test_killed_in_an_evaluation_it_is_made_up_for_and_nothing_lost(small_npz, tmp_path):
    """In that of the second pass, and in the last."""
    command = [*NANO, "--data", small_npz, "--epochs", 3, "--batch_size", 50, "--log_every", 1, "--ema", 0.9]
    run_script([*command, "--out", "whole"], tmp_path)
    for evaluation, step in ((2, 10), (2, 15)):
        resume = [*command, "--out", "run", "--resume"]
        killed(tmp_path, resume, f"count == {evaluation}", "Run.share_statistics")
        lines = log(tmp_path / "run")
        assert torch.load(tmp_path / "run/last.pth", weights_only=True)["step"] == lines[-1]["step"] == step
        assert "eval/top1" not in lines[-1]
    run_script(resume, tmp_path)
    whole, run = (state(tmp_path / out) for out in ("whole", "run"))
    assert whole.keys() == run.keys() and [name for name in whole if not same(whole[name], run[name])] == []


def test_features_that_are_not_finite_are_refused(folder, tmp_path):
    model = common.ViT("nano", (32, 32), 8)
    for layer in (model.norm, model.blocks[3].norm2, *model.blocks[3].mlp.children()):
        layer.weight.data.fill_(9e14)  # finite, but what is computed with it is not
    torch.save(model.state_dict(), tmp_path / "encoder.pth")
    command = [*NANO, "--mode", "features", "--data", folder, "--weights", "encoder.pth", "--out", "x.npy"]
    output = run_script(command, tmp_path, expect=2)
    assert "not finite" in output.splitlines()[-1] and not (tmp_path / "x.npy").exists()
