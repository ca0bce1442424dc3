"""`torchrun --nproc-per-node N -m longvideo.train CONFIG.yaml key=value`: `longvideo train ar` in many processes."""

from longvideo.train.command import ar
from longvideo.training.command import main

if __name__ == "__main__":
    main(ar)
