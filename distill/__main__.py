"""`torchrun -m longvideo.distill`: another name for `torchrun -m longvideo distill`."""

import sys

from longvideo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
