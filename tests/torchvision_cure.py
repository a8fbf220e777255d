"""torchvision beside a CPU torch, for test set-up alone."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch

_kept: list[Any] = []  # the declarations last as long as their library object


def cure_torchvision() -> None:
    """Where torchvision is installed without its operators, declare the two that its import needs.

    There is no build of it for every CPU torch, and then transformers cannot import its CLIP either. The operators get
    no code; nothing in the tests calls them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
        import torchvision  # noqa: F401
