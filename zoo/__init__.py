"""The open zoo of sparse, quantized language models."""

__version__ = "0.1.0"
