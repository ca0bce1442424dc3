"""Autoregressive long-video generation: train, distil and stream causal video diffusion transformers."""

__version__ = "0.1.0"
