"""Twenty float32 losses of every script, as an earlier version gave them: no change of shape moves them.
A commit that changes a draw says so and puts what its runs log as train/loss into golden.json.

Other processors round differently, and twenty updates enlarge that: hence the tolerance.
"""

import pytest
from commands import GOLDEN, SCRIPTS, command
from conftest import losses, stopped


def check(name, out, n):
    # torch 2.11 differs by 1.3e-4
    assert losses(out) == pytest.approx(GOLDEN[name]["losses"][:n], rel=2e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_are_those_of_earlier_versions(unbroken, script):
    check(script.removesuffix(".py"), unbroken / script, 20)


@pytest.mark.parametrize("name", ["seg", "det"])
def test_losses_of_transfer_are_those_of_earlier_versions(tmp_path, name):
    """Slow: a signal ends it after five."""
    stopped(tmp_path, [*command(name), "--data", "shapes", "--out", "run"], "self.step == 4")
    check(name, tmp_path / "run", 5)
