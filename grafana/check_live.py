#!/usr/bin/env python3
"""Runs every expression of the dashboards on a live Prometheus and reports those that return no data.

    check_live.py [URL] [--dashboards DIR] [--rules FILE] [--names FILE] [--window 1m] [--offline]

With the rules it also queries every series that an alert reads, and checks that Prometheus could evaluate the alert.
Metrics that a healthy node without a GPU does not have are listed in ABSENT with the reason; if they are missing, they
are reported as not checked.

Exit status: 0 if every expression returned data, 1 if one did not (or named an unknown metric), 2 if the dashboards or
Prometheus could not be read. Needs only Python 3.8.
"""

import argparse
import json
import math
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
PREFIXED = r"\b(?:preceptor|process)_\w+"
NO_DATA = "no data"
HISTOGRAM_PARTS = ("_bucket", "_sum", "_count")
# Series that Prometheus generates.
BUILT_IN = {"up", "ALERTS"}
ONLY_SERVED = "only if rollout servers sample (rollout.engine)"
ONLY_WORKERS = "only if workers sample (rollout.engine)"
# Metrics that may be missing, with the reason.
ABSENT = {
    "ALERTS": "only while an alert is pending or firing",
    "preceptor_broker_ok": ONLY_WORKERS,
    "preceptor_device_memory_used_bytes": "only if the policy is on a GPU",
    "preceptor_hand_over_duration_seconds": ONLY_SERVED,
    "preceptor_labels_bought_again_total": "only if two labelers ask the same question at the same time",
    "preceptor_micro_batch": "only after the learner's device ran out of memory",
    "preceptor_rollout_server_answers_total": ONLY_SERVED,
    "preceptor_rollout_server_canary": ONLY_SERVED,
    "preceptor_rollout_server_ready": ONLY_SERVED,
    "preceptor_rollout_server_tokens_total": ONLY_SERVED,
    "preceptor_rollout_server_under_way": ONLY_SERVED,
    "preceptor_rollout_server_version": ONLY_SERVED,
    "preceptor_stage_failures_total": "only after a stage failed",
    "preceptor_stalled": "only while a stage blocks the run",
    "preceptor_worker_result_bytes_total": ONLY_WORKERS,
    "preceptor_worker_results_total": ONLY_WORKERS,
    "preceptor_worker_slots": ONLY_WORKERS,
    "preceptor_worker_tokens_total": ONLY_WORKERS,
    "preceptor_worker_up": ONLY_WORKERS,
    "preceptor_worker_version": ONLY_WORKERS,
}


class Unusable(Exception):
    """A dashboard or a response of Prometheus that cannot be read."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:9090", help="Prometheus (default: %(default)s)")
    parser.add_argument("--dashboards", type=Path, default=Path(__file__).parent / "dashboards")
    parser.add_argument("--rules", type=Path, help="alerts.yml, to check the series that its alerts read")
    parser.add_argument("--names", type=Path, help="known metrics: one name per line, or a saved /metrics page")
    parser.add_argument("--window", default="1m", help="value of $__rate_interval (default: %(default)s)")
    parser.add_argument("--offline", action="store_true", help="check files and names only, without Prometheus")
    options = parser.parse_args()
    try:
        return check(options)
    except (Unusable, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check(options):
    """Returns the exit status: 0, or 1 if any expression is wrong."""
    known = known_names(options.names) if options.names else None
    asked = list(dashboards(options.dashboards)) + (list(alerts(options)) if options.rules else [])
    correct, absent, faults = 0, [], []
    for title, source, may_be_empty in asked:
        fault = judge(source, known, options)
        # A metric that may be missing on a node must still be in the program's list.
        reason = None if options.offline else fault and excuse(source, known)
        if not fault or (may_be_empty and fault == NO_DATA):
            correct += 1
        elif reason:
            absent.append(f"not checked: {title}: {reason}")
        else:
            faults.append(f"{title}: {fault}\n    {source}")
    print("\n".join(absent + faults), end="\n" if absent or faults else "")
    print(f"{correct} of {len(asked)} expressions are correct, {len(absent)} not checked, {len(faults)} wrong")
    return 1 if faults else 0


def dashboards(folder):
    """Yields (title, expression, whether it may be empty) of all queries of the dashboards."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise Unusable(f"no dashboard in {folder}: name the folder with --dashboards")
    for file in files:
        dashboard = json.loads(file.read_text(encoding="utf-8"))
        for title, source in expressions(dashboard):
            yield f"{file.name}: {title}", source, False
        # There may be no events, but the expression must be valid.
        for annotation in dashboard.get("annotations", {}).get("list", []):
            yield f"{file.name}: annotation {annotation['name']}", annotation["expr"], True


