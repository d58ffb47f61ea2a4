"""revcol_v2.py: columns against a slow version on maps, inversion, leakage, memory, counts, read-outs."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import common
import revcol_v2 as revcol
from revcol_v2 import PYRAMID, RevColV2


def pretraining(*words):
    words = ["--demo", "--amp", "off", *map(str, words)]
    return revcol.MaskedRevCol(common.parse_config(revcol.Config, revcol.presets, words))


def randomised(model):
    """Values that are not those of the start: biases, LayerNorms, tokens, scales of both signs."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.3, 0.9)
        if name.endswith(".a"):
            parameter.data *= torch.where(torch.rand_like(parameter) < 0.5, -1.0, 1.0)
    return model


def position_maps(channels, grid, sides=(4, 2, 1, 1)):
    """The sine-cosine table of each level's own grid, as a map."""
    sizes = [(grid[0] * side, grid[1] * side) for side in sides]
    tables = [common.sincos_pos_embed(C, size)[:, 1:] for C, size in zip(channels, sizes, strict=True)]
    return [x.transpose(1, 2).unflatten(2, size) for x, size in zip(tables, sizes, strict=True)]


@pytest.mark.parametrize("p, grid", [(4, (8, 8)), (8, (2, 5)), (16, (3, 2))])
def test_cells_hold_the_pixels_of_their_place(p, grid):
    h, w = grid
    images = torch.randn(2, 3, h * p, w * p)
    cells, target = revcol.to_cells(images, p), revcol.cell_target(images, p, normalised=True)
    assert torch.equal(revcol.from_cells(cells, p, grid), images)
    target = revcol.from_cells(target, p, grid)
    for n in range(h * w):
        i, j = n // w * p, n % w * p
        own, found = (x[:, :, i : i + p, j : j + p].flatten(1) for x in (images, target))
        assert torch.equal(cells[:, n].sort().values, own.sort().values)
        variance = (own - own.mean(1, True)).square().sum(1, True) / (own.shape[1] - 1)
        torch.testing.assert_close(found, (own - own.mean(1, True)) / (variance + 1e-6).sqrt())
    # The 16 positions are 4 x 4 squares of pixels; `to_map` puts them, and the 4 of level 1, where they are.
    q = p // 4
    squares = images.unfold(2, q, q).unfold(3, q, q).permute(0, 4, 5, 1, 2, 3).flatten(1, 3)
    tokens = revcol.split_cells(cells, 16)
    assert torch.equal(revcol.to_map(tokens, 16, grid), squares)
    means = revcol.to_map(tokens.unflatten(1, (-1, 4)).mean(2), 4, grid)
    torch.testing.assert_close(means, F.avg_pool2d(squares, 2))
    for k, expected in zip(PYRAMID, position_maps((16,) * 4, grid), strict=True):
        assert torch.equal(revcol.to_map(revcol.level_pos_embed(16, k, grid), k, grid), expected)


def test_loss_is_the_mean_over_hidden_cells():
    model = pretraining("--mask_ratio", 0.5, "--img_size", "32,48", "--patch_size", 8)
    images, noise = torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    pred, mask = model.predict(images, noise)
    target, hidden = revcol.to_cells(images, 8), mask.nonzero().tolist()
    expected = sum((pred[b, i] - target[b, i]).square().mean() for b, i in hidden) / 24
    torch.testing.assert_close(model(images, noise)[0], expected)


def slow_link(link, x, joined, copied):
    """On maps (B, C, h, w): a convolution over `joined` x `joined`, nearest enlargement by `copied`."""
    kernel = link.proj.weight.unflatten(1, (joined, joined, -1)).permute(0, 3, 1, 2)
    x = F.conv2d(x, kernel, link.proj.bias, stride=joined)
    x = link.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return F.interpolate(x, scale_factor=copied)


def slow_unit(unit, level, lower, upper, before, flat):
    x = 0 if level or lower is None else lower  # the stem
    if level and lower is not None:
        x = x + slow_link(unit.down, lower, 2 if level < 3 and not flat else 1, 1)
    if upper is not None:
        x = x + slow_link(unit.up, upper, 1, 2 if level < 2 and not flat else 1)
    tokens = x.flatten(2).transpose(1, 2)
    for block in unit.blocks:
        if level >= 2 or flat:
            tokens = tokens + block.attn(block.norm1(tokens))
            tokens = tokens + block.mlp(block.norm2(tokens))
        else:
            tokens = torch.cat([t + block.mlp(block.norm(t)) for t in tokens.split(1, dim=1)], dim=1)
    x = tokens.transpose(1, 2).unflatten(2, x.shape[2:])
    return x if before is None else x + unit.a.view(1, -1, 1, 1) * before


def slow_column(column, before, stem=None, flat=False):
    x = [None] * 4
    above, below = (x, before) if stem is None else (before, x)
    for level in (3, 2, 1, 0) if stem is None else (0, 1, 2, 3):
        lower, upper = below[level - 1] if level else stem, above[level + 1] if level < 3 else None
        x[level] = slow_unit(column.units[str(level)], level, lower, upper, before[level], flat)
    return x


