"""transfer_mask2former.py: decoders, matching, losses against transformers'. Runs are in test_transfer.py."""

import re

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

import common
import transfer_data as data
import transfer_mask2former as m2f


def config(*words):
    return common.parse_config(m2f.Config, m2f.presets, ["--weights", "none", *map(str, words)])


def grid_of_places(*shape, **_):
    """In place of torch.rand: the same places for everything."""
    return (torch.arange(2 * shape[1]) * 0.618034 % 1).view(1, -1, 2).repeat(shape[0], 1, 1)


# ---- against transformers


@pytest.fixture(scope="module")
def theirs():
    """(modelling file, configuration, network) of a small Mask2Former without its encoder"""
    library = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    from transformers import Mask2FormerConfig, SwinConfig

    swin = SwinConfig(embed_dim=16, depths=[1] * 4, num_heads=[1] * 4,
                      out_features=[f"stage{i}" for i in range(1, 5)])
    settings = Mask2FormerConfig(
        backbone_config=swin, feature_size=256, mask_feature_size=256, hidden_dim=256, dim_feedforward=2048,
        encoder_feedforward_dim=1024, encoder_layers=2, decoder_layers=5, num_queries=20, num_labels=7,
        train_num_points=200)
    torch.manual_seed(1)
    model = library.Mask2FormerForUniversalSegmentation(settings).eval()
    for name, parameter in model.named_parameters():  # also what starts as 0
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        else:  # offsets of pixels; factors of norms; biases
            low, high = (-2, 2) if "offsets" in name else (0.5, 1.5) if "weight" in name else (-0.2, 0.2)
            torch.nn.init.uniform_(parameter, low, high)
    return library, settings, model


NAMES = (  # theirs -> ours; in_proj is three layers in one
    (r"model\.pixel_level_module\.decoder\.", "pixel_decoder."),
    (r"model\.transformer_module\.(decoder\.)?", ""),
    (r"input_projections\.", "project."),
    (r"adapter_1", "lateral"), (r"layer_1", "smooth"), (r"mask_projection", "pixels"),
    (r"encoder\.layers\.(\d+)\.self_attn\.", r"layers.\1.attention."),
    (r"sampling_offsets", "offsets"), (r"attention_weights", "weights"), (r"value_proj", "value"),
    (r"output_proj", "proj"),
    (r"(pixel_decoder.*)encoder\.layers\.(\d+)\.self_attn_layer_norm", r"\1layers.\2.norms.0"),
    (r"(pixel_decoder.*)encoder\.layers\.(\d+)\.final_layer_norm", r"\1layers.\2.norms.1"),
    (r"encoder\.layers", "layers"),
    (r"cross_attn_layer_norm", "norms.0"), (r"self_attn_layer_norm", "norms.1"),
    (r"final_layer_norm", "norms.2"),
    (r"\.fc1\.", ".mlp.0."), (r"\.fc2\.", ".mlp.2."),
    (r"self_attn\.", "own."), (r"cross_attn\.", "masked."), (r"\.(\w)_proj\.", r".\1."),
    (r"out_proj", "proj"),
    (r"queries_embedder\.weight", "query_embed"), (r"queries_features\.weight", "query"),
    (r"^layernorm", "norm"), (r"level_embed\.weight", "level_embed"), (r"class_predictor", "classify"),
    (r"mask_predictor\.mask_embedder\.(\d)\.0", lambda found: f"embed.{2 * int(found[1])}"),
)


def translated(weights):
    found = {}
    for name, value in weights.items():
        if "pixel_level_module.encoder" in name or "criterion" in name:
            continue
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        if "in_proj" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                found[re.sub("in_proj_", f"{letter}.", name)] = part
        else:
            found[name] = value
    return found


