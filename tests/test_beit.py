"""ViTs with relative positions: against timm's BEiT, and in the scripts that take one."""

import sys
import types

import pytest
import torch
from conftest import run_script

import backbones
import beit
import common
import transfer_seg_det
import weights as files

TABLE = f"rel_pos_bias.{beit.TABLE}"


@pytest.fixture(scope="module")
def theirs():
    """timm's BEiT with layer scale and one table for all blocks, all of its weights drawn."""
    timm = pytest.importorskip("timm.models.beit")
    torch.manual_seed(0)
    model = timm.Beit(32, 8, num_classes=0, global_pool="", embed_dim=128, depth=4, num_heads=4,
                      qkv_bias=True, init_values=0.1, use_abs_pos_emb=False, use_shared_rel_pos_bias=True)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def file_of_simmim(theirs, tmp_path_factory):
    """As its authors write it: names with a prefix, and the decoder, all below "model"."""
    path = tmp_path_factory.mktemp("simmim") / "simmim.pth"
    weights = {f"encoder.{name}": value for name, value in theirs.state_dict().items()}
    weights |= {"encoder.mask_token": torch.randn(1, 1, 128), "decoder.0.weight": torch.randn(192, 128, 1, 1),
                "decoder.0.bias": torch.randn(192),
                "encoder.rel_pos_bias.relative_position_index": torch.ones(2)}
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    settings = yacs.CfgNode(DATA=yacs.CfgNode(MASK_RATIO=0.6))
    settings.frozen = True  # its attributes are saved, too
    with pytest.MonkeyPatch.context() as patch:  # the class is not there when the file is read
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", yacs)
        torch.save({"model": weights, "epoch": 799, "optimizer": {}, "config": settings}, path)
    return path


def ours(path, img_size=(32, 32), patch_size=8):
    model = beit.RelPosViT("beit_nano", img_size, patch_size).eval()
    common.load_weights(model, path, ignore=("decoder", "mask_token"))
    return model


def test_outputs_are_timms(theirs, file_of_simmim):
    """With layer scale folded, biases joined, and positions that no symmetric reading would survive."""
    images = torch.randn(3, 3, 32, 32)
    model = ours(file_of_simmim)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), atol=2e-5, rtol=1e-5)
    table = model.rel_pos_bias()
    torch.testing.assert_close(table, theirs.rel_pos_bias(), atol=0, rtol=0)
    names = {name for name in theirs.state_dict() if not name.endswith(("_bias", "gamma_1", "gamma_2"))}
    qkv = {f"blocks.{i}.attn.qkv.bias" for i in range(4)}
    assert set(model.trunk_state()) == names | qkv | {TABLE}


def test_rows_of_the_table():
    """Entry by entry, on a grid that is no square."""
    grid, index = (2, 3), beit.relative_index((2, 3))
    for i in range(6):
        for j in range(6):
            down, right = i // 3 - j // 3, i % 3 - j % 3
            assert index[1 + i, 1 + j] == (down + 1) * 5 + right + 2
    assert index[0].tolist() == [17] + [15] * 6 and index[1:, 0].tolist() == [16] * 6
    bias = beit.RelPosBias(grid, 2)
    torch.nn.init.normal_(bias.relative_position_bias_table)
    torch.testing.assert_close(bias(), bias.relative_position_bias_table[index].permute(2, 0, 1))


@pytest.mark.parametrize("bias", [None, torch.linspace(-2, 2, 75).view(3, 5, 5)], ids=["plain", "bias"])
def test_attention_adds_the_bias_before_the_softmax(bias):
    """In float32, and in bfloat16 on a CPU, which has a path of its own."""
    q, k, v = torch.randn(3, 2, 3, 5, 8)
    expected = (q @ k.transpose(-2, -1) / 8**0.5 + (0 if bias is None else bias)).softmax(-1) @ v
    torch.testing.assert_close(common.attend(q, k, v, bias), expected, atol=1e-5, rtol=1e-5)
    half = common.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.03, rtol=0.03)


