"""Weights that go anywhere: ours load into timm, torchvision and transformers with equal outputs, theirs load
here; official MAE files; features; pictures from a file. docs/WEIGHTS.md is run as it stands."""

import argparse
import json
import os
import re

import numpy as np
import pytest
import torch
from commands import CIM
from conftest import ROOT, run_script
from torch import nn
from torchvision.models import resnet50

import common
import finetune
import mae_mff
from common import UserError

IMAGES = 3, 3, 32, 32
VITS = ["mae_mff.py", "ddae.py", "cim.py", "vision_electra.py"]


@pytest.fixture(scope="module")
def encoders(unbroken, small_npz):
    """SCRIPT/encoder.pth of four ViTs, finetune.py/best.pth, the ResNet-50 of cim_resnet/encoder.pth."""
    resnet = ["--enhancer", "resnet50", "--resnet_width", 64, "--batch_size", 50, "--epochs", 0.2]
    run_script([*CIM, *resnet, "--data", small_npz, "--out", "cim_resnet"], unbroken)
    return unbroken


def load(path, *flags, classes=3):
    """(Config, network) that finetune.py makes of a file."""
    cfg = common.parse_config(finetune.Config, finetune.presets, [*flags, "--weights", str(path)])
    return cfg, finetune.load_model(cfg, classes).eval()


def timms(**values):
    timm = pytest.importorskip("timm")
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", **(shape | values)).eval()


@pytest.mark.parametrize("script", VITS)
def test_encoders_load_into_timm(encoders, script):
    content = torch.load(encoders / f"{script}/encoder.pth", weights_only=True)
    theirs = timms(num_classes=0)
    theirs.load_state_dict(content["model"])  # strict
    meta = content["meta"]
    ours = common.ViT(meta["model"], meta["img_size"], meta["patch_size"]).eval()
    common.load_weights(ours, encoders / f"{script}/encoder.pth")
    images = torch.randn(IMAGES)
    torch.testing.assert_close(ours(images), theirs.forward_features(images), rtol=1e-5, atol=1e-5)


def test_timms_files_load_here_and_need_no_flags(tmp_path, capsys):
    theirs = timms(num_classes=5)
    nn.init.normal_(theirs.pos_embed)
    torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "model_best.pth.tar")
    cfg, ours = load(tmp_path / "model_best.pth.tar", "--mode", "linear")
    assert (cfg.model, cfg.patch_size, cfg.img_size, cfg.in_chans) == ("nano", 4, (32, 32), 3)
    images = torch.randn(IMAGES)
    expected = theirs.forward_features(images)[:, 0]
    torch.testing.assert_close(ours.features(images), expected, rtol=1e-5, atol=1e-5)
    assert "ignored: head" in capsys.readouterr().out


def test_resnet_loads_into_torchvision_and_back(encoders, tmp_path):
    content = torch.load(encoders / "cim_resnet/encoder.pth", weights_only=True)
    theirs = resnet50(num_classes=7).eval()
    assert theirs.load_state_dict(content["model"], strict=False) == (["fc.weight", "fc.bias"], [])
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    theirs.fc, images = nn.Identity(), torch.randn(2, 3, 64, 64)
    for path in (encoders / "cim_resnet/encoder.pth", tmp_path / "resnet.pth"):
        cfg, ours = load(path)
        assert (cfg.model, cfg.resnet_width, cfg.layer_decay) == ("resnet50", 64, 1.0)
        torch.testing.assert_close(ours.features(images), theirs(images), rtol=1e-5, atol=1e-5)


# ---- official MAE files, transformers', wrapped ones


def official(path):
    """A file as MAE's authors publish them: their names and shapes; values of ours."""
    cfg = mae_mff.Config(model="nano", img_size=(32, 32), patch_size=8, fuse_layers=(3,))
    model = mae_mff.MaskedAutoencoder(cfg)
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1)}, path)
    return model.trunk_state()


TINY = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
        "image_size": 32, "patch_size": 4, "layer_norm_eps": 1e-6}


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_transformers_vit_gives_its_logits(tmp_path, form):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, num_labels=3)).eval()
    nn.init.normal_(theirs.vit.embeddings.position_embeddings)
    theirs.save_pretrained(tmp_path, max_shard_size="1MB" if form == "shards" else "1GB")
    cfg, ours = load(tmp_path, "--mode", "linear")
    assert (cfg.model, cfg.patch_size, cfg.img_size) == ("nano", 4, (32, 32))
    content, images = common.read_file(tmp_path)["model"], torch.randn(IMAGES)
    logits = nn.functional.linear(ours.features(images), content["head.weight"], content["head.bias"])
    torch.testing.assert_close(logits, theirs(images).logits, rtol=1e-5, atol=1e-5)
    if form == "shards":
        next(tmp_path.glob("*00002*")).unlink()
        with pytest.raises(UserError, match="lacks model-00002"):
            common.read_file(tmp_path)


