"""`torchrun --nproc-per-node N -m longvideo.distill CONFIG.yaml key=value`: `longvideo distill` in many processes."""

from longvideo.distill.command import distill
from longvideo.training.command import main

if __name__ == "__main__":
    main(distill)
