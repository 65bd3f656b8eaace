"""`python -m mpmae.shard_tools`: the same as `mpmae-shards`."""

import sys

from mpmae.shard_tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
