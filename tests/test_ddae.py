"""ddae.py: masks, distances, weights, losses and teacher against slow versions; ablations; the command."""

import math

import numpy as np
import pytest
import torch
from conftest import run_script
from torch.nn import functional as F
from torture import log

import common
import ddae
import mae_mff
from ddae import Config, DeepDynamicAutoEncoder


def build(**values):
    defaults = {"model": "nano", "img_size": (32, 32), "patch_size": 4}
    return DeepDynamicAutoEncoder(Config(**(defaults | values)))


def batch(model, n=3):
    """Images and the distance maps of their masks, as the loader makes them."""
    distance = torch.stack([ddae.sample_mask(model.cfg) for _ in range(n)])
    return torch.randn(n, model.cfg.in_chans, *model.cfg.img_size), distance


# ---- masks and distances


@pytest.mark.parametrize("kind, mean", [("two_stage", 2.1), ("block", 2.65), ("random", 1.25)])
def test_masks_hide_exactly_their_share_and_distances_grow_with_blocks(kind, mean):
    for img_size, n_masked in (((128, 128), 48), ((160, 224), 105), ((224, 224), 147)):
        cfg = Config(img_size=img_size, mask=kind)
        distance = torch.stack([ddae.sample_mask(cfg) for _ in range(500)])
        assert distance.shape == (500, math.prod(cfg.grid)) and ((distance > 0).sum(1) == n_masked).all()
        assert len(distance.unique(dim=0)) > 450
    assert distance[distance > 0].mean().item() == pytest.approx(mean, rel=0.03)
    torch.manual_seed(3)  # what the loader does for each sample: no other source of randomness
    first = ddae.sample_mask(cfg)
    torch.manual_seed(3)
    assert torch.equal(ddae.sample_mask(cfg), first)


