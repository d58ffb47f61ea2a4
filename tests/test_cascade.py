"""cascade.py: its stages against loops over boxes, one stage against torchvision's heads."""

import math

import pytest
import torch
from test_transfer import small, transfer
from torchvision.ops import box_iou

import cascade

SIZE = (64, 64)
OBJECTS = [[[4, 6, 40, 30], [20, 20, 60, 62]], [[10, 10, 30, 50]], []]  # of three images
KINDS = [[1, 3], [2], []]


def case():
    """Maps, proposals that overlap objects by all shares, targets."""
    maps = {str(i): torch.randn(3, 8, 64 // 2**i, 64 // 2**i, requires_grad=True) for i in range(4)}
    targets, proposals = [], []
    for boxes, kinds in zip(OBJECTS, KINDS, strict=True):
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        near = boxes.repeat(12, 1) + 5 * torch.randn(12 * len(boxes), 4)
        far = torch.rand(20, 4) * 28 + torch.tensor([0, 0, 32, 32])
        proposals.append(torch.cat([near, far]).clamp(0, 64))
        masks = torch.randint(0, 2, (len(boxes), *SIZE), dtype=torch.uint8)
        targets.append({"boxes": boxes, "labels": torch.tensor(kinds, dtype=torch.int64), "masks": masks})
    return maps, proposals, [SIZE] * 3, targets


def make_heads(detector="cascade"):
    """Without chance in the sample of boxes: all fit in."""
    cfg = small("det", "--channels", 8, "--rois", 512, "--detector", detector)
    heads = transfer.Detector(cfg, 3).model.roi_heads
    for head in [heads, *getattr(heads, "later", ())]:
        head.nms_thresh, head.score_thresh, head.detections_per_img = 1.0, 0.0, 10**6
    return heads


def test_one_stage_is_mask_rcnns():
    theirs = make_heads("mask_rcnn")
    ours = cascade.CascadeHeads(theirs, None, ious=(0.5,))
    predictor, repeated = ours.box_predictor, theirs.box_predictor
    repeated.cls_score.load_state_dict(predictor.cls_score.state_dict())
    with torch.no_grad():
        repeated.bbox_pred.weight.copy_(predictor.bbox_pred.weight.repeat(4, 1))
        repeated.bbox_pred.bias.copy_(predictor.bbox_pred.bias.repeat(4))
    maps, *rest, targets = case()
    found = []
    for heads in (theirs, ours):
        _, losses = heads.train()(maps, *rest, targets)
        gradients = torch.autograd.grad(sum(losses.values()), maps.values())
        found.append((losses, gradients, heads.eval()(maps, *rest)[0]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def moved(box, move, weights):
    """A box moved by the formulas of R-CNN, cut to the image."""
    (x1, y1, x2, y2), (dx, dy, dw, dh) = box.tolist(), (move / torch.tensor(weights)).tolist()
    w, h = x2 - x1, y2 - y1
    x, y, w, h = x1 + w / 2 + dx * w, y1 + h / 2 + dy * h, w * math.exp(dw), h * math.exp(dh)
    return [min(max(side, 0.0), 64.0) for side in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]


def loss_of_a_box(scores, move, box, target, iou, weights):
    """(cross-entropy, box loss, label)"""
    overlaps = box_iou(box[None], target["boxes"])[0].tolist()
    best = max(range(len(overlaps)), key=lambda i: overlaps[i], default=None)
    if best is None or overlaps[best] < iou:
        return -scores.log_softmax(0)[0], 0.0, 0
    kind, ((x1, y1, x2, y2), (a1, b1, a2, b2)) = target["labels"][best].item(), (
        box.tolist(), target["boxes"][best].tolist())
    w, h = x2 - x1, y2 - y1
    right = [(a1 + a2 - x1 - x2) / 2 / w, (b1 + b2 - y1 - y2) / 2 / h, math.log((a2 - a1) / w),
             math.log((b2 - b1) / h)]
    away = [abs(m - weight * r) for m, r, weight in zip(move.tolist(), right, weights, strict=True)]
    return -scores.log_softmax(0)[kind], sum(x * x * 4.5 if x < 1 / 9 else x - 1 / 18 for x in away), kind


@pytest.mark.parametrize("training", [True, False])
def test_stages_against_a_loop_over_boxes(training):
    """Boxes that are pooled, labels and losses of each stage; scores, boxes and labels at test."""
    heads, (maps, *rest, targets) = make_heads().train(training), case()
    seen, said, masks = [], [], []
    heads.box_roi_pool.register_forward_pre_hook(lambda pool, args: seen.append(args[1]))
    heads.mask_roi_pool.register_forward_pre_hook(lambda pool, args: masks.append(args[1]))
    for stage in (heads, *heads.later):
        stage.box_predictor.register_forward_hook(lambda module, args, output: said.append(output))
    results, losses = heads(maps, *rest, targets if training else None)
    assert len(seen) == len(said) == 3
    rows, images = [[len(x) for x in boxes] for boxes in seen], range(3)
    assert rows[0] == rows[1] == rows[2] == [len(p) + training * len(t["boxes"])
                                             for p, t in zip(rest[0], targets, strict=True)]
    positive = []
    for k, (boxes, (scores, moves)) in enumerate(zip(seen, said, strict=True)):
        weights = [(k + 1) * weight for weight in (10, 10, 5, 5)]
        assert torch.equal(moves[:, :4], moves[:, -4:])
        scores, moves = scores.split(rows[0]), moves[:, :4].split(rows[0])
        after = [torch.tensor([moved(b, m, weights) for b, m in zip(boxes[i], moves[i], strict=True)])
                 for i in images]
        if k < 2:
            torch.testing.assert_close(seen[k + 1], after, rtol=1e-4, atol=1e-3)
            assert not any(x.requires_grad for x in seen[k + 1])
        if training:
            found = [[loss_of_a_box(*row, targets[i], (0.5, 0.6, 0.7)[k], weights)
                      for row in zip(scores[i], moves[i], boxes[i], strict=True)] for i in images]
            for j, name in enumerate(("classifier", "box_reg")):
                mean = sum(row[j] for image in found for row in image) / sum(rows[0])
                torch.testing.assert_close(losses[f"loss_{name}" + f"_{k + 1}" * (k > 0)],
                                           torch.as_tensor(mean), rtol=1e-3, atol=1e-5)
            positive.append([[bool(row[2]) for row in image] for image in found])
    if training:  # masks learn from the first stage's boxes alone
        assert all(torch.equal(masks[0][i], seen[0][i][torch.tensor(positive[0][i])]) for i in images)
        assert positive[0] != positive[1] != positive[2]
        return
    for i in images:
        share = sum(scores.split(rows[0])[i].softmax(1) for scores, _ in said) / 3
        order = share[:, 1:].flatten().argsort(descending=True)
        big = (after[i][:, 2:] - after[i][:, :2] > 0.01).all(1)
        order = order[big[order // 3]]
        torch.testing.assert_close(results[i]["scores"], share[:, 1:].flatten()[order])
        assert torch.equal(results[i]["labels"], order % 3 + 1)
        torch.testing.assert_close(results[i]["boxes"], after[i][order // 3], rtol=1e-4, atol=1e-3)
        assert torch.equal(masks[0][i], results[i]["boxes"])


def test_gradients_of_pooled_boxes_are_divided_by_three(monkeypatch):
    heads, (maps, *rest) = make_heads().train(), case()
    heads.mask_roi_pool = heads.mask_head = heads.mask_predictor = None
    found = []
    for _ in range(2):
        gradients = torch.autograd.grad(sum(heads(maps, *rest)[1].values()),
                                        [*maps.values(), *heads.parameters()])
        found.append((gradients[:4], gradients[4:]))
        monkeypatch.setattr(torch.Tensor, "register_hook", lambda x, hook: None)
    (divided, own), (whole, same) = found
    torch.testing.assert_close([3 * x for x in divided], [*whole])
    torch.testing.assert_close(own, same)
