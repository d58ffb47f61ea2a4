"""Twenty float32 losses of every script, as an earlier version gave them: no change of shape moves them.
A commit that changes a draw says so and puts what its runs log as train/loss into golden.json.

Other processors round differently, and twenty updates enlarge that: hence the tolerance.
"""

import pytest
from commands import GOLDEN, SCRIPTS, command
from conftest import run_script
from torture import log


def check(name, out):
    losses = [line["train/loss"] for line in log(out) if "train/loss" in line]
    assert losses == pytest.approx(GOLDEN[name]["losses"], rel=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_are_those_of_earlier_versions(unbroken, script):
    check(script.removesuffix(".py"), unbroken / script)


@pytest.mark.parametrize("name", ["seg", "det"])
def test_losses_of_transfer_are_those_of_earlier_versions(tmp_path, name):
    run_script([*command(name), "--data", "shapes", "--out", "run"], tmp_path)
    check(name, tmp_path / "run")
