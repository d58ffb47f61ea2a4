"""Weights that go anywhere: ours load into timm, torchvision and transformers with equal outputs, theirs load
here; official MAE files; features; pictures from a file. docs/WEIGHTS.md is run as it stands."""

import argparse
import re

import numpy as np
import pytest
import torch
from commands import CIM
from conftest import ROOT, run_script
from PIL import Image
from torch import nn
from torchvision.models import resnet50

import common
import finetune
import mae_mff
import weights
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


# ---- there


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


def test_resnet_loads_into_torchvision(encoders):
    content = torch.load(encoders / "cim_resnet/encoder.pth", weights_only=True)
    theirs = resnet50(num_classes=7).eval()
    assert theirs.load_state_dict(content["model"], strict=False) == (["fc.weight", "fc.bias"], [])
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    _, ours = load(encoders / "cim_resnet/encoder.pth")
    torch.testing.assert_close(ours.features(images), theirs(images), rtol=1e-5, atol=1e-5)


# ---- and back


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


def test_torchvisions_file_loads_here(tmp_path):
    theirs = resnet50(num_classes=3).eval()
    for module in theirs.modules():  # statistics that are not those of the start
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    cfg, ours = load(tmp_path / "resnet.pth")
    assert (cfg.model, cfg.resnet_width, cfg.layer_decay) == ("resnet50", 64, 1.0)
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64).double()  # such statistics amplify rounding
    found = ours.double().features(images)
    torch.testing.assert_close(found, theirs.double()(images), rtol=1e-5, atol=1e-5)


# ---- official MAE files


def official(path, decoder, size="base", img_size=(224, 224), patch_size=16):
    """A file as MAE's authors publish them: their names, depths and shapes; values of ours."""
    layers = (common.VIT_SIZES[size][1] - 1,)
    cfg = mae_mff.Config(model=size, img_size=img_size, patch_size=patch_size, fuse_layers=layers)
    model = mae_mff.MaskedAutoencoder(cfg)
    full = {"model": model.state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(full if decoder else {"model": model.trunk_state()}, path)
    return model


@pytest.mark.parametrize("shape", [("base", (224, 224), 16), ("nano", (32, 32), 8)])
def test_official_files_are_known_by_their_tensors(shape, tmp_path):
    model = official(tmp_path / "file.pth", shape[0] == "nano", *shape)
    cfg, ours = load(tmp_path / "file.pth")
    assert (cfg.model, cfg.img_size, cfg.patch_size, cfg.in_chans) == (*shape, 3)
    found, trunk = ours.state_dict(), model.trunk_state()
    assert all(torch.equal(found[name], trunk[name]) for name in trunk.keys() & found.keys())


def test_what_shows_nothing_is_left_to_the_flags_and_what_is_no_state_dict_refused():
    rectangle = common.ViT("nano", (32, 64), 8).state_dict()  # its grid cannot be told
    for content in ({"x": torch.zeros(1)}, rectangle):
        assert common.network_of(weights.adopt(content, "file.pth")) == {}
    for content in ({0: torch.zeros(1)}, {"model": torch.zeros(1), 1: 2}, {}):
        with pytest.raises(UserError, match="no tensors under names"):
            weights.adopt(content, "file.pth")


TINY = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
        "image_size": 32, "patch_size": 4, "layer_norm_eps": 1e-6}


@pytest.mark.parametrize("form", ["folder", "shards", "legacy pickle"])
def test_transformers_vit_gives_its_logits(tmp_path, form):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, num_labels=3)).eval()
    nn.init.normal_(theirs.vit.embeddings.position_embeddings)
    if form == "legacy pickle":
        file = tmp_path / "pytorch_model.bin"
        torch.save(theirs.state_dict(), file, _use_new_zipfile_serialization=False)
    else:
        theirs.save_pretrained(tmp_path / "hub", max_shard_size="1MB" if form == "shards" else "1GB")
        file = tmp_path / "hub"
    cfg, ours = load(file, "--mode", "linear")
    assert (cfg.model, cfg.patch_size, cfg.img_size) == ("nano", 4, (32, 32))
    content, images = common.read_file(file)["model"], torch.randn(IMAGES)
    logits = nn.functional.linear(ours.features(images), content["head.weight"], content["head.bias"])
    torch.testing.assert_close(logits, theirs(images).logits, rtol=1e-5, atol=1e-5)
    if form == "shards":
        next(file.glob("*00002*")).unlink()
        with pytest.raises(UserError, match="lacks model-00002"):
            common.read_file(file)


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
    lambda own, other: {"model": {f"teacher.backbone.{k}": v for k, v in own.items()}
                        | {f"student.backbone.{k}": v for k, v in other.items()}},
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
    torch.save(own, tmp_path / "file.safetensors")
    for name in ("file.pth", "file.safetensors"):
        assert common.read_file(tmp_path / name)["model"].keys() == own.keys()
    np.savez(tmp_path / "jax.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="not one of torch.save"):
        common.read_file(tmp_path / "jax.npz")


def test_every_flipped_bit_is_found_or_harmless(tmp_path):
    own = common.ViT("nano", (32, 32), 8).state_dict()
    torch.save({"model": own}, tmp_path / "good.pth")
    data, rng, refused = (tmp_path / "good.pth").read_bytes(), np.random.default_rng(0), 0
    for place in rng.integers(len(data), size=25):
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / "bad.pth").write_bytes(damaged)
        try:
            found = common.read_file(tmp_path / "bad.pth")["model"]
            assert all(torch.equal(found[name], value) for name, value in own.items())
        except UserError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e28])
