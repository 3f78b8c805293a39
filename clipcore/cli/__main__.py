"""`python -m clipcore.cli`, where the script is not on the path."""

from clipcore.cli import main

main()