@torch.no_grad()
@pytest.mark.parametrize("size, columns, built_for", [
    ("tiny", 1, (16, 24)), ("tiny", 2, (16, 24)), ("tiny", 3, (32, 32)), ("tiny_flat", 2, (32, 32))])
def test_columns_against_their_equations_on_maps(size, columns, built_for):
    model, flat = randomised(RevColV2(size, built_for, 8, columns=columns)).eval(), size == "tiny_flat"
    images, grid, close = torch.randn(2, 3, 16, 24), (2, 3), {"rtol": 1e-4, "atol": 1e-4}
    sides, q = ((1, 1, 1, 1), 8) if flat else ((4, 2, 1, 1), 2)
    kernel = torch.stack([revcol.from_cells(row.view(1, 1, -1), 8, (1, 1))[0] for row in model.stem.weight]
                         ) if flat else model.stem.weight.unflatten(1, (2, 2, 3)).permute(0, 3, 1, 2)
    tables = position_maps(model.channels, grid, sides)
    stem, x = F.conv2d(images, kernel, model.stem.bias, stride=q) + tables[0], [None] * 4
    for column in model.bottom_up:
        x = slow_column(column, x, stem, flat)
    for level, tokens in enumerate(model.encode(images)):
        torch.testing.assert_close(revcol.to_map(tokens, model.per_cell[level], grid), x[level], **close)
    x = [tokens + table for tokens, table in zip(x, tables, strict=True)]
    for column in model.top_down:
        x = slow_column(column, x, flat=flat)
    fine = [F.interpolate(x[level], scale_factor=(4, 2)[level] // sides[level]) for level in (0, 1)]
    expected = [*fine, x[2], F.max_pool2d(x[3], 2, ceil_mode=True)]
    torch.testing.assert_close(model.maps(images), expected, **close)
    torch.testing.assert_close(model.features(images), x[3].mean((2, 3)), **close)


@torch.no_grad()
def test_whole_columns_are_inverted():
    model = randomised(RevColV2("tiny", (16, 16), 4)).eval().double()
    sizes = zip(PYRAMID, model.channels, strict=True)
    before = [torch.randn(2, 16 * k, C, dtype=torch.float64) for k, C in sizes]
    stem = torch.randn(2, 16 * 16, model.channels[0], dtype=torch.float64)
    for column, start in ((model.bottom_up[1], stem), (model.top_down[0], None)):
        after, found = column(start, *before), [None] * 4
        above, below = (after, found) if column.top_down else (found, after)
        for level in reversed(column.order):
            lower, upper = below[level - 1] if level else start, above[level + 1] if level < 3 else None
            found[level] = column.units[str(level)].inverse(after[level], lower, upper)
            torch.testing.assert_close(found[level], before[level], rtol=1e-6, atol=1e-6)


def test_mask_tokens_fill_the_hidden_cells_of_every_level():
    model = pretraining()
    ids_keep, ids_restore, mask = revcol.random_masking(torch.rand(2, 64), 0.75)
    x = [torch.randn(2, 16 * k, C) for k, C in zip(PYRAMID, model.channels, strict=True)]
    for level, filled in enumerate(model.fill(x, ids_restore, (8, 8))):
        cells = revcol.join_cells(filled - model.pos_embed(level, (8, 8)), PYRAMID[level])
        visible, token = revcol.join_cells(x[level], PYRAMID[level]), model.mask_tokens[level].flatten()
        for b in range(2):
            torch.testing.assert_close(cells[b, ids_keep[b]], visible[b], rtol=1e-4, atol=1e-5)
            expected = token.repeat(48, PYRAMID[level])
            torch.testing.assert_close(cells[b, mask[b].bool()], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 2e-2)])
