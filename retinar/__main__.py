"""``python -m retinar VERB ...`` is the console script ``retinar VERB ...``."""

from retinar.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
