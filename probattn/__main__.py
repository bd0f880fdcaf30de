"""Run the command as `python -m probattn`."""

import sys

from probattn.inference.cli import main

if __name__ == "__main__":
    sys.exit(main())