def test_column_equals_plain_in_less_memory(dtype, tolerance, device):
    """Outputs bit for bit; gradients, with drop path; float32 between units; bytes that autograd stores."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    images, found, stored = torch.randn(4, 3, 32, 32, device=device), {}, {}
    for memory in ("plain", "column"):
        torch.manual_seed(2)
        model = randomised(RevColV2("nano", (32, 32), 4, drop_path=0.5, columns=3, memory=memory)).to(device)
        sizes = []

        def note(x, sizes=sizes):
            sizes.append(x.nbytes)
            return x

        torch.manual_seed(3)
        amp = torch.autocast(device, dtype=dtype, enabled=dtype is not None)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), amp:
            x = model.levels(images)
        assert all(level.dtype == torch.float32 for level in x)
        sum(level.square().mean() for level in x).backward()
        found[memory], stored[memory] = (x, [p.grad for p in model.parameters()]), sum(sizes)
    assert all(torch.equal(a, b) for a, b in zip(found["plain"][0], found["column"][0], strict=True))
    for a, b in zip(found["plain"][1], found["column"][1], strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max()
    assert stored["column"] < stored["plain"] / 3


def test_two_forward_passes_before_one_backward_pass():
    model = pretraining()
    losses = [model(torch.randn(2, 3, 32, 32), torch.rand(2, 64))[0] for _ in range(2)]  # both write to a
    sum(losses).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("size, parameters, multiply_adds", [
    ("base", 88, 19), ("large", 327, 67), ("base_flat", 88, 19)])
def test_sizes_of_the_supplements_table_5(size, parameters, multiply_adds):
    # Attention as plain products: older counters do not know the CPU's fused kernel.
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model = RevColV2(size, (224, 224), 16, memory="plain")
        model.levels(torch.zeros(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.03)
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=0.03)  # it counts two for one


def test_scales_keep_away_from_0_and_do_not_decay():
    model = pretraining()
    scales = [p for name, p in model.named_parameters() if name.endswith(".a")]
    assert len(scales) == 12 and all((a == 0.5).all() for a in scales)
    values = [0.0, -0.0, 1e-9, -1e-9, 2e-3, -2e-3, 0.7, -0.7]
    scales[0].data[:8] = torch.tensor(values)
    with torch.inference_mode():
        model.features(torch.randn(1, 3, 32, 32))  # every forward pass sees to it
    expected = [math.copysign(max(abs(x), 1e-3), x or 1) for x in values]
    torch.testing.assert_close(scales[0][:8].tolist(), expected)
    ids = {id(a) for a in scales}
    for group in common.parameter_groups(model, 0.05):
        assert group["weight_decay"] == 0 or not ids & {id(p) for p in group["params"]}


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_read_outs_are_parts_of_the_whole(columns):
    """A part loads what is not in unused_names, has the whole's features, and uses all parameters that learn;
    no others are computed."""
    whole = randomised(RevColV2("tiny", (32, 32), 4, columns=columns)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = {"top": whole.features(images), "bottom_up": whole.encode(images)[3].mean(1)}
    for read, features in expected.items():
        part = RevColV2("tiny", (32, 32), 4, columns=columns, read=read).eval()
        weights, unused = whole.state_dict(), tuple(part.unused_names)
        part.load_state_dict({name: weights[name] for name in weights if not name.startswith(unused)})
        for p in part.requires_grad_().parameters():
            p.data = p if p.requires_grad else torch.full_like(p, math.nan)
        found = part.features(images)
        torch.testing.assert_close(found, features)
        found.square().sum().backward()
        assert all(p.grad.any() for p in part.parameters() if p.requires_grad)
        last = max(part.layer_id(name) for name, _ in part.named_parameters())
        assert part.layer_id("head.weight") == last + 1  # right after what is there


@pytest.mark.parametrize("read", ["dense", "top"])
def test_layer_ids_and_drop_path(read):
    """Depth in the column's own order, plus the column; top-down columns counted on; whatever is read."""
    model = RevColV2("tiny", (32, 32), 4, drop_path=0.6, read=read)  # depths 1, 1, 2, 3
    expected = {"stem.weight": 0, "bottom_up.0.units.0.blocks.0.mlp.fc1.weight": 1,
                "bottom_up.0.units.3.blocks.2.norm1.bias": 7, "bottom_up.1.units.0.up.proj.weight": 2,
                "bottom_up.1.units.3.a": 2, "bottom_up.1.units.2.blocks.1.attn.qkv.weight": 5,
                "top_down.0.units.3.down.norm.weight": 3, "top_down.0.units.3.blocks.2.mlp.fc2.bias": 5,
                "top_down.1.units.0.blocks.0.norm.bias": 10, "top_down.1.units.0.a": 4, "head.weight": 11}
    assert {name: model.layer_id(name) for name in expected} == expected
    for column in [*model.bottom_up, *model.top_down]:
        rates = [block.drop_path for unit in column.units.values() for block in unit.blocks]
        assert rates == pytest.approx([0.1 * i for i in range(7)])


def test_rectangles_of_one_channel_and_what_the_files_serve(small_npz, tmp_path):
    """--init takes either file, every read-out its own tensors from either."""
    flags = ["--img_size", "32,48", "--in_chans", 1, "--columns", 1, "--norm_pix_loss"]
    command = ["revcol_v2.py", *flags, "--demo", "--data", small_npz, "--epochs", 0.2, "--batch_size", 25]
    run_script([*command, "--out", "run"], tmp_path)
    assert next((tmp_path / "run/pictures").iterdir()).stat().st_size > 1000
    for path in (tmp_path / "run/encoder.pth", tmp_path / "run/last.pth"):
        assert common.network_of(common.read_file(path))["model"] == "revcol_nano"
        for read in ("dense", "top", "bottom_up"):
            model = RevColV2("nano", (64, 32), 4, in_chans=1, columns=1, read=read)
            common.load_weights(model, path, ignore=model.unused_names)  # UserError if names differ
        assert "tensors loaded" in run_script([*command, "--init", path, "--out", path.stem], tmp_path)
