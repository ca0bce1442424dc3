"""`torchrun --nproc-per-node N -m longvideo.distill CONFIG.yaml key=value`: `longvideo distill` in many processes."""

from longvideo.cli.distill import distill
from longvideo.cli.training import main

if __name__ == "__main__":
    main(distill)
