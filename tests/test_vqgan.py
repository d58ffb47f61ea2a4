"""vqgan.py against a slow VQGAN, the conversion of its checkpoints; CIM on it."""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from test_cim import QUICK

import common
import convert_dalle
from vqgan import VQGAN


def small(grid=(2, 3), entries=20):
    torch.manual_seed(0)
    return VQGAN(grid, entries, width=32, channels=32).requires_grad_(False)


# ---- against a slow version: functions of the tensors' names


def conv(w, name, x, **how):
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how)


def group_norm(w, name, x):
    """By hand: mean and biased variance of each of 32 groups of channels."""
    B, C, H, W = x.shape
    groups = x.reshape(B, 32, -1)
    variance = ((groups - groups.mean(2, keepdim=True)) ** 2).mean(2, keepdim=True)
    x = ((groups - groups.mean(2, keepdim=True)) / (variance + 1e-6).sqrt()).reshape(B, C, H, W)
    return x * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)


def swish(x):
    return x / (1 + (-x).exp())


def block(w, name, x):
    y = conv(w, f"{name}.conv1", swish(group_norm(w, f"{name}.norm1", x)), padding=1)
    y = conv(w, f"{name}.conv2", swish(group_norm(w, f"{name}.norm2", y)), padding=1)
    return y + (conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)


def attention(w, name, x):
    y = group_norm(w, f"{name}.norm", x)
    q, k, v = (conv(w, f"{name}.{part}", y)[0].flatten(1) for part in "qkv")
    mixed = torch.zeros_like(v)
    for i in range(q.shape[1]):
        weights = torch.stack([(q[:, i] * k[:, j]).sum() / math.sqrt(len(q)) for j in range(k.shape[1])])
        mixed[:, i] = (v * weights.softmax(0)).sum(1)
    return x + conv(w, f"{name}.proj_out", mixed.view_as(x))


def middle(w, half, x):
    x = attention(w, f"{half}.mid.attn_1", block(w, f"{half}.mid.block_1", x))
    return block(w, f"{half}.mid.block_2", x)


def slow_encode(w, x):
    x = conv(w, "encoder.conv_in", x, padding=1)
    for i in range(5):
        for j in range(2):
            x = block(w, f"encoder.down.{i}.block.{j}", x)
            x = attention(w, f"encoder.down.{i}.attn.{j}", x) if i == 4 else x
        if i < 4:
            x = conv(w, f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = swish(group_norm(w, "encoder.norm_out", middle(w, "encoder", x)))
    return conv(w, "quant_conv", conv(w, "encoder.conv_out", x, padding=1))


def slow_decode(w, z):
    x = middle(w, "decoder", conv(w, "decoder.conv_in", conv(w, "post_quant_conv", z), padding=1))
    for i in reversed(range(5)):
        for j in range(3):
            x = block(w, f"decoder.up.{i}.block.{j}", x)
            x = attention(w, f"decoder.up.{i}.attn.{j}", x) if i == 4 else x
        if i:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(w, f"decoder.up.{i}.upsample.conv", x, padding=1)
    return conv(w, "decoder.conv_out", swish(group_norm(w, "decoder.norm_out", x)), padding=1)


def test_against_a_slow_version():
    model, pixels = small(), torch.rand(1, 3, 32, 48)
    w = model.state_dict()
    codes = slow_encode(w, 2 * pixels - 1)[0].flatten(1).T
    torch.testing.assert_close(model.quant_conv(model.encoder(2 * pixels - 1))[0].flatten(1).T, codes,
                               rtol=1e-3, atol=1e-4)
    entries = w["quantize.embedding.weight"]
    nearest = [min(range(20), key=lambda i: ((code - entries[i]) ** 2).sum().item()) for code in codes]
    ids = model.ids(pixels)
    assert ids.tolist() == [nearest] and len(set(nearest)) > 1
    z = entries[ids[0]].T.view(1, -1, 2, 3)
    expected = (slow_decode(w, z).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(model.pixels(ids), expected, rtol=1e-3, atol=1e-4)
    assert model.pixels(ids).shape == pixels.shape and model.ids(torch.rand(2, 3, 40, 50)).shape == (2, 6)


def test_the_published_sizes():
    with torch.device("meta"):
        model = VQGAN((14, 14))
    sizes = {half: (len(part.state_dict()), sum(p.numel() for p in part.parameters()))
             for half, part in (("encoder", model.encoder), ("decoder", model.decoder))}
    assert sizes == {"encoder": (144, 29_298_176), "decoder": (194, 42_449_795)}


# ---- files


def test_a_checkpoint_with_foreign_objects_is_converted(tmp_path, monkeypatch, capsys, small_npz):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(VQGAN.__init__, "__defaults__", (1024, 32, 3, 32))  # in place of the published sizes
    model = small((14, 14), entries=20)
    where = {"__module__": "pytorch_lightning.callbacks", "__qualname__": "Callback"}
    Callback = type("Callback", (dict,), where)
    weights = model.state_dict() | {"loss.discriminator.weight": torch.zeros(3)}
    with monkeypatch.context() as library:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            library.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["pytorch_lightning.callbacks"].Callback = Callback
        callback = Callback(best=1.0)
        callback.monitor = "val"
        torch.save({"epoch": 3, "callbacks": {"x": callback}, "state_dict": weights}, "last.ckpt")

    def convert(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_dalle.py", *arguments])
        convert_dalle.convert()

    convert("last.ckpt", "--out", "vqgan.pth")
    assert capsys.readouterr().out.count("sha256") == 2
    tokenizer = convert_dalle.load_tokenizer("vqgan.pth", (14, 14), 3)
    assert tokenizer.vocab_size == 20 and not any(p.requires_grad for p in tokenizer.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in tokenizer.state_dict().items())
    torch.save({"state_dict": {"w": torch.zeros(1)}}, "other.ckpt")
    with pytest.raises(SystemExit):
        convert("other.ckpt", "--out", "no.pth")
    assert "not VQGAN's" in capsys.readouterr().err
    with pytest.raises(common.UserError, match="of 3 channels, --in_chans is 1"):
        convert_dalle.load_tokenizer("vqgan.pth", (14, 14), 1)
    run_script(["cim.py", *QUICK, "--data", small_npz, "--tokenizer", "vqgan.pth"], tmp_path)
