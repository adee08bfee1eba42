"""Networks in few bits, after Trio-ViT (arXiv 2405.03882), and a model of the machine that computes them."""

from .engine import Quantization, load, quantize, save

__all__ = ["Quantization", "load", "quantize", "save"]
