"""Fused blocks for existing ResNets: the same model and state_dict, faster and in less memory."""

from resnet_fused import models, nn, ops
from resnet_fused._version import __version__
from resnet_fused.backends import backend
from resnet_fused.conversion import explain, fuse, unfuse

__all__ = ["__version__", "backend", "explain", "fuse", "models", "nn", "ops", "unfuse"]
