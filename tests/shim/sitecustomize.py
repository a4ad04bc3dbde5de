"""Lets PyPI's torchvision, whose compiled half is for the CUDA build, be imported beside a CPU build of torch: put this
folder on PYTHONPATH. vLLM needs torchvision's image transforms, which are plain PyTorch.

`import torchvision` looks two operators up that its library would have brought; here they are declared in its place.
"""

import sys
from importlib.machinery import PathFinder


class _BeforeTorchvision:
    """Python asks its finders for a module's place just before the module's first import."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name)
        if spec:
            _declare_operators(spec.submodule_search_locations[0])
        return spec


def _declare_operators(folder):
    import torch

    try:
        torch.ops.load_library(f"{folder}/_C.so")
    except OSError:  # not made for this torch
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules["_torchvision_operators"] = operators  # they live as long as this object


sys.meta_path.insert(0, _BeforeTorchvision())
