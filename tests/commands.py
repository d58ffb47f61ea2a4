"""The golden runs: twenty float32 updates of each script, all values given: no new default moves them."""

import json
import tempfile
from pathlib import Path

import torch

from convert_dalle import DVAE

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
FOLDER = tempfile.TemporaryDirectory()
with torch.random.fork_rng():
    torch.manual_seed(0)
    torch.save({"model": DVAE((8, 8), 32, 8).state_dict()}, f"{FOLDER.name}/tokenizer.pth")


def command(name):
    return GOLDEN[name]["command"].replace("TOKENIZER", f"{FOLDER.name}/tokenizer.pth").split()


# By script. A pass over the 250 training images of `small_npz` has 250 / 24 updates: one crosses its end.
SCRIPTS = {f"{name}.py": command(name) for name in GOLDEN if name not in ("seg", "det")}
CIM = SCRIPTS["cim.py"]
