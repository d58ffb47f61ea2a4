"""ddae.py: masks, distances, weights, losses, teacher against slow versions; its ablations; the demo's command."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import run_command, run_script
from PIL import Image
from torch.nn import functional as F

import common
import ddae
import mae_mff
from ddae import Config, DeepDynamicAutoEncoder


def build(**values):
    return DeepDynamicAutoEncoder(Config(**({"model": "nano", "img_size": (32, 32), "patch_size": 4} | values)))


def batch(model, n=3):
    """Images and the distance maps of their masks, as the loader would give them."""
    draw = ddae.mask_source(model.cfg)
    return torch.randn(n, model.cfg.in_chans, *model.cfg.img_size), torch.stack([draw() for _ in range(n)])


# ---- masks and distances


@pytest.mark.parametrize("kind", ["two_stage", "block", "random"])
@pytest.mark.parametrize("img_size, n_masked", [((224, 224), 147), ((128, 128), 48), ((160, 224), 105)])
def test_every_mask_hides_exactly_its_share(kind, img_size, n_masked):
    draw = ddae.mask_source(Config(img_size=img_size, mask=kind))
    masks = torch.stack([draw() for _ in range(2000)]) > 0
    assert (masks.sum(1) == n_masked).all() and masks.shape[1] == math.prod(common.patch_grid(img_size, 16))
    assert len(masks.unique(dim=0)) > 1900


@pytest.mark.parametrize("grid", [(1, 14), (2, 2), (3, 40), (32, 32), (2, 64), (4, 128), (100, 1)])
def test_blocks_fit_into_any_grid(grid):
    for n_masked in {1, math.prod(grid) // 2, math.prod(grid) - 1}:
        for n_block in (0, n_masked):
            assert ddae.block_mask(grid, n_masked, n_block).sum() == n_masked


def test_blocks_have_the_distances_of_bootmaes_generator():
    """Measured on it: mean distance 1.94, 38 % next to a visible patch, largest 4.7 on average. It puts up to three of the
    blocks' patches back (the order of patches is rolled by 0 to 3), which the two stages here leave out."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(1000):
        blocks = ddae.block_mask((14, 14), 120, 120).ravel()
        order = np.roll(np.argsort(blocks - rng.random(196)), rng.integers(4))  # patches outside blocks first
        mask = np.ones((14, 14), bool)
        mask.ravel()[order[:49]] = False
        distance = ddae.distance_map(mask).numpy()[mask.ravel()]
        rows.append((distance.mean(), (distance == 1).mean(), distance.max()))
    assert np.mean(rows, axis=0) == pytest.approx([1.94, 0.38, 4.7], rel=0.02)


def test_two_stages_lie_between_blocks_and_patches():
    means = []
    for kind in ("block", "two_stage", "random"):
        draw = ddae.mask_source(Config(mask=kind))
        distance = torch.stack([draw() for _ in range(1000)])
        means.append(distance[distance > 0].mean().item())
    assert means == pytest.approx([2.65, 2.1, 1.25], rel=0.03)


def test_masks_depend_on_seed_epoch_and_image_alone():
    source, draw = common.Shapes((32, 32), 3, n=5), ddae.mask_source(Config(model="nano", img_size=(32, 32), patch_size=4))
    views = [common.Views(source, common.RandomResizedCrop((32, 32)), seed, 2, draw) for seed in (0, 0, 1)]
    views[1].__getitem__((3, 4))  # what was drawn before does not matter
    first, again, other = (view[2, 1]["draw"] for view in views)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, views[0][3, 1]["draw"]) and not torch.equal(first, views[0][2, 2]["draw"])


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (10, 14)])
def test_distance_map_against_a_search(grid):
    for kind in (0, 1):
        n_masked = int(math.prod(grid) * 0.75)
        mask = ddae.block_mask(grid, n_masked, kind * n_masked)
        distance = ddae.distance_map(mask).reshape(grid)
        visible = [(i, j) for i in range(grid[0]) for j in range(grid[1]) if not mask[i, j]]
        for i in range(grid[0]):
            for j in range(grid[1]):
                assert distance[i, j].item() == pytest.approx(min(math.dist((i, j), place) for place in visible), rel=1e-6)
                assert (distance[i, j] >= 1) == mask[i, j]


