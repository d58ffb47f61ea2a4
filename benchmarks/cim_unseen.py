"""cim.py from all of another run's networks (--init last.pth), an arm of readings.py.

With --lr 1e-12 its log says what that run's loss is on images it has not seen."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cim  # noqa: E402  (found through the line above)
from common import launch, load_weights  # noqa: E402

if __name__ == "__main__":
    cim.load_enhancer = lambda model, cfg: load_weights(model, cfg.init, prefix="")
    launch(cim.Config, cim.presets, cim.train, "cim")
