"""`torchrun --nproc-per-node N -m longvideo.train CONFIG.yaml key=value`: `longvideo train ar` in many processes."""

from longvideo.cli.train import ar
from longvideo.cli.training import main

if __name__ == "__main__":
    main(ar)
