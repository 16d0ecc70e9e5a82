"""What a call costs before any work is done: public operators on 4 elements, in inference.

python benchmarks/bench_overhead.py. Aim: at most 5 us above the bare C++ operator.
"""

import sys
from collections.abc import Callable

import torch
from harness import Harness, Work, parser
from plot import plot_folder
from torch.nn import functional as F

from resnet_fused import _extension, ops

AIM_US = 5.0


def main() -> int:
    options = parser(__doc__, seconds=3)
    options.set_defaults(threads=1)  # there is no work to share, only threads to wait for
    arguments = options.parse_args()
    if not _extension.load():
        print(f"nothing to compare with: {_extension.error()}", file=sys.stderr)
        return 1
    harness = Harness(arguments)
    for subject, providers in _subjects().items():
        with torch.no_grad():
            harness.compare(Work("overhead", subject, "eval", "float32", "4", 1), providers, [])
        times = {row.provider: row.median_ms * 1e3 for row in harness.rows[-len(providers) :]}
        above = times["fused"] - next(iter(times.values()))
        verdict = "within" if above <= AIM_US else "ABOVE"
        print(f"{subject}: {above:.2f} us above the bare operator, {verdict} {AIM_US:g} us")
    plot_folder(harness.write().parent)
    return 0


def _subjects() -> dict[str, dict[str, Callable[[], object]]]:
    """Per operator the bare C++ operator first, then ours, then one of PyTorch's own."""
    x, residual = torch.randn(1, 4, 1, 1), torch.randn(1, 4, 1, 1)
    mean, var, weight, bias = torch.zeros(4), torch.ones(4), torch.ones(4), torch.zeros(4)
    native = torch.ops.resnet_fused_native
    bn = (x, weight, bias, mean, var, False, 0.1, 1e-5)
    no_bn = (None, None, None, None, False, 0.1, 1e-5)
    conv_weight = torch.randn(4, 4, 1, 1)
    geometry = ([0, 0], [1, 1], [1, 1], 1)
    conv = torch.ops.mkldnn._convolution_pointwise.default
    post_op = ("relu", [], None)
    return {
        "add_relu": {
            "bare": lambda: native.add_relu.default(x, residual),
            "fused": lambda: ops.add_relu(x, residual),
            "aten add": lambda: torch.ops.aten.add.Tensor(x, residual),
        },
        "bn_relu": {
            "bare": lambda: native.bn_relu.default(*bn, residual, False, *no_bn, True, False),
            "fused": lambda: ops.bn_relu(x, weight, bias, mean, var, residual=residual),
            "aten batch_norm": lambda: F.batch_norm(x, mean, var, weight, bias),
        },
        "conv_bn_relu": {
            "bare": lambda: conv(x, conv_weight, bias, *geometry, *post_op),
            "fused": lambda: ops.conv_bn_relu(x, conv_weight, weight, bias),
            "aten conv2d": lambda: F.conv2d(x, conv_weight, bias),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
