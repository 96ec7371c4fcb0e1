"""Measurements of repeated work: wall time, CPU time, page faults and peak memory of the process, as in figures.rs."""

import math
import resource
import time

# Minimum seconds of a repeat, as in figures.rs.
MIN_SECONDS = 2.0


def mark():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_minflt


class Figures:
    def __init__(self, units, unit):
        self.units, self.unit, self.wall_s, self.cpu_s, self.minor_faults = units, unit, [], [], []

    def add(self, before, after):
        for values, a, b in zip([self.wall_s, self.cpu_s, self.minor_faults], before, after):
            values.append(b - a)


def repeat(repeats, units, unit, work):
    """Runs `work` once as a warm-up, twice if it is short, and then measures repeats, each of at least MIN_SECONDS."""
    seconds = once(1, 1, unit, work).wall_s[0]
    if seconds < MIN_SECONDS:
        seconds = once(1, 1, unit, work).wall_s[0]
    times = math.ceil(MIN_SECONDS / seconds)
    figures = Figures(units * times, unit)
    for _ in range(repeats):
        before = mark()
        for _ in range(times):
            work()
        figures.add(before, mark())
    return figures


def once(repeats, units, unit, work):
    """Measures single runs of `work`, which takes long, without a warm-up of its own."""
    figures = Figures(units, unit)
    for _ in range(repeats):
        before = mark()
        work()
        figures.add(before, mark())
    return figures


def peak_rss_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
