"""`python -m client`, which is the command `sdxl`."""

import sys

from client.command import main

if __name__ == "__main__":
    sys.exit(main())
