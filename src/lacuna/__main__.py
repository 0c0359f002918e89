import sys

if not sys.flags.safe_path:
    del sys.path[0]  # where the user stands: a random.py there is no library
from lacuna.cli import main

main()
