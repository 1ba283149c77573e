"""Benchmarks of genft and of the peers it runs beside: time, memory, and the evidence that the figures are right."""

import os
import time

# When the process began, as near as a package can know: a run's budget counts what imports cost.
STARTED = time.monotonic()

# torch's profiler, which traces memory on a CPU, writes a line to stderr at every start and stop otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