@torch.no_grad()
def test_decoders_equal_those_of_transformers(theirs):
    _, settings, model = theirs
    cfg = config("--channels", 256, "--queries", 20, "--pixel_layers", 2, "--layers", 4)
    head = m2f.Mask2FormerHead([16, 32, 64, 128], cfg, 7).eval()
    head.load_state_dict(translated(model.state_dict()))
    maps = [torch.randn(2, 16 * 2**i, 40 // 2**i, 24 // 2**i) for i in range(4)]
    expected = model.model.pixel_level_module.decoder(maps)
    pixels, memories, grids = head.pixel_decoder(maps)
    torch.testing.assert_close(pixels, expected.mask_features, rtol=1e-3, atol=1e-4)
    for x, grid, right in zip(memories, grids, expected.multi_scale_features, strict=True):
        torch.testing.assert_close(x.mT.unflatten(2, grid), right, rtol=1e-3, atol=1e-4)
    right = model.model.transformer_module(expected.multi_scale_features, expected.mask_features)
    found = head(maps)
    assert len(found) == 5
    visible = [m2f.attended(masks, grids[i % 3]) for i, (_, masks) in enumerate(found[:-1])]
    shares = torch.cat([x.float().mean(2).flatten() for x in visible])
    assert 0.2 < shares.mean() < 0.95  # the masks matter
    for (classes, masks), hidden, right_masks in zip(
            found, right.intermediate_hidden_states, right.masks_queries_logits, strict=True):
        torch.testing.assert_close(masks, right_masks, rtol=1e-3, atol=1e-3)
        right_classes = model.class_predictor(hidden.transpose(0, 1))
        torch.testing.assert_close(classes, right_classes, rtol=1e-3, atol=1e-3)


def outputs_and_labels():
    """Of two outputs and three images with 5, 2 and no classes; where no label is, there is IGNORE."""
    outputs = [(torch.randn(3, 20, 8, requires_grad=True), 3 * torch.randn(3, 20, 8, 10)) for _ in range(2)]
    labels = torch.randint(0, 5, (3, 32, 40))
    labels[1] = torch.where(labels[1] < 2, 6, 3)
    labels[2] = data.IGNORE
    labels[:, :5] = data.IGNORE
    samples = [{"index": i, "bad": (), "image": torch.zeros(3, 1, 1), "target": x.to(torch.uint8)}
               for i, x in enumerate(labels)]
    batch = m2f.collate_classes(samples)
    assert batch["classes"].tolist() == [[0, 1, 2, 3, 4], [3, 6, -1, -1, -1], [-1] * 5]
    return outputs, batch["target"].long(), batch["classes"]


def test_matching_and_losses_equal_those_of_transformers(theirs, monkeypatch):
    library, _, model = theirs
    outputs, labels, classes = outputs_and_labels()
    kinds = [row[row >= 0] for row in classes]
    masks = [(x == kind[:, None, None]).float() for x, kind in zip(labels, kinds, strict=True)]
    monkeypatch.setattr(torch, "rand", grid_of_places)
    stack = (labels[:, None] == classes[..., None, None]).float()
    found = m2f.match(outputs, stack, classes, 200)
    criterion, expected = model.criterion, 0.0
    for (logits, x), query in zip(outputs, found, strict=True):
        for image, (queries, targets) in enumerate(criterion.matcher(x, logits, masks, kinds)):
            assert dict(zip(targets.tolist(), queries.tolist(), strict=True)) == {
                i: q for i, q in enumerate(query[image].tolist()) if q < 20}
        parts = criterion(x, logits, masks, kinds)
        expected += 2 * parts["loss_cross_entropy"] + 5 * parts["loss_mask"] + 5 * parts["loss_dice"]
    loss, terms = m2f.losses(outputs, labels, classes, 200)
    torch.testing.assert_close(loss, expected)
    right = {"class": parts["loss_cross_entropy"], "mask": parts["loss_mask"], "dice": parts["loss_dice"]}
    torch.testing.assert_close(terms, right)


# ---- what transformers does not say


def test_matching_against_all_pixels_and_what_cannot_be_matched():
    """A mask's exact costs, on many places; more classes than queries; NaN."""
    logits, x, labels = torch.randn(1, 3, 6), 4 * torch.randn(1, 3, 4, 4), torch.arange(64).view(1, 8, 8) % 5
    classes = torch.arange(5)[None]
    masks = (labels[:, None] == classes[..., None, None]).float()
    places = torch.cartesian_prod(*[(torch.arange(240) + 0.5) / 240] * 2)[None]
    big, truth = m2f.sample(x, places)[0], m2f.sample(masks, places)[0]
    cost = torch.zeros(3, 5)
    for q in range(3):
        for t in range(5):
            p = big[q].sigmoid()
            dice = 1 - (2 * (p * truth[t]).sum() + 1) / (p.sum() + truth[t].sum() + 1)
            cost[q, t] = 5 * F.binary_cross_entropy_with_logits(big[q], truth[t]) + 5 * dice
            cost[q, t] -= 2 * logits[0, q].softmax(0)[t]
    queries, targets = linear_sum_assignment(cost)
    expected = torch.full((5,), 3)
    expected[targets] = torch.from_numpy(queries)
    assert torch.equal(m2f.match([(logits, x)], masks, classes, 100_000)[0, 0], expected)
    assert m2f.losses([(logits, x)], labels, classes, 50)[0].isfinite()
    assert m2f.losses([(logits * torch.nan, x * torch.nan)], labels, classes, 50)[0].isnan()


@pytest.mark.parametrize("model", ["nano", "resnet50", "revcol_nano"])
def test_every_encoder_learns_and_scores_are_the_sum_over_queries(model):
    cfg = config("--demo", "--model", model, "--resnet_width", 8, "--channels", 32)
    net = m2f.make_model(cfg, 11).train()
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(0, 3, (2, 64, 96))
    classes = torch.tensor([[0, 1, 2]] * 2)
    loss, terms = net(images, (labels, classes))
    loss.backward()
    assert terms.keys() == {"loss", "class", "mask", "dice"} and terms["loss"].item() == loss.item()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []  # or DDP would hang
    nothing = torch.full_like(labels, data.IGNORE), torch.full((2, 1), -1)
    loss, terms = net(images, nothing)
    assert loss.isfinite() and terms["mask"] == terms["dice"] == 0
    net.eval()
    with torch.no_grad():
        (scores,), (logits, masks) = net.scores(images), net.head(net.maps(images))[-1]
    masks = F.interpolate(masks, (64, 96), mode="bilinear").sigmoid()
    expected = sum(logits[:, q].softmax(1)[:, :-1, None, None] * masks[:, q, None] for q in range(20))
    torch.testing.assert_close(scores, expected)


def test_settings():
    cfg = config()
    assert (cfg.queries, cfg.layers, cfg.pixel_layers, cfg.points, cfg.channels) == (100, 9, 6, 12_544, 256)
    assert (cfg.lr, cfg.power, cfg.weight_decay, cfg.clip_grad) == (1e-4, 0.9, 0.05, 0.01)
    paper = {"iters": 160_000, "lr": 2e-5, "batch_size": 16, "drop_path": 0.3, "layer_decay": 0.9}
    assert paper.items() <= vars(config("--recipe", "revcol")).items()
    text = common.make_parser(m2f.Config).format_help()  # fails at a field without a comment
    assert "--queries" in text and not {"--rois", "--head", "--window"} & set(re.findall(r"--\w+", text))
