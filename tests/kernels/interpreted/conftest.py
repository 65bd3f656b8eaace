"""These tests run Triton kernels in Triton's interpreter, on CPU tensors; it has to be asked for before Triton is imported.

`tests/kernels/test_interpreted.py` runs them so, in a process of its own. By hand:
`TRITON_INTERPRET=1 pytest tests/kernels/interpreted`.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
