"""``python -m evatok.cli``."""

import sys

from evatok.cli import main

sys.exit(main())
