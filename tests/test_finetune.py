"""finetune.py: optimizer, layer numbering, augmentation, kNN and counting against slow versions."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import finetune


def test_lars_against_its_formula():
    p, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    optimizer = finetune.LARS([p, b], weight_decay=0.1)
    common.set_lr(optimizer, 0.5)
    expected, m = [p.detach().clone(), b.detach().clone()], [0.0, 0.0]
    for _ in range(3):
        gradients = [torch.randn(4, 3), torch.randn(4)]
        p.grad, b.grad = (g.clone() for g in gradients)
        optimizer.step()
        g = gradients[0] + 0.1 * expected[0]
        gradients[0] = g * 0.001 * math.sqrt((expected[0] ** 2).sum()) / math.sqrt((g**2).sum())
        for i in range(2):
            m[i] = 0.9 * m[i] + gradients[i]
            expected[i] = expected[i] - 0.5 * m[i]
    torch.testing.assert_close(p.detach(), expected[0])
    torch.testing.assert_close(b.detach(), expected[1])


def test_lars_without_trust_scaling_where_a_norm_is_zero():
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = finetune.LARS([p])
    common.set_lr(optimizer, 1.0)
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(p.detach(), -torch.ones(2, 2))


def classifier(**values):
    defaults = {"model": "nano", "img_size": (32, 32), "patch_size": 8, "in_chans": 3, "drop_path": 0.0,
                "head_init": 0.001}
    return finetune.Classifier(types.SimpleNamespace(**(defaults | values)), 10)


def test_layer_ids_and_scales_of_vit_base():
    model = classifier(model="base", patch_size=16, drop_path=0.1, pool="avg", mode="finetune")
    groups = common.parameter_groups(model, 0.05, ("pos_embed", "cls_token"), model.layer, 0.75)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == len(names)  # everything learns, positions included
    for name, exponent in (("pos_embed", 13), ("patch_embed.proj.weight", 13), ("blocks.0.norm1.bias", 12),
                           ("blocks.11.mlp.fc2.weight", 1), ("fc_norm.weight", 0), ("head.weight", 0)):
        assert found[name]["lr_scale"] == pytest.approx(0.75**exponent)
    undecayed = {name for name, group in found.items() if group["weight_decay"] == 0}
    assert undecayed == {name for name, p in model.named_parameters() if p.ndim == 1} | {"pos_embed", "cls_token"}
    assert [block.drop_path for block in model.blocks] == pytest.approx([0.1 * i / 11 for i in range(12)])


def test_probe_trains_the_head_alone():
    model = classifier(pool="cls", mode="linear")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    images = torch.randn(6, 3, 32, 32)
    features = model.features(images)
    torch.testing.assert_close(features, common.ViT.forward(model, images)[:, 0])
    normalised = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(model.head(features), normalised @ model.head[1].weight.T, atol=1e-4, rtol=1e-4)


def test_knn_against_a_loop():
    torch.manual_seed(1)
    queries, features, labels = torch.randn(7, 5), torch.randn(30, 5), torch.randint(0, 4, (30,))
    scores = finetune.knn_scores(queries, F.normalize(features, dim=1), labels, 4, k=6, temperature=0.1)
    for q in range(7):
        cosine = [F.cosine_similarity(queries[q], features[j], dim=0).item() for j in range(30)]
        expected = [0.0] * 4
        for j in sorted(range(30), key=lambda j: -cosine[j])[:6]:
            expected[labels[j]] += math.exp(cosine[j] / 0.1)
        nearest = math.exp(max(cosine) / 0.1)  # weights are those of the nearest, so that no temperature overflows
        torch.testing.assert_close(scores[q], torch.tensor(expected) / nearest, rtol=1e-4, atol=1e-4)
    cold = finetune.knn_scores(queries, F.normalize(features, dim=1), labels, 4, k=6, temperature=1e-4)
    one = finetune.knn_scores(queries, F.normalize(features, dim=1), labels, 4, k=1, temperature=1.0)
    assert torch.isfinite(cold).all() and torch.equal(cold.argmax(1), one.argmax(1))


@pytest.mark.parametrize("n, world_size", [(10, 3), (7, 2), (1, 2), (600, 1)])
def test_evaluation_counts_every_sample_once(n, world_size):
    runs = [types.SimpleNamespace(rank=rank, world_size=world_size) for rank in range(world_size)]
    keys = [key for run in runs for batch in finetune.own_share(n, run) for key in batch]
    assert sorted(keys) == [(0, i) for i in range(n)]


def test_accuracy_by_hand():
    run = types.SimpleNamespace(device=torch.device("cpu"), amp_dtype=None, world_size=1)
    scores = torch.eye(7)[[0, 1, 2, 3, 4]] - torch.arange(7) * 1e-3  # right at 0 to 4, then in index order
    batches = [{"label": torch.tensor([0, 1, 6]), "x": scores[:3]}, {"label": torch.tensor([2, 4]), "x": scores[3:]}]
    result = finetune.evaluate(lambda x: x, batches, lambda batch: batch["x"], run)
    assert result == {"eval/top1": 60.0, "eval/top5": 80.0, "eval/n": 5}


def test_random_erasing_fills_boxes_of_the_stated_area():
    torch.manual_seed(0)
    images = torch.full((500, 3, 64, 48), 9.0)
    out = finetune.random_erasing(images, 0.25)
    changed = (out != 9).all(1)
    share = changed.float().mean((1, 2))
    assert 0.18 < (share > 0).float().mean() < 0.32 and share.max() < 0.36
    for box in changed[share > 0]:
        rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
        assert box.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert abs(out[out != 9].mean()) < 0.05 and torch.equal(finetune.random_erasing(images, 0.0), images)


def test_mixing_keeps_labels_in_proportion():
    mix = finetune.mixer(types.SimpleNamespace(mixup=0.0, cutmix=1.0), 4)
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 32, 32), torch.arange(4)
    for _ in range(5):
        mixed, soft = mix(images.clone(), labels)
        for b in range(4):
            for c in range(4):
                assert (mixed[b] == c).float().mean() == pytest.approx(soft[b, c].item(), abs=1e-5)
    assert finetune.mixer(types.SimpleNamespace(mixup=0.0, cutmix=0.0), 4) is None
