"""`python -m gradmm` is the command `gradmm`."""

import sys

from gradmm.cli import main

if __name__ == "__main__":
    sys.exit(main())
