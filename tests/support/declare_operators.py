"""Lets torchvision be imported beside a torch for CPUs: run once in an environment for tests or for the server.

There is no build of torchvision with operators for every CPU torch. Neither the peers that our tests run nor LLaVA's
pictures need any of them, but the import does, in every process; so the declaration goes into the installed file.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

DECLARATION = """

if not _has_ops():
    _declared = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _declared.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

if __name__ == "__main__":
    spec = importlib.util.find_spec("torchvision")
    broken = spec and subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode
    if spec and spec.origin and broken:
        extension = Path(spec.origin).with_name("extension.py")
        extension.write_text(extension.read_text() + DECLARATION)
        subprocess.run([sys.executable, "-c", "import torchvision"], check=True)
