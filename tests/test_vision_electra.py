"""vision_electra.py: losses against loops, which network learns from which, noise, composites, both starts, the watch."""

import argparse
import json
import math
import re
import shutil
import signal
import types

import pytest
import torch
from conftest import ROOT, run_command, run_script, sabotaged
from PIL import Image
from torch.nn import functional as F
from torture import log

import common
import mae_mff
import vision_electra
from vision_electra import Config, VisionElectra, adversarial_loss, discriminator_loss

NANO = {"model": "nano", "img_size": (32, 32), "patch_size": 4}
NAMES = ("generator", "discriminator")


def build(n=3, **values):
    """A model whose discriminator has opinions, images, the numbers that masks are drawn from."""
    cfg = Config(**(NANO | values))
    torch.manual_seed(0)
    model = VisionElectra(cfg)
    for head in model.discriminator.heads.values():
        head.weight.data.normal_(0, 0.3)
        head.bias.data.normal_(0, 0.3)
    return model, torch.randn(n, cfg.in_chans, *cfg.img_size), torch.rand(n, math.prod(model.discriminator.grid))


def run_losses(model, images, draw, seed=7):
    """L_rec, verdicts on x and x^ (with all their gradients), generated: the forward pass in its parts."""
    torch.manual_seed(seed)
    pred, mask, *_ = model.generate(images, draw)
    composite, generated = model.compose(images, pred, mask)
    reconstruction = vision_electra.masked_mse(pred, common.patchify(images, model.cfg.patch_size), mask)
    return reconstruction, composite, generated


def gradients(model, loss, retain=False):
    """{name: gradient or None}, from none."""
    model.zero_grad()
    loss.backward(retain_graph=retain)
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def of(name, values):
    return [value for key, value in values.items() if key.startswith(f"{name}.")]


def bce(logit, real):
    p = 1 / (1 + math.exp(-logit))
    return -math.log(p if real else 1 - p)


# ---- equations


@pytest.mark.parametrize("paste", [True, False])
def test_losses_and_accuracies_against_loops(paste):
    """The docstring's form of L_D and L_adv, verdict by verdict; the whole loss is L_rec + 0.2 L_adv + L_D."""
    model, images, draw = build(paste=paste)
    with torch.no_grad():
        torch.manual_seed(7)
        loss, terms = model(images, draw, 0.2)
        reconstruction, composite, generated = run_losses(model, images, draw)
        real, fake = ({level: s.tolist() for level, s in model.discriminator(x).items()} for x in (images, composite))
    _, _, mask = vision_electra.random_masking(draw, 0.75)
    mask = mask.tolist()
    assert generated.tolist() == (mask if paste else [[1.0] * 64] * 3)
    rows = zip(fake["patch"], generated.tolist(), strict=True)
    composites = [(s, m == 1) for verdicts, marks in rows for s, m in zip(verdicts, marks, strict=True)]  # every patch of them
    L_img = 0.5 * (sum(bce(s, True) for s in real["image"]) / 3 + sum(bce(s, False) for s in fake["image"]) / 3)
    on_x = [bce(s, True) for row in real["patch"] for s in row]
    L_pat = 0.5 * (sum(on_x) + sum(bce(s, not made) for s, made in composites)) / (3 * 64)
    at_made = [bce(s, True) for s, made in composites if made]
    L_adv = sum(bce(s, True) for s in fake["image"]) / 3 + sum(at_made) / len(at_made)
    assert terms["image_loss"].item() == pytest.approx(L_img, rel=1e-4)
    assert terms["patch_loss"].item() == pytest.approx(L_pat, rel=1e-4)
    assert terms["adversarial_loss"].item() == pytest.approx(L_adv, rel=1e-4)
    assert loss.item() == pytest.approx(reconstruction.item() + 0.2 * L_adv + L_img + L_pat, rel=1e-4)
    hits = {"image_accuracy_real": [s > 0 for s in real["image"]], "image_accuracy_fake": [s <= 0 for s in fake["image"]],
            "patch_accuracy_real": [s > 0 for s in [*sum(real["patch"], []), *(s for s, made in composites if not made)]],
            "patch_accuracy_fake": [s <= 0 for s, made in composites if made]}
    for name, right in hits.items():
        assert terms[name].item() == pytest.approx(sum(right) / len(right)), name
    assert len(hits["patch_accuracy_real"]) == (3 * (64 + 16) if paste else 3 * 64)


