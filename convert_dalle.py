"""DALL-E's image tokenizer: the network, its training loss, and a safe conversion of OpenAI's files.

Ramesh et al., Zero-Shot Text-to-Image Generation, arXiv 2102.12092 (appendix A). `cim.py` takes its tokenizer from here:
OpenAI's weights, converted once, or smaller ones of `cim.py --train_tokenizer`.

OpenAI's encoder.pkl and decoder.pkl are whole pickled modules. Unpickling runs whatever such a file says, and the modules in
them fail on current torch. So they are read by an unpickler that knows tensors and nothing else: every class of dall_e or
torch.nn becomes an empty stand-in, any other name is refused, and the tensors are written as a plain file of weights.

    wget https://cdn.openai.com/dall-e/encoder.pkl https://cdn.openai.com/dall-e/decoder.pkl
    python convert_dalle.py encoder.pkl decoder.pkl --out dalle.pth
"""

import argparse
import hashlib
import math
import pickle
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import Refused, check_file, load_weights, read_file, reason, refuse, save_pictures, write_atomically

# ---- the network: a discrete VAE, with the parameter names of the released files ---------------------------------------


class Conv(nn.Module):
    """Convolution of stride 1 that keeps the size; parameters w (out, in, k, k) and b (out,)."""

    def __init__(self, n_in, n_out, k):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, k, k) / math.sqrt(n_in * k * k))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class ResidualBlock(nn.Module):
    def __init__(self, n_in, n_out, kernels):
        super().__init__()
        self.id_path = Conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths, layers = [n_in, *[n_out // 4] * 3, n_out], OrderedDict()
        for i, k in enumerate(kernels):
            layers |= {f"relu_{i + 1}": nn.ReLU(), f"conv_{i + 1}": Conv(widths[i], widths[i + 1], k)}
        self.res_path = nn.Sequential(layers)

    def forward(self, x):
        return self.id_path(x) + self.res_path(x) / 64  # 1 / (number of blocks)^2, as released


def half(first, widths, kernels, resample, last):
    """Encoder or decoder: four groups of two blocks, resampled between groups, from convolution `first` to `last`."""
    n_in, parts = len(first.w), OrderedDict(input=first)
    for i, width in enumerate(widths, start=1):
        group = OrderedDict(block_1=ResidualBlock(n_in, width, kernels), block_2=ResidualBlock(width, width, kernels))
        parts[f"group_{i}"], n_in = nn.Sequential(group | ({"resample": resample} if i < len(widths) else {})), width
    parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))
    return nn.ModuleDict({"blocks": nn.Sequential(parts)})