# ---- eq. (2)

TABLE = {  # rescaled weights at these distances, worked out by hand
    -0.5: (1, 0.853, 0.746, 0.718, 0.655, 0.607, 0.575),
    -1.0: (1, 0.746, 0.607, 0.575, 0.513, 0.472, 0.449),
    0.5: (0.291, 0.351, 0.440, 0.477, 0.604, 0.790, 1),
}
DISTANCES = (1, math.sqrt(2), 2, math.sqrt(5), 3, 4, 5)


@pytest.mark.parametrize("beta", TABLE)
def test_weights_against_the_table_at_three_decimals(beta):
    distance = torch.tensor([[0.0, *DISTANCES, 0.0]])
    weight = ddae.rescale(ddae.dynamic_weights(distance, torch.tensor([beta])))[0, 0]
    assert [round(value, 3) for value in weight[1:-1].tolist()] == pytest.approx(TABLE[beta], abs=1e-9)
    assert weight[0] == weight[-1] == 0


def test_eq2_against_a_loop_in_float64():
    model = build(beta_init=(-1.3, -0.5, 0.0, 1.1))
    _, distance = batch(model, 2)
    h = ddae.dynamic_weights(distance, model.beta)
    for i, beta in enumerate(model.cfg.beta_init):
        for b in range(2):
            powers = [math.exp(d**beta) if d > 0 else 0 for d in distance[b].tolist()]
            expected = torch.tensor([power / math.fsum(powers) for power in powers])
            torch.testing.assert_close(h[i, b].detach(), expected, rtol=1e-5, atol=0)
    assert torch.equal(h[2], (distance > 0) / (distance > 0).sum(1, keepdim=True).float())  # beta 0: uniform
    assert h.dtype == torch.float32 and (ddae.rescale(h).amax(-1) == 1).all()


@pytest.mark.parametrize("beta", [-30.0, -5.0, 5.0, 30.0])
def test_extreme_beta_neither_overflows_nor_gives_nan(beta):
    distance, beta = torch.tensor([[0, 1, 2, 5, 11.0], [0, 0, 0, 0, 1]]), torch.tensor([beta], requires_grad=True)
    h = ddae.dynamic_weights(distance, beta)
    loss = (ddae.rescale(h) * torch.rand(2, 5)).sum() + ddae.regulariser(h, distance > 0)
    loss.backward()
    assert torch.isfinite(h).all() and torch.isfinite(beta.grad).all() and h.sum().item() == pytest.approx(2)


def test_gradient_of_beta_is_that_of_weights_over_a_fixed_maximum():
    _, distance = batch(build(), 2)
    distance, error = distance.double(), torch.rand(2, 64, dtype=torch.float64)
    beta = torch.tensor([-0.5, 0.3], dtype=torch.float64, requires_grad=True)

    def h_of(beta):  # the slow version again, in float64 throughout
        powers = torch.where(distance > 0, distance.clamp(min=1).pow(beta.view(-1, 1, 1)).exp(), 0)
        return powers / powers.sum(-1, keepdim=True)

    def loss(beta, maximum):
        h = h_of(beta)
        return (h / maximum * error).sum() + 0.5 * h.norm(dim=-1).sum()

    maximum, step = h_of(beta).detach().amax(-1, keepdim=True), 1e-5
    differences = [(loss(beta + step * axis, maximum) - loss(beta - step * axis, maximum)).item() / (2 * step)
                   for axis in torch.eye(2, dtype=torch.float64)]
    single = beta.detach().float().requires_grad_()
    h = ddae.dynamic_weights(distance.float(), single)
    ((ddae.rescale(h) * error.float()).sum() + 0.5 * h.norm(dim=-1).sum()).backward()
    assert single.grad.tolist() == pytest.approx(differences, rel=2e-4)


# ---- eqs. (3), (5), (6)


def test_weighted_mse_against_a_loop():
    K, B, L, values = 3, 2, 16, 12
    pred, target, mask = torch.randn(K, B, L, values), torch.randn(B, L, values), (torch.rand(B, L) < 0.6).float()
    weight = torch.rand(K, B, L) * mask
    expected = [sum(weight[i, b, j] * ((pred[i, b, j] - target[b, j]) ** 2).mean() for b in range(B) for j in range(L))
                / mask.sum() for i in range(K)]
    torch.testing.assert_close(ddae.weighted_mse(pred, target, weight, mask), torch.stack(expected))


