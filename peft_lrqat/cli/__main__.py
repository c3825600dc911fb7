"""``python -m peft_lrqat.cli``, the same program as ``lrqat``."""

import sys

from lrqat_command import main


if __name__ == "__main__":
    sys.exit(main())
