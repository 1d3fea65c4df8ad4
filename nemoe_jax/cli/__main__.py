"""`python -m nemoe_jax.cli`."""

import sys

from nemoe_jax.cli.main import main

sys.exit(main())
