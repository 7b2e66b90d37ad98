"""A run as JUnit XML: a suite for each backend, a test case for each record."""

from __future__ import annotations

from collections import defaultdict
from xml.etree import ElementTree

from moebench.journal import Run, merge
from moebench.record import Record, Status
from moebench.reports.reproduce import command
from moebench.reports.text import clean

# The output, or the time, was there and is not right; every other status but ok and skipped is an error: there was no outcome.
FAILURES: frozenset[Status] = frozenset({"wrong", "nonfinite", "unwritten", "input_changed", "nondeterministic", "too_fast"})


def export(run: Run, name: str) -> dict[str, bytes]:
    """time is what the worker spent on a case, where the record says it; the measured time is a property."""
    root = ElementTree.Element("testsuites", name="moebench")
    by_backend: dict[str, list[Record]] = defaultdict(list)
    for record in merge([run]):
        by_backend[record.backend].append(record)
    for backend, records in by_backend.items():
        statuses = [record.status for record in records]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=clean(backend),
            tests=str(len(records)),
            failures=str(sum(status in FAILURES for status in statuses)),
            skipped=str(statuses.count("skipped")),
            errors=str(sum(status not in (*FAILURES, "ok", "skipped") for status in statuses)),
            time=f"{sum(_seconds(record) for record in records):.6f}",
            timestamp=clean(run.manifest.started),
            hostname=clean(run.manifest.device.name),
        )
        for record in records:
            _test(suite, record)
    for counted in ("tests", "failures", "skipped", "errors"):
        root.set(counted, str(sum(int(suite.get(counted, "0")) for suite in root)))
    ElementTree.indent(root)
    return {name: ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"}


def _test(suite: ElementTree.Element, record: Record) -> None:
    title = (
        record.case.label + ("" if record.scope == "experts" else f" {record.scope}") + (f" round {record.round}" if record.round else "")
    )
    test = ElementTree.SubElement(
        suite, "testcase", name=clean(title), classname=f"moebench.{clean(record.backend)}", time=f"{_seconds(record):.6f}"
    )
    properties = ElementTree.SubElement(test, "properties")
    for name, value in _properties(record).items():
        ElementTree.SubElement(properties, "property", name=name, value=clean(value))
    if record.status == "skipped":
        ElementTree.SubElement(test, "skipped", message=clean(record.reason))
    elif record.status != "ok":
        kind = "failure" if record.status in FAILURES else "error"
        outcome = ElementTree.SubElement(test, kind, message=clean(record.reason), type=record.status)
        outcome.text = clean(f"{record.status}: {record.reason}; again with: {command(record)}")


def _properties(record: Record) -> dict[str, str]:
    told = {"case": record.case.key, "arch": record.arch, "device": record.device, "contract": record.contract_id}
    if record.timing:
        low, high = record.timing.interval_us
        told |= {"median_us": repr(record.timing.median_us), "low_us": repr(low), "high_us": repr(high)}
    if record.error:
        told |= {"rel_l2": repr(record.error.rel_l2), "rel_l2_tolerance": repr(record.error.rel_l2_tolerance)}
    return {name: value for name, value in told.items() if value} | ({"flags": ", ".join(record.flags)} if record.flags else {})


def _seconds(record: Record) -> float:
    return sum(record.phases_s.values())
