"""`python -m longvideo` and `torchrun -m longvideo`: the command `longvideo` in one process or in many."""

import sys

from longvideo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
