"""draw.py: attention and its distance against slow versions, a run's curves, the command."""

import json
import math
import operator
import sys
from unittest.mock import Mock, call

import pytest
import torch
from conftest import run_script
from PIL import Image

import common
import draw
from common import ResNet50, ViT
from mae_mff import Config


def test_mean_attention_distance_against_loops():
    model, images = ViT("nano", (16, 24), 8), torch.randn(2, 3, 16, 24)
    torch.nn.init.normal_(model.blocks[1].attn.qkv.weight, std=0.2)
    to_patches, means = draw.attention_of(model, images)
    x = model.prepend_cls(model.embed(images))
    x, attn = model.blocks[1].norm1(model.blocks[0](x)), model.blocks[1].attn
    q, k, _ = attn.qkv(x).reshape(2, 7, 3, 4, 32).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / 32**0.5).softmax(-1)
    torch.testing.assert_close(draw.attention_weights(attn, x), weights)
    places = [(8 * i, 8 * j) for i in range(2) for j in range(3)]
    for head in range(4):
        total = 0.0
        for rows in weights[:, head, 1:, 1:].tolist():
            for here, row in zip(places, rows, strict=True):
                distances = [math.dist(here, there) for there in places]
                total += sum(map(operator.mul, row, distances)) / sum(row)
        assert float(means[1, head]) == pytest.approx(total / 12, rel=1e-4)
    torch.testing.assert_close(to_patches[1], weights[:, :, 0, 1:].mean(1))


def test_curves_of_a_log_with_gaps_and_of_none(tmp_path):
    draw.save_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    lines = [json.dumps({"step": i, "epoch": i / 10, "train/loss": math.nan if i == 5 else 1 / (i + 1),
                         "grad_norm": 10.0 ** (i % 4), "lr": 0.1, "time": "x"}) for i in range(1000)]
    lines += ['{"step": 3, "epo', "7", json.dumps({"step": 9, "epoch": 9, "eval/top1": 50, "eval/n": 7})]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    draw.save_curves(tmp_path)
    assert Image.open(tmp_path / "curves.png").size == (2 * draw.WIDTH, 2 * draw.HEIGHT)


def test_a_run_leaves_curves_times_and_the_command_draws_attention(unbroken, tmp_path):
    run = unbroken / "mae_mff.py"
    assert (run / "curves.png").exists()
    assert all("T" in json.loads(line)["time"] for line in (run / "log.jsonl").read_text().splitlines())
    command = ["draw.py", "--data", "shapes", "--attention"]
    output = run_script([*command, run / "encoder.pth"], tmp_path)
    assert output.count("heads") == 4 and (tmp_path / "attention_distance.png").exists()
    best = unbroken / "finetune.py/best.pth"
    assert "attention2.png" in run_script([*command, best, "--out", "attention2.png"], tmp_path)
    torch.save(ResNet50(8).state_dict(), tmp_path / "resnet.pth")
    output = run_script([*command, "resnet.pth"], tmp_path, expect=2)
    assert "holds resnet50: expected a ViT" in output and output.count("\n") == 1


def test_tensorboard_gets_the_log_if_it_is_installed(tmp_path, monkeypatch):
    board = Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    run = common.Run(Config(tensorboard=True, out=str(tmp_path)), "mae_mff")
    run.n = None
    run.load()
    run.log({"step": 3, "epoch": 0.5, "lr": 0.1, "note": "text"})
    assert board.SummaryWriter.call_args == call(tmp_path / "tensorboard", purge_step=1)
    seen = [call("step", 3, 3), call("epoch", 0.5, 3), call("lr", 0.1, 3)]
    assert run.board.add_scalar.call_args_list == seen
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(common.UserError, match="pip install tensorboard"):
        run.load()