def test_another_grid_resizes_the_table(file_of_simmim, capsys):
    model = ours(file_of_simmim)
    larger = ours(file_of_simmim, (48, 40))
    assert f"{beit.TABLE} 4x4 -> 6x5, bicubic" in capsys.readouterr().out
    torch.testing.assert_close(larger.rel_pos_bias(), model.rel_pos_bias((6, 5)))
    old, new = model.state_dict()[TABLE], larger.state_dict()[TABLE]
    assert torch.equal(old[-3:], new[-3:]) and len(new) == 11 * 9 + 3
    there, middle = old[:-3].view(7, 7, 4), new[:-3].view(11, 9, 4)[5, 4]
    torch.testing.assert_close(middle, there[3, 3])  # distance zero stays in the middle
    flat = torch.cat([torch.full((49, 4), 0.7), old[-3:]])
    assert (beit.resize_table(flat, (4, 4), (9, 2))[:-3] - 0.7).abs().max() < 1e-6


def test_finetune_takes_it_and_a_fine_tuned_one_predicts_what_it_scored(file_of_simmim, small_npz, tmp_path):
    flags = ["--epochs", "0.2", "--batch_size", "25", "--warmup_epochs", "0", "--pool", "avg", "--out", "run"]
    output = run_script(["finetune.py", "--weights", file_of_simmim, "--data", small_npz, *flags], tmp_path)
    again = ["finetune.py", "--mode", "evaluate", "--weights", "run/best.pth", "--data", small_npz]
    score = output.split("top-1 ")[-1].split(" %")[0]
    assert f"top-1 {score} %" in run_script([*again, "--out", "again"], tmp_path)


def dense_encoder(task, model):
    cfg = transfer_seg_det.Config(task=task, model=model, patch_size=8, img_size=(32, 32), window=2,
                                  weights="none")
    return backbones.make_encoder(cfg).eval()


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
def test_segmentation_runs_the_network_on_scenes_of_any_size(file_of_simmim, size):
    encoder, model = dense_encoder("seg", "beit_nano"), ours(file_of_simmim)
    common.load_weights(encoder, file_of_simmim, ignore=("decoder", "mask_token", *encoder.unused_names))
    images, grid = torch.randn(2, 3, *size), (size[0] // 8, size[1] // 8)
    x, bias = model.prepend_cls(model.embed(images)), model.rel_pos_bias(grid)
    for block in model.blocks:
        x = block(x, bias)
    expected = x[:, 1:].transpose(1, 2).unflatten(2, grid)
    torch.testing.assert_close(encoder(images)[-1], expected, atol=1e-5, rtol=1e-5)


def test_a_detectors_windows_attend_as_small_images():
    """Three of four blocks look at 2 x 2 patches, the others at all of the scene."""
    encoder = dense_encoder("det", "beit_tiny")
    torch.nn.init.normal_(encoder.rel_pos_bias.relative_position_bias_table)
    biases = encoder.biases((4, 4))
    assert [len(bias[0]) for bias in biases] == [4, 4, 16] * 4
    scene = torch.randn(1, 4, 4, 192)
    found = encoder.blocks[0](scene.flatten(1, 2), biases[0]).unflatten(1, (4, 4))
    plain = common.Block(192, 3)
    plain.load_state_dict(encoder.blocks[0].state_dict())
    small = encoder.rel_pos_bias((2, 2))[:, 1:, 1:]
    for y in (0, 2):
        for x in (0, 2):
            window = scene[:, y : y + 2, x : x + 2].flatten(1, 2)
            there = found[:, y : y + 2, x : x + 2].flatten(1, 2)
            torch.testing.assert_close(there, plain(window, small), atol=1e-5, rtol=1e-5)
    assert encoder(torch.randn(1, 3, 32, 32))[0].shape == (1, 192, 4, 4)


def test_pre_trained_files_say_how_their_images_were_normalised():
    """BEiT's by 0.5, BEiT-v2's, with its aggregation, by ImageNet's values, which are the default."""
    state = beit.RelPosViT("nano", (32, 32), 4).state_dict() | {"lm_head.weight": torch.zeros(8, 128)}
    assert files.network_shown(state)["mean"] == (0.5,) * 3
    second = files.network_shown(state | {"cls_pt_layers.0.norm1.weight": torch.ones(128)})
    assert second["model"] == "beit_nano" and "mean" not in second
