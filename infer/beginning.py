"""What a video begins with: noise alone, a first picture, or footage that it continues."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from longvideo.infer.footage import FootageReader, FootageSource
from longvideo.infer.generation import encode_first_frame
from longvideo.infer.options import check_beginning
from longvideo.infer.reconstruction import reconstruction_warning

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from PIL.Image import Image

    from longvideo.infer.generation import Models

FirstPicture: TypeAlias = "Path | str | np.ndarray | Tensor | Image"


@dataclass(frozen=True)
class Beginning:
    """What a video begins with, encoded; by default nothing.

    first_latent: [1, C, 1, H, W], latent of a given first frame. footage: latents of the chunks that the video
    continues, [1, C, T, H, W] each, float32, in host memory. warning: text about given pixels that the model's
    autoencoder cannot hold, or None.
    """

    first_latent: Tensor | None = None
    footage: tuple[Tensor, ...] = ()
    warning: str | None = None


@dataclass(frozen=True)
class BeginningChoice:
    """The beginning that a caller chose; by default noise alone. Fields are arguments of `StreamingPipeline.stream`.

    Raises UserError for a picture together with a video, and for the length of no video.
    """

    image: FirstPicture | None = None
    video: FootageSource | None = None
    video_seconds: float | None = None

    def __post_init__(self) -> None:
        check_beginning(self.image, self.video, self.video_seconds)

    def encode(self, models: Models) -> Beginning:
        """Read and encode the beginning. Raises UserError for a file or frames that cannot be used.

        Warns (UserWarning) about pixels that the model's autoencoder cannot hold, where the caller's caller is.
        """
        if self.image is not None:
            beginning = self._picture(models)
        elif self.video is not None:
            beginning = self._footage(models, self.video)
        else:
            return Beginning()
        if beginning.warning is not None:
            warnings.warn(beginning.warning, UserWarning, stacklevel=3)
        return beginning

    def _picture(self, models: Models) -> Beginning:
        from longvideo.data.pictures import as_picture

        pixels_HWC = as_picture(self.image, size=(models.settings.height, models.settings.width))
        latent = encode_first_frame(models, pixels_HWC)
        warning = reconstruction_warning(models, pixels_HWC[None], latent, name="the picture")
        return Beginning(latent, warning=warning)

    def _footage(self, models: Models, video: FootageSource) -> Beginning:
        reader = FootageReader.of(models.settings, models.spec, models.decoder.config)
        frames_THWC = reader.read(video, seconds=self.video_seconds)
        latents = models.encoder.encode(frames_THWC).cpu()
        # the first frame, which is the first latent frame: a whole clip would take the memory of a whole decoding
        warning = reconstruction_warning(models, frames_THWC[:1], latents[:, :, :1], name="the video")
        return Beginning(footage=latents.split(models.spec.chunk_frames, dim=2), warning=warning)
