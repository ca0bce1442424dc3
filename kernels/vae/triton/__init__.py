"""The operations of the video decoder in Triton; `longvideo.kernels.vae.reference` defines them."""

from longvideo.kernels.vae.triton.convolution import convolve
from longvideo.kernels.vae.triton.passes import add_norm_silu, quantize, upsample_add_norm_silu
from longvideo.kernels.vae.triton.pixels import to_pixels

__all__ = ["add_norm_silu", "convolve", "quantize", "to_pixels", "upsample_add_norm_silu"]
