"""Train, continue or evaluate: python main.py --config=configs/... --workdir=runs/NAME (the same as python -m maskvit train)."""

import signal
import sys

# Until a run listens itself, Ctrl-C ends the process at once as SIGTERM does: raised amid an import, KeyboardInterrupt is a traceback,
# or is lost in a library and the run begins all the same.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from maskvit.commands.train import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