def test_reconstruction_loss_is_over_hidden_patches_only():
    model, images, draw = build()
    with torch.no_grad():
        reconstruction, composite, generated = run_losses(model, images, draw)
    target, made = common.patchify(images, 4), common.patchify(composite, 4)
    errors = [((made[b, j] - target[b, j]) ** 2).mean() for b in range(3) for j in range(64) if generated[b, j]]
    assert len(errors) == 3 * 48 and reconstruction.item() == pytest.approx(sum(errors).item() / len(errors), rel=1e-5)


def test_at_chance_each_level_costs_ln_2():
    zeros = {"image": torch.zeros(4), "patch": torch.zeros(4, 9)}
    generated = (torch.rand(4, 9) < 0.7).float()
    for loss in discriminator_loss(zeros, zeros, generated).values():
        assert loss.item() == pytest.approx(math.log(2))
    assert adversarial_loss(zeros, generated).item() == pytest.approx(2 * math.log(2))


def test_perfect_and_inverted_verdicts():
    generated = torch.tensor([[1.0, 0.0, 1.0]])
    real, fake = ({"image": torch.tensor([s]), "patch": p[None]} for s, p in (
        (40.0, torch.full((3,), 40.0)), (-40.0, torch.tensor([-40.0, 40.0, -40.0]))))
    assert all(loss < 1e-9 for loss in discriminator_loss(real, fake, generated).values())
    assert adversarial_loss(fake, generated).item() == pytest.approx(80)
    assert all(value == 1 for value in vision_electra.accuracies(real, fake, generated).values())
    swapped = {level: -verdict for level, verdict in fake.items()}
    assert adversarial_loss(swapped, generated) < 1e-9  # the visible patch does not count
    assert vision_electra.accuracies(real, swapped, generated)["patch_accuracy_fake"] == 0


# ---- who learns from what


