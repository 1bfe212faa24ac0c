"""Convert checkpoints: python convert_torch_checkpoint.py --src FILE --dst DIR (the same as python -m maskvit convert)."""

import sys

from maskvit.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
