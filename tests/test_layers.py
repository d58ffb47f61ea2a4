"""layers.py: its kNN is that of --mode knn, its probes are those of a loop."""

import csv
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from PIL import Image
from torch import nn
from torture import log

import common
import finetune
import layers

NANO = ["--weights", "none", "--img_size", "32", "--patch_size", "8", "--amp", "off", "--workers", "0"]


def table(out):
    with open(out / "layers.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("model, pools, blocks", [
    ("nano", ["cls", "avg"], list("1234")),
    ("revcol_nano", ["avg"], [f"column {i} level {j}" for i in (1, 2) for j in range(4)])])
def test_the_last_row_is_mode_knn(model, pools, blocks, small_npz, tmp_path):
    command = ["finetune.py", *NANO, "--data", small_npz, "--model", model, "--resnet_width", 8, "--mode"]
    run_script([*command, "layers", "--epochs", 2, "--out", "layers"], tmp_path)
    rows = table(tmp_path / "layers")
    assert [row["block"] for row in rows] == blocks
    for pool in pools:
        run_script([*command, "knn", "--pool", pool, "--out", pool], tmp_path)
        score = float(rows[-1][f"knn_{pool.replace('avg', 'mean')}"])
        assert score == log(tmp_path / pool)[-1]["eval/top1"]


def test_a_probe_against_a_loop():
    """BatchNorm, LARS, batches and schedule by hand, for one head of three."""
    flags = ["--mode", "layers", "--epochs", "3", "--warmup_epochs", "1", "--lr", "9", "--batch_size", "20"]
    cfg, n, B = common.parse_config(finetune.Config, finetune.presets, [*NANO, *flags]), 50, 20
    features, labels = torch.randn(n, 16) * 3 + 1, torch.arange(n) % 5
    heads, x = layers.train_heads(features, labels, [6, 4, 6], 5, cfg), features[:, 6:10]
    torch.manual_seed(0)
    W = nn.init.trunc_normal_(nn.Linear(4, 5).weight.detach(), std=0.01)
    b, mean, var, m_W, m_b = torch.zeros(5), torch.zeros(4), torch.ones(4), torch.zeros(5, 4), torch.zeros(5)
    order = np.concatenate([common.epoch_order(n, 0, epoch) for epoch in range(3)])
    for step in range(3 * n // B):
        epoch, rows = step * B / n, order[step * B : (step + 1) * B]
        lr = 9 * epoch if epoch < 1 else 4.5 * (1 + math.cos(math.pi * (epoch - 1) / 2))
        batch, target = x[rows], F.one_hot(labels[rows], 5)
        z = (batch - batch.mean(0)) / (batch.var(0, unbiased=False) + 1e-6).sqrt()
        d = ((z @ W.T + b).softmax(1) - target) / B
        m_W = 0.9 * m_W + 0.001 * W.norm() / (d.T @ z).norm() * (d.T @ z)
        m_b = 0.9 * m_b + d.sum(0)
        W, b = W - lr * m_W, b - lr * m_b
        mean, var = 0.9 * mean + 0.1 * batch.mean(0), 0.9 * var + 0.1 * batch.var(0)
    torch.testing.assert_close(heads[1](x), (x - mean) / (var + 1e-6).sqrt() @ W.T + b, rtol=1e-4, atol=1e-5)


def test_the_demo_gives_the_same_whatever_the_number_of_processes(small_npz, tmp_path):
    command = ["finetune.py", "--demo", "--mode", "layers", "--weights", "none", "--model", "nano", "--data"]
    for processes in (1, 2):
        run_script([*command, small_npz, "--epochs", 3, "--out", processes], tmp_path, processes)
    assert table(tmp_path / "1") == table(tmp_path / "2") and len(table(tmp_path / "1")) == 4
    assert Image.open(tmp_path / "1/layers.png").size == (520, 300)
