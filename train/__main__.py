"""`torchrun -m longvideo.train`: another name for `torchrun -m longvideo train ar`."""

import sys

from longvideo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", "ar", *sys.argv[1:]]))
