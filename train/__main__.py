"""`torchrun --nproc-per-node N -m longvideo.train CONFIG.yaml key=value`: `longvideo train ar` in many processes."""

import typer

from longvideo.errors import UserError
from longvideo.train.command import ar

if __name__ == "__main__":
    try:
        typer.run(ar)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
