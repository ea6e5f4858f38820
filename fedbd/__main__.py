"""``python -m fedbd`` is ``fedbd``."""

from fedbd.cli.main import main

if __name__ == "__main__":
    main()