def test_transformers_mae_gives_its_reconstruction(tmp_path):
    transformers = pytest.importorskip("transformers")
    names = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
    config = transformers.ViTMAEConfig(**TINY, **{f"decoder_{name}": TINY[name] for name in names})
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    theirs.save_pretrained(tmp_path / "mae")
    cfg = mae_mff.Config(model="nano", img_size=(32, 32), patch_size=4, fuse_layers=(3,), target="raw",
                         decoder_embed_dim=128, decoder_depth=4, decoder_num_heads=4)
    ours = mae_mff.MaskedAutoencoder(cfg).eval()
    common.load_weights(ours, tmp_path / "mae", allow_missing=("fuse_",))
    images, noise = torch.randn(IMAGES), torch.rand(3, 64)
    found, mask = ours.predict(images, noise)
    expected = theirs(images, noise=noise)
    assert torch.equal(mask, expected.mask)
    torch.testing.assert_close(found, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [
    lambda own, other: {"student": {f"module.backbone.{k}": v for k, v in other.items()},
                        "teacher": {f"backbone.{k}": v for k, v in own.items()}, "dino_loss": {}},
    lambda own, other: {"model": {f"student.backbone.{k}": v for k, v in other.items()}
                        | {f"teacher.backbone.{k}": v for k, v in own.items()}},
    lambda own, other: {"state_dict": {f"model.encoder.{k}": v for k, v in own.items()}, "epoch": 3},
    lambda own, other: {"model_ema": own, "optimizer": {"state": {}}},
    lambda own, other: {f"module.base_encoder.{k}": v for k, v in own.items()}
    | {f"module.momentum_encoder.{k}": v for k, v in other.items()},
], ids=["dino", "dinov2", "lightning", "ema", "moco"])
def test_the_network_inside_wrappers_is_found_and_named(tmp_path, capsys, wrap):
    own, other = (common.ViT("nano", (32, 32), 8) for _ in range(2))
    own.init_weights()
    torch.save(wrap(own.state_dict(), other.state_dict()), tmp_path / "file.pth")
    cfg, ours = load(tmp_path / "file.pth")
    assert cfg.patch_size == 8 and torch.equal(ours.blocks[3].mlp.fc2.weight, own.blocks[3].mlp.fc2.weight)
    assert "the network is taken from" in capsys.readouterr().out


