"""Answers as `posttrain.kernels.bench.worker` does, without a GPU: some contestants crash it, or keep it busy."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

for line in sys.stdin:
    contestant = json.loads(line)["contestant"]
    if contestant == "crashes":
        print("an illegal memory access", file=sys.stderr, flush=True)
        os.abort()
    if contestant == "hangs":
        time.sleep(60)
    answer: dict[str, Any] = {"copy": 3e9} if contestant is None else {"ms": 1.0, "process": os.getpid()}
    if contestant is not None and contestant == os.environ.get("FAILS"):
        answer = {"failed": "out of memory"}
    print(json.dumps({"answer": answer, "fit": contestant != "breaks"}), flush=True)