@pytest.mark.parametrize("grid", [(1, 14), (2, 2), (3, 40), (2, 64), (4, 128), (100, 1)])
def test_blocks_fit_into_any_grid(grid):
    for n_masked in {1, math.prod(grid) // 2, math.prod(grid) - 1}:
        for n_block in (0, n_masked):
            assert ddae.block_mask(grid, n_masked, n_block).sum() == n_masked


def test_blocks_have_the_distances_of_bootmaes_generator():
    """Measured on it: mean distance 1.94, 38 % next to a visible patch, largest 4.7 on average. It makes up
    to three patches of blocks visible again (it rolls the order of patches by 0 to 3), unlike ours."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(1000):
        blocks = ddae.block_mask((14, 14), 120, 120).ravel()
        order = np.roll(np.argsort(blocks - rng.random(196)), rng.integers(4))  # patches outside blocks first
        mask = np.ones((14, 14), bool)
        mask.ravel()[order[:49]] = False
        distance = ddae.distance_map(mask).numpy()[mask.ravel()]
        rows.append((distance.mean(), (distance == 1).mean(), distance.max()))
    assert np.mean(rows, axis=0) == pytest.approx([1.94, 0.38, 4.7], rel=0.02)


def test_distance_map_against_a_search():
    mask = ddae.block_mask((10, 14), 105, 70)
    distance, visible = ddae.distance_map(mask).reshape(10, 14), np.argwhere(~mask)
    for place in np.ndindex(10, 14):
        nearest = min(math.dist(place, other) for other in visible)
        assert distance[place].item() == pytest.approx(nearest, rel=1e-6)
        assert (distance[place] >= 1) == mask[place]


# ---- eqs. (2), (3), (5), (6)


def test_eq2_against_a_loop_in_float64():
    model = build(beta_init=(-1.3, -0.5, 0.0, 1.1))
    _, distance = batch(model, 2)
    h, weight = ddae.dynamic_weights(distance, model.beta)
    for i, beta in enumerate(model.cfg.beta_init):
        for b in range(2):
            powers = [math.exp(d**beta) if d > 0 else 0 for d in distance[b].tolist()]
            expected = torch.tensor([power / math.fsum(powers) for power in powers])
            torch.testing.assert_close(h[i, b].detach(), expected, rtol=1e-5, atol=0)
            torch.testing.assert_close(weight[i, b].detach(), expected / expected.max(), rtol=1e-5, atol=0)
    assert torch.equal(weight[2], (distance > 0).float()) and h.dtype == torch.float32  # beta 0: equal


@pytest.mark.parametrize("beta", [-30.0, 5.0, 30.0])
def test_extreme_beta_neither_overflows_nor_gives_nan(beta):
    distance = torch.tensor([[0, 1, 2, 5, 11.0], [0, 0, 0, 0, 1]])
    beta = torch.tensor([beta], requires_grad=True)
    h, weight = ddae.dynamic_weights(distance, beta)
    ((weight * torch.rand(2, 5)).sum() + ddae.regulariser(h, distance > 0)).backward()
    assert torch.isfinite(beta.grad).all() and h.sum().item() == pytest.approx(2)


@pytest.mark.parametrize("kind", ["channel", "mae", "raw"])
def test_pixel_targets(kind):
    """Channel: see the whole loss."""
    images = torch.randn(2, 5, 16, 16) * 4 + 1
    target, mean, deviation = ddae.pixel_target(images, 8, kind)
    torch.testing.assert_close(target * deviation + mean, common.patchify(images, 8))
    if kind != "channel":
        torch.testing.assert_close(target, mae_mff.patch_target(images, 8, kind == "mae"))


@pytest.mark.parametrize("flags", [{"dynamic": False}, {"dds": "none"}, {"beta_init": (0.0,), "reg": "none"}])
def test_its_mae_is_mae(flags):
    """Same weights, same hidden patches: DDAE without its parts has the loss of mae_mff.py."""
    ours = build(num_levels=1, distill=False, decoder="mae", decoder_depth=2, **flags)
    cfg = mae_mff.Config(model="nano", img_size=(32, 32), patch_size=4, fuse_layers=(3,), decoder_depth=2)
    mae = mae_mff.MaskedAutoencoder(cfg)
    state = ours.trunk_state()
    for name, value in ours.pixel_decoder.state_dict().items():
        state[name if name == "mask_token" else f"decoder_{name}"] = value
    mae.load_state_dict(state)
    images, distance = batch(ours)
    torch.testing.assert_close(ours(images, distance)[0], mae(images, (distance > 0).float())[0])


@pytest.mark.parametrize("feature_norm, dds, reg", [
    ("layer", "both", "sqrt"), ("instance", "pixel", "literal"), ("channel", "feature", "none"),
    ("none", "both", "sqrt"), ("layer", "none", "none")])
def test_the_whole_loss_against_its_parts_written_out(feature_norm, dds, reg):
    """dds says which of the two losses is deep and dynamic; the other is the last level's, all alike."""
    beta = (-0.9, -0.5, 0.1, 0.4) if dds != "none" else None
    model = build(beta_init=beta, feature_norm=feature_norm, dds=dds, reg=reg)
    model.teacher.load_state_dict(build().trunk_state())  # a teacher that differs
    images, distance = batch(model)
    mask, parts = (distance > 0).float(), dict.fromkeys(("eq3_pixel", "eq5_distill", "eq6_reg"), 0)
    visible = torch.stack([(row == 0).nonzero()[:, 0] for row in distance])
    hidden = torch.stack([row.nonzero()[:, 0] for row in distance])
    restore = torch.cat([visible, hidden], 1).argsort(1)
    x = model.embed(images)
    x = model.prepend_cls(torch.stack([x[b, visible[b]] for b in range(3)]))
    full = model.teacher.prepend_cls(model.teacher.embed(images))
    pixels = common.patchify(images, 4).reshape(3, 64, 16, 3)
    deviation = (pixels.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    pixels = ((pixels - pixels.mean(2, keepdim=True)) / deviation).flatten(2)
    for i in range(4):
        x, full = model.blocks[i](x), model.teacher.blocks[i](full)
        powers = torch.where(distance > 0, distance.clamp(min=1).pow(model.beta[i]).exp(), 0)
        h = powers / powers.sum(1, keepdim=True)
        feature, target = model.feature_decoder(model.norm(x)[None], restore)[0], full[:, 1:]
        if feature_norm == "instance":
            target = torch.stack([tokens - sum(tokens) / 64 for tokens in target])
        if feature_norm == "channel":
            every = target.flatten(0, 1)
            target = (target - every.mean(0)) / (every.var(0).sqrt() + 1e-5)
        if feature_norm in ("layer", "instance"):
            feature, target = (F.layer_norm(y, (128,), eps=1e-6) for y in (feature, target))
        pixel = model.pixel_decoder(model.norm(x)[None], restore)[0]
        for kind, error in (("eq3_pixel", pixel - pixels), ("eq5_distill", feature - target)):
            deep = dds == "both" or dds in ("pixel", "feature") and (dds == "pixel") == (kind == "eq3_pixel")
            level = ((h / h.amax(1, keepdim=True).detach() if deep else mask) * (error**2).mean(-1)).sum()
            parts[kind] += (1.0 if i == 3 else 0.75 * deep) * level / mask.sum()
        parts["eq6_reg"] += 0.5 * {"sqrt": 48**0.5, "literal": 1, "none": 0}[reg] * h.norm(dim=1).mean()
    loss, terms = model(images, distance)
    expected = sum(parts.values())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert loss == terms["loss"] and ("eq6_reg" in terms) == (reg != "none")
    for name in parts.keys() & terms.keys():
        torch.testing.assert_close(terms[name], parts[name].detach(), rtol=1e-5, atol=0)
    mse = ((pixel - pixels) ** 2).mean(-1)[mask > 0].mean()
    torch.testing.assert_close(terms["mse"], mse.detach())
    if dds != "none":
        gradients = [torch.autograd.grad(value, model.beta)[0] for value in (loss, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=0)
    assert [terms[f"beta/{i}"] for i in (1, 2, 3, 4)] == model.beta.tolist()
    half, more = model(images, distance, torch.tensor(0.5))  # --feature_ramp
    torch.testing.assert_close(half, loss - 0.5 * terms["eq5_distill"])
    assert more["eq5_distill"] == 0.5 * terms["eq5_distill"]


# ---- teacher


def test_teacher_sees_the_whole_image():
    model = build()
    images, distance = batch(model, 2)
    target = model.feature_target(images)
    plain = common.ViT("nano", (32, 32), 4)
    plain.load_state_dict(model.teacher.state_dict())
    torch.testing.assert_close(plain.norm(target[-1]), plain(images)[:, 1:])  # before the norm
    assert target.shape == (4, 2, 64, 128) and not target.requires_grad


def test_eq4_with_the_momentum_of_the_epoch_after_every_update_but_a_skipped_one(tmp_path):
    cfg = Config(**ddae.DEMO | {"batch_size": 4, "epochs": 800.0, "momentum": (0.5, 0.6, 0.9)},
                 demo=True, amp="off", out=tmp_path / "run")
    run, student = common.Run(cfg, "ddae"), DeepDynamicAutoEncoder(cfg)
    run.start(8)
    optimizer = common.adamw(common.parameter_groups(student, 0.05), cfg.betas)
    common.set_lr(optimizer, 1e-3)
    scaler, (_, distance) = torch.amp.GradScaler("cpu", enabled=False), batch(student, 4)
    for epoch, momentum in ((0, 0.5), (50, 0.55), (100, 0.6), (250, 0.75), (400, 0.9), (799.5, 0.9), (9, 1)):
        run.step = int(epoch * 2)
        before = {name: p.clone() for name, p in student.teacher.named_parameters()}
        images = torch.randn(4, 3, *cfg.img_size) * (math.nan if momentum == 1 else 1)
        ddae.train_step(student, iter([(images, distance, torch.arange(4))]), optimizer, scaler, run)
        for name, p in student.teacher.named_parameters():
            expected = momentum * before[name] + (1 - momentum) * student.get_parameter(name)
            torch.testing.assert_close(p, expected)


# ---- ablations


@pytest.mark.parametrize("size, levels", [("small", [3, 6, 9, 12]), ("small", [12]), ("small", [6, 12]),
                                          ("small", [2, 4, 6, 8, 10, 12]), ("large", [6, 12, 18, 24])])
def test_levels_are_those_of_table_6(size, levels):
    with torch.device("meta"):
        assert DeepDynamicAutoEncoder(Config(model=size, num_levels=len(levels))).levels == levels


# ---- the command


def test_demo_learns_and_its_checkpoint_goes_into_init(tmp_path):
    command = ["ddae.py", "--demo", "--workers", 0, "--log_every", 5]
    output = run_script([*command, "--epochs", 0.04, "--warmup_epochs", 0.01, "--out", "run"], tmp_path)
    assert "updates are few" in output and "teacher averages up to 100 updates" in output
    lines = log(tmp_path / "run")
    assert lines[-1]["train/mse"] < 0.8 * lines[0]["train/mse"] and "train/beta/2" in lines[-1]
    output = run_script([*command, "--epochs", 0.002, "--init", "run/last.pth", "--out", "less",
                         "--no-distill", "--beta_init", 0.3, "--no-learn_beta"], tmp_path)
    assert "ignored: beta, feature_decoder, teacher" in output
    beta = torch.load(tmp_path / "less/last.pth", weights_only=True)["model"]["beta"]
    assert beta.tolist() == pytest.approx([0.3, 0.3])
