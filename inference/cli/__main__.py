"""Run the command as `python -m probattn.inference.cli`."""

import sys

from probattn.inference.cli.command_line import main

if __name__ == "__main__":
    sys.exit(main())