def test_regulariser_against_a_loop_and_smallest_when_uniform():
    _, distance = batch(build(), 2)
    mask, values = (distance > 0).float(), []
    for beta in (-2.0, 0.0, 1.0):
        h = ddae.dynamic_weights(distance, torch.full((4,), beta))
        norms = [[math.sqrt(sum(x * x for x in h[i, b].tolist())) for b in range(2)] for i in range(4)]
        literal = sum(sum(row) / 2 for row in norms)
        assert ddae.regulariser(h, mask, literal=True).item() == pytest.approx(literal, rel=1e-5)
        assert ddae.regulariser(h, mask).item() == pytest.approx(literal * math.sqrt(48), rel=1e-5)
        values.append(literal)
    assert values[1] == pytest.approx(4 / math.sqrt(48)) and min(values) == values[1]


def test_pixel_targets():
    images = torch.randn(2, 5, 16, 16) * 4 + 1
    patch = images[1, :, 8:, :8]  # third patch
    mean, var = patch.mean((1, 2), keepdim=True), patch.var((1, 2), correction=0, keepdim=True)
    expected = ((patch - mean) / (var + 1e-5).sqrt()).permute(1, 2, 0).flatten()
    torch.testing.assert_close(ddae.pixel_target(images, 8, "channel")[1, 2], expected, rtol=1e-5, atol=1e-5)
    for name in ("mae", "raw"):
        torch.testing.assert_close(ddae.pixel_target(images, 8, name), mae_mff.patch_target(images, 8, name == "mae"))


@pytest.mark.parametrize("flags", [{"dynamic": False}, {"beta_init": (0.0,), "learn_beta": False, "reg": "none"}])
def test_uniform_weights_give_exactly_maes_loss(flags):
    model = build(num_levels=1, distill=False, decoder="mae", decoder_depth=2, **flags)
    images, distance = batch(model)
    loss, terms = model(images, distance)
    pred = model.predict(images, distance)
    assert loss == mae_mff.masked_mse(pred, mae_mff.patch_target(images, 4), (distance > 0).float()) == terms["mse"]


def test_its_mae_is_mae():
    """Same weights, same hidden patches: DDAE without its parts has the loss of mae_mff.py."""
    ours = build(num_levels=1, distill=False, dynamic=False, decoder="mae", decoder_depth=2)
    cfg = mae_mff.Config(model="nano", img_size=(32, 32), patch_size=4, fuse_layers=(3,), decoder_depth=2)
    mae = mae_mff.MaskedAutoencoder(cfg, (0.5,) * 3, (0.5,) * 3)
    names = {"pixel_decoder.embed": "decoder_embed", "pixel_decoder.pred": "decoder_pred", "pixel_decoder.norm": "decoder_norm",
             "pixel_decoder.blocks": "decoder_blocks", "pixel_decoder.pos_embed": "decoder_pos_embed",
             "pixel_decoder.mask_token": "mask_token"}

    def mae_name(name):
        return next((name.replace(old, new) for old, new in names.items() if name.startswith(old)), name)

    mae.load_state_dict({mae_name(name): value for name, value in ours.state_dict().items()})
    images, distance = batch(ours)
    torch.testing.assert_close(ours(images, distance)[0], mae(images, (distance > 0).float())[0])


