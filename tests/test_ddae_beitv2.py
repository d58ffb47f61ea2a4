"""ddae_beitv2.py: student against timm's BEiT, tokenizer and loss against slow versions; the command."""

import shutil

import pytest
import torch
from commands import SCRIPTS
from conftest import run_script
from torch import nn
from torch.nn import functional as F
from torture import log

import beit
import common
import ddae
import finetune
from common import UserError
from ddae_beitv2 import Config, DeepDynamicBEiTv2, Tokenizer, load_tokenizer

SHAPE = {"model": "nano", "img_size": (32, 32), "patch_size": 4, "tokenizer": "file"}


def build(random=0.0, **values):
    """Model with a random tokenizer; random: noise on every parameter, so that none is without effect."""
    cfg = Config(**(SHAPE | values))
    model = DeepDynamicBEiTv2(cfg, 32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += random * torch.randn_like(parameter) * (name != "beta")
    tokenizer = Tokenizer("nano", cfg.grid, 4, cfg.in_chans, vocab_size=32).requires_grad_(False)
    normalize = common.Normalize(cfg.mean, cfg.std, "cpu")
    model.__dict__.update(tokenizer=tokenizer, to_pixels=normalize.undo)
    return model


def batch(model, n=3):
    """Images as the loader gives them, and the distance maps of their masks."""
    cfg = model.cfg
    images = common.Normalize(cfg.mean, cfg.std, "cpu")(torch.rand(n, cfg.in_chans, *cfg.img_size))
    return images, torch.stack([ddae.sample_mask(cfg) for _ in range(n)])


# ---- student


def test_predictions_against_timms_blocks():
    """Mask tokens, shared relative positions, layer scale, biases, aggregation, head."""
    timm = pytest.importorskip("timm.models.beit")
    ours = build(random=0.2).eval()
    theirs = timm.Beit(32, 4, num_classes=0, global_pool="", embed_dim=128, depth=6, num_heads=4,
                       init_values=1, use_abs_pos_emb=False, use_shared_rel_pos_bias=True).eval()
    state = ours.state_dict()
    for name in [name for name in state if name.endswith("qkv.bias")]:
        state[name][128:256] = 0  # of the keys: without effect, and timm has none
        q, _, v = state.pop(name).chunk(3)
        state |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
    for i in (0, 1):
        state = {name.replace(f"cls_pt_layers.{i}", f"blocks.{4 + i}"): x for name, x in state.items()}
    mask_token, weight, bias, _ = map(state.pop, ("mask_token", "lm_head.weight", "lm_head.bias", "beta"))
    theirs.load_state_dict(state)  # strict
    images, distance = batch(ours)
    with torch.no_grad():
        positions, logits = ours.predict(images, distance)
        x = theirs.patch_embed(images)
        x[distance > 0] = mask_token[0, 0]
        x, outputs = torch.cat([theirs.cls_token.expand(3, -1, -1), x], 1), []
        for block in theirs.blocks[:4]:
            x = block(x, theirs.rel_pos_bias())
            outputs.append(x)
        x = torch.cat([outputs[3][:, :1], outputs[2][:, 1:]], 1)
        for block in theirs.blocks[4:]:
            x = block(x, theirs.rel_pos_bias())
        expected = [F.linear(theirs.norm(y), weight, bias)[:, 1:][distance > 0] for y in (*outputs, x)]
    assert torch.equal(positions, torch.stack([row.nonzero()[:, 0] for row in distance]))
    torch.testing.assert_close(logits.flatten(1, 2), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_the_encoder_of_a_file_computes_what_the_student_does():
    model, images = build(random=0.2, num_levels=1), torch.randn(2, 3, 32, 32)
    plain = beit.RelPosViT("nano", (32, 32), 4)
    plain.load_state_dict(model.trunk_state())  # strict
    torch.testing.assert_close(plain(images), beit.RelPosViT.forward(model, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size, levels, early", [("base", [3, 6, 9, 12], 9), ("large", [6, 12, 18, 24], 21),
                                                 ("nano", [1, 2, 3, 4], 3)])
def test_levels_and_initial_values(size, levels, early):
    with torch.device("meta"):
        model = DeepDynamicBEiTv2(Config(model=size, tokenizer="x"), 32)
    assert (model.levels, model.early) == (levels, early)
    model = build()
    for i, block in (*enumerate(model.blocks, 1), *enumerate(model.cls_pt_layers, 4)):
        for linear, scale in ((block.attn.qkv, 1), (block.attn.proj, 2 * i), (block.mlp.fc2, 2 * i)):
            # a normal of deviation .02 that is cut at .02 has a deviation of .0108
            assert linear.weight.std().item() == pytest.approx(0.0108 / scale**0.5, rel=0.05)
            assert linear.weight.abs().max() <= 0.02 / scale**0.5 + 1e-6 and not linear.bias.any()
        assert (block.gamma_1 == 0.1).all() and (block.gamma_2 == 0.1).all()
    assert not model.rel_pos_bias.relative_position_bias_table.any() and model.beta.tolist() == [-0.5] * 4


# ---- tokenizer


def vqkd_file(path, D=128, depth=4, in_chans=3, vocab_size=50):
    """A file with the names of VQ-KD's, all that are dropped included; and a function (B, C, H, W) in [0, 1]
    -> ids (B, L) that computes with timm's blocks in float64."""
    timm = pytest.importorskip("timm.models.beit")
    encoder = timm.Beit(32, 4, in_chans, 0, "", D, depth, 4).double().eval()
    first, last = nn.Linear(D, D).double(), nn.Linear(D, 8).double()
    book = torch.randn(vocab_size, 8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *first.parameters(), *last.parameters()):
            parameter += 0.08 * torch.randn_like(parameter)
    parts = {"encode_task_layer.0": first, "encode_task_layer.2": last, "encoder": encoder}
    weights = {f"{part}.{name}".replace("encoder.norm", "encoder.fc_norm"): value.float()
               for part, network in parts.items() for name, value in network.state_dict().items()}
    weights["quantize.embedding.weight"] = book.float()
    dropped = ("decoder.blocks.0.norm1.weight", "decode_task_layer.0.weight", "teacher_model.visual.proj",
               "quantize.embedding.cluster_size", "quantize.embedding.embed_avg", "quantize.cluster_size",
               "quantize.embedding.initted", "scaling_layer.shift")
    torch.save({"model": weights | dict.fromkeys(dropped, torch.ones(3)), "epoch": 99, "optimizer": {}}, path)

    @torch.no_grad()
    def ids(pixels):
        codes = last(first(encoder(pixels.double() * 255 / 127.5 - 1)[:, 1:]).tanh())
        found = [max(range(vocab_size), key=lambda i: code @ book[i] / book[i].norm())
                 for code in codes.flatten(0, 1)]
        return torch.tensor(found).unflatten(0, codes.shape[:2])

    return ids


def test_tokenizer_of_a_file_against_timms_blocks(tmp_path):
    slow_ids = vqkd_file(tmp_path / "vqkd.pth")
    tokenizer, pixels = load_tokenizer(tmp_path / "vqkd.pth", Config(**SHAPE)), torch.rand(2, 3, 32, 32)
    expected = slow_ids(pixels)
    assert torch.equal(tokenizer.ids(pixels), expected) and len(expected.unique()) > 10
    with torch.autocast("cpu", torch.bfloat16):
        assert (tokenizer.ids(pixels) == expected).float().mean() > 0.8
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert load_tokenizer(tmp_path / "vqkd.pth", Config(**SHAPE)).digest == tokenizer.digest


def test_tokenizer_for_patches_and_grids_of_another_size(tmp_path, capsys):
    """Student: 12 x 16 patches of 2 px, tokenizer: 8 x 8 of 4: it sees 48 x 64 px."""
    vqkd_file(tmp_path / "vqkd.pth")
    cfg = Config(**SHAPE | {"img_size": (24, 32), "patch_size": 2})
    tokenizer = load_tokenizer(tmp_path / "vqkd.pth", cfg)
    assert "encoder.pos_embed 8x8 -> 12x16" in capsys.readouterr().out
    pixels = torch.rand(2, 3, 24, 32)
    larger = F.interpolate(pixels, (48, 64), mode="bicubic", antialias=True).clamp(0, 1)
    ids = tokenizer.ids(pixels)
    assert torch.equal(ids, tokenizer.ids(larger)) and ids.shape == (2, 192)


@pytest.mark.parametrize("change, words", [
    (lambda path: torch.save({"model": {"cls_token": torch.ones(1)}}, path), "lacks encoder.patch_embed"),
    (lambda path: vqkd_file(path, D=100), "width 100"),
    (lambda path: vqkd_file(path, depth=3), "tensors missing or unexpected, as encoder.blocks.3"),
])
def test_files_that_are_no_tokenizer(tmp_path, change, words):
    change(tmp_path / "file.pth")
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(tmp_path / "file.pth", Config(**SHAPE))
    assert "\n" not in str(error.value)


# ---- loss


@pytest.mark.parametrize("dds", [True, False])
def test_the_whole_loss_against_its_parts_written_out(dds):
    model = build(random=0.2, dds=dds)
    if dds:
        model.beta.data = torch.tensor([-0.9, -0.5, 0.1, 0.4])
    images, distance = batch(model)
    positions, logits = model.predict(images, distance)
    ids, n, expected = model.tokenizer.ids(model.to_pixels(images)), model.cfg.n_masked, 0
    for level, values in enumerate(logits):
        for b in range(3):
            powers = [0 if d == 0 or not dds else d ** model.beta[level % 4] for d in distance[b]]
            h = [torch.as_tensor(power).exp() * (d > 0) for power, d in zip(powers, distance[b], strict=True)]
            h, aggregation = [x / sum(h) for x in h], level == len(logits) - 1
            for j, place in enumerate(positions[b]):
                error = values[b, j].logsumexp(0) - values[b, j, ids[b, place]]
                weight = 1 if aggregation else h[place] / max(h).detach()
                weight = weight * (1 if aggregation or level == len(logits) - 2 else 0.75)
                expected = expected + weight * error / (3 * n)
            if dds and not aggregation:
                expected = expected + 0.5 * n**0.5 * sum(x**2 for x in h) ** 0.5 / 3
    loss, terms = model(images, distance)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert loss == terms["loss"] == sum(terms.get(x, 0) for x in ("levels", "aggregation", "eq6_reg"))
    last, target = logits[-2].flatten(0, 1), ids.gather(1, positions).flatten()
    assert terms["accuracy"] == (last.argmax(-1) == target).float().mean()
    torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(last, target))
    if dds:
        assert [terms[f"beta/{i}"] for i in (1, 2, 3, 4)] == model.beta.tolist()
        torch.testing.assert_close(*(torch.autograd.grad(x, model.beta)[0] for x in (loss, expected)),
                                   rtol=1e-3, atol=1e-6)


# ---- the command


def test_demo_learns_resumes_and_its_encoder_goes_on(tmp_path):
    """Its tokenizer is made once; a resumed run finds it. finetune.py gets what the student computes."""
    command = ["ddae_beitv2.py", "--demo", "--workers", 0, "--log_every", 8, "--warmup_epochs", 0.01,
               "--epochs", 0.04, "--out", "run"]
    run_script(command, tmp_path)
    lines = log(tmp_path / "run")
    assert lines[-1]["train/cross_entropy"] < 0.95 * lines[0]["train/cross_entropy"]
    before = (tmp_path / "run/tokenizer.pth").read_bytes()
    assert "resumed from" in run_script([*command, "--resume"], tmp_path)
    assert (tmp_path / "run/tokenizer.pth").read_bytes() == before
    flags = ["--pool", "cls", "--weights", str(tmp_path / "run/encoder.pth")]
    cfg = common.parse_config(finetune.Config, finetune.presets, flags)
    assert (cfg.model, cfg.patch_size, cfg.img_size) == ("beit_nano", 5, (25, 25))
    images, forward = torch.randn(2, 1, 25, 25), beit.RelPosViT.forward
    run = torch.load(tmp_path / "run/last.pth", weights_only=True)
    student = DeepDynamicBEiTv2(Config(**run["config"]), 32)
    student.load_state_dict(run["model"])
    found, expected = forward(finetune.load_model(cfg, 3).eval(), images), forward(student, images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_another_tokenizer_is_not_resumed_with(unbroken, small_npz, tmp_path):
    vqkd_file(tmp_path / "vqkd.pth", vocab_size=32)
    shutil.copytree(unbroken / "ddae_beitv2.py@8", tmp_path / "run")
    command = [*SCRIPTS["ddae_beitv2.py"], "--data", small_npz, "--out", "run", "--resume"]
    output = run_script([*command, "--tokenizer", "vqkd.pth"], tmp_path, expect=2)
    assert "tokenizer_sha256" in output and output.count("ddae_beitv2: ") == 1
