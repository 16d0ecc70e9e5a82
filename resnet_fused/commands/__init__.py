"""The commands of ``python -m resnet_fused``: one module each, with add_arguments and run."""

COMMANDS = {
    "doctor": "what is installed, what is missing, what that costs and how to repair it",
    "verify": "numerics certificate: our error and eager's error, both against float64",
    "demo": "train and run a fused ResNet on real images, with plots and a report",
}
