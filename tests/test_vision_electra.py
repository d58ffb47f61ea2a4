"""vision_electra.py: losses against loops, who learns from what, noise, composites, starts, the watch."""

import argparse
import math
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import killed, losses, run_script, stopped
from torture import log, same

import beit
import common
import mae_mff
import swin
import vision_electra
from vision_electra import Config, VisionElectra, adversarial_loss, discriminator_loss

NANO = {"model": "nano", "img_size": (32, 32), "patch_size": 4}


def build(n=3, **values):
    """A model whose discriminator has opinions, images, the noise of their masks."""
    cfg = Config(**(NANO | values))
    torch.manual_seed(0)
    model = VisionElectra(cfg)
    for head in model.discriminator.heads.values():
        head.weight.data.normal_(0, 0.3)
        head.bias.data.normal_(0, 0.3)
    return model, torch.randn(n, cfg.in_chans, *cfg.img_size), torch.rand(n, math.prod(model.generator.grid))


def forward_in_parts(model, images, noise):
    """L_rec, x^ with its gradient, what of it is generated."""
    torch.manual_seed(7)
    pred, mask, _ = model.generate(images, noise)
    composite, generated = model.compose(images, pred, mask)
    return vision_electra.masked_mse(pred, common.patchify(images, 4), mask), composite, generated


def gradients(model, loss):
    """{name: gradient or None} of the trained parameters."""
    model.zero_grad()
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: None if p.grad is None else p.grad.clone() for name, p in trained.items()}


def bce(logit, real):
    p = 1 / (1 + math.exp(-logit))
    return -math.log(p if real else 1 - p)


# ---- equations


@pytest.mark.parametrize("paste", [True, False])
def test_losses_and_accuracies_against_loops(paste):
    """The docstring's form of all losses, verdict by verdict."""
    model, images, noise = build(paste=paste)
    with torch.no_grad():
        torch.manual_seed(7)
        loss, terms = model(images, noise, 0.2)
        _, composite, generated = forward_in_parts(model, images, noise)
        verdicts = model.discriminator(images), model.discriminator(composite)
        real, fake = ({level: s.tolist() for level, s in verdict.items()} for verdict in verdicts)
    hidden = vision_electra.random_masking(noise, 0.75)[2].tolist()
    assert generated["patch"].tolist() == (hidden if paste else [[1.0] * 64] * 3)
    squares = (common.patchify(composite, 4) - common.patchify(images, 4)).square().mean(-1).tolist()
    at_hidden = [squares[b][j] for b in range(3) for j in range(64) if hidden[b][j]]
    at_visible = [squares[b][j] for b in range(3) for j in range(64) if not hidden[b][j]]
    assert all((square == 0) == paste for square in at_visible)  # the original's, bit for bit
    marks = sum(generated["patch"].tolist(), [])
    composites = list(zip(sum(fake["patch"], []), marks, strict=True))
    originals, made = sum(real["patch"], []), [s for s, mark in composites if mark]
    visible = [s for s, mark in composites if not mark]
    L_rec = sum(at_hidden) / len(at_hidden)
    L_img = sum(bce(s, True) for s in real["image"]) / 6 + sum(bce(s, False) for s in fake["image"]) / 6
    L_pat = sum(bce(s, True) for s in originals) / 384 + sum(bce(s, not g) for s, g in composites) / 384
    L_adv = sum(bce(s, True) for s in fake["image"]) / 3 + sum(bce(s, True) for s in made) / len(made)
    right = {"image_accuracy_real": [s > 0 for s in real["image"]],
             "image_accuracy_fake": [s <= 0 for s in fake["image"]],
             "patch_accuracy_real": [s > 0 for s in originals + visible],
             "patch_accuracy_fake": [s <= 0 for s in made]}
    expected = {name: sum(hits) / len(hits) for name, hits in right.items()}
    expected |= {"reconstruction_loss": L_rec, "image_loss": L_img, "patch_loss": L_pat,
                 "adversarial_loss": L_adv, "loss": L_rec + 0.2 * L_adv + L_img + L_pat}
    diversity = terms.pop("generator_diversity")
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, rel=1e-4)
    assert diversity > 0 and loss == terms["loss"] and len(at_hidden) == 3 * 48


# ---- who learns from what


