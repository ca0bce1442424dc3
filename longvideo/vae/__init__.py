"""Causal video autoencoder: video to latents and back, whole or as a stream."""

from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.config import AutoencoderConfig
from longvideo.vae.layers import State

__all__ = ["Autoencoder", "AutoencoderConfig", "State"]