def alerts(options):
    """Yields the same for every series that an alert reads; offline, for every metric that the file names."""
    if options.offline:
        for name in sorted(set(re.findall(PREFIXED, options.rules.read_text(encoding="utf-8")))):
            yield options.rules.name, name, False
        return
    groups = fetch(f"{options.url.rstrip('/')}/api/v1/rules?type=alert")["groups"]
    listed = [rule for group in groups for rule in group["rules"]]
    if not listed:
        raise Unusable(f"{options.url} has loaded no alert: does its configuration name alerts.yml?")
    for rule in listed:
        # The complete expression is empty unless the alert fires.
        yield f"alert {rule['name']}", rule["query"], True
        for selector in sorted(set(re.findall(rf"(?:{PREFIXED}|\bup\b)(?:\{{[^}}]*\}})?", rule["query"]))):
            yield f"alert {rule['name']}", selector, False


def judge(source, known, options):
    """Returns the fault of an expression, or None."""
    if known is not None:
        unknown = sorted(name for name in metric_names(source) if not is_known(name, known))
        if unknown:
            return "unknown metric " + ", ".join(unknown)
    query = substitute(source, options.window)
    if "$" in query:
        return "unknown variable"
    if options.offline:
        return None
    return no_data(ask(options.url, query))


def excuse(source, known):
    """Returns the reason why an expression may be empty, or None. One of its metrics must be missing and in ABSENT."""
    for name in sorted(metric_names(source)):
        reason = next((ABSENT[candidate] for candidate in names_of(name) if candidate in ABSENT), None)
        if reason and (name in BUILT_IN or known is None or not is_known(name, known)):
            return reason
    return None


def expressions(dashboard):
    """Yields (title, expression) of every target and of every variable that is filled by a query."""
    for panel in panels(dashboard.get("panels", [])):
        targets = panel.get("targets", [])
        if not targets and panel.get("type") not in ("row", "text"):
            raise Unusable(f"panel {panel.get('title')!r} has no target")
        for target in targets:
            yield f"{panel['title']} ({target['refId']})", target["expr"]
    for variable in dashboard.get("templating", {}).get("list", []):
        if variable["type"] == "query":
            query = variable["query"]["query"]
            selector = re.fullmatch(r"label_values\((.+),\s*\w+\)", query)
            if not selector:
                raise Unusable(f"variable {variable['name']!r}: only label_values(metric, label) is supported: {query}")
            yield f"variable {variable['name']}", selector[1]


def panels(listed):
    """Yields all panels, including those inside collapsed rows."""
    for panel in listed:
        yield panel
        yield from panels(panel.get("panels", []))


def substitute(expression, window):
    """Returns the expression with Grafana's variables replaced: durations by the window, all others by '.*'."""
    expression = re.sub(r"\$\{?__(rate_interval|interval|range)\}?", window, expression)
    return re.sub(r"\$\{?(instance|job|role|stage|edge|worker|labeler)(:\w+)?\b\}?", ".*", expression)


def metric_names(expression):
    """Returns the metrics of an expression: names before a brace or bracket, and names with the project's prefix."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', expression)
    return set(re.findall(rf"({NAME})\s*[{{\[]", bare)) | set(re.findall(PREFIXED, bare))


def known_names(file):
    """Returns the names in a list or on a saved /metrics page (its TYPE lines and samples)."""
    names = set()
    for line in file.read_text(encoding="utf-8").splitlines():
        found = re.match(rf"(?:# TYPE )?({NAME})", line)
        if found:
            names.add(found[1])
    if not names:
        raise Unusable(f"{file} names no metric")
    return names


def is_known(name, known):
    """Returns whether a name, or the histogram to which it belongs, is known."""
    return name in BUILT_IN or any(candidate in known for candidate in names_of(name))


def names_of(name):
    """Returns the name, and the name of the histogram to which it belongs, if it has the form of a part of one."""
    return [name, *(name[: -len(part)] for part in HISTOGRAM_PARTS if name.endswith(part))]


def ask(url, query):
    """Returns the result vector of an instant query, or the error of Prometheus as a string."""
    answer = fetch(f"{url.rstrip('/')}/api/v1/query?" + urllib.parse.urlencode({"query": query}))
    return answer if isinstance(answer, str) else answer["result"]


def fetch(address):
    """Returns the "data" of a response of Prometheus, or its error as a string."""
    try:
        with urllib.request.urlopen(address, timeout=10) as response:
            return json.load(response)["data"]
    except urllib.error.HTTPError as error:
        body = error.read().decode(errors="replace")
        try:
            return str(json.loads(body)["error"])
        except (ValueError, KeyError, TypeError):
            raise Unusable(f"{address} answered {error.code}: is it Prometheus?") from error
    except urllib.error.URLError as error:
        raise Unusable(f"cannot reach Prometheus: {error.reason}: {address}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Unusable(f"not a response of Prometheus: {address}") from error


def no_data(result):
    """Returns the reason why a panel with this result is empty, or None."""
    if isinstance(result, str):
        return result
    if not result:
        return NO_DATA
    # A quantile without observations, or 0/0, is NaN: the series exists, but the panel is empty.
    if all(math.isnan(float(sample["value"][1])) for sample in result):
        return "only NaN: no observations within the window; wait, or widen it with --window"
    return None


if __name__ == "__main__":
    sys.exit(main())
