"""Convert other people's models: `fuse`, `unfuse`, and `explain` what was done and why."""

from resnet_fused.conversion.explain import Explanation, Row, explain
from resnet_fused.conversion.fuse import fuse, unfuse

__all__ = ["Explanation", "Row", "explain", "fuse", "unfuse"]
