"""`python -m lopro_fx` is `lopro-fx`."""

from __future__ import annotations

import sys

from lopro_fx.cli import main

sys.exit(main())
