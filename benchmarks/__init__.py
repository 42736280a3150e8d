"""Benchmarks of visproj and of its peers, which are measured in the same run."""

import os

# Without this, the profiler logs every start and stop. torch reads it on import.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