def test_the_whole_loss_against_its_parts_written_out():
    model = build(beta_init=(-0.9, -0.5, 0.1, 0.4))
    model.teacher.load_state_dict(build().trunk_state())  # a teacher that differs
    images, distance = batch(model)
    mask, expected = (distance > 0).float(), 0
    visible = torch.stack([(row == 0).nonzero()[:, 0] for row in distance])
    hidden = torch.stack([row.nonzero()[:, 0] for row in distance])
    restore = torch.cat([visible, hidden], 1).argsort(1)
    x = model.embed(images)
    x = model.prepend_cls(torch.stack([x[b, visible[b]] for b in range(3)]))
    full = model.teacher.prepend_cls(model.teacher.embed(images))
    pixels = common.patchify(images, 4).reshape(3, 64, 16, 3)
    pixels = ((pixels - pixels.mean(2, keepdim=True)) / (pixels.var(2, correction=0, keepdim=True) + 1e-5).sqrt()).flatten(2)
    for i in range(4):
        x, full = model.blocks[i](x), model.teacher.blocks[i](full)
        h = ddae.dynamic_weights(distance, model.beta[i : i + 1])[0]
        w = h / h.amax(1, keepdim=True).detach()
        error = ((model.pixel_decoder(model.norm(x), restore) - pixels) ** 2).mean(-1)
        feature = F.layer_norm(model.feature_decoder(model.norm(x), restore), (128,), eps=1e-6)
        error = error + ((feature - F.layer_norm(full[:, 1:], (128,), eps=1e-6)) ** 2).mean(-1)  # level to level
        expected = expected + (1.0 if i == 3 else 0.75) * (w * error).sum() / mask.sum() + 0.5 * 48**0.5 * h.norm(dim=1).mean()
    loss, terms = model(images, distance)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert loss == terms["loss"] == terms["eq3_pixel"] + terms["eq5_distill"] + terms["eq6_reg"]
    gradients = [torch.autograd.grad(value, model.beta)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=0)
    assert [terms[f"beta/{i}"] for i in (1, 2, 3, 4)] == model.beta.tolist()


# ---- teacher


def test_teacher_follows_the_closed_form_of_its_average():
    model, momentum, x, seen = build(), 0.9, "blocks.2.mlp.fc1.weight", []
    start = model.get_parameter(x).detach().clone()
    for _ in range(5):
        with torch.no_grad():
            model.get_parameter(x).add_(torch.randn_like(start))
        seen.append(model.get_parameter(x).detach().clone())
        model.update_teacher(momentum)
    expected = momentum**5 * start + sum(momentum ** (4 - k) * (1 - momentum) * value for k, value in enumerate(seen))
    torch.testing.assert_close(model.teacher.get_parameter(x), expected)
    model.update_teacher(0.0)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in model.teacher.named_parameters())


def test_momentum_schedule():
    at = [ddae.momentum_at(epoch, (0.999, 0.9999, 0.99999)) for epoch in (0, 50, 100, 250, 400, 799.5)]
    assert at == pytest.approx([0.999, 0.99945, 0.9999, 0.999945, 0.99999, 0.99999], abs=1e-12)


def test_teacher_sees_the_whole_image_and_gets_no_gradient():
    model = build()
    images, distance = batch(model, 2)
    target = model.feature_target(images)
    assert target.shape == (4, 2, 64, 128) and not target.requires_grad
    plain = common.ViT("nano", (32, 32), 4)
    plain.load_state_dict(model.teacher.state_dict())
    torch.testing.assert_close(plain.norm(target[-1]), plain(images)[:, 1:])  # its last level is a plain ViT's, before the norm
    model(images, distance)[0].backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    hidden = distance[0].argmax()
    changed = common.patchify(images, 4)
    changed[0, hidden] += 1
    changed = common.unpatchify(changed, 4, (8, 8))
    assert not torch.equal(model.feature_target(changed), target)
    assert torch.equal(model.encode(changed, distance)[0], model.encode(images, distance)[0])  # the student does not see it


def test_teacher_moves_after_every_update_but_a_skipped_one():
    cfg = Config(demo=True, amp="off", **(ddae.DEMO | {"batch_size": 4}))
    run, plan, student = common.Run(cfg, "ddae"), common.make_plan(40, cfg, 1), DeepDynamicAutoEncoder(cfg)
    optimizer = common.adamw(common.parameter_groups(student, 0.05), cfg.betas)
    common.set_lr(optimizer, 1e-3)
    scaler, to_images = torch.amp.GradScaler("cpu", enabled=False), common.Normalise((0.5,) * 3, (0.25,) * 3, run.device)
    _, distance = batch(student, 4)
    for value, skipped in ((1.0, ""), (math.nan, "nonfinite"), (1.0, "")):
        before = {name: p.clone() for name, p in student.teacher.named_parameters()}
        data = {"image": torch.rand(4, 3, 32, 32) * value, "flip": torch.zeros(4).bool(), "draw": distance}
        batches = iter([data | {"index": torch.arange(4)}])
        stats, _ = ddae.train_step(student, student, batches, to_images, optimizer, scaler, 0, cfg, plan, run)
        assert stats["skipped"] == skipped
        for name, p in student.teacher.named_parameters():
            expected = before[name] if skipped else 0.99 * before[name] + 0.01 * student.get_parameter(name)
            torch.testing.assert_close(p, expected)


