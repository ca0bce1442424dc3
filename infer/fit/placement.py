"""Devices and data type of a pipeline, checked before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import torch

from longvideo.errors import UserError, shown
from longvideo.machine.devices import pick_device

if TYPE_CHECKING:
    from longvideo.quantization.number_formats import DecoderPrecision

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Placement:
    """The devices of a pipeline, and the data type of everything that is not quantized.

    device: device of the transformer, which denoises. decode_device: device of the autoencoder, which decodes latents
    to frames. decode_share: fraction of the decoding that runs on `device`, from 0 to below 1. dtype: data type of
    weights and activations on all devices; None means `pick_dtype` of each device. text_on_cpu: whether the text
    encoder is on the CPU instead of on `device`. low_memory: whether what may be used in turn has one workspace: the
    convolutions of the decoder, and on one GPU the decoder and the transformer. offload_weights: whether the weights of
    the transformer's blocks are in host memory, from which each is copied before it runs.
    Raises UserError for a share or a data type that cannot be used. The devices are not checked; see `choose`.
    """

    device: torch.device
    decode_device: torch.device
    decode_share: float = 0.0
    dtype: torch.dtype | None = None
    text_on_cpu: bool = False
    low_memory: bool = False
    offload_weights: bool = False

    def __post_init__(self) -> None:
        share = self.decode_share
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share < 1:
            raise UserError(f"decode_share is {shown(share)}; expected a number from 0 to below 1")
        if share and numbered(self.device) == numbered(self.decode_device):
            raise UserError(
                f"decode_share is {share:g}, but {self.device} both denoises and decodes; choose another decode_device"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            names = ", ".join(map(str, DTYPES))
            raise UserError(f"dtype is {shown(self.dtype)}; expected one of {names}, or None")

    @classmethod
    def choose(
        cls,
        device: str | torch.device | None = None,
        decode_device: str | torch.device | None = None,
        decode_share: float | None = None,
        dtype: torch.dtype | None = None,
        text_encoder: str | None = None,
        low_memory: bool = False,
        offload_weights: bool = False,
    ) -> Placement:
        """Return a placement on devices of this machine, by their names.

        device: None chooses the current CUDA device if there is one, else the CPU. decode_device: None means `device`.
        decode_share: None means 0. text_encoder: "cpu" for the CPU, "cuda" for `device`, which then must be a GPU; None
        and names of formats mean `device`. The others are those of the constructor.
        Raises UserError for a device that does not exist, and as the constructor does.
        """
        own = _with_index(pick_device(device))
        other = own if decode_device is None else _with_index(pick_device(decode_device))
        if text_encoder == "cuda" and own.type != "cuda":
            raise UserError(f"text_encoder is cuda, but the model runs on {own}; leave text_encoder out, or use a GPU")
        share = 0.0 if decode_share is None else decode_share
        return cls(own, other, share, dtype, text_encoder == "cpu", low_memory, offload_weights)

    @property
    def text_device(self) -> torch.device:
        """Device of the text encoder."""
        return torch.device("cpu") if self.text_on_cpu else self.device

    @property
    def takes_turns(self) -> bool:
        """Whether denoising and decoding never overlap, so that they can use the same memory."""
        return self.low_memory and numbered(self.device) == numbered(self.decode_device)

    @property
    def denoise_dtype(self) -> torch.dtype:
        """Data type of the text encoder and of the transformer."""
        return self.dtype or pick_dtype(self.device)

    def decoder_dtype(self, precision: DecoderPrecision) -> torch.dtype:
        """Return the data type of the decoder's weights, as far as its precision does not depend on a measurement."""
        if precision in ("auto", "fp8-emulated"):
            return self.dtype or pick_dtype(self.decode_device)
        return torch.float32 if precision == "fp32" else torch.bfloat16


def numbered(device: torch.device) -> torch.device:
    """Return a device with its index: "cuda" becomes "cuda:0". It works for devices that do not exist here, too."""
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def pick_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 for CUDA and for CPUs with bfloat16 instructions, float32 for other CPUs."""
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def _with_index(device: torch.device) -> torch.device:
    """Return an existing device with its index: "cuda" becomes the current CUDA device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