@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_one_backward_pass_equals_two_separate_ones(weight):
    """L_rec + weight L_adv with the discriminator frozen by hand; then L_D on detached composites."""
    model, images, noise = build()
    torch.manual_seed(7)
    joint = gradients(model, model(images, noise, weight)[0])
    model.discriminator.requires_grad_(False)
    reconstruction, composite, generated = forward_in_parts(model, images, noise)
    L_adv = adversarial_loss(model.discriminator(composite), generated)
    separate = gradients(model, reconstruction + weight * L_adv)
    assert all(name.startswith("generator.") for name in separate)
    model.discriminator.requires_grad_(True)
    model.discriminator.pos_embed.requires_grad_(False)
    real, fake = (model.discriminator(x) for x in (images, composite.detach()))
    found = gradients(model, sum(discriminator_loss(real, fake, generated).values()))
    assert all((gradient is None) == name.startswith("generator.") for name, gradient in found.items())
    separate |= {name: gradient for name, gradient in found.items() if gradient is not None}
    assert separate.keys() == joint.keys()
    for name, gradient in separate.items():
        torch.testing.assert_close(joint[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("level", ["image", "patch"])
def test_one_level_alone_deceives_and_its_weight_follows_the_gradient(level):
    model, images, noise = build(adversarial_levels=level, gan_ratio=0.3)
    last = model.generator.decoder_pred.weight
    reconstruction, composite, generated = forward_in_parts(model, images, noise)
    L_adv = adversarial_loss({level: model.discriminator(composite)[level]}, generated)
    wanted, own = (torch.autograd.grad(x, last, retain_graph=True)[0] for x in (reconstruction, L_adv))
    torch.manual_seed(7)
    loss, terms = model(images, noise, 0.2)
    torch.testing.assert_close(terms["gan_weight"], 0.3 * wanted.norm() / own.norm(), rtol=1e-4, atol=0)
    torch.testing.assert_close(terms["adversarial_loss"], L_adv.detach(), rtol=1e-5, atol=0)
    expected = wanted + terms["gan_weight"] * own
    found = gradients(model, loss)["generator.decoder_pred.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_the_discriminator_sees_blurred_images():
    sharp, images, _ = build()
    blurred, *_ = build(blur=0.8)
    blurred.load_state_dict(sharp.state_dict())
    weights = [math.exp(-0.5 * (i / 0.8) ** 2) for i in range(-2, 3)]
    kernel = torch.tensor(weights) / sum(weights)
    padded = F.pad(images, (2,) * 4, mode="reflect").unfold(2, 5, 1).unfold(3, 5, 1)
    smooth = torch.einsum("bchwij,i,j->bchw", padded, kernel, kernel)
    for level, verdict in sharp.discriminator(smooth).items():
        torch.testing.assert_close(blurred.discriminator(images)[level], verdict, rtol=1e-3, atol=1e-4)


def test_a_generator_that_waits_and_one_that_learns_slowly(small_npz, tmp_path):
    flags = ["--batch_size", 25, "--epochs", 0.2, "--warmup_epochs", 0, "--pictures", 0, "--workers", 0]
    flags += ["--model", "nano", "--img_size", 32, "--patch_size", 4, "--data", small_npz]  # NANO
    torch.manual_seed(0)
    start, moved = VisionElectra(Config(**NANO)).state_dict(), {}
    for name, more in (("waits", ["--generator_waits", "--generator_warmup_epochs", 2]),
                       ("slow", ["--generator_lr_scale", 1e-6]), ("free", [])):
        run_script(["vision_electra.py", *flags, "--out", name, *more], tmp_path)
        weights = torch.load(tmp_path / name / "last.pth", weights_only=True)["model"]
        for network in ("generator", "discriminator"):
            moved[name, network] = max((weights[key] - start[key]).abs().max().item()
                                       for key in weights if key.startswith(network))
    assert moved["waits", "generator"] == 0 < moved["slow", "generator"] < 1e-4 * moved["free", "generator"]
    assert min(moved[name, "discriminator"] for name in ("waits", "slow", "free")) > 1e-6


def test_bf16_is_close_to_float32():
    """Autocast remembers casts of weights: none may be one that was made without a gradient."""
    model, images, noise = build()
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled):
            loss, _ = model(images, noise, 0.2)
        found.append(gradients(model, loss) | {"loss": loss.detach()})
    assert found[1]["loss"].item() == pytest.approx(found[0]["loss"].item(), rel=0.03)
    for name, exact in found[0].items():
        assert F.cosine_similarity(found[1][name].flatten(), exact.flatten(), dim=0) > 0.9, name


# ---- masks, noise, composites


def test_noise_has_its_deviation_on_patch_tokens_and_none_on_the_class_token():
    latent = torch.randn(50, 17, 128)
    noise = vision_electra.add_noise(latent, 0.1) - latent
    assert not noise[:, 0].any() and torch.equal(vision_electra.add_noise(latent, 0.0), latent)
    assert noise[:, 1:].std().item() == pytest.approx(0.1, rel=0.01) and noise.mean().abs() < 1e-3


def test_the_generator_is_that_of_mae_mff():
    """The same names, mask, prediction and loss as mae_mff.py --fuse_layers LAST --target raw."""
    mae = mae_mff.MaskedAutoencoder(mae_mff.Config(**NANO, fuse_layers=(3,), target="raw"))
    model = VisionElectra(Config(**NANO, noise=0.0, levels="none"))
    model.generator.load_state_dict(mae.state_dict())  # strict
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 64)
    (pred, mask, _), (expected, expected_mask) = model.generate(images, noise), mae.predict(images, noise)
    assert torch.equal(mask, expected_mask) and vision_electra.DECODERS == mae_mff.DECODERS
    torch.testing.assert_close(pred, expected)
    torch.testing.assert_close(model(images, noise, 0.2)[0], mae(images, noise)[0])


# ---- the watch


def test_the_watch_warns_once_of_chance_and_of_1_and_again_after_a_recovery(capsys):
    cfg, chance = Config(**NANO, levels="patch", warmup_epochs=1.0), (0.5, 0.5)
    for accuracies, warnings, values in (
            ([chance] * 2300, 1, {}), ([(1.0, 0.0)] * 2000, 1, {}), ([(1.0, 1.0)] * 2000, 1, {}),
            ([(0.8, 0.6)] * 2000, 0, {}), ([(0.7, 0.45)] * 2000, 0, {}), ([chance] * 100, 0, {}),
            ([chance, (1.0, 1.0)] * 1000, 0, {}),
            ([chance] * 500 + [(0.9, 0.8)] * 500 + [chance] * 500, 2, {}),
            ([(math.nan, 1.0)], 0, {"skipped": "nonfinite"}), ([(math.nan, 1.0)], 0, {"epoch": 0.9})):
        run = types.SimpleNamespace(**{"cfg": cfg, "skipped": "", "epoch": 1.0, "saved": {}} | values)
        for real, fake in accuracies:
            vision_electra.watch_for_collapse({"patch_accuracy_real": real, "patch_accuracy_fake": fake}, run)
        assert capsys.readouterr().out.count("\n") == warnings
        assert not values or run.saved == {}


# ---- updates, runs, starts


@pytest.mark.parametrize("script, flags, generator, trunk", [
    ("vision_electra.py", ["--levels", "patch"], "74/74", "54/56"),
    ("vision_electra_simmim.py", ["--discriminator", "vit"], "57/57", "54/58"),
    ("vision_electra_simmim.py", ["--discriminator", "swin"], "57/57", None)])
def test_stopped_killed_and_in_two_processes_a_demo_is_the_same(
        small_npz, tmp_path, script, flags, generator, trunk):
    """One, killed between the two files of its first checkpoint: encoder.pth alone is no checkpoint; two,
    with accumulation, stopped in the warm start. No noise, as that differs by process."""
    command = [script, *flags, "--demo", "--data", small_npz, "--amp", "off", "--workers", 0,
               "--log_every", 1, "--batch_size", 20, "--epochs", 0.3, "--noise", 0, "--pictures", 0,
               "--generator_warmup_epochs", 0.2, "--save_minutes", 0, "--resume", "--out"]
    output = run_script([*command, "whole"], tmp_path)
    assert f"whole/warmstart/last.pth: {generator} tensors loaded" in output
    loaded = f"whole/warmstart/encoder.pth: {trunk} tensors loaded; missing: heads" in output
    assert loaded == bool(trunk)  # a Swin cannot start from a ViT
    killed(tmp_path, [*command, "killed"], "self.out.name != 'warmstart'", "Run.export")
    assert (tmp_path / "killed/encoder.pth").exists() and not (tmp_path / "killed/last.pth").exists()
    run_script([*command, "killed"], tmp_path)
    files = [f"{tmp_path}/{name}" for name in ("whole/last.pth", "killed/last.pth", "killed/encoder.pth")]
    whole, again, encoder = (torch.load(path, weights_only=True) for path in files)
    assert same(whole["model"], again["model"])
    two = [*command, "two", "--micro_batch", 5]
    when = "self.out.name == 'warmstart' and self.step == 1"
    assert "after step 2 of 9" in stopped(tmp_path, two, when, "Run.end_update", processes=2)
    run_script(two, tmp_path, processes=2)
    for folder, steps in (("", 3), ("warmstart", 9)):
        one, two = (losses(tmp_path / name / folder) for name in ("whole", "two"))
        assert one == pytest.approx(two, rel=1e-4) and len(one) == steps
    line = log(tmp_path / "two")[-1]
    norms = [line[f"train/grad_norm_{network}"] for network in ("generator", "discriminator")]
    assert math.hypot(*norms) == pytest.approx(line["grad_norm"], rel=1e-4)
    plain = {"nano": common.ViT("nano", (24, 24), 4), "beit_nano": beit.RelPosViT("nano", (24, 24), 4),
             "swin_nano": swin.Swin("nano", 1, 3)}[encoder["meta"]["model"]]
    plain.load_state_dict(encoder["model"])  # strict
    assert encoder["meta"]["patch_size"] == (1 if "swin" in flags else 4)
    assert holds(plain, {name: whole["model"][f"discriminator.{name}"] for name in encoder["model"]})


def start(tmp_path, content, *fields, script=vision_electra, network=VisionElectra, **values):
    """A model that starts from a file with this content, given to these fields."""
    torch.save(content, tmp_path / "file.pth")
    cfg = script.Config(**NANO | values | dict.fromkeys(fields, str(tmp_path / "file.pth")))
    model = network(cfg)
    script.load_initial(model, cfg)
    return model


def holds(network, state):
    trunk = network.trunk_state()
    return all(torch.equal(trunk[name], state[name]) for name in trunk if name != "pos_embed")


def test_networks_start_from_every_sort_of_file(tmp_path, capsys):
    """last.pth of MAE and our own (with heads), encoder.pth, official MAE's, timm's."""
    mae = mae_mff.MaskedAutoencoder(mae_mff.Config(**NANO, fuse_layers=(3,), target="raw"))
    state, trunk = mae.state_dict(), mae.trunk_state()
    last = {"model": state, "encoder": {name: name for name in trunk}, "config": {"target": "raw"}}
    for content in (last, {"model": state}, {"model": trunk}, trunk):
        model = start(tmp_path, content, *Config.start_from)
        assert holds(model.generator, state) and holds(model.discriminator, state)
    both, _ = VisionElectra(Config(**NANO)), capsys.readouterr()
    names = {name: f"discriminator.{name}" for name in trunk}
    last = {"model": both.state_dict(), "encoder": names, "config": {"levels": "both"}}
    for levels in ("both", "image"):
        model = start(tmp_path, last, *Config.start_from, levels=levels)
        assert all(torch.equal(value, both.state_dict()[name]) for name, value in model.state_dict().items())
    assert "does not say" not in capsys.readouterr().out
    sizes = {"embed_dim": 128, "depth": 4, "num_heads": 4, "img_size": 32, "patch_size": 4}
    vit = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", **sizes).state_dict()
    assert holds(start(tmp_path, vit, "discriminator_init").discriminator, vit)


def test_a_generator_of_another_kind_is_refused(tmp_path, capsys):
    """Normalised pixels, by our config or official MAE's arguments; fused blocks; a decoder in part."""
    whole = vision_electra.Generator(Config(**NANO)).state_dict()
    part = {name: value for name, value in whole.items() if "decoder_blocks" not in name}
    said = [argparse.Namespace(norm_pix_loss=flag) for flag in (False, True)]
    fused = whole | {"fuse_weight": torch.ones(2)}
    for content in ({"model": whole, "config": {"target": "mae"}}, {"model": whole, "args": said[1]},
                    {"model": fused}, {"model": part}):
        with pytest.raises(common.UserError):
            start(tmp_path, content, "generator_init")
    for content in ({"model": whole}, {"model": whole, "args": said[0]}):
        start(tmp_path, content, "generator_init")
        assert "does not say" in capsys.readouterr().out