# ---- ablations


@pytest.mark.parametrize("values, levels", [({}, [3, 6, 9, 12]), ({"num_levels": 1}, [12]), ({"num_levels": 2}, [6, 12]),
                                            ({"num_levels": 6}, [2, 4, 6, 8, 10, 12]), ({"model": "large"}, [6, 12, 18, 24])])
def test_levels_are_those_of_table_6(values, levels):
    with torch.device("meta"):
        assert DeepDynamicAutoEncoder(Config(**({"model": "small"} | values))).levels == levels


@pytest.mark.parametrize("flags", [
    {}, {"distill": False}, {"dynamic": False}, {"num_levels": 1}, {"decoder": "mae", "decoder_depth": 2}, {"dds": "pixel"},
    {"dds": "feature"}, {"dds": "none"}, {"learn_beta": False}, {"reg": "literal"}, {"reg": "none"}, {"target": "raw"},
    {"feature_norm": "none"}, {"mask": "random"}, {"mask": "block"}, {"img_size": (32, 64), "in_chans": 1}, {"mask_ratio": 0.4},
], ids=str)
def test_every_ablation_trains_every_parameter_it_has(flags):
    model = build(**flags)
    loss, terms = model(*batch(model))
    loss.backward()
    for name, p in model.named_parameters():
        frozen = name.startswith("teacher.") or name.endswith("pos_embed") or (name == "beta" and not model.cfg.learn_beta)
        assert (p.grad is None) if frozen else p.grad.any(), name
    dynamic = model.cfg.dynamic and model.cfg.dds != "none"
    assert ("beta/4" in terms) == hasattr(model, "beta") == dynamic and ("eq5_distill" in terms) == model.cfg.distill
    assert ("eq6_reg" in terms) == (dynamic and model.cfg.reg != "none")


def test_dds_says_which_loss_is_deep_and_dynamic():
    torch.manual_seed(0)
    model = build(beta_init=(-2.0,))
    data, terms = batch(model), {}
    for dds in ("both", "pixel", "feature", "none"):
        model.cfg.dds = dds
        terms[dds] = model(*data)[1]
    assert terms["both"]["eq3_pixel"] == terms["pixel"]["eq3_pixel"] > terms["feature"]["eq3_pixel"] == terms["none"]["mse"]
    assert terms["both"]["eq5_distill"] == terms["feature"]["eq5_distill"] > terms["pixel"]["eq5_distill"]
    assert terms["pixel"]["eq5_distill"] == terms["none"]["eq5_distill"]
    model.beta.data.zero_()  # uniform: only the depth is left of what --dds changes
    model.cfg.dds, model.level_weight = "both", torch.tensor([0.0, 0.0, 0.0, 1.0])
    uniform = model(*data)[1]
    assert uniform["eq5_distill"].item() == pytest.approx(terms["none"]["eq5_distill"].item(), rel=1e-6)


def test_literal_readings():
    torch.manual_seed(0)
    model = build()
    data, terms = batch(model), {}
    for name, value in (("reg", "sqrt"), ("reg", "literal"), ("feature_norm", "none")):
        setattr(model.cfg, name, value)
        terms[value] = model(*data)[1]
    assert terms["sqrt"]["eq6_reg"].item() == pytest.approx(48**0.5 * terms["literal"]["eq6_reg"].item(), rel=1e-5)
    weight, mask = model.weights(data[1])[1], (data[1] > 0).float()
    latent, ids_restore = model.encode(*data)
    error = model.decode(model.feature_decoder, latent, ids_restore) - model.feature_target(data[0])
    expected = sum(factor * (error[i].square().mean(-1) * weight[i]).sum() / mask.sum()
                   for i, factor in enumerate((0.75, 0.75, 0.75, 1.0)))
    torch.testing.assert_close(terms["none"]["eq5_distill"], expected.detach())