def test_weights_that_diverged_are_not_loaded(tmp_path, value):
    own = common.ViT("nano", (32, 32), 8).state_dict()
    own["norm.weight"][3] = value
    torch.save(own, tmp_path / "file.pth")
    with pytest.raises(UserError, match="norm.weight"):
        common.load_weights(common.ViT("nano", (32, 32), 8), tmp_path / "file.pth")


def test_pictures_from_an_official_file(tmp_path, folder):
    for name, target in (("mae_pretrain_x_full.pth", "mae"), ("mae_visualize_x.pth", "raw")):
        official(tmp_path / name, True, "nano", (32, 32), 8)
        cfg = common.parse_config(mae_mff.Config, mae_mff.presets, ["--draw", str(tmp_path / name)])
        assert (cfg.target, cfg.fuse_layers, cfg.model, cfg.img_size) == (target, (3,), "nano", (32, 32))
    command = ["mae_mff.py", "--draw", name, "--data", folder, "--pictures", 3, "--out", "p.png"]
    assert "p.png: 3 images" in run_script(command, tmp_path, processes=2)
    with Image.open(tmp_path / "p.png") as picture:
        picture.verify()
    assert "p.png: expected the name of a new file" in run_script(command, tmp_path, expect=2)


@pytest.mark.parametrize("script", [f"{name}.py" for name in (
    "mae_mff", "ddae_beitv2", "cim", "vision_electra", "revcol_v2")])
def test_a_picture_from_a_runs_file_is_the_one_it_drew(unbroken, small_npz, tmp_path, script):
    run_script([script, "--draw", unbroken / script / "last.pth", "--data", small_npz], tmp_path)
    last = max((unbroken / script / "pictures").iterdir())
    assert (tmp_path / script.replace(".py", ".png")).read_bytes() == last.read_bytes()


def test_what_cannot_be_drawn_is_named(encoders, folder, tmp_path):
    (folder / "class0/nested/00.png").write_bytes(b"x")
    command = ["mae_mff.py", "--data", folder, "--pictures", 2, "--out", "p.png", "--draw"]
    output = run_script([*command, encoders / "cim_resnet/encoder.pth"], tmp_path, expect=2)
    assert "expected last.pth of mae_mff.py" in output and output.count("\n") == 1
    output = run_script([*command, encoders / "mae_mff.py/last.pth"], tmp_path)
    assert "unreadable" in output and "00.png" in output
    assert Image.open(tmp_path / "p.png").height > 200  # two rows


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
    (folder / "class0/nested/06.png").write_bytes(b"no image")
    file = encoders / "mae_mff.py/encoder.pth"
    command = ["finetune.py", "--mode", "features", "--weights", file, "--data", folder, "--amp", "off"]
    output = run_script([*command, "--out", "deep/feats.npy"], tmp_path)
    assert "39 images x 128" in output and "left out: 1" in output
    run_script([*command, "--out", "two.npy"], tmp_path, processes=2)
    features = np.load(tmp_path / "deep/feats.npy")
    names = (tmp_path / "deep/feats.txt").read_text().splitlines()
    assert features.shape == (39, 128) and features.dtype == np.float32 and len(names) == 39
    assert "06.png" not in " ".join(names) and names == (tmp_path / "two.txt").read_text().splitlines()
    np.testing.assert_allclose(features, np.load(tmp_path / "two.npy"), rtol=1e-5, atol=1e-5)
    theirs = timms(num_classes=0)
    theirs.load_state_dict(torch.load(file, weights_only=True)["model"])
    normalize = common.Normalize(common.IMAGENET_MEAN, common.IMAGENET_STD, "cpu")
    for row in (0, 17, 38):  # each row is its own name's image
        image = common.EvalCrop((32, 32))(common.read_image(names[row], 3))
        with torch.no_grad():
            expected = theirs.forward_features(normalize(image[None]))[0, 0]
        np.testing.assert_allclose(features[row], expected.numpy(), rtol=1e-4, atol=1e-4)
    before = (tmp_path / "two.npy").read_bytes()
    for out in ("two.npy", "folder"):
        assert "the name of a new file" in run_script([*command, "--out", out], tmp_path, expect=2)
    assert (tmp_path / "two.npy").read_bytes() == before and not (tmp_path / "folder").exists()


def test_features_of_an_npz_are_those_of_all_its_images_under_their_numbers(encoders, small_npz, tmp_path):
    arrays = dict(np.load(small_npz))
    mixed = np.random.default_rng(0).permutation(303)
    np.savez(tmp_path / "mixed.npz", **{name: values[mixed] for name, values in arrays.items()})
    command = ["finetune.py", "--mode", "features", "--weights", encoders / "mae_mff.py/encoder.pth"]
    run_script([*command, "--data", "mixed.npz", "--out", "f.npy", "--workers", 0], tmp_path)
    assert np.load(tmp_path / "f.npy").shape == (303, 128)
    assert (tmp_path / "f.txt").read_text().splitlines() == [f"mixed.npz[{i}]" for i in range(303)]


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
