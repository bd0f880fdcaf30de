"""What the command line prints when it fails."""


def error_line(stderr):
    """The one line that an error is."""
    [line] = stderr.splitlines()
    assert line.startswith("probattn: error: ")
    return line.removeprefix("probattn: error: ")