def test_the_content_decides_not_the_suffix(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    own = common.ViT("nano", (32, 32), 8).state_dict()
    safetensors.save_file(own, tmp_path / "file.pth")
    torch.save(own, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("file.pth", "old.bin"):
        assert common.read_file(tmp_path / name)["model"].keys() == own.keys()
    np.savez(tmp_path / "jax.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="not one of torch.save"):
        common.read_file(tmp_path / "jax.npz")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e28])
def test_weights_that_diverged_are_not_loaded(tmp_path, value):
    own = common.ViT("nano", (32, 32), 8).state_dict()
    own["norm.weight"][3] = value
    torch.save(own, tmp_path / "file.pth")
    with pytest.raises(UserError, match="norm.weight"):
        common.load_weights(common.ViT("nano", (32, 32), 8), tmp_path / "file.pth")


def test_official_files_are_known_by_their_tensors_and_drawn(encoders, tmp_path, folder):
    for name, target in (("mae_pretrain_x_full.pth", "mae"), ("mae_visualize_x.pth", "raw")):
        trunk = official(tmp_path / name)
        cfg = common.parse_config(mae_mff.Config, mae_mff.presets, ["--draw", str(tmp_path / name)])
        assert (cfg.target, cfg.fuse_layers, cfg.model, cfg.img_size) == (target, (3,), "nano", (32, 32))
        cfg, ours = load(tmp_path / name)
        assert (cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans) == ("nano", (32, 32), 8, 3)
        found = ours.state_dict()
        assert all(torch.equal(found[part], trunk[part]) for part in trunk.keys() & found.keys())
    (folder / "class0/nested/00.png").write_bytes(b"x")
    command = ["mae_mff.py", "--data", folder, "--pictures", 3, "--out", "p.png", "--draw"]
    output = run_script([*command, name], tmp_path, processes=2)
    assert "00.png" in output and "p.png: 3 images" in output and (tmp_path / "p.png").exists()
    assert "p.png: expected the name of a new file" in run_script([*command, name], tmp_path, expect=2)
    output = run_script([*command, encoders / "cim_resnet/encoder.pth"], tmp_path, expect=2)
    assert "expected last.pth of mae_mff.py" in output and output.count("\n") == 1


@pytest.mark.parametrize("script", [f"{name}.py" for name in (
    "mae_mff", "ddae_beitv2", "cim", "vision_electra", "revcol_v2")])
def test_a_picture_from_a_runs_file_is_the_one_it_drew(unbroken, small_npz, tmp_path, script):
    run_script([script, "--draw", unbroken / script / "last.pth", "--data", small_npz], tmp_path)
    last = max((unbroken / script / "pictures").iterdir())
    assert (tmp_path / script.replace(".py", ".png")).read_bytes() == last.read_bytes()


def test_a_fine_tuned_network_gives_its_logits_in_timm_and_is_read_out_through_its_own_norm(encoders):
    content, images = torch.load(encoders / "finetune.py/best.pth", weights_only=True), torch.randn(IMAGES)
    theirs = timms(num_classes=len(content["meta"]["classes"]), global_pool="avg")
    theirs.load_state_dict(content["model"])
    _, ours = load(encoders / "finetune.py/best.pth", classes=len(content["meta"]["classes"]))
    ours.load_state_dict(content["model"])
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    theirs.reset_classifier(0)
    for mode, learns in (("knn", []), ("linear", ["head.1.weight", "head.1.bias"])):
        _, ours = load(encoders / "finetune.py/best.pth", "--mode", mode)
        torch.testing.assert_close(ours.features(images), theirs(images), rtol=1e-5, atol=1e-5)
        assert [n for n, p in ours.named_parameters() if p.requires_grad] == learns


# ---- features


def test_features_are_deterministic_never_masked_and_named(encoders, folder, tmp_path):
    """Each name is one line of the list, whatever is in it."""
    odd = ["two\nlines.png", "a \u2028 b \x85.png", os.fsdecode(b"latin \xe9.png")]
    for i, name in enumerate(odd):
        (folder / f"class0/nested/{2 * i:02}.png").rename(folder / name)
    (folder / "class0/nested/06.png").write_bytes(b"no image")
    file = encoders / "mae_mff.py/encoder.pth"
    command = ["finetune.py", "--mode", "features", "--weights", file, "--data", folder, "--amp", "off"]
    assert "left out: 1" in run_script([*command, "--out", "deep/feats.npy"], tmp_path)
    run_script([*command, "--out", "two.npy"], tmp_path, processes=2)
    features = np.load(tmp_path / "deep/feats.npy")
    lines = (tmp_path / "deep/feats.txt").read_text().splitlines()
    assert features.shape == (39, 128) and features.dtype == np.float32
    assert lines == (tmp_path / "two.txt").read_text().splitlines()
    np.testing.assert_allclose(features, np.load(tmp_path / "two.npy"), rtol=1e-5, atol=1e-5)
    names = [json.loads(line) if line.startswith('"') else line for line in lines]
    assert sorted(names) == sorted({str(path) for path in folder.rglob("*.png")}
                                   - {str(folder / "class0/nested/06.png")})
    theirs = timms(num_classes=0)
    theirs.load_state_dict(torch.load(file, weights_only=True)["model"])
    normalize = common.Normalize(common.IMAGENET_MEAN, common.IMAGENET_STD, "cpu")
    for row in (0, 17, 38):  # each row is its own name's image
        image = common.EvalCrop((32, 32))(common.read_image(names[row], 3))
        with torch.no_grad():
            expected = theirs.forward_features(normalize(image[None]))[0, 0]
        np.testing.assert_allclose(features[row], expected.numpy(), rtol=1e-4, atol=1e-4)
    assert "the name of a new file" in run_script([*command, "--out", "two.npy"], tmp_path, expect=2)


def test_features_of_an_npz_are_those_of_all_its_images_under_their_numbers(encoders, small_npz, tmp_path):
    command = ["finetune.py", "--mode", "features", "--weights", encoders / "mae_mff.py/encoder.pth"]
    run_script([*command, "--data", small_npz, "--out", "f.npy", "--workers", 0], tmp_path)
    assert np.load(tmp_path / "f.npy").shape == (303, 128)
    assert (tmp_path / "f.txt").read_text().splitlines() == [f"small.npz[{i}]" for i in range(303)]


# ---- the page


def test_the_pages_lines_for_timm_torchvision_and_transformers_run(encoders, monkeypatch):
    """The Python blocks of docs/WEIGHTS.md, with a file of ours and, for it, the small network's sizes."""
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/WEIGHTS.md").read_text(), re.DOTALL)
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
    create, config = timm.create_model, transformers.TimmWrapperConfig
    monkeypatch.setattr(timm, "create_model", lambda name, **values: create(name, **(shape | values)))
    monkeypatch.setattr(transformers, "TimmWrapperConfig",
                        lambda architecture: config(architecture=architecture, model_args=shape))
    folders = ("mae_mff.py", "finetune.py", "cim_resnet", "mae_mff.py")
    for block, folder in zip(blocks, folders, strict=True):
        monkeypatch.chdir(encoders / folder)
        names = {}
        exec(compile(block, "docs/WEIGHTS.md", "exec"), names)
        name = "best.pth" if folder == "finetune.py" else "encoder.pth"
        file = torch.load(encoders / folder / name, weights_only=True)
        found = getattr(names["model"], "timm_model", names["model"]).state_dict()
        assert all(torch.equal(found[name], value) for name, value in file["model"].items())
