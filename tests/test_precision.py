"""Precision chapter of common.py against closed forms; the end of an update."""

import math
import types

import pytest
import torch
from torch import nn

import common


def test_warmup_and_cosine_closed_form():
    lr = [common.warmup_cosine(epoch, 2.0, 0.5, 5, 25) for epoch in (0, 2.5, 5, 10, 15, 25)]
    assert lr == pytest.approx([0, 1.0, 2.0, 0.5 + 1.5 * (1 + math.sqrt(0.5)) / 2, 1.25, 0.5])
    assert common.warmup_cosine(0, 1.0, 0.0, 0, 10) == 1.0


def test_weight_decay_and_layer_decay_groups():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 3))
    model.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 2, 2)))
    groups = common.parameter_groups(model, 0.05, ("pos_embed",), lambda name: 0 if name == "pos_embed" else int(name[0]), 0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}
    assert found == {"pos_embed": (0.0, 0.25), "0.weight": (0.05, 0.25), "0.bias": (0.0, 0.25), "1.weight": (0.0, 0.5),
                     "1.bias": (0.0, 0.5), "2.weight": (0.05, 1.0), "2.bias": (0.0, 1.0)}
    optimizer = common.adamw(groups, (0.9, 0.999))
    common.set_lr(optimizer, 4.0)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [1.0, 2.0, 4.0]


def update(gradient, loss=1.0, clip_grad=0.0):
    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.tensor(gradient)
    run = types.SimpleNamespace(stop_requested=False, bad_files=common.BadFiles(0.0, 1), world_size=1, stopping=False)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return common.finish_update(run, optimizer, scaler, {"loss": torch.tensor(loss)}, clip_grad), p.detach()


def test_update_measures_clips_and_steps():
    result, p = update([3.0, 0.0, 4.0, 0.0])
    assert result == {"loss": 1.0, "grad_norm": 5.0, "skipped": ""} and p.tolist() == [-3.0, 0.0, -4.0, 0.0]
    result, p = update([3.0, 0.0, 4.0, 0.0], clip_grad=1.0)
    assert result["grad_norm"] == 5.0 and p.norm() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("gradient, loss", [([math.nan, 0, 0, 0], 1.0), ([math.inf, 0, 0, 0], 1.0), ([1.0, 0, 0, 0], math.nan)])
def test_a_non_finite_update_is_skipped(gradient, loss):
    result, p = update(gradient, loss)
    assert result["skipped"] == "nonfinite" and not p.any()


def test_amp_choices():
    cpu = torch.device("cpu")
    assert common.amp_dtype("off", cpu) is None and common.amp_dtype("bf16", cpu) == torch.bfloat16
    assert common.amp_dtype("auto", cpu) in (None, torch.bfloat16)
    with pytest.raises(common.Refused, match="needs CUDA"):
        common.amp_dtype("fp16", cpu)
