"""``python -m papertrial``."""

from papertrial.cli import main

main()
