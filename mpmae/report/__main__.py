"""`python -m mpmae.report` = `mpmae-report`."""

import sys

from mpmae.report.cli import main

sys.exit(main())
