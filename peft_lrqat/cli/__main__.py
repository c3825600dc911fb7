"""``python -m peft_lrqat.cli``."""

import sys

from .main import main


sys.exit(main())
