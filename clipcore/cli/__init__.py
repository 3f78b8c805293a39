"""The command line: parses, calls the public API, prints."""

import os

from clipcore.cli.app import app


def main() -> None:
    """Run the command line; exits with 0 for ok, 1 for not verified, 2 for bad input."""
    # a framework that is imported further down greets on stderr unless told otherwise before
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    app()
