"""`python -m glsim.cli`."""

import sys

from glsim.cli import main

if __name__ == "__main__":
    sys.exit(main())
