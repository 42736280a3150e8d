"""Measurements, each against peers in the same run."""

import os

# The profiler would otherwise announce every start and stop. Read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
