"""RadarGate and other gates over frozen LoRA experts, on PyTorch Lightning."""

__version__ = "0.1.0"
