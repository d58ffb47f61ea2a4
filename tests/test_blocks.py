"""Blocks chapter of common.py against slow versions and timm; files of weights."""

import math
import pickle
import types
from argparse import Namespace

import pytest
import torch

import common
from backbones import Classifier
from common import UserError, ViT


def test_patchify_order_and_round_trip_on_a_rectangle():
    images, p = torch.randn(2, 5, 64, 96), 16
    patches = common.patchify(images, p)
    assert patches.shape == (2, 4 * 6, p * p * 5)
    for row in range(4):
        for column in range(6):
            patch = images[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
            for y, x, c in ((0, 0, 0), (3, 7, 2), (15, 15, 4)):
                assert torch.equal(patches[:, row * 6 + column, (y * p + x) * 5 + c], patch[:, c, y, x])
    assert torch.equal(common.unpatchify(patches, p, (4, 6)), images)
    values = torch.arange(24.0).view(1, 24, 1)
    pixels = common.patches_to_pixels(values, p, (4, 6))
    assert torch.equal(common.patchify(pixels, p), values.expand(1, 24, p * p))


def test_sincos_table_against_its_definition():
    h, w, dim = 3, 5, 16
    table = common.sincos_pos_embed(dim, (h, w))
    assert table.shape == (1, 1 + h * w, dim) and not table[0, 0].any()
    quarter = dim // 4
    for row in range(h):
        for column in range(w):
            expected = [f(position / 10000 ** (k / quarter)) for position in (column, row)
                        for f in (math.sin, math.cos) for k in range(quarter)]
            found = table[0, 1 + row * w + column]
            torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_drop_path_keeps_the_mean_and_whole_samples():
    x = torch.ones(20000, 2, 3)
    y = common.drop_path(x, 0.3, training=True)
    assert set(y.unique().tolist()) == {0.0, (x[0, 0, 0] / 0.7).item()} and abs(y.mean() - 1) < 0.02
    assert (y.flatten(1).std(1) == 0).all() and common.drop_path(x, 0.3, training=False) is x


def classifier(classes, **values):
    defaults = {"model": "base", "img_size": (224, 224), "patch_size": 16, "in_chans": 3, "drop_path": 0.0,
                "pool": "avg", "mode": "finetune", "head_init": 0.001}
    return Classifier(types.SimpleNamespace(**(defaults | values)), classes)


# ---- weights from files


def trunk(size=(32, 32)):
    return ViT("nano", size, 8)


def test_load_weights_takes_an_encoder_or_a_prefix_or_all(tmp_path):
    source = trunk().state_dict()
    names = {name: f"encoder.{name}" for name in source}
    model = {names[name]: value for name, value in source.items()} | {"decoder.weight": torch.zeros(1)}
    wrapped = {f"module._orig_mod.{name}": value for name, value in source.items()}
    wrapped["head.weight"] = torch.ones(1)
    for content, prefix in (({"model": model, "encoder": names}, None), ({"model": model}, "encoder."),
                            ({"model": wrapped, "args": Namespace(lr=1)}, None),
                            (source, ""), ({"state_dict": source}, "encoder.")):
        torch.save(content, tmp_path / "w.pth")
        target = trunk()
        target.norm.weight.data.fill_(3.0)
        common.load_weights(target, tmp_path / "w.pth", ignore=("head.",), prefix=prefix)
        assert all(torch.equal(value, source[name]) for name, value in target.state_dict().items())


def test_load_weights_into_a_rectangle_resizes_the_table(tmp_path):
    torch.save(trunk().state_dict(), tmp_path / "plain.pth")
    target = trunk((32, 64))
    common.load_weights(target, tmp_path / "plain.pth")
    table = trunk().pos_embed
    assert torch.equal(target.pos_embed, common.resize_pos_embed(table, (4, 4), (4, 8)))
    assert torch.equal(target.pos_embed[:, 0], table[:, 0])
    torch.testing.assert_close(common.resize_pos_embed(table, (4, 4), (4, 4)), table)


@pytest.mark.parametrize("words, change", [
    ("missing", {"norm.weight": None}), ("unexpected", {"blocks.0.ls1.gamma": torch.ones(1)}),  # LayerScale
    ("patch_embed.proj.weight", {"patch_embed.proj.weight": torch.zeros(128, 1, 8, 8)})])
def test_load_weights_refuses_what_does_not_fit(tmp_path, words, change):
    state = trunk().state_dict() | change
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        common.load_weights(trunk(), tmp_path / "w.pth")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_bad_files_are_refused_in_one_line_and_run_nothing(tmp_path, capsys):
    torch.save({"model": trunk().state_dict()}, tmp_path / "good.pth")
    whole = (tmp_path / "good.pth").read_bytes()
    contents = {b"--2026-01-01 12:00:00--  https://example.org/encoder.pkl": "download log", b"": "empty",
                b"\n<!DOCTYPE html>": "web page", b"version https://git-lfs.github.com/spec/v1\n": "git lfs",
                b"\x1f\x8b\x08": "gunzip", b"\x89HDF\r\n": "HDF5",
                whole[: len(whole) // 2]: "", pickle.dumps({"model": Evil()}): ""}
    for data, words in contents.items():
        for name in ("bad.pth", "bad.safetensors"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(UserError, match=f"{name}.*{words}") as caught:
                common.read_file(tmp_path / name)
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--resume --out"):  # for users who give a folder
        common.read_file(tmp_path)
    assert "executed" not in capsys.readouterr().out
