"""`python -m asyncembed`."""

from .cli import main

main()