class DVAE(nn.Module):
    """Images in [0, 1] <-> ids of visual tokens on the grid (h, w), one per 8 x 8 pixels of an image of (8h, 8w).

    The defaults are DALL-E's: 53,786,240 parameters in the encoder, 43,829,766 in the decoder.
    """

    def __init__(self, grid, vocab_size=8192, width=256, in_chans=3):
        super().__init__()
        self.grid, self.vocab_size, widths = grid, vocab_size, [width * 2**i for i in range(4)]
        self.encoder = half(Conv(in_chans, width, 7), widths, (3, 3, 3, 1), nn.MaxPool2d(2), Conv(8 * width, vocab_size, 1))
        self.decoder = half(Conv(vocab_size, width // 2, 1), widths[::-1], (1, 3, 3, 3), nn.Upsample(scale_factor=2),
                            Conv(width, 2 * in_chans, 1))
        self.to(memory_format=torch.channels_last)

    def view(self, pixels):
        """(B, C, H, W) -> (B, C, 8h, 8w), in [0, 1]: what the encoder sees."""
        return F.interpolate(pixels, [8 * n for n in self.grid], mode="bicubic", antialias=True).clamp(0, 1)

    def logits(self, view):
        """(B, C, 8h, 8w) -> (B, vocab_size, h, w) float32, in whatever precision the rest runs."""
        x = self.encoder.blocks[:-1](0.8 * view + 0.1)
        with torch.autocast(view.device.type, enabled=False):
            return self.encoder.blocks.output(x.float())

    @torch.no_grad()
    def ids(self, pixels):
        """(B, C, H, W) -> the most probable tokens, (B, L) int64."""
        return self.logits(self.view(pixels)).argmax(1).flatten(1)

    def distribution(self, x):
        """Output of the decoder's first convolution (B, width / 2, h, w) -> means and log scales, each (B, C, 8h, 8w) float32,
        of the logit of 0.8 * pixel + 0.1."""
        return self.decoder.blocks[1:](x).float().chunk(2, dim=1)

    @torch.no_grad()
    def pixels(self, ids):
        """(B, L) -> (B, C, 8h, 8w) in [0, 1]. The first convolution, of a one-hot input, is a look-up of its columns."""
        first = self.decoder.blocks.input
        x = F.embedding(ids.unflatten(1, self.grid), first.w.flatten(1).T) + first.b
        means, _ = self.distribution(x.permute(0, 3, 1, 2))
        return ((means.sigmoid() - 0.1) / 0.8).clamp(0, 1)

    def forward(self, pixels, noise, temperature, kl_weight):
        """Training: the loss and its terms. loss = kl_weight * KL per token / values per token - log likelihood per value
        (logit-Laplace without its constants); `tokens_used`: exponential of the entropy of their mean use. noise: unused."""
        view = self.view(pixels)
        logits, squeezed = self.logits(view), 0.8 * view + 0.1
        gumbel = -torch.empty_like(logits).exponential_().log()
        relaxed = ((logits + gumbel) / temperature).softmax(1)
        means, log_scales = self.distribution(self.decoder.blocks.input(relaxed))
        with torch.autocast(pixels.device.type, enabled=False):
            likelihood = -((squeezed.logit() - means).abs() * (-log_scales).exp() + log_scales).mean()
            log_q = logits.log_softmax(1)
            kl = (log_q.exp() * log_q).sum(1).mean() + math.log(self.vocab_size)
            loss = kl_weight / (64 * view.shape[1]) * kl - likelihood
            use = log_q.detach().exp().mean((0, 2, 3))
            mse = ((means.sigmoid() - squeezed) / 0.8).square().mean()
            used = torch.special.entr(use).sum().exp()
        terms = {"loss": loss, "likelihood": likelihood, "kl": kl, "mse": mse, "tokens_used": used, "temperature": temperature,
                 "kl_weight": kl_weight}
        return loss, {name: value.detach() for name, value in terms.items()}


def schedule(progress, kl_weight, device):
    """At a share `progress` of the run: temperature (1 to 1/16, half a cosine over its first half), KL weight (from 0, linear
    over its first tenth). DALL-E's values, there in a smaller share of a far longer run."""
    fall = (1 + math.cos(math.pi * min(1.0, 2 * progress))) / 2
    values = {"temperature": (1 + 15 * fall) / 16, "kl_weight": kl_weight * min(1.0, 10 * progress)}
    return {name: torch.full((), value, device=device) for name, value in values.items()}


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tokenizer(path, grid, in_chans, device="cpu"):
    """Frozen DVAE from a file of this script or of `cim.py --train_tokenizer`; its sizes are read off its weights. Its `digest`
    is the file's SHA-256."""
    content = read_file(path)
    weights = content.get("model", content)
    if not {"encoder.blocks.input.w", "encoder.blocks.output.conv.w", "decoder.blocks.input.w"} <= weights.keys():
        raise Refused(f"{path} is no tokenizer with encoder and decoder: give a file written by convert_dalle.py or by "
                      "cim.py --train_tokenizer")
    width, channels = weights["encoder.blocks.input.w"].shape[:2]
    if channels != in_chans:
        raise Refused(f"{path} is a tokenizer for images of {channels} channels, --in_chans is {in_chans}")
    tokenizer = DVAE(grid, len(weights["encoder.blocks.output.conv.w"]), width, in_chans)
    load_weights(tokenizer, path, content=content)
    tokenizer.digest = sha256(path)
    return tokenizer.to(device).eval().requires_grad_(False)


@torch.no_grad()
def draw_tokenizer(path, tokenizer, batch, to_pixels):
    """PNG with what the tokenizer sees, and what it makes of its tokens."""
    view = tokenizer.view(to_pixels(batch))
    ids = tokenizer.ids(view)
    save_pictures(path, list(zip(view, tokenizer.pixels(ids), strict=True)), ["original", "decoded"],
                  f"decoded from {ids.shape[1]} tokens each; {len(ids.unique())} of {tokenizer.vocab_size} in use here")


# ---- the conversion ----------------------------------------------------------------------------------------------------


class StandIn:
    """What is left of a module in the file: its attributes, no behaviour."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):  # an attack on the class itself, in place of an instance, ends in a TypeError here
        vars(self).update(state)


ALLOWED = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor",
           "torch._utils._rebuild_parameter", "torch.device", "torch.Size", "builtins.set", "__builtin__.set"}


class TensorUnpickler(pickle.Unpickler):
    """Knows tensors and the containers around them; classes of dall_e and torch.nn become stand-ins, the rest is refused."""

    def find_class(self, module, name):  # asked for every global; torch itself answers for its storages before
        if f"{module}.{name}" in ALLOWED:
            return super().find_class(module, name)
        if module.split(".")[0] == "dall_e" or module.startswith("torch.nn.modules."):
            return StandIn
        raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'!r}, which no tensor needs")

    def __setattr__(self, name, value):
        if name == "persistent_load":  # torch's also compares the sources of classes, and writes patches of them
            load = value

            def value(saved):
                return load(saved) if saved[0] == "storage" else saved[1]

        super().__setattr__(name, value)


def restricted_load(file, **how):
    return TensorUnpickler(file, **how).load()


RESTRICTED = types.SimpleNamespace(__name__="pickle", Unpickler=TensorUnpickler, load=restricted_load)


def tensors(module, prefix=""):
    """{name: tensor} of an unpickled stand-in, by its `_parameters`, `_buffers` and `_modules`."""
    found = {}
    for kind in ("_parameters", "_buffers"):
        found |= {prefix + name: value.detach() for name, value in vars(module).get(kind, {}).items() if value is not None}
    for name, child in vars(module).get("_modules", {}).items():
        found |= tensors(child, f"{prefix}{name}.")
    return found


def read_pickle(path):
    """{name: tensor} of one of OpenAI's files, in torch's zip or its older format, or of a plain state dict."""
    path = check_file(path)
    try:
        if tarfile.is_tarfile(path):  # torch's oldest format: DALL-E is younger
            raise pickle.UnpicklingError("it is a tar archive")
        if zipfile.is_zipfile(path) and any(name.endswith("constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            raise pickle.UnpicklingError("it is a TorchScript archive, which is a program")
        # A function as map_location: torch.jit.load, to which torch.load hands TorchScript on, refuses it before it reads.
        content = torch.load(path, map_location=lambda storage, _: storage, weights_only=False, pickle_module=RESTRICTED)
        found = tensors(content) if isinstance(content, StandIn) else dict(content)
    except Exception as error:  # pickles fail in many ways
        raise Refused(f"{path} is not one of DALL-E's files: {reason(error)}") from None
    if not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise Refused(f"{path} holds no weights")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="OpenAI's encoder.pkl")
    parser.add_argument("decoder", help="OpenAI's decoder.pkl")
    parser.add_argument("--out", default="dalle.pth", help="file to write (default dalle.pth)")
    args = parser.parse_args()
    try:
        if Path(args.out).exists():
            raise Refused(f"{args.out} exists already: give another --out")
        weights = {f"{part}.{name}": value for part in ("encoder", "decoder")
                   for name, value in read_pickle(getattr(args, part)).items()}
        with torch.device("meta"):
            expected = {name: value.shape for name, value in DVAE((14, 14)).state_dict().items()}
        if wrong := sorted(name for name in expected.keys() | weights.keys()
                           if name not in weights or weights[name].shape != expected.get(name)):
            raise Refused(f"{len(wrong)} tensors of {args.encoder} and {args.decoder} are not DALL-E's, {wrong[0]} for one; "
                          "are they in this order?")
        content = {"model": {name: value.float().clone() for name, value in weights.items()}, "meta": {"method": "dalle"}}
        write_atomically(args.out, lambda file: torch.save(content, file))
    except Refused as error:
        refuse("convert_dalle", error)
    for path in (args.encoder, args.decoder, args.out):
        print(f"{path}: sha256 {sha256(path)}")


if __name__ == "__main__":
    sys.exit(main())
