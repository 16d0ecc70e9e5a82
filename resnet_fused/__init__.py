"""Fused blocks for existing ResNets: the same model and state_dict, faster and in less memory."""

import sys

from resnet_fused._version import __version__

try:
    from resnet_fused import models, nn, ops
    from resnet_fused.backends import backend
    from resnet_fused.conversion import explain, fuse, unfuse
    from resnet_fused.conversion.dynamo import register_backend
    from resnet_fused.decompositions import decompositions
    from resnet_fused.nn import TrainingMode

    register_backend()
except (ImportError, OSError):
    # `python -m resnet_fused doctor` has to be able to say what is wrong with PyTorch.
    if sys.argv[:1] != ["-m"]:
        raise

__all__ = [
    "TrainingMode",
    "__version__",
    "backend",
    "decompositions",
    "explain",
    "fuse",
    "models",
    "nn",
    "ops",
    "unfuse",
]