def test_discriminator_loss_leaves_the_generator_alone():
    model, images, draw = build()
    torch.manual_seed(7)
    loss, _ = model(images, draw, 0.0)
    whole = gradients(model, loss)
    reconstruction, composite, generated = run_losses(model, images, draw)
    alone = gradients(model, reconstruction, retain=True)
    assert all(torch.equal(a, b) for a, b in zip(of("generator", whole), of("generator", alone), strict=True))
    real, fake = (model.discriminator(x) for x in (images, composite.detach()))
    alone = gradients(model, sum(discriminator_loss(real, fake, generated).values()))
    assert all(gradient is None for gradient in of("generator", alone))
    for a, b in zip(of("discriminator", whole), of("discriminator", alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_adversarial_loss_leaves_the_discriminator_alone_and_reaches_the_generator():
    """The whole gradient minus that without L_adv: nothing in the discriminator, 0.2 dL_adv in the generator."""
    model, images, draw = build()
    by_weight = []
    for weight in (0.0, 0.2):
        torch.manual_seed(7)
        by_weight.append(gradients(model, model(images, draw, weight)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*(of("discriminator", g) for g in by_weight), strict=True))
    _, composite, generated = run_losses(model, images, draw)
    alone = gradients(model, adversarial_loss(model.discriminator(composite), generated))  # here the discriminator has some too
    assert any(gradient.abs().max() > 0 for gradient in of("discriminator", alone))
    for name, without, whole, expected in zip((name for name in alone if name.startswith("generator.")), *(
            of("generator", g) for g in (*by_weight, alone)), strict=True):
        torch.testing.assert_close(whole - without, 0.2 * expected, rtol=2e-3, atol=2e-6, msg=name)
        assert expected.abs().max() > 0, name


def test_one_backward_pass_equals_two_separate_ones():
    """L_rec + 0.2 L_adv for the generator, the discriminator frozen by hand; then L_D on detached composites."""
    model, images, draw = build()
    torch.manual_seed(7)
    joint = gradients(model, model(images, draw, 0.2)[0])
    model.zero_grad()
    model.discriminator.requires_grad_(False)
    reconstruction, composite, generated = run_losses(model, images, draw)
    (reconstruction + 0.2 * adversarial_loss(model.discriminator(composite), generated)).backward()
    separate = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all(name.startswith("generator.") for name in separate)
    model.discriminator.requires_grad_(True)
    model.discriminator.pos_embed.requires_grad_(False)
    model.zero_grad()
    real, fake = (model.discriminator(x) for x in (images, composite.detach()))
    sum(discriminator_loss(real, fake, generated).values()).backward()
    separate |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert separate.keys() == joint.keys()
    for name, gradient in separate.items():
        torch.testing.assert_close(joint[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_the_generator_moves_towards_being_taken_for_real():
    """Some steps against a fixed discriminator, L_adv alone: its verdict on composites rises."""
    model, images, draw = build()
    model.discriminator.requires_grad_(False)
    optimizer = torch.optim.Adam(model.generator.parameters(), 1e-3)
    values = []
    for _ in range(8):
        _, composite, generated = run_losses(model, images, draw)
        values.append(adversarial_loss(model.discriminator(composite), generated))
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[-1] < values[0]


@pytest.mark.parametrize("weight", [0.0, 0.2])  # during the generator's warm-up and after it
@pytest.mark.parametrize("values", [{}, {"levels": "image"}, {"levels": "patch"}, {"paste": False}, {"noise": 0.0},
                                    {"in_chans": 1, "img_size": (32, 64)}, {"mask_ratio": 0.95}], ids=str)
def test_every_parameter_receives_a_gradient(values, weight):
    model, images, draw = build(**values)
    loss, terms = model(images, draw, weight)
    found = gradients(model, loss)
    assert [name for name, gradient in found.items() if gradient is None] == []
    assert all(torch.isfinite(value) and not value.requires_grad for value in terms.values())
    assert {name.removeprefix("discriminator.heads.").split(".")[0] for name in found if ".heads." in name} == set(
        vision_electra.LEVELS[model.cfg.levels])


@pytest.mark.parametrize("level", ["image", "patch"])
def test_one_level_alone_is_that_part_of_both(level):
    """The same weights with one head less: L_D and L_adv of that level, and nothing of the other."""
    both, images, draw = build()
    one, *_ = build(levels=level)
    one.load_state_dict({name: value for name, value in both.state_dict().items() if "heads." not in name or level in name})
    results = []
    for model in (both, one):
        torch.manual_seed(7)
        results.append(model(images, draw, 0.2)[1])
    other = {"image": "patch", "patch": "image"}[level]
    assert results[1].keys() == {name for name in results[0] if not name.startswith(other)}
    torch.testing.assert_close(results[1][f"{level}_loss"], results[0][f"{level}_loss"])
    _, composite, generated = run_losses(both, images, draw)
    verdict = both.discriminator(composite)
    torch.testing.assert_close(results[1]["adversarial_loss"], adversarial_loss({level: verdict[level]}, generated))
    torch.testing.assert_close(results[0]["adversarial_loss"], sum(
        adversarial_loss({name: verdict[name]}, generated) for name in ("image", "patch")))


# ---- masks, noise, composites


def test_composite_is_the_image_where_visible_bit_for_bit():
    model, images, draw = build()
    pred, mask, *_ = model.generate(images, draw)
    composite, generated = model.compose(images, pred, mask)
    assert torch.equal(generated, mask) and (mask.sum(1) == 48).all()
    patches, original, shown = (common.patchify(x, 4) for x in (composite, images, common.unpatchify(pred, 4, (8, 8))))
    assert torch.equal(patches[mask == 0], original[mask == 0])
    assert torch.equal(patches[mask == 1], pred[mask == 1]) and torch.equal(shown, pred)
    whole, everywhere = build(paste=False)[0].compose(images, pred, mask)
    assert torch.equal(whole, common.unpatchify(pred, 4, (8, 8))) and everywhere.min() == 1


def test_visible_patches_have_the_smallest_numbers():
    draw = torch.rand(5, 64)
    ids_keep, ids_restore, mask = vision_electra.random_masking(draw, 0.75)
    assert torch.equal(torch.cat([ids_keep.sort(1).values]), draw.topk(16, largest=False).indices.sort(1).values)
    assert (mask.gather(1, ids_keep) == 0).all() and (mask.sum(1) == 48).all()
    assert torch.equal(ids_restore.argsort(1)[:, :16], ids_keep)


def test_noise_changes_hidden_patches_only_and_off_it_is_deterministic():
    for noise, same in ((0.0, True), (0.1, False)):
        model, images, draw = build(noise=noise)
        composites, distance = [], []
        for seed in (1, 2):
            torch.manual_seed(seed)
            pred, mask, *source = model.generate(images, draw)
            composites.append(common.patchify(model.compose(images, pred, mask)[0], 4))
            distance.append(model.diversity(pred, mask, *source).item())
        assert torch.equal(*composites) == same
        assert torch.equal(composites[0][mask == 0], composites[1][mask == 0])
        assert (distance == [0, 0]) == same
        assert all((composites[0][b][mask[b] == 1] != composites[1][b][mask[b] == 1]).any() for b in range(3)) != same


def test_noise_has_its_deviation_on_patch_tokens_and_none_on_the_class_token():
    latent = torch.randn(50, 17, 128)
    torch.manual_seed(3)
    noise = vision_electra.add_noise(latent, 0.1) - latent
    assert torch.equal(noise[:, 0], torch.zeros(50, 128))
    assert noise[:, 1:].std().item() == pytest.approx(0.1, rel=0.01) and abs(noise[:, 1:].mean().item()) < 1e-3
    assert vision_electra.add_noise(latent, 0.0) is latent


def test_diversity_is_the_distance_between_two_draws():
    """On the first eighth of the images: root mean square over hidden patches, the second draw after the first."""
    model, images, draw = build(n=16)
    with torch.no_grad():
        torch.manual_seed(5)
        pred, mask, *source = model.generate(images, draw)
        diversity = model.diversity(pred, mask, *source)
        ids_keep, ids_restore, _ = vision_electra.random_masking(draw, 0.75)
        latent = model.generator.encode(images, ids_keep)
        torch.manual_seed(5)
        torch.randn_like(latent[:, 1:])
        other = model.generator.decode(vision_electra.add_noise(latent[:2], 0.1), ids_restore[:2])
    squares = [((other[b, j] - pred[b, j]) ** 2).mean().item() for b in range(2) for j in range(64) if mask[b, j]]
    assert diversity.item() == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-4)


def test_without_noise_the_generator_is_mae_mff():
    """The same names, the same prediction as mae_mff.py --fuse_layers LAST --target raw, and the same loss."""
    mae = mae_mff.MaskedAutoencoder(mae_mff.Config(**NANO, fuse_layers=(3,), target="raw"), (0.5,) * 3, (0.5,) * 3)
    model, images, draw = build(noise=0.0)
    model.generator.load_state_dict(mae.state_dict())  # strict
    pred, mask, *_ = model.generate(images, draw)
    expected, expected_mask = mae.predict(images, draw)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(pred, expected)
    torch.testing.assert_close(model(images, draw, 0.2)[1]["reconstruction_loss"], mae(images, draw)[0].detach())


def test_decoders_are_those_of_mae_mff():
    assert vision_electra.DECODERS == mae_mff.DECODERS


# ---- settings


def test_supplements_settings():
    """0.1 and table 1; the learning rate by SimMIM's rule, our reading."""
    cfg = Config()
    assert (cfg.model, cfg.patch_size, cfg.mask_ratio, cfg.gan_weight) == ("base", 16, 0.75, 0.2)
    assert (cfg.levels, cfg.noise) == ("both", 0.1)
    assert (cfg.epochs, cfg.warmup_epochs, cfg.batch_size, cfg.base_lr) == (50, 10, 80 * 4, 2e-5)
    assert (cfg.weight_decay, cfg.betas, cfg.min_lr, cfg.clip_grad) == (0.05, (0.9, 0.999), 0, 0)
    assert cfg.adversarial == "nonsaturating" and cfg.paste and cfg.generator_warmup_epochs == 0
    assert "scale=(0.67, 1.0)" in (ROOT / "vision_electra.py").read_text()


def test_the_gan_weight_by_epoch():
    cfg = Config(generator_warmup_epochs=2.0)
    assert [vision_electra.gan_weight(epoch, cfg) for epoch in (0, 1.99, 2, 30)] == [0, 0, 0.2, 0.2]
    assert vision_electra.gan_weight(30, Config(adversarial="none")) == 0 and vision_electra.gan_weight(0, Config()) == 0.2


def test_base_size():
    """ViT-B twice, and MAE's decoder: 85.8 M + 25.9 M for the generator (with its fixed tables), one linear layer per head."""
    with torch.device("meta"):
        generator, discriminator = vision_electra.Generator(Config()), vision_electra.Discriminator(Config())
    count = [sum(p.numel() for p in network.parameters() if p.requires_grad) for network in (generator, discriminator)]
    vit = pytest.importorskip("timm").create_model("vit_base_patch16_224", num_classes=0, pretrained=False)
    trunk = sum(p.numel() for p in vit.parameters()) - vit.pos_embed.numel()
    block = 4 * 512 * 512 + 4 * 512 + 8 * 512 * 512 + 5 * 512 + 4 * 512
    decoder = 768 * 512 + 512 + 512 + 8 * block + 2 * 512 + 512 * 768 + 768
    assert count == [trunk + decoder, trunk + 2 * 769]


@pytest.mark.parametrize("values, words", [
    ({"mask_ratio": 0.999}, "hides none or all"), ({"mask_ratio": 0.0}, "hides none or all"),
    ({"noise": -1.0}, "must not be negative"), ({"gan_weight": -0.2}, "must not be negative"),
    ({"img_size": (30, 32)}, "not a multiple"), ({"epochs": 0.0}, "expected more than 0"),
])
def test_settings_that_cannot_be_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Config(**(NANO | values))


def test_bf16_is_close_to_float32():
    model, images, draw = build()
    losses = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(1)
        with common.autocast(torch.device("cpu"), dtype):
            losses.append(model(images, draw, 0.2))
    assert losses[1][0].item() == pytest.approx(losses[0][0].item(), rel=0.03)
    found = gradients(model, losses[1][0])  # autocast keeps casts of weights: none may be one made without a gradient
    exact = gradients(model, losses[0][0])
    for name, gradient in found.items():
        assert F.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.9, name


@pytest.mark.parametrize("levels", ["both", "patch", "image"])
def test_verdicts_stand_under_their_titles(levels, monkeypatch, tmp_path):
    """A discriminator that knows: composites are red in their hidden patches, originals blue."""
    cfg = Config(**NANO, levels=levels, data="shapes")
    model, shown = VisionElectra(cfg), {}
    batch = common.picture_batch(common.Shapes((32, 32), 3, n=16), cfg, lambda: torch.rand(64))
    to_images = common.Normalise((0.5,) * 3, (0.5,) * 3, torch.device("cpu"))
    images, mask = to_images(batch), vision_electra.random_masking(batch["draw"], 0.75)[2]

    def knows(x):
        original = torch.equal(x, images)
        patch = torch.full_like(mask, 9.0) if original else 9.0 - 18 * mask
        return {level: s for level, s in {"image": patch.min(1).values, "patch": patch}.items() if levels in (level, "both")}

    monkeypatch.setattr(model.discriminator, "forward", knows)
    monkeypatch.setattr(vision_electra, "save_pictures", lambda path, rows, titles, caption: shown.update(
        zip(titles, zip(*rows, strict=True), strict=True), caption=caption))
    vision_electra.draw_pictures("path", model, batch, to_images, cfg)
    torch.testing.assert_close(torch.stack(shown["original"]), to_images.undo(images))
    hidden = common.unpatchify(mask[..., None].expand(-1, -1, 16), 4, (8, 8))[:, 0]
    generated = hidden if levels != "image" else torch.ones_like(hidden)
    for title, made in (("verdict on original", torch.zeros_like(hidden)), ("verdict on composite", generated)):
        red, _, blue = torch.stack(shown[title]).unbind(1)
        assert torch.equal((red > blue).float(), made), title
    assert ("composites 0.00, originals 1.00" in shown["caption"]) == (levels != "patch")


def test_one_host_synchronisation_per_update_and_none_changes_anything_if_it_is_skipped(monkeypatch):
    """Two micro-batches; the numbers of the images are on the host anyway. Then a NaN: nothing moves."""
    model, images, draw = build(n=2)
    cfg, seen = model.cfg, []
    run = types.SimpleNamespace(device=torch.device("cpu"), amp_dtype=torch.bfloat16, seed=lambda *_: None, world_size=1,
                                stop_requested=False, bad_files=types.SimpleNamespace(new={}))
    optimizer = common.adamw(common.parameter_groups(model, cfg.weight_decay), cfg.betas)
    common.set_lr(optimizer, 1e-3)
    rest = (0.2, optimizer, torch.amp.GradScaler("cpu", enabled=False), 0, cfg, types.SimpleNamespace(accum_steps=2), run)
    batches = [{"draw": draw, "index": torch.arange(2)}] * 2
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, original=original, name=name: (
            seen.append(name) if self.dtype != torch.int64 else None, original(self, *args))[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stats, samples = vision_electra.train_step(model, iter(batches), lambda _: images, *rest)
    monkeypatch.undo()
    assert seen == ["tolist"] and samples == [0, 1, 0, 1] and stats["skipped"] == ""
    after = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.equal(before[name], after[name]) == name.endswith("pos_embed") for name in before)
    stats, _ = vision_electra.train_step(model, iter(batches), lambda _: images * math.nan, *rest)
    assert stats["skipped"] == "nonfinite"
    assert all(torch.equal(after[name], value) for name, value in model.state_dict().items())


# ---- the watch


def watched(accuracies, run=None, skipped="", **values):
    said, cfg = [], Config(**NANO, **values)
    run = run or types.SimpleNamespace(kept={})
    run.print = said.append
    for real, fake in accuracies:
        stats = {f"{level}_accuracy_{kind}": value for level in vision_electra.LEVELS[cfg.levels]
                 for kind, value in (("real", real), ("fake", fake))}
        vision_electra.watch_for_collapse(run, stats | {"skipped": skipped}, cfg)
    return said, run


@pytest.mark.parametrize("real, fake, words", [
    (0.5, 0.5, "at chance"), (1.0, 0.0, "at chance"), (1.0, 1.0, "at 1"), (0.8, 0.6, None), (0.99, 0.97, None),
    (0.7, 0.45, None),
])
def test_the_watch_warns_once_of_chance_and_of_1(real, fake, words):
    said, run = watched([(real, fake)] * 2000)
    assert len(said) == (2 if words else 0)  # one per level
    assert all(words in line for line in said)
    said, _ = watched([(real, fake)] * 300, run=run)  # as after a resume: `kept` is in the checkpoint
    assert said == []


def test_the_watch_is_patient_and_warns_again_after_a_recovery():
    assert watched([(0.5, 0.5)] * 100)[0] == []
    assert watched([(0.5, 0.5), (1.0, 1.0)] * 1000)[0] == []
    said, _ = watched([(0.5, 0.5)] * 500 + [(0.9, 0.8)] * 500 + [(0.5, 0.5)] * 500, levels="patch")
    assert len(said) == 2 and all("patch-level" in line and "--discriminator_init" in line for line in said)
    assert "--discriminator_init" not in watched([(0.5, 0.5)] * 500, discriminator_init="given")[0][0]


@pytest.mark.parametrize("level", [0.53, 0.995])
def test_the_watch_does_not_repeat_itself_on_a_threshold(level):
    noise = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.03
    said, _ = watched([(level + x, level + x) for x in noise.tolist()], levels="image")
    assert len(said) <= 1


def test_skipped_updates_do_not_reach_the_watch():
    assert watched([(math.nan, 1.0)], skipped="nonfinite")[1].kept == {}


# ---- the commands

QUICK = ["vision_electra.py", "--demo", "--amp", "off", "--workers", 0, "--batch_size", 50, "--epochs", 0.4, "--log_every", 1]
ALWAYS = ["--generator_warmup_epochs", 0]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def test_demo_starts_both_networks_from_its_own_mae(tmp_path, small_npz):
    output = run_command([*QUICK, *ALWAYS, "--data", small_npz, "--epochs", 1.2], tmp_path)
    run = tmp_path / "runs/vision_electra"
    assert "runs/vision_electra/warmstart/last.pth: 74/74 tensors loaded" in output
    assert "runs/vision_electra/warmstart/encoder.pth: 54/58 tensors loaded; missing: heads" in output
    assert "python finetune.py --demo --mode linear --weights runs/vision_electra/encoder.pth" in output
    config = json.loads((run / "warmstart/config.json").read_text())
    assert (config["script"], config["fuse_layers"], config["target"]) == ("mae_mff", [3], "raw")
    common.ViT("nano", (32, 32), 4).load_state_dict(weights(run / "encoder.pth"))  # strict
    whole = weights(run / "last.pth")
    assert all(torch.equal(whole[f"discriminator.{name}"], value) for name, value in weights(run / "encoder.pth").items())
    with Image.open(run / "pictures/epoch_0001.png") as picture:  # original, masked, generated, composite, two verdicts
        assert picture.width == 6 * 132 and picture.height > 8 * 132
        pixels = [picture.getpixel((4 * 132 + x, 16 + y)) for x in range(0, 128, 8) for y in range(0, 128, 8)]
    assert len(set(pixels)) > 1 and all(max(r, b) == 255 for r, _, b in pixels)
    line = log(run)[-1]
    norm = math.hypot(line["train/grad_norm_generator"], line["train/grad_norm_discriminator"])
    assert norm == pytest.approx(line["grad_norm"], rel=1e-4) and line["train/generator_diversity"] > 0
    for mode in ("knn", "linear"):
        probe = ["finetune.py", "--demo", "--mode", mode, "--epochs", 1, "--batch_size", 50, "--warmup_epochs", 0.1,
                 "--data", small_npz]
        results = [run_script([*probe, "--weights", run / name, "--out", f"{mode}_{name}"], tmp_path)
                   for name in ("last.pth", "encoder.pth")]
        top1 = [re.search(r"top-1 ([\d.]+) %", text).group(1) for text in results]
        assert top1[0] == top1[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_demo_stopped_in_its_mae_goes_on_there(small_npz, tmp_path, processes):
    command = [*QUICK, *ALWAYS, "--data", small_npz, "--save_minutes", 0, "--out"]
    run_script([*command, "whole"], tmp_path, processes)
    attack = sabotaged(tmp_path, [*command, "run"], "Run.end_update", "os.kill(os.getpid(), signal.SIGTERM)",
                       "self.method == 'mae_mff' and args[0] == 1")
    assert "stopped after step 2 of 3" in run_script(attack, tmp_path, processes)
    assert not (tmp_path / "run/last.pth").exists()
    # Killed between the two files of its first checkpoint: an exported encoder is nothing to go on from.
    attack = sabotaged(tmp_path, [*command, "run", "--resume"], "Run.export", "os.kill(os.getpid(), signal.SIGKILL)",
                       "self.method == 'vision_electra'")
    run_script(attack, tmp_path, processes, expect=-signal.SIGKILL)
    assert (tmp_path / "run/encoder.pth").exists() and not (tmp_path / "run/last.pth").exists()
    run_script([*command, "run", "--resume"], tmp_path, processes)
    a, b = weights(tmp_path / "whole/last.pth"), weights(tmp_path / "run/last.pth")
    assert all(torch.equal(a[name], b[name]) for name in a)
    shutil.rmtree(tmp_path / "run/warmstart")  # it has served; a finished or stopped run does not need it again
    assert "resumed from run/last.pth" in run_script([*command, "run", "--resume"], tmp_path, processes)


@pytest.mark.parametrize("flags", [["--generator_warmup_epochs", 0.2], ["--levels", "patch", "--noise", 0], ["--no-paste"],
                                   ["--adversarial", "none", "--levels", "image"]], ids=str)
def test_two_processes_with_accumulation(small_npz, tmp_path, flags):
    """Every parameter gets a gradient, also in warm-up, or finish_update would raise; without noise two equal one."""
    mae = ["mae_mff.py", *QUICK[1:], "--fuse_layers", 3, "--target", "raw", "--data", small_npz, "--out", "mae"]
    run_script(mae, tmp_path)
    command = [*QUICK, *ALWAYS, "--data", small_npz, "--batch_size", 20, "--epochs", 0.4, *flags,
               "--generator_init", "mae/last.pth", "--discriminator_init", "mae/encoder.pth"]
    run_script([*command, "--micro_batch", 5, "--out", "two"], tmp_path, processes=2)
    lines = log(tmp_path / "two")
    assert len(lines) == 5 and lines[-1]["skipped_nonfinite"] == 0
    if "--noise" in flags:
        run_script([*command, "--out", "one"], tmp_path)
        for a, b in zip(lines, log(tmp_path / "one"), strict=True):
            assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)


def test_continual_start_from_every_sort_of_file(small_npz, tmp_path):
    """Our encoder.pth, last.pth, fine-tuned best.pth, MAE's and timm's names; the generator with and without a decoder."""
    timm = pytest.importorskip("timm")
    data = ["--data", small_npz]
    run_script(["mae_mff.py", *QUICK[1:], *data, "--fuse_layers", 3, "--target", "raw", "--out", "mae"], tmp_path)
    run_script(["finetune.py", "--demo", *data, "--weights", "mae/encoder.pth", "--batch_size", 50, "--epochs", 1,
                "--warmup_epochs", 0, "--amp", "off", "--out", "tuned"], tmp_path)
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=128, depth=4, num_heads=4, img_size=32, patch_size=4)
    torch.save(vit.state_dict(), tmp_path / "timm.pth")
    torch.save({"model": weights(tmp_path / "mae/last.pth")}, tmp_path / "official.pth")
    trunk = weights(tmp_path / "mae/encoder.pth")
    starts = {"mae/encoder.pth": trunk, "mae/last.pth": trunk, "official.pth": trunk, "timm.pth": vit.state_dict()}
    for i, (name, expected) in enumerate(starts.items()):
        cfg = Config(**NANO, discriminator_init=str(tmp_path / name), generator_init=None if i == 3 else str(tmp_path / name))
        model = VisionElectra(cfg)
        vision_electra.load_initial(model, cfg)
        state = model.state_dict()
        for network in NAMES[i == 3 :]:
            assert all(torch.equal(state[f"{network}.{key}"], expected[key]) for key in trunk if key != "pos_embed")
    command = [*QUICK, *data]
    for out, start, more in (("a", "mae/last.pth", []), ("b", "a/last.pth", ["--levels", "patch"]), ("c", "a/last.pth", [])):
        output = run_script([*command, "--generator_init", start, "--discriminator_init", start, "--out", out, *more], tmp_path)
        assert not (tmp_path / out / "warmstart").exists() and f"{start}: 74/74 tensors loaded" in output
        assert "which it does not say" not in output
        if out == "b":
            assert "a/last.pth: 56/56 tensors loaded; missing: none; unexpected: none; ignored: heads" in output
    assert "a/last.pth: 58/58 tensors loaded; missing: none" in output  # its own last.pth, for both networks, heads included
    output = run_script([*command, "--discriminator_init", "tuned/best.pth", "--out", "d"], tmp_path, expect=2)
    assert "is not for this model: 0 unexpected tensors, 6 missing, norm.bias for one" in output  # it has fc_norm in its place


@pytest.mark.parametrize("flags", [["--target", "mae", "--fuse_layers", 3], ["--target", "raw"]], ids=["normalised", "fused"])
def test_a_generator_of_another_kind_is_refused(small_npz, tmp_path, flags):
    run_script(["mae_mff.py", *QUICK[1:], "--data", small_npz, *flags, "--out", "mae"], tmp_path)
    output = run_script([*QUICK, "--data", small_npz, "--generator_init", "mae/last.pth", "--out", "no"], tmp_path, expect=2)
    assert "is no plain MAE of raw pixels" in output and output.count("\n") == 1 and not (tmp_path / "no").exists()


def test_files_from_elsewhere_are_read_for_what_they_say(tmp_path, capsys):
    """Official training checkpoints name their target in `args`; the released files do not; a decoder comes whole or not."""
    whole = vision_electra.Generator(Config(**NANO)).state_dict()

    def start(**content):
        torch.save(content, tmp_path / "file.pth")
        cfg = Config(**NANO, generator_init=str(tmp_path / "file.pth"))
        vision_electra.load_initial(VisionElectra(cfg), cfg)
        return capsys.readouterr().out

    assert "which it does not say" in start(model=whole) and "which it does not say" in start(model=whole, config=None)
    assert "which it does not say" not in start(model=whole, config={"target": "raw"})
    with pytest.raises(common.Refused, match="is no plain MAE"):
        start(model=whole, args=argparse.Namespace(norm_pix_loss=True))
    start(model=whole, args=argparse.Namespace(norm_pix_loss=False))
    with pytest.raises(common.Refused, match="missing"):
        start(model={name: value for name, value in whole.items() if "decoder_blocks" not in name})
    assert "54/74 tensors loaded" in start(model={k: v for k, v in whole.items() if "decoder" not in k and k != "mask_token"})


def test_the_demo_without_mae_mff_says_so(small_npz, tmp_path):
    for name in ("vision_electra.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    script = tmp_path / "vision_electra.py"
    (tmp_path / "blocked.py").write_text(f"""
import runpy, sys
sys.modules["mae_mff"] = None
runpy.run_path({str(script)!r}, run_name="__main__")
""")
    output = run_script([tmp_path / "blocked.py", *QUICK[1:], "--data", small_npz], tmp_path, expect=2)
    assert output.rstrip().endswith("put mae_mff.py beside this script, or give both --..._init FILE")
    assert not (tmp_path / "runs").exists()
    flags = ["--data", small_npz, "--model", "nano", "--img_size", 32, "--patch_size", 4]  # but for the demo it needs none
    run_script([tmp_path / "blocked.py", *QUICK[2:], *flags, "--out", "alone"], tmp_path)


def test_grey_rectangles(folder, tmp_path):
    run_script(["vision_electra.py", "--data", folder, "--in_chans", 1, "--img_size", "32,64", "--patch_size", 8,
                "--model", "nano", "--amp", "off", "--workers", 0, "--batch_size", 20, "--epochs", 1, "--pictures", 2,
                "--levels", "image", "--out", "grey"], tmp_path)
    common.ViT("nano", (32, 64), 8, 1).load_state_dict(weights(tmp_path / "grey/encoder.pth"))  # strict
    with Image.open(tmp_path / "grey/pictures/epoch_0001.png") as picture:
        assert picture.width == 6 * (2 * 64 + 4)
