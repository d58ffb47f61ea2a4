"""The golden runs: twenty float32 updates of each script, all values given: no new default moves them."""

import json
from pathlib import Path

import torch
from conftest import once

from convert_dalle import DVAE
from ddae_beitv2 import Tokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def make_tokenizers(folder):
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save({"model": DVAE((8, 8), 32, 8).state_dict()}, folder / "tokenizer.pth")
        vqkd = Tokenizer("nano", (8, 8), 4, vocab_size=32).requires_grad_(False)
        vqkd.encoder.pos_embed.zero_()
        vqkd.encode_task_layer[2].bias -= vqkd.codes(torch.rand(8, 3, 32, 32)).mean((0, 1))  # ids differ
        torch.save({"model": vqkd.state_dict()}, folder / "vqkd.pth")


TOKENIZERS = once("tokenizers", make_tokenizers)


def command(name):
    words = GOLDEN[name]["command"].replace("TOKENIZER", str(TOKENIZERS / "tokenizer.pth"))
    return words.replace("VQKD", str(TOKENIZERS / "vqkd.pth")).split()


# By script. A pass over the 250 training images of `small_npz` has 250 / 24 updates: one crosses its end.
SCRIPTS = {f"{name}.py": command(name) for name in GOLDEN if name not in ("seg", "det")}
CIM = SCRIPTS["cim.py"]
