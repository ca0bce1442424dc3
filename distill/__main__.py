"""`torchrun --nproc-per-node N -m longvideo.distill CONFIG.yaml key=value`: `longvideo distill` in many processes."""

import typer

from longvideo.distill.command import distill
from longvideo.errors import UserError

if __name__ == "__main__":
    try:
        typer.run(distill)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
