#!/usr/bin/env python3
"""Compares a run's event files, read by TensorBoard, with the run's metrics.jsonl.

    read_events.py RUN

Needs the PyPI package tensorboard. Exit status 0 if the events have every figure of every step exactly once.
"""

import json
import math
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Figures that are not scalars of the event file: fields of each event, and the version.
NOT_SCALARS = {"step", "version", "time/unix_seconds"}


def main():
    run = Path(sys.argv[1])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    scalars = {tag: read.Scalars(tag) for tag in read.Tags()["scalars"]}
    expected = {}
    for step in steps:
        for name, value in step.items():
            if name not in NOT_SCALARS and isinstance(value, (int, float)) and not isinstance(value, bool):
                expected.setdefault(name, []).append((step["step"], single(value), step["time/unix_seconds"]))
    assert steps, f"{run} has no steps"
    assert set(scalars) == set(expected), f"tags differ: {set(scalars) ^ set(expected)}"
    for name, figures in expected.items():
        found = [(event.step, event.value, event.wall_time) for event in scalars[name]]
        assert len(found) == len(figures), f"{name}: {len(found)} of {len(figures)} steps"
        for (step, value, at), (step_found, value_found, at_found) in zip(figures, found):
            assert step == step_found and math.isclose(at, at_found, abs_tol=1e-6), f"{name} at step {step}"
            assert value == value_found, f"{name} at step {step}: {value_found}, not {value}"
    print(f"TensorBoard reads {len(expected)} figures of {len(steps)} steps")


def single(value):
    """Rounds a number to single precision."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


if __name__ == "__main__":
    main()
