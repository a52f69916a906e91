"""`python -m maskdm` and `accelerate launch -m maskdm` are the `maskdm` command."""

import sys

from maskdm.cli import main

sys.exit(main())
