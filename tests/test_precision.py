"""Precision chapter of common.py against closed forms; one update, and one that is not finite."""

import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD

import common
import mae_mff


def test_warmup_and_cosine_closed_form():
    lr = [common.warmup_cosine(epoch, 2.0, 0.5, 5, 25) for epoch in (0, 2.5, 5, 10, 15, 25)]
    assert lr == pytest.approx([0, 1.0, 2.0, 0.5 + 1.5 * (1 + math.sqrt(0.5)) / 2, 1.25, 0.5])
    assert common.warmup_cosine(0, 1.0, 0.0, 0, 10) == 1.0


def test_weight_decay_and_layer_decay_groups():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 3))
    model.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 2, 2)))
    layers = {"pos_embed": 0, "0": 0, "1": 1, "2": 2}
    groups = common.parameter_groups(model, 0.05, ("pos_embed",), lambda n: layers[n.split(".")[0]], 0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}
    assert found == {"pos_embed": (0.0, 0.25), "0.weight": (0.05, 0.25), "0.bias": (0.0, 0.25),
                     "1.weight": (0.0, 0.5), "1.bias": (0.0, 0.5),
                     "2.weight": (0.05, 1.0), "2.bias": (0.0, 1.0)}
    optimizer = common.adamw(groups, (0.9, 0.999))
    common.set_lr(optimizer, 4.0)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [1.0, 2.0, 4.0]


class Toy(nn.Module):
    """loss = 1 + p g, so that the gradient is g times `factor`."""

    def __init__(self):
        super().__init__()
        self.p, self.factor = nn.Parameter(torch.zeros(4)), 1.0
        self.p.register_hook(lambda gradient: gradient * self.factor)

    def forward(self, gradient, noise):
        loss = 1 + (self.p * gradient).sum()
        return loss, {"loss": loss.detach()}


def update(run, model, *gradients, scaler=None):
    """mae_mff.py's, with a micro-batch for each of the gradients."""
    scaler = scaler or GradScaler("cpu", enabled=False)
    run.n, run.steps, run.micro_batch, run.accum_steps = 100, 100, 1, len(gradients)
    batches = iter([(torch.tensor(gradient), torch.zeros(1), torch.arange(1)) for gradient in gradients])
    return mae_mff.train_step(model, batches, SGD(model.parameters(), 1.0), scaler, run)


@pytest.fixture
def run(tmp_path):
    return common.Run(mae_mff.Config(out=str(tmp_path), batch_size=10, log_every=1), "test")


def test_update_averages_measures_clips_and_steps(run):
    model = Toy()
    assert update(run, model, [6.0, 0.0, 0.0, 0.0], [0.0, 0.0, 8.0, 0.0]) == {"loss": 1.0, "grad_norm": 5.0}
    assert model.p.tolist() == [-3.0, 0.0, -4.0, 0.0]
    run.cfg.clip_grad, model = 1.0, Toy()
    assert update(run, model, [3.0, 0.0, 4.0, 0.0])["grad_norm"] == 5.0
    assert model.p.detach().norm() == pytest.approx(1.0, rel=1e-4)


def test_an_fp16_overflow_halves_the_scale_and_thirty_in_a_row_end_the_run(run, monkeypatch):
    run.amp_dtype, model, scaler = torch.float16, Toy(), GradScaler("cpu", init_scale=2.0**16)
    monkeypatch.setattr(run, "autocast", torch.enable_grad)  # fp16 in name: a CPU has none
    for model.factor in (1.0, math.inf, 1.0):
        run.end_update(update(run, model, [1.0] * 4, scaler=scaler), 1.0)
    assert scaler.get_scale() == 2.0**15 and model.p.tolist() == [-2.0] * 4
    assert run.saved["skipped_overflow"] == 1 and run.saved["skipped_nonfinite"] == 0
    model.factor = math.inf
    with pytest.raises(common.UserError) as stop:
        for _ in range(40):
            run.end_update(update(run, model, [1.0] * 4, scaler=scaler), 1.0)
    assert stop.value.code == 3 and run.step == 33 and (run.out / "nonfinite_33.json").exists()


def test_amp_choices():
    cpu = torch.device("cpu")
    assert common.amp_dtype("off", cpu) is None and common.amp_dtype("bf16", cpu) == torch.bfloat16
    assert common.amp_dtype("auto", cpu) in (None, torch.bfloat16)
    with pytest.raises(common.UserError, match="needs CUDA"):
        common.amp_dtype("fp16", cpu)
