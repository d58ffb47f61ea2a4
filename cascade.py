"""Cascade R-CNN's box heads for torchvision's Mask R-CNN: transfer_seg_det.py --task det --detector cascade.

Cascade R-CNN: Delving into High Quality Object Detection, Cai and Vasconcelos, CVPR 2018, arXiv 1712.00726

A box head that learns from boxes of an overlap of .5 with their object tells a good box badly from a fair
one; one that asks for .7 finds too few to learn from. A cascade has three heads, and each learns from the
boxes that the one before has moved: these are better, so the next can ask for more.

    boxes_1     = the proposals; in training a sample of them and the objects' own boxes
    x_k         = RoIAlign of boxes_k; its gradient is divided by the number of stages
    s_k, d_k    = predictor_k(head_k(x_k))                                        (N, classes + 1), (N, 4)
    labels_k    = class of the nearest object if it overlaps boxes_k by IOUS[k] or more, else 0, background
    loss        = sum over k of cross-entropy(s_k, labels_k) + box loss of d_k, each a mean over the N boxes
    boxes_{k+1} = boxes_k moved by d_k / (k * WEIGHTS), cut to the image, without gradient
    test        = mean over k of softmax(s_k), with the boxes that the last stage has moved

Boxes are sampled once, before the first stage. Masks have one head. It learns from the first stage's boxes,
and at test it sees the last one's.

Where the paper is silent this follows detectron2, whose ViTDet RevColV2's supplement follows: every stage has
weight 1 (mmdetection: 1, .5, .25, and no division of gradients), a box moves alike for all classes. Our
choice: a box that is empty once cut to the image stays, as background. RevColV2 prints none of this.
"""

import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.ops import clip_boxes_to_image

IOUS = (0.5, 0.6, 0.7)  # the least overlap of a box with its object, by stage
WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of x, y, width, height in the first stage; times 2 and 3 in the next


class Predictor(FastRCNNPredictor):
    """Scores of all classes and one move of the box, in torchvision's form: repeated for every class."""

    def __init__(self, inputs, classes):
        super().__init__(inputs, classes)
        self.bbox_pred = nn.Linear(inputs, 4)

    def forward(self, x):  # (N, inputs) -> (N, classes), (N, 4 * classes)
        scores, moves = super().forward(x)
        return scores.float(), moves.float().repeat(1, scores.shape[1])  # half precision would round boxes


class CascadeHeads(RoIHeads):
    """heads: of a Mask R-CNN or Faster R-CNN, whose settings and mask head stay. make_head: makes a box head
    like its own. This is the first stage; of `later`, the next ones, the parts for boxes are used."""

    def __init__(self, heads, make_head, ious=IOUS):
        def settings(stage, box_head):
            linear, sampler = heads.box_predictor.cls_score, heads.fg_bg_sampler
            return (heads.box_roi_pool, box_head, Predictor(linear.in_features, linear.out_features),
                    ious[stage], ious[stage], sampler.batch_size_per_image, sampler.positive_fraction,
                    tuple((stage + 1) * weight for weight in WEIGHTS),
                    heads.score_thresh, heads.nms_thresh, heads.detections_per_img)

        super().__init__(*settings(0, heads.box_head), heads.mask_roi_pool, heads.mask_head,
                         heads.mask_predictor)
        self.later = nn.ModuleList(RoIHeads(*settings(i, make_head())) for i in range(1, len(ious)))

    def forward(self, features, proposals, image_shapes, targets=None):
        """features: {name: map}; proposals: [(N, 4)], image_shapes: [(height, width)], targets: [{"boxes",
        "labels", "masks"}], an entry each per image. Returns [], {name: loss} in training; else [{"boxes",
        "labels", "scores", "masks"}], {}."""
        stages, losses, shares, boxes = (self, *self.later), {}, [], proposals
        if self.training:
            boxes, matched, labels, moves = self.select_training_samples(proposals, targets)
            sampled, kinds = boxes, labels
        for number, stage in enumerate(stages, start=1):
            x = self.box_roi_pool(features, boxes, image_shapes)
            if x.requires_grad:
                x.register_hook(lambda gradient: gradient / len(stages))
            scores, found = stage.box_predictor(stage.box_head(x))
            if self.training:
                end = f"_{number}" if number > 1 else ""
                losses[f"loss_classifier{end}"], losses[f"loss_box_reg{end}"] = fastrcnn_loss(
                    scores, found, labels, moves)
            else:
                shares.append(scores.softmax(1))
            if stage is not stages[-1]:
                boxes = refine(stage.box_coder, found, boxes, image_shapes)
                if self.training:
                    labels, moves = box_targets(stages[number], boxes, targets)
        if self.training:
            return [], losses | (self.mask_loss(features, sampled, image_shapes, targets, matched, kinds)
                                 if self.has_mask() else {})
        logits = torch.stack(shares).mean(0).log()  # what postprocess_detections takes the softmax of
        parts = stages[-1].postprocess_detections(logits, found, boxes, image_shapes)
        names = ("boxes", "scores", "labels")
        if self.has_mask():
            names, logits = (*names, "masks"), self.mask_logits(features, parts[0], image_shapes)
            parts = (*parts, maskrcnn_inference(logits, parts[2]))
        return [dict(zip(names, image, strict=True)) for image in zip(*parts, strict=True)], {}

    def mask_logits(self, features, boxes, image_shapes):
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))

    def mask_loss(self, features, boxes, image_shapes, targets, matched, labels):
        """{"loss_mask": Mask R-CNN's}, of the boxes that have an object."""
        objects = [torch.where(kinds > 0)[0] for kinds in labels]
        boxes, matched = ([x[i] for x, i in zip(xs, objects, strict=True)] for xs in (boxes, matched))
        masks, kinds = ([target[name] for target in targets] for name in ("masks", "labels"))
        logits = self.mask_logits(features, boxes, image_shapes)
        return {"loss_mask": maskrcnn_loss(logits, boxes, masks, kinds, matched)}


def refine(coder, moves, boxes, image_shapes):
    """[(N, 4)] of each image, moved by `moves` (all boxes, 4 * classes) as `coder` reads them, cut to the
    image; without gradient."""
    moved = coder.decode(moves[:, :4].detach(), boxes).view(-1, 4).split([len(x) for x in boxes])
    return [clip_boxes_to_image(x, shape) for x, shape in zip(moved, image_shapes, strict=True)]


def box_targets(stage, boxes, targets):
    """What `stage` is to say of boxes [(N, 4)]: labels [(N,)], 0 = background; moves to the objects [(N, 4)],
    which count where there is one."""
    truth, kinds = ([target[name] for target in targets] for name in ("boxes", "labels"))
    matched, labels = stage.assign_targets_to_proposals(boxes, truth, kinds)
    nearest = [(objects if len(objects) else objects.new_zeros(1, 4))[i]
               for objects, i in zip(truth, matched, strict=True)]
    return labels, stage.box_coder.encode(nearest, boxes)
