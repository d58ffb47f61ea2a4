"""Twenty float32 losses of every script, one thread, as an earlier version gave them: a change of shape must not move
them; a commit that changes a draw says so and writes new ones (how: the test's docstring).

Other processors round differently, and twenty updates enlarge that: hence the tolerance.
"""

import json

import pytest
import torch
from conftest import ROOT, run_script

from convert_dalle import DVAE

GOLDEN = json.loads((ROOT / "tests/golden.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_losses_are_those_of_earlier_versions(small_npz, tmp_path, name):
    """To write new values: put what this run logs as train/loss into golden.json."""
    torch.save({"model": DVAE((8, 8), 32, 8).state_dict()}, tmp_path / "TOKENIZER")  # of the fixed seed
    data = "shapes" if name in ("seg", "det") else small_npz
    run_script([*GOLDEN[name]["command"].split(), "--data", data, "--out", "run"], tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses == pytest.approx(GOLDEN[name]["losses"], rel=1e-4)