def test_paper_settings():
    cfg = Config()
    assert (cfg.model, cfg.epochs, cfg.batch_size, cfg.base_lr, cfg.weight_decay, cfg.num_levels, cfg.beta_init) == (
        "base", 800, 4096, 1.5e-4, 0.05, 4, (-0.5,) * 4)
    assert (cfg.decoder_embed_dim, cfg.decoder_depth, cfg.decoder_num_heads, cfg.mask_ratio) == (512, 2, 16, 0.75)
    assert (cfg.warmup_epochs, Config(epochs=100.0).warmup_epochs) == (40, 20)
    assert (cfg.momentum, cfg.betas, cfg.mask, cfg.min_lr) == ((0.999, 0.9999, 0.99999), (0.9, 0.95), "two_stage", 0)
    assert Config(decoder="mae").decoder_depth == 8 and Config(decoder="mae").target == "mae"


@pytest.mark.parametrize("values, words", [
    ({"num_levels": 5}, "--num_levels 5 does not divide the 12 blocks"), ({"mask_ratio": 0.001}, "hides none or all"),
    ({"beta_init": (0.0, 1.0)}, "--beta_init has 2 values"), ({"distill": False, "dds": "feature"}, "--dds feature needs"),
    ({"dynamic": False, "beta_init": (0.0,)}, "--beta_init has no use"), ({"decoder_num_heads": 7}, "--decoder_num_heads 7"),
])
def test_settings_that_cannot_be_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Config(**values)


# ---- the command


def test_demo_says_what_it_learns_and_what_to_type_next(tmp_path):
    output = run_command(["ddae.py", "--demo", "--epochs", 0.2], tmp_path)
    run = tmp_path / "runs/ddae"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["train/mse"] < 0.8 * lines[0]["train/mse"] and {"train/beta/2", "train/beta/4"} <= lines[-1].keys()
    assert "python finetune.py --demo --mode linear --weights runs/ddae/encoder.pth" in output
    common.ViT("nano", (32, 32), 4).load_state_dict(torch.load(run / "encoder.pth", weights_only=True)["model"])  # strict
    with Image.open(run / "pictures/epoch_0001.png") as picture:
        assert picture.width > 7 * 128 and picture.height > 8 * 128


def test_its_files_go_into_finetune_and_init(small_npz, tmp_path):
    command = ["ddae.py", "--demo", "--amp", "off", "--workers", 0, "--data", small_npz, "--batch_size", 50, "--epochs", 0.4]
    run_script([*command, "--out", "run"], tmp_path)
    results = []
    for name in ("last.pth", "encoder.pth"):
        run_script(["finetune.py", "--mode", "knn", "--amp", "off", "--weights", f"run/{name}", "--data", small_npz,
                    "--out", name], tmp_path)
        results.append((tmp_path / name / "log.jsonl").read_text())
        run_script([*command, "--init", f"run/{name}", "--out", f"again_{name}"], tmp_path)
    assert results[0] == results[1]
    output = run_script([*command, "--init", "run/last.pth", "--no-distill", "--beta_init", 0.3, "--no-learn_beta",
                         "--out", "less"], tmp_path)
    assert "ignored: beta, feature_decoder, teacher" in output
    assert torch.load(tmp_path / "less/last.pth", weights_only=True)["model"]["beta"].tolist() == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("flags", [{}, {"in_chans": 1, "img_size": (32, 64)}, {"dynamic": False, "target": "channel"}], ids=str)
def test_pictures_of_any_shape(flags, tmp_path):
    model = build(**flags)
    images, distance = batch(model, 2)
    to_images = common.Normalise((0.5,) * len(images[0]), (0.25,) * len(images[0]), torch.device("cpu"))
    data = {"image": torch.rand_like(images), "flip": torch.zeros(2).bool(), "draw": distance}
    ddae.draw_pictures(tmp_path / "x.png", model, data, to_images)
    with Image.open(tmp_path / "x.png") as picture:  # nine columns, two rows
        assert picture.width == 9 * 132 and picture.height > 2 * model.cfg.img_size[0] * 128 // max(model.cfg.img_size)
