"""`python -m lacuna`, as torchrun starts it."""

from lacuna.cli import main

main()
