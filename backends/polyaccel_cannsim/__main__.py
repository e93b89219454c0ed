"""``python -m polyaccel_cannsim``."""

import sys

from .cli import main

sys.exit(main())
